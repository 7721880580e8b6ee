"""What a run is: the only one that trains in its folder at a time, and what it is made of, which is compared when it is
resumed.

This file knows folders and values, and no trainer.
"""

import contextlib
import functools
import hashlib
import inspect
import json
import tokenize
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, List, Value
from filelock import FileLock, Timeout

from .data import column_of
from .disclosure import disclosed
from .errors import brief

LOCK_NAME = ".run.lock"


def new_run() -> dict[str, Any]:
    """A run that begins: with an id that no other has."""
    return {"version": 1, "id": uuid.uuid4().hex, "made_of": {}}


@contextlib.contextmanager
def alone(output_dir: str | Path) -> Iterator[None]:
    """Lets one run at a time train in a folder. The system lets go of it when a run is killed.

    Raises:
        ValueError: if another one does.
    """
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    lock = FileLock(Path(output_dir, LOCK_NAME), timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"another run trains in {output_dir}; give this one an `output_dir` of its own, or wait."
        ) from error
    try:
        yield
    finally:
        lock.release()


def plain(made_of: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON has it, and as others may read it."""
    values: dict[str, Any] = json.loads(json.dumps(disclosed(made_of), default=lambda value: type(value).__name__))
    return values


def differences(before: Mapping[str, Any], now: Mapping[str, Any], inside: str = "") -> list[str]:
    """What two runs are made of and differ in, in words: `seed: 1 -> 2`."""
    found = []
    for key in dict.fromkeys([*before, *now]):
        one, other = before.get(key), now.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += differences(one, other, f"{inside}{key}.")
        elif one != other:
            found.append(f"{inside}{key}: {_word(one)} -> {_word(other)}")
    return found


def _word(value: Any) -> str:
    return "none" if value is None else brief(value).partition(": ")[2]


def hash_values(value: Any) -> str:
    """A short hash of what JSON has; of anything else its class alone counts."""
    text = json.dumps(value, default=lambda one: type(one).__name__, skipkeys=True, sort_keys=True)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:12]


def hash_data(dataset: Dataset, columns: Sequence[str]) -> str:
    """A short hash of columns of a dataset: of all rows of text and numbers, and of the first pictures."""
    content = {}
    for name in columns:
        column, feature = column_of(dataset, name), dataset.features[name]
        if isinstance(feature.feature if isinstance(feature, List) else feature, Value):
            content[name] = column.to_pylist()
        else:
            content[name] = [_file(one) for one in column.slice(0, 16).to_pylist()]
    return hash_values(content)


def _file(one: Any) -> Any:
    """What tells a picture, in a dataset, from another, wherever its file is."""
    if isinstance(one, list):
        return [_file(part) for part in one]
    if not isinstance(one, dict):
        return None
    return hashlib.sha256(one["bytes"]).hexdigest() if one.get("bytes") else Path(str(one.get("path"))).name


def hash_function(function: Any) -> str:
    """A short hash of what a function, or a callable object, does, as far as it can be read: how it is written, its
    defaults, and the plain values that it holds."""
    if isinstance(function, functools.partial):
        return hash_values([hash_function(function.func), function.args, function.keywords])
    is_written = inspect.isroutine(function) or inspect.isclass(function)
    written: Any = inspect.unwrap(function) if is_written else type(function)
    owner = getattr(function, "__self__", None) if is_written else function
    try:
        source = inspect.getsource(written)
    except (OSError, TypeError, SyntaxError, tokenize.TokenError):  # the file may have been edited since it was read
        source = f"{written.__module__}.{written.__qualname__}"
    cells = [getattr(cell, "cell_contents", None) for cell in getattr(written, "__closure__", None) or ()]
    defaults = [getattr(written, "__defaults__", None), getattr(written, "__kwdefaults__", None)]
    held = None if inspect.ismodule(owner) or inspect.isclass(owner) else getattr(owner, "__dict__", None)
    if not is_written and hasattr(function, "made_of"):  # it says itself what counts
        held = function.made_of()
    return hash_values([source, cells, defaults, held])
