"""What a run is: the only one that trains in its folder at a time, and what it is made of, which is compared when it is
resumed.

This file knows folders and values, and no trainer.
"""

import contextlib
import hashlib
import inspect
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

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


def hash_texts(texts: Iterable[Any]) -> str:
    """A short hash of texts in their order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(str(text).encode(errors="surrogatepass") + b"\0")
    return digest.hexdigest()[:12]


def hash_function(function: Callable) -> str:
    """A short hash of how a function, or the class of a callable object, is written; of its name, where that cannot be
    read."""
    written: Any = inspect.unwrap(function) if inspect.isroutine(function) else type(function)
    try:
        return hash_texts([inspect.getsource(written)])
    except (OSError, TypeError):
        return hash_texts([getattr(written, "__qualname__", written)])
