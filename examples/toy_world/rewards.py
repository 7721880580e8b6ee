"""The judges as reward functions, and what training on them shares: the same model, sampler and data for every run.

This module knows the library and the world; specialists.py and study/ say what is trained with which settings.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from diffusers import FluxKontextPipeline
from peft import LoraConfig
from PIL import Image

from diffusion_opd import (
    DiffusionGRPOConfig,
    DiffusionGRPOTrainer,
    DiffusionNFTConfig,
    DiffusionNFTTrainer,
    DiffusionROPDConfig,
    DiffusionROPDTrainer,
)
from diffusion_opd.checkpoints import last_checkpoint
from examples.toy_world.judges import scores
from examples.toy_world.pipeline import BASE, SAMPLING
from examples.toy_world.world import Prompt, Task, prompts_of, sample_prompts, sources

LORA_TARGETS = [
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("proj_mlp", "proj_out"),
]
TRAINERS = {
    "nft": (DiffusionNFTTrainer, DiffusionNFTConfig),
    "grpo": (DiffusionGRPOTrainer, DiffusionGRPOConfig),
    "ropd": (DiffusionROPDTrainer, DiffusionROPDConfig),
}
PROMPTS, EDITS = 2000, 216  # rows of each task for training: edits have pictures, which are files for opd.yaml


def lora_config(rank: int = 16) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights="gaussian", target_modules=LORA_TARGETS)


def training_prompts(task: Task, seed: int, word: str | None = None) -> Dataset:
    """Prompts, and the pictures that instructions are about. With a `word`, which goes ahead of each prompt, what it is
    without it is a column `plain`."""
    prompts = sample_prompts(task, EDITS if task == "edit" else PROMPTS, seed)
    texts, images = [prompt.text for prompt in prompts], sources(prompts, seed)
    columns = {"prompt": [f"{word} {text}" for text in texts], "plain": texts} if word else {"prompt": texts}
    return Dataset.from_dict(columns | ({"image": images} if images else {}))


def reward_of(task: Task) -> Callable[..., list[float]]:
    """The task's judge, which needs what a prompt asks for, not its words alone; that of editing the source besides."""
    asked: dict[str, Prompt] = {p.text: p for heldout in (False, True) for p in prompts_of(task, heldout)}

    def reward(prompts: Sequence[str], images: Sequence[Image.Image], **columns: Any) -> list[float]:
        return scores(images, [asked[prompt] for prompt in prompts], columns.get("image"))

    reward.__name__ = task
    return reward


def sampling_kwargs() -> dict[str, Any]:
    """The world's sampler as fields of a config."""
    sampling = dict(SAMPLING)
    fields = {key: sampling.pop(key) for key in ("num_inference_steps", "height", "width")}
    return fields | {"call_kwargs": sampling}


def reinforce(
    algorithm: str,
    tasks: Sequence[Task],
    output_dir: Path,
    seed: int = 0,
    model: FluxKontextPipeline | None = None,
    student_lora: Path | None = None,
    teachers: Mapping[Task, str] | None = None,
    callbacks: Sequence[Any] = (),
    rank: int = 16,
    **settings: Any,
) -> DiffusionNFTTrainer | DiffusionGRPOTrainer | DiffusionROPDTrainer:
    """Trains a LoRA, a new one or `student_lora`, on the rewards of one task or of several in turn, and on what their
    `teachers` say; a run that was killed goes on from its last checkpoint."""
    trainer_class, config_class = TRAINERS[algorithm]
    args = config_class(
        str(output_dir),
        **sampling_kwargs()
        | dict(lr_scheduler_type="constant_with_warmup", warmup_steps=5, report_to="none", seed=seed, image_steps=0)
        | dict(logging_steps=1, save_steps=25, save_total_limit=1, disable_tqdm=True)
        | settings,
    )
    trainer = trainer_class(
        model=model or str(BASE),
        reward_funcs={task: reward_of(task) for task in tasks},
        args=args,
        train_dataset={task: training_prompts(task, seed) for task in tasks},
        callbacks=list(callbacks),
        teachers=dict(teachers) if teachers else None,
        student_lora=str(student_lora) if student_lora else None,
        peft_config=None if student_lora else lora_config(rank),
    )
    trainer.pipeline.set_progress_bar_config(disable=True)
    trainer.train(resume_from_checkpoint=last_checkpoint(output_dir))
    trainer.save_model()
    return trainer
