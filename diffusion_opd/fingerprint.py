"""Which weights a LoRA was trained on: values sampled from them, which lie in its file.

A LoRA that was trained on a base into which another one had been fused loads onto the bare base without a word, and is
another model there. Values are sampled and not hashed, so that a base in another precision is the same base.

This file knows denoisers and the files of LoRAs, and no trainer, loss or data.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .errors import one_sentence

Fingerprint = dict[str, list[float]]  # by weight

KEY = "diffusion_opd_base"  # in the metadata of a safetensors file
NUM_VALUES = 1024  # in all; of each weight one at least
ROUNDING = 2**-8  # of bfloat16, the coarsest that weights are kept in, relative
GOLDEN = 0.6180339887498949  # its multiples fall into all rows and columns


def take_fingerprint(denoiser: nn.Module) -> Fingerprint:
    """Samples the weights of a denoiser without its adapters, while it is whole."""
    weights = _weights(denoiser)
    count = -(-NUM_VALUES // max(len(weights), 1))
    values = {key: weight.reshape(-1)[_places(count, weight)] for key, weight in weights.items()}
    return {key: [float(f"{value:.5g}") for value in sampled.tolist()] for key, sampled in values.items()}


@torch.no_grad()
def contradictions(denoiser: nn.Module, fingerprint: Fingerprint, fused: Sequence[str] = ()) -> list[str]:
    """Names of the weights that are not those of a fingerprint, to the rounding of bfloat16; a weight that only one of
    the two has (in such a form: quantised ones are not compared) is none.

    Args:
        denoiser (`nn.Module`): Whole.
        fingerprint (`dict[str, list[float]]`): As [`take_fingerprint`] returns it.
        fused (`Sequence[str]`, *optional*): Adapters of the denoiser, as if they were fused into it.
    """
    weights = _weights(denoiser)
    layers = {key: layer for key, layer in denoiser.named_modules() if isinstance(layer, LoraLayer)}
    found = []
    for key in fingerprint.keys() & weights.keys():
        places = _places(len(fingerprint[key]), weights[key])
        values = weights[key].reshape(-1)[places].float()
        size, roundings = values.abs(), 3 if fused else 1  # of the weight, of the update and of their sum
        module, _, kind = key.rpartition(".")
        adapters = [name for name in fused if module in layers and name in layers[module].scaling]
        if any(kind != "weight" or n not in layers[module].lora_A or layers[module].use_dora[n] for n in adapters):
            continue  # an update that is no product of two matrices
        for name in adapters:
            terms = _update(layers[module], name, places, weights[key][0].numel())
            values, size = values + terms.sum(-1), size + terms.abs().sum(-1)
        gap = (values.cpu() - torch.tensor(fingerprint[key])).abs()
        if (gap > roundings * ROUNDING * size.cpu() + 1e-6).any():
            found.append(key)
    return found


def differ(a: Fingerprint, b: Fingerprint) -> bool:
    """Whether two fingerprints are of other weights, to the rounding of bfloat16."""
    pairs = [pair for key in a.keys() & b.keys() for pair in zip(a[key], b[key], strict=False)]
    return any(abs(x - y) > 2 * ROUNDING * max(abs(x), abs(y)) + 1e-6 for x, y in pairs)


def _weights(denoiser: nn.Module) -> dict[str, Tensor]:
    """All that a LoRA could have been fused into, by its name in a denoiser without adapters."""
    weights = {key.replace(".base_layer.", "."): weight.data for key, weight in denoiser.named_parameters()}
    return {
        key: weight
        for key, weight in weights.items()
        # Quantised ones are of other types, or of a class of their own
        if weight.ndim > 1 and weight.is_floating_point() and weight.itemsize > 1 and type(weight) is Tensor
        if ".lora_" not in key
    }


def _places(count: int, weight: Tensor) -> list[int]:
    return [int((index + 1) * GOLDEN % 1 * weight.numel()) for index in range(count)]


def _update(layer: LoraLayer, adapter: str, places: list[int], width: int) -> Tensor:
    """What an adapter adds to places of a flattened weight, as the terms of a sum: `[places, rank]`."""
    parts: Any = layer.lora_A[adapter], layer.lora_B[adapter]
    a, b = (part.weight.float().flatten(1) for part in parts)
    rows, columns = zip(*(divmod(place, width) for place in places), strict=True)
    return layer.scaling[adapter] * b[list(rows)] * a[:, list(columns)].T


def write_fingerprint(path: Path, fingerprint: Fingerprint) -> None:
    """Adds it to the metadata of a LoRA's file."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    save_file(load_file(path), path, metadata=metadata | {KEY: json.dumps(fingerprint)})


def read_fingerprint(path: Path) -> Fingerprint:
    """What [`write_fingerprint`] has added; empty of a file of others."""
    with safe_open(path, "pt") as file, one_sentence(f"what {path.name} says of its base cannot be read"):
        found = json.loads((file.metadata() or {}).get(KEY, "{}"))
        return {key: [float(value) for value in values] for key, values in found.items()}
