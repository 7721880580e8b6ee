"""The unmodified pipeline, one sample a call: what it predicts at each step, and the loss of a distillation in two
passes. This file knows diffusers, and nothing of diffusion_opd."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor


class Stepped(NamedTuple):
    """What reached `scheduler.step`, and how far it leads in noise level."""

    sample: Tensor
    prediction: Tensor
    way: float


def run(
    pipe: DiffusionPipeline,
    row: Mapping[str, Any],
    call: Mapping[str, Any],
    seed: int,
    steps: int,
    states: Sequence[Tensor] | None = None,
    gradient: bool = False,
) -> list[Stepped]:
    """A sample of `row` (arguments of the call): under Euler's rule, or at given states."""
    seen: list[Stepped] = []
    scheduler = pipe.scheduler

    def step(prediction: Tensor, timestep: Tensor, sample: Tensor, **kwargs: Any) -> tuple[Tensor]:
        index = len(seen)
        way = (scheduler.sigmas[index + 1] - scheduler.sigmas[index]).item()
        seen.append(Stepped(sample.detach().clone(), prediction, way))
        if states is not None:
            return (states[index + 1] if index + 1 < len(states) else sample,)
        return ((sample + way * prediction).detach(),)

    scheduler.step = step
    whole = type(pipe).__call__.__wrapped__ if gradient else type(pipe).__call__
    generator = [torch.Generator().manual_seed(seed)]
    try:
        whole(
            pipe,
            **{**row, "prompt": [row["prompt"]]},
            num_inference_steps=steps,
            generator=generator,
            output_type="latent",
            **call,
        )
    finally:
        del scheduler.step
    return seen


def loss_of(
    student: DiffusionPipeline,
    teacher: DiffusionPipeline,
    rows: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
    call: Mapping[str, Any],
    seeds: Sequence[int],
    steps: int,
    learnt: int,
) -> Tensor:
    """The mean of the closed-form KL of deterministic steps: the student draws each row (the first of a pair; of the
    second the teacher is told), then at its states the teacher is asked, and the student again, with gradient."""
    loss = torch.zeros(())
    for (row, told), seed in zip(rows, seeds, strict=True):
        states = [step.sample for step in run(student, row, call, seed, steps)]
        targets = run(teacher, told, call, seed, steps, states)
        own = run(student, row, call, seed, steps, states, gradient=True)
        for mine, theirs in list(zip(own, targets, strict=True))[:learnt]:
            gap = mine.way * (mine.prediction - theirs.prediction)
            loss = loss + gap.square().mean() / 2 / (len(rows) * learnt)
    return loss
