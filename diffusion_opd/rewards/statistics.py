"""Sums and deviations of rewards, in which NaN (a function that does not apply) has no part.

Pure functions of tensors. This file knows no reward function, no model and no trainer.
"""

import torch
from torch import Tensor


def nanstd(x: Tensor, dim: int | None = None) -> Tensor:
    """Standard deviation (Bessel's correction, as `torch.std`) of what is not NaN; 0 for a single number."""
    dims = tuple(range(x.dim())) if dim is None else (dim,)
    count = (~x.isnan()).sum(dims)
    squares = (x - x.nanmean(dims, keepdim=True)).square().nansum(dims)
    return (squares / (count - 1).clamp(min=1)).sqrt()


def combine(rewards: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of several rewards, as in TRL's GRPO.

    Args:
        rewards (`Tensor`): `[samples, functions]`, NaN where a function does not apply.
        weights (`Tensor`): `[functions]`.

    Returns:
        `Tensor`: `[samples]`; NaN where no function applies.
    """
    total = (rewards * weights).nansum(1)
    return total.masked_fill(rewards.isnan().all(1), torch.nan)
