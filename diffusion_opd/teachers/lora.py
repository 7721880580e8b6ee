"""LoRA teachers: what their files hold, and how that becomes adapters of a denoiser, and of encoders.

A tensor that is silently dropped makes a teacher that silently equals the base, so each one that is missing, unexpected
or of another shape is refused.
"""

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import PeftConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ..adapters import adapted_layers, add_adapter, changes_base
from ..denoisers import denoisers_of
from ..errors import first_few, one_sentence, reason
from ..files import CONFIG_NAME, INDEX_NAME, PEFT_CONFIG_NAME, PEFT_WEIGHTS_NAME
from ..fingerprint import Fingerprint, contradictions, read_fingerprint
from .locating import locate, lora_names, parse_json, read_json, sole_lora
from .plain import Adapter, Plain, load_into_denoiser, plain_spelling, read_plainly
from .spec import Lora, Teacher


def load_lora(
    lora: Lora, pipeline: DiffusionPipeline, adapter: str, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Adds a LoRA to the denoisers of a pipeline as a frozen adapter, in a dtype (`None`: the denoisers' own).

    Returns:
        `dict[str, Tensor]`: its tensors and scalings, of several denoisers under their names.

    Raises:
        ValueError: if it cannot be read, does not fit, was made for other weights, or is more than a LoRA of the
            denoisers.
    """
    own = denoisers_of(pipeline)
    folder, commit = locate(lora, own)
    if lora.weight_name is None:
        lora = replace(lora, weight_name=sole_lora(lora, folder, commit, own))
    loras = read_loras(lora, folder, pipeline)
    for name, read in loras.items():
        if read.changes_base:
            raise ValueError(
                f"{lora.who}: {lora.source!r} does more to the {name} than adding a LoRA (other adapters, replaced "
                f"layers or norms); load it in plain diffusers, fuse it, and give the {name}."
            )
        if others := sorted(read.adapters.keys() - own.keys()):
            raise ValueError(
                f"{lora.who}: {lora.source!r} adapts the {first_few(others)} too, and this may adapt the denoiser only."
            )
    return add_loras(lora, pipeline, adapter, loras, dtype=dtype)


def add_loras(
    teacher: Teacher | Lora,
    pipeline: DiffusionPipeline,
    adapter: str,
    loras: Mapping[str, "ReadLora"],
    beneath: Sequence[str] = (),
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Adds what [`read_loras`] has read; `beneath` are adapters that are part of the base that it was made for."""
    denoisers = denoisers_of(pipeline)
    adapted = sorted({key for lora in loras.values() for key in lora.adapters})
    if isinstance(teacher.scale, Mapping) and (unknown := sorted(teacher.scale.keys() - set(adapted))):
        raise ValueError(f"{teacher.who}: `scale` names {unknown}, and the LoRA {teacher.source!r} adapts {adapted}.")
    found: dict[str, Tensor] = {}
    for name, lora in loras.items():
        denoiser: Any = denoisers[name]
        for key, read in lora.adapters.items():
            part: Any = denoiser if key == name else getattr(pipeline, key)
            if key == name and lora.changes_base:
                with one_sentence(f"{teacher.who}: the LoRA {teacher.source!r} does not fit the student's {name}"):
                    load_into_denoiser(pipeline, name, lora.file, lora.metadata, adapter)
            else:
                add_lora(teacher, part, adapter, read, dtype)
            for layer in adapted_layers(part, adapter).values():
                layer.scaling[adapter] *= _scale_of(teacher, key)
            prefix = f"{key}." if len(denoisers) > 1 or key != name else ""
            own = (lora.file if key == name and lora.changes_base else read.tensors) | scalings(part, adapter)
            found |= {f"{prefix}{entry}": value for entry, value in own.items()}
        if contradictions(denoiser, lora.fingerprint, beneath):
            hint = "" if beneath else "; as when another LoRA was fused into them: name that one by `base_lora`"
            raise ValueError(
                f"{teacher.who}: the LoRA {teacher.source!r} was trained on other weights than those of the student's "
                f"{name}{hint}."
            )
    return found


def _scale_of(teacher: Teacher | Lora, part: str) -> float:
    scale = teacher.scale
    return scale.get(part, 1.0) if isinstance(scale, Mapping) else 1.0 if scale is None else scale


class ReadLora(NamedTuple):
    """What a file holds.

    Attributes:
        adapters (`dict[str, Adapter]`): By the parts of the pipeline: a denoiser, and encoders.
        fingerprint (`dict`): Values of the base that it was made for, if it is one of ours.
        changes_base (`bool`): Whether it does more to the denoiser than adding a LoRA, so that it needs one of its own.
        file, metadata: What lies in it, as plain diffusers takes it.
    """

    adapters: dict[str, Adapter]
    fingerprint: Fingerprint
    changes_base: bool = False
    file: dict[str, Tensor] = {}
    metadata: dict[str, Any] | None = None


def read_loras(teacher: Teacher | Lora, folder: Path, student: DiffusionPipeline) -> dict[str, ReadLora]:
    """The LoRAs of a teacher by the names of the denoisers that they are for: of several at least one."""
    own = list(denoisers_of(student))
    names = lora_names(teacher, own)
    if unknown := sorted(names.keys() - set(own)):
        raise ValueError(f"{teacher.who}: `weight_name` names {unknown}, and the student has {own}.")
    if teacher.weight_name is None:
        there = {name: file for name, file in names.items() if (folder / file).is_file()}
        is_peft = (folder / PEFT_CONFIG_NAME).is_file()  # which has one file, for the first
        names = there if there and not is_peft else {own[0]: names[own[0]]}
    return {name: read_lora(teacher, folder, student, name, file) for name, file in names.items()}


def read_lora(teacher: Teacher | Lora, folder: Path, student: DiffusionPipeline, name: str, file: str) -> ReadLora:
    """A LoRA in PEFT or diffusers format.

    Args:
        name (`str`): Of the denoiser that it is for.
        file (`str`): Its name in diffusers format.
    """
    is_peft = (folder / PEFT_CONFIG_NAME).is_file() and teacher.weight_name in (None, PEFT_WEIGHTS_NAME)
    weights = folder / (PEFT_WEIGHTS_NAME if is_peft else file)
    if is_peft and not weights.is_file():
        raise ValueError(
            f"{teacher.who}: {teacher.source!r} has an {PEFT_CONFIG_NAME}, but no {weights.name}, the only "
            "format that is read."
        )
    if not weights.is_file():
        raise ValueError(
            f"{teacher.who}: {teacher.source!r} holds no pipeline ({INDEX_NAME}), no denoiser ({CONFIG_NAME}) "
            f"and no LoRA ({PEFT_CONFIG_NAME} or {weights.name}); check `path`, `subfolder` and `weight_name`."
        )
    if not is_peft and not hasattr(student, "load_lora_weights"):
        raise ValueError(
            f"{teacher.who}: {type(student).__name__} cannot read a LoRA in diffusers format; give it in PEFT "
            f"format ({PEFT_CONFIG_NAME})."
        )
    with one_sentence(
        f"{teacher.who}: {weights.name} of {teacher.source!r} is no safetensors file (is it a pickle, a "
        "git-lfs pointer, or a download that broke off?)"
    ):
        tensors, fingerprint = load_file(weights), read_fingerprint(weights)
    if not is_peft:
        return _read_diffusers_lora(teacher, weights, student, name, tensors, fingerprint)
    kind = read_json(teacher, folder / PEFT_CONFIG_NAME).get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{teacher.who}: {teacher.source!r} is of PEFT's type {kind!r}, not a LoRA.")
    with one_sentence(f"{teacher.who}: {PEFT_CONFIG_NAME} of {teacher.source!r} cannot be read"):
        config: Any = PeftConfig.from_pretrained(str(folder))
    tensors = plain_spelling(tensors, "", _modules(denoisers_of(student)[name]))
    if not any(key.endswith("lora_B.weight") for key in tensors):
        raise ValueError(
            f"{teacher.who}: no LoRA tensors for a {name} in {teacher.source!r}, e.g. {first_few(tensors)}."
        )
    if changes_base(config):
        raise ValueError(
            f"{teacher.who}: the LoRA {teacher.source!r} also changes the {name} itself "
            f"(bias={config.bias!r}, modules_to_save={config.modules_to_save}, "
            f"init_lora_weights={config.init_lora_weights!r}), which the student shares; merge it and give the {name}."
        )
    return ReadLora({name: Adapter(tensors, config)}, fingerprint)


def _modules(denoiser: nn.Module) -> set[str]:
    """Names as they are without adapters."""
    return {name.removesuffix(".base_layer") for name, _ in denoiser.named_modules()}


def _read_diffusers_lora(
    teacher: Teacher | Lora,
    weights: Path,
    student: DiffusionPipeline,
    name: str,
    tensors: dict[str, Tensor],
    fingerprint: Fingerprint,
) -> ReadLora:
    """What plain diffusers makes of a file; if it does not read all of it, of one in its own spelling."""
    metadata = _metadata_of(teacher, weights)
    prefix, denoiser = f"{name.removesuffix('_2')}.", denoisers_of(student)[name]
    spelt = plain_spelling(tensors, prefix, _modules(denoiser))
    differs = spelt.keys() != tensors.keys() or any(spelt[key].dtype != tensors[key].dtype for key in spelt)
    failures = []
    for file in (tensors, spelt) if differs else (tensors,):
        converted: dict[str, Tensor] = {}
        try:
            plain = read_plainly(student, name, file, metadata, converted)
        except Exception as error:
            why = f"{_unreadable(student, tensors)}: {reason(error, 140).rstrip('.')}"
        else:
            if not plain.unread and not plain.missing and name in plain.adapters:
                for adapter in plain.adapters.values() if not (metadata or plain.changes_base) else ():
                    adapter.config.target_modules = _exactly(adapter.tensors)
                return ReadLora(plain.adapters, fingerprint, plain.changes_base, file, metadata)
            why = _what_is_left(student, tensors, plain)
        failures.append(_another_model(denoiser, prefix, converted) or why)
    what = teacher.source if teacher.weight_name is None else f"{teacher.source}/{weights.name}"
    raise ValueError(f"{teacher.who}: the LoRA {what!r} {failures[0]}.")


def _what_is_left(student: DiffusionPipeline, tensors: Mapping[str, Tensor], plain: Plain) -> str:
    """What of a file reaches nothing, or what it lacks, in words."""
    if scales := [key for key in plain.unread if "dora_scale" in key]:
        return f"is a DoRA in a format that diffusers cannot read, e.g. {first_few(scales)}"
    if plain.unread and len(plain.unread) < len(tensors):
        return (
            f"holds {len(plain.unread)} tensors that the `load_lora_weights` of {type(student).__name__} leaves out, "
            f"e.g. {first_few(plain.unread)}"
        )
    if plain.missing:
        return f"lacks {len(plain.missing)} tensors of its layers, e.g. {first_few(plain.missing)}"
    return _unreadable(student, tensors)


def _unreadable(student: DiffusionPipeline, tensors: Iterable[str]) -> str:
    key = min([key for key in tensors if "lora" not in key] or tensors)
    return f"is in a format that the `load_lora_weights` of {type(student).__name__} does not read, with keys as {key}"


def _exactly(tensors: Iterable[str]) -> str:
    """A pattern of these modules alone: names in a list would also be those that end so."""
    return "|".join(sorted({re.escape(_module_of(key)) for key in tensors}))


def _metadata_of(teacher: Teacher | Lora, weights: Path) -> dict[str, Any] | None:
    """What diffusers has written about a LoRA beside its tensors."""
    with safe_open(weights, "pt") as file:
        text = (file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY)
    return None if text is None else parse_json(teacher, text, f"the metadata of {weights.name}")


def _another_model(denoiser: nn.Module, prefix: str, converted: Mapping[str, Tensor]) -> str | None:
    """What of a LoRA, its names as diffusers has them, is for another model, in words."""
    weights = {key.removesuffix(".base_layer"): getattr(m, "weight", None) for key, m in denoiser.named_modules()}
    what = f"was made for another model than the student's {type(denoiser).__name__}"
    names = {key: key.removeprefix(prefix).rpartition(".lora_")[0] for key in sorted(converted) if ".lora_" in key}
    if names and not any(key.startswith(prefix) for key in names):  # in no format, or for another denoiser
        return f"{what}: it adapts {min(names.values())}" if min(names).startswith(("unet.", "transformer.")) else None
    for key, module in names.items():
        if key.startswith(prefix) and module not in weights:
            return f"{what}: it adapts {module}, which is not there by that name"
        weight, shape = weights.get(module), tuple(converted[key].shape)
        if key.startswith(prefix) and weight is not None and weight.ndim == len(shape) == 2:
            rows, columns = weight.shape
            needed = (shape[0], columns) if ".lora_A." in key else (rows, shape[1]) if ".lora_B." in key else shape
            if shape != needed:
                return f"{what}: its {key.removeprefix(prefix)} is of shape {shape} where {needed} is needed"
    return None


def add_lora(
    teacher: Teacher | Lora,
    denoiser: nn.Module,
    adapter: str,
    read: Adapter,
    dtype: torch.dtype | None = None,
) -> None:
    """Adds a frozen adapter and refuses any tensor that is missing, unexpected or of another shape."""
    tensors, config = read.tensors, copy.copy(read.config)
    config.init_lora_weights, config.inference_mode = False, False  # the weights are about to come
    cls, modules = type(denoiser).__name__, {name for name, _ in denoiser.named_modules()}
    adapted, expected = {_module_of(key) for key in tensors}, {}
    if adapted & modules:
        with one_sentence(f"{teacher.who}: the LoRA {teacher.source!r} does not fit the student's {cls}"):
            add_adapter(denoiser, config, adapter)
        for name, parameter in denoiser.named_parameters() if dtype is not None else ():
            if f".{adapter}." in f"{name}.":
                parameter.data = parameter.data.to(dtype)
        expected = get_peft_model_state_dict(denoiser, adapter_name=adapter)
    missing, unexpected = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    shapes = {
        key: (tuple(tensors[key].shape), tuple(expected[key].shape))
        for key in sorted(expected.keys() & tensors.keys())
        if tensors[key].shape != expected[key].shape
    }
    differences = [
        *(
            f"its {key} is of shape {theirs} where {ours} is needed"
            for key, (theirs, ours) in shapes.items()
            if _without_rank(key, theirs) != _without_rank(key, ours)
        ),
        *(f"it adapts {m}, which is not there by that name" for m in map(_module_of, unexpected) if m not in modules),
        *(f"it lacks {m}, which its config names" for m in map(_module_of, missing) if m not in adapted),
    ]
    if differences:
        raise ValueError(
            f"{teacher.who}: the LoRA {teacher.source!r} was made for another model than the student's {cls}: "
            f"{differences[0]}."
        )
    wrong = [f"{key} {theirs} for {ours}" for key, (theirs, ours) in shapes.items()]
    for kind, keys in (("missing", missing), ("unexpected", unexpected), ("wrongly shaped", wrong)):
        if keys:
            raise ValueError(
                f"{teacher.who}: {len(keys)} {kind} LoRA tensors in {teacher.source!r} for the student's "
                f"{cls}, e.g. {first_few(keys)}."
            )
    with torch.no_grad():
        for key, value in expected.items():
            value.copy_(tensors[key])
    for module, scaling in read.scaling.items():
        layer: Any = denoiser.get_submodule(module)
        layer.scaling[adapter] = scaling


def _module_of(key: str) -> str:
    return key.rpartition(".lora_")[0]


def _without_rank(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    rank = int("lora_B" in key)
    return shape[:rank] + shape[rank + 1 :]


def scalings(denoiser: nn.Module, adapter: str) -> dict[str, Tensor]:
    layers = adapted_layers(denoiser, adapter)
    return {f"{name}.scaling": torch.tensor(layer.scaling[adapter]) for name, layer in layers.items()}
