"""Teachers: what a user writes, how it is found and loaded, and whether it fits the student.

A teacher is a LoRA (PEFT or diffusers format), a bare denoiser, a whole pipeline, or a loaded pipeline. LoRA teachers
share one frozen backbone; what a pipeline teacher has in common with the student (VAE, text encoders) is shared too.
Everything that does not fit is refused here with one sentence that names both sides: a tensor that is silently dropped
makes a teacher that silently equals the base.

This file knows pipelines and files, and no trainer, loss or data.
"""

import contextlib
import copy
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import convert_unet_state_dict_to_peft
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from .config import check_types
from .errors import brief, one_sentence, why_not
from .policy import check_seams, denoiser_name, tuner_layers
from .scheduler_proxy import is_flow, own_scheduler

MANIFEST_NAME = "teacher_manifest.json"
STUDENT_ADAPTER = "default"
INDEX_NAME = "model_index.json"  # of a pipeline
CONFIG_NAME = "config.json"  # of a denoiser
LORA_NAME = "pytorch_lora_weights.safetensors"  # diffusers format
PEFT_CONFIG_NAME, PEFT_WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
NAMES = [INDEX_NAME, CONFIG_NAME, PEFT_CONFIG_NAME, PEFT_WEIGHTS_NAME]


@dataclass
class Teacher:
    """
    A specialist, as a user names it.

    Args:
        path (`str` or [`~diffusers.DiffusionPipeline`]):
            Hub id or folder of a LoRA (PEFT or diffusers format), a denoiser or a pipeline; or a loaded pipeline.
        id (`str`, *optional*):
            What the `teacher_id` column calls it. Defaults to the last part of `path` and `subfolder` that is not
            `"lora"`, `"transformer"` or `"unet"`.
        subfolder, revision (`str`, *optional*):
            Where in the repository, and which version of it.
        weight_name (`str`, *optional*):
            File name of a LoRA in diffusers format. Defaults to `pytorch_lora_weights.safetensors`, or to the only
            safetensors file of a folder that holds nothing else of a teacher. Given, nothing else in the folder is
            looked at.
        guidance_scale (`float`, *optional*):
            Its own guidance scale. Defaults to the student's.
        call_kwargs (`dict`, *optional*):
            Its own arguments of the pipeline's `__call__`, over the student's: another negative prompt, for example.
    """

    path: Any
    id: str | None = None
    subfolder: str | None = None
    revision: str | None = None
    weight_name: str | None = None
    guidance_scale: float | None = None
    call_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """Where it comes from, in words."""
        if not isinstance(self.path, (str, os.PathLike)):
            return self.path.config.get("_name_or_path") or f"a loaded {type(self.path).__name__}"
        return "/".join(str(part) for part in (self.path, self.subfolder) if part)

    @property
    def overrides(self) -> dict[str, Any]:
        """Its arguments of `__call__` over the student's."""
        guidance = {} if self.guidance_scale is None else {"guidance_scale": self.guidance_scale}
        return {**self.call_kwargs, **guidance}


@dataclass
class LoadedTeacher:
    """A teacher, ready to be asked: `pipeline` with `adapter` (`None`: as it is) of its denoiser active."""

    id: str
    spec: Teacher
    pipeline: DiffusionPipeline
    adapter: str | None
    sha256: str
    commit: str | None


def name_teachers(teachers: Any) -> dict[str, Teacher]:
    """One teacher, a sequence or a dict `{id: teacher}`, each a path, a [`Teacher`] or a pipeline, as teachers by
    id.

    Raises:
        ValueError: for no teacher, an id that is blank or given twice, two ids for one teacher, or a field that
            nobody would read.
        TypeError: for anything that is none of the above, and fields of other types.
    """
    if isinstance(teachers, Mapping):
        named = []
        for key, value in teachers.items():
            teacher = _as_teacher(value)
            if teacher.id not in (None, key):
                raise ValueError(f"the teacher under key {key!r} has another id, {teacher.id!r}; give it one name.")
            teacher.id = key
            named.append(teacher)
    elif isinstance(teachers, Sequence) and not isinstance(teachers, str):
        named = [_as_teacher(value) for value in teachers]
    else:
        named = [_as_teacher(teachers)]
    if not named:
        raise ValueError("`teachers` is empty; at least one teacher is needed.")
    ids = []
    for teacher in named:
        if teacher.id is None:
            parts = Path(teacher.source).parts if isinstance(teacher.path, (str, os.PathLike)) else ("teacher",)
            teacher.id = next((p for p in reversed(parts) if p not in ("lora", "transformer", "unet")), "teacher")
        check_types(teacher, f"teacher {teacher.id!r}: ")
        if isinstance(teacher.path, DiffusionPipeline):
            what, unread = "a loaded pipeline", ["subfolder", "revision", "weight_name"]
        else:
            what, unread = f"the folder {str(teacher.path)!r}", ["revision"] if os.path.isdir(teacher.path) else []
        for name in unread:
            if (value := getattr(teacher, name)) is not None:
                raise ValueError(f"teacher {teacher.id!r}: {what} has no `{name}`, got {value!r}; leave it out.")
        if not teacher.id.strip():
            raise ValueError(f"the id of a teacher must not be blank, got {teacher.id!r} for {teacher.source!r}.")
        ids.append(teacher.id)
    if twice := sorted({i for i in ids if ids.count(i) > 1}):
        raise ValueError(
            f"teacher ids must be unique, but {twice} occurs more than once in {ids}; set `Teacher(..., id=...)`."
        )
    return dict(zip(ids, named, strict=True))


def _as_teacher(value: Any) -> Teacher:
    teacher = copy.copy(value) if isinstance(value, Teacher) else Teacher(value)
    if not isinstance(teacher.path, (str, os.PathLike, DiffusionPipeline)):
        raise TypeError(
            "a teacher is a Hub id, a folder, a `Teacher` of one of these or a loaded pipeline, got "
            f"{brief(teacher.path)}."
        )
    return teacher


def _locate(teacher: Teacher) -> tuple[Path, str | None]:
    """The folder with the files that tell what a teacher is, and with its LoRA; and the commit if it is on the Hub."""
    path = str(teacher.path)
    if os.path.isdir(path):
        return Path(path, teacher.subfolder or ""), None
    if os.path.isfile(path):
        raise ValueError(f"teacher {teacher.id!r}: {path!r} is a file; give its folder, and its name as `weight_name`.")
    names = [*NAMES, teacher.weight_name or LORA_NAME]
    patterns = [PurePosixPath(teacher.subfolder or "", name).as_posix() for name in names]
    try:
        if os.path.isabs(path):
            raise HFValidationError
        snapshot = Path(snapshot_download(path, revision=teacher.revision, allow_patterns=patterns))
    except (HFValidationError, OSError) as error:
        raise ValueError(f"teacher {teacher.id!r}: {path!r} {why_not(error, teacher.revision)}.") from error
    return snapshot / (teacher.subfolder or ""), snapshot.name


def _sole_lora(teacher: Teacher, folder: Path, commit: str | None) -> str | None:
    """The only safetensors file, where there is nothing by the names that tell what a teacher is."""
    if any((folder / name).is_file() for name in [*NAMES, LORA_NAME]):
        return None
    found = sorted(file.name for file in folder.glob("*.safetensors"))
    if commit is not None:
        inside = PurePosixPath(teacher.subfolder or "")
        download: Any = partial(snapshot_download, str(teacher.path), revision=commit)
        with contextlib.suppress(OSError):  # offline it is what the cache holds
            listed = download(allow_patterns=str(inside / "*.safetensors"), dry_run=True)
            paths = [PurePosixPath(file.filename) for file in listed]
            found = sorted(path.name for path in paths if path.parent == inside)
            if len(found) == 1:
                download(allow_patterns=str(inside / found[0]))
    if len(found) > 1:
        raise ValueError(
            f"teacher {teacher.id!r}: {teacher.source!r} holds {len(found)} safetensors files ({_sample(found)}); name "
            "the LoRA among them by `weight_name`."
        )
    return found[0] if found else None


def _read_json(teacher: Teacher, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:  # no JSON, no text
        content = error
    if not isinstance(content, dict):
        raise ValueError(
            f"teacher {teacher.id!r}: {path.name} of {teacher.source!r} is no JSON object; is it a git-lfs pointer, or "
            "a download that broke off?"
        )
    return content


def load_teachers(
    teachers: Mapping[str, Teacher], student: DiffusionPipeline, trains_lora: bool, dtype: torch.dtype
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

    Raises:
        ValueError: if a teacher cannot be read, has missing, unexpected or wrongly shaped tensors, or lives in another
            latent space or time than the student.
    """
    name = denoiser_name(student)
    host = student
    loaded = []
    for index, (key, teacher) in enumerate(teachers.items()):
        adapter = commit = None
        if isinstance(teacher.path, DiffusionPipeline):
            pipeline = copy.copy(teacher.path)
            if _denoiser(pipeline) is getattr(student, name):
                raise ValueError(
                    f"teacher {teacher.id!r} is the student itself (one {name} for both), so it would change with it; "
                    "load its pipeline once more."
                )
        else:
            folder, commit = _locate(teacher)
            if teacher.weight_name is None:
                teacher = replace(teacher, weight_name=_sole_lora(teacher, folder, commit))
            if teacher.weight_name is None and (folder / INDEX_NAME).is_file():
                pipeline = _load_pipeline(teacher, folder, commit, dtype)
            elif teacher.weight_name is None and (folder / CONFIG_NAME).is_file():
                pipeline = _load_denoiser(teacher, folder, commit, student, dtype)
            else:
                tensors, config = _read_lora(teacher, folder, student)
                if host is student and not trains_lora:
                    host = copy.copy(student)
                    host.__dict__[name] = frozen_copy(getattr(student, name), dtype)
                pipeline, adapter = host, f"teacher_{index}"
                _add_lora(teacher, getattr(host, name), adapter, tensors, config)
        if adapter is None:
            with one_sentence(f"teacher {teacher.id!r}"):
                check_seams(pipeline)
            check_compatible(teacher, pipeline, student)
            _share(pipeline, student)
            sha256 = hash_tensors(_denoiser(pipeline).state_dict())
        else:
            sha256 = hash_tensors(tensors | _scalings(getattr(host, name), adapter))
        for part in pipeline.components.values():
            if isinstance(part, nn.Module) and part is not getattr(student, name):
                part.requires_grad_(False).eval()
        loaded.append(LoadedTeacher(key, teacher, pipeline, adapter, sha256, commit))
    return loaded


def absent_parts(index: Mapping[str, Any]) -> dict[str, Any]:
    """For `from_pretrained`: optional parts that a saved pipeline was without (an SD3 without T5), which diffusers
    would miss."""
    return {key: None for key, entry in index.items() if entry == [None, None]}


def _denoiser(pipeline: DiffusionPipeline) -> ModelMixin:
    return getattr(pipeline, denoiser_name(pipeline))


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
                f"{cls.__name__}, e.g. {_sample(keys)}."
            )
    return module


def _load_pipeline(teacher: Teacher, located: Path, commit: str | None, dtype: torch.dtype) -> DiffusionPipeline:
    index = _read_json(teacher, located / INDEX_NAME)
    folder = str(teacher.path)
    if teacher.subfolder:
        if commit is not None:  # diffusers reads no pipeline from a subfolder of a repository
            folder = snapshot_download(folder, revision=commit, allow_patterns=f"{teacher.subfolder.strip('/')}/*")
        folder = os.path.join(folder, teacher.subfolder)
    parts = absent_parts(index)
    name = next((name for name in ("transformer", "unet") if index.get(name, [None])[0]), None)
    if name is None:
        raise ValueError(f"teacher {teacher.id!r}: {teacher.source!r} has neither a transformer nor a unet.")
    cls = getattr(diffusers, str(index[name][1]), None)
    if cls is None:
        raise ValueError(
            f"teacher {teacher.id!r}: the {name} of {teacher.source!r} is a {index[name][1]}, which this version of "
            "diffusers has not; if it is custom code that you trust, load the pipeline yourself and give that."
        )
    parts[name] = _load_module(teacher, cls, dtype, folder, subfolder=name, revision=commit)
    for key, entry in index.items():
        library, class_name = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        part = getattr({"diffusers": diffusers, "transformers": transformers}.get(str(library)), str(class_name), None)
        if key != name and isinstance(part, type) and issubclass(part, nn.Module):
            # Whole checkpoints of CLIP and T5 hold more than their encoders
            parts[key] = _load_module(
                teacher, part, dtype, folder, refused=["missing_keys"], subfolder=key, revision=commit
            )
    with one_sentence(f"teacher {teacher.id!r}: {teacher.source!r} cannot be loaded as a pipeline"):
        return DiffusionPipeline.from_pretrained(folder, revision=commit, dtype=dtype, use_safetensors=True, **parts)


def _load_denoiser(
    teacher: Teacher, folder: Path, commit: str | None, student: DiffusionPipeline, dtype: torch.dtype
) -> DiffusionPipeline:
    config = _read_json(teacher, folder / CONFIG_NAME)
    class_name = config.get("_class_name") or config.get("architectures")
    expected = type(_denoiser(student))
    if class_name != expected.__name__:
        raise ValueError(
            f"teacher {teacher.id!r}: {teacher.source!r} is a {class_name}, but the student's {type(student).__name__} "
            f"runs a {expected.__name__}; give a whole pipeline instead."
        )
    pipeline = copy.copy(student)
    pipeline.__dict__[denoiser_name(student)] = _load_module(
        teacher, expected, dtype, str(teacher.path), subfolder=teacher.subfolder, revision=commit
    )
    return pipeline


def _read_lora(teacher: Teacher, folder: Path, student: DiffusionPipeline) -> tuple[dict[str, Tensor], LoraConfig]:
    """Tensors (keys as in the denoiser, `lora_A` / `lora_B`) and config of a LoRA in PEFT or diffusers format."""
    name = denoiser_name(student)
    is_peft = (folder / PEFT_CONFIG_NAME).is_file() and teacher.weight_name in (None, PEFT_WEIGHTS_NAME)
    weights = folder / (PEFT_WEIGHTS_NAME if is_peft else teacher.weight_name or LORA_NAME)
    if is_peft and not weights.is_file():
        raise ValueError(
            f"teacher {teacher.id!r}: {teacher.source!r} has an {PEFT_CONFIG_NAME}, but no {weights.name}, the only "
            "format that is read."
        )
    if not weights.is_file():
        raise ValueError(
            f"teacher {teacher.id!r}: {teacher.source!r} holds no pipeline ({INDEX_NAME}), no denoiser ({CONFIG_NAME}) "
            f"and no LoRA ({PEFT_CONFIG_NAME} or {weights.name}); check `path`, `subfolder` and `weight_name`."
        )
    if not is_peft and not hasattr(type(student), "lora_state_dict"):
        raise ValueError(
            f"teacher {teacher.id!r}: {type(student).__name__} cannot read a LoRA in diffusers format; give it in PEFT "
            f"format ({PEFT_CONFIG_NAME})."
        )
    with one_sentence(
        f"teacher {teacher.id!r}: {weights.name} of {teacher.source!r} is no safetensors file (is it a pickle, a "
        "git-lfs pointer, or a download that broke off?)"
    ):
        tensors = load_file(weights)
    if is_peft:
        kind = _read_json(teacher, folder / PEFT_CONFIG_NAME).get("peft_type")
        if kind != "LORA":
            raise ValueError(f"teacher {teacher.id!r}: {teacher.source!r} is of PEFT's type {kind!r}, not a LoRA.")
        with one_sentence(f"teacher {teacher.id!r}: {PEFT_CONFIG_NAME} of {teacher.source!r} cannot be read"):
            config = PeftConfig.from_pretrained(str(folder))
        tensors = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
    elif scales := [key for key in tensors if "dora_scale" in key]:  # diffusers drops them with a warning
        raise ValueError(
            f"teacher {teacher.id!r}: {teacher.source!r} is a DoRA in a format that diffusers cannot read, "
            f"e.g. {_sample(scales)}."
        )
    else:
        tensors, config = _read_diffusers_lora(teacher, weights, student, tensors)
    if not _has_lora(tensors):
        raise ValueError(
            f"teacher {teacher.id!r}: no LoRA tensors for a {name} in {teacher.source!r}, e.g. {_sample(tensors)}."
        )
    if changes_base(config):
        raise ValueError(
            f"teacher {teacher.id!r}: the LoRA {teacher.source!r} also changes the {name} itself "
            f"(bias={config.bias!r}, modules_to_save={config.modules_to_save}, "
            f"init_lora_weights={config.init_lora_weights!r}), which the student shares; merge it and give the {name}."
        )
    config.init_lora_weights = config.inference_mode = False  # the weights are about to come
    return tensors, config


def _has_lora(tensors: Iterable[str]) -> bool:
    return any(key.endswith("lora_B.weight") for key in tensors)


def changes_base(config: LoraConfig) -> bool:
    """Whether a LoRA also changes the backbone that a student and its LoRA teachers share."""
    return (
        config.bias != "none"
        or bool(config.modules_to_save)
        or str(config.init_lora_weights).lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga"))
    )


def _read_diffusers_lora(
    teacher: Teacher, weights: Path, student: DiffusionPipeline, keys: Iterable[str]
) -> tuple[dict[str, Tensor], LoraConfig]:
    name, cls = denoiser_name(student), type(student)
    prefix = f"{name}."

    def check_read(unread: Sequence[str]) -> None:
        if unread:
            raise ValueError(
                f"teacher {teacher.id!r}: {len(unread)} keys of {teacher.source!r} are in a format that the "
                f"`lora_state_dict` of {cls.__name__} does not read, e.g. {min(unread)}."
            )

    # As its `load_lora_weights`, which needs the config of a UNet to read names of other trainers
    of_unet = {"unet_config": student.unet.config} if name == "unet" else {}
    with one_sentence(
        f"teacher {teacher.id!r}: {weights.name} of {teacher.source!r} is in a format that the `lora_state_dict` of "
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
            f"teacher {teacher.id!r}: {len(foreign)} tensors of {teacher.source!r} are not for the student's {name}, "
            f"e.g. {_sample(foreign)}; a teacher may adapt the denoiser only."
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
            f"teacher {teacher.id!r}: {len(stray)} alphas of {teacher.source!r} belong to no LoRA tensor, "
            f"e.g. {_sample(stray)}."
        )
    config = LoraConfig(
        rank_pattern={f"^{re.escape(module)}": rank for module, rank in ranks.items()},
        alpha_pattern={f"^{re.escape(module)}": alpha for module, alpha in (ranks | alphas).items()},
        target_modules="|".join(re.escape(module) for module in ranks),
    )
    return tensors, config


def _add_lora(
    teacher: Teacher, denoiser: nn.Module, adapter: str, tensors: dict[str, Tensor], config: LoraConfig
) -> None:
    """Adds a frozen adapter and refuses any tensor that is missing, unexpected or of another shape."""
    cls, modules = type(denoiser).__name__, {name for name, _ in denoiser.named_modules()}
    adapted, expected = {_module_of(key) for key in tensors}, {}
    if adapted & modules:
        with one_sentence(f"teacher {teacher.id!r}: the LoRA {teacher.source!r} does not fit the student's {cls}"):
            add_adapter(denoiser, config, adapter)
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
            f"teacher {teacher.id!r}: the LoRA {teacher.source!r} was made for another model than the student's {cls}: "
            f"{differences[0]}."
        )
    wrong = [f"{key} {theirs} for {ours}" for key, (theirs, ours) in shapes.items()]
    for kind, keys in (("missing", missing), ("unexpected", unexpected), ("wrongly shaped", wrong)):
        if keys:
            raise ValueError(
                f"teacher {teacher.id!r}: {len(keys)} {kind} LoRA tensors in {teacher.source!r} for the student's "
                f"{cls}, e.g. {_sample(keys)}."
            )
    with torch.no_grad():
        for key, value in expected.items():
            value.copy_(tensors[key])


def _module_of(key: str) -> str:
    return key.rpartition(".lora_")[0]


def _without_rank(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    rank = int("lora_B" in key)
    return shape[:rank] + shape[rank + 1 :]


def frozen_copy(denoiser: ModelMixin, dtype: torch.dtype) -> ModelMixin:
    """A copy without gradients in `dtype`, but for what `from_pretrained` keeps in float32 too (`to` would cast it)."""
    twin = copy.deepcopy(denoiser).requires_grad_(False)
    kept = set(twin._keep_in_fp32_modules or [])
    for name, tensor in [*twin.named_parameters(), *twin.named_buffers()]:
        if tensor.is_floating_point() and not kept & set(name.split(".")):
            tensor.data = tensor.data.to(dtype)
    return twin


def add_adapter(denoiser: ModelMixin, config: LoraConfig, name: str) -> None:
    """Adds an adapter and leaves which one is active, and which parameters train, as it was.

    Raises:
        ValueError: if the config's target modules are not in the denoiser.
    """
    trainable = {id(parameter) for parameter in denoiser.parameters() if parameter.requires_grad}
    layers = tuner_layers(denoiser)
    active = layers[0]._active_adapter if layers else []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters: the very idea
        if hasattr(denoiser, "add_adapter"):
            denoiser.add_adapter(config, name)
        else:
            inject_adapter_in_model(config, denoiser, name)
    for parameter in denoiser.parameters():
        parameter.requires_grad_(id(parameter) in trainable)
    for layer in tuner_layers(denoiser):
        layer._active_adapter = active


def _scalings(denoiser: nn.Module, adapter: str) -> dict[str, Tensor]:
    layers = {key: layer for key, layer in denoiser.named_modules() if isinstance(layer, LoraLayer)}
    return {f"{k}.scaling": torch.tensor(v.scaling[adapter]) for k, v in layers.items() if adapter in v.scaling}


def check_compatible(teacher: Teacher, pipeline: DiffusionPipeline, student: DiffusionPipeline) -> None:
    """Refuses a teacher pipeline of another latent space or another time than the student's."""

    def refuse(what: str, theirs: Any, ours: Any) -> None:
        raise ValueError(
            f"teacher {teacher.id!r} ({teacher.source}) has {what} {theirs}, but the student has {ours}; they must be "
            "the same."
        )

    theirs, ours = _denoiser(pipeline).config, _denoiser(student).config
    if theirs.get("in_channels") != ours.get("in_channels"):
        refuse("in_channels", theirs.get("in_channels"), ours.get("in_channels"))
    vae, own_vae = getattr(pipeline, "vae", None), getattr(student, "vae", None)
    if vae is not None and own_vae is not None:
        for key in ("latent_channels", "z_dim", "scaling_factor", "shift_factor", "latents_mean", "latents_std"):
            if vae.config.get(key) != own_vae.config.get(key):
                refuse(f"a VAE of {key}", vae.config.get(key), own_vae.config.get(key))
        # What encodes defines the latent space; decoders are fine-tuned without changing it
        if not same_weights(vae, own_vae, besides=("decoder.", "post_quant_conv.")):
            raise ValueError(
                f"teacher {teacher.id!r} ({teacher.source}) has a VAE that encodes with other weights than that of the "
                f"student ({_name(student)}), so its latents mean something else; if they do not, give its "
                f"{denoiser_name(pipeline)} alone."
            )
    a, b = pipeline.scheduler, student.scheduler
    kinds = ["flow matching" if is_flow(s) else "VP diffusion" for s in (a, b)]
    if kinds[0] != kinds[1]:
        refuse("the time parametrisation of", *kinds)
    if a.config.num_train_timesteps != b.config.num_train_timesteps:
        refuse("num_train_timesteps", a.config.num_train_timesteps, b.config.num_train_timesteps)
    if not is_flow(a):
        if a.config.prediction_type != b.config.prediction_type:
            refuse("prediction_type", a.config.prediction_type, b.config.prediction_type)
        if not torch.allclose(own_scheduler(a).alphas_cumprod, own_scheduler(b).alphas_cumprod):
            betas = [f"{s.config.beta_schedule} {s.config.beta_start}-{s.config.beta_end}" for s in (a, b)]
            refuse("betas", *betas)


def _name(pipeline: DiffusionPipeline) -> str:
    return pipeline.config.get("_name_or_path") or type(pipeline).__name__


def same_weights(a: nn.Module, b: nn.Module, besides: tuple[str, ...] = ()) -> bool:
    """Whether two modules hold the same tensors, up to the precision of the coarser dtype; `besides` the keys that
    start so."""
    if a is b:
        return True
    mine, theirs = (
        {key: value for key, value in module.state_dict().items() if not key.startswith(besides)} for module in (a, b)
    )
    if mine.keys() != theirs.keys():
        return False
    return all(mine[key].shape == theirs[key].shape and _same_values(mine[key], theirs[key]) for key in mine)


def _same_values(a: Tensor, b: Tensor) -> bool:
    a, b = a.cpu(), b.cpu()
    if {a.dtype, b.dtype} == {torch.float16, torch.bfloat16}:  # one number, rounded in two ways
        return torch.allclose(a.float(), b.float(), rtol=2**-7, atol=1e-6)
    dtype = min(a.dtype, b.dtype, key=lambda dtype: torch.finfo(dtype).bits if dtype.is_floating_point else 0)
    return torch.equal(a.to(dtype), b.to(dtype))


def _share(pipeline: DiffusionPipeline, student: DiffusionPipeline) -> None:
    """Replaces what the teacher has in common with the student (config and weights) by the student's own."""
    for key, part in pipeline.components.items():
        own = getattr(student, key, None)
        if key != denoiser_name(pipeline) and part is not own and _same_part(part, own):
            pipeline.__dict__[key] = own  # past `DiffusionPipeline.__setattr__`, which writes into the config


def _same_part(mine: Any, theirs: Any) -> bool:
    if type(mine) is not type(theirs):
        return False
    if isinstance(mine, nn.Module):
        return _plain(mine.config) == _plain(theirs.config) and same_weights(mine, theirs)
    if isinstance(mine, PreTrainedTokenizerBase):
        names = "model_max_length padding_side special_tokens_map chat_template".split()
        return mine.get_vocab() == theirs.get_vocab() and all(getattr(mine, n) == getattr(theirs, n) for n in names)
    return False


def _plain(config: Any) -> Any:
    """A config without what saving and loading change: names, dtypes, tuples that become lists."""
    if isinstance(config, PreTrainedConfig):
        config = config.to_dict()
    if isinstance(config, Mapping):
        ignored = ("architectures", "dtype", "torch_dtype", "transformers_version")
        return {k: _plain(v) for k, v in config.items() if k not in ignored and not str(k).startswith("_")}
    return [_plain(value) for value in config] if isinstance(config, (list, tuple)) else config


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def manifest(teachers: Iterable[LoadedTeacher]) -> dict[str, Any]:
    """What `teacher_manifest.json` holds: which teachers a run learns from."""
    entries = [
        {
            "id": teacher.id,
            "source": teacher.spec.source,
            "revision": teacher.spec.revision,
            "commit": teacher.commit,
            "dtype": str(next(_denoiser(teacher.pipeline).parameters()).dtype),
            "sha256": teacher.sha256,
        }
        for teacher in teachers
    ]
    return {"version": 1, "teachers": entries}


def check_manifest(checkpoint: str | os.PathLike, teachers: Iterable[LoadedTeacher]) -> None:
    """Refuses to resume from a checkpoint that learnt from other teachers.

    Raises:
        ValueError: naming what differs.
    """
    path = Path(checkpoint, MANIFEST_NAME)
    if not path.is_file():
        raise ValueError(f"{checkpoint} has no {MANIFEST_NAME}, so it is not a checkpoint of this trainer.")
    before = {entry["id"]: entry for entry in json.loads(path.read_text())["teachers"]}
    now = {entry["id"]: entry for entry in manifest(teachers)["teachers"]}
    if list(before) != list(now):
        raise ValueError(
            f"{checkpoint} learnt from the teachers {list(before)}, this run has {list(now)}; use the same set."
        )
    for key, entry in now.items():
        if entry["sha256"] != before[key]["sha256"] and entry["dtype"] != before[key].get("dtype", entry["dtype"]):
            raise ValueError(
                f"teacher {key!r} is loaded in {entry['dtype']}, {checkpoint} learnt from it in "
                f"{before[key]['dtype']}; resume in the same precision."
            )
        if entry["sha256"] != before[key]["sha256"]:
            raise ValueError(
                f"teacher {key!r} has other weights ({entry['source']}) than the one that {checkpoint} learnt from "
                f"({before[key]['source']}, commit {before[key]['commit']}); use the same teacher."
            )


def _sample(keys: Iterable[str], most: int = 3) -> str:
    keys = sorted(str(key) for key in keys)
    return ", ".join(keys[:most]) + (", ..." if len(keys) > most else "")
