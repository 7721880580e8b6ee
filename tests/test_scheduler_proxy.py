"""What sits in the place of a scheduler: its timesteps and noise levels are those of the pipeline's own."""

from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CosineDPMSolverMultistepScheduler,
    DDIMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SCMScheduler,
)
from torch import Tensor

from diffusion_opd.policy import Policy
from diffusion_opd.scheduler_proxy import Step, is_flow, own_scheduler, read_schedule
from diffusion_opd.startup import check_student
from diffusion_opd.transitions import dance_sde, ddim, denoised, flow_sde, noised, ode, velocity_gap
from tests.own_runs import INPUTS, STEPS, assert_same, euler, own_run, run, walked
from tests.tiny_pipelines import BUILDERS, CALL, VP


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
    seen, latents = run(own, **CALL["sdxl"])
    policy = Policy(ours, STEPS, CALL["sdxl"])
    for _ in range(2):
        visits, output = walked(policy, lambda step: ode(step.sample, step.prediction, step.schedule, step.index).mean)
        assert_same(visits, seen)
        assert torch.equal(output, latents)


@torch.no_grad()
def test_shift_that_is_set_by_hand_is_kept():
    """`set_shift` does not reach a scheduler's config."""
    own, ours = BUILDERS["sd3"](0), BUILDERS["sd3"](0)
    for pipe in (own, ours):
        pipe.scheduler.set_shift(7.0)
    seen, _ = run(own, euler, **CALL["sd3"])
    assert_same(walked(Policy(ours, STEPS, CALL["sd3"]))[0], seen)
    assert not torch.equal(seen[1].timestep, own_run("sd3")[0][1].timestep)


@pytest.mark.parametrize("family", VP)
def test_the_ddim_of_another_solver_does_not_clip(family: str):
    """As that solver does not: DDIM's own default would, and no published config of another solver speaks of it."""
    scheduler = own_scheduler(BUILDERS[family](0).scheduler)
    scheduler.set_timesteps(4)
    schedule, generator = read_schedule(scheduler), torch.Generator().manual_seed(0)
    sample, prediction = (5 * torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    for index, timestep in enumerate(scheduler.timesteps):
        theirs = scheduler.step(prediction, timestep, sample).prev_sample
        torch.testing.assert_close(ddim(sample, prediction, schedule, index).mean, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_probe_is_told_what_the_schedulers_own_step_answers():
    """At every step, also of one with a history; and the walk goes where it would have gone."""
    own = BUILDERS["sd3"](0)
    seen, latents = run(own, **CALL["sd3"])
    answers = []

    def probe(step: Step, scheduler_step: Any) -> None:
        answers.append(scheduler_step().value)

    def move(step: Step) -> Tensor:
        return answers[-1]

    visits, output = walked(Policy(BUILDERS["sd3"](0), STEPS, CALL["sd3"]), move, probe=probe)
    assert_same(visits, seen)
    assert torch.equal(output, latents)


def test_solver_of_second_order_is_refused():
    pipe = BUILDERS["sd3"](0)
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    with pytest.raises(ValueError, match="FlowMatchHeunDiscreteScheduler.*first-order scheduler"):
        check_student(Policy(pipe, STEPS, CALL["sd3"]), INPUTS, 1.0)


# Schedules of other coordinates, and other noise levels: a walk goes where the plain call goes


def above_1() -> FlowMatchEulerDiscreteScheduler:
    """As Cosmos-Predict2 has it: `x = x_0 + sigma eps` under a scheduler of flow matching."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler.register_to_config(sigma_max=80.0, sigma_min=0.002)
    return scheduler


OTHERS: dict[str, tuple[str, Any]] = {
    "edm": ("sdxl", lambda: EDMEulerScheduler()),
    "edm of velocities": ("sdxl", lambda: EDMEulerScheduler(prediction_type="v_prediction", sigma_data=1.0)),
    "edm to sigma_min": ("sdxl", lambda: EDMEulerScheduler(final_sigmas_type="sigma_min")),
    "edm's solver": ("sdxl", lambda: EDMDPMSolverMultistepScheduler(solver_order=1)),
    "above 1": ("sd3", lambda: above_1()),
    "rising": ("sd3", lambda: FlowMatchEulerDiscreteScheduler(shift=3.0, invert_sigmas=True)),
    "flow maps": ("sd3", lambda: FlowMapEulerDiscreteScheduler(shift=5.0)),
    "shifted alphas": ("sdxl", lambda: CogVideoXDDIMScheduler(snr_shift_scale=3.0)),
    "shifted alphas, velocities": (
        "sdxl",
        lambda: CogVideoXDDIMScheduler(
            snr_shift_scale=1.0, prediction_type="v_prediction", rescale_betas_zero_snr=True
        ),
    ),
}


def with_scheduler(name: str) -> tuple[Any, dict[str, Any]]:
    family, make = OTHERS[name]
    pipe = BUILDERS[family](0)
    pipe.scheduler = make()
    return pipe, CALL[family]


@torch.no_grad()
@pytest.mark.parametrize("name", OTHERS)
def test_other_schedules_are_read(name: str):
    pipe, call = with_scheduler(name)
    seen, latents = run(pipe, **call)
    policy = Policy(with_scheduler(name)[0], STEPS, call)
    kernel = ode if is_flow(pipe.scheduler) else ddim
    visits, output = walked(policy, lambda step: kernel(step.sample, step.prediction, step.schedule, step.index).mean)
    for (visit,), own in zip([visit.steps for visit in visits], seen, strict=True):
        torch.testing.assert_close(visit.sample, own.sample, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(visit.prediction, own.prediction, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(output, latents, rtol=1e-3, atol=1e-4)
    check_student(policy, INPUTS, 1.0)  # and the guard says so


DATA_MEAN, DATA_STD = 1.5, 0.5


def exact_answer(scheduler: Any, x: Tensor, sigma: Tensor) -> Tensor:
    """What a network answers that knows the conditional expectation of Gaussian data, as the scheduler reads it."""
    if hasattr(scheduler, "precondition_outputs"):  # x = x_0 + sigma eps
        clean = DATA_MEAN + DATA_STD**2 / (DATA_STD**2 + sigma**2) * (x - DATA_MEAN)
        nothing, one = (scheduler.precondition_outputs(x, torch.full_like(x, value), sigma) for value in (0.0, 1.0))
        return (clean - nothing) / (one - nothing)
    if scheduler.config.invert_sigmas:  # x = t x_0 + (1 - t) eps, and the velocity leads to x_0
        variance = sigma**2 * DATA_STD**2 + (1 - sigma) ** 2
        return DATA_MEAN + (sigma * DATA_STD**2 - (1 - sigma)) / variance * (x - sigma * DATA_MEAN)
    return sigma / (DATA_STD**2 + sigma**2) * (x - DATA_MEAN)  # the slope in sigma


@pytest.mark.parametrize(
    ("kernel", "noise_level"), [(ode, 0.0), (flow_sde, 0.7), (dance_sde, 0.7)], ids=["ode", "flow_sde", "dance_sde"]
)
@pytest.mark.parametrize("name", ["edm", "edm of velocities", "above 1", "rising"])
def test_kernels_carry_marginals_in_other_coordinates(name: str, kernel: Any, noise_level: float):
    """A chain of exact answers from the law of one noise level ends in that of another: mean and variance."""
    scheduler = OTHERS[name][1]()
    scheduler.set_timesteps(400)
    schedule = read_schedule(scheduler)

    def law(index: int) -> tuple[float, float]:
        sigma = scheduler.sigmas[index].item()
        if name == "rising":
            return sigma * DATA_MEAN, sigma**2 * DATA_STD**2 + (1 - sigma) ** 2
        return DATA_MEAN, DATA_STD**2 + sigma**2

    inside = [index for index, level in enumerate(schedule.levels) if 0.05 < level < 0.9]
    mean, variance = law(inside[0])
    for index in inside[:-1]:
        x = torch.tensor([[0.0, 1.0]])
        step = kernel(x, exact_answer(scheduler, x, scheduler.sigmas[index]), schedule, index, noise_level)
        at_0, at_1 = step.mean[0].tolist()
        mean, variance = at_0 + (at_1 - at_0) * mean, (at_1 - at_0) ** 2 * variance + step.std**2
    true_mean, true_variance = law(inside[-1])
    assert mean == pytest.approx(true_mean, rel=0.02)
    assert variance == pytest.approx(true_variance, rel=0.05)


@pytest.mark.parametrize("name", ["edm", "edm of velocities", "above 1", "rising"])
def test_clean_and_noised_in_other_coordinates(name: str):
    """A sample that is noised and read back is itself, if the network knows the noise."""
    scheduler = OTHERS[name][1]()
    scheduler.set_timesteps(6)
    schedule, generator = read_schedule(scheduler), torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(2, 3, generator=generator) for _ in range(2))
    for index, sigma in enumerate(scheduler.sigmas[:-1]):
        x = sigma * clean + (1 - sigma) * noise if name == "rising" else clean + sigma * noise
        torch.testing.assert_close(noised(clean, noise, schedule, index), x, rtol=1e-5, atol=1e-5)
        if name == "rising":
            answer = clean - noise
        elif name == "above 1":
            answer = noise
        else:
            nothing, one = (scheduler.precondition_outputs(x, torch.full_like(x, v), sigma) for v in (0.0, 1.0))
            answer = (clean - nothing) / (one - nothing)
        torch.testing.assert_close(denoised(x, answer, schedule, index), clean, rtol=1e-3, atol=1e-3)
        # What another answer's clean sample is off, its velocity is off too, over the noise level
        other = answer + torch.randn(2, 3, generator=generator)
        gap = velocity_gap(x, other, clean, noise, schedule, index)
        off = (clean - denoised(x, other, schedule, index)) / schedule.levels[index]
        torch.testing.assert_close(gap, off, rtol=1e-2, atol=1e-2 * float(off.abs().max()))
        assert velocity_gap(x, answer, clean, noise, schedule, index).abs().max() < 1e-3 * gap.abs().max()


def test_solvers_that_draw_noise_are_told_by_what_they_read():
    """Of a solver of SDEs the drift is compared, or what it takes for the clean sample."""
    pipe = BUILDERS["sdxl"](0)
    pipe.scheduler = CosineDPMSolverMultistepScheduler(sigma_schedule="exponential")
    check_student(Policy(pipe, STEPS, CALL["sdxl"]), INPUTS, 1.0)
    pipe.scheduler = EDMDPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    check_student(Policy(pipe, STEPS, CALL["sdxl"]), INPUTS, 1.0)


def test_consistency_models_are_refused():
    pipe = BUILDERS["sana"](0)
    pipe.scheduler = SCMScheduler()
    with pytest.raises(ValueError, match="SCMScheduler is not supported: it has neither `sigmas` nor `alphas_cumprod`"):
        Policy(pipe, STEPS, CALL["sana"])


def test_prediction_of_the_sample_is_refused():
    pipe = BUILDERS["sd15"](0)
    pipe.scheduler = DDIMScheduler(prediction_type="sample")
    with pytest.raises(ValueError, match="prediction type 'sample' is not supported"):
        check_student(Policy(pipe, STEPS, CALL["sd15"]), INPUTS, 1.0)


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_levels_of_a_vp_schedule(set_alpha_to_one: bool):
    scheduler = DDIMScheduler(prediction_type="v_prediction", set_alpha_to_one=set_alpha_to_one, steps_offset=1)
    scheduler.set_timesteps(4)
    schedule = read_schedule(scheduler)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alphas = (1 - betas).cumprod(0)[[751, 501, 251, 1]].tolist()
    assert schedule.levels == pytest.approx([*alphas, 1.0 if set_alpha_to_one else 1 - 1e-4], rel=1e-4)
    assert schedule.prediction_type == "v_prediction" and not schedule.is_flow
