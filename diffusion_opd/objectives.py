"""Objectives: how far the student's step is from the teacher's.

Pure functions of tensors, float32, one number a sample: the MEAN over the latent's elements (the released code's
reduction; the paper's KL is the sum, i.e. this times the number of elements). The trainer takes the mean over the batch
and over the learnt steps. What else there is to know about an objective stands in `OBJECTIVES`, and only there. This
file knows no pipeline, no model and no trainer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .transitions import Transition


def mean_per_sample(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


def kl(student: Transition, teacher: Transition) -> Tensor:
    """Closed-form reverse KL of one step (paper, Eq. 10-12), shape `[batch]`.

    Both Gaussians share the std of the step, so `KL = |mu_S - mu_T|^2 / (2 std^2)`; a deterministic step (std 0) has no
    KL and takes the paper's ODE form `|mu_S - mu_T|^2 / 2`.
    """
    gap = mean_per_sample((student.mean - teacher.mean) ** 2)
    return gap / (2 * student.std**2) if student.std > 0 else gap / 2


def velocity(student: Tensor, teacher: Tensor) -> Tensor:
    """Plain mean squared error of the guided predictions (DanceOPD, arXiv 2606.27377), shape `[batch]`."""
    return mean_per_sample((student.float() - teacher.float()) ** 2)


def log_prob(transition: Transition, sample: Tensor) -> Tensor:
    """Log-density of `sample` under the transition up to a constant, averaged over elements as in Flow-GRPO
    (arXiv 2505.05470), shape `[batch]`."""
    return mean_per_sample(-((sample - transition.mean) ** 2) / (2 * transition.std**2))


def policy_gradient(kl: Tensor, student: Transition, next_sample: Tensor) -> Tensor:
    """PPO-style surrogate (paper, Eq. 16-23), shape `[batch]`, for comparison with the closed form.

    The advantage of a step is minus its own KL and keeps its gradient: `grad(rho KL) = grad KL + KL grad log pi`, the
    second term has mean zero and is pure noise. As in Flow-GRPO `rho` is the ratio of averaged log-densities, which
    divides that noise by the number of elements. The rollout policy is the current one, so `rho` is 1 in value and
    clipping it is the identity, in value and in gradient. Undefined for a deterministic step.
    """
    log_probability = log_prob(student, next_sample.detach())
    ratio = torch.exp(log_probability - log_probability.detach())
    return ratio * kl


class Comparison(NamedTuple):
    """Student and teacher at one visited state: their steps, their guided predictions, and where the rollout goes."""

    student: Transition
    teacher: Transition
    prediction: Tensor
    target: Tensor
    next_sample: Tensor

    def to(self, teacher: Transition, target: Tensor) -> "Comparison":
        """The same student beside another answer."""
        return self._replace(teacher=teacher, target=target)


@dataclass(frozen=True)
class Objective:
    """
    An objective and what there is to know about it.

    Args:
        name (`str`): What a user calls it.
        loss (`Callable`): What is learnt from, of a [`Comparison`], shape `[batch]`.
        divides_by_std (`bool`, *optional*, defaults to `False`):
            Whether it divides by the std of a step, so that of steps with noise none may be without.
        needs_noise (`bool`, *optional*, defaults to `False`): Whether it is undefined for deterministic steps.
    """

    name: str
    loss: Callable[[Comparison], Tensor]
    divides_by_std: bool = False
    needs_noise: bool = False


OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        Objective("kl", lambda at: kl(at.student, at.teacher), divides_by_std=True),
        Objective("velocity", lambda at: velocity(at.prediction, at.target)),
        Objective(
            "policy_gradient",
            lambda at: policy_gradient(kl(at.student, at.teacher), at.student, at.next_sample),
            divides_by_std=True,
            needs_noise=True,
        ),
    )
}
