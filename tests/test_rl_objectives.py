"""Reinforcement learning's formulas against loops, torch.distributions and cases solved by hand."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal

from diffusion_opd.rewards.statistics import combine, nanstd
from diffusion_opd.rl.objectives import (
    clipped_surrogate,
    group_advantages,
    log_ratio,
    nft,
    normalised_log_ratio,
    optimality,
)

NAN = math.nan


def tensor(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


# Rewards to advantages


def test_nanstd_is_torchs_of_what_is_there():
    x = tensor([1.0, NAN, 4.0, 2.0], [NAN, NAN, 3.0, NAN], [NAN] * 4, [5.0, 5.0, 5.0, 5.0])
    rows = [torch.tensor([1.0, 4.0, 2.0]).std().item(), 0.0, 0.0, 0.0]
    assert nanstd(x, 1).tolist() == pytest.approx(rows)
    assert nanstd(x).item() == pytest.approx(x[~x.isnan()].std().item())
    assert nanstd(tensor(7.0)).item() == 0


def test_rewards_are_added_with_their_weights():
    rewards = tensor([1.0, 2.0, 3.0], [1.0, NAN, 3.0], [NAN, NAN, NAN], [NAN, 2.0, NAN])
    weights = tensor(1.0, 10.0, -0.5)
    total = combine(rewards, weights)
    assert total[[0, 1, 3]].tolist() == pytest.approx([1 + 20 - 1.5, 1 - 1.5, 20.0])
    assert total[2].isnan()


def advantages_by_hand(rewards: list[float], size: int, scale: str) -> list[float]:
    there = [r for r in rewards if not math.isnan(r)]
    result = []
    for start in range(0, len(rewards), size):
        group = [r for r in rewards[start : start + size] if not math.isnan(r)]
        std = {"group": group, "batch": there, "none": None}[scale]
        for r in rewards[start : start + size]:
            if math.isnan(r):
                result.append(0.0)
                continue
            gap = r - sum(group) / len(group)
            divisor = 1.0 if std is None else (np.std(std, ddof=1) if len(std) > 1 else 0.0) + 1e-4
            result.append(gap / divisor)
    return result


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages(scale):
    rewards = [*(0.1, 0.5, 0.3), *(2.0, NAN, 1.0), *(0.7, 0.7, 0.7), *(NAN, NAN, NAN), *(NAN, 3.0, NAN)]
    advantages, group_std = group_advantages(tensor(*rewards), 3, scale)
    expected = advantages_by_hand(rewards, 3, scale)
    assert advantages.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert advantages[6:].tolist() == pytest.approx([0.0] * 9)  # equal, not judged, alone
    stds = [np.std(group, ddof=1) for group in ((0.1, 0.5, 0.3), (2.0, 1.0))]
    assert group_std.tolist() == pytest.approx([*stds, 0, 0, 0], abs=1e-6)


def test_advantages_of_nothing_judged_are_zero():
    for scale in ("group", "batch", "none"):
        assert group_advantages(torch.full((6,), NAN), 3, scale)[0].tolist() == [0.0] * 6


def test_group_advantages_forget_scale_and_offset_of_the_rewards():
    rewards = torch.randn(24, generator=torch.Generator().manual_seed(0))
    plain, moved = (group_advantages(r, 8, "group")[0] for r in (rewards, 50 * rewards - 7))
    assert torch.allclose(plain, moved, atol=1e-3)
    groups = plain.view(3, 8)
    assert torch.allclose(groups.mean(1), torch.zeros(3), atol=1e-6)
    assert torch.allclose(groups.std(1), torch.ones(3), atol=1e-3)


# Likelihood ratios


@pytest.fixture
def gaussians():
    generator = torch.Generator().manual_seed(0)
    old_mean, noise, gap = (torch.randn(5, 3, 4, 4, generator=generator) for _ in range(3))
    return old_mean + 0.3 * gap, old_mean, noise, 0.6


def test_log_ratio_is_of_gaussian_densities(gaussians):
    mean, old_mean, noise, std = gaussians
    sample = old_mean + std * noise
    densities = [Normal(mu, std).log_prob(sample).flatten(1).mean(1) for mu in (mean, old_mean)]
    assert torch.allclose(log_ratio(mean, old_mean, noise, std), densities[0] - densities[1], atol=1e-6)


def test_log_ratio_of_a_policy_with_itself_is_exactly_zero(gaussians):
    _, old_mean, noise, std = gaussians
    assert log_ratio(old_mean, old_mean, noise, std).tolist() == [0.0] * 5
    assert normalised_log_ratio(old_mean, old_mean, noise).tolist() == [0.0] * 5


@pytest.mark.parametrize("std", [0.05, 0.4, 1.5])
def test_guards_ratio_is_centred_where_the_plain_one_is_not(std):
    """Over many transitions of the old policy, with the policy moved away: what GRPO-Guard is for."""
    generator = torch.Generator().manual_seed(1)
    old_mean, noise = torch.zeros(20_000, 8), torch.randn(20_000, 8, generator=generator)
    gap = 0.2 * torch.randn(8, generator=generator)
    bias = (-gap.square().mean() / (2 * std**2)).item()
    for ratio, centre in (
        (normalised_log_ratio(old_mean + gap, old_mean, noise), 0.0),
        (log_ratio(old_mean + gap, old_mean, noise, std), bias),
    ):
        error = (ratio.std() / math.sqrt(len(ratio))).item()
        assert ratio.mean().item() == pytest.approx(centre, abs=4 * error)
        assert error < 0.1 * abs(bias) or centre == 0.0


def test_guards_ratio_is_the_plain_one_corrected(gaussians):
    mean, old_mean, noise, std = gaussians
    penalty = (mean - old_mean).square().flatten(1).mean(1) / (2 * std**2)
    expected = (log_ratio(mean, old_mean, noise, std) + penalty) * std
    assert torch.allclose(normalised_log_ratio(mean, old_mean, noise), expected, atol=1e-6)


# The surrogate


def test_clipping():
    """Each sign of the advantage below, inside and above the clip range, and the two that clipping leaves alone."""
    ratios, low, high = [0.5, 0.95, 1.0, 1.05, 2.0], 0.1, 0.2
    for advantage in (2.0, -2.0, 0.0):
        x = tensor(*ratios).log().requires_grad_()
        clipped = clipped_surrogate(x, torch.full((5,), advantage), low, high)
        (gradients,) = torch.autograd.grad(clipped.loss.sum(), x)
        expected = [max(-advantage * r, -advantage * min(max(r, 1 - low), 1 + high)) for r in ratios]
        assert clipped.loss.tolist() == pytest.approx(expected)
        is_low = [r < 1 - low and advantage < 0 for r in ratios]
        is_high = [r > 1 + high and advantage > 0 for r in ratios]
        assert clipped.low.tolist() == is_low and clipped.high.tolist() == is_high
        for gradient, ratio, stops in zip(gradients.tolist(), ratios, np.logical_or(is_low, is_high), strict=True):
            assert gradient == pytest.approx(0.0 if stops else -advantage * ratio)


def test_on_policy_the_gradient_is_reinforces():
    """A Gaussian policy with a mean to learn: `-A grad log pi`, whatever the clip range."""
    generator = torch.Generator().manual_seed(0)
    theta, std, noise = torch.tensor([0.3, -1.0]), 0.7, torch.randn(64, 2, generator=generator)
    sample = theta + std * noise
    advantages = group_advantages(-(sample - 1.0).square().sum(1), 8, "group")[0]

    def gradient(loss):
        parameter = theta.clone().requires_grad_()
        loss(parameter).backward()
        return parameter.grad

    reinforce = gradient(lambda mean: -(advantages * Normal(mean, std).log_prob(sample).mean(1)).mean())
    for epsilon in (1e-4, 0.2):
        ours = gradient(
            lambda mean, epsilon=epsilon: clipped_surrogate(
                log_ratio(mean.expand(64, 2), theta.expand(64, 2), noise, std), advantages, epsilon, epsilon
            ).loss.mean()
        )
        assert torch.allclose(ours, reinforce, atol=1e-6) and reinforce.norm() > 0.1
    guards = gradient(
        lambda mean: clipped_surrogate(
            normalised_log_ratio(mean.expand(64, 2), theta.expand(64, 2), noise), advantages, 1e-4, 1e-4
        ).loss.mean()
    )
    assert torch.allclose(guards, reinforce * std, atol=1e-6)


# DiffusionNFT


def test_optimality():
    assert optimality(tensor(-5.0, -1.0, 0.0, 2.5, 5.0), 5.0).tolist() == pytest.approx([0.0, 0.4, 0.5, 0.75, 1.0])


def flow(x: torch.Tensor, sigma: float):
    return lambda v: x - sigma * v


@pytest.mark.parametrize(
    ("strength", "r", "expected"),
    [
        # x_0 = 1, eps = 3, sigma = 1/2: x = 2 and the sample's velocity is 2. v_old = 1 sees 3/2, v = 3/2 sees 5/4.
        # b = 1: v+ = 3/2 is off by 1/4, v- = 1/2 sees 7/4 and is off by 3/4; gap^2 / |gap| = |gap|
        (1.0, 1.0, 0.25),
        (1.0, 0.0, 0.75),
        (1.0, 0.3, 0.3 * 0.25 + 0.7 * 0.75),
        # b = 1/2: v+ = 5/4 sees 11/8, v- = 3/4 sees 13/8; divided by b
        (0.5, 0.3, (0.3 * 0.375 + 0.7 * 0.625) / 0.5),
        # b = 2: v+ = 2 is the sample's own, v- = 0 sees 2
        (2.0, 0.3, 0.7 * 1.0 / 2),
    ],
)
def test_contrast_with_pencil_and_paper(strength, r, expected):
    x_0, old, new = tensor([1.0]), tensor([1.0]), tensor([1.5])
    loss = nft(new, old, flow(tensor([2.0]), 0.5), x_0, tensor(r), strength)
    assert loss.tolist() == pytest.approx([expected])


def test_contrast_is_a_mean_over_elements_with_one_weight_a_sample():
    """Errors 1/4 and 3/4: squares over elements (1/16 + 9/16) / 2, the weight (1/4 + 3/4) / 2."""
    x_0, x, old = tensor([[1.0, 1.0]]), tensor([[2.0, 2.0]]), tensor([[1.5, 0.5]])
    loss = nft(old, old, flow(x, 0.5), x_0, tensor(0.8), 1.0)
    assert loss.tolist() == pytest.approx([(10 / 16 / 2) / 0.5])


def test_adaptive_weight_has_a_floor_and_no_gradient():
    x_0, x, old = tensor([1.0]), tensor([2.0]), tensor([1.0])
    exact = nft(tensor([2.0]), tensor([2.0]), flow(x, 0.5), x_0, tensor(1.0), 1.0)
    assert exact.tolist() == [0.0]  # and no division by zero
    new = tensor([1.5]).requires_grad_()
    nft(new, old, flow(x, 0.5), x_0, tensor(1.0), 1.0).backward()
    # gap = x - v / 2 - x_0 = 1/4; d gap^2 / dv = 2 gap (-1/2), over the constant |gap|. With a gradient through the
    # weight it would be half of that
    assert new.grad.item() == pytest.approx(-1.0)


@pytest.mark.parametrize(("r", "sign"), [(1.0, 1), (0.0, -1), (0.9, 1), (0.1, -1)])
def test_good_samples_attract_and_bad_ones_repel(r, sign):
    """On policy (v = v_old), where a step of gradient descent moves the velocity."""
    generator = torch.Generator().manual_seed(0)
    x_0, eps, old = (torch.randn(6, 4, 3, 3, generator=generator) for _ in range(3))
    sigma = 0.7
    new = old.clone().requires_grad_()
    nft(new, old, flow((1 - sigma) * x_0 + sigma * eps, sigma), x_0, torch.full((6,), r), 1.0).sum().backward()
    towards = ((eps - x_0) - old).flatten(1)
    cosine = torch.cosine_similarity(-new.grad.flatten(1), towards)
    assert torch.allclose(cosine, torch.full((6,), float(sign)), atol=1e-5)


def test_a_sample_of_middling_reward_teaches_nothing_on_policy():
    generator = torch.Generator().manual_seed(0)
    x_0, x, old = (torch.randn(6, 4, generator=generator) for _ in range(3))
    new = old.clone().requires_grad_()
    nft(new, old, flow(x, 0.5), x_0, torch.full((6,), 0.5), 0.7).sum().backward()
    assert new.grad.abs().max() < 1e-6
