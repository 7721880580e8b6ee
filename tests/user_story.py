"""A user's whole story in half precision, from a folder, as it goes on a GPU: train with pictures at every step,
evaluate, save, be killed, resume, draw in a callback and at the end, save, push, load in plain diffusers.

Started by test_half_precision.py, whose Hub it talks to; launched.py hands over what to run.
"""

import argparse
import logging
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftModel
from PIL import Image
from transformers import TrainerCallback

import diffusion_opd
from diffusion_opd.base_trainer import DiffusionTrainer
from diffusion_opd.files import LORA_NAME, lora_name
from tests.adapters import save_peft
from tests.editing_pipelines import EDITING, EDITING_CALL, EDITING_INPUTS
from tests.launched import serve
from tests.tiny_pipelines import BUILDERS, CALL, LORA_TARGETS, denoiser
from tests.two_denoisers import TWO, TWO_CALL, TWO_INPUTS
from tests.zoo import ZOO

MAKE = {name: tiny.make for name, tiny in ZOO.items()} | BUILDERS | EDITING | TWO
CALLS = {name: tiny.call for name, tiny in ZOO.items()} | CALL | EDITING_CALL | TWO_CALL
# What samples are made of besides prompts
INPUTS = {name: tiny.inputs for name, tiny in ZOO.items()} | EDITING_INPUTS | TWO_INPUTS
METHODS = {"opd": "DiffusionOPD", "nft": "DiffusionNFT", "grpo": "DiffusionGRPO"}
STEPS, KILLED_AT = 4, 3
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--serve", type=Path, metavar="FOLDER")
    parser.add_argument("--client", type=int)
    parser.add_argument("--family", default="sd3")
    parser.add_argument("--method", choices=METHODS, default="opd")
    parser.add_argument("--mode", choices=["lora", "full"], default="lora")
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    return parser.parse_args(arguments)


def data(family: str) -> dict[str, Dataset]:
    columns = {name: [values[i % len(values)] for i in range(8)] for name, values in INPUTS.get(family, {}).items()}
    return {
        task: Dataset.from_dict({"prompt": [f"{task} number {i}" for i in range(8)], **columns}) for task in ("a", "b")
    }


def targets(family: str) -> Any:
    return ZOO[family].lora_targets if family in ZOO else LORA_TARGETS


def call_of(family: str) -> dict[str, Any]:
    return CALLS[family] | {name: values[0] for name, values in INPUTS.get(family, {}).items()}


def picture(pipeline: DiffusionPipeline, family: str) -> np.ndarray:
    """As anybody calls a pipeline: what it draws, in shades of 255."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    output = pipeline(prompt=["a fox"], num_inference_steps=4, generator=generator, output_type="np", **call_of(family))
    return 255 * np.asarray(next(getattr(output, name) for name in ("images", "frames", "audios") if name in output))


def latents(pipeline: DiffusionPipeline, family: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        prompt=["a fox"], num_inference_steps=2, generator=generator, output_type="latent", **call_of(family)
    )[0]


class Draw(TrainerCallback):
    """A user's own callback: uses the pipeline after each step."""

    def __init__(self, family: str):
        self.family, self.pictures = family, []

    def on_step_end(self, args, state, control, **kwargs):
        self.pictures.append(picture(self.trainer.pipeline, self.family))


class Die(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)


class Said(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def redness(images, prompts, **kwargs):
    """Of pictures, and of videos."""
    frames = [np.asarray(one if isinstance(one, Image.Image) else one[0], dtype=float) for one in images]
    return [(frame[..., 0] - frame[..., 2]).mean() / 255 for frame in frames]


def make(options: argparse.Namespace, out: Path, *callbacks: TrainerCallback) -> DiffusionTrainer:
    settings = dict(
        per_device_train_batch_size=2,
        max_steps=STEPS,
        logging_steps=1,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        image_steps=1,
        report_to="none",
        learning_rate=5e-2 if options.mode == "lora" else 5e-3,
        num_inference_steps=4,
        image_num_inference_steps=3,
        guidance_scale=CALLS[options.family].get("guidance_scale"),
        call_kwargs={key: value for key, value in CALLS[options.family].items() if key != "guidance_scale"},
        disable_tqdm=True,
        use_cpu=True,
        hub_model_id=f"me/{options.out.name}",
        bf16=options.precision == "bf16",
    )
    name = METHODS[options.method]
    judges = {"a": str(options.out / "lora"), "b": str(options.out / "specialist")}
    if options.method != "opd":
        settings |= dict(num_generations=4, gradient_accumulation_steps=4, beta=0.1)
        judges = {"a": redness, "b": redness}
    args = getattr(diffusion_opd, f"{name}Config")(str(out), **settings)
    if options.precision == "fp16":  # the config refuses it on a CPU
        args.fp16, args.mixed_precision = True, "fp16"
    trainer = getattr(diffusion_opd, f"{name}Trainer")(
        str(options.out / "base"),
        judges,
        args,
        train_dataset=data(options.family),
        eval_dataset=data(options.family),
        callbacks=list(callbacks),
        peft_config=LoraConfig(r=4, lora_alpha=16, init_lora_weights="gaussian", target_modules=targets(options.family))
        if options.mode == "lora"
        else None,
    )
    if options.precision == "fp16":  # what accelerate does on a GPU; torch's autocast and scaler are there on a CPU too
        accelerator = trainer.accelerator
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for callback in callbacks:
        callback.trainer = trainer
    return trainer


def weights(trainer: DiffusionTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.trainable_parameters])


def tell(options: argparse.Namespace) -> None:
    family, out, dtype = options.family, options.out, DTYPES[options.precision]
    MAKE[family](0).save_pretrained(out / "base")
    MAKE[family](2).save_pretrained(out / "specialist")
    save_peft(out / "lora", MAKE[family](0), target_modules=targets(family))
    said = Said()
    logging.getLogger("diffusion_opd").addHandler(said)

    undisturbed = make(options, out / "undisturbed")
    undisturbed.train()
    child = os.fork()
    if child == 0:
        make(options, out / "run", Die()).train()
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    draw = Draw(family)
    trainer = make(options, out / "run", draw)
    trainer.train(resume_from_checkpoint=True)
    assert torch.equal(weights(trainer), weights(undisturbed))
    assert not any("could not be drawn" in line for line in said.lines), said.lines

    assert any("eval_" in key for entry in trainer.state.log_history for key in entry)
    folders = [f"step_{step:06d}" for step in range(1, STEPS + 1)]
    for run in ("run", "undisturbed"):
        assert sorted(path.name for path in (out / run / "images").iterdir()) == folders
    last = [sorted((out / run / "images" / folders[-1]).glob("*[0-9].*")) for run in ("run", "undisturbed")]
    assert last[0] and [path.read_bytes() for path in last[0]] == [path.read_bytes() for path in last[1]]
    if last[0][0].suffix == ".png":
        assert trainer.sample_images(trainer.image_examples)[0].tobytes() == Image.open(last[0][0]).tobytes()

    student = denoiser(trainer.pipeline)
    assert "_original_forward" not in vars(student)
    if options.mode == "lora":
        assert "forward" not in vars(student) and student.dtype == dtype
    drawn = picture(trainer.pipeline, family)
    assert len(draw.pictures) == STEPS - KILLED_AT + 1 and np.array_equal(draw.pictures[-1], drawn)

    trainer.save_model()
    trainer.push_to_hub()
    base, loaded = (DiffusionPipeline.from_pretrained(out / "base", torch_dtype=dtype) for _ in range(2))
    if options.mode == "full":
        loaded = DiffusionPipeline.from_pretrained(trainer.hub_model_id, torch_dtype=dtype)
    elif hasattr(loaded, "load_lora_weights"):
        loaded.load_lora_weights(trainer.hub_model_id, weight_name=LORA_NAME)
        if family in TWO:
            second = lora_name("transformer_2")
            loaded.load_lora_weights(trainer.hub_model_id, weight_name=second, load_into_transformer_2=True)
    else:
        PeftModel.from_pretrained(denoiser(loaded), trainer.hub_model_id)
    assert f", dtype={dtype})" in (out / "run" / "README.md").read_text()
    untrained, published = (picture(pipeline, family) for pipeline in (base, loaded))
    # The trained weights are float32 here and half there, which a random network makes much of
    learnt, rounded = np.abs(published - untrained).mean(), np.abs(published - drawn).mean()
    print(f"{family} {options.method} {options.mode}: learnt {learnt:.2f}, rounded {rounded:.2f}")
    assert rounded < max(1, 0.3 * learnt) and rounded < 0.5 * learnt, (rounded, learnt)
    if family not in ZOO:  # where some pipelines take it from their denoiser, which is float32 as it is trained in full
        assert latents(trainer.pipeline, family).dtype == latents(loaded, family).dtype


if __name__ == "__main__":
    options = parse()
    if options.serve is None:
        tell(options)
    else:
        serve(options.serve, options.client, lambda arguments: tell(parse(arguments)))
