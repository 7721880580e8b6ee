"""Scores a pipeline on held-out prompts of the toy world.

    python -m examples.toy_world.evaluate             # the base and the specialists
    python -m examples.toy_world.evaluate FOLDER ...  # these LoRAs on the base
    python -m examples.toy_world.evaluate --kinds     # a table for each task, by kind of prompt

The same prompts and the same initial noise for every model, so that models are compared picture by picture. This module
knows pipelines and judges, and nothing of how a model was trained.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxKontextPipeline
from PIL import Image

from examples.toy_world.judges import scores
from examples.toy_world.pipeline import SAMPLING, TEACHERS, load_base
from examples.toy_world.world import TASKS, Prompt, Task, reworded, sample_prompts, sources

SEED = 1234


def inputs(prompts: list[Prompt], seed: int = SEED) -> dict[str, list[Any]]:
    """What a pipeline is given for each sample: the prompts of a task, and the pictures that instructions are about."""
    images = sources(prompts, seed)
    return {"prompt": [prompt.text for prompt in prompts]} | ({"image": images} if images else {})


def generate(
    pipeline: FluxKontextPipeline, prompts: list[Prompt], seed: int = SEED, batch_size: int = 30, **sampling
) -> list[Image.Image]:
    """A picture for every prompt of a task; the noise of the i-th, and its source, depend on `seed` and i only."""
    pictures, given = [], inputs(prompts, seed)
    for start in range(0, len(prompts), batch_size):
        batch = {name: values[start : start + batch_size] for name, values in given.items()}
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch["prompt"]))]
        pictures += pipeline(**batch, generator=generators, **SAMPLING | sampling).images
    return pictures


def judged(
    pipeline: FluxKontextPipeline,
    task: Task,
    n: int,
    seed: int,
    in_other_words: bool = False,
    words: Mapping[Task, str] | None = None,
    **sampling: Any,
) -> list[tuple[Prompt, float]]:
    """`n` held-out prompts of a task, which the pipeline is given as they are or `reworded`, and behind the task's word
    if it has one in `words`, with the scores of what it draws. `sampling` overrides the world's settings."""
    prompts = sample_prompts(task, n, seed, heldout=True)
    asked = [reworded(prompt) for prompt in prompts] if in_other_words else prompts
    if words and task in words:
        asked = [replace(prompt, text=f"{words[task]} {prompt.text}") for prompt in asked]
    pictures = generate(pipeline, asked, seed, **sampling)
    return list(zip(prompts, scores(pictures, prompts, sources(prompts, seed)), strict=True))


def evaluate(
    pipeline: FluxKontextPipeline, n: int = 120, seed: int = SEED, tasks: tuple[Task, ...] = TASKS, **how: Any
) -> dict[Task, float]:
    """The mean score on `n` held-out prompts of each task; `how` as in `judged`."""
    return {task: float(np.mean([score for _, score in judged(pipeline, task, n, seed, **how)])) for task in tasks}


def by_kind(pipeline: FluxKontextPipeline, n: int = 120, seed: int = SEED, **how: Any) -> dict[str, float]:
    """The same by kind of prompt, of which each task has several."""
    found: dict[str, list[float]] = {}
    for task in TASKS:
        for prompt, score in judged(pipeline, task, n, seed, **how):
            found.setdefault(prompt.kind, []).append(score)
    return {kind: float(np.mean(values)) for kind, values in found.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Score LoRAs of the toy world's base model.")
    parser.add_argument("loras", nargs="*", help="LoRA folders (default: the specialists)")
    parser.add_argument("-n", type=int, default=120, help="held-out prompts of each task")
    parser.add_argument("--kinds", action="store_true", help="by kind of prompt")
    parser.add_argument("--num-inference-steps", type=int, default=SAMPLING["num_inference_steps"])
    parser.add_argument("--true-cfg-scale", type=float, default=1.0, help="classifier-free guidance (default: none)")
    parser.add_argument("--reworded", action="store_true", help="the same prompts in other words")
    args = parser.parse_args()
    how: dict[str, Any] = {"in_other_words": args.reworded, "num_inference_steps": args.num_inference_steps}
    if args.true_cfg_scale != 1:
        how |= {"true_cfg_scale": args.true_cfg_scale, "negative_prompt": ""}
    for i, lora in enumerate([None, *(args.loras or [TEACHERS / task for task in TASKS])]):
        pipeline = load_base()
        if lora:
            pipeline.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")
        means = (by_kind if args.kinds else evaluate)(pipeline, args.n, **how)
        if i == 0:
            print(f"| model | {' | '.join(means)} |\n|---|{'---|' * len(means)}")
        cells = [Path(lora).name if lora else "base", *(f"{mean:.3f}" for mean in means.values())]
        print(f"| {' | '.join(cells)} |", flush=True)
