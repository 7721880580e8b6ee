"""What a user can set about a run; every meaningless combination is refused here, before any model is loaded."""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import torch
from accelerate.utils import DynamoBackend
from transformers.utils import is_torch_bf16_gpu_available
from trl.trainer.base_config import _BaseConfig

from .attention import check_attention_backend
from .disclosure import disclosed
from .errors import brief, listed
from .inputs import is_prompt
from .objectives import OBJECTIVES
from .quantization import as_json, check_quantization
from .queries import QUERIES
from .transitions import TRANSITIONS, Kernel

TEACHER_PLACEMENTS = ("device", "cpu", "sharded")
ENCODER_PLACEMENTS = ("device", "cpu")
TASK_SAMPLINGS = ("cycle", "random", "mixed")
ANCHOR_OBJECTIVES = ("kl", "velocity")
BASE = "base"  # the student as it is before training, where a reference is named
NAN_POLICIES = ("raise", "skip")

# What the trainer itself hands to the pipeline's `__call__`
RESERVED_CALL_KWARGS = frozenset(
    "prompt num_inference_steps timesteps sigmas generator latents output_type return_dict num_images_per_prompt "
    "num_videos_per_prompt callback_on_step_end prompt_embeds".split()
)

_TEXT = re.compile(r"(negative_)?prompt(_\d+)?")

# The types of fields that are looked at, and their names in a sentence
_KINDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a dict",
    dict[str, Any]: "a dict",
    dict[str, str]: "a dict of texts",
    dict[str, float]: "a dict of numbers",
    list: "a list",
    list[int]: "a list of whole numbers",
    list[float]: "a list of numbers",
    list[str]: "a list of texts",
    type(None): "None",
}
# transformers takes more here than its annotations say, and so do we, of what a flag cannot give
_LOOSE = {"accelerator_config", "fsdp", "quantization_config"}


def check_types(settings: Any, owner: str = "") -> None:
    """Refuses a value that is not of its field's type, and NaN and infinity. Flags are read by a parser, what comes
    from Python or YAML by nobody.

    Args:
        settings: A dataclass.
        owner (`str`, *optional*): What a sentence begins with.
    """
    hints = get_type_hints(type(settings))
    for name in (entry.name for entry in fields(settings) if entry.name not in _LOOSE):
        kinds = get_args(hints[name]) if isinstance(hints[name], UnionType) else (hints[name],)
        if not _KINDS.keys() >= set(kinds):
            continue
        value = getattr(settings, name)
        if not any(_is_a(kind, value) for kind in kinds):
            words = [_KINDS[kind] for kind in kinds]
            raise TypeError(f"{owner}`{name}` must be {' or '.join(words)}, got {value!r}.")
        # torch takes `max_grad_norm=inf`, which measures and does not clip
        if isinstance(value, float) and not math.isfinite(value) and (name, value) != ("max_grad_norm", math.inf):
            raise ValueError(f"{owner}`{name}` must be a finite number, got {value}.")


def _is_a(kind: Any, value: Any) -> bool:
    if get_origin(kind) is list:
        return isinstance(value, (list, tuple)) and all(_is_a(get_args(kind)[0], item) for item in value)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    if kind in (dict[str, str], dict[str, float]):
        pairs = value.items() if isinstance(value, dict) else [(None, None)]
        return all(_is_a(part, item) for pair in pairs for part, item in zip(get_args(kind), pair, strict=True))
    return isinstance(value, {list: (list, tuple), str: (str, os.PathLike)}.get(kind, get_origin(kind) or kind))


def computes_in_bf16() -> bool:
    """Whether there is an accelerator that computes in bfloat16 itself. NVIDIA's before Ampere and Apple's first ones
    emulate it, slower than float32, and count as supporting it in torch and transformers."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return not torch.backends.mps.is_available() and is_torch_bf16_gpu_available()


def parse_json(name: str, value: Any) -> Any:
    """What a flag says, read here because an error of `json` would not name the flag."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"`{name}` must be JSON where it is text, got {value!r} ({error}).") from error


def check_call_kwargs(call_kwargs: dict[str, Any], named: dict[str, Any], owner: str) -> None:
    """Refuses what the trainer sets itself, and a key that is given as a field and in `call_kwargs`."""
    if taken := sorted(RESERVED_CALL_KWARGS & call_kwargs.keys()):
        raise ValueError(f"{owner}: `call_kwargs` may not hold {taken}: the trainer sets them itself; remove them.")
    # Each text is for all samples, and their number is that of a batch, which a list cannot know
    if lists := sorted(k for k, v in call_kwargs.items() if _TEXT.fullmatch(k) and isinstance(v, (list, tuple))):
        raise ValueError(
            f"{owner}: {lists[0]!r} in `call_kwargs` must be one text for all samples (one for each is a column of the "
            f"data), got {brief(call_kwargs[lists[0]])}."
        )
    if twice := sorted(key for key, value in named.items() if value is not None and key in call_kwargs):
        raise ValueError(
            f"{owner}: {twice} is given both as a field and in `call_kwargs`; give it once "
            f"(field: {[named[key] for key in twice]}, call_kwargs: {[call_kwargs[key] for key in twice]})."
        )


def scale_name(call_kwargs: Mapping[str, Any]) -> str:
    """What a pipeline calls the scale of its classifier-free guidance: of one whose `guidance_scale` is an input of its
    denoiser (FLUX, Qwen-Image) another argument, where that is given."""
    return "true_cfg_scale" if "true_cfg_scale" in call_kwargs else "guidance_scale"


def kernel_named(transition: str) -> Kernel:
    """Refuses a transition that does not exist."""
    if transition not in TRANSITIONS:
        raise ValueError(f"`transition` must be one of {list(TRANSITIONS)}, got {transition!r}.")
    return TRANSITIONS[transition]


def check_noise(transition: str, noise_level: float) -> None:
    """Refuses a transition that does not exist, or has no such noise."""
    kernel = kernel_named(transition)
    if not noise_level >= 0 or 0 < kernel.max_noise_level < noise_level:
        bounds: dict[float, list[str]] = {}
        for name, other in TRANSITIONS.items():
            if 0 < other.max_noise_level < math.inf:
                bounds.setdefault(other.max_noise_level, []).append(name)
        most = ", ".join(f"{bound:g} for {listed(names, 'and')}" for bound, names in bounds.items())
        raise ValueError(f"`noise_level` must be at least 0, and at most {most}; got {noise_level} for {transition!r}.")
    if noise_level > kernel.max_noise_level:
        noisy = [key for key, one in TRANSITIONS.items() if one.is_flow == kernel.is_flow and one.max_noise_level > 0]
        raise ValueError(
            f"`transition={transition!r}` has no noise, but `noise_level={noise_level}` was given; choose "
            f"{listed(noisy, 'or')}, or leave `noise_level` out."
        )


@dataclass
class DiffusionConfig(_BaseConfig):
    r"""
    What every diffusion trainer of this library shares. Extends TRL's base config, i.e.
    [`~transformers.TrainingArguments`], whose fields all work and mean the same.

    Args:
        model_init_kwargs (`dict`, *optional*):
            Keyword arguments for `DiffusionPipeline.from_pretrained` when `model` is a string.
        quantization_config (`dict` or [`~diffusers.PipelineQuantizationConfig`], *optional*):
            Which parts of the pipeline are loaded in fewer bits, and how: bitsandbytes (`"bitsandbytes_4bit"`,
            `"bitsandbytes_8bit"`) or `"torchao"`. A LoRA is trained on a quantised denoiser; teachers that are whole
            denoisers or pipelines in files are quantised alike. As a dict: `quant_backend`, `quant_kwargs` and
            `components_to_quantize` (`None`: all), or `quant_mapping`, `{part: {"quant_backend": ..., "quant_kwargs":
            ...}}`.
        attention_backend (`str`, *optional*):
            Which attention kernel the student's denoiser and those of its teachers use, by the names of diffusers'
            `set_attention_backend`: `"native"`, `"flash"`, `"_native_cudnn"`, ... `None`: diffusers' default.
        num_inference_steps (`int`, *optional*, defaults to `10`):
            Denoising steps of a training rollout.
        timestep_fraction (`float`, *optional*, defaults to `0.99`):
            The student learns at the first `K = max(1, int(num_inference_steps * timestep_fraction))` states of the
            rollout, and the steps after them are not computed. In (0, 1].
        guidance_scale, height, width (*optional*):
            Handed to the pipeline's `__call__`; `None` leaves the pipeline's own default. Lengths in pixels.
        call_kwargs (`dict`, *optional*):
            Anything else that the pipeline's `__call__` takes, e.g. `{"max_sequence_length": 128}`.
        input_columns (`list[str]`, *optional*):
            The dataset's columns that are handed to the pipeline for each sample, `prompt` besides. `None`: those that
            are named like what its `__call__` takes for each sample: texts (`negative_prompt`, ...), pictures (`image`,
            `mask_image`, `control_image`, ...), videos.
        teacher_placement (`str`, *optional*, defaults to `"device"`):
            Where denoisers wait that are the teachers' own (a LoRA teacher is an adapter of the student's denoiser; of
            a student that is trained in full, of one frozen copy). `"device"`: whole on every device. `"cpu"`: in CPU
            memory, each brought to the device for the micro-batches of its task. `"sharded"`: over the processes, by
            the engine that shards the student (FSDP2 or ZeRO-3).
        encode_ahead (`int`, *optional*):
            Optimizer steps whose calls of the pipelines begin together: they encode their prompts and pictures, wait
            before their first denoising step, with all that they hold in CPU memory, and go on when their turn comes,
            with the same numbers. The trainers that learn from rewards begin at most what is asked on one rollout.
            `None`: each call begins when it is asked.
        encoder_placement (`str`, *optional*):
            Where all that is no denoiser (text encoders, VAE) is meanwhile: `"cpu"`, in CPU memory, from where it comes
            to the device each time that calls begin, and for pictures and evaluation; or on the `"device"`. `None`:
            `"cpu"` with `encode_ahead`.
        ema_decay (`float`, *optional*):
            Decay, in [0, 1), of the exponential moving average of the trained weights, which then is what is evaluated,
            saved and published. `None` turns it off. The first update copies the trained weights, update `n + 1` has
            the decay `min(ema_decay, (1 + n) / (10 + n))`; what is left at the end of training is one more update.
        ema_update_every (`int`, *optional*, defaults to `8`):
            Optimizer steps between two updates of the average.
        nan_policy (`str`, *optional*, defaults to `"raise"`):
            What NaN or Inf in a prediction, a decoded picture, a loss or a gradient does to an optimizer step or an
            evaluation. `"raise"`: the run stops before the weights change, with a sentence that names teacher, task and
            step. `"skip"`: the step is left out, on all processes, with a warning, and counted in the metric
            `skipped_steps`; the metrics of the evaluation are NaN.
        image_steps (`int`, *optional*):
            Optimizer steps between two sets of sample images, written to `output_dir/images` and to the trackers in
            use. `None`: once, at the end of training. 0: never.
        image_prompts (`list[str]`, *optional*):
            Prompts of the sample images, with the pictures of the data's first rows where the pipeline is given some.
            `None`: the first row(s) of each task, four or more in all.
        image_num_inference_steps (`int`, *optional*):
            Denoising steps of the sample images, and of those that `eval_reward_funcs` score, drawn with the pipeline's
            own scheduler. `None`: `num_inference_steps`.
        resume_from_checkpoint (`str` or `bool`, *optional*):
            What `train()` goes on from: the folder of a checkpoint, or `True`, the last whole one of `output_dir`.

    Defaults that differ from TRL's: `learning_rate` (3e-4), `bf16` (on where the hardware computes in it, which
    excludes NVIDIA before Ampere, Apple's mps and CPUs: these train in float32 unless told otherwise),
    `gradient_checkpointing` (off: the graph of one denoising step lives at a time), `logging_nan_inf_filter` (off: a
    NaN is shown).
    """

    if TYPE_CHECKING:  # what transformers' `__post_init__` makes of them; they may be given in other forms
        output_dir: str = ""
        accelerator_config: Any = None
        report_to: Any = None

    _VALID_DICT_FIELDS = _BaseConfig._VALID_DICT_FIELDS + ["model_init_kwargs", "quantization_config", "call_kwargs"]

    model_init_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Keyword arguments for `DiffusionPipeline.from_pretrained`."}
    )
    quantization_config: dict | str | None = field(
        default=None, metadata={"help": "Parts that are loaded in fewer bits: a `PipelineQuantizationConfig` as JSON."}
    )
    attention_backend: str | None = field(
        default=None, metadata={"help": "Attention kernel of all denoisers, by diffusers' name. None: its default."}
    )
    num_inference_steps: int = field(default=10, metadata={"help": "Denoising steps of a training rollout."})
    timestep_fraction: float = field(
        default=0.99, metadata={"help": "The student learns at this first fraction of the denoising steps."}
    )
    guidance_scale: float | None = field(
        default=None, metadata={"help": "Guidance scale of the pipeline call. None: the pipeline's own default."}
    )
    height: int | None = field(default=None, metadata={"help": "Height in pixels. None: the pipeline's own default."})
    width: int | None = field(default=None, metadata={"help": "Width in pixels. None: the pipeline's own default."})
    call_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Anything else that the pipeline's `__call__` takes."}
    )
    input_columns: list[str] | None = field(
        default=None,
        metadata={"help": "Columns that reach the pipeline. None: those named like what it takes for each sample."},
    )
    teacher_placement: str = field(
        default="device",
        metadata={"help": "Where denoisers wait that are the teachers' own.", "choices": list(TEACHER_PLACEMENTS)},
    )
    encode_ahead: int | None = field(
        default=None, metadata={"help": "Optimizer steps whose prompts and pictures are encoded together. None: off."}
    )
    encoder_placement: str | None = field(
        default=None,
        metadata={
            "help": "Where encoders and VAE wait. None: on the cpu with `encode_ahead`.",
            "choices": list(ENCODER_PLACEMENTS),
        },
    )
    ema_decay: float | None = field(
        default=None, metadata={"help": "Decay of the moving average of the trained weights. None: off."}
    )
    ema_update_every: int = field(default=8, metadata={"help": "Optimizer steps between two updates of the average."})
    nan_policy: str = field(
        default="raise",
        metadata={"help": "What NaN or Inf does to an optimizer step.", "choices": list(NAN_POLICIES)},
    )
    image_steps: int | None = field(
        default=None,
        metadata={"help": "Optimizer steps between two sets of sample images. None: once, at the end. 0: never."},
    )
    image_prompts: list[str] | None = field(default=None, metadata={"help": "Prompts of the sample images."})
    image_num_inference_steps: int | None = field(
        default=None, metadata={"help": "Denoising steps of the sample images. None: `num_inference_steps`."}
    )

    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "What `train()` goes on from: the folder of a checkpoint, or true, the last one of `output_dir`.",
            "nargs": "?",
            "const": "true",
        },
    )
    learning_rate: float = field(default=3e-4, metadata={"help": "The initial learning rate."})
    gradient_checkpointing: bool | None = field(  # type: ignore[assignment]  # TRL's is never None
        default=None, metadata={"help": "Recompute activations in the backward pass to save memory."}
    )
    bf16: bool | None = field(
        default=None,
        metadata={"help": "Mixed precision in bfloat16. None: on where the hardware computes in it and fp16 is off."},
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide NaN and Inf in the logged loss. Off: they are shown."}
    )

    def __post_init__(self) -> None:
        resumes: Any = self.resume_from_checkpoint
        if isinstance(resumes, bool):  # from YAML
            self.resume_from_checkpoint = str(resumes).lower()
        check_types(self)
        if self.max_steps == 0:  # Trainer would go by the epochs
            self.max_steps, self.num_train_epochs = -1, 0
        for name in ("call_kwargs", "model_init_kwargs"):
            setattr(self, name, parse_json(name, getattr(self, name)))
            if not isinstance(getattr(self, name), (dict, type(None))):
                raise TypeError(f"`{name}` must be a dict, or JSON of one, got {getattr(self, name)!r}.")
        self._check_loading()
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and computes_in_bf16()
        if (backend := self.torch_compile_backend) is not None:
            # Those that torch has and accelerate knows
            known = {each.value.lower() for each in DynamoBackend} & set(torch.compiler.list_backends(None))
            if backend not in known:
                raise ValueError(f"`torch_compile_backend` must be one of {sorted(known)}, got {backend!r}.")
        metric = (self.metric_for_best_model or "").removeprefix("eval_")
        if self.greater_is_better is None and metric.split("/")[0] in ("kl", "loss"):
            self.greater_is_better = False  # transformers: True for any name that does not end in "loss"
        super().__post_init__()
        if self.fp16 and self.device.type == "cpu":  # accelerate would leave it out without a word
            raise ValueError(
                "`fp16=True` needs a GPU; on a CPU give `fp16=False` (float32), or `fp16=False, bf16=True, "
                "use_cpu=True`."
            )
        if not self.output_dir.strip():
            raise ValueError(f"`output_dir` must name a folder, got {self.output_dir!r}.")
        for path in (Path(self.output_dir), *Path(self.output_dir).parents):
            if path.is_file():
                raise ValueError(f"`output_dir={self.output_dir!r}` cannot be a folder: {str(path)!r} is a file.")
        call_kwargs: Any = self.call_kwargs or {}  # text no longer
        self.call_kwargs = call_kwargs
        check_call_kwargs(
            call_kwargs, {k: getattr(self, k) for k in ("guidance_scale", "height", "width")}, type(self).__name__
        )
        for least, names in {
            1: "num_inference_steps height width ema_update_every image_num_inference_steps encode_ahead "
            # transformers' own, which fail late or silently train on nothing
            "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps",
            0: "learning_rate weight_decay max_grad_norm seed data_seed dataloader_num_workers",
        }.items():
            for name in names.split():
                value = getattr(self, name)
                if value is not None and value < least:
                    raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        if self.seed >= 2**32:
            raise ValueError(f"`seed` must be below 2**32, got {self.seed}.")
        if not 0 < self.timestep_fraction <= 1:
            raise ValueError(f"`timestep_fraction` must be in (0, 1], got {self.timestep_fraction}.")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be in [0, 1) or None (off), got {self.ema_decay}.")
        if self.teacher_placement not in TEACHER_PLACEMENTS:
            raise ValueError(
                f"`teacher_placement` must be one of {list(TEACHER_PLACEMENTS)}, got {self.teacher_placement!r}."
            )
        if self.encoder_placement not in (None, *ENCODER_PLACEMENTS):
            raise ValueError(
                f"`encoder_placement` must be one of {list(ENCODER_PLACEMENTS)}, got {self.encoder_placement!r}."
            )
        if self.encoder_placement == "cpu" and self.encode_ahead is None:
            raise ValueError(
                "`encoder_placement='cpu'` would move the encoders in each micro-batch; say by `encode_ahead` for how "
                "many optimizer steps they encode at once."
            )
        if self.nan_policy not in NAN_POLICIES:
            raise ValueError(f"`nan_policy` must be one of {list(NAN_POLICIES)}, got {self.nan_policy!r}.")
        if self.nan_policy == "skip" and self.deepspeed_plugin is not None:
            raise ValueError(
                "`nan_policy='skip'` does not work with DeepSpeed, which updates the weights within the backward pass; "
                "use 'raise', or DDP."
            )
        if self.accelerator_config.split_batches:
            raise ValueError(
                "`accelerator_config={'split_batches': True}` would split a task's batch over the processes; leave it "
                "out: `per_device_train_batch_size` is the batch of one process."
            )
        # Every process reads a stream and takes its share: a batch of text cannot be sliced and sent by one of them
        self.accelerator_config.dispatch_batches = False
        # Trainer's own loops read these; ours do not
        for name, only in {
            "fp16_full_eval": False,
            "bf16_full_eval": False,
            "train_sampling_strategy": "random",
        }.items():
            if (value := getattr(self, name)) != only:
                raise ValueError(
                    f"`{name}={value!r}` is not supported: evaluation runs in the precision of training, and the tasks "
                    "come in turn; leave it out."
                )
        for name, nothing in {
            "neftune_noise_alpha": None,
            "label_smoothing_factor": 0.0,
            "use_liger_kernel": False,
        }.items():
            if (value := getattr(self, name)) != nothing:
                raise ValueError(f"`{name}={value!r}` is for language models, and means nothing here; leave it out.")
        if wrong := [prompt for prompt in self.image_prompts or [] if not is_prompt(prompt)]:
            raise ValueError(f"`image_prompts` must hold text of whole characters that is not empty, got {wrong[0]!r}.")
        if self.image_steps is not None and self.image_steps < 0:
            raise ValueError(f"`image_steps` must be at least 0 (never) or None (at the end), got {self.image_steps}.")

    def _check_loading(self) -> None:
        self.quantization_config = parse_json("quantization_config", self.quantization_config)
        if self.quantization_config is not None:
            check_quantization(self.quantization_config)
        if "quantization_config" in (self.model_init_kwargs or {}):
            raise ValueError(
                "`model_init_kwargs` may not hold 'quantization_config', which is a field of its own: "
                "`quantization_config`."
            )
        if self.attention_backend is not None:
            check_attention_backend(self.attention_backend)

    # What trackers are told, and some of them publish
    def to_dict(self) -> dict[str, Any]:
        return disclosed(super().to_dict() | {"quantization_config": as_json(self.quantization_config)})

    @property
    def num_learnt_steps(self) -> int:
        """`K`: the student learns at the first `K` states of a rollout."""
        return max(1, int(self.num_inference_steps * self.timestep_fraction))

    @property
    def pipeline_kwargs(self) -> dict[str, Any]:
        """Everything that goes to the pipeline's `__call__` besides what the trainer sets itself."""
        named = {"guidance_scale": self.guidance_scale, "height": self.height, "width": self.width}
        call_kwargs: Any = self.call_kwargs  # a dict since `__post_init__`
        return {**{k: v for k, v in named.items() if v is not None}, **call_kwargs}

    @property
    def mixed_dtype(self) -> torch.dtype:
        """The dtype that frozen modules are loaded in."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32


@dataclass
class DiffusionOPDConfig(DiffusionConfig):
    r"""
    Configuration of [`DiffusionOPDTrainer`]. The fields of [`DiffusionConfig`] and of
    [`~transformers.TrainingArguments`] apply too.

    The loss of a micro-batch is the mean over its samples, over the learnt steps and over the elements of the latent;
    an optimizer step averages the micro-batches of its window, which holds every task equally often. The paper's sums
    differ by constant factors (elements and steps) from these means, which are those of its released code.

    Args:
        transition (`str`, *optional*, defaults to `"ode"`):
            How the student moves: `"ode"`, `"flow_sde"`, `"dance_sde"`, `"cps"` for flow-matching pipelines; VP
            pipelines (epsilon or v prediction) always move by `"ddim"`, and `"ode"` there means `"ddim"` without noise.
        noise_level (`float`, *optional*):
            The `a` of the SDEs and of CPS, DDIM's eta. `None`: 0.7 for `"flow_sde"`, `"dance_sde"` and `"cps"`, 0 else.
            At 0 every kernel is deterministic and the objective takes its ODE form.
        objective (`str`, *optional*, defaults to `"kl"`):
            `"kl"`: `|mu_S - mu_T|^2 / (2 std^2)` with the true std of the step, `|mu_S - mu_T|^2 / 2` for a
            deterministic step. `"velocity"`: `(v_S - v_T)^2`. `"policy_gradient"`: the PPO-style surrogate, for
            comparison only.
        query (`str`, *optional*, defaults to `"first"`):
            At which of the first `K` states (`timestep_fraction`) a walk learns, the same for all samples of an
            optimizer step. `"first"`: at all of them. `"random"`: at `num_queries`, drawn without replacement.
            `"window"`: at so many in succession. `"beta"`: at those of index `floor(K u)`, `u ~ Beta(*query_beta)`
            (DanceOPD). States between are visited without gradient, nothing is computed after the last one, and
            evaluation is over all `K`.
        num_queries (`int`, *optional*):
            How many, at most `K`. `None`: 1; with `"first"` all.
        query_beta (`list[float]`, *optional*):
            The two parameters of `"beta"`, above 0. `None`: `[5.0, 2.0]`, on the side of low noise.
        target_extrapolation (`float`, *optional*, defaults to `1.0`):
            The target is `v_ref + target_extrapolation (v_T - v_ref)`: beyond the teacher above 1 (STEP-OPD, GFD-OPD:
            1.25). 1: the teacher itself, and no reference is asked. Above 0.
        target_ref (`str`, *optional*):
            What it extrapolates from: `"base"`, the student before training, asked with the arguments and columns of
            the task's teacher; or the id of a teacher (or `"anchor"`), asked with its own. `None`: `"base"`.
        guidance_split (`float`, *optional*):
            Matches the conditional branch and the direction of guidance apart (PDM, arXiv 2607.24731), where the guided
            predictions alone would let the errors of the two branches cancel: the objective of `v_c`, and
            `guidance_split` times that of `(v_w - v_c) / (w - 1)`. Student and teachers are asked with the student's
            `guidance_scale`, above 1, and without guidance. `None`: off.
        teacher_weight_column (`str`, *optional*):
            A column of numbers in [0, 1], one a sample: the target is `(1 - w) v_S + w v_T`, whose gradient is `w`
            times that of a plain sample. `None`: 1.
        anchor (`str`, *optional*):
            `"base"`: the loss holds the distance to the student before training too, at the same states and with the
            student's own arguments. Any other reference is the trainer's `anchor=Teacher(...)` (Flow-OPD: an aesthetic
            teacher). `None`: none.
        anchor_beta (`float`, *optional*):
            Weight of that distance. `None`: 0.04 (Flow-OPD).
        anchor_objective (`str`, *optional*):
            `"kl"` or `"velocity"`. `None`: `"kl"`.
        anchor_data_beta (`float`, *optional*):
            Weight of the flow-matching loss on the pictures of the trainer's `anchor_dataset`, a squared distance of
            velocities. `None`: 0.1 (LIFT) beside `objective="velocity"`; beside another one, of other units, it must be
            given.
        task_weights (`dict[str, float]`, *optional*):
            By teacher id, how often a task comes; 1 for those left out. With `task_sampling="cycle"` whole numbers: so
            many micro-batches of a cycle (Flow-OPD: `{"ocr": 1, "geneval": 3}`), and `gradient_accumulation_steps` is a
            multiple of their sum; with `"mixed"` so many shares of a micro-batch, whose size is a multiple. With
            `"random"` in proportion.
        task_sampling (`str`, *optional*, defaults to `"cycle"`):
            `"cycle"`: an optimizer step sees every task (the paper). `"random"`: one task, drawn anew for each step
            from `seed`, for all processes and accumulated micro-batches (DanceOPD's routes). `"mixed"`: each
            micro-batch sees every task, its `per_device_train_batch_size` samples being shared out: the student walks
            once for all of them, and each teacher follows its own. All teachers are on the device at once.
    """

    transition: str = field(default="ode", metadata={"help": "How the student moves.", "choices": list(TRANSITIONS)})
    noise_level: float | None = field(
        default=None, metadata={"help": "Noise of the transition. None: 0.7 for the SDEs and CPS, 0 else."}
    )
    objective: str = field(default="kl", metadata={"help": "What is asked of it.", "choices": list(OBJECTIVES)})
    query: str = field(default="first", metadata={"help": "At which states it learns.", "choices": list(QUERIES)})
    num_queries: int | None = field(default=None, metadata={"help": "At how many of them. None: 1, of 'first' all."})
    query_beta: list[float] | None = field(
        default=None, metadata={"help": "The two parameters of the query 'beta'. None: 5 and 2."}
    )
    target_extrapolation: float = field(
        default=1.0, metadata={"help": "How far the target lies on the way from a reference to the teacher."}
    )
    target_ref: str | None = field(
        default=None, metadata={"help": "That reference: base, or the id of a teacher. None: base."}
    )
    guidance_split: float | None = field(
        default=None, metadata={"help": "Weight of the direction of guidance, matched by itself. None: off."}
    )
    teacher_weight_column: str | None = field(
        default=None, metadata={"help": "Column of how much of the teacher is in each sample's target. None: 1."}
    )
    anchor: str | None = field(
        default=None, metadata={"help": "What the student stays near to. None: nothing.", "choices": [BASE]}
    )
    anchor_beta: float | None = field(
        default=None, metadata={"help": "Weight of the distance to the anchor. None: 0.04."}
    )
    anchor_objective: str | None = field(
        default=None, metadata={"help": "How it is measured. None: kl.", "choices": list(ANCHOR_OBJECTIVES)}
    )
    anchor_data_beta: float | None = field(
        default=None,
        metadata={"help": "Weight of the flow-matching loss on real pictures. None: 0.1 beside 'velocity'."},
    )
    task_weights: dict | str | None = field(  # a flag is read as the second of these: JSON
        default=None, metadata={"help": "How often each task comes, as JSON. None: equally often."}
    )
    task_sampling: str = field(
        default="cycle",
        metadata={"help": "Whether a step sees every task, or one.", "choices": list(TASK_SAMPLINGS)},
    )

    def __post_init__(self) -> None:
        self.task_weights = parse_json("task_weights", self.task_weights)
        super().__post_init__()
        if self.objective not in OBJECTIVES:
            raise ValueError(f"`objective` must be one of {list(OBJECTIVES)}, got {self.objective!r}.")
        if self.noise_level is None:
            self.noise_level = kernel_named(self.transition).default_noise_level
        check_noise(self.transition, self.noise_level)
        objective = OBJECTIVES[self.objective]
        if objective.needs_noise and self.noise_level == 0:
            raise ValueError(
                f"`objective={self.objective!r}` needs a stochastic transition: a deterministic step has no "
                f"probability; got `transition={self.transition!r}` with `noise_level=0`."
            )
        last_step_is_learnt = self.num_learnt_steps == self.num_inference_steps
        is_exact = kernel_named(self.transition).is_exact_at_the_end
        if is_exact and self.noise_level > 0 and objective.divides_by_std and last_step_is_learnt:
            raise ValueError(
                f"the last step of {self.transition!r} has zero std, so its {self.objective!r} is not defined; set "
                f"`timestep_fraction` below 1 (now {self.timestep_fraction} of {self.num_inference_steps} steps)."
            )
        self._check_query()
        self._check_target()
        self._check_anchor()
        self._check_tasks()

    def _check_query(self) -> None:
        if self.query not in QUERIES:
            raise ValueError(f"`query` must be one of {list(QUERIES)}, got {self.query!r}.")
        if self.num_queries is not None:
            if not QUERIES[self.query].counts:
                raise ValueError(
                    f"`query={self.query!r}` learns at all of the first {self.num_learnt_steps} states "
                    f"(`timestep_fraction`), so `num_queries={self.num_queries}` means nothing; leave it out, or "
                    f"choose {listed([name for name, query in QUERIES.items() if query.counts], 'or')}."
                )
            if not 1 <= self.num_queries <= self.num_learnt_steps:
                raise ValueError(
                    f"`num_queries` must be from 1 to {self.num_learnt_steps}, the states of a walk that are learnt "
                    f"from (`timestep_fraction`), got {self.num_queries}."
                )
        if self.query_beta is not None:
            if self.query != "beta":
                raise ValueError(f"`query_beta` is for `query='beta'`, got `query={self.query!r}`; leave it out.")
            if len(self.query_beta) != 2 or not all(0 < value < math.inf for value in self.query_beta):
                raise ValueError(f"`query_beta` must hold two numbers above 0, got {self.query_beta}.")

    def _check_target(self) -> None:
        if not self.target_extrapolation > 0:
            raise ValueError(f"`target_extrapolation` must be above 0, got {self.target_extrapolation}.")
        if self.target_ref is not None and self.target_extrapolation == 1:
            raise ValueError(
                f"`target_ref={self.target_ref!r}` is what `target_extrapolation` begins at, which is 1, the teacher "
                "itself; set that, or leave this out."
            )
        if self.guidance_split is None:
            return
        if not self.guidance_split >= 0:
            raise ValueError(f"`guidance_split` must be at least 0, got {self.guidance_split}.")
        scale = self.pipeline_kwargs.get(scale_name(self.pipeline_kwargs))
        if not isinstance(scale, (int, float)) or scale <= 1:
            raise ValueError(
                "`guidance_split` asks student and teachers with and without guidance, and needs a `guidance_scale` "
                f"above 1 to measure the direction of guidance by; got {scale}."
            )
        further = [key for key in self.pipeline_kwargs if "guidance_scale" in key and key != "guidance_scale"]
        if further and scale_name(self.pipeline_kwargs) == "guidance_scale":
            raise ValueError(
                f"`guidance_split` measures the direction of guidance by one scale, and {further[0]!r} is another; "
                "leave one out."
            )
        if OBJECTIVES[self.objective].needs_noise:
            raise ValueError(
                f"`guidance_split` is a sum of two distances, and `objective={self.objective!r}` is none; choose 'kl' "
                "or 'velocity'."
            )
        if self.target_extrapolation != 1:
            raise ValueError(
                "`guidance_split` matches two branches of the teacher, and `target_extrapolation` moves the guided "
                "prediction beyond it; leave one out."
            )

    def _check_anchor(self) -> None:
        if self.anchor not in (None, BASE):
            raise ValueError(
                f"`anchor` must be {BASE!r} or None, got {self.anchor!r}; a reference of its own is the trainer's "
                "`anchor=Teacher(...)`."
            )
        if self.anchor_objective not in (None, *ANCHOR_OBJECTIVES):
            raise ValueError(
                f"`anchor_objective` must be one of {list(ANCHOR_OBJECTIVES)}, got {self.anchor_objective!r}."
            )
        for name in ("anchor_beta", "anchor_data_beta"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"`{name}` must be above 0, got {value}; leave it out.")

    def _check_tasks(self) -> None:
        if self.task_sampling not in TASK_SAMPLINGS:
            raise ValueError(f"`task_sampling` must be one of {list(TASK_SAMPLINGS)}, got {self.task_sampling!r}.")
        if self.task_sampling == "mixed" and self.teacher_placement == "cpu":
            raise ValueError(
                "`task_sampling='mixed'` asks all teachers at once, and `teacher_placement='cpu'` has all but one of "
                "them wait in CPU memory; choose 'cycle', or another placement."
            )
        weights: Any = {} if self.task_weights is None else self.task_weights
        if not _is_a(dict[str, float], weights):
            raise TypeError(f"`task_weights` must be a dict of numbers by teacher id, or JSON of one, got {weights!r}.")
        for task, weight in weights.items():
            if not 0 < weight < math.inf:
                raise ValueError(f"`task_weights` must be finite and above 0, got {weight} for {task!r}.")
            if self.task_sampling != "random" and weight != int(weight):
                raise ValueError(
                    f"`task_weights` count turns of a cycle, and must be whole numbers, got {weight} for "
                    f"{task!r}; `task_sampling='random'` takes any."
                )

    @property
    def weights_by_task(self) -> dict[str, float]:
        """Those of `task_weights`."""
        weights: Any = self.task_weights  # no text since `__post_init__`
        return weights or {}

    @property
    def query_shape(self) -> tuple[float, float]:
        """The two parameters of the query `"beta"`."""
        first, second = self.query_beta or (5.0, 2.0)
        return first, second
