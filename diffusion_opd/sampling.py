"""Which rows of which task: batches of one task, tasks in turn, every optimizer step a whole number of cycles; and in a
batch rows whose pictures are of one size.

Routing is by data (a column, `teacher_id` or `task`), never by a counter, and the order is a function of seed and epoch
alone, so a resumed run sees what an undisturbed one sees, in any number of processes.

This file knows datasets, and no pipeline, teacher or trainer.
"""

import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from torch.utils.data import Sampler

from .inputs import PROMPT, is_prompt

TEACHER, TASK = "teacher_id", "task"
ROW = "_row"  # of a stream that is evaluated

# Prompts of one task that wait while a stream is searched for another task; older ones are dropped
_MAX_WAITING = 10_000


# What generators are for, as the first number of their seeds after the run's own
SEED_TRAIN, SEED_EVAL, SEED_NOISE, SEED_QUERY, SEED_ANCHOR = 0, 1, 2, 3, 4


def seed_of(*numbers: int) -> int:
    """One 63-bit seed from several numbers; neighbouring inputs give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def noise_generators(generators: Sequence[torch.Generator]) -> list[torch.Generator]:
    """For the noise of a walk's kernel: a pipeline may draw from its own generators at any time."""
    return [torch.Generator().manual_seed(seed_of(generator.initial_seed(), 1)) for generator in generators]


def normal(shape: Sequence[int], generators: Sequence[torch.Generator], device: torch.device) -> torch.Tensor:
    """Noise of one generator a row, in float32: that of diffusers' `randn_tensor`, which waits for the device as it
    copies it there."""
    noise = torch.empty(shape, pin_memory=device.type == "cuda")
    for row, generator in zip(noise, generators, strict=True):
        row.normal_(generator=generator)
    return noise.to(device, non_blocking=True)


class MicroBatch(list[dict[str, Any]]):
    """The rows of a micro-batch of one process, and its place in the run.

    Attributes:
        step (`int`): Its optimizer step.
        number (`int`): Which of the step's micro-batches it is.
        turns (`list[int]`): Of each of its tasks, whose rows are equally many and come in succession, which of the
            task's turns in the step it is.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], step: int, number: int, turns: Sequence[int]):
        super().__init__(rows)
        self.step, self.number, self.turns = step, number, list(turns)

    @property
    def parts(self) -> list[range]:
        """The rows of each turn."""
        count = len(self) // len(self.turns)
        return [range(first, first + count) for first in range(0, len(self), count)]


def micro_batches(
    batches: Sequence[Sequence[dict[str, Any]]], step: int, num_parts: int, task_of: Callable[[dict[str, Any]], str]
) -> list[MicroBatch]:
    """Those of an optimizer step, each of `num_parts` turns."""
    seen, found = Counter[str](), []
    for number, rows in enumerate(batches):
        turns = []
        for first in range(0, len(rows), len(rows) // num_parts):
            task = task_of(rows[first])
            turns.append(seen[task])
            seen[task] += 1
        found.append(MicroBatch(rows, step, number, turns))
    return found


class Turns:
    """Whose turn it is: the tasks of the micro-batches of one block after another.

    Args:
        num_tasks (`int`): How many there are.
        cycles (`int`): Cycles of a block, in each of which every task has its turns; `at_random`: its micro-batches.
        weights (`Sequence[float]`, *optional*): By task the turns in a cycle; `at_random` how likely it is. `None`: 1.
        at_random (`bool`, *optional*): Whether a block is of one task, which is drawn.
        shared_by (`int`, *optional*): So many processes have rows of all turns of a cycle in one micro-batch of theirs.
            0: a micro-batch is a turn.
    """

    def __init__(
        self,
        num_tasks: int,
        cycles: int,
        weights: Sequence[float] | None = None,
        at_random: bool = False,
        shared_by: int = 0,
    ):
        self.cycles, self.at_random, self._shared_by = cycles, at_random, shared_by
        self.weights = list(weights or [1] * num_tasks)

    def __len__(self) -> int:
        """Micro-batches of a block."""
        return self.cycles if self.at_random else self.cycles * int(sum(self.weights))

    def blocks(self, seed: int) -> Iterator[list[int]]:
        """The task of each micro-batch, block after block, without end."""
        draws = np.random.default_rng(seed)
        cycle = [task for task, weight in enumerate(self.weights) for _ in range(int(weight))]
        likely = np.asarray(self.weights) / sum(self.weights)
        while True:
            yield [int(draws.choice(len(likely), p=likely))] * self.cycles if self.at_random else cycle * self.cycles

    def ordered(self, rows: list[Any]) -> list[Any]:
        """The rows of a block, which come turn after turn, as they lie in micro-batches."""
        if not self._shared_by:
            return rows
        length = len(rows) // self.cycles
        share = length // int(sum(self.weights)) // self._shared_by
        return [
            row
            for cycle in range(0, len(rows), length)
            for process in range(self._shared_by)
            for first in range(cycle + process * share, cycle + length, share * self._shared_by)
            for row in rows[first : first + share]
        ]

    def blocks_for(self, rows: Sequence[int], batch_size: int) -> int:
        """Blocks in which every row comes, of so many of each task; `at_random` as many as all of them take up."""
        if self.at_random:
            return -(-sum(rows) // (batch_size * self.cycles))
        return max(
            -(-count // (batch_size * self.cycles * int(weight)))
            for count, weight in zip(rows, self.weights, strict=True)
        )


class TaskCycleSampler(Sampler[int]):
    """Rows of a dataset: `batch_size` of the first task, `batch_size` of the second, and so on in turn (see [`Turns`]).

    An epoch is the smallest whole number of blocks that shows every row (of tasks at random so many blocks as all rows
    take up); tasks with fewer rows than others come round again, in a new order. With `repeats` every row comes so many
    times in succession among those of its task (the group of a prompt), with `iterations` the rows of every block
    come so many times.

    With `sizes`, rows of one size come `alike` in succession (if that is no multiple of `repeats`, as many as are a
    multiple of both). Those that are left over are made up of what the next round over the task's rows begins with.

    Args:
        tasks (`Sequence[str]`): The task of each row.
        task_ids (`Sequence[str]`): In the order of the cycle.
        batch_size (`int`): Samples of one turn, over all processes.
        cycles (`int` or [`Turns`]): Cycles of a block: an optimizer step, or a rollout.
        seed (`int`): Of the order.
        repeats, iterations (`int`, *optional*): See above; `batch_size * cycles` is a multiple of `repeats`.
        sizes (`Sequence[Hashable]`, *optional*): Of each row, what must be equal within a batch.
        alike (`int`, *optional*): See above; `batch_size` is a multiple of it.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        task_ids: Sequence[str],
        batch_size: int,
        cycles: int | Turns,
        seed: int,
        repeats: int = 1,
        iterations: int = 1,
        sizes: Sequence[Hashable] | None = None,
        alike: int = 1,
    ):
        column = np.asarray(tasks)
        self.rows = [np.flatnonzero(column == key) for key in task_ids]
        self.turns = cycles if isinstance(cycles, Turns) else Turns(len(task_ids), cycles)
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0
        self.repeats, self.iterations = repeats, iterations
        self.sizes = [None] * len(column) if sizes is None else sizes
        self.unit = 1 if sizes is None else math.lcm(alike, repeats) // repeats
        rounds = [self._rows_of_a_round(rows) * repeats for rows in self.rows]
        self.num_steps = self.turns.blocks_for(rounds, batch_size)

    def _rows_of_a_round(self, rows: np.ndarray) -> int:
        counts = Counter(self.sizes[row] for row in rows)
        return sum(-(-count // self.unit) * self.unit for count in counts.values())

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_steps * self.iterations * len(self.turns) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        streams = [self._shuffled_forever(task) for task in range(len(self.rows))]
        blocks = self.turns.blocks(seed_of(self.seed, self.epoch, len(self.rows)))
        for turns in islice(blocks, self.num_steps):
            step = self.turns.ordered([row for task in turns for row in islice(streams[task], self.batch_size)])
            for _ in range(self.iterations):
                yield from step

    def _shuffled_forever(self, task: int) -> Iterator[int]:
        order = np.random.default_rng(seed_of(self.seed, self.epoch, task))
        rounds: deque[tuple[list[Hashable], dict[Hashable, deque[int]]]] = deque()  # begun, or looked ahead into

        def draw() -> None:
            rows: dict[Hashable, deque[int]] = defaultdict(deque)
            shuffled = order.permutation(self.rows[task]).tolist()
            for row in shuffled:
                rows[self.sizes[row]].append(row)
            rounds.append(([self.sizes[row] for row in shuffled], rows))

        while True:
            if not rounds:
                draw()
            sizes, rows = rounds.popleft()
            groups: dict[Hashable, list[int]] = defaultdict(list)
            for size in sizes:
                if rows[size]:  # or an earlier round has been made up of it
                    groups[size].append(rows[size].popleft())
                    if len(groups[size]) == self.unit:
                        yield from np.repeat(groups.pop(size), self.repeats).tolist()
            for size, group in groups.items():
                ahead = 0
                while len(group) < self.unit:
                    if ahead == len(rounds):
                        draw()
                    if left := rounds[ahead][1][size]:
                        group.append(left.popleft())
                    else:
                        ahead += 1
                yield from np.repeat(group, self.repeats).tolist()


class TaskCycleStream(torch.utils.data.IterableDataset):
    """The same cycle over streaming datasets, without end: `{task: stream}`, or one stream with a column that names the
    task.

    A stream that ends starts again (with the next epoch's shuffle, if it shuffles). With `size_of`, rows of one size
    wait for each other.

    Raises:
        ValueError: while iterating, if a prompt is no text or names no known task, if a stream holds no prompt of a
            task, or in one of several loader workers, each of which would go through the cycle by itself.
    """

    def __init__(
        self,
        streams: Mapping[str, IterableDataset] | IterableDataset,
        task_ids: Sequence[str],
        batch_size: int,
        cycles: int | Turns = 1,
        repeats: int = 1,
        iterations: int = 1,
        column: str = TEACHER,
        size_of: Callable[[Mapping[str, Any]], Hashable] = lambda example: None,
        alike: int = 1,
        seed: int = 0,
    ):
        self.size_of, self.unit = size_of, math.lcm(alike, repeats) // repeats
        self.streams, self.task_ids, self.batch_size = streams, list(task_ids), batch_size
        self.turns = cycles if isinstance(cycles, Turns) else Turns(len(self.task_ids), cycles)
        self.repeats, self.iterations, self.column, self.seed = repeats, iterations, column, seed

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError(
                f"a streaming dataset cannot be read by {worker.num_workers} workers: the tasks would no longer come "
                "in turn; set `dataloader_num_workers` to 0 or 1."
            )
        if isinstance(self.streams, Mapping):
            examples = {key: _forever(self.streams[key]) for key in self.task_ids}
        else:
            examples = self._split(self.streams)
        groups = {key: self._repeated(key, stream) for key, stream in examples.items()}
        for turns in self.turns.blocks(self.seed):
            rows = [islice(groups[self.task_ids[task]], self.batch_size) for task in turns]
            step = self.turns.ordered(list(chain.from_iterable(rows)))
            for _ in range(self.iterations):
                yield from step

    def _repeated(self, task: str, examples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        waiting: dict[Hashable, list[dict[str, Any]]] = defaultdict(list)
        for example in examples:
            if not is_prompt(example.get(PROMPT)):
                raise ValueError(
                    f"a prompt of the stream, for task {task!r}, must be text of whole characters that is not empty, "
                    f"got {example.get(PROMPT)!r}."
                )
            size = self.size_of(example)
            waiting[size].append(example)
            if len(waiting[size]) == self.unit:
                for example in waiting.pop(size):
                    for _ in range(self.repeats):
                        yield {**example, self.column: task}
            elif sum(map(len, waiting.values())) > _MAX_WAITING:
                del waiting[next(iter(waiting))]  # the size that has waited longest

    def _split(self, stream: IterableDataset) -> dict[str, Iterator[dict[str, Any]]]:
        waiting: dict[str, deque] = {key: deque(maxlen=_MAX_WAITING) for key in self.task_ids}
        source = _with_ends(stream)

        def of_task(key: str) -> Iterator[dict[str, Any]]:
            while True:
                ends = 0
                while not waiting[key]:
                    example = next(source)
                    if example is None:
                        ends += 1
                        if ends == 2:
                            raise ValueError(f"the stream holds no prompt for task {key!r}.")
                        continue
                    task = example.get(self.column)
                    if task not in self.task_ids:
                        raise ValueError(f"a prompt of the stream names task {task!r}; the tasks are {self.task_ids}.")
                    waiting[task].append(example)
                yield waiting[key].popleft()

        return {key: of_task(key) for key in self.task_ids}


class NumberedStream(torch.utils.data.IterableDataset):
    """A stream whose rows hold a number each, in the column [`ROW`]: in several processes the first of them come again
    to fill up the last batch, and a stream does not know its length."""

    def __init__(self, stream: IterableDataset):
        self.stream = stream

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for number, row in enumerate(self.stream):
            yield {**row, ROW: first + number * step}


def _forever(stream: IterableDataset) -> Iterator[dict[str, Any]]:
    return (example for example in _with_ends(stream) if example is not None)


def _with_ends(stream: IterableDataset) -> Iterator[dict[str, Any] | None]:
    """A stream that starts again, with `None` at each of its ends."""
    epoch = 0
    while True:
        stream.set_epoch(epoch)
        empty = True
        for example in stream:
            empty = False
            yield example
        if empty:
            raise ValueError("a streaming dataset holds no example.")
        yield None
        epoch += 1
