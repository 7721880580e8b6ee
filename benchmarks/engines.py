"""
What an engine costs: time of an optimizer step with one process and with two (weak scaling: a process keeps its batch),
bytes of the tensors that a process holds after a step, bytes of those that it hands to collectives in it, and the time
of a checkpoint.

The toy world's student and its three LoRA teachers through the trainer itself, launched with the configs that the
package ships. On a CPU the engines run over gloo; FSDP2 under the patch that the tests use.

    python -m benchmarks.engines                        # all engines, LoRA and full students
    python -m benchmarks.engines --engines ddp zero3 --students full
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.cpu_engines import Wire, fsdp_on_cpu

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "diffusion_opd" / "accelerate_configs"
CONFIG = {"ddp": "multi_gpu", "zero1": "zero1", "zero2": "zero2", "zero3": "zero3", "fsdp2": "fsdp2"}
WARMUP = 2  # optimizer steps


def worker(options: argparse.Namespace) -> None:
    """One process of a run; the first writes what it saw."""
    uses_deepspeed = options.worker.startswith("zero")
    if options.worker == "fsdp2":
        fsdp_on_cpu()
    import torch
    from transformers import TrainerCallback

    from diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer
    from examples.toy_world.pipeline import BASE, TEACHERS
    from examples.toy_world.rewards import lora_config, sampling_kwargs, training_prompts
    from examples.toy_world.world import TASKS

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.times, self.wires, self.saves = [], [], []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.wire = Wire()
            self.wire.__enter__()
            self.started = time.perf_counter()

        def on_save(self, *args: Any, **kwargs: Any) -> None:
            self.saves.append(time.perf_counter() - self.ended)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.ended = time.perf_counter()
            self.times.append(self.ended - self.started)
            self.wire.__exit__(None, None, None)
            self.wires.append(sum(size for _, size in self.wire.counts.values()))

    watch = Watch()
    args = DiffusionOPDConfig(
        options.out,
        per_device_train_batch_size=options.batch,
        max_steps=WARMUP + options.repetitions,
        save_steps=1,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        image_steps=0,
        seed=options.seed,
        use_cpu=not uses_deepspeed and options.worker != "fsdp2",
        ddp_backend="gloo" if uses_deepspeed else None,
        **sampling_kwargs(),
    )
    trainer = DiffusionOPDTrainer(
        str(BASE),
        {task: str(TEACHERS / task) for task in TASKS},
        args,
        {task: training_prompts(task, args.seed) for task in TASKS},
        callbacks=[watch],
        peft_config=lora_config(16) if options.student == "lora" else None,
    )
    trainer.train()
    gc.collect()
    result = {
        "seconds": statistics.median(watch.times[WARMUP:]),
        "wire": statistics.median(watch.wires[WARMUP:]),
        "save": statistics.median(watch.saves[WARMUP:]),
        "held": bytes_of_tensors(torch),
    }
    if trainer.is_world_process_zero():
        Path(options.out, "result.json").write_text(json.dumps(result))
    trainer.end()


def bytes_of_tensors(torch: Any) -> int:
    """Of all tensors that are alive in this process (weights, gradients, optimizer), each storage once."""
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type != "meta":
            local = thing.to_local() if hasattr(thing, "to_local") else thing
            storage = local.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def launch(engine: str, processes: int, student: str, options: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable]
        if engine != "none":
            config = str(CONFIGS / f"{CONFIG[engine]}.yaml")
            command += ["-m", "accelerate.commands.launch", "--config_file", config]
            command += ["--num_processes", str(processes), "--main_process_port", "0"]
        command += ["-m", "benchmarks.engines", "--worker", engine, "--out", out]
        command += ["--student", student, "--batch", str(options.batch), "--seed", str(options.seed)]
        command += ["--repetitions", str(options.repetitions)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment |= {"DS_ACCELERATOR": "cpu"} if engine.startswith("zero") else {}
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-5000:])
        return json.loads(Path(out, "result.json").read_text())


def main(options: argparse.Namespace) -> None:
    from benchmarks.common import machine, torch

    print(machine(torch.device("cpu")))
    head = "student, engine | ms a step | in two processes | over one | MiB held | MiB in collectives | ms a checkpoint"
    print(f"\n| {head} |\n|---|---|---|---|---|---|---|")
    for student in options.students:
        for engine in options.engines:
            runs = {n: launch(engine, n, student, options) for n in ((1,) if engine == "none" else (1, 2))}
            one, two = runs[1], runs.get(2)
            cells = [f"{student}, {engine}", f"{one['seconds'] * 1000:.0f}"]
            cells += [f"{two['seconds'] * 1000:.0f}", f"{two['seconds'] / one['seconds']:.2f}"] if two else ["", ""]
            cells += [" / ".join(f"{run['held'] / 2**20:.1f}" for run in runs.values())]
            cells += [f"{two['wire'] / 2**20:.2f}" if two else ""]
            cells += [" / ".join(f"{run['save'] * 1000:.0f}" for run in runs.values())]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=["none", *CONFIG], default=["none", *CONFIG])
    parser.add_argument("--students", nargs="+", choices=["lora", "full"], default=["lora", "full"])
    parser.add_argument("--batch", type=int, default=4, help="prompts of a task, for each process")
    parser.add_argument("--repetitions", type=int, default=5, help="optimizer steps that are measured")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--student", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    worker(options) if options.worker else main(options)
