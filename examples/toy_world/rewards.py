"""The judges as reward functions, and what training on them shares: the same model, sampler and data for every run.

This module knows the library and the world; specialists.py and study/ say what is trained with which settings.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig
from PIL import Image

from diffusion_opd import DiffusionGRPOConfig, DiffusionGRPOTrainer, DiffusionNFTConfig, DiffusionNFTTrainer
from diffusion_opd.checkpoints import last_checkpoint
from examples.toy_world.judges import JUDGES
from examples.toy_world.pipeline import BASE, SAMPLING
from examples.toy_world.world import Prompt, Task, prompts_of, sample_prompts

LORA_TARGETS = [
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
]
TRAINERS = {
    "nft": (DiffusionNFTTrainer, DiffusionNFTConfig),
    "grpo": (DiffusionGRPOTrainer, DiffusionGRPOConfig),
}
PROMPTS = 2000  # of each task, for training


def lora_config(rank: int = 16) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights="gaussian", target_modules=LORA_TARGETS)


def training_prompts(task: Task, seed: int) -> Dataset:
    return Dataset.from_dict({"prompt": [prompt.text for prompt in sample_prompts(task, PROMPTS, seed)]})


def reward_of(task: Task) -> Callable[..., list[float]]:
    """The task's judge, which needs what a prompt asks for, not its words alone."""
    asked: dict[str, Prompt] = {p.text: p for heldout in (False, True) for p in prompts_of(task, heldout)}

    def reward(prompts: Sequence[str], images: Sequence[Image.Image], **columns: Any) -> list[float]:
        return [JUDGES[task](image, asked[prompt]) for image, prompt in zip(images, prompts, strict=True)]

    reward.__name__ = task
    return reward


def sampling_kwargs() -> dict[str, Any]:
    """The world's sampler as fields of a config."""
    sampling = dict(SAMPLING)
    fields = {key: sampling.pop(key) for key in ("num_inference_steps", "guidance_scale", "height", "width")}
    return fields | {"call_kwargs": sampling}


def reinforce(
    algorithm: str,
    tasks: Sequence[Task],
    output_dir: Path,
    seed: int = 0,
    model: StableDiffusion3Pipeline | None = None,
    callbacks: Sequence[Any] = (),
    rank: int = 16,
    **settings: Any,
) -> DiffusionNFTTrainer | DiffusionGRPOTrainer:
    """Trains a LoRA on the rewards of one task or of several in turn; a run that was killed goes on from its last
    checkpoint."""
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
        peft_config=lora_config(rank),
    )
    trainer.pipeline.set_progress_bar_config(disable=True)
    trainer.train(resume_from_checkpoint=last_checkpoint(output_dir))
    trainer.save_model()
    return trainer
