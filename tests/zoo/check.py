"""Whether a pipeline class trains, asked of one of tiny parts: its gradient beside that of two passes of the plain
pipeline, one sample a call, under its own scheduler; a teacher of the same weights has nothing to teach; what is saved
loads in plain diffusers.

    python -m tests.zoo.check FluxPipeline WanPipeline   # a line each; --traceback for what was raised
"""

import argparse
import contextlib
import copy
import inspect
import json
import logging
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
warnings.filterwarnings("ignore")

import diffusers
import torch
import transformers
from datasets import Dataset
from diffusers import DDIMScheduler, DiffusionPipeline, EDMEulerScheduler, ModularPipeline
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback

from diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer, Teacher
from diffusion_opd.inputs import sample_arguments
from diffusion_opd.sampling import seed_of
from tests.zoo import ZOO, Tiny

STEPS = 4
GUIDANCE = ("guidance_scale", "true_cfg_scale", "cfg", "video_cfg_guidance_scale")


class Stepped(NamedTuple):
    """What reached the `step` of a scheduler, and where it led; `visit` counts calls of the denoiser between."""

    visit: int
    sample: Tensor
    prediction: Tensor
    next_sample: Tensor


def denoisers(pipe: DiffusionPipeline) -> list[nn.Module]:
    names = ("transformer", "transformer_2", "unet")
    return [p for p in (getattr(pipe, name, None) for name in names) if isinstance(p, nn.Module)]


def plain_run(
    pipe: DiffusionPipeline,
    arguments: dict[str, Any],
    seed: int,
    along: Sequence[Stepped] | None = None,
    gradient: bool = False,
) -> list[Stepped]:
    """The unmodified pipeline under its own scheduler; `along` the states of another run, if there is one."""
    arguments = copy.deepcopy(arguments)  # Z-Image writes into the lists that it is given
    seen: list[Stepped] = []
    visit, is_new = -1, True

    def called(*args: Any) -> None:
        nonlocal visit, is_new
        if is_new:
            visit, is_new = visit + 1, False

    cls = type(pipe.scheduler)
    own_step = cls.step

    def step(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal is_new
        if (
            "Cosmos" in type(pipe).__name__
            and isinstance(self, EDMEulerScheduler)
            and "pred_original_sample" not in kwargs
        ):
            return own_step(self, model_output, timestep, sample, *args, **kwargs)  # for the clean sample
        is_new = True
        visited = sample.detach().clone()
        with torch.no_grad():
            whole = kwargs | {"return_dict": False}
            next_sample, *rest = own_step(self, model_output.detach(), timestep, sample.detach(), *args, **whole)
        if along is not None:
            torch.testing.assert_close(visited, along[len(seen)].sample)
            next_sample = along[len(seen)].next_sample
        for part in pipe.components.values():  # what a guider remembers has no gradient
            average = getattr(getattr(part, "momentum_buffer", None), "running_average", None)
            if isinstance(average, Tensor):
                part.momentum_buffer.running_average = average.detach()
        seen.append(Stepped(visit, visited, model_output if gradient else model_output.detach(), next_sample.clone()))
        if kwargs.get("return_dict", True):
            return SimpleNamespace(prev_sample=next_sample.clone())
        return (next_sample.clone(), *rest)

    hooks = [part.register_forward_pre_hook(called) for part in denoisers(pipe)]
    is_modular = isinstance(pipe, ModularPipeline)
    takes_steps = is_modular or "num_inference_steps" in inspect.signature(type(pipe).__call__).parameters
    method = type(pipe).__call__
    if is_modular:
        pipe, arguments = guided(pipe, arguments)
        method = ModularPipeline.__call__
    elif gradient:
        method = method.__wrapped__
    try:
        with (
            patch.object(cls, "step", step),
            torch.random.fork_rng(devices=[]),
            no_no_grad() if is_modular and gradient else contextlib.nullcontext(),
        ):
            torch.manual_seed(seed)
            generator = torch.Generator().manual_seed(seed)
            method(
                pipe,
                **arguments,
                **({"num_inference_steps": STEPS} if takes_steps else {}),
                generator=generator if isinstance(arguments["prompt"], str) else [generator],
                output_type="pil" if is_modular else "latent",  # not all modular ones know latents
            )
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def guided(pipe: ModularPipeline, arguments: dict[str, Any]) -> tuple[ModularPipeline, dict[str, Any]]:
    """A modular pipeline as its users set its guidance: by a guider."""
    pipe, arguments = copy.copy(pipe), dict(arguments)
    if "guidance_scale" in arguments and "guidance_scale" not in pipe.blocks.input_names:
        scale = arguments.pop("guidance_scale")
        for name in [name for name in pipe.components if "guider" in name]:
            vars(pipe)[name] = pipe.get_component_spec(name).create(guidance_scale=scale)
    return pipe, arguments


@contextlib.contextmanager
def no_no_grad() -> Iterator[None]:
    """Each block of a modular pipeline has its own."""
    nothing = lambda *args: None  # noqa: E731
    with patch.object(torch.no_grad, "__enter__", nothing), patch.object(torch.no_grad, "__exit__", nothing):
        yield


def two_passes(student: Any, teacher: Any, rows: list[dict[str, Any]], tiny: Tiny, call: dict, theirs: dict) -> Tensor:
    """Mean squared error of the predictions at each state that the student visits, one sample a call."""
    loss = torch.zeros(())
    for index, row in enumerate(rows):
        seed = seed_of(42, 0, 0, 0, index)
        arguments = {"prompt": row["prompt"] if tiny.bare else [row["prompt"]]} | {
            name: row[name] for name in tiny.inputs
        }
        walked = plain_run(student, {**arguments, **call}, seed)
        targets = plain_run(teacher, {**arguments, **theirs}, seed, walked)
        own = plain_run(student, {**arguments, **call}, seed, walked, gradient=True)
        visits: dict[int, list[Tensor]] = {}
        for mine, target in zip(own, targets, strict=True):
            gap = (mine.prediction.float() - target.prediction.float()).square().mean()
            visits.setdefault(mine.visit, []).append(gap)
        loss = loss + torch.stack([torch.stack(gaps).mean() for gaps in visits.values()]).mean() / len(rows)
    return loss


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Trainer(DiffusionOPDTrainer):
    def training_step(self, model: nn.Module, inputs: Any, *args: Any) -> Tensor:
        self.batch = inputs
        return super().training_step(model, inputs, *args)


def as_ours(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """VP models run under DDIM."""
    config = pipe.scheduler.config
    if hasattr(pipe.scheduler, "alphas_cumprod") and "flow" not in str(config.get("prediction_type")):
        if type(pipe.scheduler) is not DDIMScheduler and "CogVideoX" not in type(pipe.scheduler).__name__:
            clips = config.get("clip_sample", False)
            put = pipe.update_components if isinstance(pipe, ModularPipeline) else pipe.register_modules
            put(scheduler=DDIMScheduler.from_config(config, clip_sample=clips))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def trainer_of(tiny: Tiny, out: str, teachers: Any, is_lora: bool, **kwargs: Any) -> Trainer:
    if not tiny.inputs.keys() <= sample_arguments(type(tiny.make(0))).keys():
        kwargs["input_columns"] = list(tiny.inputs)
    rows = {"prompt": list(tiny.prompts)} | {name: values[:2] for name, values in tiny.inputs.items()}
    args = DiffusionOPDConfig(
        out,
        per_device_train_batch_size=2,
        max_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        num_inference_steps=STEPS,
        timestep_fraction=1.0,
        objective="velocity",
        call_kwargs=dict(tiny.call),
        learning_rate=1e-2,
        max_grad_norm=0.0,
        logging_steps=1,
        disable_tqdm=True,
        image_steps=0,
        **kwargs,
    )
    lora = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=tiny.lora_targets) if is_lora else None
    student = as_ours(tiny.make(0))
    return Trainer(student, teachers, args, Dataset.from_dict(rows), peft_config=lora, callbacks=[Gradients()])


def gradient_gap(tiny: Tiny, out: str, report: dict[str, Any]) -> Trainer:
    """Of one training step, with a teacher of other weights and guidance."""
    theirs = dict(tiny.call)
    guidance = next((name for name in GUIDANCE if name in theirs), None)
    if guidance is not None:
        theirs[guidance] = 1.5 * theirs[guidance]
    changed = {guidance: theirs[guidance]} if guidance else {}
    teacher = as_ours(tiny.make(1))
    trainer = trainer_of(tiny, out, Teacher(teacher, id="t", call_kwargs=changed), is_lora=report["way"] == "lora")
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    report["samples of a call"] = trainer.together or 2
    report["one backward a walk"] = trainer.crosses
    report["LoRA file"] = "diffusers" if trainer.student.has_lora_loader else "PEFT"
    report["guidance"] = guidance
    found = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Gradients)).seen
    after = {name: trainer.model.get_parameter(name).detach().clone() for name in before}
    with torch.no_grad():
        for name, value in before.items():
            trainer.model.get_parameter(name).copy_(value)
    loss = two_passes(trainer.pipeline, as_ours(tiny.make(1)), trainer.batch, tiny, tiny.call, theirs)
    weights = [trainer.model.get_parameter(name) for name in found]
    expected = torch.autograd.grad(loss, weights, allow_unused=True)
    scale = max(g.abs().max().item() for g in expected if g is not None)
    gaps = [(g - e).abs().max().item() / scale for g, e in zip(found.values(), expected, strict=True) if e is not None]
    report["gradient gap"], report["loss"] = max(gaps), loss.item()
    with torch.no_grad():
        for name, value in after.items():
            trainer.model.get_parameter(name).copy_(value)
    return trainer


def predictions(pipe: DiffusionPipeline, tiny: Tiny) -> list[Tensor]:
    pipe.set_progress_bar_config(disable=True)
    arguments = {"prompt": tiny.prompts[0] if tiny.bare else [tiny.prompts[0]]} | {
        name: values[0] for name, values in tiny.inputs.items()
    }
    return [stepped.prediction for stepped in plain_run(pipe, {**arguments, **tiny.call}, 7)]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def reload_gap(trainer: Trainer, tiny: Tiny, folder: str, way: str) -> float:
    trainer.save_model(folder)
    if way == "full":
        others = {  # a guard of prompts has no files
            name: part
            for name, part in tiny.make(0).components.items()
            if part is not None
            and not isinstance(trainer.pipeline, ModularPipeline)
            and not Path(folder, name).exists()
        }
        plain = type(trainer.pipeline).from_pretrained(folder, **others)
        if isinstance(plain, ModularPipeline):
            plain.load_components()
    else:
        plain = as_ours(tiny.make(0))
        if Path(folder, "pytorch_lora_weights.safetensors").exists():
            plain.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
        else:
            PeftModel.from_pretrained(denoisers(plain)[0], folder)
    pairs = zip(predictions(trainer.pipeline, tiny), predictions(plain, tiny), strict=True)
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def check(name: str, way: str, show: bool = False) -> dict[str, Any]:
    """What is found out about a class: numbers, or the first thing that fails."""
    tiny, report = ZOO[name], {"class": name, "way": way}
    began = time.perf_counter()
    stage = "made"
    try:
        with tempfile.TemporaryDirectory() as folder:
            with quiet():
                tiny.make(0)
                stage = "plain call"
                predictions(as_ours(tiny.make(0)), tiny)
                stage = "self"
                if way == "full":
                    same = trainer_of(tiny, folder, as_ours(tiny.make(0)), is_lora=False)
                    same.train()
                    report["loss against itself"] = same.state.log_history[0]["loss"]
                stage = "gradient"
                trainer = gradient_gap(tiny, folder, report)
                stage = "reload"
                report["reload gap"] = reload_gap(trainer, tiny, str(Path(folder, "saved")), way)
        report["ok"] = (
            report.get("loss against itself", 0) < 1e-9
            and report["gradient gap"] < 1e-3
            and report["reload gap"] < 1e-4
            and report["loss"] > 0
        )
    except Exception as error:
        if show:
            traceback.print_exc(limit=-6)
        report |= {"ok": False, "failed at": stage, "error": f"{type(error).__name__}: {error}"[:500]}
    report["seconds"] = round(time.perf_counter() - began, 1)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classes", nargs="*")
    parser.add_argument("--ways", nargs="+", default=["lora", "full"])
    parser.add_argument("--traceback", action="store_true")
    options = parser.parse_args()
    diffusers.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    logging.getLogger("diffusion_opd").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for name in options.classes or sorted(ZOO):
        for way in options.ways:
            print(json.dumps(check(name, way, options.traceback)), flush=True)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
