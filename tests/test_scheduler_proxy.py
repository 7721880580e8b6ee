"""What sits in the place of a scheduler: its timesteps and noise levels are those of the pipeline's own."""

from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from torch import Tensor

from diffusion_opd.policy import Policy
from diffusion_opd.scheduler_proxy import Step, own_scheduler, read_schedule
from diffusion_opd.startup import check_student
from diffusion_opd.transitions import ddim, ode
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
        answers.append(scheduler_step()[0])

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
