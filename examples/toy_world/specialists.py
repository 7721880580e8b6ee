"""Trains the specialists of the toy world from rewards: a LoRA for each task on the base model.

    python -m examples.toy_world.specialists              # all four, into examples/toy_world/assets/teachers
    python -m examples.toy_world.specialists --tasks text

First by fine-tuning on the pictures that its prompts want, then by DiffusionNFT, whose rewards are the judges. The
prompts are those that are not held out. A run that was killed goes on from its last checkpoint in `runs/toy_world`.
"""

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxKontextPipeline

from examples.toy_world.finetune import Pictures, finetune
from examples.toy_world.pipeline import TEACHERS, load_base
from examples.toy_world.rewards import lora_config, reinforce
from examples.toy_world.world import MORE_TASKS, TASKS, Task, draw, draw_badly, draw_edit, sample_prompts

RUNS = Path("runs/toy_world/specialists")

# First on pictures that are drawn by rule, so that rewards need not find what nobody has shown. A third of them are of
# the other tasks, as badly captioned as those of the base: what is shown well alone makes it listen better everywhere.
PICTURES, OTHERS, WELL = 4000, 0.33, 0.25
FINETUNING: dict[str, Any] = {"batch_size": 32, "peak_lr": 3e-3}
FINETUNING_STEPS: dict[Task, int] = {"compose": 150, "text": 100, "style": 100, "edit": 200}
# 6 groups of 8 samples an optimizer step
SHARED: dict[str, Any] = {"per_device_train_batch_size": 48, "num_generations": 8}
NFT = SHARED | {"learning_rate": 1e-3, "beta": 0.1, "old_decay_rate": 0.02}
GRPO = SHARED | {"learning_rate": 1e-3, "loss_type": "grpo_guard", "epsilon": 1e-3, "num_iterations": 2}
MAX_STEPS: dict[Task, int] = {"compose": 20, "text": 8, "style": 8, "edit": 20, "warm": 60, "dark": 32, "large": 20}
LORA_NAME = "pytorch_lora_weights.safetensors"


def shown(task: Task, pipeline: FluxKontextPipeline, n: int, seed: int, well: float) -> Pictures:
    """Pictures for training prompts of a task, a share of them as the prompt wants them."""
    prompts, rng = sample_prompts(task, n, seed), np.random.default_rng(seed)
    if task == "edit":
        pairs = [draw_edit(prompt, rng, well=bool(rng.random() < well)) for prompt in prompts]
        before, after = (list(column) for column in zip(*pairs, strict=True))
        return Pictures.of(pipeline, prompts, after, before)
    pictures = [(draw if rng.random() < well else draw_badly)(prompt, rng) for prompt in prompts]
    return Pictures.of(pipeline, prompts, pictures)


def show(task: Task, output_dir: Path, seed: int) -> None:
    """Fine-tunes the base on the pictures that the task's training prompts want, and on those of the other tasks as the
    base knows them."""
    pipeline, others = load_base(), [other for other in TASKS if other != task]
    kinds = [shown(task, pipeline, PICTURES, seed, 1.0)]
    kinds += [shown(other, pipeline, PICTURES // 4, seed, WELL) for other in others]
    shares = [1 - OTHERS, *[OTHERS / len(others)] * len(others)]
    finetune(pipeline, kinds, shares, lora_config(), output_dir, seed, FINETUNING_STEPS[task], **FINETUNING)


def train_specialist(task: Task, output_dir: Path, seed: int = 0) -> None:
    if task in MORE_TASKS:  # nothing is drawn for them
        reinforce("grpo", [task], output_dir, seed, max_steps=MAX_STEPS[task], **GRPO)
        return
    start = output_dir / "shown"
    if not (start / LORA_NAME).is_file():
        show(task, start, seed)
    reinforce("nft", [task], output_dir, seed, student_lora=start, max_steps=MAX_STEPS[task], **NFT)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the toy world's specialists from rewards.")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # two hardly help at this size, and starve what runs beside them
    for task in options.tasks:
        started = time.perf_counter()
        train_specialist(task, RUNS / task, options.seed)
        (TEACHERS / task).mkdir(parents=True, exist_ok=True)
        shutil.copy(RUNS / task / LORA_NAME, TEACHERS / task)
        print(f"{task}: {time.perf_counter() - started:.0f} s", flush=True)
