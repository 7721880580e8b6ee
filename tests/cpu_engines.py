"""Engines on a machine without GPUs: what accelerate needs to be told there, and what crosses the wire.

Import it before anything that asks for the process state.
"""

import os
import sys

import torch
from accelerate.state import DistributedType, PartialState
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def fsdp_on_cpu() -> None:
    """accelerate turns FSDP off on a CPU; torch's own, over gloo, does not mind."""
    PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_HPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


class Wire(TorchDispatchMode):
    """While it is active, counts each kind of collective: how often, and how many bytes of tensors it was given. Norms
    and flags (up to 256 bytes) do not count."""

    def __init__(self):
        super().__init__()
        self.counts: dict[str, tuple[int, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, _, name = str(function).removesuffix(".default").partition(".")
        size = sum(leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))
        if namespace == "c10d" and size > 256:
            calls, before = self.counts.get(name, (0, 0))
            self.counts[name] = calls + 1, before + size
        return function(*args, **(kwargs or {}))


def leave() -> None:
    """The way out of a process that has closed its process group: gloo's threads now and then abort one that leaves the
    ordinary way, when its work is done, and the launcher calls the run a failure."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
