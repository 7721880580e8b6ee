"""What the logs show besides the loss: means of what a training step records, how fast the run is, and where its time
goes.

It knows no trainer.
"""

import time
from collections import defaultdict
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..stopwatch import Stopwatch


class Metrics(TrainerCallback):
    """
    Gathers what is recorded between two logs.

    Args:
        accelerator ([`~accelerate.Accelerator`]): Means are over its processes.
        stopwatch ([`Stopwatch`]): Measures the sections of a training step.
    """

    def __init__(self, accelerator: Accelerator, stopwatch: Stopwatch):
        self.accelerator, self.stopwatch = accelerator, stopwatch
        self._values: dict[str, list[Any]] = defaultdict(list)
        self._kept: dict[str, int] = {}
        self._last_log = (time.perf_counter(), 0)

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been recorded since the last log."""
        return not self._values

    def record(self, name: str, value: Tensor | float) -> None:
        """Adds to a mean. A tensor stays on its device until then."""
        self._values[name].append(value.detach() if isinstance(value, Tensor) else value)

    def undo(self) -> None:
        """Forgets what the optimizer step that has not ended yet recorded."""
        for name in list(self._values):
            del self._values[name][self._kept.get(name, 0) :]
            if not self._values[name]:
                del self._values[name]

    def take(self, step: int, batch_size: int) -> dict[str, float]:
        """What a log shows after an optimizer step of `batch_size` samples; the next interval begins."""
        device, names = self.accelerator.device, list(self._values)
        means = [
            torch.stack([torch.as_tensor(v, dtype=torch.float32, device=device) for v in self._values[name]]).mean()
            for name in names
        ]
        taken = dict(zip(names, self.accelerator.reduce(torch.stack(means), "mean").tolist(), strict=True))
        steps = max(step - self._last_log[1], 1)
        taken["steps_per_second"] = steps / (time.perf_counter() - self._last_log[0])
        taken["samples_per_second"] = taken["steps_per_second"] * batch_size
        taken.update({f"time/{name}": seconds / steps for name, seconds in self.stopwatch.read().items()})
        self._begin(step)
        return taken

    def _begin(self, step: int) -> None:
        self._values.clear()
        self._kept.clear()
        self.stopwatch.clear()
        self._last_log = (time.perf_counter(), step)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._begin(state.global_step)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._kept = {name: len(values) for name, values in self._values.items()}
        if args.logging_strategy == "no":
            self._begin(state.global_step)
