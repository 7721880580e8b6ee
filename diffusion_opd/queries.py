"""At which of the visited states the student learns.

This file knows walks, and no pipeline, loss or trainer.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .policy import Visit, Walk


def first_steps(chunks: Sequence[int], fraction: float) -> tuple[int, ...]:
    """The first `max(1, int(n * fraction))` of the `n` visits of each chunk.

    Args:
        chunks (`Sequence[int]`): The chunk of each visit of a walk.
        fraction (`float`): In (0, 1].
    """
    learnt: list[int] = []
    for chunk in dict.fromkeys(chunks):
        places = [place for place, other in enumerate(chunks) if other == chunk]
        learnt += places[: max(1, int(len(places) * fraction))]
    return tuple(learnt)


def learnt_visits(walk: Walk, places: Sequence[int], before_last: Callable[[], Any] = lambda: None) -> Iterator[Visit]:
    """The visits of a walk at these places, under the caller's gradient mode; those between are walked without
    gradient, those after the last are not walked. `before_last()` is called before the forward passes of the last."""
    for place in range(places[-1] + 1):
        if place == places[-1]:
            before_last()
        with torch.set_grad_enabled(place in places and torch.is_grad_enabled()):
            visit = walk.advance()
        if visit is None:
            raise ValueError(f"a walk ended after {place} visits, and was to learn at {places[-1]}.")
        if place in places:
            yield visit
        del visit  # and with it the graph, before the next one grows
