"""Which modules of a pipeline denoise: one, or several that share the noise levels between them (Wan 2.2's experts).

Several are trained as one module, [`Denoisers`]; one is itself. This file knows pipelines, and no policy or trainer.
"""

from collections.abc import Mapping
from typing import Any

from accelerate.utils import extract_model_from_parallel
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from torch import nn

NAMES = ("transformer", "transformer_2", "unet")

_OF_A_PIPELINE = "_denoisers"


class Denoisers(nn.Module):
    """
    Several denoisers as one module: `denoisers(name, ...)` calls one of them, `denoisers()` none.

    Args:
        parts (`Mapping[str, ModelMixin]`): By their names in the pipeline.

    Attributes:
        last (`str`): Which was called last.
    """

    last = ""

    def __init__(self, parts: Mapping[str, Any]):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        # What Trainer, accelerate and diffusers' own helpers read of one
        self.config: Any = FrozenDict({name: dict(part.config) for name, part in parts.items()})

    def forward(self, name: str | None = None, *args: Any, **kwargs: Any) -> Any:
        if name is None:
            return None
        self.last = name
        return self.get_submodule(name)(*args, **kwargs)

    @property
    def peft_config(self) -> dict[str, Any]:
        """Of each adapter that any of them has."""
        configs: dict[str, Any] = {}
        for part in parts_of(self).values():
            configs = getattr(part, "peft_config", {}) | configs
        return configs

    @property
    def is_gradient_checkpointing(self) -> bool:
        return any(part.is_gradient_checkpointing for part in parts_of(self).values())

    def enable_gradient_checkpointing(self, checkpoint: Any = None) -> None:
        for part in parts_of(self).values():
            part.enable_gradient_checkpointing(checkpoint)

    @property
    def _repeated_blocks(self) -> list[str]:
        return sorted(
            {name for part in parts_of(self).values() for name in part._repeated_blocks or part._no_split_modules}
        )

    @property
    def _no_split_modules(self) -> list[str]:
        """What FSDP wraps: blocks, and each denoiser, which plain pipelines call past this module."""
        blocks = {name for part in parts_of(self).values() for name in part._no_split_modules or ()}
        return sorted(blocks | {type(part).__name__ for part in self.children()})

    @property
    def _keep_in_fp32_modules(self) -> list[str]:
        return sorted({name for part in parts_of(self).values() for name in part._keep_in_fp32_modules or ()})


def denoisers_of(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The denoisers of a pipeline by their names: `transformer`, `transformer_2` or `unet`.

    Raises:
        ValueError: if it has none, or both transformers and a UNet.
    """
    parts = {name: getattr(pipeline, name, None) for name in NAMES}
    found = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    if not found or ("unet" in found and len(found) > 1):
        raise ValueError(
            f"{type(pipeline).__name__} has no denoiser by the names that are known: transformers (`transformer`, "
            f"`transformer_2`) or a `unet`; got {sorted(pipeline.components)}."
        )
    return found


def take_wrappers_off(pipeline: DiffusionPipeline) -> list[str]:
    """Puts modules in the place of what wraps them (`torch.compile(module)`, DDP), which would leave its name in the
    keys of all that is saved. Returns of which parts."""
    found = []
    for key, part in pipeline.components.items():
        if isinstance(part, nn.Module) and (inner := _unwrapped(part)) is not part:
            vars(pipeline)[key] = inner  # past `DiffusionPipeline.__setattr__`, which writes into the config
            found.append(key)
    return found


def unwrap_blocks(module: nn.Module) -> bool:
    """Does so within a module. Returns whether anything was wrapped."""
    parts = {name: part for name, part in module.named_modules() if _may_wrap(part)}
    found = {name: inner for name, part in parts.items() if (inner := _unwrapped(part)) is not part}
    for name, inner in found.items():
        if not any(name.startswith(f"{outer}.") for outer in found):
            module.set_submodule(name, inner)
    return bool(found)


def _may_wrap(module: nn.Module) -> bool:
    """By the names that wrappers have for what is within: accelerate looks through all that is in a module."""
    return any(name in module._modules or name in vars(module) for name in ("module", "_orig_mod"))


def _unwrapped(module: nn.Module) -> Any:
    return extract_model_from_parallel(module, keep_torch_compile=False)


def denoiser_of(pipeline: DiffusionPipeline) -> Any:
    """The denoiser of a pipeline; of several the [`Denoisers`], one for all pipelines that share them."""
    parts = denoisers_of(pipeline)
    if len(parts) == 1:
        return next(iter(parts.values()))
    whole = vars(pipeline).get(_OF_A_PIPELINE)
    if whole is None or parts_of(whole) != parts:
        # Past `DiffusionPipeline.__setattr__`, which writes into the config; a copy of the pipeline has it too
        whole = vars(pipeline)[_OF_A_PIPELINE] = Denoisers(parts)
    return whole


def parts_of(denoiser: nn.Module) -> dict[str, Any]:
    """The denoisers in what [`denoiser_of`] returned: of one itself, under no name."""
    return dict(denoiser.named_children()) if isinstance(denoiser, Denoisers) else {"": denoiser}


def put_denoiser(pipeline: DiffusionPipeline, denoiser: nn.Module) -> None:
    """Puts other denoisers in the place of a pipeline's own."""
    own = vars(pipeline)  # past `DiffusionPipeline.__setattr__`, which writes into the config
    if isinstance(denoiser, Denoisers):
        own.update(parts_of(denoiser) | {_OF_A_PIPELINE: denoiser})
    else:
        own[next(iter(denoisers_of(pipeline)))] = denoiser
