"""What a run costs, in denoiser evaluations of one sample: a forward pass 1, its backward pass 1.1.

1.1 and not 2, because a frozen backbone under a LoRA needs no gradient of its own weights. Guidance is 1.0 in the whole
study, so that one prediction is one evaluation. The formulas are checked against a count of the calls in
tests/toy_world/test_study.py.
"""

from dataclasses import dataclass

FORWARD, BACKWARD = 1.0, 1.1
LEARN = FORWARD + BACKWARD


@dataclass(frozen=True)
class Sizes:
    """Of one optimizer step: samples over all tasks, denoising steps, and how many of them are learnt."""

    samples: int
    steps: int
    learnt: int


def distillation(sizes: Sizes, asked: int = 1, visited: float | None = None, branches: int = 1) -> float:
    """Rollout and gradient are one pass over the learnt states, of as many `branches` as the student has: two with
    guidance, three where these are matched apart. `asked`: predictions of others at each state, the teacher's, and
    those of the base besides, for extrapolation or as an anchor. `visited`: how many states are gone through, on
    average, until the last one that is learnt; those between cost the student a forward pass."""
    between = 0 if visited is None else visited - sizes.learnt
    return sizes.samples * (branches * (between * FORWARD + sizes.learnt * LEARN) + asked * sizes.learnt * FORWARD)


def nft(sizes: Sizes, asks_base: bool, asks_teacher: bool = False) -> float:
    """A rollout of the old policy; then old, trained, and perhaps base and teacher at each noise level."""
    return sizes.samples * (sizes.steps + sizes.learnt * (LEARN + (1 + asks_base + asks_teacher) * FORWARD))


def ropd(sizes: Sizes, iterations: int) -> float:
    """A rollout of the student for `iterations` optimizer steps, in each of which its expert is asked again."""
    return sizes.samples * (sizes.steps * FORWARD / iterations + sizes.learnt * (LEARN + FORWARD))


def grpo(sizes: Sizes, asks_base: bool, iterations: int) -> float:
    """A rollout for `iterations` optimizer steps; the policy, and the base, at each learnt state."""
    return sizes.samples * (sizes.steps / iterations + sizes.learnt * (LEARN + asks_base * FORWARD))


def finetuning(samples: int) -> float:
    """One noise level of each picture."""
    return samples * LEARN


def sampling(samples: int, steps: int) -> float:
    return samples * steps * FORWARD
