"""What evaluation makes of rewards: numbers for each picture, the metrics of all of them, and captions.

This file knows reward functions and tensors, and no pipeline, model or trainer.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..inputs import PROMPT
from .functions import Rewards
from .statistics import combine, nanstd


class Judge:
    """
    Reward functions, asked about pictures of several tasks.

    Args:
        rewards ([`Rewards`]): Of all tasks, or of some.
        tasks (`Sequence[str]`): Of the run.
        task_column (`str`): Where the task of a row stands.
    """

    def __init__(self, rewards: Rewards, tasks: Sequence[str], task_column: str):
        self.rewards, self.tasks, self.task_column = rewards, list(tasks), task_column

    def judges(self, task: str) -> bool:
        """Whether a task has reward functions."""
        return self.rewards.tasks is None or task in self.rewards.tasks

    def fits(self, columns: Collection[str]) -> bool:
        """Whether these columns are all that the functions need."""
        try:
            self.rewards.check_columns(list(columns))
        except ValueError:
            return False
        return True

    def metric_names(self, tasks: Sequence[str]) -> list[str]:
        """The metrics of rows of these tasks."""
        tasks, several = [task for task in tasks if self.judges(task)], len(self.tasks) > 1
        names = ["reward", "reward_std", *(f"reward/{task}" for task in tasks if several)]
        for name in self.rewards.all_names:
            own = [task for task in tasks if name in self.rewards.names(task)]
            parts = ["mean", "std", *(own if several else [])] if own else []
            names += [f"rewards/{name}/{part}" for part in parts]
        return names

    def scores(
        self, rows: Sequence[Mapping[str, Any]], images: Sequence[Any], state: Any
    ) -> list[tuple[str, list[int], Tensor]]:
        """By task, which of the rows are of it, and their rewards, `[rows, functions]`."""
        scored = []
        for task in filter(self.judges, sorted({row[self.task_column] for row in rows})):
            chosen = [index for index, row in enumerate(rows) if row[self.task_column] == task]
            rewards = self.rewards(task, [rows[i] for i in chosen], [images[i] for i in chosen], state)
            scored.append((task, chosen, rewards))
        return scored

    def table(self, rows: Sequence[Mapping[str, Any]], images: Sequence[Any], state: Any) -> Tensor:
        """The weighted sum, and each function's own, of each row: `[rows, 1 + functions]`, NaN where none applies."""
        names = self.rewards.all_names
        table = torch.full((len(rows), 1 + len(names)), torch.nan)
        for task, chosen, scores in self.scores(rows, images, state):
            table[chosen, 0] = combine(scores, torch.tensor(self.rewards.weights(task)))
            columns = [1 + names.index(name) for name in self.rewards.names(task)]
            table[torch.tensor(chosen)[:, None], columns] = scores
        return table

    def metrics(self, tasks: Tensor, table: Tensor) -> dict[str, Tensor]:
        """Of all rows.

        Args:
            tasks (`Tensor`): The place of each row's task among those of the run.
            table (`Tensor`): As [`table`] makes it.
        """
        masks = {task: tasks == index for index, task in enumerate(self.tasks if len(self.tasks) > 1 else [])}
        metrics = {"reward": table[:, 0].nanmean(), "reward_std": nanstd(table[:, 0])}
        for task, mask in masks.items():
            if mask.any() and self.judges(task):
                metrics[f"reward/{task}"] = table[mask, 0].nanmean()
        for name, column in zip(self.rewards.all_names, table[:, 1:].T, strict=True):
            if not column.isnan().all():
                metrics[f"rewards/{name}/mean"] = column.nanmean()
                metrics[f"rewards/{name}/std"] = nanstd(column)
            for task, mask in masks.items():
                if not column[mask].isnan().all():
                    metrics[f"rewards/{name}/{task}"] = column[mask].nanmean()
        return metrics

    def captions(self, rows: Sequence[Mapping[str, Any]], images: Sequence[Any], state: Any) -> list[str]:
        """Prompt and rewards of each row."""
        captions = [row[PROMPT] for row in rows]
        for task, chosen, rewards in self.scores(rows, images, state):
            for index, own in zip(chosen, rewards.tolist(), strict=True):
                named = zip(self.rewards.names(task), own, strict=True)
                captions[index] += "".join(f", {name} {value:.3f}" for name, value in named if value == value)
        return captions
