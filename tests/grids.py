"""Grids of noise levels, and how much each of their steps counts in the loss."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from diffusion_opd.objectives import kl
from diffusion_opd.transitions import KernelFunction, Schedule

SHIFT_3 = FlowMatchEulerDiscreteScheduler(shift=3.0)  # the scheduler of SD3.5


def sigmas(scheduler, steps: int = 10) -> tuple[float, ...]:
    scheduler.set_timesteps(steps)
    return tuple(scheduler.sigmas.tolist())


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kl_weights(kernel: KernelFunction, levels: tuple[float, ...], a: float) -> list[float]:
    x, student, teacher = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1), randn(2, 4, 8, 8, seed=2)
    gap = (student - teacher).square().flatten(1).mean(1)
    weights = []
    for index in range(len(levels) - 1):
        steps = (kernel(x, velocity, Schedule(levels), index, a) for velocity in (student, teacher))
        ratio = kl(*steps) / gap
        torch.testing.assert_close(ratio[0], ratio[1], rtol=1e-3, atol=0)  # a weight: the same for all samples
        weights.append(ratio.mean().item())
    return weights
