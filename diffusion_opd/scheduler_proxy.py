"""What sits in the place of a pipeline's scheduler: a shallow copy of it, of its exact type, whose `step` asks the call
that it belongs to where to go. A pipeline that copies its scheduler (LTX-2 for the audio, SkyReels-V2 for each latent
frame) opens one more stream; one that sets its timesteps again begins a chunk.

This file knows schedulers, and no pipeline, denoiser or trainer.
"""

import copy
import functools
import inspect
import math
import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from .transitions import Schedule


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler's models are moved as in flow matching (`x = (1 - s) x_0 + s eps`), by its class, its config,
    or since it has sigmas and no cumulative alphas; else they are VP models."""
    names = [cls.__name__ for cls in type(scheduler).__mro__]
    if any("FlowMatch" in name for name in names) or scheduler.config.get("prediction_type") == "flow_prediction":
        return True
    return hasattr(scheduler, "sigmas") and not hasattr(scheduler, "alphas_cumprod")


def own_scheduler(scheduler: Any) -> Any:
    """A scheduler of our own with the timesteps and noise levels of the given one. VP models run under DDIM: solvers of
    higher order repeat timesteps or rescale the state (PNDM, Euler).

    Raises:
        ValueError: if a scheduler has neither cumulative alphas nor sigmas, or those of another kind than its model.
    """
    if is_flow(scheduler):
        return copy.deepcopy(scheduler)
    if scheduler.config.get("use_flow_sigmas"):
        raise ValueError(
            f"{type(scheduler).__name__} has the noise levels of flow matching (`use_flow_sigmas`) for a model that "
            f"predicts {scheduler.config.get('prediction_type')!r}; `prediction_type` must be 'flow_prediction'."
        )
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        raise ValueError(
            f"{type(scheduler).__name__} is not supported: it has neither `sigmas` nor `alphas_cumprod`, which say how "
            "much noise is in a state."
        )
    if re.fullmatch(r"(CogVideoX)?DDIM(Parallel)?Scheduler", type(scheduler).__name__):
        return copy.deepcopy(scheduler)
    # Of those that know no clipping, or do not read that setting, it would be DDIM's default
    clips = scheduler.config.get("clip_sample", False) and "config.clip_sample" in inspect.getsource(type(scheduler))
    ddim = DDIMScheduler.from_config(scheduler.config, clip_sample=clips)
    if not torch.allclose(alphas.cpu().float(), ddim.alphas_cumprod, atol=1e-4):  # CogVideoX's shift of them
        ddim.alphas_cumprod = alphas.cpu().float()
        ddim.final_alpha_cumprod = torch.tensor(1.0) if ddim.config.set_alpha_to_one else ddim.alphas_cumprod[0]
    return ddim


def read_schedule(scheduler: Any, is_clean: bool = False) -> Schedule:
    """The noise levels of a scheduler after `set_timesteps`; `is_clean`: of an EDM model whose pipeline hands over the
    clean sample.

    Raises:
        ValueError: if the levels are not strictly monotone (solvers of higher order) or the prediction type is unknown.
    """
    if is_flow(scheduler):
        return _read_sigmas(scheduler, is_clean)
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


def _read_sigmas(scheduler: Any, is_clean: bool) -> Schedule:
    sigmas = tuple(float(sigma) for sigma in scheduler.sigmas)
    steps = [b - a for a, b in zip(sigmas, sigmas[1:], strict=False)]
    # The last step of some goes nowhere (`final_sigmas_type="sigma_min"`)
    falls = all(step < 0 for step in steps[:-1]) and steps[-1] <= 0
    rises = all(step > 0 for step in steps)
    if min(sigmas) < 0 or not (falls or (rises and max(sigmas) <= 1)):
        raise ValueError(
            f"{type(scheduler).__name__}: a rollout needs sigmas that fall to 0, or rise to 1, at each step, got "
            f"{[round(sigma, 4) for sigma in sigmas]}; use a first-order scheduler."
        )
    if rises:  # `x = t x_0 + (1 - t) eps`, and the velocity is `x_0 - eps`
        return Schedule(tuple(1 - sigma for sigma in sigmas), velocities=((0.0, -1.0),) * len(sigmas))
    is_edm = "sigma_data" in scheduler.config and hasattr(scheduler, "precondition_outputs")
    if sigmas[0] <= 1 and not is_edm:
        return Schedule(sigmas)
    # Variance exploding: `x = x_0 + sigma eps` is `1 + sigma` times `x_s` at `s = sigma / (1 + sigma)`, so
    # `eps - x_0 = (x - (1 + sigma) x_0) / sigma`
    scales = tuple(1 + sigma for sigma in sigmas)
    velocities = [(0.0, 1.0)] * len(sigmas)  # at 0 nothing is predicted
    for index, sigma in enumerate(sigmas):
        if sigma > 0:
            of_x, of_prediction = (0.0, 1.0) if is_clean else (1.0, -sigma)
            if is_edm and not is_clean:
                of_x, of_prediction = _denoised_by_edm(scheduler, sigma)
            velocities[index] = (
                scales[index] / sigma * (1 - scales[index] * of_x),
                -scales[index] / sigma * of_prediction,
            )
    levels = tuple(sigma / (1 + sigma) for sigma in sigmas)
    return Schedule(levels, scales=scales, velocities=tuple(velocities))


def _denoised_by_edm(scheduler: Any, sigma: float) -> tuple[float, float]:
    """How much of a state, and how much of what the network answers there, is the clean sample (EDM, arXiv 2206.00364,
    Table 1)."""
    data = scheduler.config.sigma_data
    of_prediction = sigma * data / math.sqrt(sigma**2 + data**2)
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"{type(scheduler).__name__}: prediction type {scheduler.config.prediction_type!r} is unknown."
        )
    sign = 1 if scheduler.config.prediction_type == "epsilon" else -1
    return data**2 / (sigma**2 + data**2), sign * of_prediction


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

    def of(self, rows: slice) -> "Step":
        """Some of its samples."""
        states: dict[str, Tensor | None] = {
            name: getattr(self, name) for name in ("sample", "prediction", "next_sample")
        }
        own: dict[str, Any] = {name: None if state is None else state[rows] for name, state in states.items()}
        return replace(self, **own)


@dataclass(frozen=True)
class Times:
    """What `set_timesteps` has set.

    Attributes:
        timesteps (`Tensor`), sigmas (`Tensor`, *optional*): Those of the scheduler.
        made_of (`Hashable`): Equal if these are, without looking at them; `None`: nobody can say.
    """

    timesteps: Tensor
    sigmas: Tensor | None
    made_of: Hashable = None


@dataclass(frozen=True)
class Answer:
    """What a scheduler's own `step` answers.

    Attributes:
        value (`Tensor`): The next state, or where `is_clean` the clean sample that it reads off the prediction.
        step ([`Step`]): Between the noise levels that it means.
        is_clean (`bool`): Of a scheduler that draws noise as it steps.
    """

    value: Tensor
    step: Step
    is_clean: bool = False


SchedulerStep = Callable[[], Answer]


class Call(Protocol):
    """What a proxy asks."""

    proxies: list[Any]

    def times(self, number: int, chunk: int, own: Times) -> Times:
        """The timesteps of the `number`-th proxy after it has set its `own` for the `chunk`-th time."""

    def begin(self, number: int, chunk: int, find: Callable[[], int]) -> int:
        """Which noise level its first step is at; `find` waits for the device."""

    def schedule(self, key: Hashable, read: Callable[[], Schedule]) -> Schedule:
        """The noise levels of a proxy, which are equal for equal keys; `read` waits for the device."""

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
    made_of: Hashable = None

    @functools.wraps(scheduler.set_timesteps)  # pipelines read its signature
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        nonlocal schedule, chunk, made_of
        type(own).set_timesteps(own, *args, **kwargs)
        schedule, chunk = None, chunk + 1
        made_of = _made_of(own, args, kwargs)
        times = call.times(number, chunk, Times(own.timesteps, getattr(own, "sigmas", None), made_of))
        own.timesteps, made_of = times.timesteps, times.made_of
        if times.sigmas is not None:
            own.sigmas = times.sigmas

    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        return _Output(
            lambda: moved(model_output, timestep, sample, *args, **kwargs),
            lambda: _at(own, index if schedule else None, timestep).step(
                model_output, timestep, sample, *args, **kwargs | {"return_dict": False}
            )[1],
        )

    def moved(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal schedule, index
        if schedule is None:
            is_clean = kwargs.get("pred_original_sample") is not None
            read = functools.partial(read_schedule, own, is_clean)
            schedule = read() if made_of is None else call.schedule((made_of, *_settings(own), is_clean), read)
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
        return next_sample

    def deepcopy(memo: dict[int, Any]) -> Any:
        return proxy(copy.deepcopy(_plain(own), memo), call)

    vars(own).update(step=step, set_timesteps=set_timesteps, __deepcopy__=deepcopy)
    return own


def _made_of(own: Any, args: tuple, kwargs: dict[str, Any]) -> Hashable:
    """What the noise levels of a scheduler are a function of, if none of it is on a device."""
    given = [*args, *(item for pair in sorted(kwargs.items()) for item in pair)]
    lists = [value.tolist() if isinstance(value, np.ndarray) else value for value in given]
    plain = [tuple(value) if isinstance(value, list) else (value,) for value in lists]
    if not all(isinstance(value, (int, float, str, torch.device, type(None))) for part in plain for value in part):
        return None
    return type(own), *plain, *_settings(own)


def _settings(own: Any) -> tuple:
    """Of a scheduler, as it is now: a pipeline may set some of its attributes."""
    scalars = ((name, value) for name, value in vars(own).items() if isinstance(value, (int, float, str)))
    return str(dict(own.config)), *sorted(scalars)


class _Output:
    """What `step` returns, as a tuple or by names. Who asks for the clean sample alone does not move (Cosmos makes two
    of its predictions clean samples before it guides them)."""

    def __init__(self, move: Callable[[], Tensor], clean: Callable[[], Tensor]) -> None:
        self._move, self._clean = move, clean

    @functools.cached_property
    def prev_sample(self) -> Tensor:
        return self._move()

    @property
    def pred_original_sample(self) -> Tensor:
        return self._clean()

    def __getitem__(self, index: int) -> Tensor:
        return (lambda: self.prev_sample, lambda: self.pred_original_sample)[index]()

    def __len__(self) -> int:
        return 2


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


def _at(own: Any, index: int | None, timestep: Any) -> Any:
    """A copy of the scheduler before its `index`-th step; of the first one before that has a number, by its time."""
    plain = copy.deepcopy(_plain(own))
    if hasattr(plain, "_step_index"):
        plain._step_index = _position(own, timestep) if index is None else index
    return plain


def _scheduler_step(own: Any, taken: Step, prediction: Tensor, *args: Any, **kwargs: Any) -> Answer:
    """What the scheduler's own `step` answers to the very arguments (its first one, where it has a history)."""
    plain = _at(own, taken.index, None)
    if "algorithm_type" in plain.config and plain.config.algorithm_type.startswith("sde-"):
        plain.register_to_config(algorithm_type=plain.config.algorithm_type.removeprefix("sde-"))
    try:
        values = [
            _drawn(seed, copy.deepcopy(plain), taken.sample.device, prediction, *args, **kwargs) for seed in (0, 1)
        ]
    except ImportError:  # of what draws the noise
        values = []
    if not values or not torch.equal(*values):
        if not hasattr(plain, "convert_model_output"):
            raise ValueError(
                f"{type(plain).__name__} draws noise as it steps, which no kernel here does; give the pipeline a "
                "scheduler of its noise levels that does not."
            )
        return Answer(plain.convert_model_output(prediction, sample=taken.sample), taken, is_clean=True)
    if taken.schedule.is_flow:
        return Answer(values[0], taken)
    # DDIM goes by its own stride, which is that of its timesteps in some spacings only
    time = int(plain.timesteps[taken.index])
    following = time - plain.config.num_train_timesteps // plain.num_inference_steps
    level = plain.alphas_cumprod[following] if following >= 0 else plain.final_alpha_cumprod
    pair = Schedule((float(plain.alphas_cumprod[time]), float(level)), taken.schedule.prediction_type)
    return Answer(values[0], replace(taken, index=0, schedule=pair))


def _drawn(seed: int, plain: Any, device: torch.device, *args: Any, **kwargs: Any) -> Tensor:
    """The answer of a scheduler that would draw its noise from `seed`."""
    given = kwargs.get("generator")
    if given is not None:
        several = given if isinstance(given, list) else [given]
        own = [torch.Generator(generator.device).manual_seed(seed) for generator in several]
        kwargs["generator"] = own if isinstance(given, list) else own[0]
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(seed)
        answer: Tensor = plain.step(*args, **kwargs | {"return_dict": False})[0]
    return answer
