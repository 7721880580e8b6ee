"""Frozen modules that wait in CPU memory until they are needed on the device.

They are copied in, and dropped there when they leave: nothing is copied back. On CUDA what waits is in pinned memory,
so a copy neither waits for the device nor makes the process wait; one that is fetched early goes beside what the device
is doing.

This file knows torch, and no pipeline.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

_MARGIN = 1.2  # of free memory over what is fetched early


class Parts:
    """Modules that are on the device, or wait in CPU memory.

    Args:
        modules (`Sequence[nn.Module]`): Frozen. None: nothing moves.
        device (`torch.device`): Of theirs.
    """

    def __init__(self, modules: Sequence[nn.Module], device: torch.device):
        self._device = device
        self.tensors = list({id(tensor): tensor for tensor in tensors_in(list(map(weights, modules)))}.values())
        self._copies: dict[int, Tensor] = {}  # in CPU memory, of those that may leave
        self._fetched: tuple[list[Tensor], Any] | None = None  # on the device, once an event of it has passed
        self._stream: Any = None
        self.are_away = False

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Of some nothing leaves the device."""
        kept = {id(tensor) for tensor in tensors}
        self.tensors = [tensor for tensor in self.tensors if id(tensor) not in kept]

    def fetch(self) -> None:
        """Begins to bring them to a CUDA device beside what that is doing, if so much memory is free; else they come
        when they are brought."""
        if self._device.type != "cuda" or not self.are_away or self._fetched is not None:
            return
        if torch.cuda.mem_get_info(self._device)[0] < _MARGIN * self.num_bytes:
            return
        self._stream = self._stream or torch.cuda.Stream(self._device)
        with torch.cuda.stream(self._stream):
            self._fetched = self._brought(), self._stream.record_event()

    def _brought(self) -> list[Tensor]:
        return [self._copies[id(tensor)].to(self._device, non_blocking=True) for tensor in self.tensors]

    def bring(self) -> None:
        if not self.are_away:
            return
        if self._fetched is None:
            brought = self._brought()
        else:
            (brought, has_come), stream = self._fetched, torch.cuda.current_stream(self._device)
            stream.wait_event(has_come)
            for tensor in brought:  # allocated on another stream, which must not give it away before this one is done
                tensor.record_stream(stream)
            self._fetched = None
        for tensor, data in zip(self.tensors, brought, strict=True):
            tensor.data = data
        self.are_away = False

    def leave(self) -> None:
        for tensor in () if self.are_away else self.tensors:
            if id(tensor) not in self._copies:
                copy = tensor.data.to("cpu")
                self._copies[id(tensor)] = copy.pin_memory() if self._device.type == "cuda" else copy
            tensor.data = self._copies[id(tensor)]
        self.are_away = True


def weights(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*module.parameters(), *module.buffers()]


def tensors_in(values: Any) -> Iterator[Tensor]:
    """All whose memory is one storage; of quantised ones what they hold."""
    for leaf in tree_leaves(values):
        if not isinstance(leaf, Tensor):
            continue
        if is_traceable_wrapper_subclass(leaf):
            yield from tensors_in([getattr(leaf, name) for name in leaf.__tensor_flatten__()[0]])
        elif leaf.layout == torch.strided:
            yield leaf
