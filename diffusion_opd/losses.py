"""The loss of on-policy distillation at a visit: the distance to what the right answer would have been, and to an
anchor.

This file knows predictions, kernels and settings, and no pipeline or trainer.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import objectives, targets
from .config import DiffusionOPDConfig
from .parties import Answers
from .policy import Visit
from .scheduler_proxy import Step
from .transitions import BoundKernel, Transition


class Terms(NamedTuple):
    """What a visit adds to the loss, each of shape `[batch]`: all of it, what it learns from its teacher, the KL of its
    step to the teacher's, and what else is logged, by name."""

    loss: Tensor
    distilled: Tensor
    kl: Tensor
    logged: dict[str, Tensor]


class DistillationLoss:
    """
    The loss at a visit, the mean over its streams.

    Args:
        args ([`DiffusionOPDConfig`]): Objective, target and anchor.
        kernel ([`BoundKernel`]): How the student moves.
        reach (`dict[str, float]`): How far guidance reaches, by task, and under `"student"` of the student.
    """

    def __init__(self, args: DiffusionOPDConfig, kernel: BoundKernel, reach: Mapping[str, float]):
        self._args, self._kernel, self._reach = args, kernel, reach
        self._objective = objectives.OBJECTIVES[args.objective].loss
        self._anchor_objective = objectives.OBJECTIVES[args.anchor_objective or "kl"].loss
        self._anchor_beta = 0.04 if args.anchor_beta is None else args.anchor_beta

    @property
    def is_kl(self) -> bool:
        """Whether what is learnt from a teacher is the KL to it."""
        args = self._args
        others = args.guidance_split, args.teacher_weight_column
        return args.objective == "kl" and args.target_extrapolation == 1 and all(one is None for one in others)

    def __call__(self, task: str, visit: Visit, answers: Answers, weights: Tensor | None = None) -> Terms:
        """What a visit adds to the loss.

        Args:
            task (`str`): The id of its teacher.
            visit ([`Visit`]): Of the student, with its graph.
            answers (`dict[str, tuple[Tensor, ...]]`): What everybody of [`Parties`] predicts there.
            weights (`Tensor`, *optional*): How much of the teacher is in each sample's target, `[batch]`.
        """
        streams = [
            self._at(task, step, {name: predictions[number] for name, predictions in answers.items()}, weights)
            for number, step in enumerate(visit.steps)
        ]
        return streams[0] if len(streams) == 1 else _mean(streams)

    def _at(self, task: str, step: Step, asked: Mapping[str, Tensor], weights: Tensor | None) -> Terms:
        args, logged = self._args, dict[str, Tensor]()
        teacher = target = asked["teacher"]
        if "ref" in asked:
            target = targets.extrapolated(teacher, asked["ref"], args.target_extrapolation)
        if weights is not None:
            target = targets.mixed(step.prediction.detach(), target, weights)
        at_teacher = self._compared(step, step.prediction, teacher)
        if "conditional" not in asked:
            at_target = at_teacher if target is teacher else at_teacher.to(self._moved(step, target), target)
            distilled = self._objective(at_target)
        else:
            pairs = self._branches(task, step, asked, weights)
            logged = {name: self._objective(self._compared(step, *pair)) for name, pair in pairs.items()}
            guidance_split: Any = args.guidance_split  # a number, or nobody would have been asked
            distilled = logged["conditional"] + guidance_split * logged["guidance"]
        loss = distilled
        if "anchor" in asked:
            anchor = asked["anchor"]
            logged["anchor"] = self._anchor_objective(at_teacher.to(self._moved(step, anchor), anchor))
            loss = loss + self._anchor_beta * logged["anchor"]
        with torch.no_grad():
            kl = objectives.kl(at_teacher.student, at_teacher.teacher)
        return Terms(loss, distilled, kl, logged)

    def _moved(self, step: Step, prediction: Tensor) -> Transition:
        return self._kernel(step.sample, prediction, step.schedule, step.index)

    def _compared(self, step: Step, prediction: Tensor, target: Tensor) -> objectives.Comparison:
        next_sample: Any = step.next_sample  # a walk has moved
        return objectives.Comparison(
            self._moved(step, prediction), self._moved(step, target), prediction, target, next_sample
        )

    def _branches(
        self, task: str, step: Step, asked: Mapping[str, Tensor], weights: Tensor | None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """What is compared where guidance is split (PDM): the conditional branches, and the directions of guidance.
        Kernels are affine in the prediction, so what both sides of the latter begin at has no part in it."""
        mine, theirs = asked["student"].float(), asked["conditional"].float()
        my_way = targets.direction(step.prediction, mine, self._reach["student"])
        their_way = targets.direction(asked["teacher"], theirs, self._reach[task])
        begin, wanted = theirs, theirs
        if weights is not None:
            wanted = targets.mixed(mine.detach(), theirs, weights)
            their_way = targets.mixed(my_way.detach(), their_way, weights)
        return {"conditional": (mine, wanted), "guidance": (begin + my_way, begin + their_way)}


def _mean(streams: Sequence[Terms]) -> Terms:
    loss, distilled, kl = (torch.stack(parts).mean(0) for parts in zip(*(one[:3] for one in streams), strict=True))
    logged = {name: torch.stack([one.logged[name] for one in streams]).mean(0) for name in streams[0].logged}
    return Terms(loss, distilled, kl, logged)
