"""
One walk for the samples of all tasks (`task_sampling="mixed"`) against one for each task: CPU time of an optimizer step
on the toy world's pipeline, encoders included, with three LoRA teachers. The ways take turns.

    python -m benchmarks.mixed --samples 1 4
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from benchmarks.common import LORA_TARGETS, machine, ratios, spread
from diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer
from examples.toy_world.pipeline import SAMPLING, untrained_pipeline

TASKS = ("compose", "text", "style")
WARMUP = 1


class Clock(TrainerCallback):
    """Wall and CPU seconds of each optimizer step after the first."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > WARMUP:
            self.steps.append((time.perf_counter() - self._began[0], time.process_time() - self._began[1]))


def steps_of(sampling: str, samples: int, repetitions: int, seed: int) -> list[tuple[float, float]]:
    """Of a short run with so many samples of each task in an optimizer step."""
    lora = LoraConfig(r=32, lora_alpha=64, target_modules=[f"attn.{target}" for target in LORA_TARGETS])
    call, clock = dict(SAMPLING), Clock()
    fields = {key: call.pop(key) for key in ("num_inference_steps", "height", "width")}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        lora.init_lora_weights = False
        for task in TASKS:
            get_peft_model(untrained_pipeline(seed).transformer, lora).save_pretrained(Path(folder, task))
        lora.init_lora_weights = "gaussian"
        DiffusionOPDTrainer(
            untrained_pipeline(seed),
            {task: str(Path(folder, task)) for task in TASKS},
            DiffusionOPDConfig(
                folder,
                **fields,
                call_kwargs=call,
                task_sampling=sampling,
                per_device_train_batch_size=samples * (len(TASKS) if sampling == "mixed" else 1),
                max_steps=WARMUP + repetitions,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                image_steps=0,
                use_cpu=True,
                seed=seed,
            ),
            train_dataset={
                task: Dataset.from_dict({"prompt": [f"{i} red circles" for i in range(64)]}) for task in TASKS
            },
            peft_config=lora,
            callbacks=[clock],
        ).train()
    return clock.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 4], help="of each task")
    parser.add_argument("--repetitions", type=int, default=4, help="optimizer steps of a turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(machine(torch.device("cpu")))
    print("\n| samples of each task | one walk a task, CPU ms | mixed, CPU ms | mixed over one walk a task |")
    print("|---|---|---|---|")
    for samples in options.samples:
        found: dict[str, list[tuple[float, float]]] = {"cycle": [], "mixed": []}
        for _ in range(options.turns):
            for sampling, steps in found.items():
                steps += steps_of(sampling, samples, options.repetitions, options.seed)
        cycle, mixed = ([1000 * cpu for _, cpu in steps] for steps in found.values())
        over = ratios(found["mixed"], found["cycle"], clock=1)
        print(f"| {samples} | {spread(cycle, '.0f')} | {spread(mixed, '.0f')} | {spread(over)} |")


if __name__ == "__main__":
    main()
