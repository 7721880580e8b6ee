"""Teachers: what a user writes, how it is found and loaded, whether it fits the student, and where it waits.

A teacher is a LoRA (PEFT or diffusers format), a bare denoiser, a whole pipeline, or a loaded pipeline. LoRA teachers
share one frozen backbone; what a pipeline teacher has in common with the student (VAE, text encoders) is shared too.
Everything that does not fit is refused here with one sentence that names both sides: a tensor that is silently dropped
makes a teacher that silently equals the base.

This folder knows pipelines, files and policies, and no trainer, loss or data.
"""

from ..adapters import STUDENT_ADAPTER, add_adapter, changes_base, frozen_copy
from ..files import INDEX_NAME, LORA_NAME, absent_parts
from .compatible import check_compatible, same_weights
from .loading import load_teachers
from .lora import load_lora
from .manifest import MANIFEST_NAME, check_manifest, hash_tensors, manifest_of, write_manifest
from .spec import LoadedTeacher, Lora, Teacher, as_lora, name_teachers
from .teachers import Teachers

__all__ = [
    "INDEX_NAME",
    "LORA_NAME",
    "LoadedTeacher",
    "Lora",
    "MANIFEST_NAME",
    "STUDENT_ADAPTER",
    "Teacher",
    "Teachers",
    "absent_parts",
    "add_adapter",
    "as_lora",
    "changes_base",
    "check_compatible",
    "check_manifest",
    "frozen_copy",
    "hash_tensors",
    "load_lora",
    "load_teachers",
    "manifest_of",
    "name_teachers",
    "same_weights",
    "write_manifest",
]
