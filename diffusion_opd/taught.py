"""What trainers with teachers share: who they are, where they wait, and what checkpoints and cards say about them.

This file knows teachers, and no loss.
"""

import functools
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from .ahead import Ahead
from .attention import set_attention_backend
from .base_trainer import DiffusionTrainer
from .config import DiffusionConfig
from .data import Data
from .denoisers import denoiser_of, denoisers_of, parts_of
from .parties import columns_of
from .placement import weights
from .policy import BACKBONE, Policy
from .runs import plain
from .student import Student, whole_modules
from .teachers import MANIFEST_NAME, LoadedTeacher, Teacher, Teachers, load_teachers

REF_ADAPTER = "ref"  # as TRL has it


class TaughtTrainer(DiffusionTrainer):
    """
    A trainer that has teachers, or may have some: a subclass calls [`load_teachers`] before, and [`place_teachers`]
    after, `DiffusionTrainer.__init__`.

    Attributes:
        teachers ([`Teachers`]): A policy for each.
        loaded_teachers (`dict[str, LoadedTeacher]`): What they were made of.
    """

    teachers: Teachers
    loaded_teachers: dict[str, LoadedTeacher]

    def load_teachers(
        self,
        specs: Mapping[str, Teacher],
        pipeline: DiffusionPipeline,
        args: DiffusionConfig,
        data: Data,
        goes_on: bool,
    ) -> None:
        """Loads them beside the student, and says which columns they read.

        Args:
            specs (`dict[str, Teacher]`): As `name_teachers` returns them.
            pipeline ([`~diffusers.DiffusionPipeline`]): The student's.
            args ([`DiffusionConfig`]): The configuration.
            data ([`Data`]): That has seen the pipeline.
            goes_on (`bool`): Whether the student begins with a LoRA.
        """
        student = Student(pipeline)
        untrained = partial(student.frozen, REF_ADAPTER if goes_on else BACKBONE, args.mixed_dtype)
        with whole_modules():
            loaded = load_teachers(
                specs, pipeline, student.trains_lora, args.mixed_dtype, untrained, args.quantization_config
            )
        if args.attention_backend is not None:
            for teacher in loaded:
                for part in parts_of(teacher.denoiser).values():
                    set_attention_backend(part, args.attention_backend, f"the denoiser of teacher {teacher.id!r}")
        self.loaded_teachers = {teacher.id: teacher for teacher in loaded}
        self.teacher_columns = columns_of(loaded, data, args.pipeline_kwargs)

    def place_teachers(self) -> None:
        """Makes their policies, and puts them where they wait."""
        self.teachers = Teachers(
            list(self.loaded_teachers.values()),
            self.policy_of,
            student=self.model,
            device=self.accelerator.device,
            placement=self.args.teacher_placement,
            shard=self.shard if self.shards_parameters else None,
            engine=self.accelerator.distributed_type.value,
            timing=partial(self.stopwatch.section, "placement"),
        )

    def untrained(self, call_kwargs: dict[str, Any] | None = None) -> Policy:
        """The student as it is before training, in the precision of frozen modules: its backbone, with the LoRA that it
        started from. `call_kwargs` are over the student's."""
        pipeline, adapter = self._untrained
        return self.policy_of(pipeline, adapter, call_kwargs)

    @functools.cached_property
    def _untrained(self) -> tuple[DiffusionPipeline, Any]:
        for teacher in self.loaded_teachers.values():
            if teacher.spec.is_base:
                return teacher.pipeline, teacher.adapter
        return self.frozen(BACKBONE if self._start is None else REF_ADAPTER, self.args.mixed_dtype)

    def frozen(self, adapter: str, dtype: torch.dtype) -> tuple[DiffusionPipeline, Any]:
        """The student as it is now, which does not change as it is trained: see [`Student.frozen`]; sharded, where the
        student is."""
        pipeline, own = self.student.frozen(adapter, dtype)
        if self.shards_parameters and pipeline is not self.pipeline:
            self.shard(denoiser_of(pipeline))
        return pipeline, own

    def _begin_ahead(self, questions: Iterable[Any]) -> None:
        """Lets calls begin ahead, if the configuration wants that, once examples of them have been looked at."""
        if self.args.encode_ahead is None:
            return
        pipelines = [self.pipeline, *(teacher.pipeline for teacher in self.loaded_teachers.values())]
        denoisers = {id(part): part for pipeline in pipelines for part in denoisers_of(pipeline).values()}
        others = {
            id(part): part
            for pipeline in pipelines
            for part in pipeline.components.values()
            if isinstance(part, nn.Module) and id(part) not in denoisers
        }
        leaving = [] if self.args.encoder_placement == "device" else list(others.values())
        self.ahead = Ahead(leaving, self.accelerator.device, self.cache, type(self.pipeline).__name__)
        self.ahead.parts.keep(chain.from_iterable(map(weights, denoisers.values())))  # which a part may share
        for question in questions:
            self.ahead.look(question)

    # What a checkpoint and a card say about them

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and self.teachers:
            self.teachers.write_manifest(output_dir or self.args.output_dir)

    def _made_of(self) -> dict[str, Any]:
        teachers = {
            key: {"call_kwargs": t.spec.overrides, "columns": t.spec.columns, "scale": t.spec.scale}
            for key, t in self.loaded_teachers.items()
        }
        return super()._made_of() | (plain({"teachers": teachers}) if teachers else {})

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if resume_from_checkpoint is not None and (
            self.teachers or Path(resume_from_checkpoint, MANIFEST_NAME).exists()
        ):
            self.teachers.check_manifest(resume_from_checkpoint)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    @property
    def _published_names(self) -> set[str]:
        return super()._published_names | ({MANIFEST_NAME} if self.teachers else set())

    def _card_fields(self) -> dict[str, Any]:
        return {"teachers": self.teachers.card_rows()} if self.teachers else {}
