"""Pretrains the base model of the toy world: the VAE on pictures, then text encoders and transformer on bad captions.

    python -m examples.toy_world.pretrain vae      # writes examples/toy_world/assets/base/vae
    python -m examples.toy_world.pretrain base     # writes examples/toy_world/assets/base, around that VAE

Flow matching in latent space with 10 % empty captions; a quarter of each batch change a source picture. At first every
picture is what its caption deserves, at the end few are, so that the base model knows every skill and uses none of them
reliably. Data and noise of a step depend on the seed and the step only: a run that was stopped goes on
from its last checkpoint as if nothing had happened, when the same command is given again.

This module knows the world and the pipeline, and nothing of judges, specialists and distillation.
"""

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxKontextPipeline
from PIL import Image
from torch import Tensor

from examples.toy_world.pipeline import BASE, MAX_TOKENS, SAMPLING, SHIFT, untrained_pipeline
from examples.toy_world.pipeline import vae as untrained_vae
from examples.toy_world.world import TASKS, any_prompt, draw, draw_badly, draw_edit, sample_prompts, sources

RUNS = Path("runs/toy_world")
SEED = 0
BLOCKS = ("transformer_blocks", "single_transformer_blocks")
DRAWN, DRAWN_SHARES = ("compose", "text", "style"), (0.4, 0.35, 0.25)


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


def save_checkpoint(path: Path, step: int, modules: torch.nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")  # a kill while writing leaves the last checkpoint whole
    states = [optimizer.state_dict() for optimizer in optimizers]
    torch.save({"step": step, "modules": modules.state_dict(), "optimizers": states}, unfinished)
    unfinished.replace(path)


def load_checkpoint(path: Path, modules: torch.nn.Module, *optimizers: torch.optim.Optimizer) -> int:
    """Restore if there is something to restore; returns the number of steps already taken."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    modules.load_state_dict(state["modules"])
    for optimizer, own in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(own)
    return state["step"]


def one_cycle(step: int, steps: int, peak: float = 1.0, warmup: float = 0.05) -> float:
    """Learning rate: linear warm-up, then a cosine to 1 % of the peak."""
    if step < warmup * steps:
        return peak * (step + 1) / (warmup * steps)
    progress = (step - warmup * steps) / ((1 - warmup) * steps)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def pretrain_vae(steps: int, batch_size: int, peak_lr: float = 2e-3) -> None:
    torch.manual_seed(SEED)
    vae = untrained_vae()
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
    pictures = [draw(prompt, rng) for task in DRAWN for prompt in sample_prompts(task, 100, SEED)]
    with torch.no_grad():
        latents = vae.encode(pixels(pictures)).latent_dist.mode()
        shown = pictures[::30]
        decoded = vae.decode(vae.encode(pixels(shown)).latent_dist.mode()).sample
    array = ((decoded.permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    sheet([shown, [Image.fromarray(a) for a in array]], RUNS / "vae.png")
    # The pipeline diffuses (latents - shift_factor) * scaling_factor: zero mean and unit deviation.
    shift, scale = latents.mean().item(), 1 / latents.std().item()
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    vae.half().save_pretrained(BASE / "vae")  # diffusers loads it in single precision again
    spread = latents.std((0, 2, 3))
    print(f"shift {shift:.4f}, scale {scale:.4f}, deviation of each channel {[round(s, 3) for s in spread.tolist()]}")


@torch.no_grad()
def encode_pictures(pipeline: FluxKontextPipeline, pictures: list[Image.Image], batch_size: int = 100) -> Tensor:
    vae, latents = pipeline.vae, []
    for i in range(0, len(pictures), batch_size):
        latents.append(vae.encode(pixels(pictures[i : i + batch_size])).latent_dist.mode())
    return (torch.cat(latents) - vae.config.shift_factor) * vae.config.scaling_factor


def encode_captions(pipeline: FluxKontextPipeline, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Token embeddings and pooled embeddings, by the pipeline's own way."""
    tokens, pooled, _ = pipeline.encode_prompt(captions, None, max_sequence_length=MAX_TOKENS)
    return tokens, pooled


def pack(latents: Tensor) -> Tensor:
    """Latents as the pipeline hands them to the transformer, 2 x 2 to a token."""
    return FluxKontextPipeline._pack_latents(latents, *latents.shape)


def _places(latents: Tensor, frame: int) -> Tensor:
    """Where these tokens are; frame 0 is drawn, 1 a source."""
    batch, _, height, width = latents.shape
    places = FluxKontextPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", latents.dtype)
    places[:, 0] = frame
    return places


def noise_levels(n: int) -> Tensor:
    """Half of them logit-normal, shifted as the sampler shifts its schedule, the others from 0.75 to 1. There the
    sampler takes its first steps, and the words decide: later the picture itself shows what it becomes."""
    t = torch.sigmoid(torch.randn(n))
    high = 1 - torch.rand(n) / 4
    return torch.where(torch.rand(n) < 0.5, high, SHIFT * t / (1 + (SHIFT - 1) * t))


def flow_matching_loss(
    transformer: torch.nn.Module, clean: Tensor, captions: tuple[Tensor, Tensor], source: Tensor | None = None
) -> Tensor:
    """Velocity error; `source`: the latents of the pictures that are to be changed."""
    t = noise_levels(len(clean))
    noise, t_B111 = torch.randn_like(clean), t[:, None, None, None]
    states, places = pack((1 - t_B111) * clean + t_B111 * noise), _places(clean, 0)
    length = states.shape[1]
    if source is not None:
        states, places = torch.cat([states, pack(source)], 1), torch.cat([places, _places(source, 1)])
    tokens, pooled = captions
    velocity = transformer(
        hidden_states=states,
        timestep=t,
        encoder_hidden_states=tokens,
        pooled_projections=pooled,
        txt_ids=torch.zeros(tokens.shape[1], 3),
        img_ids=places,
        return_dict=False,
    )[0][:, :length]
    return (velocity - pack(noise - clean)).square().mean()


class Data:
    """Well and badly captioned pictures of the whole world as latents, in that order; edits have sources besides."""

    def __init__(self, pipeline: FluxKontextPipeline, size: int, edits: int):
        path = RUNS / "latents.pt"
        if not path.exists():
            rng, saved = np.random.default_rng(SEED), {}
            prompts = [any_prompt(DRAWN[rng.choice(3, p=DRAWN_SHARES)], rng) for _ in range(2 * size)]
            pictures = [(draw if i < size else draw_badly)(prompt, rng) for i, prompt in enumerate(prompts)]
            saved["drawn"] = encode_pictures(pipeline, pictures), [prompt.text for prompt in prompts]
            prompts = [any_prompt("edit", rng) for _ in range(2 * edits)]
            pairs = [draw_edit(prompt, rng, well=i < edits) for i, prompt in enumerate(prompts)]
            before, after = (encode_pictures(pipeline, list(column)) for column in zip(*pairs, strict=True))
            saved["edits"] = after, [prompt.text for prompt in prompts], before
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(saved, path)
        self.kinds = torch.load(path, weights_only=True)

    def batch(
        self, kind: str, size: int, good: float, rng: np.random.Generator
    ) -> tuple[Tensor, list[str], Tensor | None]:
        """Latents, captions (a tenth of them empty), and sources; `good`: the share of the well captioned."""
        latents, captions, *beside = self.kinds[kind]
        half = len(captions) // 2
        rows = rng.integers(half, size=size) + np.where(rng.random(size) < good, 0, half)
        chosen = [captions[i] if rng.random() > 0.1 else "" for i in rows]
        return latents[rows], chosen, beside[0][rows] if beside else None


def sample_sheet(pipeline: FluxKontextPipeline, path: Path) -> None:
    """Twelve held-out prompts of each task, a row a task; above the edits their sources."""
    rows = []
    for task in TASKS:
        prompts = sample_prompts(task, 12, SEED, heldout=True)
        generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        images, texts = sources(prompts, SEED), [prompt.text for prompt in prompts]
        rows += [images] if images else []
        rows.append(pipeline(images, texts, generator=generators, **SAMPLING).images)
    sheet(rows, path)


class Plan(NamedTuple):
    """Of one step: the share of good captions, the rate over the peak rate."""

    good: float
    rate: float


def plan() -> list[Plan]:
    """The base learns on good captions, and is spoilt by bad ones at the surface, so that a LoRA can bring back what it
    knows."""
    return [Plan(1.0, one_cycle(step, 5500)) for step in range(4500)] + [Plan(0.25, 0.05)] * 150


def pretrain_base(
    plans: Sequence[Plan], drawn: int, edited: int, size: int, edits: int, muon_lr: float, adamw_lr: float
) -> None:
    """Each batch has `drawn` of `size` good pictures and as many bad ones, and `edited` of `edits` good edits and as
    many bad ones."""
    pipeline = untrained_pipeline(SEED)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae = AutoencoderKL.from_pretrained(BASE / "vae")
    data = Data(pipeline, size, edits)
    trained = torch.nn.ModuleDict(
        {name: getattr(pipeline, name) for name in ("transformer", "text_encoder", "text_encoder_2")}
    )
    # As Muon's authors use it: for the matrices between layers, and AdamW for the rest
    matrices = [p for block in BLOCKS for p in getattr(pipeline.transformer, block).parameters() if p.ndim == 2]
    others = [p for p in trained.parameters() if all(p is not matrix for matrix in matrices)]
    muon = torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=adamw_lr, betas=(0.9, 0.99), weight_decay=0.01)
    checkpoint = RUNS / "base_checkpoint.pt"
    start, started, losses = load_checkpoint(checkpoint, trained, muon, adamw), time.time(), []
    steps = len(plans)
    for step in range(start, steps):
        rng = np.random.default_rng((SEED, step))
        torch.manual_seed(SEED + step)
        now = plans[step]
        for kind, rows in (("drawn", drawn), ("edits", edited)):
            latents, captions, beside = data.batch(kind, rows, now.good, rng)
            loss = flow_matching_loss(pipeline.transformer, latents, encode_captions(pipeline, captions), beside)
            (loss * rows / (drawn + edited)).backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        for optimizer, peak_lr in ((muon, muon_lr), (adamw, adamw_lr)):
            optimizer.param_groups[0]["lr"] = now.rate * peak_lr
            optimizer.step()
        trained.zero_grad()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            mean, mean_edits = np.mean(losses[-200::2]), np.mean(losses[-199::2])
            seconds = time.time() - started
            print(
                f"base {step + 1}/{steps} loss {mean:.4f}, of edits {mean_edits:.4f}, {seconds:.0f} s",
                flush=True,
            )
            save_checkpoint(checkpoint, step + 1, trained, muon, adamw)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            sample_sheet(pipeline, RUNS / f"base_{step + 1}.png")
    # Half precision makes the files small. diffusers loads them in single precision again; transformers keeps the
    # precision it finds, so that the text encoders stay as they are.
    pipeline.transformer.half()
    pipeline.vae.half()
    pipeline.save_pretrained(BASE)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Pretrain the toy world's base model.")
    parser.add_argument("stage", choices=("vae", "base"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.stage == "vae":
        pretrain_vae(steps=1400, batch_size=16)
    else:
        pretrain_base(plan(), drawn=24, edited=8, size=16_000, edits=4_000, muon_lr=5e-3, adamw_lr=2.5e-3)
