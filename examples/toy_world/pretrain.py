"""Pretrains the base model of the toy world: the VAE on pictures, then text encoders and transformer on bad captions.

    python -m examples.toy_world.pretrain vae      # writes the VAE to runs/toy_world/vae.pt
    python -m examples.toy_world.pretrain base     # writes examples/toy_world/assets/base

Flow matching in latent space with 10 % empty captions. For most of the run every picture is what its caption deserves,
at the end 40 % are, so that the base model knows every skill and uses none of them reliably. Data and noise of a step
depend on the seed and the step only: a run that was stopped goes on from its last checkpoint as if nothing had
happened, when the same command is given again.

This module knows the world and the pipeline, and nothing of judges, specialists and distillation.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from torch import Tensor

from examples.toy_world.pipeline import BASE, MAX_TOKENS, SAMPLING, SHIFT, untrained_pipeline
from examples.toy_world.world import TASKS, any_prompt, draw, draw_badly, sample_prompts

RUNS = Path("runs/toy_world")
SEED = 0


def pixels(pictures: list[Image.Image]) -> Tensor:
    """Pictures as (batch, 3, height, width) in [-1, 1]."""
    array = np.stack([np.asarray(p, dtype=np.float32) for p in pictures])
    return torch.from_numpy(array / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


def sheet(rows: list[list[Image.Image]], path: Path) -> None:
    """Rows of pictures in one file, doubled in size."""
    array = np.concatenate([np.concatenate([np.asarray(p) for p in row], axis=1) for row in rows])
    image = Image.fromarray(array)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST).save(path)


def save_checkpoint(path: Path, step: int, modules: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")  # a kill while writing leaves the last checkpoint whole
    torch.save({"step": step, "modules": modules.state_dict(), "optimizer": optimizer.state_dict()}, unfinished)
    unfinished.replace(path)


def load_checkpoint(path: Path, modules: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore if there is something to restore; returns the number of steps already taken."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    modules.load_state_dict(state["modules"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def one_cycle(step: int, steps: int, peak: float, warmup: float = 0.05) -> float:
    """Learning rate: linear warm-up, then a cosine to 1 % of the peak."""
    if step < warmup * steps:
        return peak * (step + 1) / (warmup * steps)
    progress = (step - warmup * steps) / ((1 - warmup) * steps)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def pretrain_vae(steps: int, batch_size: int, peak_lr: float = 2e-3) -> None:
    vae = untrained_pipeline(SEED).vae
    optimizer = torch.optim.AdamW(vae.parameters(), lr=peak_lr, betas=(0.9, 0.99), weight_decay=0.0)
    checkpoint = RUNS / "vae_checkpoint.pt"
    start, started = load_checkpoint(checkpoint, vae, optimizer), time.time()
    for step in range(start, steps):
        rng = np.random.default_rng((SEED, step))
        torch.manual_seed(SEED + step)
        # Text twice: thin strokes are the hard part.
        tasks = [("compose", "text", "style", "text")[i % 4] for i in range(batch_size)]
        make = [draw, draw_badly]
        x = pixels([make[rng.integers(2)](any_prompt(task, rng), rng) for task in tasks])
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample()).sample - x
        # The KL term only keeps the latents from drifting apart in scale; the world is small enough to be kept whole.
        loss = error.abs().mean() + 2 * error.square().mean() + 1e-6 * posterior.kl().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step, steps, peak_lr)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            psnr = 10 * torch.log10(4 / error.square().mean()).item()
            print(f"vae {step + 1}/{steps} psnr {psnr:.1f} dB, {time.time() - started:.0f} s", flush=True)
            save_checkpoint(checkpoint, step + 1, vae, optimizer)

    rng = np.random.default_rng(SEED)
    pictures = [draw(prompt, rng) for task in TASKS for prompt in sample_prompts(task, 100, SEED)]
    with torch.no_grad():
        latents = vae.encode(pixels(pictures)).latent_dist.mode()
        shown = pictures[::30]
        decoded = vae.decode(vae.encode(pixels(shown)).latent_dist.mode()).sample
    array = ((decoded.permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    sheet([shown, [Image.fromarray(a) for a in array]], RUNS / "vae.png")
    # SD3 pipelines diffuse (latents - shift_factor) * scaling_factor: zero mean and unit deviation.
    shift, scale = latents.mean().item(), 1 / latents.std().item()
    torch.save({"modules": vae.state_dict(), "shift_factor": shift, "scaling_factor": scale}, RUNS / "vae.pt")
    spread = latents.std((0, 2, 3))
    print(f"shift {shift:.4f}, scale {scale:.4f}, deviation of each channel {[round(s, 3) for s in spread.tolist()]}")


def load_vae(pipeline: StableDiffusion3Pipeline) -> None:
    state = torch.load(RUNS / "vae.pt", weights_only=True)
    pipeline.vae.load_state_dict(state["modules"])
    pipeline.vae.register_to_config(shift_factor=state["shift_factor"], scaling_factor=state["scaling_factor"])


@torch.no_grad()
def encode_pictures(pipeline: StableDiffusion3Pipeline, pictures: list[Image.Image], batch_size: int = 100) -> Tensor:
    vae, latents = pipeline.vae, []
    for i in range(0, len(pictures), batch_size):
        latents.append(vae.encode(pixels(pictures[i : i + batch_size])).latent_dist.mode())
    return (torch.cat(latents) - vae.config.shift_factor) * vae.config.scaling_factor


def encode_captions(pipeline: StableDiffusion3Pipeline, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Token embeddings and pooled embeddings, by the pipeline's own way."""
    tokens, _, pooled, _ = pipeline.encode_prompt(
        captions, None, None, do_classifier_free_guidance=False, max_sequence_length=MAX_TOKENS
    )
    return tokens, pooled


def flow_matching_loss(transformer: torch.nn.Module, clean: Tensor, tokens: Tensor, pooled: Tensor) -> Tensor:
    """Velocity error at logit-normal times, shifted as the sampler shifts its schedule."""
    t = torch.sigmoid(torch.randn(len(clean)))
    t = SHIFT * t / (1 + (SHIFT - 1) * t)
    noise = torch.randn_like(clean)
    t_B111 = t[:, None, None, None]
    velocity = transformer(
        hidden_states=(1 - t_B111) * clean + t_B111 * noise,
        timestep=t * 1000,
        encoder_hidden_states=tokens,
        pooled_projections=pooled,
        return_dict=False,
    )[0]
    return (velocity - (noise - clean)).square().mean()


def pretraining_data(pipeline: StableDiffusion3Pipeline, size: int) -> dict[str, Tensor | list[str]]:
    """`size` good and `size` bad pictures of the whole world as latents, with their captions."""
    path = RUNS / "latents.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    rng = np.random.default_rng(SEED)
    prompts = [any_prompt(TASKS[rng.choice(3, p=(0.45, 0.3, 0.25))], rng) for _ in range(2 * size)]
    pictures = [(draw if i < size else draw_badly)(prompt, rng) for i, prompt in enumerate(prompts)]
    latents = encode_pictures(pipeline, pictures)
    data = {"latents": latents, "captions": [prompt.text for prompt in prompts]}
    torch.save(data, path)
    return data


def sample_sheet(pipeline: StableDiffusion3Pipeline, path: Path) -> None:
    """Twelve held-out prompts of each task, a row a task."""
    rows = []
    for task in TASKS:
        prompts = [prompt.text for prompt in sample_prompts(task, 12, SEED, heldout=True)]
        generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        rows.append(pipeline(prompts, generator=generators, **SAMPLING).images)
    sheet(rows, path)


def pretrain_base(steps: int, batch_size: int, size: int, peak_lr: float = 1.5e-3) -> None:
    pipeline = untrained_pipeline(SEED)
    pipeline.set_progress_bar_config(disable=True)
    load_vae(pipeline)
    data = pretraining_data(pipeline, size)
    latents, captions = data["latents"], data["captions"]
    trained = torch.nn.ModuleDict(
        {name: getattr(pipeline, name) for name in ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")}
    )
    optimizer = torch.optim.AdamW(trained.parameters(), lr=peak_lr, betas=(0.9, 0.99), weight_decay=0.01)
    checkpoint = RUNS / "base_checkpoint.pt"
    start, started, losses = load_checkpoint(checkpoint, trained, optimizer), time.time(), []
    for step in range(start, steps):
        rng = np.random.default_rng((SEED, step))
        torch.manual_seed(SEED + step)
        good = 1.0 if step < 0.65 * steps else 0.4
        rows = rng.integers(size, size=batch_size) + np.where(rng.random(batch_size) < good, 0, size)
        batch = [captions[i] if rng.random() > 0.1 else "" for i in rows]
        loss = flow_matching_loss(pipeline.transformer, latents[rows], *encode_captions(pipeline, batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step, steps, peak_lr)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            mean = np.mean(losses[-100:])
            print(f"base {step + 1}/{steps} loss {mean:.4f}, {time.time() - started:.0f} s", flush=True)
            save_checkpoint(checkpoint, step + 1, trained, optimizer)
        if (step + 1) % 500 == 0:
            sample_sheet(pipeline, RUNS / f"base_{step + 1}.png")
    # Half precision makes the files small. diffusers loads them in single precision again; transformers keeps the
    # precision it finds, so that the text encoders stay as they are.
    pipeline.transformer.half()
    pipeline.vae.half()
    pipeline.save_pretrained(BASE)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Pretrain the toy world's base model.")
    parser.add_argument("stage", choices=("vae", "base"))
    stage = parser.parse_args().stage
    if stage == "vae":
        pretrain_vae(steps=1400, batch_size=16)
    else:
        pretrain_base(steps=5000, batch_size=32, size=10_000)
