"""Transition kernels against their invariant (with the exact velocity they carry the marginal at one noise level to
the marginal at the next, each where that is true of it), their published formulas and diffusers' schedulers."""

import math
from collections.abc import Callable

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from diffusion_opd.transitions import (
    TRANSITIONS,
    Kernel,
    KernelFunction,
    Schedule,
    Transition,
    cps,
    dance_sde,
    ddim,
    flow_sde,
    ode,
    velocity_gap,
)
from tests.grids import SHIFT_3, kl_weights, randn, sigmas

FLOW_KERNELS = pytest.mark.parametrize("kernel", [ode, flow_sde, dance_sde, cps], ids=lambda kernel: kernel.__name__)
SDES = pytest.mark.parametrize("kernel", [flow_sde, dance_sde], ids=lambda kernel: kernel.__name__)
PREDICTION_TYPES = pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])


def linear(first: float, last: float, steps: int) -> tuple[float, ...]:
    return tuple(torch.linspace(first, last, steps + 1, dtype=torch.float64).tolist())


# Gaussian data N(MEAN, spread^2): the exact prediction is affine in x and so is the mean of every kernel, so that a
# chain of steps has a Gaussian law whose mean and variance follow without a single draw.

MEAN, SPREAD = 1.5, 0.5


def marginal(level: float, prediction_type: str = "flow", spread: float = SPREAD) -> tuple[float, float]:
    """Mean and variance of the state at a noise level."""
    if prediction_type == "flow":
        return (1 - level) * MEAN, (1 - level) ** 2 * spread**2 + level**2
    return math.sqrt(level) * MEAN, level * spread**2 + 1 - level


def exact_prediction(x: Tensor, level: float, prediction_type: str = "flow", spread: float = SPREAD) -> Tensor:
    """The conditional expectation of what the model predicts, given the state."""
    mean, variance = marginal(level, prediction_type, spread)
    if prediction_type == "flow":  # eps - x_0
        prior, covariance = -MEAN, level - (1 - level) * spread**2
    elif prediction_type == "epsilon":
        prior, covariance = 0.0, math.sqrt(1 - level)
    else:  # sqrt(a) eps - sqrt(1 - a) x_0
        prior, covariance = -math.sqrt(1 - level) * MEAN, math.sqrt(level * (1 - level)) * (1 - spread**2)
    return prior + covariance / variance * (x - mean)


def errors(
    kernel: KernelFunction, schedule: Schedule, noise_level: float, spread: float = SPREAD
) -> tuple[float, float]:
    """A chain that starts in the marginal of the first level: how far its mean and variance end from those of the last
    level's marginal, relative."""
    mean, variance = marginal(schedule.levels[0], schedule.prediction_type, spread)
    for index, level in enumerate(schedule.levels[:-1]):
        x = torch.tensor([[0.0, 1.0]])
        prediction = exact_prediction(x, level, schedule.prediction_type, spread)
        step = kernel(x, prediction, schedule, index, noise_level)
        at_0, at_1 = step.mean[0].tolist()
        mean, variance = at_0 + (at_1 - at_0) * mean, (at_1 - at_0) ** 2 * variance + step.std**2
    true_mean, true_variance = marginal(schedule.levels[-1], schedule.prediction_type, spread)
    return mean / true_mean - 1, variance / true_variance - 1


def test_exact_predictions_are_consistent():
    """The three parametrisations describe one conditional expectation: what the tests below rest on."""
    x = torch.linspace(-3, 3, 7)
    for alpha in (0.1, 0.5, 0.9):
        eps, v = (exact_prediction(x, alpha, kind) for kind in ("epsilon", "v_prediction"))
        x_0 = (x - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha)
        torch.testing.assert_close(v, math.sqrt(alpha) * eps - math.sqrt(1 - alpha) * x_0)
        # the flow's state at the same ratio of noise to signal is the same state on another scale
        sigma = math.sqrt(1 - alpha) / (math.sqrt(alpha) + math.sqrt(1 - alpha))
        flow = exact_prediction(x * (1 - sigma) / math.sqrt(alpha), sigma)
        torch.testing.assert_close(flow, eps - x_0)


@pytest.mark.parametrize(
    ("kernel", "noise_level"),
    [(ode, 0.0), (flow_sde, 0.3), (flow_sde, 0.7), (dance_sde, 0.3), (dance_sde, 0.7), (cps, 0.0)],
)
def test_flow_kernel_carries_marginals_as_the_step_shrinks(kernel: KernelFunction, noise_level: float):
    coarse, fine = (errors(kernel, Schedule(linear(0.95, 0.05, steps)), noise_level) for steps in (100, 200))
    for wide, narrow in zip(coarse, fine, strict=True):
        assert abs(narrow) < 0.02
        assert abs(narrow) < 1e-4 or 1.7 < wide / narrow < 2.3  # first order


@PREDICTION_TYPES
@pytest.mark.parametrize("noise_level", [0.0, 0.5, 1.0])
def test_ddim_carries_marginals_as_the_step_shrinks(prediction_type: str, noise_level: float):
    coarse, fine = (
        errors(ddim, Schedule(linear(0.05, 0.95, steps), prediction_type), noise_level) for steps in (100, 200)
    )
    for wide, narrow in zip(coarse, fine, strict=True):
        assert abs(narrow) < 0.02
        assert abs(narrow) < 1e-4 or 1.7 < wide / narrow < 2.3


def test_dance_sde_carries_the_marginal_from_pure_noise():
    for steps in (100, 1000):
        mean, variance = errors(dance_sde, Schedule(linear(1.0, 0.9, steps)), 0.7)
        assert max(abs(mean), abs(variance)) < 0.1 / steps


@pytest.mark.parametrize("noise_level", [0.3, 0.7, 1.0])
def test_flow_sde_overshoots_in_the_step_from_pure_noise(noise_level: float):
    """At s = 1 the diffusion is unbounded and its stand-in leaves an excess of variance of a^4 / 4 at any step size."""
    steps = (0.1, 0.01, 0.001)
    excess = [errors(flow_sde, Schedule((1.0, 1 - step)), noise_level)[1] * marginal(1 - step)[1] for step in steps]
    vanishing = [step * noise_level**2 - step**2 * SPREAD**2 for step in steps]
    for found, small in zip(excess, vanishing, strict=True):
        assert found == pytest.approx(noise_level**4 / 4 + small, abs=1e-5)
    if noise_level == 0.7:
        assert excess[-1] == pytest.approx(0.06, abs=1e-3)


def test_cps_loses_variance_at_any_number_of_steps():
    """Each step renews the same share of the noise however short it is, so the law relaxes to a fixed point of its own:
    data of variance 0.25 lack 18 % of the variance at s = 0.3 (a = 0.7), and 27 % at s = 0."""
    angle = 0.7 * math.pi / 2
    for sigma, lack in ((0.3, 0.18), (0.01, 0.27)):
        true = marginal(sigma)[1]
        fixed_point = (1 + math.cos(angle)) / (2 - sigma**2 / true * (1 - math.cos(angle)))
        assert 1 - fixed_point == pytest.approx(lack, abs=5e-3)
        for steps in (1000, 2000):
            levels = torch.linspace(math.log(0.9), math.log(sigma), steps + 1, dtype=torch.float64).exp()
            mean, variance = errors(cps, Schedule(tuple(levels.tolist())), 0.7)
            assert mean == pytest.approx(0, abs=5e-3)
            assert 1 + variance == pytest.approx(fixed_point, abs=1e-2)


@pytest.mark.parametrize("noise_level", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_cps_is_exact_for_a_single_picture(noise_level: float, steps: int):
    """Point-mass data: the state is (1 - s) x_0 + s eps after every step, of any size."""
    mean, variance = errors(cps, Schedule(linear(1.0, 0.2, steps)), noise_level, spread=0.0)
    assert max(abs(mean), abs(variance)) < 1e-5


# The deterministic limit


@pytest.mark.parametrize("kernel", [flow_sde, dance_sde, cps], ids=lambda kernel: kernel.__name__)
def test_ode_is_the_limit_without_noise(kernel: KernelFunction):
    schedule = Schedule(sigmas(SHIFT_3))
    x, velocity = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1)
    for index in range(10):
        expected = ode(x, velocity, schedule, index)
        assert expected.std == 0
        gaps = []
        for noise_level in (1e-1, 1e-2, 0.0):
            step = kernel(x, velocity, schedule, index, noise_level)
            gaps.append((step.mean - expected.mean).abs().max().item())
            assert step.std <= 2 * noise_level
        assert gaps[2] < 2e-6
        assert gaps[1] < gaps[0] / 50 + 2e-6  # quadratic in the noise level


@PREDICTION_TYPES
def test_ddim_without_noise_is_the_euler_step_of_its_ode(prediction_type: str):
    """In x / sqrt(a) the probability-flow ODE of a VP model is d = eps d(sqrt(1 - a) / sqrt(a)) (DDIM, Eq. 14)."""
    schedule = Schedule((0.1, 0.4, 0.8, 1.0), prediction_type)
    x, prediction = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1)
    for index, (alpha, alpha_next) in enumerate(zip(schedule.levels, schedule.levels[1:], strict=False)):
        eps = prediction
        if prediction_type == "v_prediction":  # v and x are eps and x_0, rotated
            eps = math.sqrt(alpha) * prediction + math.sqrt(1 - alpha) * x
        ratio, ratio_next = (math.sqrt((1 - a) / a) for a in (alpha, alpha_next))
        expected = math.sqrt(alpha_next) * (x / math.sqrt(alpha) + (ratio_next - ratio) * eps)
        step = ddim(x, prediction, schedule, index, 0.0)
        torch.testing.assert_close(step.mean, expected)
        assert step.std == 0


# Published formulas and other people's code


def table_flow_sde(x: Tensor, v: Tensor, s: float, s_next: float, s_second: float, a: float) -> Transition:
    """Flow-GRPO (arXiv 2505.05470), Eq. 9, with its code's substitute for s = 1."""
    dt, g = s_next - s, a * math.sqrt(s / (1 - (s_second if s == 1 else s)))
    return Transition(
        (1 + g**2 * dt / (2 * s)) * x + (1 + g**2 * (1 - s) / (2 * s)) * dt * v,
        g * math.sqrt(-dt),
    )


def table_dance_sde(x: Tensor, v: Tensor, s: float, s_next: float, s_second: float, a: float) -> Transition:
    """DanceGRPO (arXiv 2505.07818): the ODE's step plus the score, with x_0 in its place."""
    dt = s_next - s
    return Transition(x + dt * v + 0.5 * a**2 * dt * (x - (1 - s) * (x - s * v)) / s**2, a * math.sqrt(-dt))


def table_cps(x: Tensor, v: Tensor, s: float, s_next: float, s_second: float, a: float) -> Transition:
    """Flow-CPS (arXiv 2509.05952): s cos and s sin of one angle share the noise between the old and the new."""
    x_0, eps, angle = x - s * v, x + (1 - s) * v, a * math.pi / 2
    return Transition((1 - s_next) * x_0 + s_next * math.cos(angle) * eps, s_next * math.sin(angle))


@pytest.mark.parametrize("noise_level", [0.1, 0.7, 1.0])
@pytest.mark.parametrize(
    ("kernel", "table"),
    [(flow_sde, table_flow_sde), (dance_sde, table_dance_sde), (cps, table_cps)],
    ids=["flow_sde", "dance_sde", "cps"],
)
def test_published_formula(kernel: KernelFunction, table: Callable[..., Transition], noise_level: float):
    levels = sigmas(SHIFT_3)
    x, velocity = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1)
    for index in range(10):
        step = kernel(x, velocity, Schedule(levels), index, noise_level)
        expected = table(x.double(), velocity.double(), levels[index], levels[index + 1], levels[1], noise_level)
        torch.testing.assert_close(step.mean.double(), expected.mean, atol=2e-5, rtol=2e-5)
        assert step.std == pytest.approx(expected.std, rel=1e-9, abs=1e-12)


@SDES
def test_sde_step_follows_the_score(kernel: KernelFunction):
    """Data of eight pictures: exact velocity from the posterior over them, score by differentiating the log-density.
    The SDE with the ODE's marginals is `dx = (v - g^2 / 2 score) ds + g dw` (arXiv 2011.13456, Eq. 6), backwards."""
    pictures, levels = randn(8, 6, seed=3), (1.0, 0.8, 0.5, 0.2, 0.0)
    for index in (1, 2, 3):
        sigma, dt = levels[index], levels[index + 1] - levels[index]
        x = randn(16, 6, seed=index).requires_grad_()
        log_weights = -(x[:, None] - (1 - sigma) * pictures).square().sum(-1) / (2 * sigma**2)
        (score,) = torch.autograd.grad(torch.logsumexp(log_weights, 1).sum(), x)
        x_0 = log_weights.softmax(1) @ pictures
        velocity = ((x - x_0) / sigma).detach()

        step = kernel(x.detach(), velocity, Schedule(levels), index, 0.7)
        g = 0.7 * math.sqrt(sigma / (1 - sigma)) if kernel is flow_sde else 0.7
        torch.testing.assert_close(step.mean, x.detach() + dt * (velocity - g**2 / 2 * score), atol=1e-5, rtol=1e-5)
        assert step.std == pytest.approx(g * math.sqrt(-dt))


def test_ode_is_the_step_of_diffusers_flow_matching():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    schedule, x = Schedule(tuple(scheduler.sigmas.tolist())), randn(2, 4, 8, 8)
    for index, timestep in enumerate(scheduler.timesteps):
        velocity = randn(2, 4, 8, 8, seed=1 + index)
        expected = scheduler.step(velocity, timestep, x).prev_sample
        step = ode(x, velocity, schedule, index)
        assert torch.equal(step.mean, expected) and step.std == 0
        x = expected


@PREDICTION_TYPES
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_ddim_is_the_step_of_diffusers(prediction_type: str, eta: float, set_alpha_to_one: bool):
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=set_alpha_to_one,
        prediction_type=prediction_type,
    )
    scheduler.set_timesteps(10)
    levels = (*scheduler.alphas_cumprod[scheduler.timesteps].tolist(), scheduler.final_alpha_cumprod.item())
    x = randn(2, 4, 8, 8)
    for index, timestep in enumerate(scheduler.timesteps):
        prediction, noise = randn(2, 4, 8, 8, seed=1 + index), randn(2, 4, 8, 8, seed=100 + index)
        expected = scheduler.step(prediction, timestep, x, eta=eta, variance_noise=noise).prev_sample
        step = ddim(x, prediction, Schedule(levels, prediction_type), index, eta)
        torch.testing.assert_close(step.sample(noise), expected, atol=1e-5, rtol=1e-4)
        x = expected


# The ends of the schedule


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        # just below 1: Wan's 0.999999 and SANA's 0.99967
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ],
    ids=["1.0", "0.999999", "0.99967"],
)
@FLOW_KERNELS
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_ends_of_the_schedule_are_tame(scheduler, kernel: KernelFunction, steps: int):
    levels = sigmas(scheduler, steps)
    assert 0.999 < levels[0] <= 1 and levels[-1] == 0
    x, velocity = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1)
    for index in range(steps):
        step = kernel(x, velocity, Schedule(levels), index, 0.7)
        assert step.mean.isfinite().all() and step.mean.abs().max() < 10 * max(x.abs().max(), velocity.abs().max())
        assert 0 <= step.std < 2
    # a start just below 1 moves as a start at 1
    below, at_one = (kernel(x, velocity, Schedule((first, *levels[1:])), 0, 0.7) for first in (levels[0], 1.0))
    torch.testing.assert_close(below.mean, at_one.mean, atol=5e-3, rtol=5e-3)
    assert below.std == pytest.approx(at_one.std, abs=5e-3)


def test_cps_ends_without_noise():
    assert cps(randn(1, 4), randn(1, 4, seed=1), Schedule((0.5, 0.0)), 0, 0.7).std == 0


def test_ddim_from_pure_noise_is_finite():
    """Zero terminal SNR (alpha 0) with eta 1 leaves nothing of the old noise, which may round to less than nothing."""
    x, prediction = randn(1, 4), randn(1, 4, seed=1)
    for alpha_next in torch.linspace(1e-3, 0.999, 500).tolist():
        step = ddim(x, prediction, Schedule((0.0, alpha_next), "v_prediction"), 0, 1.0)
        torch.testing.assert_close(step.mean, -math.sqrt(alpha_next) * prediction)  # sqrt(a') x_0
        assert step.std == pytest.approx(math.sqrt(1 - alpha_next))


# Shapes and dtypes


def schedule_for(kernel: Kernel) -> Schedule:
    return Schedule((1.0, 0.8, 0.4, 0.0)) if kernel.is_flow else Schedule((0.1, 0.4, 0.8, 1.0), "epsilon")


@pytest.mark.parametrize("kernel", TRANSITIONS.values(), ids=TRANSITIONS)
@pytest.mark.parametrize("shape", [(2, 4, 3, 2, 16), (2, 48, 8)], ids=["video", "packed"])
def test_shape_does_not_matter(kernel: Kernel, shape: tuple[int, ...]):
    x, prediction, noise = (randn(2, 4, 6, 16, seed=seed) for seed in range(3))
    for index in range(3):
        flat = kernel(x, prediction, schedule_for(kernel), index, 0.5)
        shaped = kernel(x.reshape(shape), prediction.reshape(shape), schedule_for(kernel), index, 0.5)
        assert shaped.mean.shape == shape and shaped.std == flat.std
        assert torch.equal(shaped.mean.reshape(x.shape), flat.mean)
        assert torch.equal(shaped.sample(noise.reshape(shape)).reshape(x.shape), flat.sample(noise))


@pytest.mark.parametrize("kernel", TRANSITIONS.values(), ids=TRANSITIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_arithmetic_is_float32(kernel: Kernel, dtype: torch.dtype):
    x, prediction = (randn(2, 4, 8, 8, seed=seed).to(dtype) for seed in range(2))
    for index in range(3):
        low = kernel(x, prediction, schedule_for(kernel), index, 0.5)
        full = kernel(x.float(), prediction.float(), schedule_for(kernel), index, 0.5)
        assert low.mean.dtype == torch.float32 and isinstance(low.std, float)
        assert torch.equal(low.mean, full.mean) and low.std == full.std


def test_sample_has_the_mean_and_the_std():
    step = Transition(torch.full((1, 200_000), 3.0), 0.5)
    drawn = step.sample(randn(1, 200_000))
    assert drawn.mean().item() == pytest.approx(3.0, abs=5e-3)
    assert drawn.std().item() == pytest.approx(0.5, abs=5e-3)


# What each kernel makes of the velocity gap: KL = weight * mean (v_S - v_T)^2


def kl_weight(kernel: KernelFunction, levels: tuple[float, ...], index: int, a: float) -> float:
    """Closed forms, by hand."""
    s, s_next = levels[index], levels[index + 1]
    step = s - s_next
    if kernel is ode:
        return step**2 / 2
    if kernel is flow_sde and s < 1:
        return (1 + a**2 / 2) ** 2 * step * (1 - s) / (2 * a**2 * s)
    if kernel is flow_sde:  # g^2 = a^2 / step, and v counts only through dt
        return step**2 / (2 * a**2)
    if kernel is dance_sde:
        return step * (1 + a**2 * (1 - s) / (2 * s)) ** 2 / (2 * a**2)
    angle = a * math.pi / 2
    gap = (1 - s) * s_next * math.cos(angle) - s * (1 - s_next)
    return gap**2 / (2 * s_next**2 * math.sin(angle) ** 2) if s_next > 0 else gap**2 / 2


@FLOW_KERNELS
@pytest.mark.parametrize("noise_level", [0.3, 0.7])
def test_kl_is_a_weight_on_the_velocity_gap(kernel: KernelFunction, noise_level: float):
    levels = sigmas(SHIFT_3)
    for index, weight in enumerate(kl_weights(kernel, levels, noise_level)):
        assert weight == pytest.approx(kl_weight(kernel, levels, index, noise_level), rel=1e-3)


def test_where_the_loss_of_ten_steps_lies():
    """SD3.5's grid, equal velocity gaps: shares of the loss in percent."""

    def shares(kernel: KernelFunction, steps: int = 10) -> list[float]:
        weights = kl_weights(kernel, sigmas(SHIFT_3), 0.7)[:steps]
        return [100 * weight / sum(weights) for weight in weights]

    assert shares(ode)[8] == pytest.approx(46.5, abs=0.1) and shares(ode)[9] == pytest.approx(0.05, abs=0.01)
    assert shares(flow_sde)[9] == pytest.approx(47.6, abs=0.1)
    assert shares(flow_sde, steps=9)[8] == pytest.approx(64, abs=0.5)
    assert shares(cps, steps=9)[8] == pytest.approx(99.85, abs=0.01)


@PREDICTION_TYPES
def test_flow_matching_of_vp_models_is_that_of_what_they_predict(prediction_type):
    """The noise, or `sqrt(a) eps - sqrt(1 - a) x_0` (arXiv 2202.00512)."""
    schedule, clean, noise, prediction = Schedule((0.3, 0.8), prediction_type), *(randn(2, 3, seed=n) for n in range(3))
    x = math.sqrt(0.3) * clean + math.sqrt(0.7) * noise
    target = noise if prediction_type == "epsilon" else math.sqrt(0.3) * noise - math.sqrt(0.7) * clean
    assert torch.allclose(velocity_gap(x, prediction, clean, noise, schedule, 0), prediction - target, atol=1e-6)
    flow = Schedule((0.3, 0.1))
    assert torch.allclose(velocity_gap(x, prediction, clean, noise, flow, 0), prediction - (noise - clean), atol=1e-6)
