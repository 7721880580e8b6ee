"""Walking and following, where it is easily wrong: each test fails without the point that it names.

What is expected comes from the unmodified pipeline, forced along the same states.
"""

import copy
import gc
import signal
import traceback
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3PAGPipeline,
    StableDiffusionXLPAGPipeline,
)
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from diffusion_opd.policy import Follower, Policy, Visit, Walk, tuner_layers
from diffusion_opd.scheduler_proxy import Step, own_scheduler
from diffusion_opd.startup import check_student, check_teacher, require_independence
from tests.own_pipelines import Plain, of
from tests.own_runs import own_steps
from tests.tiny_pipelines import BUILDERS, CALL, LORA_TARGETS, denoiser

PROMPTS = ["a red fox", "two blue birds"]
INPUTS = {"prompt": PROMPTS}
STEPS = 6


def generators(seed: int = 5) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + index) for index in range(len(PROMPTS))]


def euler(step: Step) -> Tensor:
    level, following = step.schedule.levels[step.index : step.index + 2]
    return step.sample.float() + (following - level) * step.prediction.float()


def quiet(pipe: DiffusionPipeline) -> DiffusionPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def alone(pipe: DiffusionPipeline, scheduler: Any, visits: list[Visit], **call_kwargs: Any) -> list[Tensor]:
    """What an unmodified pipeline predicts at the states of a walk, under a scheduler whose `step` goes there."""
    states, predictions = [visit.steps[0].sample for visit in visits], []
    pipe = quiet(copy.copy(pipe))
    vars(pipe)["scheduler"] = scheduler = copy.deepcopy(scheduler)

    def step(model_output: Tensor, timestep: Tensor, sample: Tensor, **kwargs: Any) -> Any:
        predictions.append(model_output)
        place = len(predictions)
        return ((states[place] if place < len(states) else sample).to(sample.dtype),)

    scheduler.step = step
    dtype = next(denoiser(pipe).parameters()).dtype
    pipe(prompt=PROMPTS, num_inference_steps=STEPS, latents=states[0].to(dtype), output_type="latent", **call_kwargs)
    return predictions[: len(states)]


def walked(policy: Policy, move: Callable[[Step], Tensor] = euler, **kwargs: Any) -> tuple[Walk, list[Visit]]:
    with torch.no_grad(), policy.walk(INPUTS, generators(), move, **kwargs) as walk:
        return walk, list(walk)


# A follower is where the student is, whatever its own class, schedule, dtype, guidance and seeds say


@pytest.mark.parametrize("student_dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_a_follower_of_another_class_shift_dtype_and_guidance(student_dtype: torch.dtype):
    student_pipe, teacher_pipe = BUILDERS["sd3"](0), BUILDERS["sd3"](1)
    parts = {
        name: part for name, part in teacher_pipe.components.items() if "image" not in name and "feature" not in name
    }
    teacher_pipe = quiet(StableDiffusion3PAGPipeline(**parts, pag_applied_layers="blocks.1"))
    teacher_pipe.to(torch.float32 if student_dtype == torch.bfloat16 else torch.bfloat16)
    student_pipe.to(student_dtype)
    teacher_pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    other = {**CALL["sd3"], "guidance_scale": 2.5, "pag_scale": 0.7}
    student, teacher = Policy(student_pipe, STEPS, CALL["sd3"]), Policy(teacher_pipe, STEPS, other)

    answers = []
    with student.walk(INPUTS, generators(), euler) as walk, teacher.follow(walk) as follow:
        visits = [(visit, answers.append(follow(visit)[0]))[0] for visit in walk]
    assert {answer.dtype for answer in answers} == {next(teacher.denoiser.parameters()).dtype}
    expected = alone(teacher_pipe, student_pipe.scheduler, visits, **other)
    assert len(expected) == STEPS
    assert all(torch.equal(a, b) for a, b in zip(answers, expected, strict=True))
    own_times = alone(teacher_pipe, teacher_pipe.scheduler, visits, **other)  # what its own shift would have said
    assert not torch.allclose(answers[2], own_times[2], rtol=1e-2)


@pytest.mark.parametrize("family", ["sd3", "sdxl", "wan"])
@torch.no_grad()
def test_the_first_state_is_handed_over(family: str):
    """A follower that would draw another first state is at the student's."""
    student, twin = (Policy(BUILDERS[family](0), STEPS, CALL[family]) for _ in range(2))
    with student.walk(INPUTS, generators(), euler) as walk, twin.follow(walk, generators=generators(77)) as follow:
        for visit in walk:
            assert torch.equal(follow(visit)[0], visit.steps[0].prediction)


@torch.no_grad()
def test_a_replay_that_is_elsewhere_is_told():
    """Without a walk to follow it begins at its own first state."""
    policy = Policy(BUILDERS["sd3"](0), STEPS, CALL["sd3"])
    _, visits = walked(policy)
    elsewhere = Visit(1, (visits[1].steps[0],))
    with policy.follow(inputs=INPUTS, generators=generators()) as follow:
        follow(visits[0])
        moved = copy.copy(elsewhere.steps[0])
        object.__setattr__(moved, "sample", moved.sample + 1)
        with pytest.raises(ValueError, match="does not come to the states.*its state is another, at visit 1"):
            follow(Visit(1, (moved,)))


@torch.no_grad()
def test_a_teacher_of_another_layout_is_refused_with_both_classes():
    student, teacher = Policy(BUILDERS["sd3"](0), STEPS, CALL["sd3"]), Policy(BUILDERS["flux"](0), STEPS, CALL["flux"])
    checked = check_student(student, INPUTS, 0.99)
    with pytest.raises(
        ValueError, match="FluxPipeline does not come to the states that StableDiffusion3Pipeline visits"
    ):
        check_teacher(teacher, checked)


# Jumping: guidance that depends on the loop index is that of the index


JUMPS = {
    "sd3": {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.2, "skip_layer_guidance_stop": 0.7},
    "lumina2": {"cfg_trunc_ratio": 0.5},
}


@pytest.mark.parametrize("family", JUMPS)
@torch.no_grad()
def test_a_jump_arrives_at_the_step_that_was_asked(family: str):
    pipe, call = BUILDERS[family](0), {**CALL[family], **JUMPS[family]}
    policy = Policy(pipe, STEPS, call)
    walk, visits = walked(policy)
    expected = alone(BUILDERS[family](0), own_scheduler(pipe.scheduler), visits, **call)
    assert all(torch.equal(v.steps[0].prediction, own) for v, own in zip(visits, expected, strict=True))
    plain = alone(BUILDERS[family](0), own_scheduler(pipe.scheduler), visits, **CALL[family])
    assert any(not torch.equal(a, b) for a, b in zip(expected, plain, strict=True))  # it does depend on the index

    calls = counted(policy.denoiser)
    for place in (1, 3, STEPS - 1):
        with policy.follow(walk) as follow:
            assert torch.equal(follow(visits[place])[0], expected[place])
    per_visit = len(calls) / 3
    assert per_visit <= 3  # the empty denoiser did the rest
    with policy.walk(INPUTS, generators(), euler) as again:
        again.jump(3)
        assert again.place == 3 and again.advance().index == 3


def counted(module: nn.Module) -> list[nn.Module]:
    calls: list[nn.Module] = []
    module.register_forward_hook(lambda module, *_: calls.append(module))
    return calls


# What a pipeline changes is put back, and nothing stays behind


@torch.no_grad()
def test_perturbed_attention_stays_with_its_pipeline():
    """SDXL-PAG sets processors on its UNet for as long as it runs; a plain SDXL on the same UNet follows it."""
    plain = BUILDERS["sdxl"](0)
    parts = {name: part for name, part in plain.components.items()}
    guided = quiet(StableDiffusionXLPAGPipeline(**parts, pag_applied_layers="mid"))
    call = {**CALL["sdxl"], "pag_scale": 3.0}
    before = dict(plain.unet.attn_processors)
    student, teacher = Policy(guided, STEPS, call), Policy(plain, STEPS, CALL["sdxl"])
    answers, visits = [], []
    with student.walk(INPUTS, generators(), euler) as walk, teacher.follow(walk) as follow:
        for visit in walk:
            assert plain.unet.attn_processors == before
            visits.append(visit)
            answers.append(follow(visit)[0])
            if visit.index == 2:
                break
    assert plain.unet.attn_processors == before
    scheduler = own_scheduler(plain.scheduler)
    assert all(map(torch.equal, answers, alone(BUILDERS["sdxl"](0), scheduler, visits, **CALL["sdxl"])))
    fresh = quiet(StableDiffusionXLPAGPipeline(**BUILDERS["sdxl"](0).components, pag_applied_layers="mid"))
    expected = alone(fresh, scheduler, visits, **call)
    assert all(torch.equal(v.steps[0].prediction, own) for v, own in zip(visits, expected, strict=True))
    assert not torch.equal(answers[0], expected[0])


class Tidy(Plain):
    """Says when its call has come to its end."""

    ended = 0

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps=4, generator=None, output_type="pil", return_dict=True):
        output = Plain.__call__.__wrapped__(self, prompt, num_inference_steps, generator)
        Tidy.ended += 1
        return output


class Stop(Exception):
    pass


@pytest.mark.parametrize("how", ["break", "return of a generator", "exception", "interrupt", "at once"])
def test_a_walk_that_is_left_comes_to_its_end_and_nothing_stays(how: str):
    pipe = of(Tidy)
    pipe.transformer.requires_grad_(True)
    student, teacher = Policy(pipe, STEPS), Policy(of(Tidy), STEPS)
    check_student(student, INPUTS, 0.99)  # has seen what the denoiser answers
    check_teacher(teacher, check_student(student, INPUTS, 0.99))
    calls, held = counted(pipe.transformer), []
    Tidy.ended = 0

    def loop() -> None:
        with student.walk(INPUTS, generators(), euler) as walk, teacher.follow(walk) as follow:
            held.append(weakref.ref(walk))
            held.append(weakref.ref(follow))
            if how == "at once":
                return
            for visit in walk:
                held.append(weakref.ref(visit.steps[0].prediction))
                held.append(weakref.ref(follow(visit)[0]))
                if how == "exception":
                    raise Stop
                if how == "interrupt":
                    raise KeyboardInterrupt
                break

    def loop_without_with() -> None:
        for visit in student.walk(INPUTS, generators(), euler):
            held.append(weakref.ref(visit.steps[0].prediction))
            return

    gc.collect()
    gc.disable()
    try:
        try:
            loop_without_with() if how == "return of a generator" else loop()
        except (Stop, KeyboardInterrupt) as error:
            traceback.clear_frames(error.__traceback__)
        assert held and all(reference() is None for reference in held)
    finally:
        gc.enable()
    assert Tidy.ended == {"return of a generator": 1, "at once": 0}.get(how, 2)
    assert len(calls) == (0 if how == "at once" else 1)


@pytest.mark.parametrize("where", ["student", "teacher", "body", "move"])
@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_what_is_raised_reaches_the_loop_and_adapters_are_put_back(where: str, error: type[BaseException]):
    pipe = BUILDERS["sd3"](0)
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        add_adapter_to(pipe.transformer, name)
    layers = tuner_layers(pipe.transformer)
    for layer in layers:
        layer.set_adapter("student")
    policies = {name: Policy(pipe, STEPS, CALL["sd3"], adapter=name) for name in ("student", "teacher")}
    for policy in policies.values():
        walked(policy)  # a pipeline that never worked is named in what it raises
    asked: list[str] = []

    def watch(module: nn.Module, *_: Any) -> None:
        asked.append(layers[0].active_adapters[0])
        if len(asked) > 4 and asked[-1] == where:
            raise error("on purpose")

    pipe.transformer.register_forward_pre_hook(watch)

    def move(step: Step) -> Tensor:
        if where == "move" and step.index == 2:
            raise error("on purpose")
        return euler(step)

    with pytest.raises(error, match="on purpose") as caught, torch.no_grad():
        with policies["student"].walk(INPUTS, generators(), move) as walk, policies["teacher"].follow(walk) as follow:
            for visit in walk:
                assert all(layer.active_adapters == ["student"] for layer in layers)
                follow(visit)
                if where == "body" and visit.index == 2:
                    raise error("on purpose")
    assert all(layer.active_adapters == ["student"] for layer in layers)
    names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert names[0].startswith("test_") and names[-1] == {"body": names[0], "move": "move"}.get(where, "watch")
    _, visits = walked(policies["teacher"], euler) if where != "teacher" else walked(policies["student"], euler)
    assert len(visits) == STEPS  # the pipeline still works


def add_adapter_to(module: nn.Module, name: str) -> None:
    config = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=LORA_TARGETS)
    inject_adapter_in_model(config, module, adapter_name=name)


def test_ctrl_c_in_the_middle_of_a_call(request):
    """The handler runs wherever Python is: within the paused call."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has none
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    policy = Policy(BUILDERS["sd3"](0), STEPS, CALL["sd3"])
    handle = policy.denoiser.register_forward_pre_hook(lambda *_: signal.raise_signal(signal.SIGINT))
    with handle, torch.no_grad(), pytest.raises(KeyboardInterrupt):
        with policy.walk(INPUTS, generators(), euler) as walk:
            next(walk)
    assert len(walked(policy)[1]) == STEPS


# Draws


class Draws(Plain):
    """Draws in its loop, as LTX's conditioning does, and from the global generator, as some dozen classes do."""

    def predict(self, x: Tensor, t: Tensor, **embeds: Tensor) -> Tensor:
        noise = torch.randn(x.shape) + torch.cat([torch.randn(x[:1].shape, generator=g) for g in self.drawing])
        return super().predict(x, t, **embeds) + 0.1 * noise

    def prepare_latents(self, *args: Any, **kwargs: Any) -> Tensor:
        self.drawing = args[6]
        return super().prepare_latents(*args, **kwargs)


@torch.no_grad()
def test_a_follower_draws_what_the_walk_draws():
    """From the global generator too, which is left alone; the kernel's noise has generators of its own."""
    student, teacher = Policy(of(Draws), STEPS), Policy(of(Draws), STEPS)
    noise = torch.Generator().manual_seed(1)

    def stochastic(step: Step) -> Tensor:
        return euler(step) + 0.1 * torch.randn(step.sample.shape, generator=noise)

    state = torch.get_rng_state()
    with student.walk(INPUTS, generators(), stochastic) as walk, teacher.follow(walk) as follow:
        for visit in walk:
            assert torch.equal(follow(visit)[0], visit.steps[0].prediction)
    assert torch.equal(torch.get_rng_state(), state)


# Where a graph is made


def test_only_learnt_visits_have_a_graph():
    pipe = BUILDERS["sd3"](0)
    pipe.transformer.requires_grad_(True)
    policy, told = Policy(pipe, STEPS, CALL["sd3"]), []
    calls: list[bool] = []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    with policy.walk(INPUTS, generators(), euler) as walk:
        visits = list(walk.visits([1, 3], before_last=lambda: told.append(len(calls))))
    assert [visit.index for visit in visits] == [1, 3]
    assert all(visit.steps[0].prediction.requires_grad for visit in visits)
    assert calls == [False, True, False, True]
    assert told == [3]  # before the forward pass at 3, since DDP decides there
    with torch.no_grad(), policy.walk(INPUTS, generators(), euler) as walk:
        assert not any(visit.steps[0].prediction.requires_grad for visit in walk.visits([1, 3]))


# The check at the start


class Crosses(Plain):
    """Keeps what its first step computes, with its graph, as a KV cache would be."""

    def predict(self, x: Tensor, t: Tensor, **embeds: Tensor) -> Tensor:
        prediction = super().predict(x, t, **embeds)
        if t == self.scheduler.timesteps[0]:
            self.kept = prediction.square()
        return prediction + 0.1 * self.kept


class Meets(Plain):
    """Its samples see each other."""

    def predict(self, x: Tensor, t: Tensor, **embeds: Tensor) -> Tensor:
        prediction = super().predict(x, t, **embeds)
        return prediction + prediction.mean(0, keepdim=True)


class Negative(Plain):
    """Hands over minus the velocity, with a word that says so, as LTX's conditioning does."""

    def advance(self, x: Tensor, t: Tensor, **embeds: Tensor) -> Tensor:
        return self.scheduler.step(-self.predict(x, t, **embeds), t, x, per_token_timesteps=t.expand(1)).prev_sample


class PerToken(FlowMatchEulerDiscreteScheduler):
    """A step with that word goes the other way."""

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, per_token_timesteps: Any = None, **kwargs):
        sign = 1 if per_token_timesteps is None else -1
        return super().step(sign * model_output, timestep, sample, **kwargs)


class Folds(Plain):
    """One row for the whole batch."""

    def advance(self, x: Tensor, t: Tensor, **embeds: Tensor) -> Tensor:
        prediction = self.predict(x, t, **embeds)
        return self.scheduler.step(prediction[None], t, x[None]).prev_sample[0]


def learning(cls: type) -> DiffusionPipeline:
    pipe = of(cls)
    pipe.transformer.requires_grad_(True)
    return pipe


@pytest.mark.parametrize(
    ("cls", "sentence"),
    [
        (Meets, "the samples of a batch are not independent in Meets.*set the batch size of a process to 1"),
        (Folds, r"Folds has a state of shape \(1, 2, .* for a batch of 2: one row a sample is needed"),
    ],
)
def test_the_check_refuses(cls: type, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        check_student(Policy(learning(cls), STEPS), INPUTS, 0.99)


@pytest.mark.parametrize("cls", [Crosses, Plain])
def test_a_gradient_that_crosses_steps_is_found(cls: type):
    """And the gradients of the check are those of both steps at once."""
    pipe, plain = learning(cls), learning(cls)
    checked = check_student(Policy(pipe, STEPS), INPUTS, 0.99)
    assert checked.crosses == (cls is Crosses)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(2)]
    steps = own_steps(plain, PROMPTS, seeds, gradient=True, steps=STEPS)
    sum(prediction.square().mean() for _, prediction in steps[:2]).backward()
    for ours, theirs in zip(pipe.transformer.parameters(), plain.transformer.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)
    if checked.crosses:
        with pytest.raises(ValueError, match="learning from rewards takes pipelines whose steps have each their own"):
            require_independence(Policy(pipe, STEPS), replace(checked, depends=0.0))


def test_samples_that_meet_are_fine_one_at_a_time():
    check_student(Policy(learning(Meets), STEPS), {"prompt": PROMPTS[:1]}, 0.99)


def test_an_argument_that_means_something_to_the_scheduler_is_refused():
    """The scheduler's own `step` is asked with the very arguments of the call."""
    pipe = of(Negative)
    pipe.scheduler = PerToken(shift=3.0)
    with pytest.raises(ValueError, match="Negative steps otherwise than `ode`.*PerToken goes elsewhere"):
        check_student(Policy(pipe, STEPS), INPUTS, 0.99)


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_clipped_samples_are_refused(family: str):
    pipe = BUILDERS[family](0)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=True, clip_sample_range=0.05)
    with pytest.raises(ValueError, match="steps otherwise than `ddim`.*DDIMScheduler goes elsewhere"):
        check_student(Policy(pipe, STEPS, CALL[family]), INPUTS, 0.99)


def test_what_the_check_finds_out():
    pipe = learning(Plain)
    calls = counted(pipe.transformer)
    checked = check_student(Policy(pipe, 10), INPUTS, 0.99)
    assert len(calls) <= 9
    assert len(checked.plan) == 10 and checked.learnt == tuple(range(9))
    assert [visit.index for visit in checked.visits] == [0, 1, 8]
    assert [level[1] for place in checked.plan for level in place.levels] == list(range(10))
    assert all(
        parameter.grad is not None for name, parameter in pipe.transformer.named_parameters() if "proj_out" in name
    )
    require_independence(checked.walk.policy, checked)


def test_the_device_is_looked_up_once_a_call():
    """`_execution_device` walks all modules at each use."""

    class Counts(Plain):
        looked = 0

        @property
        def _execution_device(self):
            Counts.looked += 1
            return torch.device("cpu")

        def predict(self, x: Tensor, t: Tensor, **embeds: Tensor) -> Tensor:
            assert self._execution_device == x.device and type(self).__name__ == "Counts"
            return super().predict(x, t, **embeds)

    walked(Policy(of(Counts), STEPS))
    assert Counts.looked == 1


def test_a_follower_needs_to_know_where_and_does_not_go_back():
    policy = Policy(BUILDERS["sd3"](0), STEPS, CALL["sd3"])
    walk, _ = walked(policy)
    assert isinstance(walk, Walk) and isinstance(policy.follow(walk), Follower)
    with pytest.raises(ValueError, match="needs a walk, or the inputs and generators of one"):
        policy.follow()
    with policy.follow(walk) as follow, torch.no_grad():
        _, visits = walked(policy)
        follow(visits[2])
        with pytest.raises(ValueError, match="does not go back: it is at visit 3, and was asked at 1"):
            follow(visits[1])


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"promt": PROMPTS}, r"`inputs` are arguments of StableDiffusion3Pipeline.*got \['promt'\]"),
        (PROMPTS, "`inputs` are arguments of StableDiffusion3Pipeline.*got list"),
        ({"prompt": "ab"}, "a list with one 'prompt' a sample.*got str: 'ab' for 2 generators"),
        ({"prompt": [*PROMPTS, "three"]}, "a list with one 'prompt' a sample.* for 2 generators"),
    ],
)
def test_inputs_that_are_no_batch_are_refused(given: Any, sentence: str):
    policy = Policy(BUILDERS["sd3"](0), STEPS, CALL["sd3"])
    with pytest.raises(ValueError, match=sentence):
        policy.walk(given, generators(), euler)
    with pytest.raises(ValueError, match=sentence):
        policy.follow(inputs=given, generators=generators())


@torch.no_grad()
def test_a_small_mistake_is_one_sentence():
    policy = Policy(BUILDERS["sd3"](0), STEPS, CALL["sd3"])
    with pytest.raises(ValueError, match=r"`move` gave .* \(1, 4, 8, 8\), the visited one is \(2, 4, 8, 8\)"):
        walked(policy, lambda step: euler(step)[:1])
    with pytest.raises(ValueError, match=r"the transformer has no adapter 'typo'; it has \[\]"):
        Policy(BUILDERS["sd3"](0), STEPS, CALL["sd3"], adapter="typo")
    for places in ([2, 0], [], [-1]):
        with (
            policy.walk(INPUTS, generators(), euler) as walk,
            pytest.raises(ValueError, match="goes on in rising order"),
        ):
            list(walk.visits(places))
    first, _ = walked(policy)
    with policy.walk(INPUTS, generators(50), euler) as other, policy.follow(first) as follow:
        with pytest.raises(ValueError, match="its state is another, at visit 0"):
            follow(next(other))  # of another walk


@torch.no_grad()
def test_a_walk_that_failed_does_not_begin_anew():
    def move(step: Step) -> Tensor:
        raise Stop

    walk = Policy(BUILDERS["sd3"](0), STEPS, CALL["sd3"]).walk(INPUTS, generators(), move)
    with pytest.raises(Stop):
        walk.advance()
    assert walk.advance() is None


def test_processors_of_its_own_and_recomputed_activations_are_refused():
    """Which would be recomputed after the processors are put back."""
    pipe = StableDiffusionXLPAGPipeline(**BUILDERS["sdxl"](0).components, pag_applied_layers="mid")
    quiet(pipe).unet.requires_grad_(True)
    policy = Policy(pipe, STEPS, {**CALL["sdxl"], "pag_scale": 3.0})
    check_student(policy, INPUTS, 0.99)
    pipe.unet.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="sets attention processors of its own.*leave out `activation_checkpointing`"):
        check_student(policy, INPUTS, 0.99)


@pytest.mark.parametrize("family", ["flux", "wan"])
def test_a_cache_is_refused(family: str):
    pipe = BUILDERS[family](0)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="has a cache enabled on its transformer.*`disable_cache\\(\\)`"):
        Policy(pipe, STEPS, CALL[family])


def test_a_teacher_of_another_size_is_refused_though_its_state_has_the_same_shape():
    call = CALL["flux"] | {"height": 16, "width": 16}
    pipe = BUILDERS["flux"](0)
    checked = check_student(Policy(pipe, STEPS, call), INPUTS, 0.99)
    teacher = Policy(BUILDERS["flux"](1), STEPS, call | {"height": 32, "width": 8})
    with pytest.raises(ValueError, match="it is called with height=32, the student with 16"):
        check_teacher(teacher, checked)


class Replaces(Plain):
    """Steps another scheduler than the one that it has."""

    def advance(self, x: Tensor, t: Tensor, **embeds: Tensor) -> Tensor:
        return (self.predict(x, t, **embeds) * 0.1 + x).detach()


def test_a_pipeline_that_steps_no_scheduler_is_named():
    with pytest.raises(ValueError, match="Replaces lacks a seam: it never steps the scheduler"):
        check_student(Policy(learning(Replaces), STEPS), INPUTS, 0.99)
