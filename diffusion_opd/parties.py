"""Whom the student of a task is compared with, where it has been: the task's teacher, and what the configuration names
besides: a reference that the target is extrapolated from, an anchor, and the branches of guidance by themselves.

This file knows policies and who they are, and no loss or trainer.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any

import torch
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from .config import BASE, DiffusionOPDConfig, scale_name
from .data import Data
from .errors import one_sentence
from .guidance import at_scale, branches
from .inputs import inputs_of, sample_arguments, signature
from .policy import Follower, Policy, Visit, Walk
from .startup import Checked, can_jump, check_teacher, walked_through
from .teachers import LoadedTeacher, Teacher, Teachers, name_teachers

logger = get_logger(__name__)

ANCHOR = "anchor"  # the id of a teacher that no task has

Answers = dict[str, tuple[Tensor, ...]]  # by who was asked, one prediction a stream of a visit
Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Party:
    """Who is asked where the student of a task has been.

    Attributes:
        policy ([`Policy`]): Under the arguments with which it is asked.
        columns (`dict[str, str]`): What it reads of the data, by argument.
        teacher (`str`, *optional*): Whose denoiser it is; `None`: the student's before training.
        jumps (`bool`): Whether it may be asked at a visit without those before.
    """

    policy: Policy
    columns: dict[str, str]
    teacher: str | None
    jumps: bool = True


class Parties:
    """
    Whom a run asks, by task and by the part that the answers have in the loss: `"teacher"`; `"ref"`, what the target is
    extrapolated from; `"anchor"`; and where guidance is split `"conditional"`, the teacher without it, and `"student"`,
    the student without it, with gradient.

    Args:
        args ([`DiffusionOPDConfig`]): The configuration.
        teachers ([`Teachers`]): Of the tasks, and perhaps the anchor.
        columns (`dict[str, dict[str, str]]`): As [`columns_of`] returns them.
        pipeline ([`~diffusers.DiffusionPipeline`]): The student's.
        data ([`Data`]): What the student reads.
        policy_of, untrained (`Callable`): As of [`TaughtTrainer`].
        timing (`Callable`): A section of the stopwatch, by its name.

    Attributes:
        reach (`dict[str, float]`): How far guidance reaches, by task, and under `"student"` of the student.
    """

    def __init__(
        self,
        args: DiffusionOPDConfig,
        teachers: Teachers,
        columns: dict[str, dict[str, str]],
        pipeline: DiffusionPipeline,
        data: Data,
        policy_of: Callable[..., Policy],
        untrained: Callable[..., Policy],
        timing: Callable[[str], contextlib.AbstractContextManager],
    ):
        self._args, self._teachers, self._pipeline, self._data = args, teachers, pipeline, data
        self._policy_of, self._untrained, self._timing = policy_of, untrained, timing
        self.columns = columns
        self.reach: dict[str, float] = {}
        self._unguided: Policy | None = None  # the student without guidance, where that is split
        self._unguided_jumps = True
        self._of = {task: self._parties_of(task) for task in data.tasks}

    @property
    def denoisers(self) -> set[nn.Module]:
        """Of all of them."""
        return {party.policy.denoiser for parties in self._of.values() for party in parties.values()}

    def _parties_of(self, task: str) -> dict[str, Party]:
        args = self._args
        at = partial(Party, columns=self.columns[task], teacher=task)
        parties = {"teacher": at(self._timed(self._teachers[task], "teacher"))}
        if args.guidance_split is not None:
            parties = {
                "teacher": at(self._teacher_at(task, self._scale)),
                "conditional": at(self._teacher_at(task, 1.0)),
            }
        if args.target_extrapolation != 1:
            parties["ref"] = self._reference(args.target_ref or BASE, task)
        if args.anchor is not None or ANCHOR in self._teachers:
            parties["anchor"] = self._reference(ANCHOR if args.anchor is None else BASE, None)
        return parties

    def _timed(self, policy: Policy, section: str) -> Policy:
        policy.timing = partial(self._timing, section)
        return policy

    @property
    def _scale(self) -> float:
        scale: float = self._args.pipeline_kwargs[scale_name(self._args.pipeline_kwargs)]
        return scale

    def _teacher_at(self, task: str, scale: float) -> Policy:
        teacher, given = self._teachers.loaded[task], self._teachers[task].call_kwargs
        return self._timed(self._policy_of(teacher.pipeline, teacher.adapter, at_scale(given, scale)), "teacher")

    def _student_at(self, scale: float) -> Policy:
        given = at_scale(self._args.pipeline_kwargs, scale)
        return self._timed(self._policy_of(self._pipeline, None, given), "student")

    def _reference(self, name: str, task: str | None) -> Party:
        """A teacher, or the student before training, under its own arguments and columns; that under those of a task's
        teacher, if it is for a task."""
        if name != BASE:
            return Party(self._timed(self._teachers[name], "reference"), self.columns[name], name)
        columns, overrides = self._data.columns, {}
        if task is not None:
            cls: Any = type(self._pipeline)
            taken, spec = signature(cls.__call__).parameters, self._teachers.loaded[task].spec
            overrides = {key: value for key, value in spec.overrides.items() if key in taken}
            renamed = {key: column for key, column in spec.columns.items() if key in taken}
            columns = self._data.columns_of_party(cls, renamed, overrides)
        return Party(self._timed(self._untrained(overrides), "reference"), columns, None)

    # The start-up check

    def check(self, task: str, rows: Rows, checked: Checked) -> None:
        """Asks everybody of a task once.

        Args:
            task (`str`): The id of its teacher.
            rows (`list[dict]`): A batch of it.
            checked ([`Checked`]): The student at that batch.

        Raises:
            ValueError: if somebody cannot be asked there; the sentence says who.
        """
        step, path = checked.visits[0].steps[0], None
        if self._skips(checked):
            path = walked_through(checked, inputs_of(rows, self._data.columns))
        for name, party in self._of[task].items():
            inputs = inputs_of(rows, party.columns)
            dtype = next(party.policy.denoiser.parameters()).dtype
            with self.on_device(party.teacher):
                with one_sentence(
                    f"{self._called(party)} of {dtype} cannot be asked at the student's states of shape "
                    f"{tuple(step.sample.shape)} and {step.sample.dtype}"
                ):
                    if name == "conditional":
                        teacher_at = partial(self._teacher_at, task)
                        off, self.reach[task] = branches(teacher_at, self._scale, checked, inputs)
                        party = replace(party, policy=teacher_at(off))
                    same = check_teacher(party.policy, checked, inputs)
                jumps = path is None or can_jump(party.policy, path, inputs)
            self._of[task][name] = replace(party, jumps=jumps)
            if name == "teacher" and (task in self._teachers.copies or same):
                logger.warning(
                    f"Teacher {task!r} ({self._teachers.loaded[task].spec.source}) predicts exactly what the untrained "
                    "student predicts: there is nothing to learn from it."
                )
        if self._args.guidance_split is not None and self._unguided is None:
            with one_sentence("the student"):
                off, self.reach["student"] = branches(self._student_at, self._scale, checked)
            self._unguided = self._student_at(off)
            self._unguided_jumps = path is None or can_jump(self._unguided, path)

    def _called(self, party: Party) -> str:
        if party.teacher is None:
            return "the student before training"
        return f"teacher {party.teacher!r} ({self._teachers.loaded[party.teacher].spec.source})"

    def _skips(self, checked: Checked) -> bool:
        """Whether a walk may learn at a state without having learnt at those before."""
        return self._args.query != "first" or checked.learnt != tuple(range(len(checked.learnt)))

    def differ(self, task: str) -> bool:
        """Whether somebody of a task reads other columns than the student."""
        return any(party.columns != self._data.columns for party in self._of[task].values())

    # A walk

    @contextlib.contextmanager
    def on_device(self, *teachers: str | None) -> Iterator[None]:
        """The denoisers of these teachers, on the device for the duration."""
        with contextlib.ExitStack() as stack:
            for key in dict.fromkeys(teachers):
                if key is not None:
                    stack.enter_context(self._teachers.on_device(key))
            yield

    def of_tasks_on_device(self, *tasks: str) -> contextlib.AbstractContextManager[None]:
        """Everybody of these tasks, on the device for the duration."""
        return self.on_device(*(party.teacher for task in tasks for party in self._of[task].values()))

    def fetch(self, *tasks: str) -> None:
        """Begins to bring everybody of these tasks to the device."""
        for key in dict.fromkeys(party.teacher for task in tasks for party in self._of[task].values()):
            if key is not None:
                self._teachers.fetch(key)

    def follow(self, task: str, walk: Walk, rows: Rows, denoiser: Any = None, own: range | None = None) -> "Following":
        """Everybody of a task, where a walk goes.

        Args:
            task (`str`): The id of its teacher.
            walk ([`Walk`]): Of the student.
            rows (`list[dict]`): Those of the task.
            denoiser (`Callable`, *optional*): A wrapper around the student's denoiser, as of [`Policy.walk`].
            own (`range`, *optional*): Which samples of the walk these are. `None`: all.
        """
        frozen, trained = {}, {}
        for name, party in self._of[task].items():
            is_told = own is None and party.columns == self._data.columns
            inputs = None if is_told else inputs_of(rows, party.columns)
            frozen[name] = party.policy.follow(walk, inputs, rows=own)
        if self._unguided is not None:
            inputs = None if own is None else inputs_of(rows, self._data.columns)
            trained["student"] = self._unguided.follow(walk, inputs, denoiser=denoiser, rows=own)
        walkers = [frozen[name] for name, party in self._of[task].items() if not party.jumps]
        walkers += trained.values() if not self._unguided_jumps else []
        return Following(frozen, trained, walkers)


class Following:
    """Asks at the visits of a walk; `passed`, if it is not `None`, at those that nothing is learnt from. Used as a
    context manager."""

    def __init__(self, frozen: Mapping[str, Follower], trained: Mapping[str, Follower], walkers: Sequence[Follower]):
        self._frozen, self._trained, self._walkers = frozen, trained, walkers
        self.passed = self._pass if walkers else None

    def start(self) -> None:
        """Begins them, after their walk has begun."""
        with torch.no_grad():
            for follower in self._frozen.values():
                follower.start()
        for follower in self._trained.values():
            follower.start()

    def __call__(self, visit: Visit) -> Answers:
        with torch.no_grad():
            answers = {name: ask(visit) for name, ask in self._frozen.items()}
        return answers | {name: ask(visit) for name, ask in self._trained.items()}

    def _pass(self, visit: Visit) -> None:
        for ask in self._walkers:
            ask(visit)

    def __enter__(self) -> "Following":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close(failed=error is not None)

    def close(self, failed: bool = False) -> None:
        with contextlib.ExitStack() as stack:  # each, whatever another one raises
            for follower in (*self._frozen.values(), *self._trained.values()):
                stack.callback(follower.close, failed)


@dataclass(frozen=True)
class Group:
    """Samples of a walk that are of one task.

    Attributes:
        task (`str`): The id of its teacher.
        own (`range`, *optional*): Which samples of the walk they are. `None`: all.
        follow ([`Following`]): Who follows them.
        weights (`Tensor`, *optional*): How much of the teacher is in each one's target, `[samples]`.
    """

    task: str
    own: range | None
    follow: Following
    weights: Tensor | None = None

    def of(self, visit: Visit) -> Visit:
        """A visit of theirs."""
        return visit if self.own is None else visit.of(slice(self.own.start, self.own.stop))


@dataclass(frozen=True)
class Call:
    """A walk of the student, and who follows it. Used as a context manager."""

    walk: Walk
    groups: list[Group]

    @property
    def passed(self) -> Callable[[Visit], None] | None:
        """Asks at a visit that nothing is learnt from, where somebody must not jump."""
        walkers = [passed for group in self.groups if (passed := group.follow.passed) is not None]
        return partial(_each, walkers) if walkers else None

    def start(self) -> None:
        """Runs them up to the first forward pass of a denoiser."""
        self.walk.start()
        for group in self.groups:
            group.follow.start()

    def close(self, failed: bool = False) -> None:
        """Ends what has begun."""
        with contextlib.ExitStack() as stack:  # each, whatever another one raises
            stack.callback(self.walk.close, failed)
            for group in self.groups:
                stack.callback(group.follow.close, failed)

    def __enter__(self) -> "Call":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close(failed=error is not None)


def _each(asked: Sequence[Callable[[Visit], None]], visit: Visit) -> None:
    for ask in asked:
        ask(visit)


def named(teachers: Any, anchor: Any, args: DiffusionOPDConfig) -> tuple[dict[str, Teacher], list[str]]:
    """Teachers by id, the anchor among them, and the ids of those that have a task. An anchor of `"base"` is set in the
    configuration.

    Raises:
        ValueError: if the configuration names somebody who is not there, or the anchor is given twice.
    """
    specs = name_teachers(teachers)
    ids = list(specs)
    if anchor == BASE:
        args.anchor, anchor = BASE, None
    if anchor is not None:
        if args.anchor is not None:
            raise ValueError(f"`anchor` is given twice, in the configuration as {args.anchor!r} too; give it once.")
        if ANCHOR in ids:
            raise ValueError(f"a teacher has the id {ANCHOR!r}, which is that of the trainer's `anchor`; rename it.")
        if isinstance(anchor, Teacher) and anchor.id not in (None, ANCHOR):
            raise ValueError(f"the `anchor` has the id {anchor.id!r}, and no task has it; leave the id out.")
        specs |= name_teachers({ANCHOR: anchor})
    if unknown := sorted(args.weights_by_task.keys() - set(ids)):
        raise ValueError(f"`task_weights` names {unknown}, but the teachers are {ids}.")
    if args.target_ref not in (None, BASE, *specs):
        raise ValueError(f"`target_ref` must be {BASE!r} or one of {list(specs)}, got {args.target_ref!r}.")
    if args.anchor is None and anchor is None:
        for name in ("anchor_beta", "anchor_objective"):
            if (value := getattr(args, name)) is not None:
                raise ValueError(
                    f"`{name}={value!r}` is for an anchor, and there is none; give `anchor='base'`, or the trainer an "
                    "`anchor`."
                )
    if args.guidance_split is not None:
        for key in ids:
            given = specs[key].overrides
            scales = {name: given[name] for name in given if "guidance_scale" in name or name == "true_cfg_scale"}
            if other := [name for name, value in scales.items() if value != args.pipeline_kwargs.get(name)]:
                raise ValueError(
                    f"teacher {key!r} has `{other[0]}={scales[other[0]]}`, and `guidance_split` matches its two "
                    "branches whatever its scale: all are asked with the student's; leave it out."
                )
    return specs, ids


def columns_of(
    loaded: Sequence[LoadedTeacher], data: Data, call_kwargs: Mapping[str, Any]
) -> dict[str, dict[str, str]]:
    """Of each teacher the column of each argument of its `__call__`: the student's, if that takes them, or its own.

    Raises:
        ValueError: if it names an argument that is not there.
    """
    columns = {}
    for teacher in loaded:
        spec = teacher.spec
        cls: Any = type(teacher.pipeline)
        taken = signature(cls.__call__).parameters
        if unknown := sorted(spec.columns.keys() - taken.keys()):
            raise ValueError(
                f"teacher {teacher.id!r}: `columns` names {unknown}, which {cls.__name__} does not take; it takes "
                f"{sorted(sample_arguments(cls))}."
            )
        if lacking := sorted({*data.columns, *call_kwargs} - taken.keys()):
            logger.warning(f"Teacher {teacher.id!r} is asked without {lacking}, which {cls.__name__} does not take.")
        columns[teacher.id] = data.columns_of_party(cls, spec.columns, spec.overrides)
    return columns
