"""Whether a run fits together, asked before it begins: at the user's own batch, with few calls of a denoiser.

The student walks its first two visits with gradient, and its last learnt one (of what is made chunk after chunk, two of
the next chunk); the empty denoiser does the rest. A copy of it follows and must agree; so must one that jumps, and one
that is asked for a single sample of the batch. Its steps without noise must be those of its scheduler.

This file knows policies, and no loss or trainer.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.utils._pytree import tree_flatten
from transformers import PreTrainedTokenizerBase

from .inputs import PROMPT, Inputs
from .policy import Elsewhere, Policy, Visit, Walk
from .queries import first_steps
from .scheduler_proxy import SchedulerStep, Step
from .transitions import Schedule, ddim, denoised, ode


@dataclass(frozen=True)
class Place:
    """A visit of a walk, as it will be: its chunk, the noise level of each stream, and which denoisers are called."""

    chunk: int
    levels: tuple[tuple[Schedule, int], ...]
    denoisers: frozenset[str]


@dataclass(frozen=True)
class Checked:
    """
    What the start-up check has found out about the student.

    Attributes:
        plan (`list[Place]`): Every visit of a walk.
        learnt (`tuple[int, ...]`): Where it learns.
        visits (`list[Visit]`): Those that were walked, without graph.
        walk ([`Walk`]): That they are of; it has ended, and can be followed.
        depends (`float`): How far a prediction is from that of a copy which did not see the steps before, relative.
        crosses (`bool`): Whether what an early step computes with gradient is used in later ones, so that a walk has
            one backward pass.
    """

    plan: list[Place]
    learnt: tuple[int, ...]
    visits: list[Visit]
    walk: Walk
    depends: float
    crosses: bool = False

    @property
    def denoisers(self) -> frozenset[str]:
        """Those that are called where it learns."""
        return _called(self.plan, self.learnt)


class _CrossesSteps(Exception):
    """A backward pass came to what another one has freed."""


def seeded(count: int) -> list[torch.Generator]:
    """Generators for a batch of the check."""
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def check_student(
    policy: Policy, inputs: Inputs, fraction: float, backward: Callable[[Tensor], None] = Tensor.backward
) -> Checked:
    """Asks the student, and leaves the gradients of its first two visits.

    Args:
        policy ([`Policy`]): The student.
        inputs (`Mapping[str, Sequence]`): A batch as those of the run.
        fraction (`float`): Of the visits, where it learns (see [`first_steps`]).
        backward (`Callable`, *optional*): Of a loss.

    Raises:
        ValueError: if something does not fit; the sentence says what.
    """
    try:
        return _check(policy, inputs, fraction, backward)
    except _CrossesSteps:
        policy.denoiser.zero_grad(set_to_none=True)
    held: list[Tensor] = []
    checked = _check(policy, inputs, fraction, held.append)
    backward(torch.stack(held).sum())
    return replace(checked, crosses=True)


def _check(policy: Policy, inputs: Inputs, fraction: float, backward: Callable[[Tensor], None]) -> Checked:
    count = len(next(iter(inputs.values())))
    with policy.walk(inputs, seeded(count), _noiseless, probe=_agree_with_scheduler(policy)) as walk:
        visits = [_differentiated(policy, walk, count, backward)]
        with torch.no_grad(), policy.walk(inputs, seeded(count), _noiseless) as dry:
            plan = _checked_plan(policy, dry)
        learnt = first_steps([place.chunk for place in plan], fraction)
        if len(plan) > 1:
            visits.append(_differentiated(policy, walk, count, backward))
        depends = _depends(policy, walk, visits[-1])
        last = {learnt[-1]}
        if plan[-1].chunk > 0:
            second = next(index for index, place in enumerate(plan) if place.chunk == 1)
            last |= {second, second + 1}
        seen = frozenset[str]().union(*(visit.denoisers for visit in visits))
        first = {next(p for p in learnt if name in plan[p].denoisers) for name in _called(plan, learnt) - seen}
        for place in sorted(last | first):
            if walk.place <= place < len(plan):
                with torch.no_grad():
                    while depends == math.inf and walk.place < place:
                        _next(walk)
                    walk.jump(place)
                with torch.set_grad_enabled(place in first):
                    visits.append(_differentiated(policy, walk, count, backward) if place in first else _next(walk))
    with torch.no_grad():
        with policy.follow(walk) as copy:
            for visit in visits:
                gap = _gap(copy(visit), visit)
                if not gap < _tolerance(visit):
                    raise ValueError(
                        f"{policy.name} cannot be followed: at visit {visit.index} a copy that went where it went "
                        f"predicts otherwise, by {gap:.1e} (relative). Something in its `__call__` is drawn anew."
                    )
        if count > 1:
            _check_rows(policy, inputs, visits[0])
    return Checked(plan, learnt, visits, walk, depends)


def check_teacher(policy: Policy, checked: Checked, inputs: Inputs | None = None) -> bool:
    """Asks a teacher at the states that the student has visited.

    Args:
        policy ([`Policy`]): The teacher.
        checked ([`Checked`]): The student.
        inputs (`Mapping[str, Sequence]`, *optional*): Of the teacher. `None`: those of the student.

    Returns:
        `bool`: whether it predicts exactly what the student does.

    Raises:
        ValueError: if it cannot be asked there, or answers in another shape, or not with finite numbers.
    """
    student = checked.walk.policy
    for name in ("height", "width", "num_frames"):
        own, theirs = student.call_kwargs.get(name), policy.call_kwargs.get(name)
        if None not in (own, theirs) and own != theirs:  # a packed state may have one shape for two sizes
            raise ValueError(f"it is called with {name}={theirs}, the student with {own}")
    rounds = 1 if _same_way(policy, student) else 2
    answers: list[list[tuple[Tensor, ...]]] = []
    with torch.no_grad():
        for _ in range(rounds):
            with policy.follow(checked.walk, inputs) as follow:
                answers.append([follow(visit) for visit in checked.visits])
    for visit, targets in zip(checked.visits, answers[0], strict=True):
        for step, target in zip(visit.steps, targets, strict=True):
            if target.shape != step.prediction.shape:
                raise ValueError(
                    f"it predicts {tuple(target.shape)} at the student's states, the student predicts "
                    f"{tuple(step.prediction.shape)}"
                )
            _require_finite(policy, visit.index, target)
    for visit, one, other in zip(checked.visits, answers[0], answers[-1], strict=True):
        for a, b in zip(one, other, strict=True):
            if not (gap := _relative_gap(a, b)) < _tolerance(visit):
                raise ValueError(f"asked twice at visit {visit.index}, it predicts otherwise, by {gap:.1e} (relative)")
    if inputs is not None and not (
        type(policy.pipeline) is type(student.pipeline) and inputs.keys() == checked.walk.inputs.keys()
    ):
        begin, own = checked.visits[0], answers[0][0]
        steps = tuple(replace(step, prediction=p) for step, p in zip(begin.steps, own, strict=True))
        if len(begin.steps[0].sample) > 1:
            with torch.no_grad():
                _check_rows(policy, inputs, replace(begin, steps=steps), checked.walk.all_times)
    asked = list(zip(checked.visits, answers[0], strict=True))
    first = {visit.denoisers: (visit, targets) for visit, targets in reversed(asked)}  # of each denoiser
    return all(
        torch.equal(target.to(step.prediction.dtype), step.prediction)
        for visit, targets in first.values()
        for step, target in zip(visit.steps, targets, strict=True)
    )


@dataclass(frozen=True)
class Path:
    """A walk of the student to its last learnt state, without graph.

    Attributes:
        walk ([`Walk`]): It has ended, and can be followed.
        visits (`list[Visit]`): All of it.
        learnt (`tuple[int, ...]`): Where it learns.
    """

    walk: Walk
    visits: list[Visit]
    learnt: tuple[int, ...]


@torch.no_grad()
def walked_through(checked: Checked, inputs: Inputs) -> Path:
    """Walks to the last learnt state: what depends on earlier steps may do so from any step on.

    Args:
        checked ([`Checked`]): The student.
        inputs (`Mapping[str, Sequence]`): Of it.
    """
    count = len(next(iter(inputs.values())))
    with checked.walk.policy.walk(inputs, seeded(count), _noiseless) as walk:
        visits = [visit.detach() for visit in walk.visits(range(checked.learnt[-1] + 1))]
    return Path(walk, visits, checked.learnt)


@torch.no_grad()
def can_jump(policy: Policy, path: Path, inputs: Inputs | None = None) -> bool:
    """Whether a party says the same at each learnt state of a path if it has not been asked at those before.

    Args:
        policy ([`Policy`]): It.
        path ([`Path`]): Of the student.
        inputs (`Mapping[str, Sequence]`, *optional*): Of the party. `None`: those of the student.
    """
    with policy.follow(path.walk, inputs) as follow:
        seen = [
            replace(
                visit, steps=tuple(replace(s, prediction=p) for s, p in zip(visit.steps, follow(visit), strict=True))
            )
            for visit in path.visits
        ]
    # Those nearest to the end depend on most
    return all(
        _depends(policy, path.walk, seen[place], inputs) < _tolerance(seen[place]) for place in reversed(path.learnt)
    )


def require_independence(policy: Policy, checked: Checked, who: str = "learning from rewards") -> None:
    """For those `who` ask at single states of their own choice.

    Raises:
        ValueError: if predictions depend on the steps before, or a visit is more than one state.
    """
    if not checked.depends < _tolerance(checked.visits[0]):
        raise ValueError(
            f"{policy.name} cannot be asked at a given state: without the steps before, its prediction differs by "
            f"{checked.depends:.1e} (relative). Something in its `__call__` depends on them."
        )
    if checked.crosses:
        raise ValueError(
            f"the gradient of {policy.name} crosses its denoising steps: something that its first step computes is "
            f"used in the second one; {who} takes pipelines whose steps have each their own."
        )
    if any(place.chunk or len(place.levels) > 1 for place in checked.plan):
        raise ValueError(
            f"{policy.name} makes several streams, or chunk after chunk; {who} takes pipelines that make one sample at "
            "once."
        )


def sees_the_end(policy: Policy, inputs: Inputs) -> bool:
    """Whether the denoiser is given something else for prompts than for these without their last characters."""
    tokenizers, seen = tokenizers_of(policy.pipeline), list[Any]()
    without = {prompt: _without_end(prompt, tokenizers) for prompt in inputs[PROMPT]}
    for prompts in (inputs[PROMPT], [without[prompt] for prompt in inputs[PROMPT]]):
        given = {**inputs, PROMPT: prompts}

        def look(*args: Any, **kwargs: Any) -> Any:
            seen.append((args, kwargs))
            output = policy.empty_output(args[len(policy.denoisers) > 1 :], kwargs)  # of several, past the name
            return policy.denoiser(*args, **kwargs) if output is None else output

        with torch.no_grad(), policy.walk(given, seeded(len(prompts)), _noiseless, denoiser=look) as walk:
            walk.advance()
    half = len(seen) // 2
    return not all(_equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))


def tokenizers_of(pipeline: DiffusionPipeline) -> list[PreTrainedTokenizerBase]:
    """Those among a pipeline's parts, and in its processors."""
    parts = [getattr(part, "tokenizer", part) for part in pipeline.components.values()]
    return [part for part in parts if isinstance(part, PreTrainedTokenizerBase)]


def tokenized(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """The whole prompts, however many tokens that is."""
    return tokenizer(list(prompts), truncation=False, padding=False, verbose=False)["input_ids"]


def _without_end(prompt: str, tokenizers: Sequence[PreTrainedTokenizerBase]) -> str:
    """Without as many characters as a tokenizer notices: the last of an emoji may be none of its tokens."""
    whole = [tokenized(tokenizer, [prompt]) for tokenizer in tokenizers]
    shorter = (prompt[:end] for end in range(len(prompt) - 1, 0, -1))
    noticed = (text for text in shorter if [tokenized(tokenizer, [text]) for tokenizer in tokenizers] != whole)
    return next(noticed, prompt[:-1])


def _same_way(policy: Policy, student: Policy) -> bool:
    """Whether what is known of the student's `__call__` is known of this one's."""
    return type(policy.pipeline) is type(student.pipeline) and policy.call_kwargs.keys() == student.call_kwargs.keys()


@torch.no_grad()
def _depends(policy: Policy, walk: Walk, visit: Visit, inputs: Inputs | None = None) -> float:
    """How far the prediction at a visit is from that of a copy that has jumped there; infinite if it cannot (FLUX.2's
    KV cache is filled by the first step)."""
    try:
        with policy.follow(walk, inputs) as copy:
            return _gap(copy(visit), visit)
    except (torch.OutOfMemoryError, Elsewhere):
        raise
    except Exception:
        return math.inf


def _noiseless(step: Step) -> Tensor:
    kernel = ode if step.schedule.is_flow else ddim
    return kernel(step.sample, step.prediction, step.schedule, step.index).mean


def _clean(step: Step) -> Tensor:
    return denoised(step.sample, step.prediction, step.schedule, step.index)


def _agree_with_scheduler(policy: Policy) -> Callable[[Step, SchedulerStep], None]:
    def agree(step: Step, scheduler_step: SchedulerStep) -> None:
        _require_finite(policy, step.index, step.prediction)  # or nothing would agree
        with torch.no_grad():
            answer = scheduler_step()
            ours = (_clean if answer.is_clean else _noiseless)(answer.step)
            theirs = answer.value.float()
        way = (ours - step.sample.float()).norm()
        rounding = torch.finfo(step.sample.dtype).eps + torch.finfo(step.prediction.dtype).eps
        gap = (ours - theirs).norm()
        if not gap <= 1e-2 * way + 4 * rounding * theirs.norm():
            scheduler = type(policy.pipeline.scheduler).__name__
            raise ValueError(
                f"{policy.name} steps otherwise than `{'ode' if step.schedule.is_flow else 'ddim'}`: at visit "
                f"{step.index} its {scheduler} goes elsewhere, by {(gap / way).item():.1e} of the way; a setting of "
                "the scheduler, or an argument of its `step`, means something that is not supported."
            )

    return agree


def _differentiated(policy: Policy, walk: Walk, count: int, backward: Callable[[Tensor], None]) -> Visit:
    visit = _next(walk)
    for step in visit.steps:
        if step.sample.shape[0] != count:
            raise ValueError(
                f"{policy.name} has a state of shape {tuple(step.sample.shape)} for a batch of {count}: one row a "
                "sample is needed."
            )
    if "processors" in walk.changed and getattr(policy.denoiser, "is_gradient_checkpointing", False):
        raise ValueError(
            f"{policy.name} sets attention processors of its own while it runs, and activations would be recomputed "
            "without them; leave out `activation_checkpointing`."
        )
    loss = torch.stack([step.prediction.float().square().mean() for step in visit.steps]).sum()
    if loss.requires_grad:
        try:
            backward(loss)
        except RuntimeError as error:
            if "second time" not in str(error):
                raise
            raise _CrossesSteps from error
    return visit.detach()


def _checked_plan(policy: Policy, dry: Walk) -> list[Place]:
    plan = dry.plan()
    last: dict[tuple[int, int], Step] = {}
    for visit in plan:
        for step in visit.steps:
            last[step.stream, step.chunk] = step
    for step in last.values():
        if step.index + 1 != (steps := len(step.schedule.levels) - 1):
            raise ValueError(
                f"{policy.name} lacks a seam: it called `scheduler.step` {step.index + 1} times for {steps} timesteps; "
                "one call a timestep is needed."
            )
    return [
        Place(visit.chunk, tuple((step.schedule, step.index) for step in visit.steps), visit.denoisers)
        for visit in plan
    ]


def _called(plan: Sequence[Place], places: Sequence[int]) -> frozenset[str]:
    return frozenset[str]().union(*(plan[place].denoisers for place in places))


def _check_rows(policy: Policy, inputs: Inputs, visit: Visit, times: Any = None) -> None:
    """Refuses a batch whose samples meet: FLUX.2-klein takes two pictures as two for every sample."""
    count = len(visit.steps[0].sample)
    last = _row(visit, count - 1)
    alone = {name: values[-1:] for name, values in inputs.items()}
    with policy.follow(inputs=alone, generators=seeded(count)[-1:], times=times) as follow:
        gap = _gap(follow(last), last)
    # Batches of other sizes go through other kernels; those of one size, with other samples beside, do not
    beside = {name: [values[0]] * count for name, values in inputs.items()}
    with policy.follow(inputs=beside, generators=seeded(count), times=times) as follow:
        among = _gap([prediction[:1] for prediction in follow(visit)], _row(visit, 0))
    where = f"beside others, the first one is predicted otherwise, by {among:.1e}"
    if among < _tolerance(last):
        where = f"alone, the last one is predicted otherwise, by {gap:.1e}"
    if not (gap < 100 * _tolerance(last) and among < _tolerance(last)):
        raise ValueError(
            f"the samples of a batch are not independent in {policy.name}: {where} (relative); set the batch size of a "
            "process to 1."
        )


def _row(visit: Visit, row: int) -> Visit:
    """One sample of a batch."""
    one = slice(row, row + 1)
    steps = tuple(replace(step, sample=step.sample[one], prediction=step.prediction[one]) for step in visit.steps)
    return Visit(visit.index, tuple(replace(step, next_sample=None) for step in steps))


def _next(walk: Walk) -> Visit:
    visit = walk.advance()
    if visit is None:
        raise ValueError(f"{walk.policy.name} lacks a seam: it never steps the scheduler that it was given.")
    return visit


def _require_finite(policy: Policy, place: int, prediction: Tensor) -> None:
    if not prediction.isfinite().all():
        raise ValueError(
            f"{policy.name} predicts NaN or infinity at step {place}: its {policy.denoiser_words} holds such numbers, "
            f"or {prediction.dtype} is too narrow for it."
        )


def _tolerance(visit: Visit) -> float:
    # The same numbers through the same kernels: what is left is the non-determinism of some GPU kernels
    return 1e-4 if visit.steps[0].prediction.dtype == torch.float32 else 2e-2


def _gap(predictions: Sequence[Tensor], visit: Visit) -> float:
    return max(_relative_gap(p, step.prediction) for p, step in zip(predictions, visit.steps, strict=True))


def _relative_gap(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    return ((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-12)).item()


def _equal(a: Any, b: Any) -> bool:
    mine, theirs = tree_flatten(a), tree_flatten(b)
    return mine[1] == theirs[1] and all(
        (x.shape == y.shape and torch.equal(x, y)) if torch.is_tensor(x) and torch.is_tensor(y) else True
        for x, y in zip(mine[0], theirs[0], strict=True)
    )
