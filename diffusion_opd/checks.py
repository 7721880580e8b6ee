"""What a trainer is given, looked at before anything is loaded.

This file knows settings and datasets, and no trainer.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from transformers import TrainerCallback

from .config import DiffusionConfig, DiffusionOPDConfig
from .errors import brief
from .files import name_or_path
from .modular import is_pipeline

logger = get_logger(__name__)


def own_arguments(model: Any, args: Any, config_class: type, name: str) -> Any:
    """The arguments of a run, a copy: what a run sets in them must not reach the next one. By default those with an
    `output_dir` of the model's name.

    Raises:
        TypeError: if they are of another class.
    """
    if args is None:
        source = name_or_path(model) if is_pipeline(model) else str(model)
        args = config_class(f"{Path(source or type(model).__name__).name}-{name}")
    if not isinstance(args, config_class):
        raise TypeError(f"`args` must be a {config_class.__name__}, got {type(args).__name__}.")
    return copy.copy(args)


def whole_cycles(args: DiffusionConfig, tasks: Sequence[str], weights: Mapping[str, float] | None = None) -> None:
    """An optimizer step sees whole cycles: `gradient_accumulation_steps` becomes, or must be, a multiple of the
    tasks; by `weights` some have several turns in a cycle."""
    turns = [int((weights or {}).get(task, 1)) for task in tasks]
    steps, length = args.gradient_accumulation_steps, sum(turns)
    if steps == 1 and length > 1:
        args.gradient_accumulation_steps = length
        logger.info(f"An optimizer step sees every task: `gradient_accumulation_steps` is set to {length}.")
    elif steps % length and weights:
        raise ValueError(
            f"`gradient_accumulation_steps={steps}` is not a multiple of the {length} turns of "
            f"{dict(zip(tasks, turns, strict=True))} (`task_weights`); leave it out, or use "
            f"{length * max(1, round(steps / length))}."
        )
    elif steps % length:
        raise ValueError(
            f"`gradient_accumulation_steps={steps}` is not a multiple of the {length} tasks {list(tasks)}: an "
            f"optimizer step must see every task equally often; leave it out, or use "
            f"{length * max(1, round(steps / length))}."
        )


def turns_of_a_micro_batch(args: DiffusionOPDConfig, tasks: Sequence[str]) -> int:
    """So many turns of tasks share a micro-batch."""
    if args.task_sampling != "mixed":
        return 1
    return sum(int(args.weights_by_task.get(task, 1)) for task in tasks)


def whole_parts(args: DiffusionOPDConfig, turns: int) -> None:
    """Refuses a micro-batch whose samples cannot be shared out."""
    if (batch := args.per_device_train_batch_size) % turns:
        raise ValueError(
            f"`task_sampling='mixed'` shares the samples of a micro-batch out to {turns} turns of tasks, and "
            f"`per_device_train_batch_size={batch}` is no multiple of that; use {turns * max(1, round(batch / turns))}."
        )


def check_helpers(callbacks: Any = None, optimizers: Any = (None, None)) -> None:
    """Refuses what `transformers.Trainer` would trip over later."""
    listed = callbacks or []
    if not isinstance(listed, (list, tuple)) or not all(
        isinstance(one, TrainerCallback) or (isinstance(one, type) and issubclass(one, TrainerCallback))
        for one in listed
    ):
        raise TypeError(f"`callbacks` must be a list of `TrainerCallback`s, got {brief(callbacks)}.")
    is_pair = isinstance(optimizers, (list, tuple)) and len(optimizers) == 2
    if not is_pair or any(isinstance(one, type) or not (one is None or hasattr(one, "step")) for one in optimizers):
        raise TypeError(
            "`optimizers` must be a pair of an optimizer and a scheduler, each of which may be None, got "
            f"{brief(optimizers)}."
        )
