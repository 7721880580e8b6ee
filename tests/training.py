"""Small distillations of a tiny SD3 (and others), and what can be read off them."""

import pytest
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import LoraConfig

from diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer
from tests.tiny_pipelines import BUILDERS, CALL, LORA_TARGETS

PROMPTS = [f"prompt number {i}" for i in range(12)]
DATA = Dataset.from_dict({"prompt": PROMPTS, "teacher_id": ["a", "b"] * 6, "unused": list(range(12))})

# Each family once, as a LoRA where its pipeline can load one. In every run those that differ in kind: packed latents, a
# video, a VP model, and PixArt's pipelines, which cannot load a LoRA; SD3 is what all other tests train
IN_EVERY_RUN = ("flux", "wan", "sd15", "pixart_sigma")
FAMILIES = pytest.mark.parametrize(
    ("family", "full"),
    [
        pytest.param(family, family == "pixart_sigma", marks=() if family in IN_EVERY_RUN else pytest.mark.nightly)
        for family in BUILDERS
    ],
)


def lora(**kwargs) -> LoraConfig:
    defaults = dict(r=4, lora_alpha=16, init_lora_weights="gaussian", target_modules=LORA_TARGETS)
    return LoraConfig(**(defaults | kwargs))


def config(out, family: str = "sd3", **kwargs) -> DiffusionOPDConfig:
    defaults = dict(
        per_device_train_batch_size=2,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        num_inference_steps=4,
        call_kwargs=dict(CALL[family]),
        learning_rate=1e-2,
        disable_tqdm=True,
        image_steps=0,
    )
    return DiffusionOPDConfig(str(out), **(defaults | kwargs))


def trainer_of(
    out, family: str = "sd3", peft_config=None, full: bool = False, data=DATA, **kwargs
) -> DiffusionOPDTrainer:
    names = ("eval_dataset", "callbacks", "optimizers", "teachers", "eval_reward_funcs")
    extra = {key: kwargs.pop(key) for key in names if key in kwargs}
    teachers = extra.pop("teachers", None) or {"a": BUILDERS[family](1), "b": BUILDERS[family](2)}
    return DiffusionOPDTrainer(
        BUILDERS[family](0),
        teachers,
        config(out, family, **kwargs),
        train_dataset=data,
        peft_config=None if full else peft_config or lora(),
        **extra,
    )


def trained(trainer: DiffusionOPDTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.trainable_parameters])


def history(trainer: DiffusionOPDTrainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def latents(pipeline: DiffusionPipeline, family: str = "sd3") -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        return pipeline(
            prompt=["a fox"], num_inference_steps=2, output_type="latent", generator=generator, **CALL[family]
        )[0]


def guided_by_hand(pipeline, sample, timestep, prompts, guidance):
    """SD3's classifier-free guidance, without any pipeline."""
    texts = {"prompt": prompts, "prompt_2": None, "prompt_3": None}
    texts["max_sequence_length"] = CALL["sd3"]["max_sequence_length"]
    positive, negative, pooled, negative_pooled = pipeline.encode_prompt(**texts, do_classifier_free_guidance=True)
    predictions = [
        pipeline.transformer(
            hidden_states=sample,
            timestep=timestep.expand(len(prompts)),
            encoder_hidden_states=embeddings,
            pooled_projections=pool,
            return_dict=False,
        )[0]
        for embeddings, pool in ((positive, pooled), (negative, negative_pooled))
    ]
    return predictions[1] + guidance * (predictions[0] - predictions[1])
