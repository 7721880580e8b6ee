"""Where the time of a training step goes."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch


class Stopwatch:
    """Seconds by section; a nested section's time is its own. On CUDA by events, so that timing does not
    synchronise."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._stack: list[str | None] = [None]
        self._marks: list[tuple[str | None, Any]] = []
        self._paused = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Sections in here are not counted."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        if self._paused:
            yield
            return
        self._stack.append(name)
        self._mark()
        try:
            yield
        finally:
            self._stack.pop()
            self._mark()

    def _mark(self) -> None:
        if self._cuda:
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._marks.append((self._stack[-1], now))

    def clear(self) -> None:
        self._marks.clear()

    def read(self) -> dict[str, float]:
        """Seconds of each section since the last reading."""
        if self._cuda:
            torch.cuda.synchronize()
        totals: dict[str, float] = defaultdict(float)
        for (name, start), (_, end) in pairwise(self._marks):
            if name is not None:
                totals[name] += start.elapsed_time(end) / 1000 if self._cuda else end - start
        self.clear()
        return dict(totals)
