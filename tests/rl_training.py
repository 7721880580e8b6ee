"""Small runs that learn from rewards, on a tiny SD3 (and others)."""

import math

import numpy as np
import torch
from datasets import Dataset
from diffusers import StableDiffusion3Pipeline
from transformers import TrainerCallback

from diffusion_opd import DiffusionGRPOConfig, DiffusionGRPOTrainer, DiffusionNFTConfig, DiffusionNFTTrainer
from tests.tiny_pipelines import BUILDERS, CALL
from tests.training import lora

NFT, GRPO = DiffusionNFTTrainer, DiffusionGRPOTrainer
CONFIGS = {NFT: DiffusionNFTConfig, GRPO: DiffusionGRPOConfig}
DATA = Dataset.from_dict({"prompt": [f"prompt number {i}" for i in range(6)], "shade": [0.1 * i for i in range(6)]})
TASKS = DATA.add_column("task", ["a", "b"] * 3)


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
    return next(CONFIGS[base] for base in cls.__mro__ if base in CONFIGS)(str(out), **(defaults | kwargs))


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


# What is seen of a run, and written down again


def weights_of(module: torch.nn.Module, part: str = "") -> torch.Tensor:
    return torch.cat([p.detach().flatten().float() for name, p in module.named_parameters() if part in name])


def old_weights(trainer: DiffusionNFTTrainer) -> torch.Tensor:
    return weights_of(trainer.model, ".old.") if trainer.trains_lora else weights_of(trainer.old.denoiser)


class Record(TrainerCallback):
    """The trained weights, and the gradients that made them, of each step."""

    def __init__(self):
        self.gradients, self.weights = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        self.gradients.append(gradients)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        parameters = [p.detach().flatten().clone() for p in model.parameters() if p.requires_grad]
        self.weights.append(torch.cat(parameters))


def seeds_seen(cls) -> tuple[type, dict]:
    """The trainer, noting the seeds that it draws with: `{(domain, task, place, ...): seeds}` of the last step, and
    `{prompt: seed}` of an evaluation."""
    seen = {}

    class Seen(cls):
        _name = cls._name

        def _generators(self, count, domain, step, task, cycle):
            generators = super()._generators(count, domain, step, task, cycle)
            seen[domain, task, cycle] = [generator.initial_seed() for generator in generators]
            return generators

        def _evaluation_generators(self, batch, *args):
            generators = super()._evaluation_generators(batch, *args)
            seen.update({row["prompt"]: own.initial_seed() for row, own in zip(batch, generators, strict=True)})
            return generators

    CONFIGS[Seen] = CONFIGS[cls]
    return Seen, seen


def advantages_by_hand(rewards: list[float]) -> torch.Tensor:
    rewards = torch.tensor(rewards)
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


def twin_of(trainer) -> StableDiffusion3Pipeline:
    """A pipeline of its own with the weights of the trained one."""
    student = BUILDERS["sd3"](0)
    student.transformer.add_adapter(lora())
    state = {key: value for key, value in trainer.model.state_dict().items() if ".old." not in key}
    student.transformer.load_state_dict(state)
    return student


def sde_by_hand(sigmas: torch.Tensor, index: int, noise_level: float):
    """SD3's own sigmas and the flow SDE: the mean of a step as a function, its std, and `dt`."""
    sigma, following = sigmas[index : index + 2].tolist()
    dt = following - sigma
    g = noise_level * math.sqrt(sigma / (1 - min(sigma, sigmas[1].item())))

    def mean(x, v):
        return x + dt * (v + g**2 / (2 * sigma) * (x + (1 - sigma) * v))

    return mean, g * math.sqrt(-dt), dt
