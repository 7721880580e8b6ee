"""Which checkpoint folders are whole, and whose.

transformers' Trainer writes a checkpoint in its final place, takes any folder that begins like one for one of its own,
and deletes old ones file by file. A run that is killed meanwhile leaves a folder that looks like a checkpoint and may
be the one with the highest number; and two runs, or two programs, in one folder delete what is the other's. So a
checkpoint begins with `run.json`, which says whose it is, and ends with a list of its files, once every process has
written: it is whole if all of them are there as they were, nothing that could be loaded instead lies beside them, and
with them `trainer_state.json`, which Trainer writes after the list. Neither a torn write nor a torn deletion passes,
and nothing is deleted that another run, or another program, has written.

This file knows folders, and no trainer.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = get_logger(__name__)

FILES_NAME = "checkpoint_files.json"
RUN_NAME = "run.json"
MARK_NAME = "unfinished"  # while a folder is written

_LOADED = (".safetensors", ".bin", ".pt", ".pth", ".index.json")  # what would be loaded


def is_checkpoint(folder: str | os.PathLike) -> bool:
    """Whether a folder is named like one, whole or not."""
    return re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", Path(folder).name) is not None


def checkpoints_in(output_dir: str | os.PathLike) -> list[Path]:
    """The folders that are named like checkpoints, by their numbers, whoever has written them."""
    folders = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if is_checkpoint(path)]
    return sorted((path for path in folders if path.is_dir()), key=lambda path: int(path.name.rpartition("-")[2]))


def is_ours(folder: Path) -> bool:
    """Whether a folder was written here, to its end or not."""
    return _read(folder / RUN_NAME) is not None or _read(folder / FILES_NAME) is not None


def run_of(folder: str | os.PathLike) -> dict[str, Any]:
    """What a checkpoint says about its run: its `id`, and what it is `made_of`. Empty of one of an older version."""
    return _read(Path(folder, RUN_NAME)) or {}


def begin(folder: Path, run: Mapping[str, Any], runs: Collection[Any]) -> None:
    """Makes a folder one of a run, in the place of what it has left there before. To be called before anything is
    written into it.

    Raises:
        ValueError: if it is a whole checkpoint of another run, or of another program.
    """
    if folder.name in of_others(folder.parent, runs, 0):
        raise ValueError(f"{folder} is another run's checkpoint, and is not overwritten.")
    if is_ours(folder):
        _remove(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK_NAME).touch()
    (folder / RUN_NAME).write_text(json.dumps(run, indent=2) + "\n")


def seal(folder: Path) -> None:
    """Lists the files of a folder, their sizes in bytes and SHA-256. To be called twice: before `trainer_state.json` is
    written, which makes a checkpoint of it, and after that."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = _read(folder / FILES_NAME) or {}
    for path in files:
        name = path.relative_to(folder).as_posix()
        if name not in listed and name not in (FILES_NAME, MARK_NAME):
            listed[name] = {"size": path.stat().st_size, "sha256": _hash(path)}
    written = folder / f"{FILES_NAME}.new"
    written.write_text(json.dumps(listed, indent=2) + "\n")
    written.replace(folder / FILES_NAME)


def end(folder: Path) -> None:
    """Says that all of a checkpoint is there."""
    (folder / MARK_NAME).unlink(missing_ok=True)


def what_is_torn(folder: str | os.PathLike) -> str | None:
    """Why a folder is no whole checkpoint; `None` if it is one. Reads all of it."""
    state, content = (_read(Path(folder, name)) for name in (TRAINER_STATE_NAME, FILES_NAME))
    if state is None or not _is_state(state):
        return f"it has no readable {TRAINER_STATE_NAME}"
    if content is None:
        return f"it has no readable {FILES_NAME}"
    for name, listed in content.items():
        path, size = Path(folder, name), listed.get("size") if isinstance(listed, dict) else listed
        if not path.is_file():
            return f"its {name} is missing"
        if (found := path.stat().st_size) != size:
            return f"its {name} has {found} of {size} bytes"
        if isinstance(listed, dict) and _hash(path) != listed.get("sha256"):  # older versions list sizes alone
            return f"its {name} is not as it was written"
    known = {*content, TRAINER_STATE_NAME, FILES_NAME}
    for path in sorted(Path(folder).rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in known and path.name.endswith(_LOADED) and path.is_file():
            return f"it holds {name}, which it was not saved with"
    return None


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The whole checkpoint with the highest number, or `None`. It is what `resume_from_checkpoint=True` takes.

    Raises:
        ValueError: if several runs have left checkpoints there.
    """
    runs: dict[Any, list[str]] = {}
    for path in checkpoints_in(output_dir):
        if is_ours(path) and (path / TRAINER_STATE_NAME).is_file():
            runs.setdefault(run_of(path).get("id"), []).append(path.name)
    if len(runs) > 1:
        names = " | ".join(map(", ".join, runs.values()))
        raise ValueError(f"{output_dir} holds checkpoints of several runs ({names}); name the one to go on from.")
    for path in reversed(checkpoints_in(output_dir)):
        if is_ours(path):
            if (torn := what_is_torn(path)) is None:
                return str(path)
            logger.warning(f"{path} is no whole checkpoint, and is passed over: {torn}.")
    return None


def of_others(output_dir: str | os.PathLike, runs: Collection[Any], steps: int) -> list[str]:
    """Names of the checkpoints in a folder that a run must leave alone: whole ones of other runs, and what other
    programs have written in the place of a checkpoint of its first `steps` steps (0: of any)."""
    found = []
    for path in checkpoints_in(output_dir):
        if not is_ours(path):
            taken = any(path.iterdir()) and (steps <= 0 or int(path.name.rpartition("-")[2]) <= steps)
        else:
            taken = run_of(path).get("id") not in runs and (path / TRAINER_STATE_NAME).is_file()
        if taken:
            found.append(path.name)
    return found


def remove_half_written(output_dir: str | os.PathLike, runs: Collection[Any]) -> list[str]:
    """Deletes the checkpoints that a killed run did not come to the end of: they fill the disk. Returns which.

    Args:
        output_dir (`str`): Of the run.
        runs (`Collection`): Ids of the run that is resumed; no other's are touched.
    """
    torn = [path for path in _own(output_dir, runs) if (path / MARK_NAME).exists() and what_is_torn(path) is not None]
    for path in torn:
        _remove(path)
    return [str(path) for path in torn]


def rotate(
    output_dir: str | os.PathLike, runs: Collection[Any], keep: int, best: str | None, latest: bool = True
) -> None:
    """Deletes a run's older checkpoints until `keep` are left, the best and, if asked for, the `latest` among them. One
    from which somebody has taken files is left alone."""
    whole = [path for path in _own(output_dir, runs) if _has_its_files(path)]
    # A run that was resumed from an earlier one may have left some with higher numbers
    whole.sort(key=lambda path: (path / TRAINER_STATE_NAME).stat().st_mtime_ns)
    kept = {path for path in whole if best is not None and os.path.isdir(best) and path.samefile(best)}
    kept |= set(whole[-1:]) if latest or not kept else set()
    others = [path for path in whole if path not in kept]
    for path in others[: max(0, len(whole) - max(keep, len(kept)))]:
        _remove(path)


def _has_its_files(folder: Path) -> bool:
    names = [TRAINER_STATE_NAME, *(_read(folder / FILES_NAME) or {})]
    return all((folder / name).is_file() for name in names)


def _own(output_dir: str | os.PathLike, runs: Collection[Any]) -> list[Path]:
    folders = [path for path in checkpoints_in(output_dir) if not path.is_symlink()]
    return [path for path in folders if _read(path / RUN_NAME) is not None and run_of(path).get("id") in runs]


def _remove(folder: Path) -> None:
    """Deletes a folder so that it is no checkpoint from the first moment on, and ours to the last."""
    (folder / MARK_NAME).touch()
    for name in (TRAINER_STATE_NAME, FILES_NAME):
        (folder / name).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.name not in (RUN_NAME, MARK_NAME):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shutil.rmtree(folder)


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def give_ordinary_mode(*files: Path) -> None:
    """Lets others read these files as they read any other file of this user: safetensors writes them for the user alone
    (https://github.com/safetensors/safetensors/issues/782)."""
    umask = os.umask(0)
    os.umask(umask)
    for file in files:
        with contextlib.suppress(OSError):  # some network mounts have no modes to give; and files that are not there
            file.chmod(0o666 & ~umask)


def _is_state(content: dict[str, Any]) -> bool:
    """Whether Trainer can go on from it."""
    try:
        state = TrainerState(**content)
    except (TypeError, ValueError, AttributeError):
        return False
    return type(content.get("global_step")) is int and isinstance(state.log_history, list)


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object; `None` if there is none, or not all of it."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
