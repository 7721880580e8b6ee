"""How a pipeline class is made of tiny parts, and called."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from diffusers import DiffusionPipeline

from tests.tiny_pipelines import LORA_TARGETS


@dataclass(frozen=True)
class Tiny:
    """
    A pipeline of tiny parts.

    Args:
        make (`Callable[[int], DiffusionPipeline]`): By the seed of its denoisers; everything else is the same for all
            seeds. The scheduler is of first order, so that a plain call goes where the ODE goes.
        call (`dict`): Arguments of `pipe(...)` that hold for all samples: sizes, guidance ...
        inputs (`dict[str, list]`): What samples are made of besides their prompts: two values each.
        lora_targets (`list[str]` or `str`): Names of linear layers of the denoiser.
        bare (`bool`): Whether it takes a prompt, and no list of one.
        prompts (`tuple[str, str]`): Two of them, of one length.
    """

    make: Callable[[int], DiffusionPipeline]
    call: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, list[Any]] = field(default_factory=dict)
    lora_targets: Any = field(default_factory=lambda: list(LORA_TARGETS))
    bare: bool = False
    prompts: tuple[str, str] = ("a red fox on snow", "a tall oak in fog")
