"""Which checkpoint folders are whole.

transformers' Trainer writes a checkpoint in its final place, and deletes old ones file by file. A run that is killed
meanwhile leaves a folder that looks like a checkpoint and may be the one with the highest number. So a checkpoint lists
its own files, once every process has written: it is whole if all of them are there in their full size, and with them
`trainer_state.json`, which Trainer writes after the list. Neither a torn write nor a torn deletion passes.

This file knows folders, and no trainer.
"""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

FILES_NAME = "checkpoint_files.json"


def is_checkpoint(folder: str | os.PathLike) -> bool:
    """Whether a folder is named like one, whole or not."""
    return re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", Path(folder).name) is not None


def unseal(folder: Path) -> None:
    """Call before anything in a folder is overwritten."""
    for name in (FILES_NAME, TRAINER_STATE_NAME):
        (folder / name).unlink(missing_ok=True)


def seal(folder: Path) -> None:
    """Lists the files of a folder and their sizes in bytes. `trainer_state.json` is to follow."""
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    (folder / FILES_NAME).write_text(json.dumps(sizes, indent=2) + "\n")


def what_is_torn(folder: str | os.PathLike) -> str | None:
    """Why a folder is no whole checkpoint; `None` if it is one."""
    for name in (TRAINER_STATE_NAME, FILES_NAME):
        if (content := _read(Path(folder, name))) is None:
            return f"it has no readable {name}"
    for name, size in content.items():
        path = Path(folder, name)
        if not path.is_file():
            return f"its {name} is missing"
        if (found := path.stat().st_size) != size:
            return f"its {name} has {found} of {size} bytes"
    return None


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The whole checkpoint with the highest number, or `None`. It is what `resume_from_checkpoint=True` takes."""
    return next((path for path in reversed(sort_checkpoints(str(output_dir))) if what_is_torn(path) is None), None)


def remove_half_written(output_dir: str | os.PathLike) -> list[str]:
    """Deletes the checkpoints that a killed run did not come to the end of: they fill the disk, and `save_total_limit`
    counts them. Returns which."""
    torn = [path for path in sort_checkpoints(str(output_dir)) if _read(Path(path, TRAINER_STATE_NAME)) is None]
    for path in torn:
        shutil.rmtree(path)
    return torn


def give_ordinary_mode(*files: Path) -> None:
    """Lets others read these files as they read any other file of this user: safetensors writes them for the user alone
    (https://github.com/safetensors/safetensors/issues/782)."""
    umask = os.umask(0)
    os.umask(umask)
    for file in files:
        with contextlib.suppress(OSError):  # some network mounts have no modes to give; and files that are not there
            file.chmod(0o666 & ~umask)


def _read(path: Path) -> Any:
    """JSON; `None` if there is none, or not all of it."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
