"""LoRA adapters of a denoiser that the student and its teachers share, and frozen copies for those who cannot share it.

This file knows denoisers, and no files, trainer, loss or data.
"""

import copy
import warnings
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .denoisers import put_denoiser
from .policy import tuner_layers

STUDENT_ADAPTER = "default"


def changes_base(config: LoraConfig) -> bool:
    """Whether a LoRA also changes the backbone that a student and its LoRA teachers share."""
    return (
        config.bias != "none"
        or bool(config.modules_to_save)
        or str(config.init_lora_weights).lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga"))
    )


def with_denoiser(pipeline: DiffusionPipeline, denoiser: nn.Module) -> DiffusionPipeline:
    """A copy of a pipeline, whose modules it shares, with another denoiser."""
    twin = copy.copy(pipeline)
    put_denoiser(twin, denoiser)
    return twin


def inject(denoiser: ModelMixin, config: LoraConfig, name: str) -> None:
    """Adds an adapter, active and trained."""
    if isinstance(denoiser, ModelMixin) and hasattr(denoiser, "add_adapter"):
        denoiser.add_adapter(config, name)
    else:
        inject_adapter_in_model(config, denoiser, name)


def add_adapter(denoiser: ModelMixin, config: LoraConfig, name: str) -> None:
    """Adds an adapter and leaves which one is active, and which parameters train, as it was.

    Raises:
        ValueError: if the config's target modules are not in the denoiser.
    """
    trainable = {id(parameter) for parameter in denoiser.parameters() if parameter.requires_grad}
    layers = tuner_layers(denoiser)
    active = layers[0].active_adapters if layers else []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters: the very idea
        inject(denoiser, config, name)
    for layer in tuner_layers(denoiser):
        layer.set_adapter(active)  # makes it train too, which the next lines undo
    for parameter in denoiser.parameters():
        parameter.requires_grad_(id(parameter) in trainable)


def adapted_layers(module: nn.Module, adapter: str) -> dict[str, Any]:
    """The layers that an adapter has, by their names in a module."""
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}
    return {name: layer for name, layer in layers.items() if adapter in getattr(layer, "scaling", {})}


def without_adapters(module: Any) -> Any:
    """The module itself, without its adapters."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            module.set_submodule(name, layer.get_base_layer())
    for name in ("peft_config", "_hf_peft_config_loaded"):
        vars(module).pop(name, None)
    return module


def frozen_copy(denoiser: ModelMixin, dtype: torch.dtype) -> ModelMixin:
    """A copy without gradients in `dtype`, but for what `from_pretrained` keeps in float32 too (`to` would cast it)."""
    kept = set(denoiser._keep_in_fp32_modules or [])  # diffusers' own list, which only its `from_pretrained` minds

    def cast(module: nn.Module) -> list[Tensor]:
        named = [*module.named_parameters(), *module.named_buffers()]
        return [t for name, t in named if t.is_floating_point() and not kept & set(name.split("."))]

    # Each tensor is copied into its dtype: all of a copy in float32 would be twice what is kept
    plain = [tensor for tensor in cast(denoiser) if type(tensor) in (Tensor, nn.Parameter)]
    memo: dict[int, Any] = {id(tensor): tensor.detach().to(dtype, copy=True) for tensor in plain}
    memo |= {id(t): nn.Parameter(memo[id(t)], requires_grad=False) for t in plain if isinstance(t, nn.Parameter)}
    twin = copy.deepcopy(denoiser, memo).requires_grad_(False)
    for tensor in cast(twin):  # quantised ones
        tensor.data = tensor.data.to(dtype)
    return twin
