"""LoRAs of teachers, and the two formats in which they lie on disk."""

import contextlib
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

from diffusion_opd.adapters import STUDENT_ADAPTER
from diffusion_opd.denoisers import denoisers_of
from diffusion_opd.policy import Policy
from diffusion_opd.teachers import load_teachers, name_teachers
from tests.tiny_pipelines import BUILDERS, CALL, LORA_TARGETS, denoiser, frozen

LORA_FILE = "pytorch_lora_weights.safetensors"


def lora(**kwargs) -> LoraConfig:
    """A LoRA that changes the prediction from the start: `lora_B` is drawn too."""
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LORA_TARGETS, "init_lora_weights": False} | kwargs)


def base(family: str | DiffusionPipeline) -> DiffusionPipeline:
    return BUILDERS[family](0) if isinstance(family, str) else family


def with_lora(family: str | DiffusionPipeline, seed: int, config: LoraConfig) -> PeftModel:
    return frozen(seed, get_peft_model, denoiser(base(family)), config)


def save_peft(folder: Path, family: str | DiffusionPipeline = "sd3", seed: int = 1, **config) -> Path:
    with_lora(family, seed, lora(**config)).save_pretrained(str(folder))
    return folder


def save_diffusers(
    folder: Path, family: str | DiffusionPipeline = "sd3", seed: int = 1, metadata: bool = True, **config
) -> Path:
    pipe = base(family)
    module = denoiser(pipe)
    frozen(seed, lambda: module.add_adapter(lora(**config)) or module)
    name = next(iter(denoisers_of(pipe)))
    facts = _collate_lora_metadata({name: module}) if metadata else {}
    pipe.save_lora_weights(folder, **{f"{name}_lora_layers": get_peft_model_state_dict(module)}, **facts)
    return folder


# Side by side with plain diffusers and PEFT


def draw(pipe: DiffusionPipeline, family: str = "sd3", adapter: str | None = None, steps: int = 2) -> torch.Tensor:
    """Latents of two prompts; with `adapter`, under that adapter."""
    generators = [torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)]
    with contextlib.nullcontext() if adapter is None else Policy(pipe, steps, adapter=adapter).active():
        call = {"output_type": "latent"} | CALL[family]
        return pipe(prompt=["a cat", "two dogs"], num_inference_steps=steps, generator=generators, **call)[0]


def student_with_lora(family: str = "sd3") -> DiffusionPipeline:
    """As the trainer makes it: an adapter that trains on a frozen backbone."""
    pipe = BUILDERS[family](0)
    if hasattr(denoiser(pipe), "add_adapter"):
        denoiser(pipe).add_adapter(lora(r=2, target_modules=["to_q", "to_v"]), STUDENT_ADAPTER)
    return pipe


def load(
    teachers: Any, student: DiffusionPipeline, trains_lora: bool = True, dtype: torch.dtype = torch.float32
) -> list:
    PartialState(cpu=True)  # which warnings ask for
    return load_teachers(name_teachers(teachers), student, trains_lora, dtype)


@cache
def base_latents(family: str) -> torch.Tensor:
    return draw(BUILDERS[family](0), family)


def by_peft(folder: Path, family: str) -> torch.Tensor:
    pipe = BUILDERS[family](0)
    # PEFT injects into the module itself, so the pipeline runs under the adapter
    PeftModel.from_pretrained(denoiser(pipe), str(folder))
    denoiser(pipe).requires_grad_(False)
    return draw(pipe, family)


def by_diffusers(folder: Path, family: str, weight_name: str | None = None) -> torch.Tensor:
    pipe = BUILDERS[family](0)
    pipe.load_lora_weights(folder, weight_name=weight_name)
    denoiser(pipe).requires_grad_(False)
    return draw(pipe, family)


def assert_teaches(teacher: Any, family: str, expected: torch.Tensor) -> None:
    (loaded,) = load(teacher, student_with_lora(family))
    assert not torch.allclose(expected, base_latents(family), rtol=1e-2)
    assert torch.equal(draw(loaded.pipeline, family, loaded.adapter), expected)
