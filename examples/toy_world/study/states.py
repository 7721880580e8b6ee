"""How far a student is from its teachers, at fixed states and at its own.

The KL at the states that a student visits itself is what it is trained on, and misleads as a metric: another student
visits others. The fixed states are those of the teachers' own rollouts, and noised real pictures.
"""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from diffusion_opd.objectives import velocity
from diffusion_opd.policy import Policy, Step
from diffusion_opd.transitions import noised, ode
from examples.toy_world.demo import specialist
from examples.toy_world.pipeline import SAMPLING
from examples.toy_world.pretrain import encode_pictures
from examples.toy_world.world import TASKS, Task, draw, sample_prompts

SEED, SAMPLES = 99, 24


class State(NamedTuple):
    x: Tensor
    timestep: Tensor
    prompts: list[str]
    target: Tensor


def _policy(pipeline: StableDiffusion3Pipeline) -> Policy:
    arguments = dict(SAMPLING)
    return Policy(pipeline, arguments.pop("num_inference_steps"), arguments)


def _rollout(policy: Policy, prompts: list[str]) -> list[Step]:
    steps = []

    def visit(step: Step) -> Tensor:
        steps.append(step)
        return ode(step.sample, step.prediction, step.schedule, step.index).mean

    policy.rollout(prompts, [torch.Generator().manual_seed(SEED + i) for i in range(len(prompts))], visit)
    return steps


@cache
def _teacher(task: Task) -> Policy:
    return _policy(specialist(task))


@cache
@torch.no_grad()
def fixed_states(task: Task) -> dict[str, list[State]]:
    """States with the teacher's velocity there, by origin: `"teacher"`, `"real"`."""
    asked = sample_prompts(task, SAMPLES, SEED, heldout=True)
    prompts, teacher = [prompt.text for prompt in asked], _teacher(task)
    steps = _rollout(teacher, prompts)
    states = {"teacher": [State(step.sample, step.timestep, prompts, step.prediction) for step in steps]}

    rng, generator = np.random.default_rng(SEED), torch.Generator().manual_seed(SEED)
    latents = encode_pictures(teacher._pipeline, [draw(prompt, rng) for prompt in asked])
    states["real"] = []
    for step in steps:
        x = noised(latents, torch.randn(latents.shape, generator=generator), step.schedule, step.index)
        states["real"].append(State(x, step.timestep, prompts, teacher.predict(x, step.timestep, prompts)))
    return states


@torch.no_grad()
def gaps(pipeline: StableDiffusion3Pipeline, tasks: tuple[Task, ...] = TASKS) -> dict[str, dict[Task, float]]:
    """Mean squared velocity gap between a student and each task's teacher, by where it is measured: `"teacher"` and
    `"real"` (the same states for every student), `"own"`."""
    student = _policy(pipeline)

    def measured(origin: str, task: Task) -> Iterator[Tensor]:
        if origin == "own":
            prompts = [prompt.text for prompt in sample_prompts(task, SAMPLES, SEED, heldout=True)]
            for step in _rollout(student, prompts):
                yield velocity(step.prediction, _teacher(task).predict(step.sample, step.timestep, prompts))
        else:
            for x, timestep, prompts, target in fixed_states(task)[origin]:
                yield velocity(student.predict(x, timestep, prompts), target)

    return {
        origin: {task: torch.stack(list(measured(origin, task))).mean().item() for task in tasks}
        for origin in ("teacher", "real", "own")
    }
