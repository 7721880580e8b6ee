"""What on-policy distillation is compared with: the same teachers, without the student's own states."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxKontextPipeline
from torch import Tensor, nn

from diffusion_opd import DiffusionOPDTrainer
from diffusion_opd.inputs import inputs_of
from diffusion_opd.sampling import MicroBatch
from examples.toy_world.demo import specialist
from examples.toy_world.evaluate import generate
from examples.toy_world.finetune import Pictures, finetune
from examples.toy_world.pipeline import load_base
from examples.toy_world.rewards import lora_config
from examples.toy_world.world import TASKS, sample_prompts, sources


class OffPolicyTrainer(DiffusionOPDTrainer):
    """The same losses at the states of the TEACHER's trajectories: the teacher moves, the student follows."""

    def training_step(self, model: nn.Module, inputs: MicroBatch, num_items_in_batch: Any = None) -> Tensor:
        self._begin_micro_batch(model)
        asked, task = inputs_of(inputs, self.data.columns), inputs[0]["teacher_id"]
        generators = self._generators(len(inputs), 0, inputs.step, self.tasks.index(task), inputs.turns[0])
        scale = 1 / (len(self.learnt) * self.current_gradient_accumulation_steps)
        losses = []
        with (
            self.teachers.on_device(task) as teacher,
            teacher.walk(asked, generators, self._move(generators)) as walk,
            self.student.policy.follow(walk, denoiser=model) as follow,
        ):
            for visit in walk.visits(self.learnt):
                answers = {"teacher": tuple(step.prediction.detach() for step in visit.steps)}
                own = zip(visit.steps, follow(visit), strict=True)
                visit = replace(visit, steps=tuple(replace(step, prediction=prediction) for step, prediction in own))
                terms = self.loss(task, visit, answers)
                self._backward(terms.loss.mean() * scale)
                losses.append(terms.loss.mean().detach())
                self._note(task, visit, answers, terms)
        self._end_micro_batch()
        return torch.stack(losses).mean() / self.current_gradient_accumulation_steps


def finetune_on_samples(
    output_dir: Path, seed: int, samples: int, max_steps: int, batch_size: int, peak_lr: float
) -> FluxKontextPipeline:
    """Flow matching on `samples` pictures of each teacher, for prompts of its own task (SFT)."""
    pipeline, kinds, noise = load_base(), [], 10_000 * (seed + 1)
    for task in TASKS:
        asked = sample_prompts(task, samples, seed)
        pictures = generate(specialist(task), asked, seed=noise)
        kinds.append(Pictures.of(pipeline, asked, pictures, sources(asked, noise)))
    shares = [1 / len(kinds)] * len(kinds)
    return finetune(pipeline, kinds, shares, lora_config(rank=32), output_dir, seed, max_steps, batch_size, peak_lr)


def fused(lora: Path, pipeline: FluxKontextPipeline) -> FluxKontextPipeline:
    """The pipeline with the student of a finished run in its weights, as the base of another run."""
    pipeline.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return pipeline
