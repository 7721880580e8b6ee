"""The moving average of the trained weights.

It averages what this process holds of them, so that nothing is gathered, and knows no trainer.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..shards import ShardFiles

EMA_NAME = "ema_and_raw_weights.safetensors"


class MovingAverage(TrainerCallback):
    """
    Follows the trained weights from the start of training on, and takes their place at its end.

    Args:
        decay (`float`, *optional*): `None`: there is no average.
        every (`int`): Optimizer steps between two updates.
        shards (`Callable[[], AbstractContextManager[list[nn.Parameter]]]`): What this process holds of the trained
            parameters, to be read and written.
        files ([`ShardFiles`]): Where that is kept.
        is_left_out (`Callable[[], bool]`, *optional*): Whether the step that ends was left out: then nothing moves.

    Attributes:
        ema ([`~diffusers.training_utils.EMAModel`], *optional*): `None` before [`begin`].
    """

    def __init__(
        self,
        decay: float | None,
        every: int,
        shards: Callable[[], AbstractContextManager[list[nn.Parameter]]],
        files: ShardFiles,
        is_left_out: Callable[[], bool] = lambda: False,
    ):
        self.decay, self.every, self.shards, self.files = decay, every, shards, files
        self._is_left_out = is_left_out
        self.ema: EMAModel | None = None
        self._is_in_place = False

    def begin(self) -> None:
        """Begins where the weights are, if there is to be an average and none has begun."""
        if self.decay is None or self.ema is not None:
            return
        with self.shards() as shards:
            self.ema = EMAModel(shards, decay=self.decay)
        self.ema.to(dtype=torch.float32)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The averaged weights in place of the trained ones, if there are any."""
        if self.ema is None or self._is_in_place:
            yield
            return
        with self.shards() as shards:
            self.ema.store(shards)
            self.ema.copy_to(shards)
        self._is_in_place = True
        try:
            yield
        finally:
            with self.shards() as shards:
                self.ema.restore(shards)
            self._is_in_place = False

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.ema is None or state.global_step % self.every:
            return
        if self._is_left_out():
            self.ema.optimization_step += 1  # it counts, and moves nothing
        else:
            with self.shards() as shards:
                self.ema.step(shards)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.ema is None:
            return
        with self.shards() as shards:
            if state.global_step % self.every and state.best_model_checkpoint is None:
                self.ema.step(shards)  # or a short run would end where it began
            # What `pipeline`, `save_model` and the Hub carry from here on
            self.ema.copy_to(shards)

    # On disk: a checkpoint holds the average as the student, and here both

    def save(self, checkpoint: str) -> None:
        """Saves trained and averaged weights, if there is an average."""
        if self.ema is None:
            return
        with self.shards() as shards:
            raw = {f"raw.{i}": shard for i, shard in enumerate(shards)}
            averaged = {f"ema.{i}": shadow for i, shadow in enumerate(self.ema.shadow_params)}
            self.files.save(raw | averaged, Path(checkpoint), EMA_NAME)

    @torch.no_grad()
    def load(self, checkpoint: str, global_step: int) -> None:
        """Puts trained and averaged weights back as [`save`] wrote them, if there is an average.

        Raises:
            ValueError: if the weights were sharded in another way.
        """
        if self.ema is None:
            return
        tensors = self.files.load(Path(checkpoint), EMA_NAME)
        with self.shards() as shards:
            for index, (shard, shadow) in enumerate(zip(shards, self.ema.shadow_params, strict=True)):
                shadow.copy_(tensors[f"ema.{index}"])
                shard.copy_(tensors[f"raw.{index}"])
        self.ema.optimization_step = global_step // self.every

    def check(self, checkpoint: str) -> None:
        """Refuses a checkpoint that holds an average where there is none now, or none where there is one."""
        averaged = any(Path(checkpoint).glob(f"{Path(EMA_NAME).stem}*"))
        if averaged == (self.decay is None):
            before = "with" if averaged else "without"
            raise ValueError(f"{checkpoint} was saved {before} `ema_decay`; resume it {before}.")
