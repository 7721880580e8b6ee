"""Walks and followers, on every family, against the unmodified pipeline (see own_runs.py). All numbers are equal bit
for bit."""

import gc
import inspect
import pickle
import re
import weakref
from functools import cache
from typing import Any

import accelerate
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    FlowMatchEulerDiscreteScheduler,
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
from PIL import Image
from torch import Tensor, nn

from diffusion_opd.encode_cache import EncodeCache
from diffusion_opd.objectives import kl
from diffusion_opd.policy import BACKBONE, Policy, active_adapter, tuner_layers
from diffusion_opd.scheduler_proxy import Step
from diffusion_opd.startup import check_student
from diffusion_opd.transitions import flow_sde, ode
from tests.own_pipelines import AtOnce, Momentum, Plain, Tracked, Twice, WithoutLatents, WithoutPrompts, of
from tests.own_runs import (
    INPUTS,
    PROMPTS,
    STEPS,
    Seen,
    adapted,
    along,
    as_reference,
    asked,
    assert_same,
    at,
    built,
    counted,
    euler,
    families,
    few_families,
    generators,
    gradients_of,
    learner,
    levels_of,
    on_euler,
    own_run,
    quiet,
    reference,
    run,
    unguided,
    walked,
    with_teacher_lora,
)
from tests.tiny_pipelines import BUILDERS, CALL, FLOW, denoiser

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # a second adapter, on purpose


def on_ode(step: Step) -> Tensor:
    return ode(step.sample, step.prediction, step.schedule, step.index).mean


# The contract, on every family


@families
@torch.no_grad()
def test_walk_is_the_pipelines_own_run(family: str):
    seen, latents = own_run(family)
    policy = Policy(built(family), STEPS, CALL[family])
    visits, output = walked(policy)
    assert_same(visits, seen)
    assert torch.equal(output, latents)
    assert [visit.index for visit in visits] == list(range(STEPS))
    steps = [step for visit in visits for step in visit.steps]
    assert [(step.stream, step.chunk, step.index) for step in steps] == [(0, 0, index) for index in range(STEPS)]
    assert all(step.schedule.levels == levels_of(reference(family).scheduler) for step in steps)
    assert all(step.schedule.is_flow == (family in FLOW) for step in steps)
    assert all(torch.equal(step.next_sample, after.sample) for step, after in zip(steps, seen[1:], strict=False))

    if isinstance(built(family).scheduler, FlowMatchEulerDiscreteScheduler):  # the ODE kernel is its own step
        _, own = run(reference(family), **CALL[family])
        assert torch.equal(walked(policy, on_ode)[1], own)


@families
@torch.no_grad()
def test_single_states_are_jumped_to(family: str):
    """At the states that the pipeline's own solver visits (multistep for Wan and SANA), asked in any order, and several
    of them of one follower."""
    seen, _ = run(reference(family), **CALL[family])
    assert len(seen) == STEPS
    policy = Policy(built(family), STEPS, CALL[family])
    for place in reversed(range(STEPS)):
        (prediction,) = asked(policy, at(place, seen[place].sample))
        assert prediction.abs().max() > 0 and prediction.dtype == seen[place].prediction.dtype
        assert torch.equal(prediction, seen[place].prediction)
    first, last = asked(policy, at(0, seen[0].sample), at(2, seen[2].sample))
    assert torch.equal(first, seen[0].prediction) and torch.equal(last, seen[2].prediction)


@families
@torch.no_grad()
def test_equal_weights_leave_no_gap(family: str):
    """In lock-step with a walk, and as a replay of what it was."""
    cache = EncodeCache()
    student = Policy(built(family), STEPS, CALL[family], cache)
    equal, other = (Policy(BUILDERS[family](seed), STEPS, CALL[family], cache) for seed in (0, 1))
    visits = []
    with student.walk(INPUTS, generators(), on_euler) as walk, equal.follow(walk) as same, other.follow(walk) as apart:
        for visit in walk:
            (step,), (target,), (further,) = visit.steps, same(visit), apart(visit)
            assert torch.equal(target, step.prediction)
            assert (further - step.prediction).abs().max() > 0.01 * step.prediction.abs().max()
            visits.append(visit)
    assert len(visits) == STEPS
    for prediction, visit in zip(asked(equal, *visits), visits, strict=True):
        assert torch.equal(prediction, visit.steps[0].prediction)


@families
@torch.no_grad()
def test_teacher_of_another_guidance_does_not_disturb_the_student(family: str):
    """Asked between the steps, and by way of the very pipeline that is running."""
    seen, _ = own_run(family)
    targets, _ = run(reference(family), along([one.sample for one in seen]), **unguided(family))

    cache = EncodeCache()
    policy, teacher = (Policy(built(family), STEPS, kwargs, cache) for kwargs in (CALL[family], unguided(family)))
    visits, answers = [], []
    with policy.walk(INPUTS, generators(), on_euler) as walk, teacher.follow(walk) as follow:
        for visit in walk:
            visits.append(visit)
            answers.append(Seen(visit.steps[0].timestep, visit.steps[0].sample, *follow(visit)))
    assert_same(visits, seen)
    assert_same(answers, targets)
    if family != "flux":
        assert not torch.equal(answers[0].prediction, seen[0].prediction)


@families
@torch.no_grad()
def test_pipeline_is_left_as_it_was(family: str):
    pipe = BUILDERS[family](0)
    pipe.set_progress_bar_config(disable=True, desc="mine")
    run(pipe, **unguided(family))  # leaves guidance and the like behind, and a scheduler in the middle of things
    attributes, config, components = dict(vars(pipe)), dict(pipe.config), dict(pipe.components)
    scheduler, weights = pickle.dumps(vars(pipe.scheduler)), pickle.dumps(denoiser(pipe).state_dict())
    processors = [module.processor for module in denoiser(pipe).modules() if hasattr(module, "set_processor")]

    policy = Policy(pipe, STEPS, CALL[family])
    with policy.walk(INPUTS, generators(), on_euler) as walk, policy.follow(walk) as follow:
        follow(walk.advance())
        visit = walk.advance()  # and is left there
    asked(policy, visit)

    assert vars(pipe).keys() == attributes.keys()
    for name, value in attributes.items():
        assert vars(pipe)[name] is value, name
    assert dict(pipe.config) == config
    assert pipe.components.keys() == components.keys()
    assert all(pipe.components[name] is part for name, part in components.items())
    assert pipe._progress_bar_config == {"disable": True, "desc": "mine"}
    assert pickle.dumps(vars(pipe.scheduler)) == scheduler
    assert pickle.dumps(denoiser(pipe).state_dict()) == weights
    assert processors == [module.processor for module in denoiser(pipe).modules() if hasattr(module, "set_processor")]


@families
@torch.no_grad()
def test_later_steps_are_not_computed(family: str):
    """The states are those of the whole walk, and the denoiser runs for no more; nor does it for a walk that is left
    by `break`, which is closed then."""
    seen, _ = own_run(family)
    policy = Policy(built(family), STEPS, CALL[family])
    counts = []
    for count in (STEPS, 2, 1):
        walk, visits = policy.walk(INPUTS, generators(), on_euler), []
        with counted(denoiser(built(family))) as calls:
            for visit in walk:
                visits.append(visit)
                if len(visits) == count:
                    break
            assert count == STEPS or walk.ended
        assert_same(visits, seen[:count])
        assert len(visits[0].steps[0].schedule.levels) == STEPS + 1
        counts.append(len(calls))
    per_step = counts[-1]
    assert counts == [STEPS * per_step, 2 * per_step, per_step] and per_step in (1, 2)

    with counted(denoiser(built(family))) as calls:
        asked(policy, at(2, seen[2].sample))
    assert len(calls) == per_step


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
        visits, _ = walked(policy, denoiser=wrapper)
        predictions = asked(policy, *visits, denoiser=wrapper)
    assert_same(visits, own_run(family)[0])
    assert all(torch.equal(p, visit.steps[0].prediction) for p, visit in zip(predictions, visits, strict=True))
    assert calls.count(wrapper) == calls.count(module) > 0


@families
@torch.no_grad()
def test_random_state_is_left_alone(family: str):
    """Also where a walk is left, and what is drawn between two visits is what would have been drawn without it."""
    policy = Policy(built(family), STEPS, CALL[family])
    before = torch.get_rng_state()
    visits, _ = walked(policy)
    asked(policy, *visits[1:])
    with policy.walk(INPUTS, generators(), on_euler) as walk:
        walk.advance()
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.get_rng_state(), before)


@families
@torch.no_grad()
def test_bfloat16(family: str):
    """The state handed back has the dtype that the pipeline gave, though the kernels answer in float32."""
    pipe = as_reference(BUILDERS[family](0).to(torch.bfloat16), family)
    seen, _ = run(pipe, lambda *args: euler_in_float32(*args).to(args[1].sample.dtype), **CALL[family])
    policy = Policy(pipe, STEPS, CALL[family])
    visits, _ = walked(policy, lambda step: euler_in_float32(step.index, step, step.schedule.levels))
    assert_same(visits, seen)
    for visit, one in zip(visits, seen, strict=True):
        (step,) = visit.steps
        assert step.sample.dtype == seen[0].sample.dtype and step.prediction.dtype == one.prediction.dtype
    for place, prediction in enumerate(asked(policy, *visits)):
        assert torch.equal(prediction, seen[place].prediction)
    assert torch.equal(*asked(policy, at(2, seen[2].sample)), seen[2].prediction)


def euler_in_float32(index: int, seen: Seen | Step, levels: tuple[float, ...]) -> Tensor:
    return seen.sample.float() + (levels[index + 1] - levels[index]) * seen.prediction.float()


@torch.no_grad()
def test_source_image_for_editing():
    """FLUX.1 Kontext: the image is part of what `prepare_latents` returns, beside the state."""
    own, ours = (quiet(FluxKontextPipeline(**BUILDERS["flux_guidance"](0).components)) for _ in range(2))
    image = Image.effect_noise((16, 16), 50).convert("RGB")
    call_kwargs = {**CALL["flux_guidance"], "image": image, "max_area": 256, "_auto_resize": False}
    seen, _ = run(own, euler, **call_kwargs)
    policy = Policy(ours, STEPS, call_kwargs)
    visits, _ = walked(policy)
    assert_same(visits, seen)
    for place in range(STEPS):
        assert torch.equal(*asked(policy, at(place, seen[place].sample)), seen[place].prediction)
    other = Policy(ours, STEPS, {**call_kwargs, "image": image.rotate(90)})
    assert not torch.equal(asked(other, *visits)[0], seen[0].prediction)


# What can be done with a walk


@torch.no_grad()
def test_walk_runs_to_its_end_and_decodes():
    policy = Policy(built("sd3"), STEPS, CALL["sd3"])
    assert torch.equal(policy.walk(INPUTS, generators(), on_euler).run(), own_run("sd3")[1])
    pictures = policy.walk(INPUTS, generators(), on_ode, output_type="pil").run()
    own = reference("sd3")(PROMPTS, num_inference_steps=STEPS, generator=generators(), **CALL["sd3"]).images
    assert [one.tobytes() for one in pictures] == [one.tobytes() for one in own]


@few_families
@torch.no_grad()
def test_plan_knows_every_visit_and_computes_none(family: str):
    """But one for each kind of call, whose form has to be seen once."""
    policy = Policy(built(family), STEPS, CALL[family])
    seen, _ = own_run(family)
    walked(policy)
    with counted(denoiser(built(family))) as calls, policy.walk(INPUTS, generators(), on_euler) as walk:
        plan = walk.plan()
    assert not calls and walk.ended and walk.advance() is None
    for index, (visit, one) in enumerate(zip(plan, seen, strict=True)):
        (step,) = visit.steps
        assert (visit.index, step.index) == (index, index)
        assert torch.equal(step.timestep, one.timestep) and step.sample.shape == one.sample.shape


@few_families
@torch.no_grad()
def test_walk_jumps_without_moving(family: str):
    noise = own_run(family)[0][0].sample
    expected, _ = run(reference(family), along([noise] * STEPS), **CALL[family])
    policy = Policy(built(family), STEPS, CALL[family])
    with policy.walk(INPUTS, generators(), on_euler) as walk:
        walk.jump(2)
        visit = walk.advance()
    assert visit.index == 2
    assert_same([visit], expected[2:])
    with policy.walk(INPUTS, generators(), on_euler) as walk, pytest.raises(IndexError, match="3 visits, and not 5"):
        walk.jump(4)


@torch.no_grad()
def test_follower_begins_where_the_walk_began():
    """Though the walk has drawn from its generators since; and several can follow, also after its end."""
    policy = Policy(built("sd3"), STEPS, CALL["sd3"])
    given = generators()
    with policy.walk(INPUTS, given, on_euler) as walk:
        visits = list(walk)
    for _ in range(2):
        with policy.follow(walk) as follow:
            assert all(torch.equal(*follow(visit), visit.steps[0].prediction) for visit in visits)
    assert not torch.equal(given[0].get_state(), generators()[0].get_state())


@torch.no_grad()
def test_follower_that_is_elsewhere_says_so():
    policy = Policy(built("sd3"), STEPS, CALL["sd3"])
    visits, _ = walked(policy)
    with policy.follow(inputs=INPUTS, generators=generators()) as follow:
        follow(visits[1])
        with pytest.raises(ValueError, match="does not go back: it is at visit 2, and was asked at 0"):
            follow(visits[0])
    with pytest.raises(ValueError, match="does not come to the states .* it ended after 3 visits"):
        asked(policy, *visits, at(3, visits[0].steps[0].sample))
    with pytest.raises(ValueError, match=r"its state is \(2, 4, 8, 8\), the walk's \(2, 5, 8, 8\), at visit 0"):
        asked(policy, at(1, torch.zeros(2, 5, 8, 8)))
    with pytest.raises(ValueError, match=r"its state is \(2, 4, 8, 8\), the walk's \(1, 4, 8, 8\), at visit 0"):
        asked(policy, at(0, torch.zeros(1, 4, 8, 8)))
    with pytest.raises(ValueError, match="a follower needs a walk, or the inputs and generators of one"):
        policy.follow(inputs=INPUTS)
    longer = Policy(built("sd3"), STEPS + 1, CALL["sd3"])
    with policy.walk(INPUTS, generators(), on_euler) as walk, longer.follow(walk) as follow:
        with pytest.raises(ValueError, match="it sets its timesteps otherwise"):
            follow(walk.advance())


# Learning inside the walk, against two passes over the recorded states


@cache
def two_passes(family: str, lora: bool) -> tuple[list[float], dict[str, Tensor]]:
    """Without our code: the student's rollout without gradient, the teacher alone along its states, then the student
    along its states with gradient. Teacher and student live in pipelines of their own."""
    student = learner(family, lora)
    seen, _ = run(student, euler, **CALL[family])
    states = [one.sample for one in seen]

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


@few_families
@pytest.mark.parametrize("kind", ["lora", "lora with checkpointing", "full", "full, as a replay"])
def test_learning_inside_the_walk_equals_two_passes(family: str, kind: str):
    lora, cache = kind.startswith("lora"), EncodeCache()
    if lora:  # the teacher is another adapter of the student's own pipeline
        pipe = adapted(family)
        teacher = Policy(pipe, STEPS, unguided(family), cache, adapter="teacher")
    else:
        pipe = learner(family, lora=False)
        teacher = Policy(BUILDERS[family](1), STEPS, unguided(family), cache)
    if kind == "lora with checkpointing":
        denoiser(pipe).enable_gradient_checkpointing()
    student = Policy(pipe, STEPS, CALL[family], cache)
    losses = []

    def learn(prediction: Tensor, target: Tensor) -> None:
        loss = (prediction.float() - target.float()).square().mean()
        loss.backward()
        losses.append(loss.item())

    if kind == "full, as a replay":
        with torch.no_grad():
            visits, _ = walked(student)
        given = {"inputs": INPUTS, "generators": generators()}
        with student.follow(**given) as again, teacher.follow(**given) as follow:
            for visit in visits:
                with torch.no_grad():
                    (target,) = follow(visit)
                learn(*again(visit), target)
    else:
        with student.walk(INPUTS, generators(), on_euler) as walk, teacher.follow(walk) as follow:
            for visit in walk:
                with torch.no_grad():
                    (target,) = follow(visit)
                learn(visit.steps[0].prediction, target)
    expected_losses, expected = two_passes(family, lora)
    found = gradients_of(pipe)
    assert losses == expected_losses
    assert found.keys() == expected.keys() and all("teacher" not in name for name in found)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    assert any(gradient.any() for gradient in expected.values())


def test_checkpointing_recomputes():
    """What makes the test above a test of it: blocks run again in the backward pass, with the teacher in between."""
    pipe = adapted()
    pipe.transformer.enable_gradient_checkpointing()
    cache = EncodeCache()
    student, teacher = (Policy(pipe, STEPS, CALL["sd3"], cache, adapter=name) for name in (None, "teacher"))
    block, adapters = pipe.transformer.transformer_blocks[0], []
    handle = block.register_forward_pre_hook(lambda *_: adapters.append(tuner_layers(block)[0].active_adapters))
    with student.walk(INPUTS, generators(), on_euler) as walk, teacher.follow(walk) as follow:
        visit = walk.advance()
        with torch.no_grad():
            follow(visit)
        visit.steps[0].prediction.float().square().mean().backward()
    handle.remove()
    assert adapters == [["student"], ["teacher"], ["student"]]


def test_each_forward_pass_is_under_the_gradient_mode_of_who_asks_for_it():
    policy = Policy(learner("sd3", lora=True), STEPS, CALL["sd3"])
    with policy.walk(INPUTS, generators(), on_euler) as walk, policy.follow(walk) as follow:
        for index in range(STEPS):
            with torch.set_grad_enabled(index != 1):
                visit = walk.advance()
            with torch.set_grad_enabled(index == 1):
                (answer,) = follow(visit)
            assert torch.is_grad_enabled()
            assert visit.steps[0].prediction.requires_grad == (index != 1)
            assert answer.requires_grad == (index == 1)
            assert not visit.steps[0].sample.requires_grad and not visit.steps[0].next_sample.requires_grad


@pytest.mark.parametrize("asked_before", [False, True])
def test_autocast(asked_before: bool):
    """One context around the whole walk, as a trainer has it: states keep the pipeline's dtype, kernels and losses are
    float32, and weights that were cast without gradient for a question do not lose theirs."""
    pipe = learner("sd3", lora=True)
    policy, steps = Policy(pipe, STEPS, CALL["sd3"]), []

    def move(step: Step) -> Tensor:
        assert torch.is_autocast_enabled("cpu")
        return flow_sde(step.sample, step.prediction, step.schedule, step.index, 0.7).mean

    with torch.autocast("cpu", torch.bfloat16):
        if asked_before:
            with torch.no_grad():
                asked(policy, at(1, torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))))
        with policy.walk(INPUTS, generators(), move) as walk, policy.follow(walk) as follow:
            for visit in walk:
                (step,) = visit.steps
                steps.append(step)
                ours = flow_sde(step.sample, step.prediction, step.schedule, step.index, 0.7)
                with torch.no_grad():
                    assert torch.equal(*follow(visit), step.prediction)
                loss = kl(ours, ours._replace(mean=torch.zeros_like(ours.mean))).mean()
                assert ours.mean.dtype == loss.dtype == torch.float32
                assert torch.is_autocast_enabled("cpu")
                loss.backward()
    assert not torch.is_autocast_enabled("cpu")
    assert {step.prediction.dtype for step in steps} == {torch.float32}  # whose guidance is not rounded once more
    assert {step.sample.dtype for step in steps} == {torch.float32}
    gradients = gradients_of(pipe)
    assert gradients and all(gradient.any() for name, gradient in gradients.items() if "lora_B" in name)


@pytest.mark.parametrize("early", [False, True])
def test_nothing_outlives_its_call(early: bool):
    """No cycle holds a prediction, and so its graph, until the next garbage collection."""
    policy = Policy(learner("sd3", lora=True), STEPS, CALL["sd3"])
    held = []

    def watch(*things: Any) -> None:
        held.extend(weakref.ref(thing) for thing in things)

    def learn() -> None:
        with policy.walk(INPUTS, generators(), on_euler) as walk, policy.follow(walk) as follow:
            watch(walk, follow)
            for visit in walk:
                (answer,) = follow(visit)
                (step,) = visit.steps
                assert answer.requires_grad and step.prediction.requires_grad and not step.sample.requires_grad
                watch(answer, step.prediction)
                if early and visit.index == 1:
                    break

    gc.collect()
    gc.disable()
    try:
        learn()
        assert len(held) == 2 + 2 * (2 if early else STEPS)
        assert all(reference() is None for reference in held)
    finally:
        gc.enable()


# Adapters


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
    alone = {
        "student": learner("sd3", lora=True),
        "teacher": with_teacher_lora(BUILDERS["sd3"](0)),
        BACKBONE: built("sd3"),
    }
    visit = at(1, torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    answers = []
    for name, only in alone.items():
        (expected,) = asked(Policy(only, STEPS, CALL["sd3"]), visit)
        with active_adapter(tuner_layers(pipe.transformer), name):
            assert torch.equal(*asked(Policy(pipe, STEPS, CALL["sd3"]), visit), expected)
        assert torch.equal(*asked(Policy(pipe, STEPS, CALL["sd3"], adapter=name), visit), expected)
        answers.append(expected)
    for index, answer in enumerate(answers):
        assert not torch.allclose(answer, answers[index - 1], rtol=0.01, atol=0.01)


def test_adapter_is_active_while_its_policy_runs_and_at_no_other_time():
    """Between the visits of a teacher's walk the student's is, also where a call fails or is left."""
    pipe = adapted()
    layers = tuner_layers(pipe.transformer)
    policy = Policy(pipe, STEPS, CALL["sd3"], adapter="teacher")

    def active() -> set[str]:
        return {name for layer in layers for name in layer.active_adapters}

    def move(step: Step) -> Tensor:
        assert active() == {"teacher"}
        if step.index == 1:
            raise KeyError("on purpose")
        return on_euler(step)

    with pytest.raises(KeyError, match="on purpose"), policy.walk(INPUTS, generators(), move) as walk:
        walk.advance()
        assert active() == {"student"}
        walk.advance()
    assert active() == {"student"}
    with policy.walk(INPUTS, generators(), on_euler) as walk:
        walk.advance()
    assert active() == {"student"}
    with pytest.raises(ValueError, match="its state is"), torch.no_grad():
        asked(policy, at(1, torch.zeros(2, 5, 8, 8)))
    assert active() == {"student"}


# Pipelines of one's own


@pytest.mark.parametrize("cls", [Plain, WithoutLatents, WithoutPrompts, Momentum])
@torch.no_grad()
def test_pipeline_of_ones_own(cls: type):
    """No `prepare_latents` and no `encode_prompt` is needed, nor a memory that the next step is free of."""
    seen, latents = run(of(cls))
    policy, equal = Policy(of(cls), STEPS), Policy(of(cls), STEPS)
    visits = []
    with policy.walk(INPUTS, generators(), on_ode) as walk, equal.follow(walk) as follow:
        for visit in walk:
            assert torch.equal(*follow(visit), visit.steps[0].prediction)
            visits.append(visit)
    assert_same(visits, seen)
    assert torch.equal(walk.output, latents)
    for prediction, visit in zip(asked(equal, *visits), visits, strict=True):
        assert torch.equal(prediction, visit.steps[0].prediction)


@torch.no_grad()
def test_a_state_of_another_draw_is_not_taken_for_the_followers_own():
    """Where no seam hands over the first state, it is compared."""
    policy = Policy(of(WithoutLatents), STEPS)
    visits, _ = walked(policy)
    with pytest.raises(ValueError, match="WithoutLatents does not come to the states .* its state is another"):
        with policy.follow(inputs=INPUTS, generators=generators(seed=6)) as follow:
            follow(visits[0])
    assert torch.equal(*asked(policy, visits[2]), visits[2].steps[0].prediction)


@torch.no_grad()
def test_momentum_depends_on_the_way():
    """What it predicts at a state that is jumped to is another number: why some callers refuse it."""
    policy = Policy(of(Momentum), STEPS)
    visits, _ = walked(policy)
    assert not torch.allclose(*asked(policy, visits[2]), visits[2].steps[0].prediction, rtol=0.01)


@torch.no_grad()
def test_unconditional_pipeline_walks_without_inputs():
    """It has no `prepare_latents`, no `encode_prompt` and no prompt."""
    unet = UNet2DModel(sample_size=8, block_out_channels=(8, 8), norm_num_groups=2, layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"))  # fmt: skip
    pipe = quiet(DDPMPipeline(unet.eval(), DDIMScheduler(clip_sample=False)))
    policy = Policy(pipe, STEPS, {"batch_size": 2})
    own = pipe(batch_size=2, generator=generators(), num_inference_steps=STEPS, output_type="np").images
    visits = []

    def move(step: Step) -> Tensor:
        scheduler = DDIMScheduler(clip_sample=False)
        scheduler.set_timesteps(STEPS)
        return scheduler.step(step.prediction, step.timestep, step.sample).prev_sample

    with policy.walk({}, generators(), move, output_type="np") as walk, policy.follow(walk) as follow:
        for visit in walk:
            assert torch.equal(*follow(visit), visit.steps[0].prediction)
            visits.append(visit)
    assert len(visits) == STEPS
    assert (walk.output == own).all()
    with pytest.raises(ValueError, match=r"arguments of DDPMPipeline, each with one value a sample.*got \['prompt'\]"):
        Policy(pipe, STEPS).walk(INPUTS, generators(), move).run()


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("sd3", {"skip_guidance_layers": [0], "skip_layer_guidance_stop": 1.0}),  # starts after the first step
        ("lumina2", {"cfg_trunc_ratio": 0.5}),  # none after the first step
    ],
)
@torch.no_grad()
def test_guidance_that_depends_on_the_step(family: str, extra: dict[str, Any]):
    """Asked at a single state, it is that of the step."""
    call_kwargs = {**CALL[family], **extra}
    seen, _ = run(reference(family), euler, **call_kwargs)
    policy = Policy(built(family), STEPS, call_kwargs)
    assert_same(walked(policy)[0], seen)
    for place in range(STEPS):
        assert torch.equal(*asked(policy, at(place, seen[place].sample)), seen[place].prediction)
    usual, _ = run(reference(family), along([one.sample for one in seen]), **CALL[family])
    differs = [not torch.equal(a.prediction, b.prediction) for a, b in zip(seen, usual, strict=True)]
    assert True in differs and False in differs


# What is refused


def test_missing_seam_is_named():
    sentence = r"Tracked lacks a seam.*`__call__` is not decorated with `torch.no_grad\(\)`"
    with pytest.raises(ValueError, match=sentence):
        Policy(of(Tracked), STEPS)


@pytest.mark.parametrize(
    ("cls", "sentence"),
    [
        (Twice, "steps its scheduler more often than it has timesteps"),
        (AtOnce, "AtOnce steps its scheduler twice between two calls of its transformer"),
    ],
)
@torch.no_grad()
def test_step_is_called_once_a_timestep_at_most(cls: type, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        walked(Policy(of(cls), STEPS))


def test_a_pipeline_without_a_denoiser_is_refused():
    components = BUILDERS["wan"](0).components
    none = type(built("wan"))(**{**components, "transformer": None})
    with pytest.raises(ValueError, match="^WanPipeline has no denoiser by the names that are known"):
        Policy(none, STEPS, CALL["wan"])


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
    ("cls", "family", "call_kwargs", "sentence"),
    [
        (
            QwenImageEditPipeline,
            "qwenimage",
            {},
            "AttributeError: 'NoneType' object has no attribute 'size'; it may need ['image']: a column of that "
            "name, or one for all samples, `call_kwargs={'image': ...}`",
        ),
        (QwenImageEditPlusPipeline, "qwenimage", {}, "no attribute 'size'; it may need ['image']: a column"),
        (StableDiffusion3Img2ImgPipeline, "sd3", {}, "Input is in incorrect format.*; it may need ['image']: a column"),
        (StableDiffusionInpaintPipeline, "sd15", {}, "it may need ['image', 'mask_image']: a column"),
        (
            StableDiffusionInpaintPipeline,
            "sd15",
            {"image": Image.new("RGB", (16, 16))},
            "it may need ['mask_image']: a column of that name, or one for all samples, ",
        ),
        (LTXImageToVideoPipeline, "ltx", {}, "it may need ['image']: a column"),
        (FluxControlPipeline, "flux", {}, "it may need ['control_image']: a column"),
        (WanImageToVideoPipeline, "wan", {}, "missing 1 required.*; it may need ['image']: a column"),
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
    for run_it in (lambda: check_student(policy, INPUTS, 1.0), policy.walk(INPUTS, generators(), on_euler).run):
        with pytest.raises(ValueError) as refusal:
            run_it()
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
        walked(Policy(pipe, STEPS, CALL[family]))


def test_what_others_raise_in_a_run_stays_as_it_is():
    """What a `move` raises, and what a pipeline does that has worked before, is about other things than its
    arguments."""
    policy = Policy(built("sd3"), STEPS, CALL["sd3"])

    def out_of_memory(*args: Any) -> Tensor:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        walked(policy, out_of_memory)
    walked(policy)
    handle = policy.denoiser.register_forward_pre_hook(out_of_memory)
    with handle, pytest.raises(torch.OutOfMemoryError):
        walked(policy)


def test_a_walk_that_failed_is_over_and_leaves_its_policy_as_it_was():
    policy = Policy(built("sd3"), STEPS, CALL["sd3"])

    def fail(step: Step) -> Tensor:
        raise KeyError("on purpose")

    walk = policy.walk(INPUTS, generators(), fail)
    with pytest.raises(KeyError), walk:
        walk.advance()
    assert walk.ended and walk.advance() is None
    with torch.no_grad():
        assert_same(walked(policy)[0], own_run("sd3")[0])
