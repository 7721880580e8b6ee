"""Pictures of prompts, on disk: what was drawn is not drawn again.

This file knows pipelines and files of pictures, and no scorer.
"""

import gc
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from PIL import Image
from tqdm.auto import tqdm

from ..attention import set_attention_backend
from ..callbacks.sounds import makes_sound
from ..decoding import CHECKER, takes_no_checker, watched_decoders
from ..denoisers import NAMES, denoisers_of
from ..errors import one_sentence, without_reports
from ..files import absent_parts, parts_named
from ..inputs import PROMPT, as_arguments, content_key
from ..modular import load_modular
from ..policy import tuner_layers
from ..quantization import as_json, configs_by_part
from ..sampling import SEED_EVAL, seed_of
from ..student import read_index
from ..teachers.locating import locate
from ..teachers.lora import load_lora
from ..teachers.spec import Lora, as_lora

SETTINGS = "settings.json"
_ADAPTER = "evaluated"
_PIECE = 2**16  # bytes


class Model(NamedTuple):
    """A row of the table.

    Attributes:
        name (`str`): In the table, and of its folder.
        path (`str`): The pipeline: Hub id or folder.
        lora ([`Lora`], *optional*): On top of it.
        call_kwargs (`dict`, *optional*): Of its own call.
    """

    name: str
    path: str
    lora: Lora | None = None
    call_kwargs: Mapping[str, Any] = {}


class Sample(NamedTuple):
    """A picture to be drawn: which row of the prompts, how manieth picture of it, and the name of its file."""

    row: dict[str, Any]
    key: str
    seed: int


def named(entries: Sequence[Any], base: str | None = None) -> list[Model]:
    """Models, or LoRAs on a `base`, as users write them: a path, `name=path`, or a dict of [`Lora`]'s fields with
    `name` and `call_kwargs`; the name is else the last part of the path."""
    models = []
    for entry in entries:
        fields: dict[str, Any] = dict(entry) if isinstance(entry, Mapping) else {"path": str(entry)}
        name, separator, path = fields["path"].partition("=") if "path" in fields else ("", "", "")
        if separator and not os.path.exists(fields["path"]):
            fields["path"] = path
        else:
            name = "/".join(filter(None, (Path(fields.get("path", "")).name, fields.get("subfolder"))))
        name = str(fields.pop("name", name)).replace("/", "-")
        call_kwargs = fields.pop("call_kwargs", None) or {}
        try:
            lora = as_lora(Lora(**fields), f"the LoRA {name!r}")
        except TypeError as error:
            raise ValueError(f"{entry!r} names no model: {error}.") from error
        one = Model(name, str(lora.path)) if base is None else Model(name, base, lora)
        models.append(one._replace(call_kwargs=call_kwargs))
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


def settings_of(
    model: Model,
    folder: Path,
    call_kwargs: Mapping[str, Any],
    dtype: torch.dtype,
    seed: int,
    quantization: Any = None,
    backend: str | None = None,
) -> Any:
    """What the pictures of a model depend on, the prompts aside.

    Args:
        model ([`Model`]): That draws.
        folder (`Path`): Of its pictures.
        call_kwargs (`dict`): Of the pipeline's call.
        dtype (`torch.dtype`): Of its weights.
        seed (`int`): That the samples have theirs from.
        quantization, backend: As of [`load`].

    Raises:
        ValueError: if the model is nowhere, or the folder holds pictures of other settings.
    """
    settings = {
        "model": _weights_of(model),
        "lora": None if model.lora is None else _weights_of_lora(model.lora),
        "scale": None if model.lora is None else model.lora.scale,
        "call_kwargs": dict(call_kwargs),
        "dtype": str(dtype).removeprefix("torch."),
        "seed": seed,
        "quantization_config": as_json(quantization),
        "attention_backend": backend,
    }
    settings = json.loads(json.dumps(settings, default=str))
    written = folder / SETTINGS
    begun = any(path.name != SETTINGS for path in folder.glob("*"))
    if written.is_file() and begun:  # a run that drew nothing binds nobody
        before = json.loads(written.read_text())
        if different := [name for name in settings if settings[name] != before.get(name)]:
            changes = ", ".join(f"{name} {before.get(name)!r}, now {settings[name]!r}" for name in different)
            raise ValueError(f"{folder} holds pictures of other settings ({changes}); give another `output_dir`.")
    return settings


def draw(
    model: Model,
    samples: Sequence[Sample],
    folder: Path,
    settings: Mapping[str, Any],
    call_kwargs: Mapping[str, Any],
    batch_size: int,
    quantization: Any = None,
) -> None:
    """Draws what is missing in a folder, in each process its share.

    Args:
        model ([`Model`]): That draws.
        samples (`Sequence[Sample]`): What is wanted.
        folder (`Path`): Where each is `<key>.png`, of a video a folder `<key>` of frames.
        settings (`dict`): As [`settings_of`] returns them.
        call_kwargs (`dict`): Of the pipeline's call.
        batch_size (`int`): Pictures of one call.
        quantization: As of [`load`].

    Raises:
        ValueError: if the model cannot be loaded, makes sound, or decodes to NaN.
    """
    state = PartialState()
    missing = [
        sample
        for sample in samples
        if not (folder / f"{sample.key}.png").exists() and not (folder / sample.key).exists()
    ]
    state.wait_for_everyone()  # all have looked, before one writes
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        source = model.path if model.lora is None else model.lora.source
        (folder / SETTINGS).write_text(json.dumps({"from": source, **settings}, indent=2) + "\n")
    state.wait_for_everyone()
    mine = missing[state.process_index :: state.num_processes]
    if not mine:
        return
    pipeline = load(model, getattr(torch, settings["dtype"]), quantization, settings["attention_backend"]).to(
        state.device
    )
    if makes_sound(pipeline):
        raise ValueError(f"{type(pipeline).__name__} makes neither pictures nor videos, and nothing else is scored.")
    pipeline.set_progress_bar_config(disable=True)
    finite: list[torch.Tensor] = []
    # Past `DiffusionPipeline.__setattr__`, which writes into the config
    vars(pipeline).update(watched_decoders(pipeline, lambda decoded: finite.append(decoded.isfinite().all())))
    if takes_no_checker(pipeline):
        vars(pipeline)[CHECKER] = None
    devices = [state.device] if state.device.type == "cuda" else []
    bar = tqdm(range(0, len(mine), batch_size), desc=model.name, disable=not state.is_main_process)
    for start in bar:
        batch = mine[start : start + batch_size]
        generators = [torch.Generator().manual_seed(sample.seed) for sample in batch]
        bare = len(batch) == 1  # there are pipelines that take no list
        given = as_arguments(type(pipeline), {PROMPT: [sample.row[PROMPT] for sample in batch]}, bare)
        # Some classes draw from the global generator
        with one_sentence(f"{model.name!r} cannot draw with {dict(call_kwargs)}"), torch.random.fork_rng(devices):
            torch.manual_seed(batch[0].seed)
            output = pipeline(
                **given, generator=generators[0] if bare else generators, output_type="pil", **call_kwargs
            )
        if not all(finite):
            raise ValueError(
                f"the VAE of the model {model.name!r} decodes to NaN or Inf in {settings['dtype']}, which are black "
                "pictures; give another `dtype`."
            )
        finite.clear()
        made = next(getattr(output, name) for name in ("images", "frames", "videos") if hasattr(output, name))
        for sample, one in zip(batch, made, strict=True):
            _save(one, folder, sample.key)
    del pipeline
    gc.collect()
    clear_device_cache()


def load(model: Model, dtype: torch.dtype, quantization: Any = None, backend: str | None = None) -> DiffusionPipeline:
    """A model's pipeline, its LoRA active.

    Args:
        model ([`Model`]): Which.
        dtype (`torch.dtype`): Of what is not quantised.
        quantization (`dict` or [`~diffusers.PipelineQuantizationConfig`], *optional*): Of its parts.
        backend (`str`, *optional*): Of its denoisers' attention.
    """
    index, is_modular, _ = read_index(model.path, {}, "the model")
    quantised = configs_by_part(quantization, index, f"the model {model.path!r}")
    with without_reports(), one_sentence(f"the model {model.path!r} cannot be loaded", " (only safetensors are read)"):
        if is_modular:
            pipeline: Any = load_modular(model.path, {}, quantised, dtype=dtype, use_safetensors=True)
        else:
            more = {"use_safetensors": True, **absent_parts(index)}
            if quantised:
                more["quantization_config"] = PipelineQuantizationConfig(quant_mapping=quantised)
            pipeline = DiffusionPipeline.from_pretrained(model.path, dtype=dtype, **more)
    if backend is not None:
        for name, denoiser in denoisers_of(pipeline).items():
            set_attention_backend(denoiser, backend, f"the {name} of {model.path!r}")
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


def _weights_of(model: Model) -> str:
    """What tells the pipeline from another at the same place, which may be trained on: its commit, or a hash."""
    index, _, commit = read_index(model.path, {}, "the model")
    folder = Path(model.path)
    files = [
        *folder.glob("*model_index.json"),
        *(file for name in parts_named(index) for file in (folder / name).rglob("*.*")),
    ]
    return commit or _hash_of(file for file in files if file.suffix in (".json", ".safetensors"))


def _weights_of_lora(lora: Lora) -> list[str | dict[str, str] | None]:
    folder, commit = locate(lora, NAMES)
    weights = commit or _hash_of([*folder.glob("*.safetensors"), *folder.glob("adapter_config.json")])
    return [weights, lora.subfolder, lora.weight_name]


def _hash_of(files: Iterable[Path]) -> str:
    """Of all bytes, or of many pieces of large files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in files if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(_PIECE, size // 1024)):
                file.seek(start)
                digest.update(file.read(_PIECE))
    return digest.hexdigest()[:16]
