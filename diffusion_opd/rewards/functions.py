"""Reward functions as TRL's GRPO has them: `(prompts, images, **columns) -> list[float | None]`, sync or async, for all
tasks or for each its own.

This file knows functions and pictures, and no pipeline, model or trainer.
"""

import asyncio
import contextlib
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from ..errors import brief
from ..inputs import PROMPT
from ..runs import hash_function

RewardFunc = Callable[..., Any]

_GIVEN = {"prompts", "images", "trainer_state"}  # besides the dataset's columns
# Of a reward times its weight: the squares of all rewards of a step have a sum in float32
_LARGEST = 1e15


class Rewards:
    """
    The reward functions of each task, with names and weights.

    Args:
        reward_funcs (`Callable`, a list of them, or `{task: callable or list}`):
            Each is called with the keywords `prompts`, `images` and every other column of the dataset that it takes
            (all of them with `**kwargs`), lists of equal length, and with `trainer_state` if it takes that. It returns
            one number a sample, `None` (or NaN) where it does not apply. `images` are PIL images; of a video pipeline
            lists of frames.
        reward_weights (`list[float]`, or `{task: float or list}` as `reward_funcs`, *optional*):
            One a function; `None`: 1 each.
        name (`str`, *optional*, defaults to `"reward_funcs"`):
            What sentences call them.

    Raises:
        TypeError: for anything that cannot be called.
        ValueError: if there is no function, or the weights do not fit them.
    """

    def __init__(self, reward_funcs: Any, reward_weights: Any = None, name: str = "reward_funcs"):
        by_task = reward_funcs if isinstance(reward_funcs, Mapping) else {None: reward_funcs}
        if not by_task:
            raise ValueError(f"`{name}` is empty; at least one reward function is needed.")
        self.tasks = list(reward_funcs) if isinstance(reward_funcs, Mapping) else None
        if reward_weights is not None and isinstance(reward_weights, Mapping) != (self.tasks is not None):
            form = "a dict by task" if self.tasks else "a list"
            raise ValueError(f"`reward_weights` must have the form of `reward_funcs`, {form}; got {reward_weights!r}.")
        weights = reward_weights if self.tasks else {None: reward_weights}
        self._funcs: dict[str | None, list[RewardFunc]] = {}
        self._weights: dict[str | None, list[float]] = {}
        for task, funcs in by_task.items():
            self._funcs[task] = _as_list(funcs, f"`{name}[{task!r}]`" if self.tasks else f"`{name}`")
            given = (weights or {}).get(task)
            given = [1.0] * len(self._funcs[task]) if given is None else given
            self._weights[task] = list(given) if isinstance(given, (list, tuple)) else [given]
            where = f" of task {task!r}" if self.tasks else ""
            if not all(isinstance(weight, numbers.Real) and math.isfinite(weight) for weight in self._weights[task]):
                raise ValueError(f"`reward_weights`{where} must hold finite numbers, got {given!r}.")
            if len(self._weights[task]) != len(self._funcs[task]):
                raise ValueError(
                    f"`reward_weights`{where} holds {len(self._weights[task])} numbers for {len(self._funcs[task])} "
                    "reward functions; give one each."
                )
        if self.tasks and reward_weights and (unknown := sorted(reward_weights.keys() - by_task.keys())):
            raise ValueError(f"`reward_weights` names {unknown}, but the tasks of `reward_funcs` are {self.tasks}.")
        self._names = _name(self._funcs)
        self.all_names = list(dict.fromkeys(name for names in self._names.values() for name in names))

    def _key(self, task: str) -> str | None:
        return task if self.tasks else None

    def names(self, task: str) -> list[str]:
        return self._names[self._key(task)]

    def written(self, task: str) -> dict[str, str]:
        """By name, a hash of how each function is written."""
        return dict(zip(self.names(task), map(hash_function, self._funcs[self._key(task)]), strict=True))

    def weights(self, task: str) -> list[float]:
        return self._weights[self._key(task)]

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Keeps the models of those functions that have one where they compute, over several calls."""
        with contextlib.ExitStack() as stack:
            for func in {id(func): func for funcs in self._funcs.values() for func in funcs}.values():
                if hasattr(func, "at_work"):
                    stack.enter_context(func.at_work())
            yield

    def needed_columns(self, task: str) -> dict[str, list[str]]:
        """By name, the dataset's columns that each function cannot do without."""
        funcs = zip(self.names(task), self._funcs[self._key(task)], strict=True)
        return {name: sorted(_needed(func) - _GIVEN) for name, func in funcs}

    def check_columns(self, columns: Sequence[str]) -> None:
        """Refuses a dataset before anything is drawn.

        Raises:
            ValueError: if a function needs a column that is missing, or a column has the name of what functions are
                given besides.
        """
        if taken := sorted(_GIVEN & set(columns)):
            raise ValueError(f"the dataset's columns {taken} have names that reward functions know; rename them.")
        for task, funcs in self._funcs.items():
            for func, name in zip(funcs, self._names[task], strict=True):
                _accepted(func, name, dict.fromkeys({*columns, *_GIVEN} - {PROMPT}))

    def __call__(
        self, task: str, examples: Sequence[Mapping[str, Any]], images: Sequence[Any], trainer_state: Any = None
    ) -> Tensor:
        """Scores images of one task.

        Args:
            task (`str`): Whose functions are asked.
            examples (`Sequence[Mapping]`): The dataset's rows.
            images (`Sequence`): One for each row.
            trainer_state ([`~transformers.TrainerState`], *optional*): Handed through.

        Returns:
            `Tensor`: `[samples, functions]`, float32, NaN where a function does not apply.

        Raises:
            ValueError: if a function needs a column that the dataset lacks, or returns anything but a finite number or
                `None` for each sample, or a number whose square float32 does not hold.
        """
        return torch.tensor(self.scores(task, examples, images, trainer_state), dtype=torch.float32).T

    def scores(
        self, task: str, examples: Sequence[Mapping[str, Any]], images: Sequence[Any], trainer_state: Any = None
    ) -> list[list[float]]:
        """As Python's floats: a list for each function."""
        columns = {key: [example[key] for example in examples] for key in examples[0] if key != PROMPT}
        offered = {**columns, "prompts": [example[PROMPT] for example in examples], "images": list(images)}
        offered["trainer_state"] = trainer_state
        funcs, names, weights = self._funcs[self._key(task)], self.names(task), self.weights(task)
        results = [func(**_own(_accepted(func, name, offered))) for func, name in zip(funcs, names, strict=True)]
        waiting = {index: result for index, result in enumerate(results) if inspect.isawaitable(result)}
        for index, result in zip(waiting, _await_all(list(waiting.values())), strict=True):
            results[index] = result
        judged = zip(results, names, weights, strict=True)
        return [_checked(result, name, weight, len(images)) for result, name, weight in judged]


def _as_list(funcs: Any, name: str) -> list[RewardFunc]:
    funcs = list(funcs) if isinstance(funcs, (list, tuple)) else [funcs]
    for func in funcs:
        if not callable(func) or isinstance(func, type):
            raise TypeError(
                f"{name}: a reward function is called with `prompts` and `images` and returns a list of numbers, got "
                f"{type(func).__name__}: {func!r}."
            )
    if not funcs:
        raise ValueError(f"{name} is empty; at least one reward function is needed.")
    return funcs


def _name(funcs: Mapping[str | None, Sequence[RewardFunc]]) -> dict[str | None, list[str]]:
    """`__name__` of each, with a number behind it if another function has that name already."""
    seen: dict[str, list[RewardFunc]] = {}
    names: dict[str | None, list[str]] = {}
    for task, functions in funcs.items():
        names[task] = []
        for func in functions:
            inner = func.func if isinstance(func, functools.partial) else func
            name = getattr(inner, "__name__", type(inner).__name__)
            name = task if name == "<lambda>" and task else name.strip("<>")
            same = seen.setdefault(name, [])
            if func not in same:
                same.append(func)
            number = same.index(func) + 1
            names[task].append(name if number == 1 else f"{name}_{number}")
    return names


def _called(func: Any) -> Any:
    """What of a judge has a signature: of a module, which passes anything on, its `forward`."""
    if isinstance(func, functools.partial):
        return functools.partial(_called(func.func), *func.args, **func.keywords)
    return func.forward if isinstance(func, nn.Module) else func


def _parameters(func: RewardFunc) -> list[inspect.Parameter] | None:
    try:
        return list(inspect.signature(_called(func)).parameters.values())
    except ValueError:  # a builtin without a signature
        return None


def _needed(func: RewardFunc) -> set[str]:
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name for p in _parameters(func) or [] if p.kind in by_name and p.default is p.empty}


def _accepted(func: RewardFunc, name: str, offered: Mapping[str, Any]) -> dict[str, Any]:
    parameters = _parameters(func)
    if parameters is None:
        return dict(offered)
    unnamed = [p.name for p in parameters if p.kind == p.POSITIONAL_ONLY and p.default is p.empty]
    if unnamed or [p.kind for p in parameters] == [inspect.Parameter.VAR_POSITIONAL]:
        raise ValueError(
            f"the reward function {name!r} takes {unnamed or 'all it is given'} by position only, but is called with "
            "keywords."
        )
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if missing := sorted(_needed(func) - offered.keys()):
        columns = sorted(offered.keys() - _GIVEN)
        raise ValueError(
            f"the reward function {name!r} needs {missing}, but a reward function is given `prompts`, `images` and the "
            f"dataset's other columns, here {columns}."
        )
    if any(p.kind == p.VAR_KEYWORD for p in parameters):
        return dict(offered)
    return {p.name: offered[p.name] for p in by_name if p.name in offered}


def _own(value: Any) -> Any:
    """A copy, as deep as pictures and numbers go: a function that writes into what it is given does so for itself."""
    if isinstance(value, Mapping):
        return {key: _own(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_own, value))
    if isinstance(value, Tensor):
        return value.clone()
    return value.copy() if isinstance(value, (Image, np.ndarray)) else value


def _await_all(awaitables: Sequence[Any]) -> list[Any]:
    """Runs them at the same time, in a thread of its own: a notebook has a running loop already."""
    if not awaitables:
        return []

    async def gather() -> list[Any]:
        return await asyncio.gather(*awaitables)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, gather()).result()


def _checked(result: Any, name: str, weight: float, count: int) -> list[float]:
    values: Any = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(values, (list, tuple)) or len(values) != count:
        got = f"{len(values)} values" if isinstance(values, (list, tuple)) else brief(result)
        raise ValueError(f"the reward function {name!r} must return a list of {count} rewards, got {got}.")
    values = [value.item() if isinstance(value, Tensor) and value.dim() == 0 else value for value in values]
    largest = _LARGEST / max(1.0, abs(weight))
    for value in values:
        if value is not None and (not isinstance(value, numbers.Real) or abs(value) == math.inf):
            raise ValueError(
                f"the reward function {name!r} must return finite numbers, or `None` where it does not apply; got "
                f"{value!r}."
            )
        size: Any = 0.0 if value is None else abs(value)
        if size > largest:
            raise ValueError(
                f"the reward function {name!r} must return numbers of at most {largest:.0e} with its weight of "
                f"{weight}, or their std overflows; got {brief(value)}."
            )
    return [math.nan if value is None else float(value) for value in values]
