"""LoRAs of teachers, and the two formats in which they lie on disk."""

from pathlib import Path

from diffusers import DiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

from diffusion_opd.denoisers import denoisers_of
from tests.tiny_pipelines import BUILDERS, LORA_TARGETS, denoiser, frozen


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
