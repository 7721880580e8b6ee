"""Which weights a LoRA was trained on: values sampled from them, which lie in its file.

A LoRA that was trained on a base into which another one had been fused loads onto the bare base without a word, and is
another model there. Values are sampled and not hashed, so that a base in another precision is the same base, and so is
a quantised one as far as its values can tell.

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
from .quantization import can_be_dequantised, dequantised, is_quantised_weight

Fingerprint = dict[str, list[float]]  # by weight

KEY = "diffusion_opd_base"  # in the metadata of a safetensors file
NUM_VALUES = 1024  # in all; of each weight one at least
DIGITS = 5  # that are written of each
# Relative: of bfloat16, the coarsest that weights are kept in, and of the digits
ROUNDING = 2**-8 + 10**-DIGITS * 5
QUANTISED = " (quantised)"  # of the names of weights whose values are known to a bound, which comes before them
MOST_QUANTISED = 16
GOLDEN = 0.6180339887498949  # its multiples fall into all rows and columns


def take_fingerprint(denoiser: nn.Module) -> Fingerprint:
    """Samples the weights of a denoiser without its adapters, while it is whole."""
    layers = _layers(denoiser)
    count = -(-NUM_VALUES // max(len(layers), 1))
    found: Fingerprint = {}
    for key, layer in layers.items():
        weight, off = _read(layer)
        values = [float(f"{value:.{DIGITS}g}") for value in weight.reshape(-1)[_places(count, weight)].tolist()]
        found |= {f"{key}{QUANTISED}": [off, *values]} if off else {key: values}
    return found


@torch.no_grad()
def contradictions(denoiser: nn.Module, fingerprint: Fingerprint, fused: Sequence[str] = ()) -> list[str]:
    """Names of the weights that are not those of a fingerprint, to the rounding of bfloat16, or of their quantisation;
    a weight that only one of the two has is none.

    Args:
        denoiser (`nn.Module`): Whole.
        fingerprint (`dict[str, list[float]]`): As [`take_fingerprint`] returns it.
        fused (`Sequence[str]`, *optional*): Adapters of the denoiser, as if they were fused into it.
    """
    layers, sampled = _layers(denoiser), _sampled(fingerprint)
    adapted = {key: layer for key, layer in denoiser.named_modules() if isinstance(layer, LoraLayer)}
    found = []
    for key in sampled.keys() & layers.keys():
        wanted, off = sampled[key]
        weight, own_off = _read(layers[key])
        places = _places(len(wanted), weight)
        values = weight.reshape(-1)[places].float()
        size, roundings = values.abs(), 3 if fused else 1  # of the weight, of the update and of their sum
        module, _, kind = key.rpartition(".")
        adapters = [name for name in fused if module in adapted and name in adapted[module].scaling]
        if any(kind != "weight" or n not in adapted[module].lora_A or adapted[module].use_dora[n] for n in adapters):
            continue  # an update that is no product of two matrices
        for name in adapters:
            terms = _update(adapted[module], name, places, weight[0].numel())
            values, size = values + terms.sum(-1), size + terms.abs().sum(-1)
        gap = (values.cpu() - torch.tensor(wanted)).abs()
        if (gap > roundings * ROUNDING * size.cpu() + off + own_off + 1e-6).any():
            found.append(key)
    return found


def differ(a: Fingerprint, b: Fingerprint) -> bool:
    """Whether two fingerprints are of other weights, to the rounding of bfloat16, or of their quantisation."""
    one, other = _sampled(a), _sampled(b)
    for key in one.keys() & other.keys():
        (xs, off), (ys, other_off) = one[key], other[key]
        pairs = zip(xs, ys, strict=False)
        if any(abs(x - y) > 2 * ROUNDING * max(abs(x), abs(y)) + off + other_off + 1e-6 for x, y in pairs):
            return True
    return False


def _sampled(fingerprint: Fingerprint) -> dict[str, tuple[list[float], float]]:
    """By weight its values, and by how much quantisation has changed each at most."""
    found = {}
    for key, values in fingerprint.items():
        name = key.removesuffix(QUANTISED)
        found[name] = (values, 0.0) if name == key else (values[1:], values[0])
    return found


def _layers(denoiser: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The layers of all that a LoRA could have been fused into, by the weight's name in a denoiser without adapters; of
    quantised ones a few, each of which is made whole to be looked at."""
    plain, quantised = {}, {}
    for prefix, layer in denoiser.named_modules():
        for name, weight in layer.named_parameters(recurse=False):
            key = f"{prefix}.{name}".replace(".base_layer.", ".").removeprefix(".")
            if ".lora_" in key:
                continue
            if is_quantised_weight(weight):
                if name == "weight" and can_be_dequantised(weight):
                    quantised[key] = layer
            elif weight.ndim > 1:
                plain[key] = layer, name
    few = sorted(quantised)[:: -(-len(quantised) // MOST_QUANTISED) or 1]
    return plain | {key: (quantised[key], "weight") for key in few}


def _read(layer: tuple[nn.Module, str]) -> tuple[Tensor, float]:
    """A weight, and by how much quantisation has changed its values at most."""
    module, name = layer
    weight = getattr(module, name)
    if not is_quantised_weight(weight):
        return weight.data, 0.0
    whole = dequantised(module)
    # Half the widest gap between values: of four bits (NF4, FP4) a sixth of a block's largest, of eight a 254th
    return whole, float(whole.abs().max()) * (0.01 if "int8" in type(weight).__name__.lower() else 0.2)


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
