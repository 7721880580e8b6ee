"""What on-policy distillation is compared with: the same teachers, without the student's own states."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import get_peft_model_state_dict
from torch import Tensor, nn

from diffusion_opd import DiffusionOPDTrainer
from diffusion_opd.sampling import MicroBatch
from examples.toy_world.demo import specialist
from examples.toy_world.evaluate import generate
from examples.toy_world.pipeline import load_base
from examples.toy_world.pretrain import encode_captions, encode_pictures, flow_matching_loss, one_cycle
from examples.toy_world.rewards import lora_config
from examples.toy_world.world import TASKS, sample_prompts


class OffPolicyTrainer(DiffusionOPDTrainer):
    """The same losses at the states of the TEACHER's trajectories: the teacher moves, the student follows."""

    def training_step(self, model: nn.Module, inputs: MicroBatch, num_items_in_batch: Any = None) -> Tensor:
        self._begin_micro_batch(model)
        prompts, task = [example["prompt"] for example in inputs], inputs[0]["teacher_id"]
        generators = self._generators(len(inputs), 0, inputs.step, self.tasks.index(task), inputs.turns[0])
        scale = 1 / (len(self.learnt) * self.current_gradient_accumulation_steps)
        losses = []
        with (
            self.teachers.on_device(task) as teacher,
            teacher.walk({"prompt": prompts}, generators, self._move(generators)) as walk,
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
) -> StableDiffusion3Pipeline:
    """Flow matching on `samples` pictures of each teacher, for prompts of its own task (SFT)."""
    pipeline = load_base()
    transformer = pipeline.transformer.requires_grad_(False)
    torch.manual_seed(seed)
    transformer.add_adapter(lora_config(rank=32))
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak_lr, weight_decay=0.0)

    prompts, latents = [], []
    for task in TASKS:
        asked = sample_prompts(task, samples, seed)
        latents.append(encode_pictures(pipeline, generate(specialist(task), asked, seed=10_000 * (seed + 1))))
        prompts += [prompt.text for prompt in asked]
    latents = torch.cat(latents)
    with torch.no_grad():
        tokens, pooled = encode_captions(pipeline, prompts)

    rng = np.random.default_rng(seed)
    for step in range(max_steps):
        rows = torch.from_numpy(rng.integers(len(latents), size=batch_size))
        flow_matching_loss(transformer, latents[rows], tokens[rows], pooled[rows]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step, max_steps, peak_lr)
        optimizer.step()
        optimizer.zero_grad()
    pipeline.save_lora_weights(
        output_dir,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        **_collate_lora_metadata({"transformer": transformer}),
    )
    return pipeline


def fused(lora: Path, pipeline: StableDiffusion3Pipeline) -> StableDiffusion3Pipeline:
    """The pipeline with the student of a finished run in its weights, as the base of another run."""
    pipeline.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return pipeline
