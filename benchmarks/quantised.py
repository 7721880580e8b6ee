"""
What the frozen weights of published denoisers and of T5 take in fewer bits, as Markdown.

    python -m benchmarks.quantised

Each layer is quantised by the backend itself, one at a time, with random weights; the bytes of all tensors that it then
holds are summed. What loaders leave as it is stays so: all that is no linear layer, and under bitsandbytes T5's `wo`.
Needs `pip install "diffusion-opd[bitsandbytes,torchao]"`, and no GPU.
"""

from functools import cache

import bitsandbytes
import torch
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from benchmarks.footprint import PIPELINES, t5_xxl

GIB = 2**30
WAYS = ("bfloat16", "torchao int8", "LLM.int8", "NF4", "NF4, double")


def size(tensor: Tensor) -> int:
    """Bytes of a tensor, which may be made of several."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(size(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes


@cache
def linear(way: str, inputs: int, outputs: int, bias: bool) -> int:
    """Bytes of a linear layer."""
    layer = nn.Linear(inputs, outputs, bias, dtype=torch.bfloat16)
    if way == "torchao int8":
        quantize_(layer, Int8WeightOnlyConfig())
        return sum(size(parameter.data) for parameter in layer.parameters())
    if way == "LLM.int8":
        quantised = bitsandbytes.nn.Linear8bitLt(inputs, outputs, bias, has_fp16_weights=False)
    else:
        settings = {"quant_type": "nf4", "compress_statistics": "double" in way}
        quantised = bitsandbytes.nn.Linear4bit(inputs, outputs, bias, torch.bfloat16, **settings)
    quantised.load_state_dict(layer.state_dict())
    quantised.bias = layer.bias
    return sum(value.nbytes for value in quantised.to("cpu").state_dict().values())


def weights(module: nn.Module, way: str) -> int:
    """Bytes of a module, which may be without data."""
    total, seen = 0, set[int]()
    for name, layer in module.named_modules():
        is_left = not isinstance(layer, nn.Linear) or (name.endswith(".wo") and "torchao" not in way)
        if isinstance(layer, nn.Linear) and not is_left and way != "bfloat16":
            total += linear(way, layer.in_features, layer.out_features, layer.bias is not None)
            continue
        for tensor in [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]:
            total += 0 if id(tensor) in seen else 2 * tensor.numel()  # T5's embedding is there twice
            seen.add(id(tensor))
    return total


def main() -> None:
    print(f"| GiB | {' | '.join(WAYS)} |\n|---{'|---' * len(WAYS)}|")
    for name, make in {**{name: one.denoiser for name, one in PIPELINES.items()}, "T5-XXL": t5_xxl}.items():
        with torch.device("meta"):
            module = make()
        print(f"| {name} | {' | '.join(f'{weights(module, way) / GIB:.2f}' for way in WAYS)} |", flush=True)


if __name__ == "__main__":
    main()
