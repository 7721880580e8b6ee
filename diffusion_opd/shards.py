"""What one process holds of parameters: where an engine shards them (FSDP2, ZeRO-3) its part, else all.

What follows the trained parameters element by element, as a moving average does, needs no more than that: each process
follows its own part, and nothing is gathered.

This file knows parameters and the engines that shard them, and no trainer.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.integrations import deepspeed as hf_deepspeed


@contextlib.contextmanager
def zero3_unseen() -> Iterator[None]:
    """For what is no matter of ZeRO-3 while its config lives: transformers would load every model partitioned, and
    diffusers' moving average gather each tensor."""
    config = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = config


def reshard(module: nn.Module) -> None:
    """FSDP2 leaves parameters whole after a forward pass without a backward pass; they are other objects then."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def local_shards(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """What this process holds of each parameter, sharing its memory; parameters too, since diffusers averages nothing
    else. Between steps alone, after [`reshard`]; call [`shards_changed`] after writing into them."""
    return [nn.Parameter(_shard(parameter.detach(), parameter)) for parameter in parameters]


def _shard(data: Tensor, parameter: nn.Parameter) -> Tensor:
    if isinstance(data, DTensor):
        return data.to_local()
    return getattr(parameter, "ds_tensor", data)


@torch.no_grad()
def shards_changed(parameters: Sequence[nn.Parameter]) -> None:
    """ZeRO-3 keeps small parameters whole beside their shards: gathers them anew. Called on every process."""
    whole: list[Any] = [parameter for parameter in parameters if hasattr(parameter, "ds_id") and parameter.numel() > 0]
    if whole:
        whole[0].partition(whole)
        whole[0].all_gather(whole)
