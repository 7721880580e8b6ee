"""What one process holds of parameters: where an engine shards them (FSDP2, ZeRO-3) its part, else all.

What follows the trained parameters element by element, as a moving average does, needs no more than that: each process
follows its own part, keeps it in a file of its own, and nothing is gathered.

This file knows parameters and the engines that shard them, and no trainer.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.integrations import deepspeed as hf_deepspeed

from .checkpoints import give_ordinary_mode


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


class ShardFiles:
    """
    Files of what follows the trained parameters: where these are sharded, one of each process, else one.

    Args:
        accelerator ([`~accelerate.Accelerator`]): Of the processes.
        is_sharded (`bool`): Whether each holds a part of the trained parameters only.
        writes (`bool`): Whether this process is the one that writes what all hold.
    """

    def __init__(self, accelerator: Accelerator, is_sharded: bool, writes: bool):
        self.accelerator, self.is_sharded, self.writes = accelerator, is_sharded, writes

    def save(self, tensors: dict[str, Tensor], folder: Path, name: str) -> None:
        """Called on every process."""
        if self.writes or self.is_sharded:
            path = self._path(folder, name)
            folder.mkdir(parents=True, exist_ok=True)  # the first process may not have come that far
            save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, path)
            give_ordinary_mode(path)

    def load(self, folder: Path, name: str) -> dict[str, Tensor]:
        """What [`save`] saved.

        Raises:
            ValueError: if the trained parameters were sharded in another way.
        """
        path = self._path(folder, name)
        if not path.is_file():
            raise ValueError(
                f"{folder} has no {path.name}; resume it with the engine and the number of processes that it was saved "
                "with."
            )
        return load_file(path)

    def _path(self, folder: Path, name: str) -> Path:
        if not self.is_sharded:
            return folder / name
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        return folder / f"{Path(name).stem}_{rank}_of_{world}.safetensors"
