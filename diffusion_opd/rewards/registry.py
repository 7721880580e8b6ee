"""Reward functions by name, as YAML and the command line give them.

This file knows names, and no model.
"""

import functools
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from .functions import RewardFunc

# By name: the module of this package and the class in it
REWARDS = {
    "pickscore": "clip.PickScore",
    "clipscore": "clip.CLIPScore",
    "aesthetic": "clip.Aesthetic",
    "hpsv2": "clip.HPSv2",
    "imagereward": "image_reward.ImageReward",
    "ocr": "ocr.OCR",
    "geneval": "geneval.GenEval",
    "vlm_judge": "vlm.VLMJudge",
    "unified_reward": "vlm.UnifiedReward",
    "jpeg_compressibility": "jpeg.JPEGCompressibility",
    "remote": "remote.RemoteReward",
}


def load_reward(reward: str | Mapping[str, Any] | RewardFunc, **defaults: Any) -> RewardFunc:
    """Makes a reward function.

    Args:
        reward (`str`, `dict` or `Callable`):
            A name of [`REWARDS`] (`"pickscore"`), the dotted path of a function or of a class whose objects are reward
            functions (`"my_rewards.colour"`), or a dict of one under `name` beside the arguments of the class, or of
            the function (`{"name": "ocr", "batch_size": 4}`). A callable is handed through.
        defaults:
            Arguments of every class that takes them, e.g. `device`; what `reward` says goes before.

    Returns:
        `Callable`: a reward function.

    Raises:
        ValueError: if nothing has that name, or its arguments do not fit.
    """
    if callable(reward):
        return reward
    if isinstance(reward, str):
        reward = {"name": reward}
    if not isinstance(reward, Mapping) or not isinstance(reward.get("name"), str):
        raise ValueError(f"a reward function is a name, or a dict with `name` and arguments; got {reward!r}.")
    arguments = {key: value for key, value in reward.items() if key != "name"}
    made = _found(reward["name"])
    taken, takes_more = _arguments(made)
    if isinstance(made, type):
        arguments = {key: value for key, value in defaults.items() if key in taken} | arguments
    if not takes_more and (unknown := sorted(arguments.keys() - set(taken))):
        raise ValueError(f"the reward {reward['name']!r} takes no {unknown}; its arguments are {taken}.")
    if isinstance(made, type):
        return made(**arguments)
    return functools.partial(made, **arguments) if arguments else made


def _arguments(made: Any) -> tuple[list[str], bool]:
    """By name what a function takes, or a class and those that its `**kwargs` go to; and whether it takes any other."""
    names: list[str] = []
    for one in made.__mro__[:-1] if isinstance(made, type) else [made]:
        parameters = inspect.signature(one).parameters.values()
        names += [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            return list(dict.fromkeys(names)), False
    return names, True


def _found(name: str) -> Any:
    if name in REWARDS:
        module, _, attribute = f"{__package__}.{REWARDS[name]}".rpartition(".")
        return getattr(importlib.import_module(module), attribute)
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ValueError(
            f"no reward is called {name!r}; give one of {list(REWARDS)}, or the dotted path of your own function."
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"the reward {name!r} cannot be imported: {error}.") from error
    if not callable(found):
        raise ValueError(f"the reward {name!r} is {type(found).__name__}, and cannot be called.")
    return found


def load_rewards(reward_funcs: Any) -> Any:
    """Puts functions in the place of names.

    Args:
        reward_funcs (`Callable`, `str`, `dict` with a `name`, a list of them, or `{task: the same}`):
            As [`load_reward`] takes them. The same entry of two tasks is one function.

    Returns:
        What [`Rewards`] takes.
    """
    made: dict[str, RewardFunc] = {}

    def load(entry: Any) -> Any:
        if isinstance(entry, (list, tuple)):
            return [load(one) for one in entry]
        if callable(entry):
            return entry
        return made.get(repr(entry)) or made.setdefault(repr(entry), load_reward(entry))

    if isinstance(reward_funcs, Mapping) and not isinstance(reward_funcs.get("name"), str):
        return {task: load(own) for task, own in reward_funcs.items()}
    return load(reward_funcs)
