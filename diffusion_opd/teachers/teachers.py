"""The teachers of a run: a policy for each id, where its denoiser waits until it is asked, and what checkpoints and
cards say about it.

This file knows loaded teachers and policies; what it needs of the engine is handed in.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..denoisers import parts_of
from ..placement import Parts
from ..policy import Policy
from .compatible import same_weights
from .manifest import check_manifest, write_manifest
from .spec import LoadedTeacher


class Teachers(Mapping[str, Policy]):
    """
    A mapping from teacher ids to policies.

    Args:
        loaded (`Sequence[LoadedTeacher]`):
            As [`load_teachers`] returns them.
        policy_of (`Callable`):
            Makes the [`~diffusion_opd.policy.Policy`] of a pipeline, an adapter (or `None`) and arguments of its own.
        student (`nn.Module`):
            The student's denoiser, which stays where it is; LoRA teachers may be adapters of it.
        device (`torch.device`):
            Where teachers are asked.
        placement (`str`, *optional*, defaults to `"device"`):
            Where denoisers other than the student's wait: on the `"device"`, on the `"cpu"`, or `"sharded"`.
        shard (`Callable`, *optional*):
            Shards a denoiser in place. `None`: the engine shards nothing, and `"sharded"` is refused.
        engine (`str`, *optional*):
            What that refusal calls the engine.
        timing (`Callable`, *optional*):
            A context manager to move denoisers in.

    Attributes:
        loaded (`dict[str, LoadedTeacher]`): What the policies were made of.
        copies (`set[str]`): Ids of teachers whose denoiser holds the student's own weights.

    Raises:
        ValueError: for `"sharded"` teachers where the engine shards nothing.
    """

    def __init__(
        self,
        loaded: Sequence[LoadedTeacher],
        policy_of: Callable[[DiffusionPipeline, str | tuple[str, ...] | None, dict[str, Any]], Policy],
        student: nn.Module,
        device: torch.device,
        placement: str = "device",
        shard: Callable[[Any], None] | None = None,
        engine: str = "NO",
        timing: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        self._student, self._device, self._placement, self._timing = student, device, placement, timing
        self.loaded = {teacher.id: teacher for teacher in loaded}
        # In another dtype the same weights predict other numbers; and where they are placed they may be shards
        self.copies = {
            teacher.id for teacher in loaded if teacher.adapter is None and same_weights(teacher.denoiser, student)
        }
        self._waiting: dict[nn.Module, Parts] = {}  # by denoiser, which several LoRAs may share
        for teacher in loaded:
            self._place(teacher, shard, engine)
        self._policies = {
            teacher.id: policy_of(teacher.pipeline, teacher.adapter, teacher.spec.overrides) for teacher in loaded
        }

    def __getitem__(self, key: str) -> Policy:
        return self._policies[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._policies)

    def __len__(self) -> int:
        return len(self._policies)

    # Where they wait

    def _place(self, teacher: LoadedTeacher, shard: Callable[[Any], None] | None, engine: str) -> None:
        pipeline, denoiser = teacher.pipeline, teacher.denoiser
        parts = list(parts_of(denoiser).values())
        is_own = denoiser is not self._student
        for part in pipeline.components.values():
            if isinstance(part, nn.Module) and not (part in parts and is_own and self._waits(teacher)):
                part.to(self._device)
        if is_own and self._waits(teacher) and denoiser not in self._waiting:
            self._waiting[denoiser] = Parts([denoiser], self._device)
            self._waiting[denoiser].leave()
        if not is_own or self._placement != "sharded":
            return
        if shard is None:
            raise ValueError(
                "`teacher_placement='sharded'` needs an engine that shards parameters (FSDP2 or ZeRO-3), and this run "
                f"is {engine}; use 'cpu', or start it with such a config."
            )
        shard(denoiser)

    def _waits(self, teacher: LoadedTeacher) -> bool:
        """The student before training, whom several may ask, stays on the device."""
        return self._placement == "cpu" and not teacher.spec.is_base

    @contextlib.contextmanager
    def on_device(self, key: str) -> Iterator[Policy]:
        """A teacher, on the device for the duration."""
        policy = self[key]
        waiting = self._waiting.get(policy.denoiser)
        if waiting is None:
            yield policy
            return
        with self._timing():
            waiting.bring()
        try:
            yield policy
        finally:
            waiting.leave()

    def fetch(self, key: str) -> None:
        """Begins to bring a teacher to the device, beside what that is doing, if it has room."""
        if (waiting := self._waiting.get(self[key].denoiser)) is not None:
            waiting.fetch()

    # What checkpoints and cards say

    def write_manifest(self, folder: str | os.PathLike) -> None:
        """Writes down, in a folder, which teachers these are."""
        write_manifest(folder, self.loaded.values())

    def check_manifest(self, checkpoint: str | os.PathLike) -> None:
        """Refuses a checkpoint that learnt from other teachers.

        Raises:
            ValueError: naming what differs.
        """
        check_manifest(checkpoint, self.loaded.values())

    def card_rows(self) -> list[dict[str, Any]]:
        """A row of the model card's table for each teacher."""
        return [
            {
                "id": key,
                "source": teacher.spec.origin,
                "revision": teacher.commit or teacher.spec.revision,
                "guidance_scale": self[key].call_kwargs.get("guidance_scale", "the pipeline's own"),
            }
            for key, teacher in self.loaded.items()
        ]
