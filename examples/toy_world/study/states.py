"""How far a student is from its teachers, at fixed states and at its own.

The KL at the states that a student visits itself is what it is trained on, and misleads as a metric: another student
visits others. The fixed states are those of the teachers' own rollouts, and noised real pictures.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from diffusion_opd.objectives import velocity
from diffusion_opd.policy import Policy, Visit
from diffusion_opd.scheduler_proxy import Step
from diffusion_opd.transitions import noised, ode
from examples.toy_world.demo import specialist
from examples.toy_world.pipeline import SAMPLING
from examples.toy_world.pretrain import encode_pictures
from examples.toy_world.world import TASKS, Task, draw, sample_prompts

SEED, SAMPLES = 99, 24


class State(NamedTuple):
    """One place of a walk, with the state that is asked about and the teacher's velocity there."""

    visit: Visit
    prompts: list[str]
    target: Tensor


def _policy(pipeline: StableDiffusion3Pipeline) -> Policy:
    arguments = dict(SAMPLING)
    return Policy(pipeline, arguments.pop("num_inference_steps"), arguments)


def _generators(prompts: list[str]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(SEED + i) for i in range(len(prompts))]


def _walk(policy: Policy, prompts: list[str]) -> list[Visit]:
    def move(step: Step) -> Tensor:
        return ode(step.sample, step.prediction, step.schedule, step.index).mean

    return list(policy.walk({"prompt": prompts}, _generators(prompts), move))


def _ask(policy: Policy, prompts: list[str], visits: list[Visit]) -> list[Tensor]:
    """What a policy predicts at the states of successive visits."""
    with policy.follow(inputs={"prompt": prompts}, generators=_generators(prompts)) as follow:
        return [follow(visit)[0] for visit in visits]


@cache
def _teacher(task: Task) -> Policy:
    return _policy(specialist(task))


@cache
@torch.no_grad()
def fixed_states(task: Task) -> dict[str, list[State]]:
    """States with the teacher's velocity there, by origin: `"teacher"`, `"real"`."""
    asked = sample_prompts(task, SAMPLES, SEED, heldout=True)
    prompts, teacher = [prompt.text for prompt in asked], _teacher(task)
    visits = _walk(teacher, prompts)
    states = {"teacher": [State(visit, prompts, visit.steps[0].prediction) for visit in visits]}

    rng, generator = np.random.default_rng(SEED), torch.Generator().manual_seed(SEED)
    latents = encode_pictures(teacher.pipeline, [draw(prompt, rng) for prompt in asked])
    real: list[Visit] = []
    for visit in reversed(visits):  # each goes to the next one
        (step,) = visit.steps
        noise = torch.randn(latents.shape, generator=generator)
        x, following = noised(latents, noise, step.schedule, step.index), real[0].steps[0].sample if real else None
        real.insert(0, replace(visit, steps=(replace(step, sample=x, next_sample=following),)))
    targets = _ask(teacher, prompts, real)
    states["real"] = [State(visit, prompts, target) for visit, target in zip(real, targets, strict=True)]
    return states


@torch.no_grad()
def gaps(pipeline: StableDiffusion3Pipeline, tasks: tuple[Task, ...] = TASKS) -> dict[str, dict[Task, float]]:
    """Mean squared velocity gap between a student and each task's teacher, by where it is measured: `"teacher"` and
    `"real"` (the same states for every student), `"own"`."""
    student = _policy(pipeline)

    def measured(origin: str, task: Task) -> Iterator[Tensor]:
        if origin == "own":
            prompts = [prompt.text for prompt in sample_prompts(task, SAMPLES, SEED, heldout=True)]
            visits = _walk(student, prompts)
            for visit, target in zip(visits, _ask(_teacher(task), prompts, visits), strict=True):
                yield velocity(visit.steps[0].prediction, target)
        else:
            states = fixed_states(task)[origin]
            predictions = _ask(student, states[0].prompts, [state.visit for state in states])
            for prediction, state in zip(predictions, states, strict=True):
                yield velocity(prediction, state.target)

    return {
        origin: {task: torch.stack(list(measured(origin, task))).mean().item() for task in tasks}
        for origin in ("teacher", "real", "own")
    }
