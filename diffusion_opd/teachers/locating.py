"""Where the files of a teacher are, in a folder or on the Hub, and which of them is its LoRA.

Of a repository, what tells what a teacher is comes first; weights are fetched when that is known.
"""

import contextlib
import os
import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from .. import files
from ..errors import first_few, why_not
from ..files import CONFIG_NAME, INDEX_NAME, MODULAR_INDEX_NAME, PEFT_CONFIG_NAME, PEFT_WEIGHTS_NAME, lora_name
from .spec import Lora, Teacher

NAMES = [INDEX_NAME, MODULAR_INDEX_NAME, CONFIG_NAME, PEFT_CONFIG_NAME, PEFT_WEIGHTS_NAME]


def lora_names(teacher: Teacher | Lora, denoisers: Sequence[str]) -> dict[str, str]:
    """The names of a teacher's LoRA files in diffusers format, by denoiser."""
    if teacher.weight_name is None:
        return {name: lora_name(name) for name in denoisers}
    return {denoisers[0]: teacher.weight_name} if isinstance(teacher.weight_name, str) else teacher.weight_name


def locate(teacher: Teacher | Lora, denoisers: Iterable[str]) -> tuple[Path, str | None]:
    """The folder with the files that tell what a teacher is, and with its LoRA for these denoisers of the student; and
    the commit if it is on the Hub."""
    path = str(teacher.path)
    if os.path.isdir(path):
        return Path(path, teacher.subfolder or ""), None
    if os.path.isfile(path):
        raise ValueError(f"{teacher.who}: {path!r} is a file; give its folder, and its name as `weight_name`.")
    names = [*NAMES, *lora_names(teacher, list(denoisers)).values()]
    patterns = [PurePosixPath(teacher.subfolder or "", name).as_posix() for name in names]
    try:
        if os.path.isabs(path):
            raise HFValidationError
        snapshot = Path(snapshot_download(path, revision=teacher.revision, allow_patterns=patterns))
    except (HFValidationError, OSError) as error:
        raise ValueError(f"{teacher.who}: {path!r} {why_not(error, teacher.revision)}.") from error
    return snapshot / (teacher.subfolder or ""), snapshot.name


def sole_lora(teacher: Teacher | Lora, folder: Path, commit: str | None, denoisers: Iterable[str]) -> str | None:
    """The only safetensors file, where there is nothing by the names that tell what a teacher is."""
    if any((folder / name).is_file() for name in [*NAMES, *map(lora_name, denoisers)]):
        return None
    found = weights_in(teacher, folder, commit)
    if len(found) == 1 and commit is not None:
        with contextlib.suppress(OSError):  # offline it is what the cache holds
            pattern = str(PurePosixPath(teacher.subfolder or "", found[0]))
            snapshot_download(str(teacher.path), revision=commit, allow_patterns=pattern)
    if len(found) > 1:
        raise ValueError(
            f"{teacher.who}: {teacher.source!r} holds {len(found)} safetensors files ({first_few(found)}); "
            "name the LoRA among them by `weight_name`."
        )
    return found[0] if found else None


def weights_in(teacher: Teacher | Lora, folder: Path, commit: str | None, inside: str = "") -> list[str]:
    """The safetensors files of a folder, or of one in it, in order."""
    found = [file.name for file in (folder / inside).glob("*.safetensors")]
    if commit is not None:
        where = PurePosixPath(teacher.subfolder or "", inside)
        download: Any = partial(snapshot_download, str(teacher.path), revision=commit)
        with contextlib.suppress(OSError):  # offline it is what the cache holds
            listed = download(allow_patterns=str(where / "*.safetensors"), dry_run=True)
            paths = [PurePosixPath(file.filename) for file in listed]
            found = [path.name for path in paths if path.parent == where]
    return sorted(found)


def variant_in(
    teacher: Teacher, folder: Path, commit: str | None, inside: str = "", is_denoiser: bool = True
) -> str | None:
    """The variant of a model's weights: what the teacher says (of a pipeline, other parts than denoisers need not have
    it), or the only one that there is."""
    named = (
        re.match(r"(?:diffusion_pytorch_)?model(?:\.(\w+))?(?:-\d+-of-\d+)?\.safetensors", name)
        for name in weights_in(teacher, folder, commit, inside)
    )
    variants = {match[1] for match in named if match}
    if teacher.variant is not None:
        return teacher.variant if is_denoiser or teacher.variant in variants else None
    return variants.pop() if len(variants) == 1 else None


def read_json(teacher: Teacher | Lora, path: Path) -> dict[str, Any]:
    return parse_json(teacher, path.read_bytes(), path.name)


def parse_json(teacher: Teacher | Lora, text: str | bytes, name: str) -> dict[str, Any]:
    """A JSON object of the file `name`."""
    try:
        return files.parse_json(text, name)
    except ValueError as error:
        raise ValueError(
            f"{teacher.who}: {name} of {teacher.source!r} is no JSON object; is it a git-lfs pointer, or a download "
            "that broke off?"
        ) from error
