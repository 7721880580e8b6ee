"""Which prompts of which task: batches of one task, tasks in turn, every optimizer step a whole number of cycles.

Routing is by data (a column, `teacher_id` or `task`), never by a counter, and the order is a function of seed and epoch
alone, so a resumed run sees what an undisturbed one sees, in any number of processes.

This file knows datasets, and no pipeline, teacher or trainer.
"""

import difflib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, Value, concatenate_datasets
from torch.utils.data import Sampler

PROMPT, TEACHER, TASK = "prompt", "teacher_id", "task"

_PROMPT_NAMES = ("caption", "text")  # what prompts are called elsewhere

# Prompts of one task that wait while a stream is searched for another task; older ones are dropped
_MAX_WAITING = 10_000


# What generators are for, as the first number of their seeds after the run's own
SEED_TRAIN, SEED_EVAL, SEED_NOISE = 0, 1, 2


def seed_of(*numbers: int) -> int:
    """One 63-bit seed from several numbers; neighbouring inputs give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def noise_generators(generators: Sequence[torch.Generator]) -> list[torch.Generator]:
    """For the noise of a walk's kernel: a pipeline may draw from its own generators at any time."""
    return [torch.Generator().manual_seed(seed_of(generator.initial_seed(), 1)) for generator in generators]


def routed_dataset(
    dataset: Any,
    task_ids: Sequence[str],
    name: str,
    need_all: bool = True,
    column: str = TEACHER,
    keep_columns: bool = False,
) -> Dataset | IterableDataset | dict[str, IterableDataset]:
    """The user's dataset with the columns `prompt` and `column`, which names the task of a row.

    Args:
        dataset (`Dataset`, `IterableDataset` or `dict`):
            With the columns `prompt` and, for more than one task, `column`; or `{task: dataset}`.
        task_ids (`Sequence[str]`): In the order of the cycle.
        name (`str`): What to call the dataset in a refusal.
        need_all (`bool`, *optional*, defaults to `True`): Whether every task must have prompts, as training wants.
        column (`str`, *optional*, defaults to `"teacher_id"`): Where the task of a row stands.
        keep_columns (`bool`, *optional*, defaults to `False`): Whether the other columns stay.

    Returns:
        A `Dataset`; for streams what [`TaskCycleStream`] takes, with `need_all=False` one stream with both columns.

    Raises:
        TypeError: if it is neither.
        ValueError: if a column is missing, a prompt is no text, or the tasks are not `task_ids`.
    """

    def with_task(part: Any, task: str) -> Any:
        if not keep_columns:
            part = part.select_columns([PROMPT])
        if isinstance(part, IterableDataset):
            return part.map(lambda example: {column: task})
        part = part.remove_columns([column]) if column in part.column_names else part
        return part.add_column(column, [task] * len(part))

    if not set(dataset if isinstance(dataset, Mapping) else ()) & set(task_ids):
        check_no_splits(dataset, name)
    if isinstance(dataset, Mapping):
        if not dataset:
            raise ValueError(f"{name} is an empty dict; leave it out, or give `{{task: dataset}}`.")
        _check_tasks(dataset.keys(), task_ids, f"the keys of {name}", need_all, column)
        parts = {key: dataset[key] for key in task_ids if key in dataset}
        if all(isinstance(part, IterableDataset) for part in parts.values()):
            for key, part in parts.items():
                _check_columns(stream_columns(part), [PROMPT], f"{name}[{key!r}]")
            return parts if need_all else concatenate_datasets([with_task(part, key) for key, part in parts.items()])
        if not all(isinstance(part, Dataset) for part in parts.values()):
            kinds = {key: type(part).__name__ for key, part in parts.items()}
            raise TypeError(f"the parts of {name} must all be `Dataset`s or all be `IterableDataset`s, got {kinds}.")
        for key, part in parts.items():
            _check_columns(part.column_names, [PROMPT], f"{name}[{key!r}]")
            _check_prompts(part, f"{name}[{key!r}]")
        # One type, or parts of other origins (pandas: large_string) cannot be put together
        texts = {key: part.cast_column(PROMPT, Value("string")) for key, part in parts.items()}
        return concatenate_datasets([with_task(part, key) for key, part in texts.items()])

    required = [PROMPT] if len(task_ids) == 1 else [PROMPT, column]
    if isinstance(dataset, IterableDataset):
        columns = stream_columns(dataset)
        _check_columns(columns, required, name)
        if column in columns:
            return dataset
        return {task_ids[0]: dataset} if need_all else with_task(dataset, task_ids[0])
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"{name} must be a `Dataset`, an `IterableDataset` or a dict of them, got {type(dataset).__name__}."
        )
    _check_columns(dataset.column_names, required, name)
    _check_prompts(dataset, name)
    if column not in dataset.column_names:
        dataset = with_task(dataset, task_ids[0])
    _check_tasks(tasks_in(dataset, column, name), task_ids, f"the `{column}` column of {name}", need_all, column)
    return dataset if keep_columns else dataset.select_columns([PROMPT, column])


def stream_columns(dataset: IterableDataset) -> list[str]:
    return dataset.column_names or list(next(iter(dataset), {}))


def columns_of(dataset: Any) -> set[str]:
    """The columns of what [`routed_dataset`] takes, or of any of its parts."""
    if isinstance(dataset, Mapping):
        return {column for part in dataset.values() for column in columns_of(part)}
    if isinstance(dataset, IterableDataset):
        return set(stream_columns(dataset))
    return set(dataset.column_names) if isinstance(dataset, Dataset) else set()


def check_no_splits(dataset: Any, name: str) -> None:
    """Refuses what `load_dataset` returns when it is given no split."""
    if isinstance(dataset, (DatasetDict, IterableDatasetDict)):
        raise ValueError(
            f"{name} is a {type(dataset).__name__} of the splits {list(dataset)}; choose one, e.g. "
            f"`load_dataset(..., split={next(iter(dataset), 'train')!r})`."
        )


def tasks_in(dataset: Dataset, column: str, name: str) -> list[str]:
    """The tasks of a dataset's rows.

    Raises:
        ValueError: if the column holds anything but text.
    """
    kind = dataset.features[column]
    if not isinstance(kind, Value) or kind.dtype not in ("string", "large_string", "string_view"):
        kind = kind.dtype if isinstance(kind, Value) else kind
        raise ValueError(
            f"the `{column}` column of {name} must hold text, got {kind}; rename it if it means something else."
        )
    tasks = dataset.unique(column)
    if None in tasks:
        raise ValueError(f"the `{column}` column of {name} has rows without a value; each row needs one.")
    return tasks


def _check_columns(given: Sequence[str], required: Sequence[str], name: str) -> None:
    if missing := [column for column in required if column not in given]:
        hints = {
            TEACHER: "; with several teachers it says which one judges a prompt",
            TASK: "; with several tasks it says whose reward functions judge a prompt",
        }
        hint = hints.get(missing[0], "") if len(missing) == 1 else ""
        alike = {one.lower(): one for one in given}
        elsewhere = _PROMPT_NAMES if missing[0] == PROMPT else ()
        if near := difflib.get_close_matches(missing[0], alike) or [one for one in elsewhere if one in alike]:
            hint += f"; is it {alike[near[0]]!r}? (`dataset.rename_column({alike[near[0]]!r}, {missing[0]!r})`)"
        raise ValueError(f"{name} has no column {missing}, only {list(given)}{hint}.")


def _check_prompts(dataset: Dataset, name: str) -> None:
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty.")
    for row, prompt in enumerate(dataset[PROMPT]):
        if not is_prompt(prompt):
            raise ValueError(f"{name}: the prompt of row {row} must be text that is not empty, got {prompt!r}.")


def is_prompt(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _check_tasks(tasks: Any, task_ids: Sequence[str], name: str, need_all: bool, column: str) -> None:
    unknown = sorted(str(task) for task in set(tasks) - set(task_ids))
    unused = [key for key in task_ids if key not in set(tasks)] if need_all else []
    if unknown or unused:
        parties = "teachers" if column == TEACHER else "tasks of `reward_funcs`"
        raise ValueError(
            f"{name} and the {parties} must name the same tasks: the data has "
            f"{_some(sorted(str(task) for task in set(tasks)))}, the {parties} are {_some(task_ids)}."
        )


def _some(tasks: Sequence[str], most: int = 20) -> str:
    return f"{list(tasks)[:most]}" + (f" and {len(tasks) - most} more" if len(tasks) > most else "")


class TaskCycleSampler(Sampler[int]):
    """Rows of a dataset: `batch_size` of the first task, `batch_size` of the second, and so on in turn.

    An epoch is the smallest whole number of optimizer steps that shows every row; tasks with fewer rows than others
    come round again, in a new order. With `repeats` every row comes so many times in succession among those of its
    task (the group of a prompt), with `iterations` the rows of every optimizer step come so many times.

    Args:
        tasks (`Sequence[str]`): The task of each row.
        task_ids (`Sequence[str]`): In the order of the cycle.
        batch_size (`int`): Samples of one micro-batch, over all processes.
        cycles (`int`): Cycles of one optimizer step.
        seed (`int`): Of the order.
        repeats, iterations (`int`, *optional*): See above; `batch_size * cycles` is a multiple of `repeats`.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        task_ids: Sequence[str],
        batch_size: int,
        cycles: int,
        seed: int,
        repeats: int = 1,
        iterations: int = 1,
    ):
        column = np.asarray(tasks)
        self.rows = [np.flatnonzero(column == key) for key in task_ids]
        self.batch_size, self.cycles, self.seed, self.epoch = batch_size, cycles, seed, 0
        self.repeats, self.iterations = repeats, iterations
        self.num_steps = -(-max(len(rows) for rows in self.rows) * repeats // (batch_size * cycles))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_steps * self.iterations * self.cycles * len(self.rows) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        streams = [self._shuffled_forever(task) for task in range(len(self.rows))]
        for _ in range(self.num_steps):
            step = [row for _ in range(self.cycles) for stream in streams for row in islice(stream, self.batch_size)]
            for _ in range(self.iterations):
                yield from step

    def _shuffled_forever(self, task: int) -> Iterator[int]:
        order = np.random.default_rng(seed_of(self.seed, self.epoch, task))
        while True:
            yield from order.permutation(self.rows[task]).repeat(self.repeats).tolist()


class TaskCycleStream(torch.utils.data.IterableDataset):
    """The same cycle over streaming datasets, without end: `{task: stream}`, or one stream with a column that names the
    task.

    A stream that ends starts again (with the next epoch's shuffle, if it shuffles).

    Raises:
        ValueError: while iterating, if a prompt is no text or names no known task, if a stream holds no prompt of a
            task, or in one of several loader workers, each of which would go through the cycle by itself.
    """

    def __init__(
        self,
        streams: Mapping[str, IterableDataset] | IterableDataset,
        task_ids: Sequence[str],
        batch_size: int,
        cycles: int = 1,
        repeats: int = 1,
        iterations: int = 1,
        column: str = TEACHER,
    ):
        self.streams, self.task_ids, self.batch_size = streams, list(task_ids), batch_size
        self.cycles, self.repeats, self.iterations, self.column = cycles, repeats, iterations, column

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
        while True:
            step = [
                example
                for _ in range(self.cycles)
                for key in self.task_ids
                for example in islice(groups[key], self.batch_size)
            ]
            for _ in range(self.iterations):
                yield from step

    def _repeated(self, task: str, examples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for example in examples:
            if not is_prompt(example.get(PROMPT)):
                raise ValueError(
                    f"a prompt of the stream, for task {task!r}, must be text that is not empty, got "
                    f"{example.get(PROMPT)!r}."
                )
            for _ in range(self.repeats):
                yield {**example, self.column: task}

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
