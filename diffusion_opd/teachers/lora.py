"""LoRA teachers: formats that are read, and how their tensors become an adapter of a denoiser.

A tensor that is silently dropped makes a teacher that silently equals the base, so each one that is missing, unexpected
or of another shape is refused.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from ..adapters import add_adapter, changes_base
from ..denoisers import denoisers_of
from ..errors import first_few, one_sentence
from ..files import CONFIG_NAME, INDEX_NAME, PEFT_CONFIG_NAME, PEFT_PREFIX, PEFT_WEIGHTS_NAME
from ..fingerprint import Fingerprint, contradictions, read_fingerprint
from .locating import locate, lora_names, read_json, sole_lora
from .spec import Lora, Teacher


def load_lora(
    lora: Lora, pipeline: DiffusionPipeline, adapter: str, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Adds a LoRA to the denoisers of a pipeline as a frozen adapter, in a dtype (`None`: the denoisers' own).

    Returns:
        `dict[str, Tensor]`: its tensors and scalings, of several denoisers under their names.

    Raises:
        ValueError: if it cannot be read, does not fit, or was made for other weights.
    """
    own = denoisers_of(pipeline)
    folder, commit = locate(lora, own)
    if lora.weight_name is None:
        lora = replace(lora, weight_name=sole_lora(lora, folder, commit, own))
    return add_loras(lora, pipeline, adapter, read_loras(lora, folder, pipeline), dtype=dtype)


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
    found: dict[str, Tensor] = {}
    for name, lora in loras.items():
        part: Any = denoisers[name]
        add_lora(teacher, part, adapter, lora.tensors, lora.config, dtype)
        if contradictions(part, lora.fingerprint, beneath):
            hint = "" if beneath else "; as when another LoRA was fused into them: name that one by `base_lora`"
            raise ValueError(
                f"{teacher.who}: the LoRA {teacher.source!r} was trained on other weights than those of the student's "
                f"{name}{hint}."
            )
        prefix = f"{name}." if len(denoisers) > 1 else ""
        own = lora.tensors | scalings(part, adapter)
        found |= {f"{prefix}{key}": value for key, value in own.items()}
    return found


class ReadLora(NamedTuple):
    """What a file holds: tensors (keys as in the denoiser, `lora_A` / `lora_B`), config, and values of the base that it
    was made for, if it is one of ours."""

    tensors: dict[str, Tensor]
    config: LoraConfig
    fingerprint: Fingerprint


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
    if not is_peft and not hasattr(type(student), "lora_state_dict"):
        raise ValueError(
            f"{teacher.who}: {type(student).__name__} cannot read a LoRA in diffusers format; give it in PEFT "
            f"format ({PEFT_CONFIG_NAME})."
        )
    with one_sentence(
        f"{teacher.who}: {weights.name} of {teacher.source!r} is no safetensors file (is it a pickle, a "
        "git-lfs pointer, or a download that broke off?)"
    ):
        tensors = load_file(weights)
    if is_peft:
        kind = read_json(teacher, folder / PEFT_CONFIG_NAME).get("peft_type")
        if kind != "LORA":
            raise ValueError(f"{teacher.who}: {teacher.source!r} is of PEFT's type {kind!r}, not a LoRA.")
        with one_sentence(f"{teacher.who}: {PEFT_CONFIG_NAME} of {teacher.source!r} cannot be read"):
            config = PeftConfig.from_pretrained(str(folder))
        tensors = {key.removeprefix(PEFT_PREFIX): value for key, value in tensors.items()}
    elif scales := [key for key in tensors if "dora_scale" in key]:  # diffusers drops them with a warning
        raise ValueError(
            f"{teacher.who}: {teacher.source!r} is a DoRA in a format that diffusers cannot read, "
            f"e.g. {first_few(scales)}."
        )
    else:
        tensors, config = _read_diffusers_lora(teacher, weights, student, name, tensors)
    if not _has_lora(tensors):
        raise ValueError(
            f"{teacher.who}: no LoRA tensors for a {name} in {teacher.source!r}, e.g. {first_few(tensors)}."
        )
    if changes_base(config):
        raise ValueError(
            f"{teacher.who}: the LoRA {teacher.source!r} also changes the {name} itself "
            f"(bias={config.bias!r}, modules_to_save={config.modules_to_save}, "
            f"init_lora_weights={config.init_lora_weights!r}), which the student shares; merge it and give the {name}."
        )
    config.init_lora_weights = config.inference_mode = False  # the weights are about to come
    return ReadLora(tensors, config, read_fingerprint(weights))


def _has_lora(tensors: Iterable[str]) -> bool:
    return any(key.endswith("lora_B.weight") for key in tensors)


def _read_diffusers_lora(
    teacher: Teacher | Lora, weights: Path, student: DiffusionPipeline, name: str, keys: Iterable[str]
) -> tuple[dict[str, Tensor], LoraConfig]:
    cls = type(student)
    prefix = f"{name.removesuffix('_2')}."  # as if it were for the first

    def check_read(unread: Sequence[str]) -> None:
        if unread:
            raise ValueError(
                f"{teacher.who}: {len(unread)} keys of {teacher.source!r} are in a format that the "
                f"`lora_state_dict` of {cls.__name__} does not read, e.g. {min(unread)}."
            )

    # As its `load_lora_weights`, which needs the config of a UNet to read names of other trainers
    of_unet = {"unet_config": student.unet.config} if name == "unet" else {}
    with one_sentence(
        f"{teacher.who}: {weights.name} of {teacher.source!r} is in a format that the `lora_state_dict` of "
        f"{cls.__name__} does not read, with keys as {min(keys)}"
    ):
        tensors, *rest = cls.lora_state_dict(
            str(weights.parent), weight_name=weights.name, return_lora_metadata=True, **of_unet
        )
    alphas, metadata = (rest[0] if len(rest) == 2 else None), rest[-1]
    foreign = [key for key in tensors if not key.startswith(prefix)]
    check_read([key for key in foreign if key.partition(".")[0] not in {"transformer", "unet", *student.components}])
    if foreign:
        raise ValueError(
            f"{teacher.who}: {len(foreign)} tensors of {teacher.source!r} are not for the student's {name}, "
            f"e.g. {first_few(foreign)}; a teacher may adapt the denoiser only."
        )
    tensors, alphas, metadata = (
        {key.removeprefix(prefix): value for key, value in (given or {}).items() if key.startswith(prefix)}
        for given in (tensors, alphas, metadata)
    )
    if not any("lora_A" in key for key in tensors):  # down and up of other trainers
        tensors, alphas = convert_unet_state_dict_to_peft(tensors), convert_unet_state_dict_to_peft(alphas)
    check_read([] if _has_lora(tensors) else list(keys))
    if metadata:
        return tensors, LoraConfig(**metadata)
    # Without metadata: ranks from the shapes, alphas from `.alpha` entries, alpha = rank where there are none
    ranks = {key.split(".lora_B.")[0]: value.shape[1] for key, value in tensors.items() if ".lora_B.weight" in key}
    alphas = {key.split(".lora_A.")[0].removesuffix(".alpha"): value for key, value in alphas.items()}
    if stray := sorted(alphas.keys() - ranks.keys()):
        raise ValueError(
            f"{teacher.who}: {len(stray)} alphas of {teacher.source!r} belong to no LoRA tensor, "
            f"e.g. {first_few(stray)}."
        )
    config = LoraConfig(
        rank_pattern={f"^{re.escape(module)}": rank for module, rank in ranks.items()},
        alpha_pattern={f"^{re.escape(module)}": alpha for module, alpha in (ranks | alphas).items()},
        target_modules="|".join(re.escape(module) for module in ranks),
    )
    return tensors, config


def add_lora(
    teacher: Teacher | Lora,
    denoiser: nn.Module,
    adapter: str,
    tensors: dict[str, Tensor],
    config: LoraConfig,
    dtype: torch.dtype | None = None,
) -> None:
    """Adds a frozen adapter and refuses any tensor that is missing, unexpected or of another shape."""
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


def _module_of(key: str) -> str:
    return key.rpartition(".lora_")[0]


def _without_rank(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    rank = int("lora_B" in key)
    return shape[:rank] + shape[rank + 1 :]


def scalings(denoiser: nn.Module, adapter: str) -> dict[str, Tensor]:
    layers = {key: layer for key, layer in denoiser.named_modules() if isinstance(layer, LoraLayer)}
    return {f"{k}.scaling": torch.tensor(v.scaling[adapter]) for k, v in layers.items() if adapter in v.scaling}
