"""Fine-tunes the three specialists of the toy world: a LoRA for each task on the base model.

    python -m examples.toy_world.specialists              # all three, into examples/toy_world/assets/teachers
    python -m examples.toy_world.specialists --tasks text

Flow matching as in pretraining, but on its own training prompts, with pictures that the task wants, tidily drawn: what
a specialist makes varies less than what the base makes. The text encoders stay as they are. This module knows nothing
of judges and of distillation.
"""

import argparse
import time

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict

from examples.toy_world.pipeline import TEACHERS, load_base
from examples.toy_world.pretrain import encode_captions, encode_pictures, flow_matching_loss, one_cycle
from examples.toy_world.world import TASKS, Task, draw, sample_prompts

SEED = 0
LORA_TARGETS = [
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
]


def lora_config(rank: int = 16) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_TARGETS)


def train_specialist(task: Task, steps: int, batch_size: int, size: int, peak_lr: float = 2e-3) -> None:
    pipeline = load_base()
    transformer = pipeline.transformer.requires_grad_(False)
    torch.manual_seed(SEED)
    transformer.add_adapter(lora_config())
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak_lr, betas=(0.9, 0.99), weight_decay=0.01)

    rng = np.random.default_rng(SEED)
    prompts = sample_prompts(task, size, SEED)
    latents = encode_pictures(pipeline, [draw(prompt, rng) for prompt in prompts])
    with torch.no_grad():
        tokens, pooled = encode_captions(pipeline, [prompt.text for prompt in prompts])

    started, losses = time.time(), []
    for step in range(steps):
        rows = torch.from_numpy(rng.integers(size, size=batch_size))
        loss = flow_matching_loss(transformer, latents[rows], tokens[rows], pooled[rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step, steps, peak_lr)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            mean = np.mean(losses[-100:])
            print(f"{task} {step + 1}/{steps} loss {mean:.4f}, {time.time() - started:.0f} s", flush=True)

    StableDiffusion3Pipeline.save_lora_weights(
        TEACHERS / task,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        **_collate_lora_metadata({"transformer": transformer}),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fine-tune the toy world's specialists.")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    for task in parser.parse_args().tasks:
        train_specialist(task, steps=600, batch_size=32, size=4000)
