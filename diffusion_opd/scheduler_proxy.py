"""What sits in the place of a pipeline's scheduler: a shallow copy of it, of its exact type, whose `step` asks the call
that it belongs to where to go. A pipeline that copies its scheduler (LTX-2 for the audio, SkyReels-V2 for each latent
frame) opens one more stream; one that sets its timesteps again begins a chunk.

This file knows schedulers, and no pipeline, denoiser or trainer.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from .transitions import Schedule


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
    if scheduler.config.get("use_flow_sigmas"):
        raise ValueError(
            f"{type(scheduler).__name__} has the noise levels of flow matching (`use_flow_sigmas`) for a model that "
            f"predicts {scheduler.config.get('prediction_type')!r}; `prediction_type` must be 'flow_prediction'."
        )
    # Of those that know no clipping it would be DDIM's default
    clips = scheduler.config.get("clip_sample", False)
    ddim = DDIMScheduler.from_config(scheduler.config, clip_sample=clips)
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
    if alphas[0] == 0 and scheduler.config.prediction_type == "epsilon":
        raise ValueError(
            f"{type(scheduler).__name__}: at a zero signal-to-noise ratio (`rescale_betas_zero_snr`) a prediction of "
            "the noise says nothing of the sample; 'v_prediction' does."
        )
    return Schedule((*alphas, float(scheduler.final_alpha_cumprod)), scheduler.config.prediction_type)


@dataclass(frozen=True)
class Step:
    """What a pipeline hands to its scheduler: the visited state and what the model predicts there.

    Attributes:
        stream (`int`): Of those that the pipeline steps, in the order in which each steps first.
        chunk (`int`): How often the pipeline has set the timesteps of this stream before.
        index (`int`): Of the noise level in `schedule.levels`.
        timestep (`Tensor`): The pipeline's own time.
        sample (`Tensor`): The visited state, without gradient, in the pipeline's own shape and dtype.
        prediction (`Tensor`): The guided prediction, with its graph.
        schedule (`Schedule`): The noise levels.
        next_sample (`Tensor`, *optional*): Where it goes from here, of the shape of `sample`, without gradient.
    """

    stream: int
    chunk: int
    index: int
    timestep: Tensor
    sample: Tensor
    prediction: Tensor
    schedule: Schedule
    next_sample: Tensor | None = None


@dataclass(frozen=True)
class Times:
    """What `set_timesteps` has set."""

    timesteps: Tensor
    sigmas: Tensor | None


SchedulerStep = Callable[[], tuple[Tensor, Step]]


class Call(Protocol):
    """What a proxy asks."""

    proxies: list[Any]

    def times(self, number: int, chunk: int, own: Times) -> Times:
        """The timesteps of the `number`-th proxy after it has set its `own` for the `chunk`-th time."""

    def begin(self, number: int, chunk: int, find: Callable[[], int]) -> int:
        """Which noise level its first step is at; `find` waits for the device."""

    def stream(self, number: int) -> int:
        """The stream of a proxy that steps."""

    def step(self, step: Step, scheduler_step: SchedulerStep) -> Tensor:
        """The next state, of the dtype of `step.sample`; `scheduler_step()` is that of the scheduler itself, and the
        step that it takes it for."""


def proxy(scheduler: Any, call: Call) -> Any:
    """A stand-in for a scheduler that steps as `call` says. It must be [`dissolve`]d, since it refers to itself."""
    own, number = copy.copy(scheduler), len(call.proxies)
    call.proxies.append(own)
    schedule: Schedule | None = None
    index, chunk = 0, -1

    @functools.wraps(scheduler.set_timesteps)  # pipelines read its signature
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        nonlocal schedule, chunk
        type(own).set_timesteps(own, *args, **kwargs)
        schedule, chunk = None, chunk + 1
        times = call.times(number, chunk, Times(own.timesteps, getattr(own, "sigmas", None)))
        own.timesteps = times.timesteps
        if times.sigmas is not None:
            own.sigmas = times.sigmas

    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal schedule, index
        if schedule is None:
            schedule = read_schedule(own)
            index = call.begin(number, chunk, lambda: _position(own, timestep))
        if index == len(own.timesteps):
            raise ValueError("The pipeline steps its scheduler more often than it has timesteps.")
        # A view is written into later, as SkyReels-V2 writes into the whole
        visited = sample.detach().clone() if sample._is_view() else sample.detach()
        taken = Step(call.stream(number), max(chunk, 0), index, timestep, visited, model_output, schedule)
        next_sample = call.step(
            taken, lambda: _scheduler_step(own, taken, model_output, timestep, sample, *args, **kwargs)
        )
        index += 1
        own._step_index = index  # some schedulers' `scale_model_input` reads it
        return SchedulerOutput(next_sample) if kwargs.get("return_dict", True) else (next_sample,)

    def deepcopy(memo: dict[int, Any]) -> Any:
        return proxy(copy.deepcopy(_plain(own), memo), call)

    vars(own).update(step=step, set_timesteps=set_timesteps, __deepcopy__=deepcopy)
    return own


def dissolve(own: Any) -> None:
    """Takes from a proxy what refers to itself and to its call: what is left is a copy of its scheduler."""
    for name in ("step", "set_timesteps", "__deepcopy__"):
        vars(own).pop(name, None)


def _plain(own: Any) -> Any:
    plain = copy.copy(own)
    dissolve(plain)
    return plain


def _position(own: Any, timestep: Any) -> int:
    """Where a pipeline begins: not at the first timestep where a `strength` leaves some out."""
    if (begin := getattr(own, "_begin_index", None)) is not None:
        return int(begin)
    time = torch.as_tensor(timestep).flatten()[0].to(own.timesteps)
    found = (own.timesteps == time).nonzero()
    if not len(found):
        raise ValueError(f"{type(own).__name__}: a step at time {time.item():.4g} is at none of its timesteps.")
    return int(found[0])


def _scheduler_step(own: Any, taken: Step, *args: Any, **kwargs: Any) -> tuple[Tensor, Step]:
    """What the scheduler's own `step` answers to the very arguments (its first one, where it has a history), and the
    step between the noise levels that it means."""
    plain = copy.deepcopy(_plain(own))
    if hasattr(plain, "_step_index"):
        plain._step_index = taken.index
    answer = plain.step(*args, **kwargs | {"return_dict": False})[0]
    if taken.schedule.is_flow:
        return answer, taken
    # DDIM goes by its own stride, which is that of its timesteps in some spacings only
    time = int(plain.timesteps[taken.index])
    following = time - plain.config.num_train_timesteps // plain.num_inference_steps
    level = plain.alphas_cumprod[following] if following >= 0 else plain.final_alpha_cumprod
    pair = Schedule((float(plain.alphas_cumprod[time]), float(level)), taken.schedule.prediction_type)
    return answer, replace(taken, index=0, schedule=pair)
