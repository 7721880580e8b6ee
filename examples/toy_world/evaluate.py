"""Scores a pipeline on held-out prompts of the toy world.

    python -m examples.toy_world.evaluate             # the base and the three specialists
    python -m examples.toy_world.evaluate FOLDER ...  # these LoRAs on the base

The same prompts and the same initial noise for every model, so that models are compared picture by picture. This module
knows pipelines and judges, and nothing of how a model was trained.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

from examples.toy_world.judges import JUDGES
from examples.toy_world.pipeline import SAMPLING, TEACHERS, load_base
from examples.toy_world.world import TASKS, Prompt, Task, sample_prompts

SEED = 1234


def generate(
    pipeline: StableDiffusion3Pipeline, prompts: list[Prompt], seed: int = SEED, batch_size: int = 30, **sampling
) -> list[Image.Image]:
    """A picture for every prompt; the noise of the i-th depends on `seed` and i only."""
    pictures = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))]
        pictures += pipeline([p.text for p in batch], generator=generators, **SAMPLING | sampling).images
    return pictures


def evaluate(
    pipeline: StableDiffusion3Pipeline, n: int = 120, seed: int = SEED, tasks: tuple[Task, ...] = TASKS, **sampling
) -> dict[Task, float]:
    """The mean score on `n` held-out prompts of each task. `sampling` overrides the world's settings."""
    scores = {}
    for task in tasks:
        prompts = sample_prompts(task, n, seed, heldout=True)
        pictures = generate(pipeline, prompts, seed, **sampling)
        scores[task] = float(np.mean([JUDGES[task](im, p) for im, p in zip(pictures, prompts, strict=True)]))
    return scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Score LoRAs of the toy world's base model.")
    parser.add_argument("loras", nargs="*", help="LoRA folders (default: the specialists)")
    parser.add_argument("-n", type=int, default=120, help="held-out prompts of each task")
    parser.add_argument("--guidance-scale", type=float, default=SAMPLING["guidance_scale"])
    args = parser.parse_args()
    print("| model | " + " | ".join(TASKS) + " |\n|---|" + "---|" * len(TASKS))
    for lora in [None, *(args.loras or [TEACHERS / task for task in TASKS])]:
        pipeline = load_base()
        if lora:
            pipeline.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")
        scores = evaluate(pipeline, args.n, guidance_scale=args.guidance_scale)
        row = [Path(lora).name if lora else "base", *(f"{scores[task]:.3f}" for task in TASKS)]
        print(f"| {' | '.join(row)} |", flush=True)
