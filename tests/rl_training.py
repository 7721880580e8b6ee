"""Small runs that learn from rewards, on a tiny SD3 (and others)."""

import numpy as np
from datasets import Dataset

from diffusion_opd import DiffusionGRPOConfig, DiffusionGRPOTrainer, DiffusionNFTConfig, DiffusionNFTTrainer
from tests.tiny_pipelines import BUILDERS, CALL
from tests.training import lora

NFT, GRPO = DiffusionNFTTrainer, DiffusionGRPOTrainer
CONFIGS = {NFT: DiffusionNFTConfig, GRPO: DiffusionGRPOConfig}
DATA = Dataset.from_dict({"prompt": [f"prompt number {i}" for i in range(6)], "shade": [0.1 * i for i in range(6)]})


def redness(images, **kwargs):
    """Of a video its first frame's."""
    pictures = [np.asarray(image if not isinstance(image, list) else image[0], dtype=float) for image in images]
    return [float((picture[..., 0] - picture[..., 2]).mean() / 255) for picture in pictures]


def config(cls, out, family: str = "sd3", **kwargs):
    call = dict(CALL[family])
    defaults = dict(
        per_device_train_batch_size=4,
        num_generations=4,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        num_inference_steps=3,
        guidance_scale=call.pop("guidance_scale", None),
        call_kwargs=call,
        learning_rate=1e-2,
        disable_tqdm=True,
        image_steps=0,
    )
    return CONFIGS[cls](str(out), **(defaults | kwargs))


def trainer_of(cls, out, family: str = "sd3", rewards=redness, data=DATA, peft_config=None, full=False, **kwargs):
    extra = {key: kwargs.pop(key) for key in ("eval_dataset", "callbacks") if key in kwargs}
    return cls(
        BUILDERS[family](0),
        rewards,
        config(cls, out, family, **kwargs),
        train_dataset=data,
        peft_config=None if full else peft_config or lora(),
        **extra,
    )
