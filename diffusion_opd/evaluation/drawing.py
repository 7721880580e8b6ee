"""Pictures of prompts, on disk: what was drawn is not drawn again.

This file knows pipelines and files of pictures, and no scorer.
"""

import gc
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from ..denoisers import denoisers_of
from ..errors import one_sentence, without_reports
from ..inputs import PROMPT, content_key
from ..policy import tuner_layers
from ..sampling import SEED_EVAL, seed_of
from ..teachers.lora import load_lora
from ..teachers.spec import Lora, as_lora

SETTINGS = "settings.json"
_ADAPTER = "evaluated"


class Model(NamedTuple):
    """A row of the table.

    Attributes:
        name (`str`): In the table, and of its folder.
        path (`str`): The pipeline: Hub id or folder.
        lora ([`Lora`], *optional*): On top of it.
    """

    name: str
    path: str
    lora: Lora | None = None


class Sample(NamedTuple):
    """A picture to be drawn: which row of the prompts, how manieth picture of it, and the name of its file."""

    row: dict[str, Any]
    key: str
    seed: int


def named(entries: Sequence[Any], base: str | None = None) -> list[Model]:
    """Models, or LoRAs on a `base`, as users write them: a path, `name=path`, or a dict of [`Lora`]'s fields with
    `name`; the name is else the last part of the path."""
    models = []
    for entry in entries:
        fields: dict[str, Any] = dict(entry) if isinstance(entry, Mapping) else {"path": str(entry)}
        name, separator, path = fields["path"].partition("=") if "path" in fields else ("", "", "")
        if separator and not os.path.exists(fields["path"]):
            fields["path"] = path
        else:
            name = "/".join(filter(None, (Path(fields.get("path", "")).name, fields.get("subfolder"))))
        name = str(fields.pop("name", name)).replace("/", "-")
        try:
            lora = as_lora(Lora(**fields), f"the LoRA {name!r}")
        except TypeError as error:
            raise ValueError(f"{entry!r} names no model: {error}.") from error
        models.append(Model(name, str(lora.path)) if base is None else Model(name, base, lora))
    return models


def samples_of(rows: Sequence[dict[str, Any]], count: int, seed: int) -> list[Sample]:
    """`count` pictures of each row. Names and seeds follow from what a row holds, whatever is beside it."""
    seen: dict[int, int] = {}
    samples = []
    for row in rows:
        key = content_key(row)
        for _ in range(count):
            index = seen[key] = seen.get(key, -1) + 1  # the same row twice is two pictures
            samples.append(Sample(row, f"{key:016x}_{index}", seed_of(seed, SEED_EVAL, key, index)))
    return samples


def draw(
    model: Model,
    samples: Sequence[Sample],
    folder: Path,
    call_kwargs: Mapping[str, Any],
    dtype: torch.dtype,
    batch_size: int,
    seed: int,
) -> None:
    """Draws what is missing in a folder, in each process its share.

    Args:
        model ([`Model`]): That draws.
        samples (`Sequence[Sample]`): What is wanted.
        folder (`Path`): Where each is `<key>.png`, of a video a folder `<key>` of frames.
        call_kwargs (`dict`): Of the pipeline's call.
        dtype (`torch.dtype`): Of its weights.
        batch_size (`int`): Pictures of one call.
        seed (`int`): That the samples have theirs from.

    Raises:
        ValueError: if the folder holds pictures of other settings, or the model cannot be loaded.
    """
    state = PartialState()
    settings = {
        "model": model.path,
        "lora": None if model.lora is None else [model.lora.source, model.lora.weight_name, model.lora.revision],
        "weights": None if model.lora is None else _hash_of(model.lora),
        "call_kwargs": dict(call_kwargs),
        "dtype": str(dtype),
        "seed": seed,
    }
    settings = json.loads(json.dumps(settings, default=str))
    written = folder / SETTINGS
    begun = any(path.name != SETTINGS for path in folder.glob("*"))
    if written.is_file() and begun:  # a run that drew nothing binds nobody
        before = json.loads(written.read_text())
        if different := [name for name in settings if settings[name] != before.get(name)]:
            changes = ", ".join(f"{name} {before.get(name)!r}, now {settings[name]!r}" for name in different)
            raise ValueError(f"{folder} holds pictures of other settings ({changes}); give another `output_dir`.")
    missing = [
        sample
        for sample in samples
        if not (folder / f"{sample.key}.png").exists() and not (folder / sample.key).exists()
    ]
    state.wait_for_everyone()  # all have looked, before one writes
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        written.write_text(json.dumps(settings, indent=2) + "\n")
    state.wait_for_everyone()
    mine = missing[state.process_index :: state.num_processes]
    if not mine:
        return
    pipeline = load(model, dtype).to(state.device)
    pipeline.set_progress_bar_config(disable=True)
    bar = tqdm(range(0, len(mine), batch_size), desc=model.name, disable=not state.is_main_process)
    for start in bar:
        batch = mine[start : start + batch_size]
        generators = [torch.Generator().manual_seed(sample.seed) for sample in batch]
        with one_sentence(f"{model.name!r} cannot draw with {dict(call_kwargs)}"):
            output = pipeline([sample.row[PROMPT] for sample in batch], generator=generators, **call_kwargs)
        made = next((getattr(output, name) for name in ("images", "frames") if hasattr(output, name)), None)
        if made is None:
            raise ValueError(
                f"{type(pipeline).__name__} makes neither pictures nor videos, and nothing else is scored."
            )
        for sample, one in zip(batch, made, strict=True):
            _save(one, folder, sample.key)
    del pipeline
    gc.collect()
    clear_device_cache()


def load(model: Model, dtype: torch.dtype) -> DiffusionPipeline:
    """A model's pipeline, its LoRA active."""
    with without_reports(), one_sentence(f"the model {model.path!r} cannot be loaded"):
        pipeline = DiffusionPipeline.from_pretrained(model.path, dtype=dtype)
    if model.lora is not None:
        load_lora(model.lora, pipeline, _ADAPTER)
        for denoiser in denoisers_of(pipeline).values():
            for layer in tuner_layers(denoiser):
                layer.set_adapter(_ADAPTER)
            denoiser.requires_grad_(False)
    return pipeline


def picture(folder: Path, key: str) -> Any:
    """What was drawn: an image, or of a video the list of its frames."""
    frames = folder / key
    if frames.is_dir():
        return [Image.open(file) for file in sorted(frames.glob("*.png"))]
    return Image.open(folder / f"{key}.png")


def _save(made: Any, folder: Path, key: str) -> None:
    """Under its name once it is whole."""
    if isinstance(made, Image.Image):
        part = folder / f".{key}.png"
        made.save(part)
        part.replace(folder / f"{key}.png")
        return
    part = folder / f".{key}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    for index, frame in enumerate(made):
        frame.save(part / f"{index:04}.png")
    part.replace(folder / key)


def _hash_of(lora: Lora) -> str | None:
    """Of the files of a LoRA that lies here: a folder may be trained on."""
    path = Path(lora.path, lora.subfolder or "")
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16] if files else None
