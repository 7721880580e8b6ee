"""How far a student is from its teachers, at fixed states and at its own.

The KL at the states that a student visits itself is what it is trained on, and misleads as a metric: another student
visits others. The fixed states are those of the teachers' own rollouts, and noised real pictures.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import FluxKontextPipeline
from torch import Tensor

from diffusion_opd.objectives import velocity
from diffusion_opd.policy import Policy, Visit
from diffusion_opd.scheduler_proxy import Step
from diffusion_opd.transitions import noised, ode
from examples.toy_world.demo import specialist
from examples.toy_world.evaluate import inputs as inputs_of
from examples.toy_world.pipeline import SAMPLING
from examples.toy_world.pretrain import encode_pictures, pack
from examples.toy_world.world import TASKS, Task, draw, edits, sample_prompts

SEED, SAMPLES = 99, 24


class State(NamedTuple):
    """One place of a walk, with the state that is asked about and the teacher's velocity there."""

    visit: Visit
    inputs: dict[str, list[Any]]
    target: Tensor


def _policy(pipeline: FluxKontextPipeline) -> Policy:
    arguments = dict(SAMPLING)
    return Policy(pipeline, arguments.pop("num_inference_steps"), arguments)


def _generators(inputs: dict[str, list[Any]]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(SEED + i) for i in range(len(inputs["prompt"]))]


def _walk(policy: Policy, inputs: dict[str, list[Any]]) -> list[Visit]:
    def move(step: Step) -> Tensor:
        return ode(step.sample, step.prediction, step.schedule, step.index).mean

    return list(policy.walk(inputs, _generators(inputs), move))


def _ask(policy: Policy, inputs: dict[str, list[Any]], visits: list[Visit]) -> list[Tensor]:
    """What a policy predicts at the states of successive visits."""
    with policy.follow(inputs=inputs, generators=_generators(inputs)) as follow:
        return [follow(visit)[0] for visit in visits]


@cache
def _teacher(task: Task) -> Policy:
    return _policy(specialist(task))


@cache
@torch.no_grad()
def fixed_states(task: Task) -> dict[str, list[State]]:
    """States with the teacher's velocity there, by origin: `"teacher"`, `"real"`."""
    asked = sample_prompts(task, SAMPLES, SEED, heldout=True)
    inputs, teacher = inputs_of(asked, SEED), _teacher(task)
    visits = _walk(teacher, inputs)
    states = {"teacher": [State(visit, inputs, visit.steps[0].prediction) for visit in visits]}

    rng, generator = np.random.default_rng(SEED), torch.Generator().manual_seed(SEED)
    wanted = [after for _, after in edits(asked, SEED)] if task == "edit" else [draw(prompt, rng) for prompt in asked]
    latents = pack(encode_pictures(teacher.pipeline, wanted))
    real: list[Visit] = []
    for visit in reversed(visits):  # each goes to the next one
        (step,) = visit.steps
        noise = torch.randn(latents.shape, generator=generator)
        x, following = noised(latents, noise, step.schedule, step.index), real[0].steps[0].sample if real else None
        real.insert(0, replace(visit, steps=(replace(step, sample=x, next_sample=following),)))
    targets = _ask(teacher, inputs, real)
    states["real"] = [State(visit, inputs, target) for visit, target in zip(real, targets, strict=True)]
    return states


@torch.no_grad()
def gaps(pipeline: FluxKontextPipeline, tasks: tuple[Task, ...] = TASKS) -> dict[str, dict[Task, float]]:
    """Mean squared velocity gap between a student and each task's teacher, by where it is measured: `"teacher"` and
    `"real"` (the same states for every student), `"own"`."""
    student = _policy(pipeline)

    def measured(origin: str, task: Task) -> Iterator[Tensor]:
        if origin == "own":
            inputs = inputs_of(sample_prompts(task, SAMPLES, SEED, heldout=True), SEED)
            visits = _walk(student, inputs)
            for visit, target in zip(visits, _ask(_teacher(task), inputs, visits), strict=True):
                yield velocity(visit.steps[0].prediction, target)
        else:
            states = fixed_states(task)[origin]
            predictions = _ask(student, states[0].inputs, [state.visit for state in states])
            for prediction, state in zip(predictions, states, strict=True):
                yield velocity(prediction, state.target)

    return {
        origin: {task: torch.stack(list(measured(origin, task))).mean().item() for task in tasks}
        for origin in ("teacher", "real", "own")
    }
