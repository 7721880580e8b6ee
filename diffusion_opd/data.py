"""The datasets of a run: which task a row is of, which of its columns reach which party, and whether what is in these
can be read.

This file knows datasets and the classes of pipelines, and no policy or trainer.
"""

import contextlib
import difflib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from accelerate.logging import get_logger
from datasets import (
    Dataset,
    DatasetDict,
    Image,
    IterableDataset,
    IterableDatasetDict,
    LargeList,
    List,
    Value,
    concatenate_datasets,
)
from diffusers import DiffusionPipeline

from .errors import listed
from .inputs import PICTURE, PROMPT, columns_read, is_prompt, read_picture, sample_arguments, signature, size_of
from .sampling import TASK, TEACHER

logger = get_logger(__name__)

_PROMPT_NAMES = ("caption", "text")  # what prompts are called elsewhere


class Data:
    """
    The datasets of a run.

    Args:
        train_dataset, eval_dataset (`Dataset`, `IterableDataset` or `dict`, *optional*):
            As users give them.
        tasks (`Sequence[str]`):
            In the order of the cycle.
        task_column (`str`, *optional*, defaults to `"teacher_id"`):
            Where the task of a row stands.
        input_columns (`Sequence[str]`, *optional*):
            Which columns reach the pipeline. `None`: those that are named like what its `__call__` takes for each
            sample.
        further (`Sequence[str]`, *optional*):
            Columns that a step reads besides, which reach no pipeline.

    Attributes:
        train, evaluation: As [`routed_dataset`] returns them.
        columns (`dict[str, str]`): Of the student: the column of each argument of its `__call__`, from [`fit`] on.
        pictures (`dict[str, bool]`): The columns that hold some for any party, and whether these are masks.
        sizes (`list`, *optional*): Of each row of `train`, what must be equal within a batch; `None`: it is.
    """

    def __init__(
        self,
        train_dataset: Any,
        eval_dataset: Any,
        tasks: Sequence[str],
        task_column: str = TEACHER,
        input_columns: Sequence[str] | None = None,
        further: Sequence[str] = (),
    ):
        self.tasks, self.task_column, self._asked = list(tasks), task_column, input_columns
        self._further = list(further)
        self._is_by_task = {
            "train_dataset": isinstance(train_dataset, Mapping),
            "eval_dataset": isinstance(eval_dataset, Mapping),
        }
        self.train: Any = None
        self.evaluation: Any = None
        if train_dataset is not None:
            self.train = routed_dataset(train_dataset, self.tasks, "train_dataset", column=task_column)
        if eval_dataset is not None:
            self.evaluation = self._routed(eval_dataset)
        self.columns: dict[str, str] = {PROMPT: PROMPT}
        self.sizes: list[Hashable] | None = None
        self.pictures: dict[str, bool] = {}
        self._read = {PROMPT}  # columns that reach any party
        self._held: dict[str, set[str]] = {}  # which of them the rows of each task have, in training

    def _routed(self, dataset: Any) -> Any:
        return routed_dataset(dataset, self.tasks, "eval_dataset", need_all=False, column=self.task_column)

    @property
    def names(self) -> list[str]:
        """The columns that a step reads."""
        return [*sorted(self._read), self.task_column, *self._further]

    def fit(
        self,
        pipeline: DiffusionPipeline,
        call_kwargs: Mapping[str, Any],
        others: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        """Finds out what reaches the student, and looks at all of it: of pictures at their headers.

        Args:
            pipeline ([`~diffusers.DiffusionPipeline`]): The student's.
            call_kwargs (`Mapping`): That hold for all its samples.
            others (`Mapping`, *optional*): Of teachers by their ids, columns by argument.

        Raises:
            ValueError: if a column is asked for that is not there, is given in two ways, or lacks a value in some rows
                of a task; or if a picture is missing or cannot be read.
        """
        cls: Any = type(pipeline)
        given = self._given
        taken = signature(cls.__call__).parameters
        for name in self._asked or ():
            if name not in taken:
                near = difflib.get_close_matches(name, list(taken)) or sorted(sample_arguments(cls))
                raise ValueError(
                    f"`input_columns` names {name!r}, which {cls.__name__} does not take; does it mean {near}?"
                )
            if name not in given:
                raise ValueError(f"`input_columns` names {name!r}, and the data has only the columns {sorted(given)}.")
        for key, columns in (others or {}).items():
            for name, column in columns.items():
                if column not in given:
                    raise ValueError(
                        f"teacher {key!r}: `columns` names {column!r} for {name!r}, and the data has only the columns "
                        f"{sorted(given)}."
                    )
        if lacking := [column for column in self._further if column not in given]:
            raise ValueError(f"the data has no column {lacking[0]!r}, only {sorted(given)}.")
        self.columns = columns_read(cls, given, self._asked)
        self._takes = set(sample_arguments(cls))
        if twice := sorted(self.columns.keys() & call_kwargs.keys()):
            raise ValueError(
                f"{twice} are columns of the data and in `call_kwargs` too; leave them out of one, or name the columns "
                "to be read in `input_columns`."
            )
        # Picture datasets carry `width` and `height`
        if once := sorted((given & taken.keys()) - self.columns.keys()) if self._asked is None else []:
            logger.warning(
                f"{cls.__name__} takes {once} once for all samples, not from columns; give them in the configuration "
                "or `call_kwargs` (or name the columns to be read in `input_columns`)."
            )
        self.read_too(cls, self.columns)
        for columns in (others or {}).values():
            self.read_too(cls, columns)
        self._warn_of_unread_pictures(cls)
        self.train, self.sizes = self._looked_at(self.train, "train_dataset")
        self.evaluation, _ = self._looked_at(self.evaluation, "eval_dataset")

    def read_too(self, pipeline_class: Any, columns: Mapping[str, str]) -> None:
        """Further columns by argument, of a party."""
        kinds = sample_arguments(pipeline_class)
        for name, column in columns.items():
            self._read.add(column)
            if not kinds.get(name, not PICTURE.search(name)):
                self.pictures[column] = "mask" in name

    def columns_of_party(
        self, pipeline_class: Any, renamed: Mapping[str, str], overrides: Mapping[str, Any]
    ) -> dict[str, str]:
        """Which column each argument of a teacher's `__call__` is read from.

        Args:
            pipeline_class (`type`): Of the teacher.
            renamed (`Mapping[str, str]`): Columns of its own by argument.
            overrides (`Mapping`): Arguments that have one value for all its samples.
        """
        own = columns_read(pipeline_class, self._given, self._asked) | dict(renamed)
        self.read_too(pipeline_class, own)
        return {name: column for name, column in own.items() if name not in overrides}

    @property
    def _given(self) -> set[str]:
        return columns_of(self.train) | columns_of(self.evaluation)

    def _warn_of_unread_pictures(self, cls: Any) -> None:
        """A picture that does not reach the pipeline may be one whose column has the wrong name."""
        free = [name for name, is_text in sample_arguments(cls).items() if not is_text and name not in self.columns]
        features = getattr(self.train, "features", None) or {}
        unread = [
            column
            for column in features
            if column not in self._read
            and (holds_pictures(features[column]) or difflib.get_close_matches(column, free))
        ]
        if free and unread and self._asked is None:
            logger.warning(
                f"train_dataset has the columns {unread}, which do not reach {cls.__name__}; if they are what it takes "
                f"as {listed(free, 'or')}, give them that name: `dataset.rename_column({unread[0]!r}, {free[0]!r})`."
            )

    def _looked_at(self, dataset: Any, name: str) -> tuple[Any, list[Hashable] | None]:
        """A `Dataset` whose pictures are left to [`read`], and what of each row must be equal within a batch."""
        if not isinstance(dataset, Dataset):
            return dataset, None  # nobody has read a stream yet
        columns = [column for column in dataset.column_names if column in self._read and column != PROMPT]
        for column in columns:
            if holds_pictures(feature := dataset.features[column]) and column in self.pictures:
                dataset = dataset.cast_column(column, undecoded(feature))
        tasks = column_of(dataset, self.task_column).to_pylist()
        first = {task: tasks.index(task) if self._is_by_task[name] else 0 for task in set(tasks)}
        lacks: dict[tuple[str, str], int] = {}  # by task and column a row without a value
        has: dict[str, set[str]] = {task: set() for task in first}
        sizes: list[Hashable] = []
        with ThreadPoolExecutor() as pool:  # files may lie on a network
            for batch in dataset.select_columns(columns).iter(batch_size=256) if columns else ():
                looked = [pool.map(_size_or_error, batch[c]) if c in self.pictures else batch[c] for c in columns]
                for values in zip(*looked, strict=True):
                    task = tasks[row := len(sizes)]
                    where = f"{name}[{task!r}]" if self._is_by_task[name] else name
                    for column, value in zip(columns, values, strict=True):
                        if isinstance(value, ValueError):
                            raise ValueError(f"{where}: the `{column}` of row {row - first[task]} {value}.") from value
                        if value is None:
                            lacks.setdefault((task, column), row)
                        else:
                            has[task].add(column)
                        if column in has[task] and (task, column) in lacks:
                            raise ValueError(
                                f"{where}: the `{column}` of row {lacks[task, column] - first[task]} is missing, and "
                                "other rows of its task have one; give each row one, or none of them."
                            )
                    sizes.append(tuple(v for c, v in zip(columns, values, strict=True) if c in self.pictures))
        if name == "train_dataset":
            self._held = has
        for task, held in has.items():
            if held != (trained := self._held.get(task, held)):
                raise ValueError(
                    f"{name}: the rows of {task!r} have the columns {sorted(held)} for the pipeline, and those of "
                    f"train_dataset {sorted(trained)}; give both the same."
                )
        return dataset, sizes if len(set(sizes)) > 1 else None

    # Rows, as a step takes them

    def read(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Rows with their pictures read: the collator of a run."""
        return [{**row, **{c: self._picture(row, c) for c in self.pictures if row.get(c) is not None}} for row in rows]

    def _picture(self, row: Mapping[str, Any], column: str) -> Any:
        with _named(row, column):
            return read_picture(row[column], self.pictures[column])

    def size_of(self, row: Mapping[str, Any]) -> Hashable:
        """What of a row must be equal within a batch."""
        sizes = []
        for column in self.pictures:
            with _named(row, column):
                sizes.append(None if row.get(column) is None else size_of(row[column]))
        return tuple(sizes)

    def calls(self, rows: Sequence[Mapping[str, Any]], most: int, by_task: bool = False) -> list[list[int]]:
        """Which rows may go through a pipeline together, at most so many: their pictures are of one size, what one has
        all have, and perhaps they are of one task."""
        groups: dict[Hashable, list[int]] = {}
        for index, row in enumerate(rows):
            has = tuple(row.get(column) is not None for column in self.columns.values())
            task = row.get(self.task_column) if by_task else None
            groups.setdefault((task, has, self.size_of(row)), []).append(index)
        return [group[i : i + most] for group in groups.values() for i in range(0, len(group), most)]

    def examples(self, task: str | None, count: int) -> list[dict[str, Any]]:
        """The first rows of a task (`None`: of that of the first row) of the training data, or else of that for
        evaluation; of a stream of several tasks those among its first rows."""
        data = self.train if self.train is not None else self.evaluation
        if isinstance(data, Mapping):
            data = data[task or self.tasks[0]]
            rows = list(data.take(count))
        elif isinstance(data, IterableDataset):
            rows = [row for row in data.take(count) if task in (None, row.get(self.task_column))]
        elif data is None:
            rows = []
        else:
            tasks = column_of(data, self.task_column)
            wanted = tasks[0] if task is None else task
            chosen = pc.indices_nonzero(pc.equal(tasks, wanted))[:count].to_pylist()
            rows = list(data.select(chosen))
        return self.read([row for row in rows if is_prompt(row.get(PROMPT))])

    def routed(self, dataset: Any) -> Any:
        """Another evaluation dataset.

        Raises:
            ValueError: as [`fit`], and if it has further columns that the pipeline could use.
        """
        self._is_by_task["eval_dataset"] = isinstance(dataset, Mapping)
        routed = self._routed(dataset)
        if self._asked is None and (further := sorted((columns_of(routed) & self._takes) - self._read)):
            raise ValueError(
                f"eval_dataset has the columns {further} for the pipeline, which the data of the trainer has not; give "
                "both the same."
            )
        return self._looked_at(routed, "eval_dataset")[0]


@contextlib.contextmanager
def _named(row: Mapping[str, Any], column: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"the `{column}` of the row with the prompt {row.get(PROMPT)!r} {error}.") from error


def _size_or_error(value: Any) -> Any:
    try:
        return None if value is None else size_of(value)
    except ValueError as error:
        return error


def holds_pictures(feature: Any) -> bool:
    return isinstance(feature, Image) or (isinstance(feature, (List, LargeList)) and holds_pictures(feature.feature))


def undecoded(feature: Any) -> Any:
    return Image(decode=False) if isinstance(feature, Image) else type(feature)(undecoded(feature.feature))


def routed_dataset(
    dataset: Any,
    task_ids: Sequence[str],
    name: str,
    need_all: bool = True,
    column: str = TEACHER,
) -> Dataset | IterableDataset | dict[str, IterableDataset]:
    """The user's dataset with the column `column`, which names the task of a row.

    Args:
        dataset (`Dataset`, `IterableDataset` or `dict`):
            With the columns `prompt` and, for more than one task, `column`; or `{task: dataset}`.
        task_ids (`Sequence[str]`): In the order of the cycle.
        name (`str`): What to call the dataset in a refusal.
        need_all (`bool`, *optional*, defaults to `True`): Whether every task must have prompts, as training wants.
        column (`str`, *optional*, defaults to `"teacher_id"`): Where the task of a row stands.

    Returns:
        A `Dataset`; for streams what [`TaskCycleStream`] takes, with `need_all=False` one stream with both columns.

    Raises:
        TypeError: if it is neither.
        ValueError: if a column is missing, a prompt is no text, or the tasks are not `task_ids`.
    """

    def with_task(part: Any, task: str) -> Any:
        if isinstance(part, IterableDataset):
            return part.map(lambda example: {column: task})
        part = part.remove_columns([column]) if column in part.column_names else part
        # Of a shuffled or filtered one `add_column` would write all rows anew, pictures too
        whole = Dataset(part.data, part.info, part.split, fingerprint=part._fingerprint)
        whole = whole.add_column(column, pa.repeat(task, len(part.data)))
        return whole if part._indices is None else whole.select(part._indices.column(0).to_numpy().astype(np.int64))

    if not set(dataset if isinstance(dataset, Mapping) else ()) & set(task_ids):
        check_no_splits(dataset, name)
    if isinstance(dataset, Mapping):
        if not dataset:
            raise ValueError(f"{name} is an empty dict; leave it out, or give `{{task: dataset}}`.")
        _check_tasks(dataset.keys(), task_ids, f"the keys of {name}", need_all, column)
        parts = {key: _unformatted(dataset[key], f"{name}[{key!r}]") for key in task_ids if key in dataset}
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
        alike = _of_one_type(parts, name)
        return concatenate_datasets([with_task(part, key) for key, part in alike.items()])

    required = [PROMPT] if len(task_ids) == 1 else [PROMPT, column]
    dataset = _unformatted(dataset, name)
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
    return dataset


def _unformatted(dataset: Any, name: str) -> Any:
    """A dataset whose rows are what it holds, and no tensors or tables of it."""
    if isinstance(dataset, IterableDataset):
        return dataset.with_format(None)
    if not isinstance(dataset, Dataset) or (form := dataset.format)["type"] is None:
        return dataset
    if form["type"] == "custom":
        raise ValueError(
            f"{name} has a transform (`set_transform`), which makes its rows when they are read, and sees some columns "
            "of them only; make them with `dataset.map(...)`, and leave it out."
        )
    dataset = dataset.with_format(None)
    return dataset if form["output_all_columns"] else dataset.select_columns(form["columns"])


def _of_one_type(parts: Mapping[str, Dataset], name: str) -> dict[str, Dataset]:
    """Parts whose columns can be put together: texts in one type (pandas: large_string); what else differs is left
    out."""
    alike = dict(parts)
    for column in sorted({column for part in parts.values() for column in part.column_names}):
        types = {key: part.features[column] for key, part in alike.items() if column in part.column_names}
        if all(_is_text(kind) for kind in types.values()):
            alike |= {key: alike[key].cast_column(column, Value("string")) for key in types}
        elif len({str(kind) for kind in types.values()}) > 1:
            logger.warning(f"The column {column!r} of {name} has several types, and is left out: {types}.")
            alike |= {key: alike[key].remove_columns([column]) for key in types}
    return alike


def stream_columns(dataset: IterableDataset) -> list[str]:
    return dataset.column_names or list(next(iter(dataset), {}))


def columns_of(dataset: Any) -> set[str]:
    """The columns of what [`routed_dataset`] takes, or of any of its parts."""
    if isinstance(dataset, Mapping):
        return {column for part in dataset.values() for column in columns_of(part)}
    if isinstance(dataset, IterableDataset):
        return set(stream_columns(dataset))
    return set(dataset.column_names) if isinstance(dataset, Dataset) else set()


def column_of(dataset: Dataset, name: str) -> pa.ChunkedArray:
    """A column of text as Arrow holds it; `dataset[name]` reads it row by row."""
    column, rows = dataset.data.column(name), dataset._indices
    return column if rows is None else column.take(rows.column(0))


def long_prompts(prompts: pa.ChunkedArray, most: int = 32) -> list[int]:
    """Rows among which is the prompt of most tokens, or one of hardly fewer: the first in bytes, and the first where a
    letter counts as a quarter of a token, a space as none and any other byte as one."""
    whole = prompts.cast(pa.large_binary()).combine_chunks()
    offsets = np.frombuffer(whole.buffers()[1], np.int64)[whole.offset : whole.offset + len(whole) + 1]
    # Their sum overflows for prompts of many thousand bytes, which are found anyway
    quarters = np.full(256, 4, np.uint16)
    quarters[[byte for byte in range(128) if chr(byte).isalpha()]], quarters[ord(" ")] = 1, 0
    of_bytes = quarters[np.frombuffer(whole.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]]
    estimates = np.add.reduceat(of_bytes, offsets[:-1] - offsets[0], dtype=np.uint16)
    found = [np.argsort(sizes, kind="stable")[::-1][:most] for sizes in (np.diff(offsets), estimates)]
    return np.unique(found).tolist()


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
    if not _is_text(kind):
        kind = kind.dtype if isinstance(kind, Value) else kind
        raise ValueError(
            f"the `{column}` column of {name} must hold text, got {kind}; rename it if it means something else."
        )
    tasks = pc.unique(column_of(dataset, column)).to_pylist()
    if None in tasks:
        raise ValueError(f"the `{column}` column of {name} has rows without a value; each row needs one.")
    return tasks


def _is_text(kind: Any) -> bool:
    return isinstance(kind, Value) and kind.dtype in ("string", "large_string", "string_view")


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
    for row, prompt in enumerate(column_of(dataset, PROMPT).to_pylist()):
        if not is_prompt(prompt):
            raise ValueError(
                f"{name}: the prompt of row {row} must be text of whole characters that is not empty, got {prompt!r}."
            )


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
