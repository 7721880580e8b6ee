"""`teacher_manifest.json`: which teachers a run learns from, written into each checkpoint and checked when one is
resumed."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed import get_rank, get_world_size, is_available, is_initialized

from ..errors import one_sentence
from ..files import read_json
from ..quantization import precision
from .spec import LoadedTeacher

MANIFEST_NAME = "teacher_manifest.json"


def manifest_of(teachers: Iterable[LoadedTeacher]) -> dict[str, Any]:
    """What `teacher_manifest.json` holds: which teachers a run learns from."""
    entries = [
        {
            "id": teacher.id,
            "source": teacher.spec.origin,
            "revision": teacher.spec.revision,
            "commit": teacher.commit,
            "dtype": precision(teacher.denoiser),
            "sha256": teacher.sha256,
        }
        for teacher in teachers
    ]
    return {"version": 1, "teachers": entries}


def write_manifest(folder: str | os.PathLike, teachers: Iterable[LoadedTeacher]) -> None:
    Path(folder, MANIFEST_NAME).write_text(json.dumps(manifest_of(teachers), indent=2) + "\n")


def check_manifest(checkpoint: str | os.PathLike, teachers: Iterable[LoadedTeacher]) -> None:
    """Refuses to resume from a checkpoint that learnt from other teachers.

    Raises:
        ValueError: naming what differs.
    """
    path = Path(checkpoint, MANIFEST_NAME)
    if not path.is_file():
        raise ValueError(f"{checkpoint} has no {MANIFEST_NAME}, so it is not a checkpoint of this trainer.")
    with one_sentence(f"{path} is no manifest of teachers"):
        entries = read_json(path)["teachers"]
        before = {entry["id"]: {key: entry[key] for key in ("source", "commit", "sha256")} for entry in entries}
        dtypes = {entry["id"]: entry.get("dtype") for entry in entries}  # older ones have none
    loaded = {teacher.id: teacher for teacher in teachers}
    now = {entry["id"]: entry for entry in manifest_of(loaded.values())["teachers"]}
    if list(before) != list(now):
        raise ValueError(
            f"{checkpoint} learnt from the teachers {list(before)}, this run has {list(now)}; use the same set."
        )
    for key, entry in now.items():
        if entry["sha256"] != before[key]["sha256"] and dtypes[key] not in (None, entry["dtype"]):
            raise ValueError(
                f"teacher {key!r} is loaded in {entry['dtype']}, {checkpoint} learnt from it in "
                f"{dtypes[key]}; resume in the same precision."
            )
        if entry["sha256"] != before[key]["sha256"]:
            raise ValueError(
                f"teacher {key!r} has other weights ({loaded[key].spec.source}) than the one that {checkpoint} learnt "
                f"from ({before[key]['source']}, commit {before[key]['commit']}); use the same teacher."
            )


def plain_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same in ordinary tensors: quantised ones are made of several."""
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if hasattr(value, "__tensor_flatten__"):
            parts = {f"{key}.{name}": getattr(value, name) for name in value.__tensor_flatten__()[0]}
            found |= plain_tensors(parts)
        else:
            found[key] = value
    return found


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    tensors = plain_tensors(tensors)
    for key in sorted(tensors):
        value = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_once(weights: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
    """What [`hash_tensors`] makes of the weights of each teacher. Of several processes, which have all loaded them,
    each reads those of some teachers, and of the others a few numbers; called on every process.

    Raises:
        ValueError: if these numbers are not the same everywhere; it names the teacher.
    """
    if not (is_available() and is_initialized()):
        return {key: hash_tensors(tensors) for key, tensors in weights.items()}
    rank, world = get_rank(), get_world_size()
    samples = {key: hash_tensors(_samples(tensors)) for key, tensors in weights.items()}
    own = {key: hash_tensors(weights[key]) for number, key in enumerate(weights) if number % world == rank}
    found: list[tuple[dict[str, str], dict[str, str]]] = gather_object([(samples, own)])
    for process, (others, _) in enumerate(found):
        for key in weights:
            if others[key] != found[0][0][key]:
                raise ValueError(
                    f"teacher {key!r} has other weights on process {process} than on the first; are its files on all "
                    "machines the same?"
                )
    return {key: found[number % world][1][key] for number, key in enumerate(weights)}


def _samples(tensors: Mapping[str, Tensor], count: int = 16) -> dict[str, Tensor]:
    flat = {key: value.detach().reshape(-1) for key, value in plain_tensors(tensors).items()}
    return {key: value[:: max(1, len(value) // count)] for key, value in flat.items()}
