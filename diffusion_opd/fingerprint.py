"""Which weights a LoRA was made for: a few values of the layers that it adapts, kept in its file.

A LoRA that was trained on a base into which another one had been fused fits the bare base in every shape, and is wrong
there. Values tell the two apart in any precision, where a hash would not. This file knows denoisers and tensors, and no
teacher or trainer.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

KEY = "base_values"  # in the metadata of a safetensors file

LAYERS, VALUES = 64, 8  # at most; of each


def base_values(denoiser: nn.Module, adapter: str, fused: Sequence[str] = ()) -> dict[str, list[float]]:
    """Some values of the layers that an adapter changes, by layer.

    Args:
        denoiser (`nn.Module`): With the adapter, its weights whole.
        adapter (`str`): Of it.
        fused (`Sequence[str]`, *optional*): Adapters that are added to the values.
    """
    layers = {
        name: layer
        for name, layer in denoiser.named_modules()
        if isinstance(layer, LoraLayer) and adapter in layer.scaling and _weight(layer).is_floating_point()
    }
    return {name: _values(layers[name], fused) for name in list(layers)[:: max(1, len(layers) // LAYERS)][:LAYERS]}


def _weight(layer: Any) -> Tensor:
    return layer.get_base_layer().weight


@torch.no_grad()
def _values(layer: Any, fused: Sequence[str]) -> list[float]:
    weight = _weight(layer)
    places = torch.linspace(0, weight.numel() - 1, VALUES).long()
    values = weight.detach().flatten()[places.to(weight.device)].float().cpu()
    for name in fused:
        if name in layer.scaling:
            values += layer.get_delta_weight(name).flatten()[places.to(weight.device)].float().cpu()
    return values.tolist()


def write_base_values(path: Path, values: Mapping[str, Sequence[float]]) -> None:
    """Adds them to the metadata of a LoRA's file."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    save_file(load_file(path), path, metadata=metadata | {KEY: json.dumps(values)})


def read_base_values(path: Path) -> dict[str, list[float]]:
    """What [`write_base_values`] has added; nothing to a file of others."""
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get(KEY, "{}"))


def is_another_base(
    values: Mapping[str, Sequence[float]], denoiser: nn.Module, adapter: str, fused: Sequence[str] = ()
) -> bool:
    """Whether a LoRA was made for other weights than those under a denoiser's adapter, with what is fused into these.
    Values that differ by no more than bfloat16 rounds are the same."""
    own = base_values(denoiser, adapter, fused)
    pairs = [(a, b) for name in values.keys() & own.keys() for a, b in zip(values[name], own[name], strict=True)]
    if not pairs:
        return False
    theirs, ours = torch.tensor(pairs).T
    return bool(((theirs - ours).abs() > 2**-7 * theirs.abs().maximum(ours.abs()) + 1e-6).any())
