"""A diffusers pipeline as a policy (it rolls out, with gradient) and as a field (it predicts at a given state and
time).

No line here knows a model family: the pipeline's own `__call__` runs, with our object in the place of its scheduler.
Every [`Policy`] works on shallow copies of its pipeline (modules shared, private state its own), because a pipeline
that is called inside the `step` of a running call overwrites that call's guidance. The seams that a pipeline must have:
an undecorated `__call__` that asks `scheduler.step` once a denoising step, `encode_prompt`, and `prepare_latents`.

This file knows no trainer, no loss and no data.
"""

import contextlib
import copy
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import convert_to_fp32
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL.Image import Image
from torch import Tensor, nn

from .errors import reason
from .transitions import Schedule


@dataclass(frozen=True)
class Step:
    """What a pipeline hands to its scheduler: the visited state and what the model predicts there.

    Attributes:
        index (`int`): Which denoising step, from 0.
        timestep (`Tensor`): The pipeline's own time, 0-dimensional.
        sample (`Tensor`): The visited state, without gradient, in the pipeline's own shape and dtype.
        prediction (`Tensor`): The guided prediction, with its graph.
        schedule (`Schedule`): The noise levels of the rollout.
    """

    index: int
    timestep: Tensor
    sample: Tensor
    prediction: Tensor
    schedule: Schedule


OnStep = Callable[[Step], Tensor]

# Arguments of `__call__`; an IP adapter is an option of any pipeline
PICTURE = re.compile(r"^(?!.*ip_adapter)(\w+_)?(images?|video|audio)$")
BACKBONE = ""  # as the name of an adapter: none at all


def is_flow(scheduler: Any) -> bool:
    """Whether the scheduler belongs to flow matching (`x = (1 - s) x_0 + s eps`), by its class or its config."""
    names = [cls.__name__ for cls in type(scheduler).__mro__]
    return any("FlowMatch" in name for name in names) or scheduler.config.get("prediction_type") == "flow_prediction"


def own_scheduler(scheduler: Any) -> Any:
    """A scheduler of our own with the timesteps of the given one. VP models run under DDIM: solvers of higher order
    repeat timesteps or rescale the state (PNDM, Euler).

    Raises:
        ValueError: if a scheduler of a VP model has other noise levels than DDIM takes from its config.
    """
    if is_flow(scheduler):
        return copy.deepcopy(scheduler)
    ddim = DDIMScheduler.from_config(scheduler.config)
    alphas = getattr(scheduler, "alphas_cumprod", None)  # EDM's schedulers have none
    if alphas is None or not torch.allclose(alphas.cpu().float(), ddim.alphas_cumprod, atol=1e-4):
        raise ValueError(
            f"{type(scheduler).__name__}: VP models run under DDIM, which takes other noise levels from this config; "
            "give the pipeline a `DDIMScheduler` of its noise levels."
        )
    return ddim


def read_schedule(scheduler: Any) -> Schedule:
    """The noise levels of a scheduler after `set_timesteps`.

    Raises:
        ValueError: if the levels are not strictly monotone (solvers of higher order) or the prediction type is unknown.
    """
    if is_flow(scheduler):
        schedule = Schedule(tuple(scheduler.sigmas.tolist()))
        steps = [b - a for a, b in zip(schedule.levels, schedule.levels[1:], strict=False)]
        if schedule.levels[0] > 1 or schedule.levels[-1] < 0 or any(step >= 0 for step in steps):
            raise ValueError(
                f"{type(scheduler).__name__}: a rollout needs sigmas that fall from at most 1 to 0, "
                f"got {[round(level, 4) for level in schedule.levels]}; use a first-order scheduler."
            )
        return schedule
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"{type(scheduler).__name__}: prediction type {scheduler.config.prediction_type!r} is not supported; "
            "'epsilon' and 'v_prediction' are."
        )
    alphas = scheduler.alphas_cumprod[scheduler.timesteps.cpu()].tolist()
    return Schedule((*alphas, float(scheduler.final_alpha_cumprod)), scheduler.config.prediction_type)


def denoiser_name(pipeline: DiffusionPipeline) -> str:
    """The attribute of the pipeline that holds its denoiser: `"transformer"` or `"unet"`.

    Raises:
        ValueError: if the pipeline has none of them, or two.
    """
    names = [name for name in ("transformer", "unet") if isinstance(getattr(pipeline, name, None), nn.Module)]
    if len(names) != 1 or getattr(pipeline, "transformer_2", None) is not None:
        raise ValueError(
            f"{type(pipeline).__name__} has no single denoiser: exactly one of `transformer` and `unet` and no "
            f"`transformer_2` is needed, got {sorted(pipeline.components)}."
        )
    return names[0]


class _Seat:
    """Sits in the place of a scheduler: everything is the scheduler's own, its class too, but `step`, which is ours."""

    __slots__ = ("_scheduler", "in_step")  # and no `__dict__`: what a pipeline sets lands in the scheduler

    def __init__(self, scheduler: Any):
        self._scheduler, self.in_step = scheduler, False

    __class__: Any = property(lambda self: type(self._scheduler))  # some pipelines ask `isinstance`

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_scheduler"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            object.__setattr__(self, name, value)
        except AttributeError:
            setattr(self._scheduler, name, value)


class _RolloutSeat(_Seat):
    __slots__ = ("_on_step", "_num_steps", "_schedule", "index")

    def __init__(self, scheduler: Any, on_step: OnStep, num_steps: int | None):
        super().__init__(scheduler)
        self._on_step, self._num_steps, self.index = on_step, num_steps, 0
        self._schedule: Schedule | None = None

    @property
    def timesteps(self) -> Tensor:
        # Fewer timesteps, not an exception, end a rollout early: the pipeline leaves its `__call__` as always
        return self._scheduler.timesteps[: self._num_steps]

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **kwargs: Any) -> SchedulerOutput:
        self.in_step = True
        if self._schedule is None:
            self._schedule = read_schedule(self._scheduler)
        if self.index == len(self.timesteps):
            raise ValueError("The pipeline lacks a seam: it calls `scheduler.step` more often than once a timestep.")
        next_sample = self._on_step(Step(self.index, timestep, sample.detach(), model_output, self._schedule))
        self.in_step = False
        self.index += 1
        self._scheduler._step_index = self.index  # some schedulers' `scale_model_input` reads it
        return SchedulerOutput(next_sample.detach().to(sample.dtype))


class _FieldSeat(_Seat):
    __slots__ = ("timesteps", "prediction")

    def __init__(self, scheduler: Any, timestep: Tensor):
        super().__init__(scheduler)
        self.timesteps = timestep.reshape(1)
        self.prediction: Any = None  # until the pipeline steps

    # `retrieve_timesteps` of the pipelines reads this signature to learn what a scheduler takes
    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        pass

    def set_begin_index(self, begin_index: int = 0) -> None:
        pass

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **kwargs: Any) -> SchedulerOutput:
        self.prediction = model_output
        return SchedulerOutput(sample)


class Routed:
    """A denoiser whose calls go to a wrapper (DDP, DeepSpeed, a function) and whose attributes are its own."""

    def __init__(self, module: nn.Module, wrapper: Callable[..., Any]):
        self._module, self._wrapper = module, wrapper

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapper(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class PromptMemo:
    """Remembers what `encode_prompt` returned, for all parties that share their encoders. Clear it after each batch.

    The key is every argument of the call, bound to the signature (numbers and flags too, tensors and images by
    content), plus the identity of the modules that encode and the pipeline's settings.

    Args:
        timing (`Callable`, *optional*): A context manager to run the encoders in.
    """

    def __init__(self, timing: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext):
        self._store: dict[Any, Any] = {}
        self._timing = timing
        self.num_encodings = 0

    def clear(self) -> None:
        self._store.clear()

    def encode(self, pipeline: DiffusionPipeline, encoders: Any, *args: Any, **kwargs: Any) -> Any:
        """`pipeline.encode_prompt(*args, **kwargs)`, once for equal arguments and `encoders`, without gradient."""
        encode_prompt = type(pipeline).encode_prompt
        bound = _signature(encode_prompt).bind(None, *args, **kwargs)
        bound.apply_defaults()
        key = (encode_prompt, encoders, _content(bound.arguments))
        if key not in self._store:
            # Encoders run in their own dtype also inside a party's mixed precision: what is shared must not depend on
            # who asks
            own_dtype = torch.autocast(pipeline._execution_device.type, enabled=False)
            with torch.no_grad(), own_dtype, self._timing():
                # The arguments stay alive with their entry: an object that is known by its id keeps it
                self._store[key] = encode_prompt(pipeline, *args, **kwargs), bound
            self.num_encodings += 1
        return _fresh_containers(self._store[key][0])


_signature = functools.cache(inspect.signature)


def _encoders(pipeline: DiffusionPipeline) -> Any:
    """What `encode_prompt` reads besides its arguments: the modules that encode, and settings as SDXL's
    `force_zeros_for_empty_prompt`."""
    components = pipeline.components
    others = {"scheduler", "transformer", "unet", "vae", "safety_checker", "feature_extractor"}
    parts = {name: id(part) for name, part in components.items() if name not in others}
    settings = {k: v for k, v in pipeline.config.items() if k not in components and not k.startswith("_")}
    return _content([parts, settings])


def _content(value: Any) -> Any:
    """A hashable stand-in that is equal for equal values."""
    if isinstance(value, Tensor):
        raw = value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
        return ("tensor", value.dtype, value.device, value.shape, raw)
    if isinstance(value, (Image, np.ndarray)):
        array = np.asarray(value)
        return (type(value).__name__, array.dtype.str, array.shape, array.tobytes())
    if isinstance(value, dict):
        return ("dict", *((key, _content(item)) for key, item in sorted(value.items())))
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *(_content(item) for item in value))
    try:
        hash(value)
    except TypeError:
        return ("object", id(value))
    return (type(value).__name__, value)


def _fresh_containers(value: Any) -> Any:
    """The same in lists and dicts of its own: Z-Image edits the lists of prompts and embeddings that it is given."""
    if type(value) is dict:
        return {key: _fresh_containers(item) for key, item in value.items()}
    return type(value)(_fresh_containers(item) for item in value) if type(value) in (list, tuple) else value


def sample_arguments(pipeline_class: type[DiffusionPipeline]) -> set[str]:
    """The arguments of a pipeline's `__call__` that say what a sample is made of besides its prompt: further texts,
    pictures, videos, embeddings. Told by their annotations, which for one value a sample allow a list of texts, a
    picture or a tensor."""
    annotations = {name: str(p.annotation) for name, p in inspect.signature(pipeline_class.__call__).parameters.items()}
    return {
        name
        for name, annotation in annotations.items()
        if re.search(r"[Ll]ist\[str\]|Image|Tensor|Condition", annotation)
        and "callback" not in name
        and name not in ("prompt", "latents", "sigmas")
    }


def tuner_layers(denoiser: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]


@contextlib.contextmanager
def active_adapter(layers: Sequence[BaseTunerLayer], name: str) -> Iterator[None]:
    """Another adapter, or the bare [`BACKBONE`], for the duration. PEFT's `set_adapter` would also set `requires_grad`,
    which drops gradients and raises under sharding, so the attribute that it sets last is set alone."""
    before = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = [] if name == BACKBONE else [name]
    try:
        yield
    finally:
        for layer, adapter in zip(layers, before, strict=True):
            layer._active_adapter = adapter


class Policy:
    """A pipeline that rolls out and that predicts.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]): Left as it is.
        num_inference_steps (`int`): Denoising steps of a whole rollout.
        call_kwargs (`dict`, *optional*): For the pipeline's `__call__`: guidance, size, negative prompt ...
        memo ([`PromptMemo`], *optional*): Shared by the parties of one batch. `None`: its own.
        adapter (`str`, *optional*): PEFT adapter of the denoiser that this policy is, or [`BACKBONE`]; by default
            whatever is active.
        autocast (`Callable`, *optional*): A context manager for each call of the denoiser, and for nothing else of the
            pipeline: a VAE may ask for float32. Under mixed precision what the denoiser predicts is float32.

    Raises:
        ValueError: if the pipeline lacks a seam, or `call_kwargs` holds a key that its `__call__` does not take; and at
            the first run, if that `__call__` fails.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        num_inference_steps: int,
        call_kwargs: dict[str, Any] | None = None,
        memo: PromptMemo | None = None,
        adapter: str | None = None,
        autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        self.denoiser_name = denoiser_name(pipeline)
        check_seams(pipeline)
        self.call_kwargs = dict(call_kwargs or {})
        accepted = inspect.signature(type(pipeline).__call__).parameters
        if unknown := sorted(self.call_kwargs.keys() - accepted.keys()):
            raise ValueError(
                f"{type(pipeline).__name__} takes no argument {unknown}; it takes {sorted(accepted.keys() - {'self'})}."
            )
        self.num_inference_steps, self.adapter = num_inference_steps, adapter
        self.memo = memo or PromptMemo()
        self._pipeline, self._autocast = pipeline, autocast
        self.denoiser = getattr(pipeline, self.denoiser_name)
        self._layers = tuner_layers(self.denoiser) if adapter is not None else []
        self._encoders = _encoders(pipeline)
        # One scheduler each: a field is asked in the middle of a rollout
        self._rollout_scheduler = own_scheduler(pipeline.scheduler)
        self._field_scheduler = own_scheduler(pipeline.scheduler)
        self._scratch_generator: torch.Generator | None = None
        self._has_worked: set[type] = set()  # with which seats

    def _denoise(self, denoiser: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._autocast():
            output = denoiser(*args, **kwargs)
            mixed = torch.is_autocast_enabled(next(self.denoiser.parameters()).device.type)
        # As accelerate does it: guidance, kernel and loss are differences of nearly equal numbers
        return convert_to_fp32(output) if mixed else output

    @contextlib.contextmanager
    def _copy(self, seat: _Seat, denoiser: Callable[..., Any] | None) -> Iterator[DiffusionPipeline]:
        pipeline = copy.copy(self._pipeline)
        pipeline.set_progress_bar_config(disable=True)
        # Past `DiffusionPipeline.__setattr__`, which writes into the config
        encode_prompt = functools.partial(self.memo.encode, pipeline, self._encoders)
        vars(pipeline).update(scheduler=seat, encode_prompt=encode_prompt)
        denoise = functools.partial(self._denoise, self.denoiser if denoiser is None else denoiser)
        vars(pipeline)[self.denoiser_name] = Routed(self.denoiser, denoise)
        try:
            yield pipeline
        finally:
            # Its own functions refer to it: a cycle that would hold the graph until the next garbage collection
            vars(pipeline).clear()

    def _call(
        self, pipeline: DiffusionPipeline, prompts: Sequence[str], generator: Any, output_type: str = "latent"
    ) -> Any:
        switch = contextlib.nullcontext() if self.adapter is None else active_adapter(self._layers, self.adapter)
        seat = pipeline.scheduler
        call: Any = type(pipeline).__call__
        try:
            with switch:
                output = call.__wrapped__(
                    pipeline,
                    prompt=list(prompts),
                    num_inference_steps=self.num_inference_steps,
                    generator=generator,
                    output_type=output_type,
                    return_dict=False,
                    **_fresh_containers(self.call_kwargs),
                )[0]
        except Exception as error:
            if seat.in_step or type(seat) in self._has_worked:  # not the pipeline's, or not for how it is called
                raise
            raise ValueError(
                f"{type(pipeline).__name__} fails in its own `__call__`: {reason(error)}{self._hint(error)}"
            ) from error
        self._has_worked.add(type(seat))
        return output

    def _hint(self, error: Exception) -> str:
        """What a pipeline that fails may need: encoders that it was loaded without, or arguments without a value, its
        required ones or else its pictures."""
        encoders = [name for name in self._pipeline.components if name.startswith(("text_encoder", "tokenizer"))]
        absent = [name for name in encoders if getattr(self._pipeline, name) is None]
        if absent and "NoneType" in str(error):
            return f"; it is without its {absent}: load it with them, or give it an `encode_prompt` that does without"
        parameters = _signature(type(self._pipeline).__call__).parameters.values()
        required = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        pictures = [p.name for p in parameters if p.default is None and PICTURE.search(p.name)]
        needed = [name for name in required if name not in ("self", "prompt")] or pictures
        if not (lacking := [name for name in needed if name not in self.call_kwargs]):
            return ""
        return (
            f"; it may need {lacking}: give one for the whole run, `call_kwargs={{{lacking[0]!r}: ...}}`, or use a "
            "pipeline of text alone"
        )

    def rollout(
        self,
        prompts: Sequence[str],
        generators: list[torch.Generator],
        on_step: OnStep,
        num_steps: int | None = None,
        denoiser: nn.Module | None = None,
        output_type: str = "latent",
    ) -> Any:
        """Runs the pipeline's own `__call__`, under the caller's gradient mode, with `on_step` deciding each next
        state.

        Args:
            prompts (`Sequence[str]`): The batch.
            generators (`list[torch.Generator]`): One a sample, for the initial noise.
            on_step (`Callable[[Step], Tensor]`): Returns the next state; called once a denoising step.
            num_steps (`int`, *optional*): Only the first so many steps are computed.
            denoiser (`nn.Module`, *optional*): A wrapper around the denoiser (DDP, DeepSpeed) that its calls go
                through.
            output_type (`str`, *optional*): `"latent"`, or `"pil"` to decode the final latents.

        Returns:
            The final latents (`Tensor`), images or videos, as the pipeline returns them.
        """
        seat = _RolloutSeat(self._rollout_scheduler, on_step, num_steps)
        with self._copy(seat, denoiser) as pipeline:
            output = self._call(pipeline, prompts, generators, output_type)
        if seat.index != len(seat.timesteps):
            raise ValueError(
                f"{type(self._pipeline).__name__} lacks a seam: it called `scheduler.step` {seat.index} times for "
                f"{len(seat.timesteps)} timesteps; one call a timestep is needed."
            )
        return output

    def predict(self, x: Tensor, timestep: Tensor, prompts: Sequence[str], denoiser: nn.Module | None = None) -> Tensor:
        """The guided prediction at state `x` (in the pipeline's own latent shape) and `timestep`: the field. Under the
        caller's gradient mode; `denoiser`: as for [`rollout`]."""
        seat = _FieldSeat(self._field_scheduler, timestep)
        if self._scratch_generator is None:  # its own, so that the global generator is left alone
            self._scratch_generator = torch.Generator(x.device)
        with self._copy(seat, denoiser) as pipeline:
            prepare_latents = pipeline.prepare_latents

            def given_latents(*args: Any, **kwargs: Any) -> Any:
                # The pipeline's own call makes what comes with the latents (position ids); its noise is dropped
                prepared = prepare_latents(*args, **kwargs)
                return (x, *prepared[1:]) if isinstance(prepared, tuple) else x

            vars(pipeline)["prepare_latents"] = given_latents
            self._call(pipeline, prompts, self._scratch_generator)
        return seat.prediction

    @torch.no_grad()
    def self_check(self, prompts: Sequence[str], num_steps: int = 2) -> list[Step]:
        """Compares the field with the pipeline's own run at its first `num_steps` states.

        Returns:
            `list[Step]`: the steps of that run.

        Raises:
            ValueError: if the field disagrees with the run, or a prediction is not finite.
        """
        steps: list[Step] = []

        def record(step: Step) -> Tensor:
            steps.append(step)
            level, level_next = step.schedule.levels[step.index : step.index + 2]
            return step.sample.float() + (level_next - level) * step.prediction.float()

        generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
        self.rollout(prompts, generators, record, num_steps=num_steps)
        for step in steps:
            if not step.prediction.isfinite().all():
                raise ValueError(
                    f"{type(self._pipeline).__name__} predicts NaN or infinity at step {step.index}: its "
                    f"{self.denoiser_name} holds such numbers, or {step.prediction.dtype} is too narrow for it."
                )
            prediction = self.predict(step.sample, step.timestep, prompts)
            gap = _relative_gap(prediction, step.prediction)
            # The same numbers through the same kernels: what is left is the non-determinism of some GPU kernels
            if not gap < (1e-4 if prediction.dtype == torch.float32 else 2e-2):
                raise ValueError(
                    f"{type(self._pipeline).__name__} cannot be asked at a given state: its prediction at step "
                    f"{step.index} differs from its own run by {gap:.1e} (relative). Something in its `__call__` "
                    "depends on the steps before."
                )
        return steps


def _relative_gap(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    return ((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-12)).item()


def check_seams(pipeline: DiffusionPipeline) -> None:
    """Raises a `ValueError` that names the first seam which the pipeline lacks, or a part that is offloaded."""
    cls = type(pipeline)
    missing = None
    if not hasattr(cls.__call__, "__wrapped__"):
        missing = "its `__call__` is not decorated with `torch.no_grad()`, so there is no version with gradient to run"
    elif not callable(getattr(cls, "encode_prompt", None)):
        missing = "it has no `encode_prompt`"
    elif not callable(getattr(cls, "prepare_latents", None)):
        missing = "it has no `prepare_latents`"
    elif not hasattr(getattr(pipeline, "scheduler", None), "step"):
        missing = "it has no `scheduler` with a `step`"
    if missing:
        raise ValueError(f"{cls.__name__} lacks a seam that on-policy distillation needs: {missing}.")
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module) and _is_offloaded(part):
            raise ValueError(
                f"{cls.__name__} is offloaded: its {name} has hooks that move it to and fro; build the pipeline "
                "without `enable_*_offload()` and `device_map`."
            )


def _is_offloaded(module: nn.Module) -> bool:
    # A registry of diffusers alone says nothing: a pipeline's first call leaves an empty one behind
    registries: list[Any] = [part._diffusers_hook for part in module.modules() if hasattr(part, "_diffusers_hook")]
    return hasattr(module, "_hf_hook") or any(registry.get_hook("group_offloading") for registry in registries)
