"""Calls of pipelines that begin ahead: up to the first forward pass of their denoiser they encode, then they wait.

What a call holds as it waits, and all that is no denoiser, leaves the device meanwhile. These are the same calls at
another time, so the same numbers, for whatever a pipeline does before its first step: it is paused there as between two
denoising steps (see paused.py), and its memory is put back where its own frames expect it.

This file knows pipelines' parts and what begins, and no policy, loss or trainer.
"""

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from .encode_cache import EncodeCache
from .placement import Parts, tensors_in


class Question(Protocol):
    """What begins ahead."""

    def start(self) -> None:
        """Runs each of its calls up to the first forward pass of a denoiser."""

    def close(self, failed: bool = False) -> None:
        """Ends them."""


Q = TypeVar("Q", bound=Question)


class Memory:
    """Storages of the device, which may wait in CPU memory. Tensors and views of them, wherever they are kept, do not
    notice: a storage that waits is empty, and comes back as it was."""

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}  # by what torch knows it by

    @property
    def num_bytes(self) -> int:
        """That wait."""
        return sum(copy.nbytes() for _, copy in self._waiting.values())

    def put_away(self, storage: torch.UntypedStorage) -> None:
        pinned = storage.device.type == "cuda"
        copy = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned).untyped_storage()
        copy.copy_(storage, non_blocking=pinned)  # before whatever is next on the stream writes over it
        storage.resize_(0)
        self._waiting[storage._cdata] = storage, copy

    def bring_back(self, key: int) -> None:
        """One of them, if it waits."""
        if key in self._waiting:
            storage, copy = self._waiting.pop(key)
            storage.resize_(copy.nbytes())
            storage.copy_(copy, non_blocking=True)

    def __contains__(self, key: int) -> bool:
        return key in self._waiting


class _Made(TorchDispatchMode):
    """Notes the memory of a device that operators take, and brings back what they read of what waits: a pipeline may
    keep something from one call to the next."""

    def __init__(self, device: torch.device, memory: Memory, trained: str):
        super().__init__()
        self._device, self._memory, self._trained = device, memory, trained
        self._made: list[StorageWeakRef] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tensors_in((args, kwargs)):
            if tensor.requires_grad and isinstance(tensor, nn.Parameter):
                raise ValueError(
                    f"{self._trained} reads weights that are trained before its first denoising step, where "
                    "`encode_ahead` would hold what they were; leave that out."
                )
            if (key := tensor.untyped_storage()._cdata) in self._memory:
                self._memory.bring_back(key)
        made = func(*args, **(kwargs or {}))
        if places := _fresh(func):
            outputs = made if isinstance(made, tuple) else (made,)
            for tensor in tensors_in([outputs[place] for place in places]):
                storage = tensor.untyped_storage()
                if tensor.device.type == self._device.type and storage.resizable() and storage.nbytes():
                    self._made.append(StorageWeakRef(storage))
        return made

    def alive(self) -> Iterator[torch.UntypedStorage]:
        """What is still held, by whom ever."""
        for key in dict.fromkeys(ref.cdata for ref in self._made if not ref.expired()):
            storage = torch.UntypedStorage._new_with_weak_ptr(key)
            if storage is not None:
                yield storage
        self._made.clear()


class _Read(TorchDispatchMode):
    """Notes which of some tensors operators read."""

    def __init__(self, tensors: Iterable[Tensor]):
        super().__init__()
        self._asked = {tensor.untyped_storage()._cdata: tensor for tensor in tensors}
        self.read: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tensors_in((args, kwargs)):
            if (found := self._asked.get(tensor.untyped_storage()._cdata)) is not None:
                self.read[id(found)] = found
        return func(*args, **(kwargs or {}))


class Ahead(Generic[Q]):
    """
    What a run asks in its coming micro-batches, begun.

    Args:
        modules (`Sequence[nn.Module]`):
            All that is no denoiser, and waits in CPU memory while nothing begins.
        device (`torch.device`):
            Where they encode.
        cache ([`EncodeCache`]):
            Of the run: each micro-batch has its own encodings.
        name (`str`):
            Of the pipeline, for a sentence.
    """

    def __init__(self, modules: Sequence[nn.Module], device: torch.device, cache: EncodeCache, name: str):
        self.parts = Parts(modules, device)
        self._device, self._cache, self._name = device, cache, name
        self._memory = Memory()
        self._begun: deque[tuple[Q, list[int], dict[Any, Any]]] = deque()

    def __len__(self) -> int:
        return len(self._begun)

    @property
    def num_bytes(self) -> int:
        """That what has begun holds in CPU memory."""
        return self._memory.num_bytes

    def look(self, question: Q) -> None:
        """Finds out, by one that is asked for nothing else, which weights a pipeline reads on its way through the
        denoising steps: these stay on the device."""
        with self._cache.apart():
            with _Made(self._device, self._memory, self._name):
                question.start()
            with _Read(self.parts.tensors) as way:
                question.close()
        self.parts.keep(way.read.values())

    def begin(self, questions: Iterable[Callable[[], Q]]) -> None:
        """Makes them and begins them, one after the other."""
        self.parts.bring()
        try:
            for ask in questions:
                with self._cache.apart() as encoded, _Made(self._device, self._memory, self._name) as watch:
                    question = ask()
                    question.start()
                held = []
                for storage in watch.alive():
                    held.append(storage._cdata)
                    self._memory.put_away(storage)
                self._begun.append((question, held, encoded))
        finally:
            self.parts.leave()

    def take(self) -> Q:
        """The next one, with all that it holds on the device."""
        question, held, encoded = self._begun.popleft()
        for key in held:
            self._memory.bring_back(key)
        self._cache.use(encoded)
        return question

    def clear(self, failed: bool = False) -> None:
        """Ends all that has begun: it may begin again. With `failed`, what that raises is left out."""
        for _, held, _ in self._begun:
            for key in held:
                self._memory.bring_back(key)
        while self._begun:
            self._begun.popleft()[0].close(failed)

    def __enter__(self) -> "Ahead[Q]":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.clear(failed=error is not None)
        self.parts.bring()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Nothing has begun and everything is on the device, for whoever uses the whole pipeline."""
        were_away = self.parts.are_away
        self.clear()
        self.parts.bring()
        try:
            yield
        finally:
            if were_away:
                self.parts.leave()


@functools.cache
def _fresh(func: Any) -> tuple[int, ...]:
    """Which results of an operator lie in memory of their own."""
    return tuple(place for place, result in enumerate(func._schema.returns) if result.alias_info is None)
