"""What a user hands in wrong: one sentence of ours that says what is wrong, with what was given, before anything is
trained. What has a meaning but is easily meant otherwise is warned about.
"""

import dataclasses
import json
import logging
import math
import random
import re
import shutil
import traceback
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.logging import MultiProcessAdapter
from datasets import Dataset, DatasetDict, Features, IterableDataset, Value
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline, StableDiffusion3Img2ImgPipeline, UNet2DModel
from peft import IA3Config
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainingArguments

import diffusion_opd
from diffusion_opd import (
    DiffusionGRPOConfig,
    DiffusionNFTConfig,
    DiffusionOPDConfig,
    DiffusionOPDTrainer,
    Teacher,
)
from diffusion_opd.errors import one_sentence
from tests.adapters import save_diffusers, save_peft
from tests.tiny_pipelines import BUILDERS, CALL
from tests.training import config, lora

DENOISER = "transformer/diffusion_pytorch_model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n"
PROMPTS = Dataset.from_dict({"prompt": [f"prompt {i}" for i in range(4)]})


def rows(**columns: list) -> Dataset:
    return Dataset.from_dict(columns)


def stream(*examples: dict) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(examples))


def brightness(prompts, images, **columns):
    return [float(index) for index in range(len(images))]


def by_position(prompts, images, /):
    return [0.0] * len(images)


def darkness(prompts, images, **columns):
    return [-score for score in brightness(prompts, images)]


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def as_pickle(path: Path) -> None:
    """As repositories from before safetensors."""
    name = "pytorch_model.bin" if path.name == "model.safetensors" else f"{path.stem}.bin"
    torch.save(load_file(path), path.with_name(name))
    path.unlink()


class World:
    """A student and teachers on disk, and what a user writes with them."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "empty").mkdir()
        (folder / "file").write_text("x")
        self.base, self.lora, self.pipeline = folder / "base", folder / "lora", folder / "pipeline"
        self.diffusers_lora = save_diffusers(folder / "diffusers_lora")
        save_peft(self.lora)
        BUILDERS["sd3"](0).save_pretrained(self.base)
        BUILDERS["sd3"](1).save_pretrained(self.pipeline)

    @cached_property
    def sd3(self) -> DiffusionPipeline:
        return BUILDERS["sd3"](1)

    def copy(self, source: str, edit: Callable[[Path], Any]) -> Path:
        copied = self.folder / f"copy_{len(list(self.folder.iterdir()))}"
        shutil.copytree(getattr(self, source), copied)
        edit(copied)
        return copied

    def opd(self, model: Any = None, teachers: Any = None, data: Any = PROMPTS, args: Any = None, **kwargs: Any):
        names = ("eval_dataset", "callbacks", "optimizers")
        extra = {name: kwargs.pop(name) for name in names if name in kwargs} | {"peft_config": lora()}
        if "peft_config" in kwargs:
            extra["peft_config"] = kwargs.pop("peft_config")
        return DiffusionOPDTrainer(
            str(self.base) if model is None else model,
            str(self.lora) if teachers is None else teachers,
            config(self.folder / "out", **kwargs) if args is None else args,
            train_dataset=data,
            **extra,
        )

    def rl(
        self,
        funcs: Any = brightness,
        data: Any = PROMPTS,
        trainer: str = "GRPO",
        args: Any = None,
        model: Any = None,
        **kwargs: Any,
    ):
        extra = {name: kwargs.pop(name) for name in ("eval_dataset",) if name in kwargs}
        make, trainer = getattr(diffusion_opd, f"Diffusion{trainer}Config"), f"Diffusion{trainer}Trainer"
        settings = dict(
            per_device_train_batch_size=4,
            num_generations=2,
            max_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            num_inference_steps=3,
            call_kwargs={key: value for key, value in CALL["sd3"].items() if key != "guidance_scale"},
            guidance_scale=1.0,
            disable_tqdm=True,
            image_steps=0,
        )
        return getattr(diffusion_opd, trainer)(
            str(self.base) if model is None else model,
            funcs,
            make(str(self.folder / "rl"), **(settings | kwargs)) if args is None else args,
            train_dataset=data,
            peft_config=lora(),
            **extra,
        )

    def checkpoint(self, trainer: str = "GRPO", **kwargs: Any) -> Path:
        run = self.rl(trainer=trainer, save_strategy="steps", save_steps=1, **kwargs)
        run.args.output_dir = str(self.folder / f"run_{len(list(self.folder.iterdir()))}")
        run.train()
        return Path(run.args.output_dir, "checkpoint-1")


def with_index(**entries: Any) -> Callable[[Path], Any]:
    def edit(folder: Path) -> None:
        path = folder / "model_index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return edit


def with_nan(folder: Path, file: str = DENOISER) -> None:
    tensors = load_file(folder / file)
    tensors[min(tensors)].fill_(math.nan)
    save_file(tensors, folder / file)


def quantised(folder: Path) -> None:
    path, own = folder / "transformer/config.json", {"quant_method": "own"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": own}))


def offloaded(how: str) -> DiffusionPipeline:
    pipe = BUILDERS["sd3"](1)
    of_groups = {"onload_device": torch.device("cpu"), "offload_type": "leaf_level"}
    getattr(pipe, how)(**(of_groups if how == "enable_group_offload" else {"device": "cpu"}))
    return pipe


def on_meta(pipe: DiffusionPipeline) -> DiffusionPipeline:
    pipe.vae.to("meta")
    return pipe


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / DENOISER)
    tensors.pop(min(tensors))
    save_file(tensors, folder / DENOISER)


def poor(folder: Path, **entries: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


TWO = {"a": "me/a", "b": "me/b"}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
OFFLOADED = "StableDiffusion3Pipeline is offloaded ... `enable_*_offload()` and `device_map`"


def opd(**kwargs: Any) -> DiffusionOPDConfig:
    return DiffusionOPDConfig(**({"output_dir": "out"} | kwargs))


def nft(**kwargs: Any) -> DiffusionNFTConfig:
    return DiffusionNFTConfig("out", **kwargs)


def grpo(**kwargs: Any) -> DiffusionGRPOConfig:
    return DiffusionGRPOConfig(**({"output_dir": "out"} | kwargs))


class Late(TrainerCallback):
    """Handed over as a class, which Trainer takes, and as a function, which it does not."""


# What the user wrote, given the world `w`; the type of the refusal; what of the sentence tells them what to mend, with
# ` ... ` for whatever stands between. Of what the docs quote, test_docs.py compares every word
CASES: dict[str, tuple[Callable[[World], Any], type[Exception], str]] = {
    # Settings. Ranges of single fields: test_config.py, and the fuzz below
    "text for a number": (lambda w: opd(num_inference_steps="10"), TypeError, "`num_inference_steps` ... '10'"),
    "a fraction of a step": (lambda w: opd(num_inference_steps=9.5), TypeError, "`num_inference_steps` ... 9.5"),
    "text for a switch": (lambda w: opd(bf16="false"), TypeError, "`bf16` ... True or False ... 'false'"),
    "one prompt for a list": (lambda w: opd(image_prompts="a cat"), TypeError, "`image_prompts` ... list ... 'a cat'"),
    "kwargs that are no dict": (
        lambda w: opd(model_init_kwargs=["revision"]),
        TypeError,
        "`model_init_kwargs` ... dict ... ['revision']",
    ),
    "kwargs that are no JSON": (lambda w: opd(call_kwargs="{'a': 1}"), ValueError, "`call_kwargs` ... JSON"),
    "JSON of a list": (lambda w: opd(call_kwargs="[1]"), TypeError, "`call_kwargs` ... dict ... [1]"),
    "weights that are no JSON": (lambda w: nft(reward_weights="[1,"), ValueError, "`reward_weights` ... JSON"),
    "a weight for a list": (lambda w: nft(reward_weights=0.5), TypeError, "`reward_weights` ... list ... 0.5"),
    "a choice that is a list": (
        lambda w: grpo(scale_rewards=["group"]),
        TypeError,
        "`scale_rewards` ... text ... ['group']",
    ),
    "an empty choice": (lambda w: grpo(transition=""), ValueError, "`transition` ... 'flow_sde' ... ''"),
    "guidance that is NaN": (lambda w: opd(guidance_scale=math.nan), ValueError, "`guidance_scale` ... nan"),
    "endless noise": (lambda w: grpo(noise_level=math.inf), ValueError, "`noise_level` ... inf"),
    "a negative rate": (lambda w: opd(learning_rate=-1e-4), ValueError, "`learning_rate` ... at least 0 ... -0.0001"),
    "a negative seed": (lambda w: opd(seed=-1), ValueError, "`seed` ... at least 0 ... -1"),
    "a seed beyond numpy's": (lambda w: opd(seed=2**32), ValueError, "`seed` ... 2**32 ... 4294967296"),
    "no batch": (
        lambda w: opd(per_device_train_batch_size=0),
        ValueError,
        "`per_device_train_batch_size` ... at least 1",
    ),
    "no accumulation": (
        lambda w: opd(gradient_accumulation_steps=0),
        ValueError,
        "`gradient_accumulation_steps` ... at least 1",
    ),
    "a window of text": (lambda w: grpo(sde_window_range=["a", 2]), TypeError, "`sde_window_range` ... list ... 'a'"),
    "a file for all output": (
        lambda w: opd(output_dir=str(w.folder / "file")),
        ValueError,
        "`output_dir=' ... /file' ... is a file",
    ),
    "no folder": (lambda w: opd(output_dir=""), ValueError, "`output_dir` must name a folder, got ''"),
    "a blank folder": (lambda w: grpo(output_dir=" "), ValueError, "`output_dir` must name a folder, got ' '"),
    **{
        f"{name} of language models": (
            lambda w, name=name, value=value: opd(**{name: value}),
            ValueError,
            f"`{name}={value!r}` is for language models",
        )
        for name, value in {"neftune_noise_alpha": 5.0, "label_smoothing_factor": 0.1, "use_liger_kernel": True}.items()
    },
    "negative prompts for a batch": (
        lambda w: opd(call_kwargs={"negative_prompt": ["blurry", "dark"]}),
        ValueError,
        "DiffusionOPDConfig: 'negative_prompt' in `call_kwargs` ... one text for all ... list: ['blurry', 'dark']",
    ),
    "a list of one further prompt": (
        lambda w: grpo(call_kwargs='{"prompt_2": ["x"]}'),
        ValueError,
        "'prompt_2' in `call_kwargs` ... column of the data ... ['x']",
    ),
    "negative prompts of a teacher": (
        lambda w: w.opd(teachers=Teacher("me/a", call_kwargs={"negative_prompt_3": ("x",)})),
        ValueError,
        "teacher 'a': 'negative_prompt_3' ... one text ... ('x',)",
    ),
    "half a character to draw": (
        lambda w: opd(image_prompts=["a cat", "a \ud83d fox"]),
        ValueError,
        "`image_prompts` ... whole characters ... 'a \\ud83d fox'",
    ),
    "nothing to draw": (
        lambda w: opd(image_prompts=["a cat", " "]),
        ValueError,
        "`image_prompts` ... not empty ... ' '",
    ),
    "a folder in a file": (
        lambda w: grpo(output_dir=str(w.folder / "file" / "out")),
        ValueError,
        "`output_dir=' ... /file/out' ... /file' is a file",
    ),
    "a compiler of no name": (
        lambda w: opd(torch_compile_backend="tensor"),
        ValueError,
        "`torch_compile_backend` ... 'inductor' ... 'tensor'",
    ),
    "a compiler that accelerate spells otherwise": (
        lambda w: opd(torch_compile_backend="INDUCTOR"),
        ValueError,
        "`torch_compile_backend` ... 'inductor' ... 'INDUCTOR'",
    ),
    "a quantisation that is no config": (
        lambda w: opd(quantization_config="[4]"),
        TypeError,
        "`quantization_config` ... `PipelineQuantizationConfig` ... dict ... list: [4]",
    ),
    "a quantisation of a model in transformers' words": (
        lambda w: opd(quantization_config={"load_in_4bit": True}),
        ValueError,
        "`quantization_config` has no ['load_in_4bit'] ... 'quant_kwargs' ... 'quant_mapping'",
    ),
    "a quantisation of nothing": (
        lambda w: opd(quantization_config={}),
        ValueError,
        "`quantization_config` ... `quant_backend` or ... `quant_mapping` ... got neither",
    ),
    "a quantisation in two ways": (
        lambda w: opd(quantization_config={"quant_mapping": {}, "quant_backend": "torchao"}),
        ValueError,
        "either ... got ['quant_mapping', 'quant_backend']",
    ),
    "a quantisation of named parts twice": (
        lambda w: opd(quantization_config={"quant_mapping": {"vae": {}}, "components_to_quantize": ["vae"]}),
        ValueError,
        "`quant_mapping` says all of each part; leave ['components_to_quantize'] out",
    ),
    "a quantisation of no part": (
        lambda w: opd(quantization_config={"quant_mapping": ["vae"]}),
        TypeError,
        "`quant_mapping` must be a dict by parts ... ['vae']",
    ),
    "a backend of quantisation that trains no LoRA": (
        lambda w: opd(quantization_config={"quant_backend": "gguf"}),
        ValueError,
        "`quant_backend` ... 'bitsandbytes_4bit', 'bitsandbytes_8bit', 'torchao' ... 'gguf'",
    ),
    "a quantisation among the model's": (
        lambda w: opd(model_init_kwargs={"quantization_config": {}}),
        ValueError,
        "`model_init_kwargs` may not hold 'quantization_config' ... field of its own",
    ),
    "attention of no name": (
        lambda w: opd(attention_backend="sdpa"),
        ValueError,
        "`attention_backend` must be one of [ ... 'native' ... got 'sdpa'",
    ),
    "attention without a gradient": (
        lambda w: opd(attention_backend="sage"),
        ValueError,
        "`attention_backend='sage'` has no backward pass",
    ),
    "attention that is not installed": (
        lambda w: w.opd(attention_backend="_flash_3"),
        ValueError,
        "`attention_backend='_flash_3'` cannot be used: ... missing package",
    ),
    "attention that takes no kernel": (
        lambda w: w.opd(attention_backend="native"),
        ValueError,
        "`attention_backend='native'` ... the student's transformer, a SD3Transformer2DModel, has none; leave it out",
    ),
    "the best by an unknown metric": (
        lambda w: w.opd(eval_dataset=PROMPTS, eval_strategy="epoch", metric_for_best_model="accuracy"),
        ValueError,
        "`metric_for_best_model` ... 'loss', 'kl', 'kl/ ... 'accuracy'",
    ),
    "the best by a teacher who is not asked": (
        lambda w: w.opd(
            teachers=TWO,
            data=rows(prompt=["a", "b"], teacher_id=["a", "b"]),
            eval_dataset=rows(prompt=["a"], teacher_id=["a"]),
            eval_strategy="epoch",
            metric_for_best_model="eval_kl/b",
        ),
        ValueError,
        "`metric_for_best_model` ... ['loss', 'kl', 'kl/a'] ... 'eval_kl/b'",
    ),
    "the best by a loss of rewards": (
        lambda w: w.rl(eval_dataset=PROMPTS, eval_strategy="epoch", metric_for_best_model="loss"),
        ValueError,
        "`metric_for_best_model` ... 'reward' ... 'rewards/brightness/mean' ... got 'loss'",
    ),
    "args of another trainer": (
        lambda w: w.opd(args=grpo()),
        TypeError,
        "`args` ... DiffusionOPDConfig ... DiffusionGRPOConfig",
    ),
    "args of transformers": (
        lambda w: w.opd(args=TrainingArguments("out")),
        TypeError,
        "`args` ... DiffusionOPDConfig ... TrainingArguments",
    ),
    "args that are a folder": (lambda w: w.opd(args="out"), TypeError, "`args` ... DiffusionOPDConfig ... str"),
    "args of distillation": (
        lambda w: w.rl(args=opd()),
        TypeError,
        "`args` ... DiffusionGRPOConfig ... DiffusionOPDConfig",
    ),
    # Data. Columns, prompts and tasks in every form: test_sampling.py
    "a capital": (
        lambda w: w.opd(data=rows(Prompt=["a"])),
        ValueError,
        "train_dataset ... ['prompt'] ... ['Prompt'] ... `dataset.rename_column('Prompt', 'prompt')`",
    ),
    "another name": (lambda w: w.opd(data=rows(id=[1], caption=["a"])), ValueError, "['prompt'] ... is it 'caption'?"),
    "another name in a stream": (
        lambda w: w.opd(data=stream({"text": "a"})),
        ValueError,
        "['prompt'] ... is it 'text'?",
    ),
    "a name that is not near": (lambda w: w.opd(data=rows(url=["a"])), ValueError, "['prompt'], only ['url']."),
    "the teacher's name": (
        lambda w: w.opd(teachers=TWO, data=rows(prompt=["a"], teacher=["a"])),
        ValueError,
        "['teacher_id'] ... is it 'teacher'?",
    ),
    "ids that are numbers": (
        lambda w: w.opd(teachers=TWO, data=rows(prompt=["a"], teacher_id=[1])),
        ValueError,
        "`teacher_id` ... train_dataset ... text ... int64",
    ),
    "ids that are lists": (
        lambda w: w.opd(teachers=TWO, data=rows(prompt=["a"], teacher_id=[["a"]])),
        ValueError,
        "`teacher_id` ... train_dataset ... text ... List",
    ),
    "a thousand ids": (
        lambda w: w.opd(teachers=TWO, data=rows(prompt=["a"] * 1000, teacher_id=[str(i) for i in range(1000)])),
        ValueError,
        "and 980 more ... ['a', 'b']",
    ),
    "an empty dict": (lambda w: w.opd(data={}), ValueError, "train_dataset ... empty"),
    "an empty dict to evaluate": (lambda w: w.opd(eval_dataset={}), ValueError, "eval_dataset ... empty"),
    "a list of rows": (lambda w: w.opd(data=[{"prompt": "a"}]), TypeError, "train_dataset ... `Dataset` ... list"),
    "all splits": (
        lambda w: w.opd(data=DatasetDict(train=PROMPTS)),
        ValueError,
        "train_dataset ... DatasetDict ... ['train']",
    ),
    "all splits for rewards": (
        lambda w: w.rl(data=DatasetDict(train=PROMPTS, test=PROMPTS)),
        ValueError,
        "train_dataset ... DatasetDict ... ['train', 'test']",
    ),
    "no rows": (lambda w: w.opd(data=rows(prompt=[])), ValueError, "train_dataset is empty"),
    "an empty stream": (
        lambda w: w.opd().evaluate(stream().cast(Features({"prompt": Value("string")}))),
        ValueError,
        "eval_dataset is empty",
    ),
    "an empty stream for rewards": (
        lambda w: w.rl().evaluate(stream().cast(Features({"prompt": Value("string")}))),
        ValueError,
        "eval_dataset is empty",
    ),
    "a row without a prompt": (
        lambda w: w.opd(data=stream({"prompt": "a"}, {"prompt": "b"}, {"text": "c"})).train(),
        ValueError,
        "prompt of the stream ... must be text ... None",
    ),
    "half a character in a stream": (
        lambda w: w.opd(data=stream({"prompt": "a"}, {"prompt": "a \udc00 fox"})).train(),
        ValueError,
        "stream ... whole characters ... 'a \\udc00 fox'",
    ),
    "half a character to evaluate": (
        lambda w: w.opd().evaluate(stream({"prompt": "a \ud83d fox"})),
        ValueError,
        "eval_dataset ... 'a \\ud83d fox'",
    ),
    "rows that are made as they are read": (
        lambda w: w.opd(data=PROMPTS.with_transform(lambda rows: rows)),
        ValueError,
        "train_dataset has a transform (`set_transform`) ... `dataset.map(...)`",
    ),
    "rows of a task that are made as they are read": (
        lambda w: w.rl(data={"x": PROMPTS.with_transform(lambda rows: rows)}),
        ValueError,
        "train_dataset['x'] has a transform (`set_transform`)",
    ),
    "an id of a stream that is a list": (
        lambda w: w.opd(teachers={"a": w.sd3, "b": w.sd3}, data=stream({"prompt": "x", "teacher_id": ["a"]})).train(),
        ValueError,
        "stream ... ['a'] ... ['a', 'b']",
    ),
    "a task column of numbers": (
        lambda w: w.rl(data=rows(prompt=["a", "b"], task=[1, 2])),
        ValueError,
        "`task` ... train_dataset ... text ... int64",
    ),
    "a task column with holes": (
        lambda w: w.rl(data=rows(prompt=["a", "b"], task=["x", None])),
        ValueError,
        "`task` ... train_dataset ... without a value",
    ),
    "a column that rewards need": (
        lambda w: w.rl(funcs=lambda images, label: [1.0] * len(images)),
        ValueError,
        "'lambda' needs ['label'] ... ['task']",
    ),
    "a column that is hidden": (
        lambda w: w.rl(
            funcs=lambda images, label: [1.0] * len(images),
            data=PROMPTS.add_column("label", ["x"] * 4),
            remove_unused_columns=True,
        ),
        ValueError,
        "'lambda' needs ['label']",
    ),
    "a column of pictures": (
        lambda w: w.rl(data=PROMPTS.add_column("images", ["x"] * 4)),
        ValueError,
        "['images'] ... rename",
    ),
    # Teachers. Tensors that do not fit: test_teachers.py; repositories: test_hub.py
    "a teacher that is a number": (lambda w: w.opd(teachers=5), TypeError, "a teacher is ... `Teacher` ... int: 5"),
    "a set of teachers": (
        lambda w: w.opd(teachers={"me/a"}),
        TypeError,
        "a teacher is ... `Teacher` ... set: {'me/a'}",
    ),
    "a bare module": (lambda w: w.opd(teachers=w.sd3.vae), TypeError, "a teacher is ... `Teacher` ... AutoencoderKL"),
    "a Teacher of nothing": (
        lambda w: w.opd(teachers=Teacher(None)),
        TypeError,
        "a teacher is ... `Teacher` ... NoneType",
    ),
    "a Teacher of a Teacher": (
        lambda w: w.opd(teachers=Teacher(Teacher("a"))),
        TypeError,
        "a teacher is ... `Teacher` ... got Teacher",
    ),
    "an id that is a number": (lambda w: w.opd(teachers={1: "me/a"}), TypeError, "teacher 1 ... `id` ... text"),
    "a blank id": (lambda w: w.opd(teachers={" ": "me/a"}), ValueError, "id of a teacher ... blank ... ' '"),
    "half an id": (
        lambda w: w.opd(teachers={"a\ud83d": "me/a"}),
        ValueError,
        "id of a teacher ... whole ... 'a\\ud83d'",
    ),
    "a subfolder that is a number": (
        lambda w: w.opd(teachers=Teacher("a", subfolder=1)),
        TypeError,
        "teacher ... `subfolder` ... 1",
    ),
    "a revision of a folder": (
        lambda w: w.opd(teachers=Teacher(w.lora, revision="v1")),
        ValueError,
        "teacher ... /lora' ... `revision` ... 'v1'",
    ),
    "a file name of a loaded pipeline": (
        lambda w: w.opd(teachers=Teacher(w.sd3, weight_name="style.safetensors")),
        ValueError,
        "teacher 'teacher' ... loaded pipeline ... `weight_name` ... 'style.safetensors'",
    ),
    "guidance that is text": (
        lambda w: w.opd(teachers=Teacher("a", guidance_scale="4")),
        TypeError,
        "teacher 'a' ... `guidance_scale` ... '4'",
    ),
    "a teacher's guidance that is NaN": (
        lambda w: w.opd(teachers=Teacher("a", guidance_scale=math.nan)),
        ValueError,
        "teacher 'a' ... `guidance_scale` ... nan",
    ),
    "call_kwargs that are None": (
        lambda w: w.opd(teachers=Teacher("a", call_kwargs=None)),
        TypeError,
        "teacher 'a' ... `call_kwargs` ... None",
    ),
    "a file for a folder": (
        lambda w: w.opd(teachers=str(w.folder / "file")),
        ValueError,
        "teacher 'file': file of ... is no safetensors file",
    ),
    "an empty folder": (
        lambda w: w.opd(teachers=str(w.folder / "empty")),
        ValueError,
        "teacher 'empty' ... no pipeline ... no denoiser ... no LoRA ... `path`, `subfolder`",
    ),
    "a file name beside a LoRA": (
        lambda w: w.opd(teachers=Teacher(w.lora, weight_name="style.safetensors")),
        ValueError,
        "teacher ... /lora' ... no LoRA ... style.safetensors",
    ),
    "a file name beside a pipeline": (
        lambda w: w.opd(teachers=Teacher(w.pipeline, weight_name="style.safetensors")),
        ValueError,
        "teacher 'pipeline' ... no LoRA ... style.safetensors",
    ),
    "a LoRA of another family": (
        lambda w: w.opd(teachers=str(save_peft(w.folder / "of_flux", "flux"))),
        ValueError,
        "teacher 'of_flux' ... SD3Transformer2DModel ... single_transformer_blocks.0.attn.to_k",
    ),
    "a pipeline of another family": (
        lambda w: w.opd(teachers=BUILDERS["sd15"](1)),
        ValueError,
        "teacher 'teacher' ... StableDiffusionPipeline ... VAE ... scaling_factor",
    ),
    "another method of PEFT": (
        lambda w: w.opd(teachers=w.copy("lora", lambda f: poor(f, peft_type="IA3"))),
        ValueError,
        "teacher ... 'IA3' ... not a LoRA",
    ),
    "a negative rank": (
        lambda w: w.opd(teachers=w.copy("lora", lambda f: poor(f, r=-4))),
        ValueError,
        "teacher ... LoRA ... does not fit ... SD3Transformer2DModel ... -4",
    ),
    "a pointer for a config": (
        lambda w: w.opd(teachers=w.copy("lora", lambda f: (f / CONFIG).write_text(POINTER))),
        ValueError,
        "teacher ... adapter_config.json ... no JSON object ... git-lfs",
    ),
    "a config that is a list": (
        lambda w: w.opd(teachers=w.copy("lora", lambda f: (f / CONFIG).write_text("[]"))),
        ValueError,
        "teacher ... adapter_config.json ... no JSON object",
    ),
    "half a LoRA": (
        lambda w: w.opd(teachers=w.copy("lora", lambda f: halve(f / WEIGHTS))),
        ValueError,
        "teacher ... adapter_model.safetensors ... no safetensors file ... git-lfs",
    ),
    "a pointer for a LoRA": (
        lambda w: w.opd(teachers=w.copy("lora", lambda f: (f / WEIGHTS).write_text(POINTER))),
        ValueError,
        "teacher ... adapter_model.safetensors ... no safetensors file ... git-lfs",
    ),
    "NaN in a LoRA": (
        lambda w: w.opd(teachers=w.copy("lora", lambda f: with_nan(f, WEIGHTS))),
        ValueError,
        "teacher ... NaN or infinity at step 0",
    ),
    "half a pipeline": (
        lambda w: w.opd(teachers=w.copy("pipeline", lambda f: halve(f / DENOISER))),
        ValueError,
        "teacher ... cannot be loaded as a SD3Transformer2DModel: ",
    ),
    "a pointer in a pipeline": (
        lambda w: w.opd(teachers=w.copy("pipeline", lambda f: (f / DENOISER).write_text(POINTER))),
        ValueError,
        "teacher ... cannot be loaded as a SD3Transformer2DModel: ",
    ),
    "a broken index": (
        lambda w: w.opd(teachers=w.copy("pipeline", lambda f: (f / "model_index.json").write_text("{"))),
        ValueError,
        "teacher ... model_index.json ... no JSON object",
    ),
    "an index of unknown classes": (
        lambda w: w.opd(teachers=w.copy("pipeline", with_index(transformer=["diffusers", "Own2DModel"]))),
        ValueError,
        "teacher ... transformer ... Own2DModel ... version of diffusers",
    ),
    "a pipeline in pickles": (
        lambda w: w.opd(teachers=w.copy("pipeline", lambda f: as_pickle(f / DENOISER))),
        ValueError,
        "teacher ... cannot be loaded as a SD3Transformer2DModel ... only safetensors ... pickles",
    ),
    "a quantised pipeline": (
        lambda w: w.opd(teachers=w.copy("pipeline", quantised)),
        ValueError,
        "teacher ... cannot be loaded as a SD3Transformer2DModel: ... own",
    ),
    "a pipeline of an unknown class": (
        lambda w: w.opd(teachers=w.copy("pipeline", with_index(_class_name="OwnPipeline"))),
        ValueError,
        "teacher ... cannot be loaded as a pipeline: ... OwnPipeline",
    ),
    "a pipeline without a scheduler": (
        lambda w: w.opd(teachers=w.copy("pipeline", lambda f: shutil.rmtree(f / "scheduler"))),
        ValueError,
        "teacher ... cannot be loaded as a pipeline: ... scheduler",
    ),
    "a pipeline without a tokenizer": (
        lambda w: w.opd(teachers=w.copy("pipeline", lambda f: shutil.rmtree(f / "tokenizer"))),
        ValueError,
        "teacher 'copy_",
    ),
    "a text encoder for a denoiser": (
        lambda w: w.opd(teachers=Teacher(w.pipeline, subfolder="text_encoder")),
        ValueError,
        "teacher 'text_encoder' ... ['CLIPTextModelWithProjection'] ... StableDiffusion3Pipeline",
    ),
    "a broken denoiser's config": (
        lambda w: w.opd(
            teachers=Teacher(
                w.copy("pipeline", lambda f: (f / "transformer/config.json").write_text("{")), subfolder="transformer"
            )
        ),
        ValueError,
        "teacher ... config.json ... no JSON object",
    ),
    # The student
    "a student that is nowhere": (
        lambda w: w.opd(model=str(w.folder / "gone")),
        ValueError,
        "student ... /gone' ... neither a folder nor ... Hub",
    ),
    "a student that is not in the cache": (
        lambda w: w.opd(model="me/gone"),
        ValueError,
        "student 'me/gone' ... cache ... offline",
    ),
    "a student of no name": (lambda w: w.opd(model=""), ValueError, "student '' ... neither a folder nor ... Hub"),
    "a student that is a module": (lambda w: w.opd(model=w.sd3.vae), TypeError, "`model` ... folder ... AutoencoderKL"),
    "a student that is a LoRA": (
        lambda w: w.opd(model=w.lora),
        ValueError,
        "student ... no pipeline ... model_index.json",
    ),
    "a revision of the student's folder": (
        lambda w: w.opd(model_init_kwargs={"revision": "v1"}),
        ValueError,
        "student ... /base' ... no revision 'v1' ... `model_init_kwargs`",
    ),
    "half a student": (
        lambda w: w.opd(model=w.copy("base", lambda f: halve(f / DENOISER))),
        ValueError,
        "student ... cannot be loaded: ",
    ),
    "a student that lacks a tensor": (
        lambda w: w.opd(model=w.copy("base", without_a_tensor)),
        ValueError,
        "student ... lacks 1 tensors of its transformer ... context_embedder.bias",
    ),
    "a quantised student": (
        lambda w: w.opd(model=w.copy("base", quantised)),
        ValueError,
        "student ... cannot be loaded: ... own",
    ),
    "a student of an unknown class": (
        lambda w: w.opd(model=w.copy("base", with_index(_class_name="OwnPipeline"))),
        ValueError,
        "student ... cannot be loaded: ... OwnPipeline",
    ),
    "an empty part of a loaded student": (
        lambda w: w.opd(model=on_meta(BUILDERS["sd3"](0))),
        ValueError,
        "student 'StableDiffusion3Pipeline' lacks ... tensors of its vae",
    ),
    **{
        f"a student under {how}": (lambda w, how=how: w.opd(model=offloaded(how)), ValueError, OFFLOADED)
        for how in ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload")
    },
    **{
        f"a teacher under {how}": (
            lambda w, how=how: w.opd(teachers=offloaded(how)),
            ValueError,
            f"teacher 'teacher' ... {OFFLOADED}",
        )
        for how in ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload")
    },
    "a pipeline without prompts for a teacher": (
        lambda w: w.opd(teachers=DDPMPipeline(UNet2DModel(4, block_out_channels=(32,) * 4), DDIMScheduler())),
        ValueError,
        "teacher 'teacher' ... DDPMPipeline ... in_channels 3 ... 4",
    ),
    "a size that the student does not draw": (
        lambda w: w.opd(call_kwargs={"height": 17}),
        ValueError,
        "StableDiffusion3Pipeline ... `__call__`: ... are 17 and ... (called with height=17)",
    ),
    "an argument of the wrong kind": (
        lambda w: w.opd(call_kwargs={"joint_attention_kwargs": 5} | CALL["sd3"]),
        ValueError,
        "StableDiffusion3Pipeline ... `__call__`: ... 'int' ... (called with joint_attention_kwargs=5, ... )",
    ),
    "an argument of the wrong kind for a teacher": (
        lambda w: w.opd(teachers=Teacher(w.sd3, call_kwargs={"joint_attention_kwargs": 5})),
        ValueError,
        "teacher 'teacher' ... StableDiffusion3Pipeline ... `__call__`: ... 'int' ... joint_attention_kwargs=5)",
    ),
    "a student of pictures": (
        lambda w: w.rl(model=StableDiffusion3Img2ImgPipeline(**BUILDERS["sd3"](0).components)),
        ValueError,
        "StableDiffusion3Img2ImgPipeline ... ['image'] ... `call_kwargs={'image': ...}`",
    ),
    "a teacher of pictures": (
        lambda w: w.opd(teachers=StableDiffusion3Img2ImgPipeline(**BUILDERS["sd3"](1).components)),
        ValueError,
        "teacher 'teacher' ... StableDiffusion3Img2ImgPipeline ... ['image']",
    ),
    "NaN in the student": (
        lambda w: w.opd(model=w.copy("base", with_nan)),
        ValueError,
        "StableDiffusion3Pipeline ... NaN or infinity at step 0 ... transformer",
    ),
    "a dtype that is a number": (
        lambda w: w.opd(model_init_kwargs={"dtype": 16}),
        ValueError,
        "`model_init_kwargs` ... dtype 16 ... 'bfloat16'",
    ),
    "a variant that is not there": (
        lambda w: w.opd(model_init_kwargs={"variant": "fp16"}),
        ValueError,
        "student ... cannot be loaded: ... variant",
    ),
    # What is trained, and with what
    "a dict for a LoRA": (lambda w: w.opd(peft_config={"r": 4}), TypeError, "`peft_config` ... `LoraConfig` ... dict"),
    "another method for the student": (
        lambda w: w.opd(peft_config=IA3Config(target_modules=["to_q"], feedforward_modules=[])),
        TypeError,
        "`peft_config` ... `LoraConfig` ... IA3Config",
    ),
    "no target modules": (
        lambda w: w.opd(model=BUILDERS["sd3"](0), peft_config=lora(target_modules=None)),
        ValueError,
        "`peft_config` ... `target_modules` ... ['to_q', 'to_k', 'to_v', 'to_out.0']",
    ),
    "target modules of another family": (
        lambda w: w.opd(model=BUILDERS["sd3"](0), peft_config=lora(target_modules=["q_proj"])),
        ValueError,
        "`peft_config` ... SD3Transformer2DModel ... q_proj",
    ),
    "a rank that is text": (
        lambda w: w.opd(model=BUILDERS["sd3"](0), peft_config=lora(r="4")),
        ValueError,
        "`peft_config` ... SD3Transformer2DModel",
    ),
    "a callback that is a name": (
        lambda w: w.opd(callbacks=["early"]),
        TypeError,
        "`callbacks` ... list of `TrainerCallback`s ... ['early']",
    ),
    "one callback for a list": (
        lambda w: w.opd(callbacks=Late()),
        TypeError,
        "`callbacks` ... list of `TrainerCallback`s ... Late",
    ),
    "an optimizer for a pair": (
        lambda w: w.opd(optimizers=torch.optim.SGD([torch.zeros(1)])),
        TypeError,
        "`optimizers` ... pair ... SGD",
    ),
    "an optimizer that is a class": (
        lambda w: w.opd(optimizers=(torch.optim.SGD, None)),
        TypeError,
        "`optimizers` ... pair",
    ),
    "one in a pair": (lambda w: w.opd(optimizers=(None,)), TypeError, "`optimizers` ... pair"),
    "an optimizer of something else": (
        lambda w: (lambda base: w.opd(model=base, optimizers=(torch.optim.SGD(base.transformer.parameters()), None)))(
            BUILDERS["sd3"](0)
        ),
        ValueError,
        "`optimizers` ... parameters, none of which the student trains",
    ),
    # Rewards. What they return: test_rewards.py
    "no reward": (lambda w: w.rl(funcs=None), TypeError, "`reward_funcs` ... NoneType"),
    "a judge that is a class": (lambda w: w.rl(funcs=Late), TypeError, "`reward_funcs` ... type: <class"),
    "a judge by position": (
        lambda w: w.rl(funcs=by_position),
        ValueError,
        "'by_position' takes ['prompts', 'images'] by position only",
    ),
    "a judge of anything by position": (
        lambda w: w.rl(funcs=lambda *given: [0.0]),
        ValueError,
        "'lambda' takes all it is given by position only",
    ),
    "a module that is given something else": (
        lambda w: w.rl(funcs=torch.nn.Linear(2, 2)),
        ValueError,
        "'Linear' needs ['input']",
    ),
    "a reward by name": (lambda w: w.rl(funcs="clip"), TypeError, "`reward_funcs` ... 'clip'"),
    "a reward that is short": (
        lambda w: w.rl(funcs=lambda images: {"a" * 500: 1.0}).train(),
        ValueError,
        "'lambda' ... 4 rewards ... dict",
    ),
    "weights of two for one": (lambda w: w.rl(reward_weights=[1.0, 2.0]), ValueError, "`reward_weights` ... 2"),
    # Going on
    "a checkpoint that is not there": (
        lambda w: w.opd().train(resume_from_checkpoint=str(w.folder / "gone")),
        ValueError,
        "/gone is no whole checkpoint ... trainer_state.json ... `resume_from_checkpoint=True`",
    ),
    "a LoRA for a checkpoint": (
        lambda w: w.rl().train(resume_from_checkpoint=str(w.lora)),
        ValueError,
        "/lora is no whole checkpoint ... trainer_state.json",
    ),
    "weights that are nowhere": (
        lambda w: w.opd().load_weights(w.folder / "gone"),
        ValueError,
        "/gone does not hold this student ... pytorch_lora_weights.safetensors",
    ),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("case", CASES)
def test_one_sentence(case: str, world: World):
    write, kind, words = CASES[case]
    with pytest.raises(kind, match=".*".join(re.escape(word) for word in words.split(" ... "))) as refusal:
        write(world)
    assert_is_ours(refusal.value)


def assert_is_ours(error: BaseException) -> None:
    assert "\n" not in str(error) and type(error) in (TypeError, ValueError)
    raised_in = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    assert raised_in[-1].startswith(str(Path(diffusion_opd.__file__).parent)), raised_in[-1]


def test_what_a_library_says_is_cut_in_its_middle():
    with pytest.raises(ValueError) as refusal, one_sentence("it does not fit"):
        raise RuntimeError("The files " + "\n  'a.bin'," * 1000 + " are none; pass `variant`.")
    assert re.fullmatch(r"it does not fit: The files 'a\.bin'.{,400} are none; pass `variant`\.", str(refusal.value))
    with pytest.raises(ValueError, match="^it does not fit: AssertionError$"), one_sentence("it does not fit"):
        raise AssertionError


# Settings at random

HOSTILE = [
    -1,
    0,
    10**30,
    -0.5,
    0.5,
    2.5,
    math.nan,
    math.inf,
    -math.inf,
    "",
    "x",
    "1e-4",
    b"x",
    True,
    [],
    {},
    ["x"],
    None,
]
OWN = {
    cls: sorted(
        {entry.name for entry in dataclasses.fields(cls)} - {e.name for e in dataclasses.fields(TrainingArguments)}
    )
    for cls in (DiffusionOPDConfig, DiffusionNFTConfig, DiffusionGRPOConfig)
}
INHERITED = ["learning_rate", "max_grad_norm", "num_train_epochs", "per_device_eval_batch_size", "seed", "weight_decay"]


@pytest.mark.parametrize("cls", OWN)
def test_a_hostile_value_is_refused_by_its_name_or_means_something(cls: type):
    """Each field alone, and pairs of them: what is left of a config is of the types it is annotated with."""
    draw = random.Random(0)
    alone = [{name: value} for name in OWN[cls] + INHERITED for value in HOSTILE]
    pairs = [{name: draw.choice(HOSTILE) for name in draw.sample(OWN[cls], 2)} for _ in range(200)]
    for kwargs in alone + pairs:
        needed = {"sde_window_size": 1} if "sde_window_range" in kwargs else {}
        try:
            made = cls("out", use_cpu=True, **(needed | kwargs))
        except (TypeError, ValueError) as error:
            assert any(f"`{name}`" in str(error) or f"`{name}=" in str(error) for name in kwargs), (kwargs, error)
            assert_is_ours(error)
        else:
            assert made.num_learnt_steps >= 1 and isinstance(made.pipeline_kwargs, dict), kwargs
            assert all(math.isfinite(v) for v in vars(made).values() if isinstance(v, float)) or kwargs == {
                "max_grad_norm": math.inf
            }


# Metrics by which a checkpoint is the best


def offered(make: Callable[..., Any], **kwargs: Any) -> set[str]:
    """By the refusal of an unknown one."""
    with pytest.raises(ValueError, match="`metric_for_best_model` must be one of") as refusal:
        make(eval_strategy="epoch", metric_for_best_model="x", **kwargs)
    return set(re.findall(r"'([^']+)'", str(refusal.value).partition(", got")[0]))


@pytest.mark.slow
def test_the_metrics_that_are_offered_are_those_of_evaluation(world: World):
    data = rows(prompt=["a", "b"], task=["x", "y"], teacher_id=["x", "y"])
    teachers = {"x": str(world.lora), "y": str(world.diffusers_lora)}
    funcs = {"x": brightness, "y": [brightness, darkness]}
    of_the_run = {"runtime", "samples_per_second", "steps_per_second", "epoch"}
    for make, given in ((world.opd, {"teachers": teachers}), (world.rl, {"funcs": funcs})):
        for evaluated in (data, data.select([0])):
            given |= {"data": data, "eval_dataset": evaluated}
            metrics = {name.removeprefix("eval_") for name in make(**given).evaluate()} - of_the_run
            assert offered(make, **given) == metrics
        for metric in (f"eval_{min(metrics)}", max(metrics)):
            make(**given, eval_strategy="epoch", metric_for_best_model=metric)


def test_a_callback_and_a_subclass_may_add_metrics(world: World):
    class Judged(DiffusionOPDTrainer):
        pass

    settings = dict(eval_strategy="epoch", metric_for_best_model="taste")
    world.opd(eval_dataset=PROMPTS, callbacks=[Late()], **settings)
    args = config(world.folder / "out", **settings)
    Judged(str(world.base), str(world.lora), args, PROMPTS, eval_dataset=PROMPTS, peft_config=lora())


# Checkpoints of another run


@pytest.mark.slow
def test_rewards_are_those_of_the_checkpoint(world: World):
    def redness(images):
        return [0.0] * len(images)

    checkpoint = world.checkpoint()
    assert json.loads((checkpoint / "reward_manifest.json").read_text()) == {
        "version": 1,
        "trainer": "DiffusionGRPO",
        "rewards": {"all": ["brightness"]},
    }
    for trainer, sentence in {
        world.rl(
            funcs=redness
        ): r"learnt from the rewards \{'all': \['brightness'\]\}, this run has \{'all': \['redness'",
        world.rl(funcs={"a": brightness}): r"learnt from the rewards .*, this run has \{'a': \['brightness'\]\}",
        world.rl(trainer="NFT"): r"was saved by DiffusionGRPO, this run is DiffusionNFT; resume it with that\.$",
        world.opd(): r"has no teacher_manifest\.json",
    }.items():
        with pytest.raises(ValueError, match=f"^{checkpoint} {sentence}"):
            trainer.train(resume_from_checkpoint=str(checkpoint))
    world.rl(max_steps=2).train(resume_from_checkpoint=str(checkpoint))
    halve(checkpoint / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match=r"is no whole checkpoint: its pytorch_lora_weights\.safetensors has \d+ of"):
        world.rl().train(resume_from_checkpoint=str(checkpoint))


# JSON of other shapes

SHAPES = [
    "[]",
    "[[1]]",
    '"x"',
    "null",
    "1",
    "true",
    "{",
    "",
    "[" * 100_000,
    '{"a":' * 100_000,
    "\x00",
    "{}",
    '{"a": 1}',
]


def rewritten(name: str, text: str) -> Callable[[Path], Any]:
    def edit(folder: Path) -> None:
        (folder / name).write_text(text)

    return edit


def refused(act: Callable[[], Any]) -> str:
    with pytest.raises((ValueError, TypeError)) as refusal:
        act()
    assert_is_ours(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize("text", SHAPES, ids=lambda text: text[:8])
def test_json_of_another_shape(text: str, world: World):
    """Of whatever a folder holds; deep nests are a `RecursionError` of Python's."""
    index, of_lora, of_part = "model_index.json", "adapter_config.json", "config.json"
    assert "student '" in refused(lambda: world.opd(model=world.copy("base", rewritten(index, text))))
    for source, name in (("pipeline", index), ("lora", of_lora), ("pipeline", f"transformer/{of_part}")):
        folder = world.copy(source, rewritten(name, text))
        assert f"teacher '{folder.name}'" in refused(lambda folder=folder: world.opd(teachers=folder)), name
    denoiser = Teacher(world.copy("pipeline", rewritten(f"transformer/{of_part}", text)), subfolder="transformer")
    assert f"{denoiser.path}/transformer'" in refused(lambda: world.opd(teachers=denoiser))
    student = world.copy("base", rewritten(f"transformer/{of_part}", text))
    assert f"student '{student}' " in refused(lambda: world.opd(model=student))


@pytest.mark.parametrize("entry", [None, 1, "transformer", [], [None], ["diffusers"], [1, 2], {}, [["x"], {}], True])
def test_an_index_with_entries_of_another_shape(entry: Any, world: World):
    edit = with_index(transformer=entry)
    assert "student '" in refused(lambda: world.opd(model=world.copy("base", edit)))
    assert "teacher '" in refused(lambda: world.opd(teachers=world.copy("pipeline", edit)))


@pytest.mark.parametrize(
    "entries",
    [{"r": "x"}, {"r": None}, {"r": []}, {"lora_alpha": "x"}, {"target_modules": 5}, {"rank_pattern": []}]
    + [{"alpha_pattern": {"to_q": "x"}}, {"peft_type": ["LORA"]}, {"peft_type": None}, {"use_dora": "yes", "r": {}}],
    ids=str,
)
def test_a_lora_config_with_entries_of_another_shape(entries: dict, world: World):
    assert "teacher '" in refused(lambda: world.opd(teachers=world.copy("lora", lambda f: poor(f, **entries))))


@pytest.mark.slow
def test_json_of_another_shape_in_a_checkpoint(world: World):
    of_states = ['{"global_step": "1"}', '{"global_step": 1, "log_history": 5}', '{"what": 1}', '{"epoch": 1}']
    of_teachers = ['{"teachers": 5}', '{"teachers": [1]}', '{"teachers": [{"id": "x"}]}', '{"teachers": [{"id": []}]}']
    of_rewards = ['{"trainer": 5, "rewards": 1}', '{"trainer": "DiffusionGRPO"}']
    trainer = world.opd(max_steps=1, save_strategy="steps", save_steps=1)
    trainer.args.output_dir = str(world.folder / "of_json")
    trainer.train()
    for make, checkpoint, manifest, further in (
        (world.opd, world.folder / "of_json" / "checkpoint-1", "teacher_manifest.json", of_teachers),
        (world.rl, world.checkpoint(), "reward_manifest.json", of_rewards),
    ):
        resumed = make(max_steps=2)
        shapes = {
            "trainer_state.json": SHAPES + of_states,
            "checkpoint_files.json": SHAPES[:-2],
            manifest: SHAPES + further,
        }
        for name, texts in shapes.items():
            before = (checkpoint / name).read_text()
            for text in texts:
                (checkpoint / name).write_text(text)
                (checkpoint / "checkpoint_files.json").write_text("{}") if name == manifest else None
                sentence = refused(partial(resumed.train, resume_from_checkpoint=str(checkpoint)))
                assert str(checkpoint) in sentence, (name, text, sentence)
            (checkpoint / name).write_text(before)


def test_what_a_lora_says_of_its_base_in_another_shape(world: World):
    file = "adapter_model.safetensors"
    for text in ["[]", "5", "{", '{"x": 1}', '{"x": ["y"]}', "[" * 100_000]:

        def edit(folder: Path, text: str = text) -> None:
            save_file(load_file(folder / file), folder / file, metadata={"diffusion_opd_base": text})

        assert "base" in refused(lambda edit=edit: world.opd(teachers=world.copy("lora", edit)))


# Datasets in a format of their own


@pytest.mark.parametrize("form", ["torch", "numpy", "pandas", "arrow"])
@pytest.mark.parametrize("streams", [False, True])
def test_a_dataset_in_a_format_is_what_its_rows_say(form: str, streams: bool, world: World, tmp_path):
    rows = Dataset.from_dict({"prompt": ["a", "b"], "negative_prompt": ["x", "y"], "size": [1, 2]})
    seen: list[dict] = []

    def judge(prompts, images, **columns):
        seen.append({"prompts": prompts, **{key: columns[key] for key in ("negative_prompt", "size")}})
        return [0.0] * len(prompts)

    for data in (rows, rows.with_format(form)):
        data = data.to_iterable_dataset() if streams else data
        world.rl(judge, {"x": data}, remove_unused_columns=False).train()
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :] and type(seen[0]["size"][0]) is int


def test_a_format_of_some_columns_hides_the_others(world: World):
    """As it does in the dataset's own rows."""
    rows = Dataset.from_dict({"prompt": ["a"], "negative_prompt": ["x"]})
    for kwargs, columns in (({}, {"prompt"}), ({"output_all_columns": True}, {"prompt", "negative_prompt"})):
        trainer = world.opd(data=rows.with_format("numpy", columns=["prompt"], **kwargs))
        assert trainer.data.columns.keys() == columns


# Code and pickles, which run what their author wrote


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (str(self.path), "w")


def set_trap(path: Path) -> Callable[[Path], Any]:
    def edit(folder: Path) -> None:
        for file in folder.rglob("*.safetensors"):
            as_pickle(file)
        for file in folder.rglob("*.bin"):
            torch.save({"weight": Trap(path)}, file)

    return edit


def with_code(path: Path) -> Callable[[Path], Any]:
    def edit(folder: Path) -> None:
        with_index(_class_name=["pipeline", "OwnPipeline"])(folder)
        code = f"open({str(path)!r}, 'w')\nfrom diffusers import StableDiffusion3Pipeline\n"
        (folder / "pipeline.py").write_text(code + "class OwnPipeline(StableDiffusion3Pipeline):\n    pass\n")

    return edit


@pytest.mark.parametrize("source", ["base", "pipeline", "lora", "diffusers_lora"])
def test_pickles_are_not_read(source: str, world: World, tmp_path):
    folder, sprung = world.copy(source, set_trap(tmp_path / "sprung")), tmp_path / "sprung"
    torch.load(next(folder.rglob("*.bin")), weights_only=False)
    assert sprung.exists()
    sprung.unlink()
    ways = [dict(teachers=folder)]
    if source == "pipeline":
        ways += [dict(teachers=Teacher(folder, subfolder="transformer"))]
    elif source == "base":  # where a user says so, torch still reads tensors alone
        ways = [dict(model=folder), dict(model=folder, model_init_kwargs={"use_safetensors": False})]
    else:
        name = next(folder.glob("*.bin")).name
        ways += [dict(teachers=Teacher(folder, weight_name=name))]
    for way in ways:
        with pytest.raises(ValueError, match="safetensors|cannot be loaded") as refusal:
            world.opd(**way)
        assert_is_ours(refusal.value)
        assert not sprung.exists()


def test_pickles_that_a_user_trusts_are_read(world: World):
    def edit(folder: Path) -> None:
        for file in folder.rglob("*.safetensors"):
            as_pickle(file)

    folder = world.copy("base", edit)
    with pytest.raises(
        ValueError, match=r"`model_init_kwargs=\{'use_safetensors': False\}` reads pickles that you trust"
    ):
        world.opd(model=folder)
    pipeline = world.opd(model=folder, model_init_kwargs={"use_safetensors": False}).pipeline
    for name in ("vae", "text_encoder_3"):
        expected = getattr(BUILDERS["sd3"](0), name).state_dict()
        assert all(torch.equal(getattr(pipeline, name).state_dict()[key], value) for key, value in expected.items())
    world.opd(teachers=DiffusionPipeline.from_pretrained(folder, use_safetensors=False))


def test_code_of_a_repository_runs_where_a_user_says_so(world: World, tmp_path):
    ran = tmp_path / "ran"
    folder = world.copy("base", with_code(ran))
    custom = {"custom_pipeline": str(folder)}
    for way in (dict(model=folder), dict(model_init_kwargs=custom), dict(teachers=folder)):
        with pytest.raises(ValueError, match=r"contains custom code .*`trust_remote_code=True`") as refusal:
            world.opd(**way)
        assert_is_ours(refusal.value)
        assert not ran.exists()
    trainer = world.opd(model=folder, model_init_kwargs={"trust_remote_code": True})
    assert ran.exists() and type(trainer.pipeline).__name__ == "OwnPipeline"
    world.opd(teachers=DiffusionPipeline.from_pretrained(folder, trust_remote_code=True))


# What has a meaning, but perhaps another one


def test_a_task_column_is_told_of(world: World, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = world.rl(data=rows(prompt=["a", "b"], task=["x", "y"]))
        assert trainer.tasks == ["x", "y"] and "The column 'task' of train_dataset makes 2 tasks" in caplog.text
        caplog.clear()
        world.rl(funcs={"x": brightness, "y": brightness}, data=rows(prompt=["a", "b"], task=["x", "y"]))
        assert "makes 2 tasks" not in caplog.text


def test_rewards_that_never_apply_are_told_of(world: World, caplog):
    MultiProcessAdapter.warning_once.cache_clear()  # another test may have been told
    with caplog.at_level(logging.WARNING):
        world.rl(funcs=lambda images: [None] * len(images)).train()
    assert "No reward function applies to any sample of task 'all'" in caplog.text


@pytest.mark.parametrize("family", ["zimage", "wan", "sd15"])
def test_a_prompt_that_is_cut_is_told_of(family: str, tmp_path, caplog):
    """diffusers warns in some pipelines and not in others; here each does, once."""
    for words, is_cut in ((3, False), (3000, True)):
        with caplog.at_level(logging.WARNING):
            DiffusionOPDTrainer(
                BUILDERS[family](0),
                BUILDERS[family](1),
                config(tmp_path, family),
                train_dataset=rows(prompt=["a fox", "word " * words]),
            )
        assert ("is cut" in caplog.text) == is_cut


@pytest.mark.parametrize(("family", "end"), [("sd15", "🦊"), ("sd3", "狐"), ("zimage", "🧑\u200d🚒\ufe0f")])
def test_a_prompt_of_few_characters_and_many_tokens_is_told_of(family: str, end: str, tmp_path, caplog):
    """Beside one of more characters that is not cut."""
    for cut, is_cut in ((end, False), (end * 90, True)):
        with caplog.at_level(logging.WARNING):
            DiffusionOPDTrainer(
                BUILDERS[family](0),
                BUILDERS[family](1),
                config(tmp_path, family),
                train_dataset=rows(prompt=["a fox", cut, "a " * 8]).shuffle(seed=1),
            )
        assert ("is cut" in caplog.text) == is_cut, caplog.text
