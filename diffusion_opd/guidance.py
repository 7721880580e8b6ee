"""Classifier-free guidance as two branches: what a party predicts without it, and the direction in which it leads.

A pipeline mixes the branches itself, and in ways of its own; so a party is asked twice, with and without guidance, and
how far a scale reaches is measured once, at the start. This file knows policies, and no loss or trainer.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .config import scale_name
from .inputs import Inputs, signature
from .policy import Policy
from .startup import Checked

PolicyAt = Callable[[float], Policy]  # a party under a guidance scale


def at_scale(call_kwargs: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """Arguments of a `__call__` with another scale of its guidance."""
    return {**call_kwargs, scale_name(call_kwargs): scale}


def without(pipeline_class: Any, call_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a `__call__` without classifier-free guidance. A `guidance_scale` beside a `true_cfg_scale` (FLUX,
    Qwen-Image) is an input of the denoiser, and stays."""
    taken = signature(pipeline_class.__call__).parameters
    if "true_cfg_scale" in taken:
        return {**call_kwargs, "true_cfg_scale": 1.0}
    # Wan 2.2 has one more for low noise, LTX-2 one for the audio
    scales = [name for name in call_kwargs if "guidance_scale" in name]
    scales += ["guidance_scale"] if "guidance_scale" in taken else []
    return {**call_kwargs, **dict.fromkeys(scales, 1.0)}


@torch.no_grad()
def reach(policy_at: PolicyAt, scale: float, checked: Checked, inputs: Inputs | None = None) -> float:
    """The `k` of `v_w = v_c + k (v_c - v_u)`: the guided prediction at the scale `w`, and its two branches.

    Args:
        policy_at (`Callable`): The party.
        scale (`float`): `w`, above 1.
        checked ([`Checked`]): The student, where it is asked.
        inputs (`Mapping[str, Sequence]`, *optional*): Of the party. `None`: those of the student.

    Returns:
        `float`: `w - 1`, or in pipelines that count from the conditional branch (Z-Image) `w`.

    Raises:
        ValueError: if guidance changes nothing, or is not linear in its scale (where a scale is an input of the
            denoiser, is rescaled, or projected).
    """
    visit, answers = checked.visits[0], list[Tensor]()
    for other in (1.0, scale, 2 * scale):
        policy = policy_at(other)
        with policy.follow(checked.walk, inputs) as follow:
            answers.append(torch.cat([prediction.float().flatten() for prediction in follow(visit)]))
    conditional, guided, twice = answers
    direction, way = (twice - guided) / scale, guided - conditional
    tolerance = 1e-3 if visit.steps[0].prediction.dtype == torch.float32 else 5e-2
    if not direction.norm() > tolerance / scale * conditional.norm():
        raise ValueError(
            f"{policy.name} predicts the same with and without guidance, so there is no direction to match; give it a "
            "negative prompt if its guidance needs one, or leave `guidance_split` out"
        )
    measured = (way.dot(direction) / direction.dot(direction)).item()
    for k in (scale - 1, scale):
        if abs(measured - k) < tolerance * k and (way - k * direction).norm() < 2 * tolerance * way.norm():
            return k
    raise ValueError(
        f"the guidance of {policy.name} is not linear in `{scale_name(policy.call_kwargs)}`, so its two branches "
        "cannot be told apart; leave `guidance_split` out"
    )
