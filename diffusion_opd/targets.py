"""Targets: what the right answer would have been at a visited state.

Pure functions of predictions, float32. All of them are affine in what a model predicts, as all kernels are. This file
knows no pipeline, no model and no trainer.
"""

from torch import Tensor


def extrapolated(teacher: Tensor, ref: Tensor, scale: float) -> Tensor:
    """`v_ref + scale (v_T - v_ref)`: beyond the teacher for a `scale` above 1, on the line on which training has
    brought it there from a reference (STEP-OPD, arXiv 2608.04887)."""
    return ref.float() + scale * (teacher.float() - ref.float())


def mixed(own: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """`(1 - w) v_own + w v_T`, of one `weight` a sample, shape `[batch]`: at 0 what the student says itself, which
    moves nothing. The gradient of a squared distance to it is `w` times that of the distance to the teacher."""
    weight = weight.view(-1, *[1] * (teacher.ndim - 1))
    return own.float() + weight * (teacher.float() - own.float())


def direction(guided: Tensor, conditional: Tensor, reach: float) -> Tensor:
    """The direction of guidance, `(v_w - v_c) / reach`: what classifier-free guidance adds to the conditional branch,
    `v_w = v_c + reach (v_c - v_u)` with `reach = w - 1` (Z-Image: `w`)."""
    return (guided.float() - conditional.float()) / reach
