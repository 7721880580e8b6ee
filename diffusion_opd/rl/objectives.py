"""What reinforcement learning asks of a policy: advantages, likelihood ratios, clipping, and DiffusionNFT's contrast.

Pure functions of tensors, float32, one number a sample: the MEAN over the latent's elements, as in Flow-GRPO's code.
This file knows no pipeline, no model and no trainer.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..objectives import mean_per_sample
from ..rewards.statistics import nanstd


def group_advantages(rewards: Tensor, num_generations: int, scale: str) -> tuple[Tensor, Tensor]:
    """How much better than its group each sample is (GRPO, arXiv 2402.03300; TRL's `scale_rewards`).

    Args:
        rewards (`Tensor`): `[groups * num_generations]`, a group's samples in succession; NaN has no part in it.
        num_generations (`int`): Samples of one prompt.
        scale (`str`): Divide by the std of the `"group"`, of the `"batch"`, or by nothing (`"none"`).

    Returns:
        `tuple[Tensor, Tensor]`: advantages `[samples]` (0 for a NaN), and the std of each group `[groups]`.
    """
    groups = rewards.view(-1, num_generations)
    group_std = nanstd(groups, 1)
    advantages = groups - groups.nanmean(1, keepdim=True)
    if scale == "group":
        advantages = advantages / (group_std[:, None] + 1e-4)
    elif scale == "batch":
        advantages = advantages / (nanstd(rewards) + 1e-4)
    return advantages.flatten().nan_to_num(0.0), group_std


def expert_weights(rewards: Tensor, num_generations: int, alpha: float) -> Tensor:
    """How much of its expert is in each sample's target (ROPD, MaineCoon's distillation): `alpha (1 - m) / (R + 1 - m)`
    with the mean `m` of its group. Where all fail it is `alpha`, where all pass 0, and within a mixed group successes
    have less.

    Args:
        rewards (`Tensor`): `[groups * num_generations]`, in [0, 1], a group's samples in succession; NaN has no part in
            it.
        num_generations (`int`): Samples of one prompt.
        alpha (`float`): In (0, 1].

    Returns:
        `Tensor`: `[samples]`, in [0, `alpha`]; 0 for a NaN.
    """
    groups = rewards.view(-1, num_generations)
    failing = 1 - groups.nanmean(1, keepdim=True)
    # 0 / 0 where all pass: R = 1 there
    return (alpha * failing / (groups + failing)).flatten().nan_to_num(0.0)


def log_ratio(mean: Tensor, old_mean: Tensor, noise: Tensor, std: float) -> Tensor:
    """`log pi(x') - log pi_old(x')` of one step for `x' = old_mean + std noise`, shape `[batch]` (Flow-GRPO, arXiv
    2505.05470): the difference of two averaged Gaussian log-densities, written so that nothing large cancels."""
    gap = mean - old_mean
    return mean_per_sample(gap * noise) / std - mean_per_sample(gap**2) / (2 * std**2)


def normalised_log_ratio(mean: Tensor, old_mean: Tensor, noise: Tensor) -> Tensor:
    """GRPO-Guard's log-ratio (arXiv 2510.22319), shape `[batch]`: `(log_ratio + mean gap^2 / (2 std^2)) std`, i.e. the
    mean of `gap * noise`. Under the old policy its mean is zero at every step, where the plain one's is negative."""
    return mean_per_sample((mean - old_mean) * noise)


class Clipped(NamedTuple):
    """PPO's surrogate of one step: `loss`, and which samples are clipped `low` and `high`, all `[batch]`."""

    loss: Tensor
    low: Tensor
    high: Tensor


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float) -> Clipped:
    """`max(-A rho, -A clip(rho, 1 - epsilon_low, 1 + epsilon_high))` (PPO, arXiv 1707.06347, Eq. 7)."""
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    low = (ratio < 1 - epsilon_low) & (advantages < 0)
    high = (ratio > 1 + epsilon_high) & (advantages > 0)
    return Clipped(torch.maximum(-advantages * ratio, -advantages * clipped), low, high)


def optimality(advantages: Tensor, clip: float) -> Tensor:
    """DiffusionNFT's `r` in [0, 1] (arXiv 2509.16117): `A / (2 clip) + 1/2`, with `A` in +- `clip`."""
    return advantages / (2 * clip) + 0.5


def nft(
    prediction: Tensor,
    old_prediction: Tensor,
    denoise: Callable[[Tensor], Tensor],
    x_0: Tensor,
    r: Tensor,
    strength: float,
) -> Tensor:
    """DiffusionNFT's contrast of an implicit positive and an implicit negative policy, with its adaptive weighting
    (arXiv 2509.16117), shape `[batch]`.

    `v+ = (1 - b) v_old + b v` and `v- = (1 + b) v_old - b v` each say which clean latent they see; both are compared
    with the sampled `x_0`, the first as far as the sample was good (`r`), the second as far as it was not.

    Args:
        prediction, old_prediction (`Tensor`): Of the trained and of the old policy at the noised `x_0`; any prediction
            that the clean latent is affine in.
        denoise (`Callable[[Tensor], Tensor]`): From a prediction to the clean latent.
        x_0 (`Tensor`): The sample, float32.
        r (`Tensor`): `[batch]`, in [0, 1].
        strength (`float`): `b`, above 0.
    """
    new, old = prediction.float(), old_prediction.float()
    positive = denoise((1 - strength) * old + strength * new)
    negative = denoise((1 + strength) * old - strength * new)
    return (r * _adaptive(positive, x_0) + (1 - r) * _adaptive(negative, x_0)) / strength


def _adaptive(estimate: Tensor, x_0: Tensor) -> Tensor:
    """Squared error over the mean absolute error: a late step, whose error is small, weighs as much as an early one."""
    gap = estimate - x_0
    return mean_per_sample(gap**2) / mean_per_sample(gap.detach().abs()).clamp(min=1e-5)
