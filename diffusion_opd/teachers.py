"""Teachers: what a user writes, how it is found and loaded, and whether it fits the student.

A teacher is a LoRA (PEFT or diffusers format), a bare denoiser, a whole pipeline, or a loaded pipeline. LoRA teachers
share one frozen backbone; what a pipeline teacher has in common with the student (VAE, text encoders) is shared too.
Everything that does not fit is refused here with one sentence that names both sides: a tensor that is silently dropped
makes a teacher that silently equals the base.

This file knows pipelines and files, and no trainer, loss or data.
"""

import copy
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils.hub import cached_file, extract_commit_hash

from .policy import denoiser_name, is_flow, own_scheduler, tuner_layers

MANIFEST_NAME = "teacher_manifest.json"
STUDENT_ADAPTER = "default"
LORA_NAME = "pytorch_lora_weights.safetensors"


@dataclass
class Teacher:
    """
    A specialist, as a user names it.

    Args:
        path (`str` or [`~diffusers.DiffusionPipeline`]):
            Hub id or folder of a LoRA (PEFT or diffusers format), a denoiser or a pipeline; or a loaded pipeline.
        id (`str`, *optional*):
            What the `teacher_id` column calls it. Defaults to the last part of `subfolder` or `path` that is not
            `"lora"`.
        subfolder, revision (`str`, *optional*):
            Where in the repository, and which version of it.
        weight_name (`str`, *optional*):
            File name of a LoRA in diffusers format, if it is not `pytorch_lora_weights.safetensors`.
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


def name_teachers(teachers: Any) -> list[Teacher]:
    """One teacher, a sequence or a dict `{id: teacher}`, each a path, a [`Teacher`] or a pipeline, as teachers with
    unique ids.

    Raises:
        ValueError: for no teacher, an id given twice, or two ids for one teacher.
        TypeError: for anything that is none of the above.
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
    for teacher in named:
        if teacher.id is None:
            parts = Path(teacher.source).parts if isinstance(teacher.path, (str, os.PathLike)) else ("teacher",)
            teacher.id = next((part for part in reversed(parts) if part != "lora"), "teacher")
    ids = [teacher.id for teacher in named]
    if twice := sorted({i for i in ids if ids.count(i) > 1}):
        raise ValueError(
            f"teacher ids must be unique, but {twice} occurs more than once in {ids}; set `Teacher(..., id=...)`."
        )
    return named


def _as_teacher(value: Any) -> Teacher:
    if isinstance(value, Teacher):
        return copy.copy(value)
    if isinstance(value, (str, os.PathLike, DiffusionPipeline)):
        return Teacher(value)
    raise TypeError(
        f"a teacher is a Hub id, a folder, a `Teacher` or a loaded pipeline, got {type(value).__name__}: {value!r}."
    )


class _Files:
    """The files of one teacher, local or on the Hub."""

    def __init__(self, teacher: Teacher):
        self.teacher = teacher
        if os.path.isabs(str(teacher.path)) and not os.path.isdir(teacher.path):
            raise ValueError(f"teacher {teacher.id!r}: no folder {str(teacher.path)!r}.")

    def find(self, name: str) -> str | None:
        """The local path of a file, downloaded if need be; `None` if the repository has no such file."""
        teacher = self.teacher
        try:
            return cached_file(
                str(teacher.path),
                name,
                subfolder=teacher.subfolder or "",
                revision=teacher.revision,
                _raise_exceptions_for_missing_entries=False,
            )
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            at = f" at revision {teacher.revision!r}" if teacher.revision else ""
            raise ValueError(f"teacher {teacher.id!r}: cannot read {teacher.source!r}{at}: {reason}") from error


def load_teachers(
    teachers: Sequence[Teacher], student: DiffusionPipeline, trains_lora: bool, dtype: torch.dtype
) -> list[LoadedTeacher]:
    """Loads every teacher beside the student.

    Args:
        teachers (`Sequence[Teacher]`):
            With ids.
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
    for index, teacher in enumerate(teachers):
        commit = None
        if isinstance(teacher.path, DiffusionPipeline):
            pipeline, adapter, sha256 = (
                copy.copy(teacher.path),
                None,
                hash_tensors(_denoiser(teacher.path).state_dict()),
            )
        else:
            files = _Files(teacher)
            if found := files.find("model_index.json"):
                pipeline, adapter = _load_pipeline(teacher, dtype), None
            elif found := files.find("config.json"):
                pipeline, adapter = _load_denoiser(teacher, student, found, dtype), None
            else:
                tensors, config, found = _read_lora(teacher, files, student)
                if host is student and not trains_lora:
                    host = copy.copy(student)
                    host.__dict__[name] = copy.deepcopy(getattr(student, name)).to(dtype)
                pipeline, adapter = host, f"teacher_{index}"
                _add_lora(teacher, getattr(host, name), adapter, tensors, config)
            commit = extract_commit_hash(found, None)
            sha256 = hash_tensors(tensors if adapter else _denoiser(pipeline).state_dict())
        if adapter is None:
            check_compatible(teacher, pipeline, student)
            _share(pipeline, student)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module) and part is not getattr(student, name):
                part.requires_grad_(False).eval()
        loaded.append(LoadedTeacher(teacher.id, teacher, pipeline, adapter, sha256, commit))
    return loaded


def _denoiser(pipeline: DiffusionPipeline) -> nn.Module:
    return getattr(pipeline, denoiser_name(pipeline))


def _load_module(teacher: Teacher, cls: type, folder: str, subfolder: str | None, dtype: torch.dtype) -> nn.Module:
    """`from_pretrained` of a diffusers model that refuses what it would only warn about."""
    module, info = cls.from_pretrained(
        folder, subfolder=subfolder, revision=teacher.revision, dtype=dtype, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := info[kind]:
            raise ValueError(
                f"teacher {teacher.id!r}: {len(keys)} {kind.replace('_', ' ')} between {teacher.source!r} and "
                f"{cls.__name__}, e.g. {_sample(keys)}."
            )
    return module


def _load_pipeline(teacher: Teacher, dtype: torch.dtype) -> DiffusionPipeline:
    where = {"revision": teacher.revision}
    folder = str(teacher.path)
    if teacher.subfolder:
        if not os.path.isdir(folder):
            raise ValueError(
                f"teacher {teacher.id!r}: a pipeline in a subfolder of a Hub repository ({teacher.source!r}) cannot be "
                "loaded by diffusers; give it a repository of its own, or point `subfolder` at its denoiser."
            )
        folder = os.path.join(folder, teacher.subfolder)
    index = DiffusionPipeline.load_config(folder, **where)
    name = next((name for name in ("transformer", "unet") if index.get(name, [None])[0]), None)
    if name is None:
        raise ValueError(f"teacher {teacher.id!r}: {teacher.source!r} has neither a transformer nor a unet.")
    denoiser = _load_module(teacher, getattr(diffusers, index[name][1]), folder, name, dtype)
    return DiffusionPipeline.from_pretrained(folder, dtype=dtype, **{name: denoiser}, **where)


def _load_denoiser(teacher: Teacher, student: DiffusionPipeline, config: str, dtype: torch.dtype) -> DiffusionPipeline:
    class_name = json.loads(Path(config).read_text()).get("_class_name")
    cls = getattr(diffusers, class_name or "", None)
    expected = type(_denoiser(student))
    if cls is not expected:
        raise ValueError(
            f"teacher {teacher.id!r}: {teacher.source!r} is a {class_name}, but the student's {type(student).__name__} "
            f"runs a {expected.__name__}; give a whole pipeline instead."
        )
    pipeline = copy.copy(student)
    pipeline.__dict__[denoiser_name(student)] = _load_module(
        teacher, cls, str(teacher.path), teacher.subfolder, dtype
    ).requires_grad_(False)
    return pipeline


def _read_lora(
    teacher: Teacher, files: _Files, student: DiffusionPipeline
) -> tuple[dict[str, Tensor], LoraConfig, str]:
    """Tensors (keys as in the denoiser, `lora_A` / `lora_B`) and config of a LoRA in PEFT or diffusers format."""
    prefix = denoiser_name(student) + "."
    if config_file := files.find("adapter_config.json"):
        weights = files.find("adapter_model.safetensors")
        if weights is None:
            raise ValueError(f"teacher {teacher.id!r}: {teacher.source!r} has no adapter_model.safetensors.")
        config = LoraConfig.from_pretrained(os.path.dirname(config_file))
        tensors = {key.removeprefix("base_model.model."): value for key, value in load_file(weights).items()}
        return tensors, config, weights

    weights = files.find(teacher.weight_name or LORA_NAME)
    if weights is None:
        raise ValueError(
            f"teacher {teacher.id!r}: {teacher.source!r} holds no pipeline (model_index.json), no denoiser "
            f"(config.json) and no LoRA (adapter_config.json or {teacher.weight_name or LORA_NAME}); check `path`, "
            "`subfolder` and `weight_name`."
        )
    if not hasattr(type(student), "lora_state_dict"):
        raise ValueError(
            f"teacher {teacher.id!r}: {type(student).__name__} cannot read a LoRA in diffusers format; give "
            "it in PEFT format."
        )
    with safe_open(weights, "pt") as file:
        raw_keys = set(file.keys())
    folder, weight_name = os.path.split(weights)
    tensors, *rest = type(student).lora_state_dict(folder, weight_name=weight_name, return_lora_metadata=True)
    alphas, metadata = (rest[0] if len(rest) == 2 else None), rest[-1]
    if foreign := [key for key in tensors if not key.startswith(prefix)]:
        raise ValueError(
            f"teacher {teacher.id!r}: {len(foreign)} tensors of {teacher.source!r} are not for the student's "
            f"{prefix[:-1]}, e.g. {_sample(foreign)}; a teacher may adapt the denoiser only."
        )
    if not tensors:
        raise ValueError(f"teacher {teacher.id!r}: no LoRA tensors in {teacher.source!r}, only {_sample(raw_keys)}.")
    tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    if metadata:
        fields = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
        config = LoraConfig(**fields)
    else:
        config = _infer_lora_config(tensors, alphas or {}, prefix)
    return tensors, config, weights


def _infer_lora_config(tensors: dict[str, Tensor], alphas: dict[str, float], prefix: str) -> LoraConfig:
    # A file without metadata: ranks from the shapes, alpha from `.alpha` entries, alpha = rank where there are none
    ranks = {
        key.removesuffix(".lora_B.weight"): t.shape[1] for key, t in tensors.items() if key.endswith("lora_B.weight")
    }
    if not ranks:
        return LoraConfig(target_modules=[])
    scale = {
        module: alphas.get(f"{prefix}{module}.alpha", alphas.get(f"{prefix}{module}.lora_A.weight.alpha", rank))
        for module, rank in ranks.items()
    }
    return LoraConfig(
        r=next(iter(ranks.values())),
        lora_alpha=next(iter(scale.values())),
        rank_pattern={f"^{module}": rank for module, rank in ranks.items()},
        alpha_pattern={f"^{module}": alpha for module, alpha in scale.items()},
        target_modules=list(ranks),
    )


def _add_lora(
    teacher: Teacher, denoiser: nn.Module, adapter: str, tensors: dict[str, Tensor], config: LoraConfig
) -> None:
    """Adds a frozen adapter and refuses any tensor that is missing, unexpected or of another shape."""
    config.inference_mode = False
    add_adapter(denoiser, config, adapter)
    expected = get_peft_model_state_dict(denoiser, adapter_name=adapter)
    missing, unexpected = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    shapes = [
        f"{key} {tuple(tensors[key].shape)} for {tuple(expected[key].shape)}"
        for key in expected.keys() & tensors.keys()
        if tensors[key].shape != expected[key].shape
    ]
    for kind, keys in (("missing", missing), ("unexpected", unexpected), ("wrongly shaped", shapes)):
        if keys:
            raise ValueError(
                f"teacher {teacher.id!r}: {len(keys)} {kind} LoRA tensors in {teacher.source!r} for the student's "
                f"{type(denoiser).__name__}, e.g. {_sample(keys)}."
            )
    with torch.no_grad():
        for key, value in expected.items():
            value.copy_(tensors[key])


def add_adapter(denoiser: nn.Module, config: LoraConfig, name: str) -> None:
    """Adds an adapter and leaves which one is active, and which parameters train, as it was.

    Raises:
        ValueError: if the config's target modules are not in the denoiser.
    """
    trainable = {key for key, parameter in denoiser.named_parameters() if parameter.requires_grad}
    layers = tuner_layers(denoiser)
    active = layers[0]._active_adapter if layers else []
    try:
        if hasattr(denoiser, "add_adapter"):
            denoiser.add_adapter(config, name)
        else:
            inject_adapter_in_model(config, denoiser, name)
    except ValueError as error:
        raise ValueError(f"LoRA adapter {name!r} does not fit {type(denoiser).__name__}: {error}") from error
    for key, parameter in denoiser.named_parameters():
        parameter.requires_grad_(key in trainable)
    for layer in tuner_layers(denoiser):
        layer._active_adapter = active


def check_compatible(teacher: Teacher, pipeline: DiffusionPipeline, student: DiffusionPipeline) -> None:
    """Refuses a teacher pipeline of another latent space or another time than the student's."""

    def refuse(what: str, theirs: Any, ours: Any) -> None:
        raise ValueError(
            f"teacher {teacher.id!r} has {what} {theirs}, but the student has {ours}; they must be the same."
        )

    theirs, ours = _denoiser(pipeline).config, _denoiser(student).config
    if theirs.get("in_channels") != ours.get("in_channels"):
        refuse("in_channels", theirs.get("in_channels"), ours.get("in_channels"))
    if hasattr(student, "vae"):
        for key in ("latent_channels", "z_dim", "scaling_factor", "shift_factor", "latents_mean", "latents_std"):
            if pipeline.vae.config.get(key) != student.vae.config.get(key):
                refuse(f"a VAE of {key}", pipeline.vae.config.get(key), student.vae.config.get(key))
        # The encoder defines the latent space; decoders are fine-tuned without changing it
        encoders = [getattr(p.vae, "encoder", None) for p in (pipeline, student)]
        if None not in encoders and not same_weights(*encoders):
            refuse("a VAE encoder of other weights:", _name(pipeline), _name(student))
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


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules hold the same tensors, up to the precision of the coarser dtype."""
    mine, theirs = a.state_dict(), b.state_dict()
    if mine.keys() != theirs.keys():
        return False
    return all(
        mine[key].shape == theirs[key].shape
        and torch.equal(
            mine[key].to(device="cpu", dtype=_coarser(mine[key], theirs[key])),
            theirs[key].to(device="cpu", dtype=_coarser(mine[key], theirs[key])),
        )
        for key in mine
    )


def _coarser(a: Tensor, b: Tensor) -> torch.dtype:
    return min(a.dtype, b.dtype, key=lambda dtype: torch.finfo(dtype).bits if dtype.is_floating_point else 0)


def _share(pipeline: DiffusionPipeline, student: DiffusionPipeline) -> None:
    """Replaces what the teacher has in common with the student (config and weights) by the student's own."""
    text = [key for key in pipeline.components if key.startswith(("text_encoder", "tokenizer", "processor"))]
    if all(_same_part(getattr(pipeline, key), getattr(student, key, None)) for key in text):
        for key in text:
            pipeline.__dict__[key] = getattr(student, key)
    if hasattr(student, "vae") and same_weights(pipeline.vae, student.vae):
        pipeline.__dict__["vae"] = student.vae


def _same_part(mine: Any, theirs: Any) -> bool:
    if mine is theirs:
        return True
    if type(mine) is not type(theirs):
        return False
    if isinstance(mine, nn.Module):
        ignored = ("_name_or_path", "torch_dtype", "dtype", "transformers_version", "_commit_hash")
        configs = [{k: v for k, v in part.config.to_dict().items() if k not in ignored} for part in (mine, theirs)]
        return configs[0] == configs[1] and same_weights(mine, theirs)
    if isinstance(mine, PreTrainedTokenizerBase):
        return mine.get_vocab() == theirs.get_vocab() and mine.model_max_length == theirs.model_max_length
    return False


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def manifest(teachers: Iterable[LoadedTeacher]) -> dict[str, Any]:
    """What `teacher_manifest.json` holds: which teachers a run learns from."""
    entries = [
        {
            "id": teacher.id,
            "source": teacher.spec.source,
            "revision": teacher.spec.revision,
            "commit": teacher.commit,
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
        if entry["sha256"] != before[key]["sha256"]:
            raise ValueError(
                f"teacher {key!r} has other weights ({entry['source']}) than the one that {checkpoint} learnt from "
                f"({before[key]['source']}, commit {before[key]['commit']}); use the same teacher."
            )


def _sample(keys: Iterable[str], most: int = 3) -> str:
    keys = sorted(str(key) for key in keys)
    return ", ".join(keys[:most]) + (", ..." if len(keys) > most else "")
