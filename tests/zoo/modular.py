"""Modular pipelines: trees of blocks, with the parts of the others."""

from functools import partial
from typing import Any

import diffusers
from diffusers import AnimaTextConditioner, CosmosTransformer3DModel, ModularPipeline
from transformers import Qwen3Model

from tests.editing_pipelines import flux_kontext
from tests.streaming_pipelines import helios, ltx2
from tests.tiny_pipelines import flux, frozen, ltx, qwen3, qwenimage, sd3, sdxl, t5, wan, zimage

from .known import first_order
from .parts import flow, pictures
from .tiny import Tiny


def of(name: str, base: Any, seed: int, **others: Any) -> ModularPipeline:
    """A modular class of the parts of another pipeline."""
    pipe = getattr(diffusers, name)()
    parts = first_order(base(seed)).components | others
    pipe.update_components(
        **{key: part for key, part in parts.items() if key in pipe.component_names and part is not None}
    )
    return pipe


def anima(seed: int) -> ModularPipeline:
    """Exists as a modular pipeline only."""
    text_encoder, tokenizer = qwen3(Qwen3Model)
    conditioner = frozen(
        9,
        AnimaTextConditioner,
        source_dim=16,
        target_dim=16,
        model_dim=16,
        num_layers=2,
        num_attention_heads=2,
        target_vocab_size=len(t5()[1]),
    )
    transformer = frozen(
        seed,
        CosmosTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        patch_size=(1, 2, 2),
        rope_scale=(1.0, 4.0, 4.0),
        extra_pos_embed_type=None,
    )
    pipe = diffusers.AnimaModularPipeline()
    pipe.update_components(
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        t5_tokenizer=t5()[1],
        vae=qwenimage(0).vae,
        text_conditioner=conditioner,
        transformer=transformer,
        scheduler=flow(shift=3.0),
    )
    return pipe


_SIZE = {"height": 16, "width": 16}
_FLUX = {**_SIZE, "max_sequence_length": 32, "guidance_scale": 3.5}
_VIDEO = {**_SIZE, "num_frames": 5, "max_sequence_length": 16, "guidance_scale": 4.0}

PIPELINES = {
    "FluxModularPipeline": Tiny(partial(of, "FluxModularPipeline", partial(flux, guidance_embeds=True)), _FLUX),
    "FluxKontextModularPipeline": Tiny(
        partial(of, "FluxKontextModularPipeline", flux_kontext),
        {**_FLUX, "max_area": 16 * 16, "_auto_resize": False},
        {"image": pictures()},
    ),
    "StableDiffusion3ModularPipeline": Tiny(
        partial(of, "StableDiffusion3ModularPipeline", sd3), {**_FLUX, "guidance_scale": 4.0}
    ),
    "StableDiffusionXLModularPipeline": Tiny(
        partial(of, "StableDiffusionXLModularPipeline", sdxl), {**_SIZE, "guidance_scale": 5.0}
    ),
    "QwenImageModularPipeline": Tiny(
        partial(of, "QwenImageModularPipeline", qwenimage),
        {**_SIZE, "max_sequence_length": 64, "guidance_scale": 4.0},
    ),
    "ZImageModularPipeline": Tiny(
        partial(of, "ZImageModularPipeline", zimage), {**_SIZE, "max_sequence_length": 64, "guidance_scale": 4.0}
    ),
    "WanModularPipeline": Tiny(partial(of, "WanModularPipeline", wan), _VIDEO),
    "LTXModularPipeline": Tiny(
        partial(of, "LTXModularPipeline", ltx),
        {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16, "guidance_scale": 3.0},
    ),
    "LTX2ModularPipeline": Tiny(
        partial(of, "LTX2ModularPipeline", ltx2),
        {"height": 32, "width": 32, "num_frames": 5, "frame_rate": 25.0, "max_sequence_length": 16},
    ),
    "HeliosModularPipeline": Tiny(
        partial(of, "HeliosModularPipeline", helios),
        {
            **_VIDEO,
            "num_frames": 10,
            "num_latent_frames_per_chunk": 2,
            "history_sizes": [4, 2, 1],
        },
    ),
    "AnimaModularPipeline": Tiny(anima, {**_SIZE, "max_sequence_length": 64, "guidance_scale": 4.0}),
}
