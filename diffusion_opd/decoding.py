"""What makes pictures of a pipeline's last latents. NaN becomes black pixels there without a word, so that is watched;
and a safety checker hands over black pictures, so it has no part in what is judged.

This file knows pipelines, and no policy or trainer.
"""

from collections.abc import Callable
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

CHECKER = "safety_checker"


class Watched:
    """A module whose `decode` is watched, and whose attributes are its own."""

    def __init__(self, module: Any, watch: Callable[[Tensor], None]):
        self._module, self._watch = module, watch

    # Pipelines ask for it
    __class__ = property(lambda self: type(self._module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self._module
        output = module.decode(*args, **kwargs)
        for part in tree_flatten(output)[0]:
            if isinstance(part, Tensor):
                self._watch(part)
        return output


def decoders_of(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The parts of a pipeline that decode (`vae`, `movq` ...)."""
    return {
        name: part
        for name, part in pipeline.components.items()
        if isinstance(part, nn.Module) and callable(getattr(part, "decode", None))
    }


def watched_decoders(pipeline: DiffusionPipeline, watch: Callable[[Tensor], None]) -> dict[str, Any]:
    """Those, each with `watch` called with what it has decoded."""
    return {name: Watched(part, watch) for name, part in decoders_of(pipeline).items()}


def has_checker(pipeline: DiffusionPipeline) -> bool:
    return pipeline.components.get(CHECKER) is not None


def takes_no_checker(pipeline: DiffusionPipeline) -> bool:
    """Whether it draws without its checker, as diffusers' pipelines do that have one which answers with black pictures;
    the guards of others (Cosmos) raise, and must be there."""
    return hasattr(pipeline, "run_safety_checker")
