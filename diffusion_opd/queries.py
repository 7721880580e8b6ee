"""Queries: at which of the visited states the student learns.

Pure functions of the plan of a walk. This file knows no pipeline, no loss and no trainer.
"""

from collections.abc import Sequence


def first_steps(chunks: Sequence[int], fraction: float) -> tuple[int, ...]:
    """The first `max(1, int(n * fraction))` of the `n` visits of each chunk, in order (the released recipe
    learns at 9 of 10).

    Args:
        chunks (`Sequence[int]`): The chunk of each visit of a walk.
        fraction (`float`): In (0, 1].
    """
    learnt: list[int] = []
    for chunk in dict.fromkeys(chunks):
        places = [place for place, other in enumerate(chunks) if other == chunk]
        learnt += places[: max(1, int(len(places) * fraction))]
    return tuple(learnt)
