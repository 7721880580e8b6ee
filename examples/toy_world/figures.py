"""Draws the pictures of the toy world's README.

    python -m examples.toy_world.figures           # writes examples/toy_world/figures/{compose,text,style,edit}.png

A sheet for each task on twelve held-out prompts: what the task wants, what the base model makes, what the specialist
makes; above edits their sources. This module only shows; the scores come from `evaluate.py`.
"""

from pathlib import Path

import numpy as np

from examples.toy_world.evaluate import generate
from examples.toy_world.pipeline import TEACHERS, load_base
from examples.toy_world.pretrain import sheet
from examples.toy_world.world import TASKS, draw, edits, sample_prompts

FIGURES = Path(__file__).parent / "figures"
SEED = 1


if __name__ == "__main__":
    for task in TASKS:
        prompts = sample_prompts(task, 12, SEED, heldout=True)
        rng = np.random.default_rng(SEED)
        if task == "edit":
            rows = [list(column) for column in zip(*edits(prompts, SEED), strict=True)]
        else:
            rows = [[draw(prompt, rng) for prompt in prompts]]
        pipeline = load_base()
        rows.append(generate(pipeline, prompts, SEED))
        pipeline.load_lora_weights(TEACHERS / task, weight_name="pytorch_lora_weights.safetensors")
        rows.append(generate(pipeline, prompts, SEED))
        sheet(rows, FIGURES / f"{task}.png")
        print(f"{task}: " + " | ".join(prompt.text for prompt in prompts))
