"""A pipeline as a policy and as a field, on every family, against the unmodified pipeline.

What is expected comes from `run`: the pipeline's own `__call__` under its own scheduler, of which only `step` is
watched. All numbers are equal bit for bit.
"""

import contextlib
import gc
import inspect
import pickle
import re
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import accelerate
import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxControlPipeline,
    FluxKontextPipeline,
    LTXImageToVideoPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionInpaintPipeline,
    UNet2DModel,
    WanImageToVideoPipeline,
)
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from diffusion_opd.objectives import kl
from diffusion_opd.policy import BACKBONE, Policy, PromptMemo, Step, active_adapter, read_schedule, tuner_layers
from diffusion_opd.transitions import flow_sde, ode
from tests.own_pipelines import Momentum, Plain, of
from tests.tiny_pipelines import BUILDERS, CALL, FLOW, LORA_TARGETS, VP, clip, denoiser

PROMPTS = ["a red fox", "two blue birds"]
STEPS = 3

families = pytest.mark.parametrize("family", FLOW + VP)
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # a second adapter, on purpose


# The unmodified pipeline, watched


class Visit(NamedTuple):
    timestep: Tensor
    sample: Tensor
    prediction: Tensor


NextState = Callable[[int, Visit, tuple[float, ...]], Tensor]


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
) -> tuple[list[Visit], Tensor]:
    """The pipeline's own run: what reaches `scheduler.step`, and the final latents.

    `next_state(index, visit, levels)` may replace what `step` returns.
    """
    visits, scheduler = [], pipe.scheduler
    step = scheduler.step

    def watched(model_output: Tensor, timestep: Tensor, sample: Tensor, **kwargs: Any) -> Any:
        visits.append(Visit(timestep, sample, model_output))
        if next_state is None:
            return step(model_output, timestep, sample, **kwargs)
        return (next_state(len(visits) - 1, visits[-1], levels_of(scheduler)),)

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
    return visits, latents


def euler(index: int, visit: Visit, levels: tuple[float, ...]) -> Tensor:
    """Some rule that moves every family; for flow matching, the ODE's."""
    return (visit.sample + (levels[index + 1] - levels[index]) * visit.prediction).detach()


def on_euler(step: Step) -> Tensor:
    return euler(step.index, Visit(step.timestep, step.sample, step.prediction), step.schedule.levels)


def along(states: list[Tensor]) -> NextState:
    """A run that visits the given states, whatever is predicted there (the first state is the noise of the seed)."""
    return lambda index, visit, levels: states[index + 1] if index + 1 < len(states) else visit.sample


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
def own_run(family: str) -> tuple[list[Visit], Tensor]:
    return run(reference(family), euler, **CALL[family])


def unguided(family: str) -> dict[str, Any]:
    """The call of a teacher with another guidance than the student's: none, where the family can do without."""
    if family == "flux":  # schnell: there is no guidance
        return CALL[family]
    if family == "flux_guidance":  # embedded
        return {**CALL[family], "guidance_scale": 1.5}
    return {**CALL[family], "true_cfg_scale" if family == "qwenimage" else "guidance_scale": 1.0}


def record(policy: Policy, on_step: Callable[[Step], Tensor] = on_euler, **kwargs: Any) -> tuple[list[Step], Tensor]:
    steps = []

    def listen(step: Step) -> Tensor:
        steps.append(step)
        return on_step(step)

    latents = policy.rollout(PROMPTS, generators(), listen, **kwargs)
    return steps, latents


def assert_same(steps: list[Step] | list[Visit], visits: list[Visit]) -> None:
    assert len(steps) == len(visits)
    for step, visit in zip(steps, visits, strict=True):
        assert torch.equal(step.timestep, visit.timestep)
        assert torch.equal(step.sample, visit.sample)
        assert torch.equal(step.prediction, visit.prediction)


def quiet(pipe: DiffusionPipeline) -> DiffusionPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextlib.contextmanager
def counted(*modules: nn.Module) -> Iterator[list[nn.Module]]:
    """The calls of these modules."""
    calls = []
    handles = [module.register_forward_hook(lambda module, *_: calls.append(module)) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


# The contract, on every family


@families
@torch.no_grad()
def test_field_is_the_pipelines_own_prediction(family: str):
    """At the states that the pipeline's own solver visits (multistep for Wan and SANA), asked in any order."""
    visits, _ = run(reference(family), **CALL[family])
    assert len(visits) == STEPS
    policy = Policy(built(family), STEPS, CALL[family])
    for visit in reversed(visits):
        prediction = policy.predict(visit.sample, visit.timestep, PROMPTS)
        assert prediction.abs().max() > 0 and prediction.dtype == visit.prediction.dtype
        assert torch.equal(prediction, visit.prediction)


@families
@torch.no_grad()
def test_rollout_is_the_pipelines_own_run(family: str):
    visits, latents = own_run(family)
    policy = Policy(built(family), STEPS, CALL[family])
    steps, rolled_out = record(policy)
    assert_same(steps, visits)
    assert torch.equal(rolled_out, latents)
    assert [step.index for step in steps] == list(range(STEPS))
    assert all(step.schedule.levels == levels_of(reference(family).scheduler) for step in steps)
    assert all(step.schedule.is_flow == (family in FLOW) for step in steps)

    if isinstance(built(family).scheduler, FlowMatchEulerDiscreteScheduler):  # the ODE kernel is its own step
        _, own = run(reference(family), **CALL[family])
        _, ours = record(policy, lambda step: ode(step.sample, step.prediction, step.schedule, step.index).mean)
        assert torch.equal(ours, own)


@families
@torch.no_grad()
def test_equal_weights_leave_no_gap(family: str):
    memo = PromptMemo()
    student = Policy(built(family), STEPS, CALL[family], memo)
    equal, other = (Policy(BUILDERS[family](seed), STEPS, CALL[family], memo) for seed in (0, 1))
    for step in record(student)[0]:
        assert torch.equal(equal.predict(step.sample, step.timestep, PROMPTS), step.prediction)
        gap = other.predict(step.sample, step.timestep, PROMPTS) - step.prediction
        assert gap.abs().max() > 0.01 * step.prediction.abs().max()


@families
@torch.no_grad()
def test_teacher_of_another_guidance_does_not_disturb_the_student(family: str):
    """Asked between the steps, and by way of the very pipeline that is running."""
    visits, _ = own_run(family)
    targets, _ = run(reference(family), along([visit.sample for visit in visits]), **unguided(family))

    memo = PromptMemo()
    policy, teacher = (Policy(built(family), STEPS, kwargs, memo) for kwargs in (CALL[family], unguided(family)))
    answers = []

    def ask(step: Step) -> Tensor:
        answers.append(Visit(step.timestep, step.sample, teacher.predict(step.sample, step.timestep, PROMPTS)))
        return on_euler(step)

    steps, _ = record(policy, ask)
    assert_same(steps, visits)
    assert_same(answers, targets)
    if family != "flux":
        assert not torch.equal(answers[0].prediction, steps[0].prediction)


@families
@torch.no_grad()
def test_pipeline_is_left_as_it_was(family: str):
    pipe = BUILDERS[family](0)
    pipe.set_progress_bar_config(disable=True, desc="mine")
    run(pipe, **unguided(family))  # leaves guidance and the like behind, and a scheduler in the middle of things
    attributes, config, components = dict(vars(pipe)), dict(pipe.config), dict(pipe.components)
    scheduler, weights = pickle.dumps(vars(pipe.scheduler)), pickle.dumps(denoiser(pipe).state_dict())

    policy = Policy(pipe, STEPS, CALL[family])
    steps, _ = record(policy, num_steps=2)
    policy.predict(steps[0].sample, steps[0].timestep, PROMPTS)
    policy.self_check(PROMPTS)

    assert vars(pipe).keys() == attributes.keys()
    for name, value in attributes.items():
        assert vars(pipe)[name] is value, name
    assert dict(pipe.config) == config
    assert pipe.components.keys() == components.keys()
    assert all(pipe.components[name] is part for name, part in components.items())
    assert pipe._progress_bar_config == {"disable": True, "desc": "mine"}
    assert pickle.dumps(vars(pipe.scheduler)) == scheduler
    assert pickle.dumps(denoiser(pipe).state_dict()) == weights


@families
@torch.no_grad()
def test_later_steps_are_not_computed(family: str):
    """The states are those of the whole rollout, and the denoiser runs for no more."""
    visits, _ = own_run(family)
    policy = Policy(built(family), STEPS, CALL[family])
    counts = []
    for num_steps in (STEPS, 2, 1):
        with counted(denoiser(built(family))) as calls:
            steps, _ = record(policy, num_steps=num_steps)
        assert_same(steps, visits[:num_steps])
        assert len(steps[0].schedule.levels) == STEPS + 1
        counts.append(len(calls))
    per_step = counts[-1]
    assert counts == [STEPS * per_step, 2 * per_step, per_step] and per_step in (1, 2)


class Wrapper(nn.Module):
    """As DDP: forwards, and has no attribute of what it wraps."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@families
@torch.no_grad()
def test_denoiser_is_called_through_its_wrapper(family: str):
    policy, module = Policy(built(family), STEPS, CALL[family]), denoiser(built(family))
    wrapper = Wrapper(module)
    with counted(wrapper, module) as calls:
        steps, _ = record(policy, denoiser=wrapper)
    assert_same(steps, own_run(family)[0])
    assert calls.count(wrapper) == calls.count(module) > 0


@families
@torch.no_grad()
def test_random_state_is_left_alone(family: str):
    policy = Policy(built(family), STEPS, CALL[family])
    before = torch.get_rng_state()
    steps, _ = record(policy)
    policy.predict(steps[1].sample, steps[1].timestep, PROMPTS)
    policy.self_check(PROMPTS)
    assert torch.equal(torch.get_rng_state(), before)


@families
@torch.no_grad()
def test_bfloat16(family: str):
    """The state handed back has the dtype that the pipeline gave, though the kernels answer in float32."""
    pipe = as_reference(BUILDERS[family](0).to(torch.bfloat16), family)
    visits, _ = run(pipe, lambda *args: on_euler_in_float32(*args).to(args[1].sample.dtype), **CALL[family])
    policy = Policy(pipe, STEPS, CALL[family])
    steps, _ = record(policy, lambda step: on_euler_in_float32(step.index, step, step.schedule.levels))
    assert_same(steps, visits)
    for step, visit in zip(steps, visits, strict=True):
        assert step.sample.dtype == visits[0].sample.dtype and step.prediction.dtype == visit.prediction.dtype
    assert torch.equal(policy.predict(visit.sample, visit.timestep, PROMPTS), visit.prediction)


def on_euler_in_float32(index: int, visit: Visit | Step, levels: tuple[float, ...]) -> Tensor:
    return visit.sample.float() + (levels[index + 1] - levels[index]) * visit.prediction.float()


@torch.no_grad()
def test_source_image_for_editing():
    """FLUX.1 Kontext: the image is part of what `prepare_latents` returns, beside the state."""
    own, ours = (quiet(FluxKontextPipeline(**BUILDERS["flux_guidance"](0).components)) for _ in range(2))
    image = Image.effect_noise((16, 16), 50).convert("RGB")
    call_kwargs = {**CALL["flux_guidance"], "image": image, "max_area": 256, "_auto_resize": False}
    visits, _ = run(own, euler, **call_kwargs)
    policy = Policy(ours, STEPS, call_kwargs)
    assert_same(record(policy)[0], visits)
    for visit in visits:
        assert torch.equal(policy.predict(visit.sample, visit.timestep, PROMPTS), visit.prediction)
    other = Policy(ours, STEPS, {**call_kwargs, "image": image.rotate(90)})
    assert not torch.equal(other.predict(visit.sample, visit.timestep, PROMPTS), visit.prediction)


# Learning inside the rollout, against two passes over the recorded states


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


def gradients_of(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    parameters = dict(denoiser(pipe).named_parameters())
    found = {name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None}
    denoiser(pipe).zero_grad()
    return found


@cache
def two_passes(family: str, lora: bool) -> tuple[list[float], dict[str, Tensor]]:
    """Without our code: the student's rollout without gradient, the teacher alone along its states, then the student
    along its states with gradient. Teacher and student live in pipelines of their own."""
    student = learner(family, lora)
    visits, _ = run(student, euler, **CALL[family])
    states = [visit.sample for visit in visits]

    teacher = as_reference(BUILDERS[family](0 if lora else 1), family)
    if lora:
        denoiser(with_teacher_lora(teacher)).requires_grad_(False)
    targets, _ = run(teacher, along(states), **unguided(family))
    predictions, _ = run(student, along(states), gradient=True, **CALL[family])

    losses = []
    for prediction, target in zip(predictions, targets, strict=True):
        loss = (prediction.prediction.float() - target.prediction.float()).square().mean()
        loss.backward()
        losses.append(loss.item())
    return losses, gradients_of(student)


@families
@pytest.mark.parametrize("kind", ["lora", "lora with checkpointing", "full"])
def test_learning_inside_the_rollout_equals_two_passes(family: str, kind: str):
    lora, memo = kind != "full", PromptMemo()
    pipe = learner(family, lora)
    if lora:  # the teacher is another adapter of the student's own pipeline
        with_teacher_lora(pipe)
        for layer in tuner_layers(denoiser(pipe)):
            layer.set_adapter("student")
        teacher = Policy(pipe, STEPS, unguided(family), memo, adapter="teacher")
    else:
        teacher = Policy(BUILDERS[family](1), STEPS, unguided(family), memo)
    if kind == "lora with checkpointing":
        denoiser(pipe).enable_gradient_checkpointing()
    student = Policy(pipe, STEPS, CALL[family], memo)
    losses = []

    def learn(step: Step) -> Tensor:
        with torch.no_grad():
            target = teacher.predict(step.sample, step.timestep, PROMPTS)
        loss = (step.prediction.float() - target.float()).square().mean()
        loss.backward()
        losses.append(loss.item())
        return on_euler(step)

    student.rollout(PROMPTS, generators(), learn)
    expected_losses, expected = two_passes(family, lora)
    found = gradients_of(pipe)
    assert losses == expected_losses
    assert found.keys() == expected.keys() and all("teacher" not in name for name in found)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    assert any(gradient.any() for gradient in expected.values())


def test_checkpointing_recomputes():
    """What makes the test above a test of it: blocks run again in the backward pass, with the teacher in between."""
    pipe = with_teacher_lora(learner("sd3", lora=True))
    for layer in tuner_layers(pipe.transformer):
        layer.set_adapter("student")
    pipe.transformer.enable_gradient_checkpointing()
    policy = Policy(pipe, STEPS, CALL["sd3"])
    block, adapters = pipe.transformer.transformer_blocks[0], []
    handle = block.register_forward_pre_hook(lambda *_: adapters.append(tuner_layers(block)[0].active_adapters))

    def learn(step: Step) -> Tensor:
        with active_adapter(tuner_layers(pipe.transformer), "teacher"), torch.no_grad():
            policy.predict(step.sample, step.timestep, PROMPTS)
        step.prediction.float().square().mean().backward()
        return on_euler(step)

    policy.rollout(PROMPTS, generators(), learn, num_steps=1)
    handle.remove()
    assert adapters == [["student"], ["teacher"], ["student"]]


@pytest.mark.parametrize("asked_before", [False, True])
def test_autocast(asked_before: bool):
    """One context around the whole rollout, as a trainer has it: states keep the pipeline's dtype, kernels and losses
    are float32, and weights that were cast without gradient for a question do not lose theirs."""
    pipe = learner("sd3", lora=True)
    policy = Policy(pipe, STEPS, CALL["sd3"])
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    steps = []

    def learn(step: Step) -> Tensor:
        steps.append(step)
        ours = flow_sde(step.sample, step.prediction, step.schedule, step.index, 0.7)
        with torch.no_grad():
            answer = policy.predict(step.sample, step.timestep, PROMPTS)
        assert torch.equal(answer, step.prediction)
        loss = kl(ours, ours._replace(mean=torch.zeros_like(ours.mean))).mean()
        assert ours.mean.dtype == loss.dtype == torch.float32
        assert torch.is_autocast_enabled("cpu")
        loss.backward()
        return ours.mean

    with torch.autocast("cpu", torch.bfloat16):
        if asked_before:
            with torch.no_grad():
                policy.predict(x, torch.tensor(500.0), PROMPTS)
        policy.rollout(PROMPTS, generators(), learn)
    assert not torch.is_autocast_enabled("cpu")
    assert {step.prediction.dtype for step in steps} == {torch.float32}  # whose guidance is not rounded once more
    assert {step.sample.dtype for step in steps} == {torch.float32}
    gradients = gradients_of(pipe)
    assert gradients and all(gradient.any() for name, gradient in gradients.items() if "lora_B" in name)


def test_nothing_outlives_its_call():
    """No cycle holds a prediction, and so its graph, until the next garbage collection."""
    pipe = learner("sd3", lora=True)
    policy = Policy(pipe, STEPS, CALL["sd3"])
    held = []

    def listen(step: Step) -> Tensor:
        answer = policy.predict(step.sample, step.timestep, PROMPTS)
        assert answer.requires_grad and step.prediction.requires_grad and not step.sample.requires_grad
        held.extend((weakref.ref(answer), weakref.ref(step.prediction)))
        return on_euler(step)

    gc.collect()
    gc.disable()
    try:
        policy.rollout(PROMPTS, generators(), listen)
        assert len(held) == 2 * STEPS and all(reference() is None for reference in held)
    finally:
        gc.enable()


# Adapters


def adapted() -> DiffusionPipeline:
    pipe = with_teacher_lora(learner("sd3", lora=True))
    for layer in tuner_layers(pipe.transformer):
        layer.set_adapter("student")
    return pipe


@pytest.mark.parametrize("name", ["teacher", "student", BACKBONE])
def test_active_adapter_is_restored_and_touches_no_gradient(name: str):
    pipe = adapted()
    layers = tuner_layers(pipe.transformer)
    learns = {key: parameter.requires_grad for key, parameter in pipe.transformer.named_parameters()}
    assert any(learns.values()) and not all(learns.values())

    def assert_untouched() -> None:
        assert {key: p.requires_grad for key, p in pipe.transformer.named_parameters()} == learns

    with active_adapter(layers, name):
        assert all(layer.active_adapters == ([name] if name else []) for layer in layers)
        assert_untouched()
        with active_adapter(layers, "student"):  # a student asks in the middle of a teacher
            assert all(layer.active_adapters == ["student"] for layer in layers)
    assert all(layer.active_adapters == ["student"] for layer in layers)
    with pytest.raises(KeyError), active_adapter(layers, name):
        raise KeyError
    assert all(layer.active_adapters == ["student"] for layer in layers)
    assert_untouched()


@torch.no_grad()
def test_adapter_gives_what_it_gives_alone():
    """Beside another of other rank and scale; without any, what the backbone gives that never had one."""
    pipe = adapted()
    alone = {"student": learner("sd3", lora=True), "teacher": with_teacher_lora(BUILDERS["sd3"](0)), None: built("sd3")}
    x, timestep = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(700.0)
    answers = []
    for name, only in alone.items():
        expected = Policy(only, STEPS, CALL["sd3"]).predict(x, timestep, PROMPTS)
        with active_adapter(tuner_layers(pipe.transformer), name):
            assert torch.equal(Policy(pipe, STEPS, CALL["sd3"]).predict(x, timestep, PROMPTS), expected)
        if name is not None:
            assert torch.equal(Policy(pipe, STEPS, CALL["sd3"], adapter=name).predict(x, timestep, PROMPTS), expected)
        answers.append(expected)
    for index, answer in enumerate(answers):
        assert not torch.allclose(answer, answers[index - 1], rtol=0.01, atol=0.01)


def test_adapter_is_restored_after_a_failed_call():
    pipe = adapted()
    policy = Policy(pipe, STEPS, CALL["sd3"], adapter="teacher")

    def fail(step: Step) -> Tensor:
        raise KeyError("on purpose")

    with pytest.raises(KeyError, match="on purpose"):
        policy.rollout(PROMPTS, generators(), fail)
    with pytest.raises(Exception), torch.no_grad():  # noqa: B017
        policy.predict(torch.zeros(2, 5, 8, 8), torch.tensor(700.0), PROMPTS)
    assert all(layer.active_adapters == ["student"] for layer in tuner_layers(pipe.transformer))


# The memo


def encoders_of(pipe: DiffusionPipeline) -> list[nn.Module]:
    return [part for name, part in pipe.components.items() if name.startswith("text_encoder")]


def sharing(family: str, seed: int, **others: Any) -> DiffusionPipeline:
    """A pipeline with another denoiser and, unless told otherwise, all else of `built(family)`."""
    pipe, name = built(family), "unet" if family in ("sdxl", "sd15") else "transformer"
    settings = {k: v for k, v in pipe.config.items() if k not in pipe.components and not k.startswith("_")}
    return quiet(type(pipe)(**{**pipe.components, **settings, name: denoiser(built(family, seed)), **others}))


@families
@torch.no_grad()
def test_prompts_are_encoded_once_for_all(family: str):
    """Student and teacher of one guidance, asked at every state, cost the encoder calls of a single run; a second batch
    costs the same again after `clear`, and nothing without."""
    with counted(*encoders_of(built(family))) as calls:
        run(built(family), **CALL[family])
        once = len(calls)
    assert once > 0

    memo = PromptMemo()
    student, teacher = (Policy(pipe, STEPS, CALL[family], memo) for pipe in (built(family), sharing(family, seed=1)))

    def batch() -> int:
        with counted(*encoders_of(built(family))) as calls:
            for step in record(student)[0]:
                teacher.predict(step.sample, step.timestep, PROMPTS)
                student.predict(step.sample, step.timestep, PROMPTS)
        return len(calls)

    assert batch() == once
    assert batch() == 0
    memo.clear()
    assert batch() == once


SD3_ENCODE = {
    "prompt": PROMPTS,
    "prompt_2": PROMPTS,
    "prompt_3": PROMPTS,
    "do_classifier_free_guidance": True,
    "max_sequence_length": 32,
}


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": ["a red fox", "two blue bird"]},
        {"prompt_3": ["a red fox", ""]},
        {"negative_prompt": ["blurry", "blurry"]},
        {"max_sequence_length": 16},
        {"do_classifier_free_guidance": False},
        {"num_images_per_prompt": 2},
        {"clip_skip": 1},
        {"device": torch.device("cpu")},
    ],
    ids=lambda change: next(iter(change)),
)
@torch.no_grad()
def test_memo_keys_on_every_argument(change: dict[str, Any]):
    pipe, memo = built("sd3"), PromptMemo()
    for arguments in (SD3_ENCODE, {**SD3_ENCODE, **change}, SD3_ENCODE):
        expected, found = pipe.encode_prompt(**arguments), memo.encode(pipe, "encoders", **arguments)
        assert len(found) == len(expected)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert memo.num_encodings == 2


@torch.no_grad()
def test_memo_knows_an_argument_however_it_is_given():
    pipe, memo = built("sd3"), PromptMemo()
    memo.encode(pipe, "encoders", PROMPTS, PROMPTS, PROMPTS, max_sequence_length=32)
    memo.encode(pipe, "encoders", PROMPTS, PROMPTS, prompt_3=PROMPTS, max_sequence_length=32, negative_prompt=None)
    memo.encode(pipe, "encoders", list(PROMPTS), PROMPTS, PROMPTS, None, max_sequence_length=32)
    assert memo.num_encodings == 1
    memo.encode(pipe, "other encoders", PROMPTS, PROMPTS, PROMPTS, max_sequence_length=32)
    assert memo.num_encodings == 2


class Showing(StableDiffusion3Pipeline):
    """Encodes whatever it is shown."""

    def encode_prompt(self, shown: Any) -> Tensor:
        if isinstance(shown, (list, tuple)):
            return sum(self.encode_prompt(item) for item in shown)
        return (shown if isinstance(shown, Tensor) else torch.tensor(np.array(shown))).double().sum()


def picture(value: int) -> Image.Image:
    return Image.new("RGB", (4, 2), (value, 0, 0))


@pytest.mark.parametrize(
    ("value", "equal", "others"),
    [
        (torch.ones(2, 3), torch.ones(2, 3), [torch.ones(3, 2), torch.ones(2, 3).double(), torch.zeros(2, 3)]),
        (torch.arange(6.0).view(2, 3).T, torch.tensor([[0.0, 3], [1, 4], [2, 5]]), [torch.arange(6.0).view(3, 2)]),
        (torch.tensor(1.5), torch.tensor(1.5), [torch.tensor(2.5)]),
        (torch.ones(2).bfloat16(), torch.ones(2).bfloat16(), [torch.ones(2)]),
        (np.ones(3), np.ones(3), [np.ones(4), np.ones(3, np.float32), np.zeros(3)]),
        (picture(1), picture(1), [picture(2), picture(1).rotate(90, expand=True)]),
        ([1, 2], [1, 2], [[2, 1], (1, 2)]),
        (1, 1, [1.0, True]),
    ],
    ids=["tensor", "transposed", "scalar", "bfloat16", "array", "picture", "list", "number"],
)
def test_memo_compares_by_content(value: Any, equal: Any, others: list[Any]):
    pipe, memo = Showing(**built("sd3").components), PromptMemo()

    def encodings(shown: Any) -> int:
        before = memo.num_encodings
        for given in (shown, [shown]):  # nested too
            assert torch.equal(memo.encode(pipe, (), given), pipe.encode_prompt(given))
        return memo.num_encodings - before

    assert encodings(value) == 2
    assert encodings(equal) == 0
    for other in others:
        assert encodings(other) == 2
    assert encodings(equal) == 0


def test_memo_sees_a_tensor_change():
    pipe, memo = Showing(**built("sd3").components), PromptMemo()
    shown = torch.ones(3)
    assert memo.encode(pipe, (), shown) == 3
    shown[0] = 5
    assert memo.encode(pipe, (), shown) == 7


def test_memo_does_not_confuse_objects_that_come_and_go():
    """An object without content to compare is itself alone, and a later one in its place in memory is another."""

    class Box:
        __hash__ = None

        def __init__(self, value: int):
            self.value = value

        def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
            return np.array(self.value)

    pipe, memo = Showing(**built("sd3").components), PromptMemo()
    for value in range(50):
        assert memo.encode(pipe, (), Box(value)) == value


def test_memo_has_no_gradient():
    pipe = BUILDERS["sd3"](0)
    for encoder in encoders_of(pipe):
        encoder.requires_grad_(True)
    assert pipe.encode_prompt(**SD3_ENCODE)[0].requires_grad
    assert not any(part.requires_grad for part in PromptMemo().encode(pipe, (), **SD3_ENCODE))


@torch.no_grad()
def test_memo_encodes_in_the_encoders_own_precision():
    """Whoever asks first: a party in mixed precision leaves nothing coarser behind for one without."""
    memo, expected = PromptMemo(), built("sd3").encode_prompt(**SD3_ENCODE)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(built("sd3").encode_prompt(**SD3_ENCODE)[0].float(), expected[0])
        first = memo.encode(built("sd3"), (), **SD3_ENCODE)
    for found in (first, memo.encode(built("sd3"), (), **SD3_ENCODE)):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@torch.no_grad()
def test_memo_hands_out_fresh_lists():
    """Z-Image extends the list of embeddings that it gets by those of the negative prompts."""
    memo = PromptMemo()

    def encode() -> list[Tensor]:
        return memo.encode(built("zimage"), (), prompt=list(PROMPTS), max_sequence_length=64)[0]

    first, second = encode(), encode()
    assert memo.num_encodings == 1 and isinstance(first, list)
    first.clear()
    assert len(second) == len(encode()) == len(PROMPTS)

    policy = Policy(built("zimage"), STEPS, CALL["zimage"], memo)
    for _ in range(2):
        assert_same(record(policy)[0], own_run("zimage")[0])


@torch.no_grad()
def test_arguments_of_the_user_are_not_edited():
    """Z-Image writes its chat template into the list of negative prompts: a second call would write it twice."""
    negative = ["blurry", "a person"]
    visits, _ = run(reference("zimage"), euler, **CALL["zimage"], negative_prompt=list(negative))
    policy = Policy(built("zimage"), STEPS, {**CALL["zimage"], "negative_prompt": negative})
    for _ in range(2):
        assert_same(record(policy)[0], visits)
        policy.memo.clear()
    assert negative == ["blurry", "a person"]


@torch.no_grad()
def test_other_encoders_are_not_shared():
    """A teacher whose first text encoder is another than the student's reads the prompt with its own."""
    text_encoder, tokenizer = clip(CLIPTextModelWithProjection, seed=11)
    other = sharing("sd3", seed=1, text_encoder=text_encoder, tokenizer=tokenizer)
    memo = PromptMemo()
    student, teacher = (Policy(pipe, STEPS, CALL["sd3"], memo) for pipe in (built("sd3"), other))
    step = record(student)[0][0]
    expected = run(other, along([step.sample]), **CALL["sd3"])[0][0]
    assert torch.equal(expected.sample, step.sample)
    assert torch.equal(teacher.predict(step.sample, step.timestep, PROMPTS), expected.prediction)
    assert not torch.equal(
        Policy(sharing("sd3", seed=1), STEPS, CALL["sd3"], memo).predict(step.sample, step.timestep, PROMPTS),
        expected.prediction,
    )


@torch.no_grad()
def test_settings_of_a_pipeline_are_not_shared():
    """SDXL reads in its own config whether an absent negative prompt is encoded or zero."""
    zeros = built("sdxl")
    encoded = sharing("sdxl", seed=0, force_zeros_for_empty_prompt=False)
    encoded.scheduler = DDIMScheduler.from_config(encoded.scheduler.config)
    memo = PromptMemo()
    student, teacher = (Policy(pipe, STEPS, CALL["sdxl"], memo) for pipe in (zeros, encoded))
    step = record(student)[0][0]
    expected = run(encoded, along([step.sample]), **CALL["sdxl"])[0][0]
    assert torch.equal(teacher.predict(step.sample, step.timestep, PROMPTS), expected.prediction)
    assert not torch.equal(expected.prediction, step.prediction)


# Seams


class Broken(Plain):
    def predict(self, x: Tensor, t: Tensor, **embeds: Tensor) -> Tensor:
        return super().predict(x, t, **embeds) * float("nan")


class Twice(Plain):
    def advance(self, x: Tensor, t: Tensor, **embeds: Tensor) -> Tensor:
        return super().advance(super().advance(x, t, **embeds), t, **embeds)


class Skips(Plain):
    def advance(self, x: Tensor, t: Tensor, **embeds: Tensor) -> Tensor:
        return super().advance(x, t, **embeds) if t != self.scheduler.timesteps[1] else x


class Tracked(Plain):
    """Its `__call__` keeps the graph itself."""

    def __call__(self, prompt, num_inference_steps=4, generator=None, output_type="pil", return_dict=True):
        return super().__call__(prompt, num_inference_steps, generator)


class WithoutLatents(Plain):
    prepare_latents = None


class WithoutPrompts(Plain):
    encode_prompt = None


@torch.no_grad()
def test_pipeline_of_ones_own():
    pipe = of(Plain)
    visits, latents = run(pipe)
    policy = Policy(of(Plain), STEPS)
    steps, ours = record(policy, lambda step: ode(step.sample, step.prediction, step.schedule, step.index).mean)
    assert_same(steps, visits)
    assert torch.equal(ours, latents)
    assert len(policy.self_check(PROMPTS)) == 2


@pytest.mark.parametrize(
    ("cls", "seam"),
    [
        (WithoutLatents, "prepare_latents"),
        (WithoutPrompts, "encode_prompt"),
        (Tracked, r"`__call__` is not decorated with `torch.no_grad\(\)`"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_missing_seam_is_named(cls: type, seam: str):
    with pytest.raises(ValueError, match=f"{cls.__name__} lacks a seam.*{seam}"):
        Policy(of(cls), STEPS)


def test_unconditional_pipeline_is_refused():
    unet = UNet2DModel(sample_size=8, block_out_channels=(4, 4), norm_num_groups=2, layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"))  # fmt: skip
    with pytest.raises(ValueError, match="DDPMPipeline lacks a seam.*encode_prompt"):
        Policy(DDPMPipeline(unet, DDIMScheduler()), STEPS)


def test_two_denoisers_are_refused():
    components = BUILDERS["wan"](0).components
    two = type(built("wan"))(**{**components, "transformer_2": components["transformer"], "boundary_ratio": 0.5})
    with pytest.raises(ValueError, match="WanPipeline has no single denoiser.*transformer_2"):
        Policy(two, STEPS, CALL["wan"])
    none = type(built("wan"))(**{**components, "transformer": None})
    with pytest.raises(ValueError, match="WanPipeline has no single denoiser"):
        Policy(none, STEPS, CALL["wan"])


@pytest.mark.parametrize("cls", [Twice, Skips])
def test_step_must_be_called_once_a_timestep(cls: type):
    policy = Policy(of(cls), STEPS)
    with torch.no_grad(), pytest.raises(ValueError, match="scheduler.step"):
        record(policy)
    with pytest.raises(ValueError, match="scheduler.step"):
        policy.self_check(PROMPTS)


def test_unknown_arguments_are_refused():
    with pytest.raises(ValueError, match=r"takes no argument \['guidance', 'true_cfg_scale'\]"):
        Policy(built("sd3"), STEPS, {"true_cfg_scale": 4.0, "height": 16, "guidance": 1.0})


@pytest.mark.parametrize(("family", "part"), [("sd3", "transformer"), ("sd3", "text_encoder_2"), ("sd15", "unet")])
@pytest.mark.parametrize("how", ["accelerate", "accelerate with hook", "block_level", "leaf_level"])
def test_an_offloaded_part_is_refused(family: str, part: str, how: str):
    pipe, cpu = BUILDERS[family](0), torch.device("cpu")
    if how == "accelerate":
        accelerate.cpu_offload(getattr(pipe, part), cpu)
    elif how == "accelerate with hook":
        accelerate.cpu_offload_with_hook(getattr(pipe, part), cpu)
    else:
        apply_group_offloading(getattr(pipe, part), cpu, offload_type=how, num_blocks_per_group=1)
    with pytest.raises(ValueError, match=f"Pipeline is offloaded: its {part} has hooks"):
        Policy(pipe, STEPS, CALL[family])


@families
def test_used_pipeline_is_not_taken_for_an_offloaded_one(family: str):
    """A first call may leave an empty registry of hooks on the denoiser."""
    run(built(family), **CALL[family])
    Policy(built(family), STEPS, CALL[family])


@pytest.mark.parametrize(
    ("cls", "sentence"),
    [(Momentum, "cannot be asked at a given state"), (Broken, "predicts NaN or infinity at step 0")],
)
def test_self_check_refuses(cls: type, sentence: str):
    with pytest.raises(ValueError, match=f"{cls.__name__} {sentence}"):
        Policy(of(cls), STEPS).self_check(PROMPTS)


@pytest.mark.parametrize(
    ("cls", "family", "call_kwargs", "sentence"),
    [
        (
            QwenImageEditPipeline,
            "qwenimage",
            {},
            "AttributeError: 'NoneType' object has no attribute 'size'; it may need ['image']: give one for the whole "
            "run, `call_kwargs={'image': ...}`, or use a pipeline of text alone",
        ),
        (QwenImageEditPlusPipeline, "qwenimage", {}, "no attribute 'size'; it may need ['image']: give one"),
        (StableDiffusion3Img2ImgPipeline, "sd3", {}, "Input is in incorrect format.*; it may need ['image']: give"),
        (StableDiffusionInpaintPipeline, "sd15", {}, "it may need ['image', 'mask_image']: give"),
        (
            StableDiffusionInpaintPipeline,
            "sd15",
            {"image": Image.new("RGB", (16, 16))},
            "it may need ['mask_image']: give one for the whole run, `call_kwargs={'mask_image': ...}`, or",
        ),
        (LTXImageToVideoPipeline, "ltx", {}, "it may need ['image']: give"),
        (FluxControlPipeline, "flux", {}, "it may need ['control_image']: give"),
        (WanImageToVideoPipeline, "wan", {}, "missing 1 required.*; it may need ['image']: give"),
        (StableDiffusion3Pipeline, "sd3", {"height": 17}, "`height` and `width` .* but are 17 and 16."),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_a_pipeline_that_cannot_be_called_is_named(cls: type, family: str, call_kwargs: dict, sentence: str):
    parts = BUILDERS[family](0).components
    names = inspect.signature(cls.__init__).parameters.keys() - {"self"}
    pipe = cls(**{name: parts.get(name) for name in names if name in parts or name == "processor"})
    call = {key: value for key, value in CALL[family].items() if key in inspect.signature(cls.__call__).parameters}
    policy = Policy(pipe, STEPS, call | call_kwargs)
    for run_it in (policy.self_check, lambda prompts: policy.rollout(prompts, generators(), on_euler)):
        with pytest.raises(ValueError) as refusal:
            run_it(PROMPTS)
        words = ".*".join(re.escape(part) for part in sentence.split(".*"))
        assert re.search(f"^{cls.__name__} fails in its own `__call__`: .*{words}", str(refusal.value))
        assert refusal.value.__cause__ is not None
        assert (" it may need " in str(refusal.value)) == ("it may need" in sentence)


@pytest.mark.parametrize(
    ("family", "absent"),
    [
        ("sd3", ["text_encoder", "text_encoder_2", "text_encoder_3"]),
        ("flux", ["text_encoder"]),
        ("wan", ["text_encoder"]),
        ("zimage", ["text_encoder", "tokenizer"]),
    ],
)
def test_a_pipeline_that_was_loaded_without_its_encoders_is_told_so(family: str, absent: list[str]):
    pipe = BUILDERS[family](0)
    for name in absent:
        vars(pipe)[name] = None
    sentence = f"{type(pipe).__name__} fails in its own `__call__`: .* it is without its {absent}: load it with them"
    with pytest.raises(ValueError, match=sentence.replace("[", r"\[")):
        Policy(pipe, STEPS, CALL[family]).self_check(PROMPTS)


def test_what_others_raise_in_a_run_stays_as_it_is():
    """What an `on_step` raises, and what a pipeline does that has worked before, is about other things than its
    arguments."""
    policy = Policy(built("sd3"), STEPS, CALL["sd3"])

    def out_of_memory(*args: Any) -> Tensor:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        record(policy, out_of_memory)
    policy.self_check(PROMPTS)
    handle = policy.denoiser.register_forward_pre_hook(out_of_memory)
    with handle, pytest.raises(torch.OutOfMemoryError):
        policy.self_check(PROMPTS)


def test_self_check_refuses_guidance_that_depends_on_the_step():
    """SD3's skip-layer guidance, which starts after the first step."""
    policy = Policy(built("sd3"), STEPS, {**CALL["sd3"], "skip_guidance_layers": [0], "skip_layer_guidance_stop": 1.0})
    with pytest.raises(ValueError, match="at step 1 differs"):
        policy.self_check(PROMPTS)


@families
def test_self_check_hands_out_the_run(family: str):
    policy = Policy(built(family), STEPS, CALL[family])
    steps = policy.self_check(PROMPTS)
    assert [step.index for step in steps] == [0, 1]
    assert all(len(step.sample) == len(PROMPTS) and not step.prediction.requires_grad for step in steps)


def test_self_check_of_a_single_step():
    assert len(Policy(built("sd3"), 1, CALL["sd3"]).self_check(PROMPTS)) == 1


# Schedules


class Scaled(FlowMatchEulerDiscreteScheduler):
    """Scales the input of the model by the step it is at, as SDXL's own Euler solver does."""

    init_noise_sigma = 1.0

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        if self.step_index is None:
            self._init_step_index(timestep)
        return sample / (1 + self.sigmas[self.step_index] ** 2) ** 0.5


@torch.no_grad()
def test_step_index_advances():
    """SDXL under a scheduler whose `scale_model_input` reads it."""
    own, ours = BUILDERS["sdxl"](0), BUILDERS["sdxl"](0)
    own.scheduler, ours.scheduler = Scaled(), Scaled()
    visits, latents = run(own, **CALL["sdxl"])
    policy = Policy(ours, STEPS, CALL["sdxl"])
    for _ in range(2):
        steps, rolled_out = record(
            policy, lambda step: ode(step.sample, step.prediction, step.schedule, step.index).mean
        )
        assert_same(steps, visits)
        assert torch.equal(rolled_out, latents)


@torch.no_grad()
def test_shift_that_is_set_by_hand_is_kept():
    """`set_shift` does not reach a scheduler's config."""
    own, ours = BUILDERS["sd3"](0), BUILDERS["sd3"](0)
    for pipe in (own, ours):
        pipe.scheduler.set_shift(7.0)
    visits, _ = run(own, euler, **CALL["sd3"])
    assert_same(record(Policy(ours, STEPS, CALL["sd3"]))[0], visits)
    assert not torch.equal(visits[1].timestep, own_run("sd3")[0][1].timestep)


def test_solver_of_second_order_is_refused():
    pipe = BUILDERS["sd3"](0)
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    with pytest.raises(ValueError, match="FlowMatchHeunDiscreteScheduler.*first-order scheduler"):
        Policy(pipe, STEPS, CALL["sd3"]).self_check(PROMPTS)


@pytest.mark.parametrize("scheduler", [EDMEulerScheduler(), CogVideoXDDIMScheduler(snr_shift_scale=3.0)])
def test_noise_levels_that_ddim_would_not_take_are_refused(scheduler: Any):
    pipe = BUILDERS["sdxl"](0)
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=f"{type(scheduler).__name__}.*DDIM"):
        Policy(pipe, STEPS, CALL["sdxl"])


def test_prediction_of_the_sample_is_refused():
    pipe = BUILDERS["sd15"](0)
    pipe.scheduler = DDIMScheduler(prediction_type="sample")
    with pytest.raises(ValueError, match="prediction type 'sample' is not supported"):
        Policy(pipe, STEPS, CALL["sd15"]).self_check(PROMPTS)


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_levels_of_a_vp_schedule(set_alpha_to_one: bool):
    scheduler = DDIMScheduler(prediction_type="v_prediction", set_alpha_to_one=set_alpha_to_one, steps_offset=1)
    scheduler.set_timesteps(4)
    schedule = read_schedule(scheduler)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alphas = (1 - betas).cumprod(0)[[751, 501, 251, 1]].tolist()
    assert schedule.levels == pytest.approx([*alphas, 1.0 if set_alpha_to_one else 1 - 1e-4], rel=1e-4)
    assert schedule.prediction_type == "v_prediction" and not schedule.is_flow
