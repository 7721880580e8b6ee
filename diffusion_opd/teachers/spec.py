"""What a user writes: teachers by name, each a path, a [`Teacher`] or a pipeline; and what comes of one when it is
loaded."""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin

from ..config import BASE, check_types
from ..denoisers import denoiser_of
from ..disclosure import origin
from ..errors import brief
from ..files import name_or_path
from ..inputs import is_prompt
from ..modular import is_pipeline


@dataclass
class Lora:
    """
    A LoRA, as a user names it.

    Args:
        path (`str`): Hub id, folder or file, in any format that plain diffusers or PEFT loads.
        subfolder, revision (`str`, *optional*): Where in the repository, and which version of it.
        weight_name (`str` or `dict[str, str]`, *optional*): As of a [`Teacher`].
        scale (`float` or `dict[str, float]`, *optional*): As of a [`Teacher`]; for a `base_lora` alone.
    """

    path: Any
    subfolder: str | None = None
    revision: str | None = None
    weight_name: str | dict[str, str] | None = None
    scale: float | dict[str, float] | None = None
    who: str = field(default="`student_lora`", repr=False)  # in a sentence

    @property
    def source(self) -> str:
        """Where it comes from, in words."""
        return "/".join(str(part) for part in (self.path, self.subfolder) if part)

    @property
    def origin(self) -> str:
        """The same, as others may read it."""
        return origin(self.path, self.subfolder)


def as_lora(value: Any, who: str = "`student_lora`") -> Lora:
    """A path, or a [`Lora`], as a LoRA that is called `who` in sentences.

    Raises:
        TypeError: for anything else.
    """
    lora = copy.copy(value) if isinstance(value, Lora) else Lora(value)
    if not isinstance(lora.path, (str, os.PathLike)):
        raise TypeError(f"{who} is a Hub id, a folder, a file or a `Lora`, got {brief(lora.path)}.")
    lora.who = who
    check_types(lora, f"{who}: ")
    _take_file(lora)
    return lora


def _take_file(given: Any) -> None:
    """The path of a LoRA's file as its folder and its name, as plain diffusers takes it."""
    if isinstance(given.path, (str, os.PathLike)) and os.path.isfile(given.path):
        for name in ("subfolder", "revision", "weight_name"):
            if (value := getattr(given, name)) is not None:
                raise ValueError(
                    f"{given.who}: the file {str(given.path)!r} has no `{name}`, got {value!r}; leave it out."
                )
        path = Path(given.path)
        given.path, given.weight_name = path.parent, path.name


@dataclass
class Teacher:
    """
    A specialist, as a user names it.

    Args:
        path (`str` or [`~diffusers.DiffusionPipeline`]):
            Hub id or folder of a LoRA (in any format that plain diffusers or PEFT loads), a denoiser or a pipeline; the
            file of a LoRA; or a loaded pipeline. `"base"`: the student as it is before training, which is not loaded
            again: under another guidance, or with other columns, it has something to teach.
        id (`str`, *optional*):
            What the `teacher_id` column calls it. Defaults to the last part of `path` and `subfolder` that is not
            `"lora"`, `"transformer"` or `"unet"`.
        subfolder, revision (`str`, *optional*):
            Where in the repository, and which version of it.
        weight_name (`str` or `dict[str, str]`, *optional*):
            File name of a LoRA. Defaults to `pytorch_lora_weights.safetensors`, or to the only
            safetensors file of a folder that holds nothing else of a teacher. Given, nothing else in the folder is
            looked at. For a student of several denoisers a file for each, by its name (`{"transformer":
            "high.safetensors", "transformer_2": "low.safetensors"}`); a single name is that of the first.
        variant (`str`, *optional*):
            Of the weights of a denoiser or a pipeline: `"fp16"`, for example. Defaults to none, or in a folder to the
            only one that there is.
        scale (`float` or `dict[str, float]`, *optional*):
            Strength of a LoRA, as `set_adapters` of plain diffusers takes it: a factor on what its alpha says, for all
            parts that it adapts or by their names (`{"unet": 0.8, "text_encoder": 1.0}`). Defaults to 1.
        guidance_scale (`float`, *optional*):
            Its own guidance scale. Defaults to the student's.
        call_kwargs (`dict`, *optional*):
            Its own arguments of the pipeline's `__call__`, over the student's: another negative prompt, for example.
        columns (`dict[str, str]`, *optional*):
            Columns of the data that it reads in the place of the student's, by argument of its `__call__`:
            `{"prompt": "rich_prompt"}`.
        base_lora (`str` or [`Lora`], *optional*):
            Of a LoRA that was trained on a base into which another one had been fused (the second stage of a cascade):
            that other one.
    """

    path: Any
    id: str | None = None
    subfolder: str | None = None
    revision: str | None = None
    weight_name: str | dict[str, str] | None = None
    variant: str | None = None
    scale: float | dict[str, float] | None = None
    guidance_scale: float | None = None
    call_kwargs: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    base_lora: Any = None

    @property
    def who(self) -> str:
        """What a sentence calls it."""
        return f"teacher {self.id!r}"

    @property
    def is_base(self) -> bool:
        """Whether it is the student before training."""
        return self.path == BASE and not os.path.exists(BASE)

    @property
    def source(self) -> str:
        """Where it comes from, in words."""
        if not isinstance(self.path, (str, os.PathLike)):
            return name_or_path(self.path) or f"a loaded {type(self.path).__name__}"
        return "/".join(str(part) for part in (self.path, self.subfolder) if part)

    @property
    def origin(self) -> str:
        """The same, as others may read it."""
        path = name_or_path(self.path) if is_pipeline(self.path) else self.path
        if self.is_base:
            return BASE
        return self.source if path is None else origin(path, self.subfolder)

    @property
    def overrides(self) -> dict[str, Any]:
        """Its arguments of `__call__` over the student's."""
        guidance = {} if self.guidance_scale is None else {"guidance_scale": self.guidance_scale}
        return {**self.call_kwargs, **guidance}


@dataclass
class LoadedTeacher:
    """A teacher, ready to be asked: `pipeline` with `adapter` (several: their sum; `None`: as it is) of its denoiser
    active."""

    id: str
    spec: Teacher
    pipeline: DiffusionPipeline
    adapter: str | tuple[str, ...] | None
    sha256: str
    commit: str | None

    @property
    def denoiser(self) -> ModelMixin:
        return denoiser_of(self.pipeline)


def name_teachers(teachers: Any) -> dict[str, Teacher]:
    """One teacher, a sequence or a dict `{id: teacher}`, each a path, a [`Teacher`] or a pipeline, as teachers by
    id.

    Raises:
        ValueError: for no teacher, an id that is blank or given twice, two ids for one teacher, or a field that
            nobody would read.
        TypeError: for anything that is none of the above, and fields of other types.
    """
    if isinstance(teachers, Mapping):
        named = []
        for key, value in teachers.items():
            teacher = _as_teacher(value)
            if teacher.id not in (None, key):
                raise ValueError(f"the teacher under key {key!r} has another id, {teacher.id!r}; give it one name.")
            teacher.id = key
            named.append(teacher)
    elif isinstance(teachers, Sequence) and not isinstance(teachers, str):
        named = [_as_teacher(value) for value in teachers]
    else:
        named = [_as_teacher(teachers)]
    if not named:
        raise ValueError("`teachers` is empty; at least one teacher is needed.")
    ids = []
    for teacher in named:
        if teacher.id is None:
            parts = Path(teacher.source).parts if isinstance(teacher.path, (str, os.PathLike)) else ("teacher",)
            teacher.id = next((p for p in reversed(parts) if p not in ("lora", "transformer", "unet")), "teacher")
            teacher.id = teacher.id.removesuffix(".safetensors")
        check_types(teacher, f"teacher {teacher.id!r}: ")
        _take_file(teacher)
        if is_pipeline(teacher.path):
            what, unread = "a loaded pipeline", ["subfolder", "revision", "weight_name", "variant", "scale"]
        elif teacher.is_base:
            what = f"the student before training (`path={BASE!r}`)"
            unread = ["subfolder", "revision", "weight_name", "variant", "scale", "base_lora"]
        else:
            what, unread = f"the folder {str(teacher.path)!r}", ["revision"] if os.path.isdir(teacher.path) else []
        for name in unread:
            if (value := getattr(teacher, name)) is not None:
                raise ValueError(f"teacher {teacher.id!r}: {what} has no `{name}`, got {value!r}; leave it out.")
        if not is_prompt(teacher.id):
            raise ValueError(
                f"the id of a teacher must be text of whole characters that is not blank, got {teacher.id!r} for "
                f"{teacher.source!r}."
            )
        ids.append(teacher.id)
    if twice := sorted({i for i in ids if ids.count(i) > 1}):
        raise ValueError(
            f"teacher ids must be unique, but {twice} occurs more than once in {ids}; set `Teacher(..., id=...)`."
        )
    return dict(zip(ids, named, strict=True))


def _as_teacher(value: Any) -> Teacher:
    teacher = copy.copy(value) if isinstance(value, Teacher) else Teacher(value)
    if not isinstance(teacher.path, (str, os.PathLike)) and not is_pipeline(teacher.path):
        raise TypeError(
            "a teacher is a Hub id, a folder, a `Teacher` of one of these or a loaded pipeline, got "
            f"{brief(teacher.path)}."
        )
    return teacher
