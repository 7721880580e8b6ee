"""One small run that may end itself at a chosen place; each process writes what it saw to `seen_<rank>.pt`.

test_durable.py calls `run` in processes of its own, or starts this file with torchrun:
`torchrun ... durable_run.py OUT --die save:2`.
"""

import argparse
import io
import math
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tests import conftest  # noqa: F401  (no network, one thread)

# isort: split
import numpy as np
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback, TrainerState

import diffusion_opd
from diffusion_opd.checkpoints import FILES_NAME
from diffusion_opd.rl.trainer import Rollout
from tests.cpu_engines import fsdp_on_cpu, leave
from tests.tiny_pipelines import BUILDERS, CALL, LORA_TARGETS

CONFIGS = Path(diffusion_opd.__file__).with_name("accelerate_configs")
DEATH = 4  # the optimizer step of it
TASKS = ("a", "b")


def redness(images, prompts, **kwargs):
    pictures = np.stack([np.asarray(image, dtype=float) for image in images])
    return (pictures[..., 0] - pictures[..., 2]).mean((1, 2)) / 255


def halve(path: str | os.PathLike | io.IOBase) -> None:
    if isinstance(path, io.IOBase):
        path.flush()
        path = path.name
    os.truncate(path, os.path.getsize(path) // 2)


def enter(engine: str) -> None:
    """Tells this process what `accelerate launch` would with the config that the package ships."""
    command = ["--config_file", str(CONFIGS / f"{engine}.yaml"), "--num_processes", "2", __file__]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    if engine.startswith("zero"):
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        os.environ.update(prepare_deepspeed_cmd_env(args)[1], DS_ACCELERATOR="cpu")
    else:
        os.environ.update(prepare_multi_gpu_env(args))
        fsdp_on_cpu()


class Die(TrainerCallback):
    """Ends the process with a signal in optimizer step `DEATH`, at a `place`.

    "rollout:<n>": after the n-th forward pass of the student. "optimizer": when the weights are updated. "save:<n>":
    the n-th file that torch saves is half written. "list", "state": the same of checkpoint_files.json and
    trainer_state.json. "rotate": an old checkpoint has lost its first file. With `of_all` the signal goes to torchrun.
    """

    def __init__(self, place: str, end_with: int, of_all: bool):
        self.place, _, number = place.partition(":")
        self.countdown, self.end_with, self.of_all = int(number or 1), end_with, of_all

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        def count(*_):
            if state.global_step == DEATH - 1:
                self.count()

        if self.place == "rollout":
            model.register_forward_hook(count)
        if self.place == "optimizer":
            optimizer.optimizer.register_step_post_hook(count)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step != DEATH:
            return
        if self.place == "save":
            torch.save = self.torn(torch.save, lambda _, path: path)
        if self.place == "list":
            Path.replace = self.torn(Path.replace, lambda _, path: path if path.name == FILES_NAME else None)
        if self.place == "state":
            TrainerState.save_to_json = self.torn(TrainerState.save_to_json, lambda _, path: path)
        if self.place == "rotate":
            Path.unlink = self.torn(Path.unlink, lambda path, **_: path if path.name == "scheduler.pt" else None, None)

    def torn(self, function: Callable, path_of: Callable, harm: Callable | None = halve) -> Callable:
        def wrapped(*args, **kwargs):
            result = function(*args, **kwargs)
            if path := path_of(*args):
                self.count(lambda: harm and harm(path))
            return result

        return wrapped

    def count(self, harm: Callable = lambda: None) -> None:
        self.countdown -= 1
        if self.countdown == 0:
            harm()
            os.kill(os.getppid() if self.of_all else os.getpid(), self.end_with)
            listener = signal.getsignal(signal.SIGTERM).__self__
            while not listener.is_checkpoint_requested:  # transformers waits before it minds a SIGTERM
                time.sleep(0.05)


class Poison(TrainerCallback):
    """Makes NaN of what a module predicts, in some optimizer steps."""

    def __init__(self, steps: tuple[int, ...]):
        self.steps, self.now = steps, False

    def of(self, module: torch.nn.Module) -> "Poison":
        module.register_forward_hook(lambda _, inputs, output: (output[0] * math.nan,) if self.now else None)
        return self

    def on_step_begin(self, args, state, control, **kwargs):
        self.now = state.global_step + 1 in self.steps

    def on_step_end(self, args, state, control, **kwargs):
        self.now = False


class FullDisk(TrainerCallback):
    """From optimizer step `DEATH` on no file can become larger than so many bytes."""

    def __init__(self, size: int):
        self.size = size

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == DEATH:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


class Watch(TrainerCallback):
    """Where a run begins, and which prompts it learns from."""

    def __init__(self):
        self.begins_at, self.prompts = None, []

    def on_train_begin(self, args, state, control, **kwargs):
        self.begins_at = state.global_step


def run(
    out: Path,
    method: str = "opd",
    die: str | None = None,
    end_with: int = signal.SIGKILL,
    dying_rank: int = 0,
    of_all: bool = False,
    disk: int | None = None,
    rank: int | None = None,
    world: int = 2,
    port: int = 0,
    resume: bool | str | None = None,
    poisoned: tuple[int, tuple[int, ...]] | None = None,
    end: bool = False,
    engine: str | None = None,
    **settings,
) -> None:
    if rank is not None:  # as torchrun would
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), **address)
    if engine is not None:
        enter(engine)
        settings = dict(use_cpu=False, ddp_backend="gloo" if engine.startswith("zero") else None) | settings
    rank = int(os.environ.get("RANK", 0))
    call = dict(CALL["sd3"])
    settings = (
        dict(
            per_device_train_batch_size=2,
            max_steps=5,
            logging_steps=1,
            save_steps=1,
            report_to="none",
            learning_rate=1e-3,
            num_inference_steps=4,
            disable_tqdm=True,
            image_steps=0,
            use_cpu=True,
            ema_decay=0.8,
            ema_update_every=1,
        )
        | settings
    )
    if method == "opd":
        config_class, trainer_class = diffusion_opd.DiffusionOPDConfig, diffusion_opd.DiffusionOPDTrainer
        judges = {"a": BUILDERS["sd3"](1), "b": BUILDERS["sd3"](2)}
        settings = dict(transition="flow_sde", call_kwargs=call) | settings
    else:
        # Two optimizer steps on each rollout, so that an odd one is in the middle
        name = {"nft": "DiffusionNFT", "grpo": "DiffusionGRPO"}[method]
        config_class, trainer_class = (getattr(diffusion_opd, f"{name}{part}") for part in ("Config", "Trainer"))
        judges = dict.fromkeys(TASKS, redness)
        call.pop("guidance_scale")
        settings = dict(num_generations=2, num_iterations=2, guidance_scale=1.0, call_kwargs=call) | settings
    watch = Watch()
    trainer = trainer_class(
        BUILDERS["sd3"](0),
        judges,
        config_class(str(out / "run"), **settings),
        train_dataset={task: Dataset.from_dict({"prompt": [f"{task} {i}" for i in range(12)]}) for task in TASKS},
        callbacks=[watch, *([Die(die, end_with, of_all)] if die and rank == dying_rank else [])],
        peft_config=LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian", target_modules=LORA_TARGETS),
    )
    if poisoned is not None and rank == poisoned[0]:  # the teacher of one process, at some steps
        trainer.add_callback(Poison(poisoned[1]).of(trainer.teachers["b"].denoiser))
    step = trainer.training_step

    def watched_step(model, inputs, *args):
        rollouts = inputs if isinstance(inputs[0], Rollout) else []
        rows = [row["prompt"] for row in inputs] if not rollouts else []
        watch.prompts.append(rows + [prompt for rollout in rollouts for prompt in rollout.inputs["prompt"]])
        return step(model, inputs, *args)

    trainer.training_step = watched_step
    if disk is not None:
        trainer.add_callback(FullDisk(disk))
    try:
        trainer.train(resume_from_checkpoint=resume)
    except Exception:
        (out / f"error_{rank}.txt").write_text(traceback.format_exc())
        raise
    with trainer.trained_shards() as shards:
        pass
    seen = {
        "begins_at": watch.begins_at,
        "ends_at": trainer.state.global_step,
        "prompts": watch.prompts,
        "weights": [shard.detach().clone() for shard in shards],
        "average": [p.detach() for p in trainer.ema.shadow_params],
        "log": [
            {key: value for key, value in entry.items() if not key.startswith("time/") and "per_second" not in key}
            for entry in trainer.state.log_history
            if "loss" in entry
        ],
    }
    torch.save(seen, out / f"seen_{rank}.pt")
    if end:
        trainer.end()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--die")
    parser.add_argument("--end_with", type=int, default=signal.SIGKILL)
    parser.add_argument("--of_all", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--enable_jit_checkpoint", action="store_true")
    parser.add_argument("--save_strategy", default="steps")
    run(**vars(parser.parse_args()), end=True)
    leave()
