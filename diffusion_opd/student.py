"""The student: its pipeline, loaded and checked; what of it is trained, saved and loaded again.

This file knows pipelines and files, and no trainer, loss or data.
"""

import contextlib
import copy
import functools
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import transformers
from accelerate.logging import get_logger
from accelerate.utils import disable_fsdp_ram_efficient_loading
from diffusers import DiffusionPipeline, ModelMixin, PipelineQuantizationConfig
from diffusers.training_utils import _collate_lora_metadata, cast_training_params
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils._pytree import tree_map
from transformers.integrations import is_deepspeed_zero3_enabled

from .adapters import STUDENT_ADAPTER, add_adapter, changes_base, frozen_copy, inject, with_denoiser
from .attention import require_attention_backend, set_attention_backend
from .checkpoints import give_ordinary_mode, is_checkpoint
from .config import DiffusionConfig
from .denoisers import NAMES, denoiser_of, denoisers_of, take_wrappers_off, unwrap_blocks
from .disclosure import disclosed, forget_places
from .errors import brief, listed, one_sentence, why_not, without_reports
from .files import (
    CONFIG_NAME,
    INDEX_NAME,
    MODULAR_INDEX_NAME,
    PEFT_CONFIG_NAME,
    PEFT_PREFIX,
    PEFT_WEIGHTS_NAME,
    absent_parts,
    lora_name,
    name_or_path,
    parts_named,
    read_json,
)
from .fingerprint import differ, read_fingerprint, take_fingerprint, write_fingerprint
from .inputs import signature
from .modular import is_pipeline, load_modular, save_pipeline, with_call
from .policy import BACKBONE, Policy, check_seams, tuner_layers
from .quantization import configs_by_part, is_quantised, keep_layout
from .shards import local_shards, reshard, shards_changed, zero3_unseen
from .teachers import as_lora, load_lora

logger = get_logger(__name__)

# Of `from_pretrained`: what reading the pipeline's index needs too
HUB_KWARGS = {"revision", "token", "cache_dir", "local_files_only", "force_download"}


class Student:
    """
    The student of a run: what of it is trained, how it is saved and loaded.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]): As [`load_student`] returns it.

    Attributes:
        pipeline ([`~diffusers.DiffusionPipeline`]): The student as plain diffusers runs it.
        denoiser (`nn.Module`): Of the pipeline, what is trained; of several the [`Denoisers`].
        trained (`dict[str, ModelMixin]`): By their names the denoisers of which something is trained.
        trains_lora (`bool`): Whether a LoRA of the denoiser is trained, else all of it.
        fingerprints (`dict[str, dict[str, list[float]]]`): By the same names, of the weights that training begins with.
        policy ([`Policy`]): The pipeline as it is rolled out, with the arguments and the precision of the run; its
            trainer sets it.
    """

    policy: Policy
    repo_id: str | None = None  # where a run pushes to

    def __init__(self, pipeline: DiffusionPipeline):
        self.pipeline, self.denoiser = pipeline, denoiser_of(pipeline)
        parts: dict[str, Any] = denoisers_of(pipeline)
        with_lora = {name for name, part in parts.items() if STUDENT_ADAPTER in getattr(part, "peft_config", {})}
        self.trains_lora = bool(with_lora)
        self.trained: dict[str, ModelMixin] = {n: part for n, part in parts.items() if n in with_lora or not with_lora}
        # While they are whole, and as they are before training
        self.fingerprints = {name: take_fingerprint(part) for name, part in self.trained.items()}

    @property
    def trainable_parameters(self) -> list[nn.Parameter]:
        """As they are now: FSDP puts others in their place."""
        return [parameter for parameter in self.denoiser.parameters() if parameter.requires_grad]

    @contextlib.contextmanager
    def trained_shards(self) -> Iterator[list[nn.Parameter]]:
        """What this process holds of the trained parameters, to be read and written. Entered on every process."""
        reshard(self.denoiser)
        parameters = self.trainable_parameters
        with zero3_unseen():
            yield local_shards(parameters)
        shards_changed(parameters)

    def frozen(self, adapter: str, dtype: torch.dtype) -> tuple[DiffusionPipeline, str | None]:
        """The student as it is now, which does not change as it is trained: a pipeline, and the adapter of its denoiser
        that is to be active.

        Args:
            adapter (`str`): Of a student that trains a LoRA: [`BACKBONE`], or the name of a copy of its adapter.
            dtype (`torch.dtype`): Of the copy of a fully trained one.
        """
        if not self.trains_lora:
            return with_denoiser(self.pipeline, frozen_copy(self.denoiser, dtype)), None
        if adapter != BACKBONE:
            for part in self.trained.values():
                add_adapter(part, part.peft_config[STUDENT_ADAPTER], adapter)
            for parameter, twin in zip(self.adapter(STUDENT_ADAPTER), self.adapter(adapter), strict=True):
                twin.data = parameter.detach().clone()
                twin.requires_grad_(False)
        return self.pipeline, adapter

    def adapter(self, name: str) -> list[nn.Parameter]:
        """The parameters of an adapter of the denoiser."""
        return [parameter for key, parameter in self.denoiser.named_parameters() if f".{name}." in f"{key}."]

    def gathered_state(self, is_fsdp: bool, deepspeed: Any = None) -> dict[str, Any] | None:
        """The weights of a sharded student (of a LoRA the trained ones alone; Trainer would gather the frozen backbone
        too), whole on the first process, called on all; `None` if they are not sharded.

        Args:
            is_fsdp (`bool`): Whether FSDP shards them.
            deepspeed (`DeepSpeedEngine`, *optional*): What trains them.
        """
        if is_fsdp:
            options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=self.trains_lora)
            return get_model_state_dict(self.denoiser, options=options)
        if is_deepspeed_zero3_enabled() and deepspeed is not None:
            return deepspeed._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=self.trains_lora)
        return None

    def save(self, folder: str | os.PathLike, state_dict: dict[str, Any] | None = None) -> None:
        """Saves the student so that plain diffusers loads it: a LoRA as `pytorch_lora_weights.safetensors` (in PEFT
        format, where diffusers loads none into the pipeline), a full student as a pipeline folder (in a checkpoint: the
        denoiser's folder alone).

        Args:
            folder (`str`): Made if it is not there.
            state_dict (`dict`, *optional*): What [`gathered_state`] returned: saved in the place of the weights that
                the denoiser holds.
        """
        os.makedirs(folder, exist_ok=True)
        states = {name: None if state_dict is None else self._part_of(state_dict, name) for name in self.trained}
        if self.trains_lora:
            for name, part in self.trained.items():
                layers = get_peft_model_state_dict(part, state_dict=states[name], adapter_name=STUDENT_ADAPTER)
                if self.has_lora_loader:
                    kind = name.removesuffix("_2")  # plain diffusers loads each file as if it were of the first
                    # Without the metadata a reload would take lora_alpha = r
                    metadata = _collate_lora_metadata({kind: part})
                    type(self.pipeline).save_lora_weights(
                        folder, **{f"{kind}_lora_layers": layers}, weight_name=lora_name(name), **metadata
                    )
                else:
                    _save_peft(folder, part.peft_config[STUDENT_ADAPTER], layers, name_or_path(self.pipeline))
                write_fingerprint(Path(folder, self.lora_files[name]), self.fingerprints[name])
        else:
            # `ModelMixin.save_pretrained` takes no state dict
            for name, part in self.trained.items() if state_dict is not None else ():
                part.state_dict = functools.partial(_state, states[name])
            try:
                if is_checkpoint(folder):
                    for name, part in self.trained.items():
                        part.save_pretrained(os.path.join(folder, name))
                    forget_places(Path(folder, name, CONFIG_NAME) for name in self.trained)
                else:
                    save_pipeline(self.pipeline, folder, self.repo_id)
            finally:
                for part in self.trained.values():
                    vars(part).pop("state_dict", None)
        folders = [Path(folder, name) for name in self.pipeline.components]
        for part in folders:
            forget_old_shards(part)
        loras = [Path(folder, name) for name in self.lora_files.values()]
        give_ordinary_mode(*loras, *(file for f in folders for file in f.glob("*.safetensors")))

    def _part_of(self, state: dict[str, Any], name: str) -> dict[str, Any]:
        """What of the state of [`denoiser`] is that of one of several."""
        if len(denoisers_of(self.pipeline)) == 1:
            return state
        return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}

    @property
    def file_names(self) -> set[str]:
        """Files and folders of what is trained, in a checkpoint."""
        if not self.trains_lora:
            return set(self.trained)
        return {*self.lora_files.values(), *([] if self.has_lora_loader else [PEFT_CONFIG_NAME])}

    @property
    def has_lora_loader(self) -> bool:
        """Whether plain diffusers loads a LoRA into the pipeline; else it is saved in PEFT format."""
        return has_lora_loader(self.pipeline)

    @property
    def lora_files(self) -> dict[str, str]:
        """Of each trained denoiser the file of its LoRA."""
        return {name: lora_name(name) if self.has_lora_loader else PEFT_WEIGHTS_NAME for name in self.trained}

    @property
    def lora_settings(self) -> dict[str, dict[str, Any]]:
        """What makes a function of a LoRA's weights, by denoiser."""
        names = "r lora_alpha rank_pattern alpha_pattern use_rslora use_dora lora_bias target_modules".split()
        configs = {name: part.peft_config[STUDENT_ADAPTER] for name, part in self.trained.items()}
        found = {part: {name: getattr(config, name) for name in names} for part, config in configs.items()}
        for settings in found.values():
            if not isinstance(settings["target_modules"], str):
                settings["target_modules"] = sorted(settings["target_modules"])
        return found

    def check_base(self, checkpoint: str | os.PathLike) -> None:
        """Refuses a checkpoint whose LoRA was trained on other weights than this student's.

        Raises:
            ValueError: naming the denoiser.
        """
        for name, fingerprint in self.fingerprints.items() if self.trains_lora else ():
            file = Path(checkpoint, self.lora_files[name])
            if file.is_file() and differ(fingerprint, read_fingerprint(file)):
                raise ValueError(
                    f"{checkpoint} was trained on other weights than those of this {name}; resume it with the model "
                    "that it began with."
                )

    def load(self, folder: str | os.PathLike) -> None:
        """Loads what [`save`] wrote into the denoiser.

        Raises:
            ValueError: if a file cannot be read, or a tensor is missing, unexpected or of another shape.
        """
        for name, part in self.trained.items():
            self._load(Path(folder), name, part)

    def _load(self, folder: Path, name: str, part: ModelMixin) -> None:
        files = [folder / self.lora_files[name]] if self.trains_lora else _weight_files(folder / name)
        state: dict[str, torch.Tensor] = {}
        try:
            for file in files:
                state |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{folder} does not hold this student: {file.name} cannot be read ({error}).") from error
        if self.trains_lora:
            prefix = f"{name.removesuffix('_2')}." if self.has_lora_loader else PEFT_PREFIX
            state = {key.removeprefix(prefix): value for key, value in state.items()}
            expected = get_peft_model_state_dict(part, adapter_name=STUDENT_ADAPTER)
        else:
            expected = part.state_dict()
        wrong = expected.keys() ^ state.keys() or {k for k in expected if expected[k].shape != state[k].shape}
        if wrong:
            raise ValueError(
                f"{folder} does not hold this student: {len(wrong)} tensors differ, e.g. {sorted(wrong)[0]}; was it "
                "saved with another `peft_config` or model?"
            )
        if self.trains_lora:
            set_peft_model_state_dict(part, state, adapter_name=STUDENT_ADAPTER)
        else:
            part.load_state_dict(state)


def _weight_files(folder: Path) -> list[Path]:
    """What `save_pretrained` has written last: one file, or the shards of its index."""
    for index in folder.glob("*.safetensors.index.json"):
        if _is_in_force(index):
            return sorted({folder / name for name in read_json(index)["weight_map"].values()})
    return sorted(folder.glob("*.safetensors"))


def forget_old_shards(folder: Path) -> None:
    """Deletes an index of shards that lay in a folder before one file was written there: loading would ask for them."""
    for index in folder.glob("*.safetensors.index.json"):
        if not _is_in_force(index):
            index.unlink()


def _is_in_force(index: Path) -> bool:
    """Whether an index of shards was written after the one file that may lie beside it."""
    whole = Path(str(index).removesuffix(".index.json"))
    return not whole.is_file() or whole.stat().st_mtime_ns < index.stat().st_mtime_ns


def _state(state: Any, *args: Any, **kwargs: Any) -> Any:
    return state


def has_lora_loader(pipeline: DiffusionPipeline) -> bool:
    """Whether plain diffusers can save and load a LoRA of a pipeline's denoisers."""
    cls: Any = type(pipeline)
    if not all(callable(getattr(cls, name, None)) for name in ("lora_state_dict", "save_lora_weights")):
        return False
    parts = denoisers_of(pipeline)
    if not all(hasattr(part, "load_lora_adapter") for part in parts.values()):
        return False
    layers = {f"{name.removesuffix('_2')}_lora_layers" for name in parts}
    return layers <= signature(cls.save_lora_weights).parameters.keys()  # of some classes it takes nothing


def _save_peft(folder: str | os.PathLike, config: LoraConfig, layers: dict[str, torch.Tensor], base: Any) -> None:
    """Saves a LoRA as `PeftModel.save_pretrained` does, which takes no denoiser that has its layers already."""
    config = copy.copy(config)
    config.base_model_name_or_path, config.inference_mode = disclosed(base), True
    config.save_pretrained(str(folder))
    tensors = {f"{PEFT_PREFIX}{key}": value.detach().cpu().contiguous() for key, value in layers.items()}
    save_file(tensors, Path(folder, PEFT_WEIGHTS_NAME), metadata={"format": "pt"})


@contextlib.contextmanager
def whole_modules() -> Iterator[None]:
    """Load pipelines inside this: a text encoder that ZeRO-3 partitions cannot run without an engine of its own; with
    FSDP's RAM-efficient loading it is empty on every process but the first."""
    disable_fsdp_ram_efficient_loading()
    with zero3_unseen():
        yield


def load_student(
    model: str | os.PathLike | DiffusionPipeline,
    args: DiffusionConfig,
    peft_config: LoraConfig | Mapping[str, LoraConfig] | None,
    check: Callable[[DiffusionPipeline], None],
    student_lora: Any = None,
) -> DiffusionPipeline:
    """The student's pipeline with trainable parameters in float32 and everything else frozen, in eval mode.

    Args:
        model (`str` or [`~diffusers.DiffusionPipeline`]): Hub id or folder (loaded in the mixed-precision dtype, from
            safetensors unless `model_init_kwargs` say otherwise), or a pipeline (whose frozen modules keep their
            dtype).
        args ([`DiffusionConfig`]): For how it is loaded, and the dtype.
        peft_config ([`~peft.LoraConfig`], or by the names of denoisers, *optional*): Trains a LoRA of each denoiser, or
            of those that are named; `None` trains the whole of each.
        student_lora (`str` or [`Lora`], *optional*): A LoRA whose training goes on, in the place of a new one.
        check (`Callable[[DiffusionPipeline], None]`): May refuse the pipeline before anything of it is changed.

    Raises:
        ValueError: if the pipeline cannot be loaded, has no denoiser, lacks a seam, is offloaded, carries adapters
            already, could not load a LoRA again, or is quantised and to be trained in full.
        TypeError: if `model` or `peft_config` is none of the above.
    """
    lora = None if student_lora is None else as_lora(student_lora)
    if lora is not None and lora.scale is not None:
        raise ValueError("`student_lora` is trained at its own strength; leave its `scale` out.")
    if lora is not None and peft_config is not None:
        raise ValueError("`student_lora` brings its own rank, alpha and target modules; leave `peft_config` out.")
    given_configs = list(peft_config.values()) if isinstance(peft_config, Mapping) else [peft_config]
    is_empty = isinstance(peft_config, Mapping) and not peft_config
    if is_empty or not all(isinstance(one, (LoraConfig, type(None))) for one in given_configs):
        raise TypeError(
            "`peft_config` must be a `LoraConfig`, a dict of them by denoiser, or None (train in full), got "
            f"{brief(peft_config)}."
        )
    if args.attention_backend is not None:
        require_attention_backend(args.attention_backend)
    if is_pipeline(model):
        pipeline = with_call(model)
    elif not isinstance(model, (str, os.PathLike)):
        raise TypeError(f"`model` must be a Hub id, a folder or a loaded pipeline, got {brief(model)}.")
    else:
        # diffusers falls back on pickles by itself
        given: Any = args.model_init_kwargs or {}  # a dict since `__post_init__`
        init_kwargs = {"use_safetensors": True} | given
        if init_kwargs.get("revision") is not None and os.path.isdir(model):
            raise ValueError(
                f"the student {str(model)!r} is a folder and has no revision {init_kwargs['revision']!r}; leave it out "
                "of `model_init_kwargs`."
            )
        hub = {key: init_kwargs[key] for key in HUB_KWARGS & init_kwargs.keys()}
        index, is_modular, _ = read_index(str(model), hub)
        init_kwargs = absent_parts(index) | init_kwargs
        if "torch_dtype" in init_kwargs:  # what it was called before
            init_kwargs.setdefault("dtype", init_kwargs.pop("torch_dtype"))
        if init_kwargs.get("dtype") is not None:
            init_kwargs["dtype"] = _as_dtypes(init_kwargs["dtype"])
        else:
            names = [name for name in NAMES if name in parts_named(index)] or ["transformer"]
            denoiser_dtype = torch.float32 if peft_config is None and lora is None else args.mixed_dtype
            init_kwargs["dtype"] = dict.fromkeys(names, denoiser_dtype) | {"default": args.mixed_dtype}
        quantised = configs_by_part(args.quantization_config, index, f"the student {str(model)!r}")
        if peft_config is None and lora is None:
            _require_whole(quantised)
        _check_encoders(str(model), index, init_kwargs)
        unsafe = " from safetensors (`model_init_kwargs={'use_safetensors': False}` reads pickles that you trust)"
        unsafe = unsafe if init_kwargs["use_safetensors"] else ""
        with whole_modules(), one_sentence(f"the student {str(model)!r} cannot be loaded", unsafe):
            if is_modular:
                of_parts = {key: value for key, value in init_kwargs.items() if key not in hub}
                pipeline = load_modular(str(model), hub, quantised, **of_parts)
            else:
                if quantised:
                    init_kwargs["quantization_config"] = PipelineQuantizationConfig(quant_mapping=quantised)
                pipeline = DiffusionPipeline.from_pretrained(model, **init_kwargs)
    wrapped = take_wrappers_off(pipeline)
    denoisers: dict[str, Any] = denoisers_of(pipeline)
    wrapped += [name for name, denoiser in denoisers.items() if unwrap_blocks(denoiser)]
    if wrapped:
        logger.warning(
            f"The student's {listed(wrapped, 'and')} came compiled, or wrapped for several processes, and is trained "
            "without; `torch_compile=True` compiles what is trained."
        )
    check_seams(pipeline)
    check(pipeline)
    for name, denoiser in denoisers.items():
        if any(getattr(module, "fused_projections", False) for module in denoiser.modules()):
            raise ValueError(
                f"the student's {name} has fused projections, whose weights are copies of those that are saved; load "
                "the pipeline anew, without `fuse_qkv_projections()`."
            )
        if tuner_layers(denoiser):
            raise ValueError(
                f"the student's {name} carries adapters already; call `pipeline.fuse_lora()` and "
                "`pipeline.unload_lora_weights()` first."
            )
        if args.attention_backend is not None:  # before it is copied for anybody
            set_attention_backend(denoiser, args.attention_backend, f"the student's {name}")
    configs = dict(peft_config) if isinstance(peft_config, Mapping) else dict.fromkeys(denoisers, peft_config)
    if unknown := sorted(configs.keys() - denoisers.keys()):
        raise ValueError(
            f"`peft_config` names {unknown}, and the denoisers of {type(pipeline).__name__} are {list(denoisers)}."
        )
    for key, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            if missing := [entry for entry, tensor in part.state_dict().items() if tensor.is_meta]:
                source = type(pipeline).__name__ if model is pipeline else str(model)
                raise ValueError(
                    f"the student {source!r} lacks {len(missing)} tensors of its {key}, e.g. {missing[0]}; are its "
                    "files complete?"
                )
            part.requires_grad_(False).eval()
            keep_layout(part)
    if peft_config is None and lora is None:
        _require_whole([name for name, denoiser in denoisers.items() if is_quantised(denoiser)])
        parts = {key: part for key, part in pipeline.components.items() if isinstance(part, nn.Module)}
        for denoiser in denoisers.values():
            # Not by its own `to`, which warns of modules that diffusers keeps in float32
            nn.Module.to(denoiser.requires_grad_(True), torch.float32)
            beside = next((part for key, part in parts.items() if "text_encoder" in key), parts.get("vae", denoiser))
            if {_dtype(beside), args.mixed_dtype} != {torch.float32}:
                answer_beside(denoiser, beside, args.mixed_dtype)
                if callable(getattr(vae := parts.get("vae"), "decode", None)):
                    decode_in_its_dtype(vae)
        return pipeline
    if len(configs) > 1 and not has_lora_loader(pipeline):
        raise ValueError(
            f"{type(pipeline).__name__} cannot load LoRAs in plain diffusers, and PEFT's format is for one denoiser; "
            f"name one in `peft_config`, e.g. {{{next(iter(configs))!r}: LoraConfig(...)}}."
        )
    if lora is not None:
        load_lora(lora, pipeline, STUDENT_ADAPTER, torch.float32)  # what is trained is not rounded
        for denoiser in denoisers.values():
            for layer in tuner_layers(denoiser):
                layer.set_adapter(STUDENT_ADAPTER)  # makes it train too
        return pipeline
    for name, config in configs.items():
        _add_lora(name, denoisers[name], config)
    return pipeline


def _as_dtypes(value: Any) -> Any:
    """A dtype, or one for each part, by itself or by its name (from YAML or a flag)."""
    if isinstance(value, Mapping):
        return {key: _as_dtypes(one) for key, one in value.items()}
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"`model_init_kwargs`: dtype {value!r} is none of torch's, e.g. 'bfloat16'.")
    return dtype


def _check_encoders(model: str, index: Mapping[str, Any], init_kwargs: Mapping[str, Any]) -> None:
    """Refuses encoders whose files lack tensors: transformers makes random ones in their place. Read without their
    data."""
    where = {key: init_kwargs[key] for key in ("variant", "use_safetensors", *HUB_KWARGS) if key in init_kwargs}
    for key, entry in index.items():
        library, name = entry[:2] if isinstance(entry, (list, tuple)) and len(entry) > 1 else ("", "")
        cls: Any = getattr(transformers, str(name), None) if library == "transformers" else None
        if key in init_kwargs or not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
            continue
        encoder: Any = cls
        try:
            with whole_modules(), without_reports():
                _, info = encoder.from_pretrained(
                    model, subfolder=key, output_loading_info=True, device_map="meta", **where
                )
        except Exception:  # why it cannot be loaded is said when it is loaded
            continue
        if missing := info["missing_keys"]:
            raise ValueError(
                f"the student {model!r} lacks {len(missing)} tensors of its {key}, e.g. {min(missing)}; are its files "
                "complete?"
            )


def _require_whole(quantised: Collection[str]) -> None:
    """Refuses to train all of a denoiser that is among the parts that are quantised."""
    for name in [name for name in NAMES if name in quantised]:
        raise ValueError(
            f"the student's {name} is quantised, and cannot be trained in full; train a LoRA of it by `peft_config`, "
            "or load it without `quantization_config`."
        )


def _add_lora(name: str, denoiser: Any, config: Any) -> None:
    """Adds a denoiser's LoRA, to be trained."""
    config = _by_modules(name, denoiser, config)
    if not config.target_modules:  # PEFT would look for `model_type`
        raise ValueError(
            "`peft_config` names no `target_modules`; give some, e.g. ['to_q', 'to_k', 'to_v', 'to_out.0']."
        )
    if changes_base(config):
        raise ValueError(
            f"`peft_config` changes the {name} itself (bias={config.bias!r}, "
            f"modules_to_save={config.modules_to_save}, init_lora_weights={config.init_lora_weights!r}), "
            "which LoRA teachers share; leave these at their defaults, or train in full."
        )
    if config.lora_dropout > 0:
        logger.warning(
            f"lora_dropout={config.lora_dropout} has no effect: the denoiser runs in eval mode, since the rollout "
            "and the gradient are one pass."
        )
    with one_sentence(f"`peft_config` does not fit {type(denoiser).__name__}"):
        inject(denoiser, config, STUDENT_ADAPTER)
    cast_training_params(denoiser)


def _by_modules(name: str, denoiser: nn.Module, config: LoraConfig) -> LoraConfig:
    """A config whose `target_parameters`, which plain diffusers loads none of, are named by their layers."""
    if not config.target_parameters:
        return config
    layers = {key for key, module in denoiser.named_modules() if isinstance(module, nn.Linear)}
    found = {key for key in layers for wanted in config.target_parameters if f".{key}.weight".endswith(f".{wanted}")}
    known = {wanted for wanted in config.target_parameters for key in found if f".{key}.weight".endswith(f".{wanted}")}
    targets = config.target_modules or []
    if (unknown := sorted(set(config.target_parameters) - known)) or isinstance(targets, str):
        raise ValueError(
            f"`peft_config`: `target_parameters` {unknown or sorted(known)} of the {name} cannot be loaded by plain "
            "diffusers; name linear layers in a list of `target_modules`."
        )
    config = copy.copy(config)
    config.target_modules, config.target_parameters = [*targets, *sorted(found)], None
    return config


def answer_beside(denoiser: nn.Module, part: nn.Module, compute_dtype: torch.dtype) -> None:
    """Lets a denoiser whose weights are float32, as they are trained in full, take part in a pipeline as one of the
    precision of another `part` would: it computes in `compute_dtype`, and what it answers is of the dtype that the part
    has by then, for which scheduler and VAE look. Under autocast it answers what autocast makes of it."""

    @functools.wraps(type(denoiser).forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        weight = next(self.parameters())
        compute: contextlib.AbstractContextManager = contextlib.nullcontext()
        mixed = torch.is_autocast_enabled(weight.device.type)
        if weight.dtype == torch.float32 and not mixed:  # DeepSpeed casts what it trains
            if compute_dtype == torch.float32:
                args, kwargs = _cast((args, kwargs), torch.float32)
            else:
                compute = torch.autocast(weight.device.type, compute_dtype)
        with compute:
            output = type(self).forward(self, *args, **kwargs)
        return output if mixed else _cast(output, _dtype(part))

    denoiser.forward = MethodType(forward, denoiser)


def decode_in_its_dtype(vae: Any) -> None:
    """Lets a VAE decode latents of another precision, which they have where a pipeline looks for it at a denoiser whose
    weights are float32 (HunyuanDiT's)."""

    @functools.wraps(type(vae).decode)
    def decode(self: Any, z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return type(self).decode(self, z.to(_dtype(self)), *args, **kwargs)

    vae.decode = MethodType(decode, vae)


def _dtype(part: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in part.parameters() if parameter.is_floating_point())


def _cast(values: Any, dtype: torch.dtype) -> Any:
    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return tree_map(cast, values)


def read_index(model: str, hub: dict[str, Any], who: str = "the student") -> tuple[dict[str, Any], bool, str | None]:
    """The index of a pipeline, whether it is a modular one, and the commit if it is on the Hub; `who` is what sentences
    call it."""
    path, modular, commit = Path(model, INDEX_NAME), Path(model, MODULAR_INDEX_NAME), None
    if not os.path.isdir(model):
        try:
            if os.path.isabs(model):
                raise HFValidationError
            path = Path(hf_hub_download(model, INDEX_NAME, **hub))
        except (HFValidationError, OSError) as error:
            try:
                modular = Path(hf_hub_download(model, MODULAR_INDEX_NAME, **hub))
            except (HFValidationError, OSError):
                raise ValueError(f"{who} {model!r} {why_not(error, hub.get('revision'))}.") from error
        commit = (path if path.is_file() else modular).parent.name
    is_modular = modular.is_file() and not path.is_file()
    with one_sentence(f"{who} {model!r} holds no pipeline ({INDEX_NAME} or {MODULAR_INDEX_NAME})"):
        return read_json(modular if is_modular else path), is_modular, commit
