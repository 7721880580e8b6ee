"""Classifier-free guidance as two branches: what a party predicts without it, and the direction in which it leads.

A pipeline mixes the branches itself, and in ways of its own: most as `v_u + w (v_c - v_u)`, without guidance at a scale
of 1, some (Z-Image) as `v_c + w (v_c - v_u)`, without it at 0. So a party is asked with and without guidance, and which
scale that is, and how far another one reaches, is measured once, at the start.

This file knows policies, and no loss or trainer.
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


def scale_argument(pipeline_class: Any) -> str | None:
    """Which argument of a `__call__` is the scale of its classifier-free guidance. A `guidance_scale` beside a
    `true_cfg_scale` (FLUX, Qwen-Image) is an input of the denoiser."""
    taken = signature(pipeline_class.__call__).parameters
    return next((name for name in ("true_cfg_scale", "guidance_scale") if name in taken), None)


def at_scale(call_kwargs: Mapping[str, Any], scale: float, name: str | None = None) -> dict[str, Any]:
    """Arguments of a `__call__` with another scale of its guidance, and of what further ones they hold (Wan 2.2 has one
    for low noise, LTX-2 one for the audio)."""
    name = scale_name(call_kwargs) if name is None else name
    further = [key for key in call_kwargs if "guidance_scale" in key] if name == "guidance_scale" else []
    return {**call_kwargs, **dict.fromkeys([*further, name], scale)}


@torch.no_grad()
def unguided_scale(
    policy_at: PolicyAt, checked: Checked, inputs: Inputs | None = None, guided: float = 4.0
) -> float | None:
    """The scale at which a party evaluates one branch alone: 1, or else 0; `None` if it has no second branch.

    Args:
        policy_at (`Callable`): The party.
        checked ([`Checked`]): The student, where it is asked.
        inputs (`Mapping[str, Sequence]`, *optional*): Of the party. `None`: those of the student.
        guided (`float`, *optional*): A scale at which it is guided.
    """
    both = rows_asked(policy_at(guided), checked, inputs)
    return next((scale for scale in (1.0, 0.0) if rows_asked(policy_at(scale), checked, inputs) < both), None)


def rows_asked(policy: Policy, checked: Checked, inputs: Inputs | None = None) -> int:
    """How many rows a party's denoiser is given for the first visit: as many as samples, or for each branch so many."""
    return _asked(policy, checked, inputs)[1]


@torch.no_grad()
def branches(policy_at: PolicyAt, scale: float, checked: Checked, inputs: Inputs | None = None) -> tuple[float, float]:
    """Where guidance is off, and the `k` of `v_w = v_c + k (v_c - v_u)`: the guided prediction at the scale `w`, and
    its two branches.

    Args:
        policy_at (`Callable`): The party.
        scale (`float`): `w`, above 1.
        checked ([`Checked`]): The student, where it is asked.
        inputs (`Mapping[str, Sequence]`, *optional*): Of the party. `None`: those of the student.

    Returns:
        `tuple[float, float]`: 1 and `w - 1`, or in pipelines that count from the conditional branch 0 and `w`.

    Raises:
        ValueError: if guidance changes nothing, or is not linear in its scale (where a scale is an input of the
            denoiser, is rescaled, or projected).
    """
    off = unguided_scale(policy_at, checked, inputs, scale)
    name = policy_at(scale).name
    if off is None:
        raise ValueError(
            f"{name} evaluates no second branch for its guidance, so there is no direction to match; give it a "
            "negative prompt if its guidance needs one, or leave `guidance_split` out"
        )
    conditional, guided, twice = (_asked(policy_at(s), checked, inputs)[0] for s in (off, scale, 2 * scale))
    direction, way, k = (twice - guided) / scale, guided - conditional, scale - off
    tolerance = 1e-3 if checked.visits[0].steps[0].prediction.dtype == torch.float32 else 5e-2
    if not (way - k * direction).norm() < 2 * tolerance * way.norm():
        raise ValueError(
            f"the guidance of {name} is not linear in its scale, so its two branches cannot be told apart; leave "
            "`guidance_split` out"
        )
    return off, k


@torch.no_grad()
def _asked(policy: Policy, checked: Checked, inputs: Inputs | None) -> tuple[Tensor, int]:
    """What a party predicts at the first visit, and how many rows its denoiser is given for it."""
    rows = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal rows
        state = args[len(policy.denoisers) > 1 :] or tuple(kwargs.values())  # of several, past the name
        rows += len(state[0])
        return policy.denoiser(*args, **kwargs)

    visit = checked.visits[0]
    with policy.follow(checked.walk, inputs, denoiser=counted) as follow:
        predictions = follow(visit)
    return torch.cat([prediction.float().flatten() for prediction in predictions]), rows
