"""What the check at the start finds out, and what it refuses."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from diffusion_opd.encode_cache import EncodeCache
from diffusion_opd.policy import Policy
from diffusion_opd.startup import check_student, check_teacher, require_independence, sees_the_end
from tests.own_pipelines import (
    Broken,
    Detached,
    InPairs,
    Mixing,
    Momentum,
    Plain,
    Restless,
    Skips,
    Twice,
    WithoutLatents,
    WithoutPrompts,
    of,
)
from tests.own_runs import (
    INPUTS,
    PROMPTS,
    STEPS,
    built,
    counted,
    families,
    few_families,
    gradients_of,
    learner,
    unguided,
)
from tests.tiny_pipelines import BUILDERS, CALL, denoiser


@families
def test_check_of_a_student(family: str):
    """It fits, its predictions depend on nothing but the state, and the plan is that of its scheduler."""
    before = torch.get_rng_state()
    policy = Policy(built(family), STEPS, CALL[family])
    checked = check_student(policy, INPUTS, 0.99)
    assert torch.equal(torch.get_rng_state(), before)
    assert [visit.index for visit in checked.visits] == [0, 1]
    assert all(step.sample.shape[0] == len(PROMPTS) for visit in checked.visits for step in visit.steps)
    assert not any(step.prediction.requires_grad for visit in checked.visits for step in visit.steps)
    assert checked.learnt == (0, 1)
    schedule = checked.visits[0].steps[0].schedule
    assert [place.levels for place in checked.plan] == [((schedule, index),) for index in range(STEPS)]
    assert {place.chunk for place in checked.plan} == {0}
    require_independence(policy, checked)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_last_learnt_visit_is_seen(steps: int):
    checked = check_student(Policy(built("sd3"), steps, CALL["sd3"]), INPUTS, 1.0)
    assert [visit.index for visit in checked.visits] == sorted({0, min(1, steps - 1), steps - 1})
    assert len(checked.plan) == steps == len(checked.learnt)


def test_a_check_costs_few_calls_of_the_denoiser():
    """However many steps a walk has."""
    counts = []
    for steps in (5, 25):
        policy = Policy(BUILDERS["sd3"](0), steps, CALL["sd3"])
        with counted(policy.denoiser) as calls:
            check_student(policy, INPUTS, 0.99)
        counts.append(len(calls))
    assert counts[0] == counts[1] < 10


def test_a_check_leaves_the_gradients_of_the_student():
    pipe = learner("sd3", lora=True)
    check_student(Policy(pipe, STEPS, CALL["sd3"]), INPUTS, 1.0)
    gradients = gradients_of(pipe)
    assert gradients and all(gradient.any() for name, gradient in gradients.items() if "lora_B" in name)
    pipe = learner("sd3", lora=True)
    scaled = []
    check_student(Policy(pipe, STEPS, CALL["sd3"]), INPUTS, 1.0, lambda loss: scaled.append(loss.item()))
    assert len(scaled) == 2 and not gradients_of(pipe)


@few_families
def test_check_of_a_teacher(family: str):
    """A copy of the student is told from another; and it may have a guidance of its own."""
    cache = EncodeCache()
    checked = check_student(Policy(built(family), STEPS, CALL[family], cache), INPUTS, 1.0)
    assert check_teacher(Policy(BUILDERS[family](0), STEPS, CALL[family], cache), checked)
    assert not check_teacher(Policy(BUILDERS[family](1), STEPS, CALL[family], cache), checked)
    if family != "flux":  # has no guidance
        assert not check_teacher(Policy(BUILDERS[family](0), STEPS, unguided(family), cache), checked)


@few_families
def test_check_in_bfloat16(family: str):
    pipe = BUILDERS[family](0).to(torch.bfloat16)
    checked = check_student(Policy(pipe, STEPS, CALL[family]), INPUTS, 1.0)
    assert check_teacher(Policy(pipe, STEPS, CALL[family]), checked)


@pytest.mark.parametrize("cls", [Plain, WithoutLatents, WithoutPrompts])
def test_pipeline_of_ones_own_fits(cls: type):
    policy = Policy(of(cls), STEPS)
    checked = check_student(policy, INPUTS, 1.0)
    assert checked.depends == 0
    require_independence(policy, checked)


def test_pipeline_with_a_memory_fits_those_who_follow():
    """Not those who ask at single states."""
    policy = Policy(of(Momentum), STEPS)
    checked = check_student(policy, INPUTS, 1.0)
    assert check_teacher(Policy(of(Momentum), STEPS), checked)
    assert check_teacher(Policy(of(Plain), STEPS), checked)  # at the first state, which is what is compared
    assert checked.depends > 0.1
    with pytest.raises(ValueError, match="Momentum cannot be asked at a given state: without the steps before"):
        require_independence(policy, checked)


@pytest.mark.parametrize(
    ("cls", "sentence"),
    [
        (Broken, "Broken predicts NaN or infinity at step 0"),
        (Twice, "Twice .*steps its scheduler more often than it has timesteps"),
        (Skips, r"Skips lacks a seam: it called `scheduler.step` 2 times for 3 timesteps"),
        (Restless, "Restless cannot be followed: at visit 0 a copy that went where it went predicts otherwise"),
        (
            Mixing,
            "the samples of a batch are not independent in Mixing: beside others, the first one is predicted otherwise",
        ),
        (InPairs, r"InPairs has a state of shape \(4, 4, 8, 8\) for a batch of 2: one row a sample is needed"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_student_that_does_not_fit_is_refused(cls: type, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        check_student(Policy(of(cls), STEPS), INPUTS, 1.0)


def test_samples_that_meet_are_none_of_a_batch_of_one():
    check_student(Policy(of(Mixing), STEPS), {"prompt": PROMPTS[:1]}, 1.0)


@pytest.mark.parametrize("cls", [Momentum, Detached])
def test_whether_a_gradient_crosses_steps(cls: type):
    pipe = of(cls)
    pipe.transformer.requires_grad_(True)
    checked = check_student(Policy(pipe, STEPS), INPUTS, 1.0)
    assert checked.depends > 0.1 and checked.crosses == (cls is Momentum)


@pytest.mark.parametrize(
    ("cls", "sentence"),
    [
        (Broken, "Broken predicts NaN or infinity at step 0"),
        (Restless, "asked twice at visit 0, it predicts otherwise"),
        (InPairs, r"InPairs does not come to the states that Plain visits: its state is \(4, .*, the walk's \(2, "),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_teacher_that_does_not_fit_is_refused(cls: type, sentence: str):
    checked = check_student(Policy(of(Plain), STEPS), INPUTS, 1.0)
    with pytest.raises(ValueError, match=f"^{sentence}"):
        check_teacher(Policy(of(cls), STEPS), checked)


@pytest.mark.parametrize(
    ("family", "scheduler", "sentence"),
    [
        (
            "sd3",
            FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True),
            "FlowMatchEulerDiscreteScheduler draws noise as it steps",
        ),
        ("sdxl", DDIMScheduler(clip_sample=True), "Pipeline steps otherwise than `ddim`: at visit 0"),
        (
            "sdxl",
            DDIMScheduler(thresholding=True, clip_sample=False),
            "Pipeline steps otherwise than `ddim`: at visit 0",
        ),
    ],
    ids=["stochastic", "clips", "thresholds"],
)
def test_a_scheduler_that_steps_otherwise_is_refused(family: str, scheduler: object, sentence: str):
    pipe = BUILDERS[family](0)
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=sentence):
        check_student(Policy(pipe, STEPS, CALL[family]), INPUTS, 1.0)


def test_what_a_check_meets_after_the_pipeline_has_worked_stays_as_it_is():
    policy = Policy(built("sd3"), STEPS, CALL["sd3"])
    check_student(policy, INPUTS, 1.0)

    def out_of_memory(*args: object) -> None:
        raise torch.OutOfMemoryError

    with policy.denoiser.register_forward_pre_hook(out_of_memory), pytest.raises(torch.OutOfMemoryError):
        check_student(policy, INPUTS, 1.0)


@pytest.mark.parametrize("family", ["sd3", "flux", "sd15", "wan"])
def test_whether_the_end_of_a_prompt_is_seen(family: str):
    """Encoders cut what is too long for them, some without a word."""
    policy = Policy(built(family), STEPS, CALL[family])
    with counted(denoiser(built(family))) as calls:
        assert sees_the_end(policy, {"prompt": ["a red fox"] * 2})
        assert not sees_the_end(policy, {"prompt": ["a red fox " * 20] * 2})
    assert len(calls) <= 2
