"""Walking and following where a run is more than one state after another: several streams, chunk after chunk, a start
in the middle of the schedule, a slice of the latents, drawn conditioning; on real classes of diffusers.

What is expected comes from `run`: the unmodified pipeline, of whose schedulers only `step` is watched, and replaced
where it is to visit given states.
"""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import Tensor, nn

from diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer
from diffusion_opd.policy import Policy, Visit, Walk
from diffusion_opd.scheduler_proxy import Step
from diffusion_opd.startup import check_student, check_teacher
from diffusion_opd.transitions import ode
from tests.streaming_pipelines import PICTURES, STREAMING, STREAMING_CALL
from tests.tiny_pipelines import LORA_TARGETS, denoiser

PROMPTS = ["a red fox", "two blue birds"]
STEPS = 4

# Chunk, and the noise level of each stream: every visit of a walk
PLANS: dict[str, list[tuple[int, dict[int, int]]]] = {
    "ltx2": [(0, {0: level, 1: level}) for level in range(STEPS)],
    "skyreels": [(0, {0: level, 1: level, 2: level}) for level in range(STEPS)],
    "skyreels_ar": [  # two levels apart, with `ar_step=2`
        (0, {0: 0}),
        (0, {0: 1}),
        (0, {0: 2, 1: 0}),
        (0, {0: 3, 1: 1}),
        (0, {1: 2, 2: 0}),
        (0, {1: 3, 2: 1}),
        (0, {2: 2}),
        (0, {2: 3}),
    ],
    "helios": [(chunk, {0: level}) for chunk in range(2) for level in range(STEPS)],
    "sd3_img2img": [(0, {0: 2}), (0, {0: 3})],
    "flux_img2img": [(0, {0: 2}), (0, {0: 3})],
    "ltx_i2v": [(0, {0: level}) for level in range(STEPS)],
    "flux_control": [(0, {0: level}) for level in range(STEPS)],
}
LEARNT = {
    "skyreels_ar": (0, 1, 2, 3),
    "helios": (0, 1, 4, 5),
    "sd3_img2img": (0,),
    "flux_img2img": (0,),
}
# Another guidance, and another shift of the schedule
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ltx2": ({"audio_guidance_scale": 2.0, "stg_scale": 0.0, "audio_stg_scale": 0.0}, {"max_shift": 3.0}),
    "skyreels": ({"guidance_scale": 1.0}, {"flow_shift": 3.0}),
    "skyreels_ar": ({"guidance_scale": 1.0}, {"flow_shift": 3.0}),
    "helios": ({"guidance_scale": 1.0}, {"use_dynamic_shifting": False}),
    "sd3_img2img": ({"guidance_scale": 1.0}, {"shift": 1.0}),
    "flux_img2img": ({"guidance_scale": 1.5}, {"max_shift": 3.0}),
    "ltx_i2v": ({"guidance_scale": 1.0}, {"max_shift": 3.0}),
    "flux_control": ({"guidance_scale": 1.5}, {"max_shift": 3.0}),
}
families = pytest.mark.parametrize("family", STREAMING)


def inputs(family: str) -> dict[str, list[Any]]:
    return {"prompt": PROMPTS} | ({"image": PICTURES[family]} if family in PICTURES else {})


def generators(seed: int = 5) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + index) for index in range(len(PROMPTS))]


# The unmodified pipeline, watched


class Seen(NamedTuple):
    timestep: Tensor
    sample: Tensor
    prediction: Tensor


def run(
    family: str, pipe: DiffusionPipeline, go_to: list[list[Tensor]] | None = None, **call_kwargs: Any
) -> tuple[list[list[Seen]], Any]:
    """What reaches the pipeline's schedulers between two calls of its denoiser, and what it returns. `go_to`: what
    their `step`s answer instead."""
    seen: list[list[Seen]] = []
    between = True
    cls: Any = type(pipe.scheduler)
    step = cls.step

    def forward(*args: Any) -> None:
        nonlocal between
        between = True

    def watched(self: Any, model_output: Tensor, timestep: Tensor, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal between
        if between:
            seen.append([])
        between = False
        seen[-1].append(Seen(timestep, sample.clone(), model_output))  # it may be a view that is written into
        if go_to is None:
            return step(self, model_output, timestep, sample, *args, **kwargs)
        return (go_to[len(seen) - 1][len(seen[-1]) - 1],)

    handle = denoiser(pipe).register_forward_hook(forward)
    cls.step = watched
    try:
        output = pipe(
            **inputs(family),
            num_inference_steps=STEPS,
            generator=generators(),
            output_type="latent",
            **STREAMING_CALL[family] | call_kwargs,
        )
    finally:
        cls.step = step
        handle.remove()
    return seen, output[0]


def euler(step: Step) -> Tensor:
    return ode(step.sample, step.prediction, step.schedule, step.index).mean


def wandering() -> Callable[[Step], Tensor]:
    """Somewhere that no scheduler would go."""
    noise = torch.Generator().manual_seed(3)
    return lambda step: euler(step) + 0.1 * torch.randn(step.sample.shape, generator=noise)


def walked(policy: Policy, family: str, move: Callable[[Step], Tensor]) -> tuple[list[Visit], Walk]:
    with torch.no_grad(), policy.walk(inputs(family), generators(), move) as walk:
        return list(walk), walk


def policy_of(family: str, seed: int = 0, **call_kwargs: Any) -> Policy:
    return Policy(STREAMING[family](seed), STEPS, STREAMING_CALL[family] | call_kwargs)


def predictions(visits: list[Visit]) -> list[Tensor]:
    return [step.prediction for visit in visits for step in visit.steps]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# The walk


@families
def test_a_walk_goes_where_the_plain_call_goes(family: str):
    seen, output = run(family, STREAMING[family]())
    visits, walk = walked(policy_of(family), family, euler)
    assert [(visit.chunk, {step.stream: step.index for step in visit.steps}) for visit in visits] == PLANS[family]
    assert [visit.index for visit in visits] == list(range(len(visits)))
    assert [len(visit.steps) for visit in visits] == [len(steps) for steps in seen]
    for step, theirs in zip([s for v in visits for s in v.steps], [s for steps in seen for s in steps], strict=True):
        assert torch.equal(step.timestep, theirs.timestep)
        torch.testing.assert_close(step.sample, theirs.sample)
        torch.testing.assert_close(step.prediction, theirs.prediction, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(walk.output, output)


@families
def test_a_stream_goes_on_where_it_went(family: str):
    """Each state is where the visit before went, within a stream and a chunk."""
    visits, _ = walked(policy_of(family), family, wandering())
    last: dict[tuple[int, int], Step] = {}
    for step in [step for visit in visits for step in visit.steps]:
        if before := last.get((step.stream, step.chunk)):
            assert step.index == before.index + 1 and torch.equal(step.sample, before.next_sample.to(step.sample.dtype))
        last[step.stream, step.chunk] = step


# Followers


@families
def test_an_equal_follower_leaves_nothing_and_another_a_gradient(family: str):
    student, equal, other = policy_of(family), policy_of(family), policy_of(family, seed=1)
    weights = [p for p in student.denoiser.requires_grad_(True).parameters()]
    with (
        student.walk(inputs(family), generators(), wandering()) as walk,
        equal.follow(walk) as follow,
        other.follow(walk) as follow_other,
    ):
        for visit in walk:
            with torch.no_grad():
                same, targets = follow(visit), follow_other(visit)
            loss = torch.zeros(())
            for step, twin, target in zip(visit.steps, same, targets, strict=True):
                assert torch.equal(twin, step.prediction)
                loss = loss + (step.prediction - target).square().mean()
            assert loss > 0
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)  # of this visit alone
            assert any(gradient is not None and gradient.any() for gradient in gradients)


@families
def test_a_follower_of_another_guidance_and_shift(family: str):
    """Predicts what that pipeline does alone at these states and times."""
    guidance, shift = OTHERS[family]
    student, teacher = policy_of(family), policy_of(family, seed=1, **guidance)
    times = teacher.pipeline.scheduler
    teacher.pipeline.scheduler = times.from_config(times.config, **shift)
    teacher = Policy(teacher.pipeline, STEPS, teacher.call_kwargs)
    answers, visits = [], []
    with (
        torch.no_grad(),
        student.walk(inputs(family), generators(), wandering()) as walk,
        teacher.follow(walk) as follow,
    ):
        for visit in walk:
            answers.extend(follow(visit))
            visits.append(visit)

    go_to = [[step.next_sample.to(step.sample.dtype) for step in visit.steps] for visit in visits]
    alone, own = STREAMING[family](1), copy.deepcopy(teacher.pipeline.scheduler)
    expected, _ = run(family, alone, go_to, **guidance)  # at the student's times
    assert_same([s.sample for v in visits for s in v.steps], [s.sample for steps in expected for s in steps])
    assert_same(answers, [s.prediction for steps in expected for s in steps])
    alone.scheduler = own
    elsewhere, _ = run(family, alone, go_to, **guidance)
    there = [s.prediction for steps in elsewhere for s in steps]
    assert not all(torch.allclose(a, b, rtol=1e-2) for a, b in zip(answers, there, strict=True))


@families
def test_a_follower_that_would_draw_otherwise(family: str):
    """The first states of all streams and chunks are handed over, so its own generators matter for its conditioning
    alone."""
    student, twin = policy_of(family), policy_of(family)
    with (
        torch.no_grad(),
        student.walk(inputs(family), generators(), wandering()) as walk,
        twin.follow(walk, generators=generators(77)) as follow,
    ):
        pairs = [(a, step.prediction) for visit in walk for a, step in zip(follow(visit), visit.steps, strict=True)]
    assert all(torch.equal(a, b) for a, b in pairs) == (family != "flux_control")


@families
def test_a_jump_arrives_at_every_visit(family: str):
    """From the start, over the border of a chunk too, where a copy of the walk has jumped likewise."""
    policy = policy_of(family)
    for place in range(1, len(PLANS[family])):
        with torch.no_grad(), policy.walk(inputs(family), generators(), wandering()) as walk:
            walk.jump(place)
            visit = walk.advance()
            with policy.follow(walk) as follow:
                assert_same(list(follow(visit)), predictions([visit]))


@families
def test_a_follower_that_is_not_asked_everywhere(family: str):
    """Its answers are those at every visit: other streams and former chunks are where the walk has left them."""
    student, twin = policy_of(family), policy_of(family)
    with (
        torch.no_grad(),
        student.walk(inputs(family), generators(), wandering()) as walk,
        twin.follow(walk) as follow,
    ):
        for visit in walk:
            if visit.index % 3 == 1 or visit.chunk > 0:
                assert_same(list(follow(visit)), predictions([visit]))


def test_a_follower_is_left_before_the_last_chunk():
    """It comes to its end without the times of what the walk has not come to."""
    policy = policy_of("helios")
    with (
        torch.no_grad(),
        policy.walk(inputs("helios"), generators(), euler) as walk,
        policy_of("helios", seed=1).follow(walk) as follow,
    ):
        follow(next(walk))
    assert walk.ended and walk.output.shape[2] == 4  # frames


# What is left


@pytest.mark.parametrize("family", ["ltx2", "skyreels_ar", "helios", "ltx_i2v"])
def test_nothing_stays_behind(family: str):
    """When a loop is left early; each forward pass before had a graph."""
    student, teacher = policy_of(family), policy_of(family, seed=1)
    student.denoiser.requires_grad_(True)
    held: list[weakref.ref] = []

    def look(*args: Any, **kwargs: Any) -> Any:
        output = student.denoiser(*args, **kwargs)
        held.extend(weakref.ref(x) for x in (*output, kwargs["hidden_states"]))
        return output

    gc.collect()
    gc.disable()
    try:
        with (
            student.walk(inputs(family), generators(), euler, denoiser=look) as walk,
            teacher.follow(walk) as follow,
        ):
            for visit in walk:
                with torch.no_grad():
                    targets = follow(visit)
                held += [weakref.ref(target) for target in targets]
                held += [weakref.ref(x) for step in visit.steps for x in (step.prediction, step.sample)]
                held += [weakref.ref(own) for own in (*walk.proxies, *follow.proxies)]
                if visit.index == len(PLANS[family]) // 2:
                    break
        assert walk.ended
        held += [weakref.ref(walk), weakref.ref(follow)]
        del walk, follow, visit, targets
        assert len(held) > 20 and all(reference() is None for reference in held)
    finally:
        gc.enable()


# The start-up check


def calls_of(module: nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@families
def test_the_check_knows_the_walk(family: str):
    student = policy_of(family)
    student.denoiser.requires_grad_(True)
    calls = calls_of(student.denoiser)
    checked = check_student(student, inputs(family), 0.5)
    assert len(calls) <= 22  # of one call a step: 9
    assert [(place.chunk, [level for _, level in place.levels]) for place in checked.plan] == [
        (chunk, list(levels.values())) for chunk, levels in PLANS[family]
    ]
    assert checked.learnt == LEARNT.get(family, (0, 1))
    assert checked.learnt[-1] in [visit.index for visit in checked.visits]
    visits, _ = walked(policy_of(family), family, euler)
    for place, visit in zip(checked.plan, visits, strict=True):
        assert [schedule for schedule, _ in place.levels] == [step.schedule for step in visit.steps]
    assert check_teacher(policy_of(family), checked)
    assert not check_teacher(policy_of(family, seed=1), checked)


def test_every_chunk_but_the_last_is_walked_to_its_end():
    policy, learnt = policy_of("helios"), LEARNT["helios"]
    policy.denoiser.requires_grad_(True)
    calls = calls_of(policy.denoiser)
    whole, _ = walked(policy_of("helios"), "helios", euler)
    with policy.walk(inputs("helios"), generators(), euler) as walk:
        visits = list(walk.visits(learnt))
    assert tuple(visit.index for visit in visits) == learnt
    assert all(prediction.requires_grad for prediction in predictions(visits))
    assert len(calls) == 2 * (learnt[-1] + 1)  # with guidance; nothing after the last
    # The second chunk has seen all of the first
    assert_same([p.detach() for p in predictions(visits)], predictions([whole[place] for place in learnt]))


# Whole runs


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["ltx2", "skyreels_ar", "helios", pytest.param("skyreels", marks=pytest.mark.nightly)]
)
def test_a_whole_run(family: str, tmp_path):
    args = DiffusionOPDConfig(
        str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        num_inference_steps=STEPS,
        timestep_fraction=0.5,
        call_kwargs=STREAMING_CALL[family],
        learning_rate=1e-2,
        disable_tqdm=True,
        image_steps=0,
    )
    trainer = DiffusionOPDTrainer(
        STREAMING[family](0),
        {"equal": STREAMING[family](0), "other": STREAMING[family](1)},
        args,
        Dataset.from_dict({"prompt": 4 * PROMPTS, "teacher_id": 4 * ["equal"] + 4 * ["other"]}),
        peft_config=LoraConfig(r=4, lora_alpha=16, target_modules=LORA_TARGETS),
    )
    trainer.train()
    first, second = [entry for entry in trainer.state.log_history if "kl/other" in entry]
    assert first["kl/equal"] == 0 and first["kl/other"] > 0 and first["grad_norm"] > 0
    assert second["kl/equal"] > 0  # the student has left it
    trainer.save_model()

    plain = STREAMING[family](0)
    untrained = run(family, plain)[1]
    plain.load_lora_weights(str(tmp_path))
    loaded = run(family, plain)[1]
    torch.testing.assert_close(loaded, run(family, trainer.pipeline)[1])
    assert not torch.allclose(loaded, untrained, rtol=1e-3)
