"""Trains the three specialists of the toy world from rewards: a LoRA for each task on the base model.

    python -m examples.toy_world.specialists              # all three, into examples/toy_world/assets/teachers
    python -m examples.toy_world.specialists --tasks text

As in the DiffusionOPD paper: DiffusionNFT for composition, GRPO-Guard for the other two. The rewards are the judges,
the prompts those that are not held out. A run that was killed goes on from its last checkpoint in `runs/toy_world`.
"""

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from examples.toy_world.pipeline import TEACHERS
from examples.toy_world.rewards import reinforce
from examples.toy_world.world import TASKS, Task

RUNS = Path("runs/toy_world/specialists")

# 6 groups of 8 samples an optimizer step
SHARED: dict[str, Any] = {"per_device_train_batch_size": 48, "num_generations": 8}
# Freer (beta 1e-4, old_decay_rate 0.001) compose scores 0.71 instead of 0.58 and draws nearly everything in blue: a
# clean shape in the wrong colour is most of the reward
NFT = SHARED | {"learning_rate": 1e-3, "beta": 0.5, "old_decay_rate": 0.02}
GRPO = SHARED | {"learning_rate": 1e-3, "loss_type": "grpo_guard", "epsilon": 1e-3, "num_iterations": 2}
# After 80 steps style scores 0.998 instead of 0.895, and its things have melted into the sky
MAX_STEPS: dict[Task, int] = {"compose": 150, "text": 150, "style": 30, "warm": 60, "dark": 32, "large": 20}
LORA_NAME = "pytorch_lora_weights.safetensors"


def train_specialist(task: Task, output_dir: Path, seed: int = 0) -> None:
    algorithm, settings = ("nft", NFT) if task == "compose" else ("grpo", GRPO)
    reinforce(algorithm, [task], output_dir, seed, max_steps=MAX_STEPS[task], **settings)


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
