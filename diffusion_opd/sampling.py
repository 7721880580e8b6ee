"""Which prompts, and which teacher: batches of one task, tasks in turn, every optimizer step a whole number of cycles.

Routing is by data (the `teacher_id` column), never by a counter, and the order is a function of seed and epoch alone,
so a resumed run sees what an undisturbed one sees, in any number of processes.

This file knows datasets, and no pipeline, teacher or trainer.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, Value, concatenate_datasets
from torch.utils.data import Sampler

PROMPT, TEACHER = "prompt", "teacher_id"

# Prompts of one task that wait while a stream is searched for another task; older ones are dropped
_MAX_WAITING = 10_000


def seed_of(*numbers: int) -> int:
    """One 63-bit seed from several numbers; neighbouring inputs give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def routed_dataset(
    dataset: Any, teacher_ids: Sequence[str], name: str, need_all: bool = True
) -> Dataset | IterableDataset | dict[str, IterableDataset]:
    """The user's dataset with the columns `prompt` and `teacher_id`.

    Args:
        dataset (`Dataset`, `IterableDataset` or `dict`):
            With the columns `prompt` and, for more than one teacher, `teacher_id`; or `{teacher id: dataset}`.
        teacher_ids (`Sequence[str]`): In the order of the cycle.
        name (`str`): What to call the dataset in a refusal.
        need_all (`bool`, *optional*, defaults to `True`): Whether every teacher must have prompts, as training wants.

    Returns:
        A `Dataset`; for streams what [`TaskCycleStream`] takes, with `need_all=False` one stream with both columns.

    Raises:
        TypeError: if it is neither.
        ValueError: if a column is missing, a prompt is no text, or the tasks are not the teachers' ids.
    """
    if isinstance(dataset, (DatasetDict, IterableDatasetDict)) and not set(dataset) & set(teacher_ids):
        raise ValueError(
            f"{name} is a {type(dataset).__name__} of the splits {list(dataset)}; choose one, e.g. "
            f"`load_dataset(..., split={next(iter(dataset), 'train')!r})`."
        )
    if isinstance(dataset, Mapping):
        _check_tasks(dataset.keys(), teacher_ids, f"the keys of {name}", need_all)
        parts = {key: dataset[key] for key in teacher_ids if key in dataset}
        if all(isinstance(part, IterableDataset) for part in parts.values()):
            for key, part in parts.items():
                _check_columns(_stream_columns(part), [PROMPT], f"{name}[{key!r}]")
            return parts if need_all else concatenate_datasets([_add_task(part, key) for key, part in parts.items()])
        if not all(isinstance(part, Dataset) for part in parts.values()):
            kinds = {key: type(part).__name__ for key, part in parts.items()}
            raise TypeError(f"the parts of {name} must all be `Dataset`s or all be `IterableDataset`s, got {kinds}.")
        for key, part in parts.items():
            _check_columns(part.column_names, [PROMPT], f"{name}[{key!r}]")
            _check_prompts(part, f"{name}[{key!r}]")
        # One type, or parts of other origins (pandas: large_string) cannot be put together
        texts = {key: part.select_columns([PROMPT]).cast_column(PROMPT, Value("string")) for key, part in parts.items()}
        return concatenate_datasets([part.add_column(TEACHER, [key] * len(part)) for key, part in texts.items()])

    required = [PROMPT] if len(teacher_ids) == 1 else [PROMPT, TEACHER]
    if isinstance(dataset, IterableDataset):
        columns = _stream_columns(dataset)
        _check_columns(columns, required, name)
        if TEACHER in columns:
            return dataset
        return {teacher_ids[0]: dataset} if need_all else _add_task(dataset, teacher_ids[0])
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"{name} must be a `Dataset`, an `IterableDataset` or a dict of them, got {type(dataset).__name__}."
        )
    _check_columns(dataset.column_names, required, name)
    _check_prompts(dataset, name)
    if TEACHER not in dataset.column_names:
        dataset = dataset.add_column(TEACHER, [teacher_ids[0]] * len(dataset))
    _check_tasks(dataset.unique(TEACHER), teacher_ids, f"the `{TEACHER}` column of {name}", need_all)
    return dataset.select_columns([PROMPT, TEACHER])


def _stream_columns(dataset: IterableDataset) -> list[str]:
    return dataset.column_names or list(next(iter(dataset), {}))


def _add_task(stream: IterableDataset, task: str) -> IterableDataset:
    return stream.select_columns([PROMPT]).map(lambda example: {TEACHER: task})


def _check_columns(given: Sequence[str], required: Sequence[str], name: str) -> None:
    if missing := [column for column in required if column not in given]:
        hint = "; with several teachers it says which one judges a prompt" if missing == [TEACHER] else ""
        raise ValueError(f"{name} has no column {missing}, only {list(given)}{hint}.")


def _check_prompts(dataset: Dataset, name: str) -> None:
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty.")
    for row, prompt in enumerate(dataset[PROMPT]):
        if not is_prompt(prompt):
            raise ValueError(f"{name}: the prompt of row {row} must be text that is not empty, got {prompt!r}.")


def is_prompt(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _check_tasks(tasks: Any, teacher_ids: Sequence[str], name: str, need_all: bool) -> None:
    unknown = sorted(str(task) for task in set(tasks) - set(teacher_ids))
    unused = [key for key in teacher_ids if key not in set(tasks)] if need_all else []
    if unknown or unused:
        raise ValueError(
            f"{name} and the teachers must name the same tasks: the data has "
            f"{sorted(str(task) for task in set(tasks))}, the teachers are {list(teacher_ids)}."
        )


class TaskCycleSampler(Sampler[int]):
    """Rows of a dataset: `batch_size` of the first task, `batch_size` of the second, and so on in turn.

    An epoch is the smallest whole number of optimizer steps that shows every row; tasks with fewer rows than others
    come round again, in a new order.

    Args:
        tasks (`Sequence[str]`): The task of each row.
        teacher_ids (`Sequence[str]`): In the order of the cycle.
        batch_size (`int`): Samples of one micro-batch, over all processes.
        cycles (`int`): Cycles of one optimizer step.
        seed (`int`): Of the order.
    """

    def __init__(self, tasks: Sequence[str], teacher_ids: Sequence[str], batch_size: int, cycles: int, seed: int):
        tasks = np.asarray(tasks)
        self.rows = [np.flatnonzero(tasks == key) for key in teacher_ids]
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0
        per_task = batch_size * cycles
        self.num_cycles = cycles * -(-max(len(rows) for rows in self.rows) // per_task)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_cycles * len(self.rows) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        streams = [self._shuffled_forever(task) for task in range(len(self.rows))]
        for _ in range(self.num_cycles):
            for stream in streams:
                yield from islice(stream, self.batch_size)

    def _shuffled_forever(self, task: int) -> Iterator[int]:
        order = np.random.default_rng(seed_of(self.seed, self.epoch, task))
        while True:
            yield from order.permutation(self.rows[task]).tolist()


class TaskCycleStream(torch.utils.data.IterableDataset):
    """The same cycle over streaming datasets, without end: `{teacher id: stream}`, or one stream with a `teacher_id`
    column.

    A stream that ends starts again (with the next epoch's shuffle, if it shuffles).

    Raises:
        ValueError: while iterating, if a prompt is no text or names no known teacher, if a stream holds no prompt of a
            task, or in one of several loader workers, each of which would go through the cycle by itself.
    """

    def __init__(
        self,
        streams: Mapping[str, IterableDataset] | IterableDataset,
        teacher_ids: Sequence[str],
        batch_size: int,
    ):
        self.streams, self.teacher_ids, self.batch_size = streams, list(teacher_ids), batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError(
                f"a streaming dataset cannot be read by {worker.num_workers} workers: the tasks would no longer come "
                "in turn; set `dataloader_num_workers` to 0 or 1."
            )
        if isinstance(self.streams, Mapping):
            examples = {key: _forever(self.streams[key]) for key in self.teacher_ids}
        else:
            examples = self._split(self.streams)
        while True:
            for key in self.teacher_ids:
                for example in islice(examples[key], self.batch_size):
                    if not is_prompt(example[PROMPT]):
                        raise ValueError(
                            f"a prompt of the stream, for teacher {key!r}, must be text that is not empty, got "
                            f"{example[PROMPT]!r}."
                        )
                    yield {PROMPT: example[PROMPT], TEACHER: key}

    def _split(self, stream: IterableDataset) -> dict[str, Iterator[dict[str, Any]]]:
        waiting: dict[str, deque] = {key: deque(maxlen=_MAX_WAITING) for key in self.teacher_ids}
        source = _forever(stream, mark_ends=True)

        def of_task(key: str) -> Iterator[dict[str, Any]]:
            while True:
                ends = 0
                while not waiting[key]:
                    example = next(source)
                    if example is None:
                        ends += 1
                        if ends == 2:
                            raise ValueError(f"the stream holds no prompt for teacher {key!r}.")
                    elif example[TEACHER] not in waiting:
                        raise ValueError(
                            f"a prompt of the stream names teacher {example[TEACHER]!r}; the teachers are "
                            f"{self.teacher_ids}."
                        )
                    else:
                        waiting[example[TEACHER]].append(example)
                yield waiting[key].popleft()

        return {key: of_task(key) for key in self.teacher_ids}


def _forever(stream: IterableDataset, mark_ends: bool = False) -> Iterator[dict[str, Any] | None]:
    epoch = 0
    while True:
        stream.set_epoch(epoch)
        empty = True
        for example in stream:
            empty = False
            yield example
        if empty:
            raise ValueError("a streaming dataset holds no example.")
        if mark_ends:
            yield None
        epoch += 1
