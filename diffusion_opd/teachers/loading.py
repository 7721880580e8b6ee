"""Loads teachers beside the student: LoRAs as adapters of one frozen backbone, denoisers in a copy of the student's
pipeline, and pipelines, which share with it what both have in common (VAE, text encoders)."""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..adapters import frozen_copy, with_denoiser, without_adapters
from ..denoisers import NAMES, denoiser_of, denoisers_of, take_wrappers_off
from ..errors import first_few, one_sentence
from ..files import CONFIG_NAME, INDEX_NAME, MODULAR_INDEX_NAME, absent_parts, parts_named
from ..fingerprint import take_fingerprint
from ..modular import is_pipeline, load_modular, with_call
from ..policy import check_seams
from ..quantization import configs_by_part, is_quantised, keep_layout
from .compatible import check_compatible, same_part, share_parts
from .locating import locate, read_json, sole_lora, variant_in
from .lora import add_loras, load_lora, read_loras
from .manifest import hash_once, hash_tensors
from .spec import LoadedTeacher, Teacher, as_lora

logger = get_logger(__name__)


def load_teachers(
    teachers: Mapping[str, Teacher],
    student: DiffusionPipeline,
    trains_lora: bool,
    dtype: torch.dtype,
    untrained: Callable[[], tuple[DiffusionPipeline, str | None]] | None = None,
    quantization: Any = None,
) -> list[LoadedTeacher]:
    """Loads every teacher beside the student.

    Args:
        teachers (`Mapping[str, Teacher]`):
            As [`name_teachers`] returns them.
        student ([`~diffusers.DiffusionPipeline`]):
            Gets the LoRA teachers as further adapters if it trains a LoRA itself.
        trains_lora (`bool`):
            Whether the student's backbone stays frozen. If not, LoRA teachers live on a frozen copy of it.
        dtype (`torch.dtype`):
            For the frozen modules that are loaded here.
        untrained (`Callable`, *optional*):
            Makes the student before training, a pipeline and the adapter of its denoiser, once for all teachers that
            are it. `None`: there is none.
        quantization (`dict` or [`~diffusers.PipelineQuantizationConfig`], *optional*):
            For those that are whole denoisers or pipelines in files.

    Raises:
        ValueError: if a teacher cannot be read, has missing, unexpected or wrongly shaped tensors, or lives in another
            latent space or time than the student.
    """
    own = denoisers_of(student)
    host = student
    loaded: list[LoadedTeacher] = []
    weights: dict[str, dict[str, Tensor]] = {}
    for index, (key, teacher) in enumerate(teachers.items()):
        adapter: str | tuple[str, ...] | None = None
        commit = None
        if teacher.is_base:
            if untrained is None:
                raise ValueError(f"teacher {key!r}: there is no student before training here; give it a path.")
            before = [(one.pipeline, one.adapter) for one in loaded if one.spec.is_base]
            pipeline, adapter = before[0] if before else untrained()
            sampled = take_fingerprint(denoiser_of(pipeline))
            sha256 = hash_tensors({name: torch.tensor(values) for name, values in sampled.items()})
            loaded.append(LoadedTeacher(key, teacher, pipeline, adapter, sha256, None))
            continue
        if is_pipeline(teacher.path):
            pipeline = copy.copy(with_call(teacher.path))
            take_wrappers_off(pipeline)
            for name, part in denoisers_of(pipeline).items():
                if part in own.values():
                    raise ValueError(
                        f"teacher {teacher.id!r} is the student itself (one {name} for both), so it would change with "
                        "it; load its pipeline once more."
                    )
        else:
            folder, commit = locate(teacher, own)
            if teacher.weight_name is None:
                teacher = replace(teacher, weight_name=sole_lora(teacher, folder, commit, own))
            if teacher.weight_name is None and (folder / INDEX_NAME).is_file():
                pipeline = _load_pipeline(teacher, folder, commit, student, dtype, quantization)
            elif teacher.weight_name is None and (folder / MODULAR_INDEX_NAME).is_file():
                pipeline = _load_modular(teacher, folder, commit, dtype, quantization)
            elif teacher.weight_name is None and (folder / CONFIG_NAME).is_file():
                pipeline = _load_denoiser(teacher, folder, commit, student, dtype, quantization)
            else:
                if teacher.variant is not None:
                    raise ValueError(
                        f"teacher {key!r}: {teacher.source!r} is a LoRA, and has no `variant`; name its file by "
                        "`weight_name`."
                    )
                loras = read_loras(teacher, folder, student)
                adapter, tensors = f"teacher_{index}", {}
                if changed := [name for name, lora in loras.items() if lora.changes_base]:
                    if any(is_quantised(own[name]) for name in changed):
                        raise ValueError(
                            f"teacher {teacher.id!r} ({teacher.source}) does more to the {' and '.join(changed)} than "
                            "adding a LoRA, which is not done to quantised weights; leave these out of "
                            "`quantization_config`, or give the teacher as a whole pipeline."
                        )
                    logger.warning(
                        f"Teacher {teacher.id!r} ({teacher.source}) does more to the {' and '.join(changed)} than "
                        "adding a LoRA, so it gets a frozen copy of its own."
                    )
                    pipeline = _on_a_copy(student, dtype)
                else:
                    if host is student and not trains_lora:
                        host = _on_a_copy(student, dtype)
                    pipeline = host
                if not trains_lora:  # whose encoders are saved with it
                    for name in {name for lora in loras.values() for name in lora.adapters} - own.keys():
                        if getattr(pipeline, name) is getattr(student, name):
                            vars(pipeline)[name] = copy.deepcopy(getattr(student, name))
                beneath: list[str] = []
                if teacher.base_lora is not None:
                    base = as_lora(teacher.base_lora, f"the `base_lora` of teacher {key!r}")
                    beneath = [f"{adapter}_base"]
                    tensors = {f"base.{name}": value for name, value in load_lora(base, pipeline, beneath[0]).items()}
                tensors |= add_loras(teacher, pipeline, adapter, loras, beneath)
                adapter = (adapter, *beneath) if beneath else adapter
        for name in ("base_lora", "scale") if adapter is None else ():
            if getattr(teacher, name) is not None:
                raise ValueError(f"teacher {key!r}: {teacher.source!r} is no LoRA, and has no `{name}`; leave it out.")
        if adapter is None:
            with one_sentence(f"teacher {teacher.id!r}"):
                check_seams(pipeline)
            check_compatible(teacher, pipeline, student)
            share_parts(pipeline, student)
            tensors = _all_weights(pipeline, student)
        weights[key] = tensors
        for part in pipeline.components.values():
            if isinstance(part, nn.Module) and part not in own.values():
                part.requires_grad_(False).eval()
                keep_layout(part)
        loaded.append(LoadedTeacher(key, teacher, pipeline, adapter, "", commit))
    digests = hash_once(weights)
    return [replace(teacher, sha256=digests.get(teacher.id, teacher.sha256)) for teacher in loaded]


def _all_weights(pipeline: DiffusionPipeline, student: DiffusionPipeline) -> dict[str, Tensor]:
    """What makes a teacher's predictions: its denoiser, all that it does not share with the student, and how strong
    which adapters in them are."""
    denoisers = denoisers_of(pipeline)
    parts: dict[str, Any] = {"": denoiser_of(pipeline)} | {
        f"{key}.": part
        for key, part in pipeline.components.items()
        if isinstance(part, nn.Module) and key not in denoisers and part is not getattr(student, key, None)
    }
    found: dict[str, Tensor] = {}
    for prefix, part in parts.items():
        found |= {f"{prefix}{key}": value for key, value in part.state_dict().items() if isinstance(value, Tensor)}
        for name, layer in part.named_modules():
            if isinstance(layer, BaseTunerLayer) and not layer.disable_adapters:
                found |= {
                    f"{prefix}{name}.{adapter}.scaling": torch.tensor(float(scaling))
                    for adapter, scaling in getattr(layer, "scaling", {}).items()
                    if adapter in layer.active_adapters
                }
    return found


def _on_a_copy(student: DiffusionPipeline, dtype: torch.dtype) -> DiffusionPipeline:
    """The student's pipeline with a frozen denoiser of its own, as it is without adapters."""
    return with_denoiser(student, without_adapters(frozen_copy(denoiser_of(student), dtype)))


def _load_module(
    teacher: Teacher,
    cls: Any,
    dtype: torch.dtype,
    *where: Any,
    refused: Sequence[str] = ("missing_keys", "unexpected_keys"),
    **kwargs: Any,
) -> nn.Module:
    """`from_pretrained` of a model that refuses what it would only warn about, and pickles."""
    with one_sentence(
        f"teacher {teacher.id!r}: {teacher.source!r} cannot be loaded as a {cls.__name__}",
        " (only safetensors are read; if you trust pickles, load the pipeline yourself and give it)",
    ):
        module, info = cls.from_pretrained(
            *where, **kwargs, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    for kind in refused:
        if keys := info[kind]:
            raise ValueError(
                f"teacher {teacher.id!r}: {len(keys)} {kind.replace('_', ' ')} between {teacher.source!r} and "
                f"{cls.__name__}, e.g. {first_few(keys)}."
            )
    return module


def _load_pipeline(
    teacher: Teacher,
    located: Path,
    commit: str | None,
    student: DiffusionPipeline,
    dtype: torch.dtype,
    quantization: Any,
) -> DiffusionPipeline:
    index = read_json(teacher, located / INDEX_NAME)
    quantised = _quantised(teacher, quantization, index)
    folder = str(teacher.path)
    if teacher.subfolder:
        if commit is not None:  # diffusers reads no pipeline from a subfolder of a repository
            folder = snapshot_download(folder, revision=commit, allow_patterns=f"{teacher.subfolder.strip('/')}/*")
        folder = os.path.join(folder, teacher.subfolder)
    parts = absent_parts(index)
    classes = parts_named(index)
    names = [name for name in NAMES if name in classes]
    if not names:
        raise ValueError(f"teacher {teacher.id!r}: {teacher.source!r} has neither a transformer nor a unet.")
    for name in names:
        cls = getattr(diffusers, classes[name], None)
        if not isinstance(cls, type):
            raise ValueError(
                f"teacher {teacher.id!r}: the {name} of {teacher.source!r} is a {classes[name]}, which this version "
                "of diffusers has not; if it is custom code that you trust, load the pipeline yourself and give that."
            )
        variant = variant_in(teacher, located, commit, name)
        parts[name] = _load_module(
            teacher, cls, dtype, folder, subfolder=name, revision=commit, variant=variant, **quantised.get(name, {})
        )
    for key, entry in index.items():
        library, class_name = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        part = getattr({"diffusers": diffusers, "transformers": transformers}.get(str(library)), str(class_name), None)
        if key not in names and isinstance(part, type) and issubclass(part, nn.Module):
            # Whole checkpoints of CLIP and T5 hold more than their encoders
            where: Any = {
                "subfolder": key,
                "revision": commit,
                "variant": variant_in(teacher, located, commit, key, False),
                **quantised.get(key, {}),
            }
            own, module = (
                getattr(student, key, None),
                _load_module(teacher, part, dtype, folder, refused=["missing_keys"], **where),
            )
            parts[key] = own if same_part(module, own) else module  # not all of them twice at once
    with one_sentence(f"teacher {teacher.id!r}: {teacher.source!r} cannot be loaded as a pipeline"):
        return DiffusionPipeline.from_pretrained(folder, revision=commit, dtype=dtype, use_safetensors=True, **parts)


def _quantised(teacher: Teacher, quantization: Any, index: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What `from_pretrained` of a teacher's parts is told, of those that it has too."""
    configs = configs_by_part(quantization, index, f"teacher {teacher.id!r}", only_known=True)
    return {name: {"quantization_config": config} for name, config in configs.items()}


def _load_modular(
    teacher: Teacher, folder: Path, commit: str | None, dtype: torch.dtype, quantization: Any
) -> DiffusionPipeline:
    if teacher.subfolder and commit is not None:
        raise ValueError(
            f"teacher {teacher.id!r}: {teacher.source!r} is a modular pipeline in a subfolder of a repository, which "
            "diffusers does not read; give it a repository of its own."
        )
    where, hub = (str(folder), {}) if commit is None else (str(teacher.path), {"revision": commit})
    with one_sentence(f"teacher {teacher.id!r}: {teacher.source!r} cannot be loaded as a modular pipeline"):
        index = read_json(teacher, folder / MODULAR_INDEX_NAME)
        quantised = configs_by_part(quantization, index, f"teacher {teacher.id!r}", only_known=True)
        return load_modular(where, hub, quantised, dtype=dtype, use_safetensors=True)


def _load_denoiser(
    teacher: Teacher,
    folder: Path,
    commit: str | None,
    student: DiffusionPipeline,
    dtype: torch.dtype,
    quantization: Any,
) -> DiffusionPipeline:
    config = read_json(teacher, folder / CONFIG_NAME)
    class_name = config.get("_class_name") or config.get("architectures")
    own = denoisers_of(student)
    if len(own) > 1:
        raise ValueError(
            f"teacher {teacher.id!r}: {teacher.source!r} is one denoiser, and the student's {type(student).__name__} "
            f"has {list(own)}; give a whole pipeline instead."
        )
    ((name, expected),) = ((name, type(denoiser)) for name, denoiser in own.items())
    if class_name != expected.__name__:
        raise ValueError(
            f"teacher {teacher.id!r}: {teacher.source!r} is a {class_name}, but the student's {type(student).__name__} "
            f"runs a {expected.__name__}; give a whole pipeline instead."
        )
    where: Any = {"subfolder": teacher.subfolder, "revision": commit, "variant": variant_in(teacher, folder, commit)}
    where |= _quantised(teacher, quantization, {name: ["diffusers", expected.__name__]}).get(name, {})
    denoiser = _load_module(teacher, expected, dtype, str(teacher.path), **where)
    return with_denoiser(student, denoiser)
