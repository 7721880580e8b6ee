"""NaN and Inf in an optimizer step: seen on all processes before the weights change, then an error or a step that is
left out; and in an evaluation.

It knows no trainer.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState

logger = get_logger(__name__)

# Where NaN and Inf are looked for, causes before what follows from them
NONFINITE = {
    "rollout": "the rollout of task {!r}",
    "picture": "what the VAE decoded of task {!r}",
    "student": "the student's prediction for task {!r}",
    "teacher": "the prediction of teacher {!r}",
    "reference": "the frozen policy's prediction for task {!r}",
    "loss": "the loss of task {!r}",
}

_PLACES = {what: place for place, what in enumerate(NONFINITE)}
_MOST_SUMS = 1000  # of one kind, as an evaluation has them


class NaNPolicy(TrainerCallback):
    """
    Remembers, on the device, what was not finite.

    Args:
        policy (`str`): `"raise"` or `"skip"`, see `nan_policy` of [`DiffusionConfig`].
        tasks (`Sequence[str]`): Of the run.
        accelerator ([`~accelerate.Accelerator`]): Its processes agree on what was found.
    """

    def __init__(self, policy: str, tasks: Sequence[str], accelerator: Accelerator):
        self.policy, self.tasks, self.accelerator = policy, tasks, accelerator
        self._found = torch.zeros(len(NONFINITE), len(tasks), dtype=torch.bool, device=accelerator.device)
        self._sums: dict[tuple[int, int], list[Tensor]] = defaultdict(list)  # that nobody has looked at yet
        self._skipped = 0
        self.leaves_out = False  # the step under way

    @torch.no_grad()
    def watch(self, what: str, task: str, tensor: Tensor) -> None:
        """Remembers whether a tensor holds NaN or Inf. `what` is a key of `NONFINITE`."""
        sums = self._sums[_PLACES[what], self.tasks.index(task)]
        # Finite if all of its terms are: one kernel, where `isfinite().all()` and what follows are five
        sums.append(tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)))
        if len(sums) == _MOST_SUMS:
            self._look()

    def _look(self) -> None:
        for place, sums in self._sums.items():
            self._found[place].logical_or_(torch.stack(sums).isfinite().all().logical_not())
        self._sums.clear()

    def has_found(self, what: str) -> bool:
        """Whether this process has, since they last agreed; waits for the device."""
        self._look()
        return bool(self._found[_PLACES[what]].any())

    def agree(self, grad_norm: Any = None, told: bool = False) -> tuple[str | None, bool]:
        """What any process found since the last time, or `None`, and whether any was `told` to stop: in one
        synchronisation."""
        self._look()
        norm = 0.0 if grad_norm is None else grad_norm
        norm = torch.as_tensor(norm.full_tensor() if isinstance(norm, DTensor) else norm, device=self._found.device)
        own = [norm.isfinite().logical_not(), torch.full_like(norm, told, dtype=torch.bool)]
        flags = torch.cat([self._found.flatten(), torch.stack(own)]).float()
        *found, anyone_told = self.accelerator.reduce(flags, "sum").tolist()
        self._found.zero_()
        names = [*(text.format(task) for text in NONFINITE.values() for task in self.tasks), "the gradient"]
        return next((name for name, flag in zip(names, found, strict=True) if flag), None), anyone_told > 0

    def raise_or_skip(self, found: str, step: int) -> None:
        """Raises, or warns of an optimizer step that its caller then leaves out."""
        if self.policy == "raise":
            raise FloatingPointError(
                f"optimizer step {step}: NaN or Inf in {found}; mend that, or leave out such steps with "
                "`nan_policy='skip'`."
            )
        logger.warning(f"Optimizer step {step} is left out: NaN or Inf in {found}.")
        self._skipped += 1
        self.leaves_out = True

    def raise_or_warn(self, found: str, step: int) -> None:
        """Raises, or warns of an evaluation that its caller then gives no numbers."""
        if self.policy == "raise":
            raise FloatingPointError(
                f"evaluation after optimizer step {step}: NaN or Inf in {found}; mend that, or go on without its "
                "metrics with `nan_policy='skip'`."
            )
        logger.warning(f"The metrics of the evaluation after optimizer step {step} are NaN: NaN or Inf in {found}.")

    def take(self) -> dict[str, int]:
        """What a log shows: the steps that were left out since the last one."""
        taken, self._skipped = self._skipped, 0
        return {"skipped_steps": taken} if self.policy == "skip" else {}

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.leaves_out = False

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._found.zero_()
        self._sums.clear()
        self._skipped = 0
