"""Queries: at which of the visited states the student learns.

Pure functions of the plan of a walk. What else there is to know about a query stands in `QUERIES`, and only there. This
file knows no pipeline, no loss and no trainer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


def first_steps(chunks: Sequence[int], fraction: float) -> tuple[int, ...]:
    """The first `max(1, int(n * fraction))` of the `n` visits of each chunk, in order (the released recipe
    learns at 9 of 10): the candidates of every query.

    Args:
        chunks (`Sequence[int]`): The chunk of each visit of a walk.
        fraction (`float`): In (0, 1].
    """
    learnt: list[int] = []
    for chunk in dict.fromkeys(chunks):
        places = [place for place, other in enumerate(chunks) if other == chunk]
        learnt += places[: max(1, int(len(places) * fraction))]
    return tuple(learnt)


def every(chunks: Sequence[int], count: int, rng: Any, shape: tuple[float, float]) -> list[int]:
    """All candidates: the paper's."""
    return list(range(len(chunks)))


def random(chunks: Sequence[int], count: int, rng: Any, shape: tuple[float, float]) -> list[int]:
    """`count` candidates, each as likely as any other, without replacement."""
    return sorted(rng.choice(len(chunks), count, replace=False).tolist())


def window(chunks: Sequence[int], count: int, rng: Any, shape: tuple[float, float]) -> list[int]:
    """`count` candidates in succession, from any of them on."""
    start = int(rng.integers(len(chunks) - count + 1))
    return list(range(start, start + count))


def beta(chunks: Sequence[int], count: int, rng: Any, shape: tuple[float, float]) -> list[int]:
    """The candidate `floor(n u)` of `n`, `u ~ Beta(*shape)` (DanceOPD, arXiv 2606.27377: one state, Beta(5, 2), whose
    mean 5/7 lies on the side of low noise), again until `count` are drawn. `n` counts those of one chunk, and each
    chunk is as likely as any other."""
    drawn = set[int]()
    while len(drawn) < count:
        places = _of_one_chunk(chunks, rng)
        drawn.add(places[min(int(len(places) * rng.beta(*shape)), len(places) - 1)])
    return sorted(drawn)


def _of_one_chunk(chunks: Sequence[int], rng: Any) -> list[int]:
    numbers = list(dict.fromkeys(chunks))
    chunk = numbers[int(rng.integers(len(numbers)))] if len(numbers) > 1 else numbers[0]
    return [place for place, other in enumerate(chunks) if other == chunk]


@dataclass(frozen=True)
class Query:
    """
    A query and what there is to know about it.

    Args:
        name (`str`): What a user calls it.
        choose (`Callable`):
            Of the candidates' chunks, how many are wanted, a `numpy.random.Generator` and the two parameters of a beta
            distribution, which candidates are learnt from, in rising order.
        counts (`bool`, *optional*, defaults to `True`): Whether it chooses `num_queries` of them.
    """

    name: str
    choose: Callable[[Sequence[int], int, Any, tuple[float, float]], list[int]]
    counts: bool = True


QUERIES: dict[str, Query] = {
    query.name: query
    for query in (
        Query("first", every, counts=False),
        Query("random", random),
        Query("beta", beta),
        Query("window", window),
    )
}
