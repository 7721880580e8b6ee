"""Objectives against torch.distributions, and the policy gradient against the closed form that it estimates."""

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from diffusion_opd.objectives import kl, log_prob, policy_gradient, velocity
from diffusion_opd.transitions import Schedule, Transition, flow_sde, ode

# 4-D as SD3, packed as FLUX.1, video as Wan: no two dimensions alike, so that a wrong one cannot be taken unnoticed
SHAPES = pytest.mark.parametrize("shape", [(3, 4, 5, 6), (3, 7, 4), (3, 4, 2, 5, 6)], ids=["4d", "packed", "video"])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(shape: tuple[int, ...], std: float) -> tuple[Transition, Transition]:
    return Transition(randn(*shape, seed=1), std), Transition(randn(*shape, seed=2), std)


def by_hand(values: Tensor) -> Tensor:
    """Mean over the elements of each sample, one sample at a time."""
    return torch.stack([sample.sum() / sample.numel() for sample in values])


@SHAPES
@pytest.mark.parametrize("std", [0.03, 0.7])
def test_kl_is_that_of_two_gaussians(shape: tuple[int, ...], std: float):
    student, teacher = pair(shape, std)
    expected = by_hand(kl_divergence(Normal(student.mean, std), Normal(teacher.mean, std)))
    found = kl(student, teacher)
    assert found.shape == (3,) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(kl(teacher, student), found)  # with one std, both directions are one


@SHAPES
def test_kl_without_noise_is_half_the_squared_gap(shape: tuple[int, ...]):
    student, teacher = pair(shape, 0.0)
    found = kl(student, teacher)
    assert found.shape == (3,)
    torch.testing.assert_close(found, by_hand((student.mean - teacher.mean).square() / 2))


@SHAPES
def test_kl_of_equals_is_zero(shape: tuple[int, ...]):
    for std in (0.0, 0.5):
        student, _ = pair(shape, std)
        assert torch.equal(kl(student, student), torch.zeros(3))


@SHAPES
def test_velocity_is_the_mean_squared_error(shape: tuple[int, ...]):
    student, teacher = randn(*shape, seed=1), randn(*shape, seed=2)
    torch.testing.assert_close(velocity(student, teacher), by_hand((student - teacher).square()))
    low = velocity(student.bfloat16(), teacher.bfloat16())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, by_hand((student.bfloat16().float() - teacher.bfloat16().float()).square()))


@SHAPES
def test_log_prob_is_that_of_a_gaussian_up_to_a_constant(shape: tuple[int, ...]):
    step, sample = Transition(randn(*shape, seed=1), 0.3), randn(*shape, seed=2)
    normal = Normal(step.mean, step.std)
    constant = normal.log_prob(step.mean)  # the density's height, the same everywhere
    found = log_prob(step, sample)
    assert found.shape == (3,)
    torch.testing.assert_close(found, by_hand(normal.log_prob(sample) - constant))
    assert torch.equal(log_prob(step, step.mean), torch.zeros(3))


def test_samples_of_a_batch_do_not_touch():
    """Each number depends on its own sample, and a batch gives what its samples give alone: video, where a noise level
    of shape [1, S, 1, 1, 1] would have been broadcast against the channels."""
    student, teacher = pair((3, 4, 2, 5, 6), 0.4)
    sample = randn(3, 4, 2, 5, 6, seed=3)
    functions = [
        lambda rows: kl(Transition(student.mean[rows], 0.4), Transition(teacher.mean[rows], 0.4)),
        lambda rows: log_prob(Transition(student.mean[rows], 0.4), sample[rows]),
        lambda rows: velocity(student.mean[rows], teacher.mean[rows]),
    ]
    for function in functions:
        together = function(slice(None))
        alone = torch.cat([function(slice(index, index + 1)) for index in range(3)])
        torch.testing.assert_close(alone, together)
        assert together.unique().numel() == 3


def test_video_gives_what_its_frames_give():
    """The KL of a clip is the mean of its frames' KLs at every step of a schedule as long as there are channels."""
    schedule = Schedule((0.9, 0.7, 0.5, 0.3, 0.1))
    x, student, teacher = (randn(2, 4, 3, 5, 6, seed=seed) for seed in range(3))
    for index in range(4):
        whole = kl(*(flow_sde(x, velocity, schedule, index, 0.7) for velocity in (student, teacher)))
        frames = [
            kl(*(flow_sde(x[:, :, frame], v[:, :, frame], schedule, index, 0.7) for v in (student, teacher)))
            for frame in range(3)
        ]
        torch.testing.assert_close(whole, torch.stack(frames).mean(0))


# Policy gradient. The "model" is a vector theta that is its own velocity at one state x; the teacher's is given.

SCHEDULE, INDEX, NOISE_LEVEL = Schedule((0.9, 0.6, 0.3)), 0, 0.7
ELEMENTS = 6


def gradients(draws: int, advantage_keeps_its_gradient: bool = True) -> tuple[Tensor, Tensor]:
    """Gradients with respect to the velocity: the policy gradient's, one a draw, and the closed form's."""
    x, target, theta = randn(1, ELEMENTS), randn(1, ELEMENTS, seed=1), randn(1, ELEMENTS, seed=2)
    teacher = flow_sde(x, target, SCHEDULE, INDEX, NOISE_LEVEL)

    exact = theta.clone().requires_grad_()
    kl(flow_sde(x, exact, SCHEDULE, INDEX, NOISE_LEVEL), teacher).sum().backward()

    each = theta.repeat(draws, 1).requires_grad_()  # a batch: one draw a sample
    student = flow_sde(x.expand(draws, -1), each, SCHEDULE, INDEX, NOISE_LEVEL)
    divergence = kl(student, Transition(teacher.mean.expand(draws, -1), teacher.std))
    if not advantage_keeps_its_gradient:
        divergence = divergence.detach()
    loss = policy_gradient(divergence, student, student.sample(randn(draws, ELEMENTS, seed=3)))
    assert torch.equal(loss, divergence)  # the ratio is 1: on policy
    loss.sum().backward()
    return each.grad, exact.grad[0]


def standard_error(samples: Tensor) -> Tensor:
    return samples.std(0) / samples.shape[0] ** 0.5


def test_policy_gradient_is_the_closed_form_in_expectation():
    """To 4 standard errors in each of 6 elements (a true estimator fails with probability 4e-4; the draws are seeded),
    with errors small against the gradient."""
    noisy, exact = gradients(draws=100_000)
    error = standard_error(noisy)
    assert (error < 0.02 * exact.abs().max()).all()
    assert ((noisy.mean(0) - exact).abs() < 4 * error).all()


def test_policy_gradient_has_the_higher_variance():
    """At a given state the closed form has no variance at all. The surrogate's noise is KL times the score, of variance
    KL^2 b^2 / (elements * std)^2 in each element."""
    noisy, exact = gradients(draws=100_000)
    x, target, theta = (randn(1, ELEMENTS, seed=seed) for seed in range(3))
    student, teacher = (flow_sde(x, v, SCHEDULE, INDEX, NOISE_LEVEL) for v in (theta, target))
    b = ((student.mean - teacher.mean) / (theta - target)).mean().item()
    expected = (kl(student, teacher).item() * b / (ELEMENTS * student.std)) ** 2
    torch.testing.assert_close(noisy.var(0), torch.full((ELEMENTS,), expected), rtol=0.03, atol=0)
    assert noisy.var(0).sum() > 0.05 * exact.square().sum()


def test_detached_advantage_teaches_nothing():
    noisy, exact = gradients(draws=100_000, advantage_keeps_its_gradient=False)
    assert (noisy.mean(0).abs() < 4 * standard_error(noisy)).all()
    assert noisy.mean(0).norm() < 0.05 * exact.norm()


def test_policy_gradient_does_not_follow_its_own_sample():
    """The drawn state is data: a sample that still hangs on the graph gives the same gradient."""
    x, target, noise = randn(2, ELEMENTS), randn(2, ELEMENTS, seed=1), randn(2, ELEMENTS, seed=3)
    found = []
    for detach in (True, False):
        theta = randn(2, ELEMENTS, seed=2).requires_grad_()
        student, teacher = (flow_sde(x, v, SCHEDULE, INDEX, NOISE_LEVEL) for v in (theta, target))
        sample = student.sample(noise)
        policy_gradient(kl(student, teacher), student, sample.detach() if detach else sample).sum().backward()
        found.append(theta.grad)
    assert torch.equal(*found)


def test_gradient_of_kl_flows_to_the_student_alone():
    x, student, teacher = (randn(2, 4, 5, 6, seed=seed) for seed in range(3))
    for kernel, level in ((ode, 0.0), (flow_sde, 0.7)):
        student = student.detach().requires_grad_()
        with torch.no_grad():
            goal = kernel(x, teacher, SCHEDULE, 0, level)
        kl(kernel(x, student, SCHEDULE, 0, level), goal).sum().backward()
        # an affine mean: descent points from the student's velocity to the teacher's
        direction = torch.nn.functional.cosine_similarity(-student.grad.flatten(), (teacher - student).flatten(), dim=0)
        assert direction.item() == pytest.approx(1, abs=1e-5)
