"""What a policy is compared with: the unmodified pipeline.

What is expected comes from `run`: the pipeline's own `__call__` under its own scheduler, of which only `step` is
watched. `walked` and `asked` are the same of a policy.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from diffusion_opd.policy import Policy, Visit, tuner_layers
from diffusion_opd.scheduler_proxy import Step
from tests.tiny_pipelines import BUILDERS, CALL, FLOW, LORA_TARGETS, VP, denoiser

PROMPTS = ["a red fox", "two blue birds"]
INPUTS = {"prompt": PROMPTS}
STEPS = 3

# Three families of different mechanism (an image in flow matching, a video, a UNet under DDIM); the others are more of
# a kind
FEW = ("sd3", "wan", "sdxl")
families = pytest.mark.parametrize("family", FLOW + VP)
few_families = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in FEW else pytest.mark.nightly) for name in FLOW + VP]
)


class Seen(NamedTuple):
    """What a pipeline hands to `scheduler.step`."""

    timestep: Tensor
    sample: Tensor
    prediction: Tensor


NextState = Callable[[int, Seen, tuple[float, ...]], Tensor]


def generators(seed: int = 5) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + index) for index in range(len(PROMPTS))]


def levels_of(scheduler: Any) -> tuple[float, ...]:
    if hasattr(scheduler, "sigmas"):
        return tuple(scheduler.sigmas.tolist())
    return (*scheduler.alphas_cumprod[scheduler.timesteps].tolist(), scheduler.final_alpha_cumprod.item())


def run(
    pipe: DiffusionPipeline,
    next_state: NextState | None = None,
    gradient: bool = False,
    **call_kwargs: Any,
) -> tuple[list[Seen], Tensor]:
    """The pipeline's own run: what reaches `scheduler.step`, and the final latents.

    `next_state(index, seen, levels)` may replace what `step` returns.
    """
    seen, scheduler = [], pipe.scheduler
    step = scheduler.step

    def watched(model_output: Tensor, timestep: Tensor, sample: Tensor, **kwargs: Any) -> Any:
        seen.append(Seen(timestep, sample, model_output))
        if next_state is None:
            return step(model_output, timestep, sample, **kwargs)
        return (next_state(len(seen) - 1, seen[-1], levels_of(scheduler)),)

    scheduler.step = watched
    call = type(pipe).__call__.__wrapped__ if gradient else type(pipe).__call__
    try:
        latents = call(
            pipe,
            prompt=list(PROMPTS),
            num_inference_steps=STEPS,
            generator=generators(),
            output_type="latent",
            **call_kwargs,
        )[0]
    finally:
        del scheduler.step
    return seen, latents


def euler(index: int, seen: Seen | Step, levels: tuple[float, ...]) -> Tensor:
    """Some rule that moves every family; for flow matching, the ODE's."""
    return (seen.sample + (levels[index + 1] - levels[index]) * seen.prediction).detach()


def on_euler(step: Step) -> Tensor:
    return euler(step.index, step, step.schedule.levels)


def along(states: list[Tensor]) -> NextState:
    """A run that visits the given states, whatever is predicted there (the first state is the noise of the seed)."""
    return lambda index, seen, levels: states[index + 1] if index + 1 < len(states) else seen.sample


# Pipelines


def quiet(pipe: DiffusionPipeline) -> DiffusionPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def as_reference(pipe: DiffusionPipeline, family: str) -> DiffusionPipeline:
    if family in VP:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


@cache
def built(family: str, seed: int = 0) -> DiffusionPipeline:
    return BUILDERS[family](seed)


@cache
def reference(family: str) -> DiffusionPipeline:
    """The same pipeline again, for the runs without our code."""
    return as_reference(BUILDERS[family](0), family)


@cache
def own_run(family: str) -> tuple[list[Seen], Tensor]:
    with torch.no_grad():
        return run(reference(family), euler, **CALL[family])


def unguided(family: str) -> dict[str, Any]:
    """The call of a teacher with another guidance than the student's: none, where the family can do without."""
    if family == "flux":  # schnell: there is no guidance
        return CALL[family]
    if family == "flux_guidance":  # embedded
        return {**CALL[family], "guidance_scale": 1.5}
    return {**CALL[family], "true_cfg_scale" if family == "qwenimage" else "guidance_scale": 1.0}


def sharing(family: str, seed: int, **others: Any) -> DiffusionPipeline:
    """A pipeline with another denoiser and, unless told otherwise, all else of `built(family)`."""
    pipe, name = built(family), "unet" if family in ("sdxl", "sd15") else "transformer"
    settings = {k: v for k, v in pipe.config.items() if k not in pipe.components and not k.startswith("_")}
    return quiet(type(pipe)(**{**pipe.components, **settings, name: denoiser(built(family, seed)), **others}))


def encoders_of(pipe: DiffusionPipeline) -> list[nn.Module]:
    return [part for name, part in pipe.components.items() if name.startswith("text_encoder")]


# Policies


def walked(policy: Policy, move: Callable[[Step], Tensor] = on_euler, **kwargs: Any) -> tuple[list[Visit], Any]:
    """The visits of a whole walk, and what it makes."""
    with policy.walk(INPUTS, generators(), move, **kwargs) as walk:
        visits = list(walk)
    return visits, walk.output


def at(place: int, sample: Tensor) -> Visit:
    """A state to be asked at, of which nothing else is known."""
    return Visit(place, (Step(0, 0, place, None, sample, None, None),))  # type: ignore[arg-type]


def asked(policy: Policy, *visits: Visit, **kwargs: Any) -> list[Tensor]:
    """What a policy predicts at these visits of one stream, one after the other, from inputs and generators alone."""
    with policy.follow(inputs=INPUTS, generators=generators(), **kwargs) as follow:
        return [prediction for visit in visits for prediction in follow(visit)]


def assert_same(visits: list[Visit] | list[Seen], expected: list[Seen]) -> None:
    """Bit for bit."""
    assert len(visits) == len(expected)
    for visit, seen in zip(visits, expected, strict=True):
        step: Any = visit
        if isinstance(visit, Visit):
            (step,) = visit.steps
        assert torch.equal(step.timestep, seen.timestep)
        assert torch.equal(step.sample, seen.sample)
        assert torch.equal(step.prediction, seen.prediction)


@contextlib.contextmanager
def counted(*modules: nn.Module) -> Iterator[list[nn.Module]]:
    """The calls of these modules."""
    calls: list[nn.Module] = []
    handles = [module.register_forward_hook(lambda module, *_: calls.append(module)) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


# Learners


def add_lora(module: nn.Module, name: str, rank: int, alpha: int, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights=False, target_modules=LORA_TARGETS)
        inject_adapter_in_model(config, module, adapter_name=name)


def learner(family: str, lora: bool) -> DiffusionPipeline:
    """A student: LoRA (rank 4) or the whole denoiser."""
    pipe = as_reference(BUILDERS[family](0), family)
    if lora:
        add_lora(denoiser(pipe), "student", rank=4, alpha=8, seed=1)
    else:
        denoiser(pipe).requires_grad_(True)
    return pipe


def with_teacher_lora(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Of another rank and another scale than the student's."""
    add_lora(denoiser(pipe), "teacher", rank=2, alpha=6, seed=2)
    return pipe


def adapted(family: str = "sd3") -> DiffusionPipeline:
    """A student with a teacher as a second adapter."""
    pipe = with_teacher_lora(learner(family, lora=True))
    for layer in tuner_layers(denoiser(pipe)):
        layer.set_adapter("student")
    return pipe


def gradients_of(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    parameters = dict(denoiser(pipe).named_parameters())
    found = {name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None}
    denoiser(pipe).zero_grad()
    return found


def own_steps(
    pipe: DiffusionPipeline,
    prompts: list[str],
    generators: list[torch.Generator],
    states: Any = None,
    gradient: bool = False,
    steps: int = 4,
) -> list[tuple[Tensor, Tensor]]:
    """State and prediction at each step of the plain pipeline, under its own scheduler or along given states."""
    seen: list[tuple[Tensor, Tensor]] = []
    step = pipe.scheduler.step

    def watched(prediction: Tensor, timestep: Tensor, sample: Tensor, **kwargs: Any) -> Any:
        answer = step(prediction.detach(), timestep, sample.detach(), return_dict=False)[0]
        seen.append((sample.detach(), prediction))
        if states is not None and len(seen) < len(states):
            answer = states[len(seen)][0]
        return SimpleNamespace(prev_sample=answer)

    pipe.scheduler.step = watched
    call = type(pipe).__call__.__wrapped__ if gradient else type(pipe).__call__
    try:
        call(pipe, prompt=prompts, num_inference_steps=steps, generator=generators, output_type="latent")
    finally:
        del pipe.scheduler.step
    return seen
