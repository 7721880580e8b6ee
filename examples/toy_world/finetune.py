"""Fine-tunes a LoRA on pictures by flow matching: where a specialist begins, and what distillation is compared with.

This module knows the pipeline and how it was pretrained, and nothing of judges and of the library.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import FluxKontextPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from torch import Tensor

from examples.toy_world.pretrain import encode_captions, encode_pictures, flow_matching_loss, one_cycle
from examples.toy_world.world import Prompt


class Pictures(NamedTuple):
    """Latents of pictures, the embeddings of their captions, and the latents of their sources if they have some."""

    latents: Tensor
    captions: tuple[Tensor, Tensor]
    sources: Tensor | None

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        pipeline: FluxKontextPipeline,
        prompts: Sequence[Prompt],
        pictures: list[Image.Image],
        sources: list[Image.Image] | None = None,
    ) -> "Pictures":
        captions = encode_captions(pipeline, [prompt.text for prompt in prompts])
        beside = encode_pictures(pipeline, sources) if sources else None
        return cls(encode_pictures(pipeline, pictures), captions, beside)


def finetune(
    pipeline: FluxKontextPipeline,
    kinds: Sequence[Pictures],
    shares: Sequence[float],
    peft_config: LoraConfig,
    output_dir: Path,
    seed: int,
    max_steps: int,
    batch_size: int,
    peak_lr: float,
) -> FluxKontextPipeline:
    """Trains an adapter on pictures of several kinds, each drawn with its share, and saves it as the trainers save
    theirs."""
    transformer = pipeline.transformer.requires_grad_(False)
    torch.manual_seed(seed)
    transformer.add_adapter(peft_config)
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak_lr, weight_decay=0.0)
    rng = np.random.default_rng(seed)
    for step in range(max_steps):
        for kind, number in zip(kinds, rng.multinomial(batch_size, shares), strict=True):
            if not number:
                continue
            rows = torch.from_numpy(rng.integers(len(kind.latents), size=number))
            tokens, pooled = kind.captions
            beside = None if kind.sources is None else kind.sources[rows]
            loss = flow_matching_loss(transformer, kind.latents[rows], (tokens[rows], pooled[rows]), beside)
            (loss * number / batch_size).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step, max_steps, peak_lr)
        optimizer.step()
        optimizer.zero_grad()
    pipeline.save_lora_weights(
        output_dir,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        **_collate_lora_metadata({"transformer": transformer}),
    )
    return pipeline
