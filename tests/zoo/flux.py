"""FLUX and its kin."""

from functools import partial
from typing import Any

from diffusers import (
    BriaPipeline,
    BriaTransformer2DModel,
    ChromaImg2ImgPipeline,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DiffusionPipeline,
    Flux2KleinInpaintPipeline,
    Flux2KleinKVPipeline,
    FluxControlImg2ImgPipeline,
    FluxControlInpaintPipeline,
    FluxControlNetImg2ImgPipeline,
    FluxControlNetInpaintPipeline,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextInpaintPipeline,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
)
from transformers import Qwen3Model

from tests.streaming_pipelines import flux_control
from tests.tiny_pipelines import flux, flux2_klein, frozen, kl_vae, qwen3, t5, zimage

from .parts import flow, lit, made, masks, pictures
from .tiny import Tiny


def of_flux(cls: type[DiffusionPipeline], seed: int) -> DiffusionPipeline:
    return made(cls, flux(seed, guidance_embeds=True))


def of_control(cls: type[DiffusionPipeline], seed: int) -> DiffusionPipeline:
    return made(cls, flux_control(seed))


def with_controlnet(cls: type[DiffusionPipeline], seed: int) -> DiffusionPipeline:
    pipe = flux(seed, guidance_embeds=True)
    controlnet = frozen(
        9,
        FluxControlNetModel.from_transformer,
        flux(9, guidance_embeds=True).transformer,
        attention_head_dim=16,
        num_attention_heads=2,
    )
    return made(cls, pipe, controlnet=lit(controlnet, "controlnet_"))


def of_klein(cls: type[DiffusionPipeline], seed: int, **others: Any) -> DiffusionPipeline:
    return made(cls, flux2_klein(seed), **others)


def of_chroma(cls: type[DiffusionPipeline], seed: int) -> DiffusionPipeline:
    text_encoder, tokenizer = t5()
    transformer = frozen(
        seed,
        ChromaTransformer2DModel,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return made(cls, flux(seed), transformer=transformer, text_encoder=text_encoder, tokenizer=tokenizer)


def bria(seed: int) -> BriaPipeline:
    text_encoder, tokenizer = t5()
    transformer = frozen(
        seed,
        BriaTransformer2DModel,
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(0, 4, 4),
    )
    return BriaPipeline(
        transformer=transformer,
        scheduler=flow(shift=3.0, use_dynamic_shifting=True),
        vae=kl_vae(latents=4, scaling=0.13025, shift=0.1),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


def ovis(seed: int) -> OvisImagePipeline:
    text_encoder, tokenizer = qwen3(Qwen3Model)
    transformer = frozen(
        seed,
        OvisImageTransformer2DModel,
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
        out_channels=16,
    )
    return made(
        OvisImagePipeline,
        zimage(seed),
        transformer=transformer,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=flow(shift=3.0, use_dynamic_shifting=True),
        vae=kl_vae(latents=4, scaling=0.3611, shift=0.1159),
    )


_SIZE = {"height": 16, "width": 16, "max_sequence_length": 32}
_FLUX = {**_SIZE, "guidance_scale": 3.5}
_HALF = {**_FLUX, "strength": 0.7}
_KLEIN = {"height": 8, "width": 8, "max_sequence_length": 64, "text_encoder_out_layers": (1,)}
_IMAGE, _MASK, _CONTROL = {"image": pictures()}, {"mask_image": masks()}, {"control_image": pictures(first=5)}
_CHROMA = {**_SIZE, "guidance_scale": 4.0, "negative_prompt": "a blurred one"}

PIPELINES = {
    "FluxImg2ImgPipeline": Tiny(partial(of_flux, FluxImg2ImgPipeline), _HALF, _IMAGE),
    "FluxInpaintPipeline": Tiny(partial(of_flux, FluxInpaintPipeline), _HALF, _IMAGE | _MASK),
    "FluxKontextInpaintPipeline": Tiny(
        partial(of_flux, FluxKontextInpaintPipeline),
        {**_HALF, "max_area": 16 * 16, "_auto_resize": False},
        _IMAGE | _MASK,
    ),
    "FluxControlImg2ImgPipeline": Tiny(partial(of_control, FluxControlImg2ImgPipeline), _HALF, _IMAGE | _CONTROL),
    "FluxControlInpaintPipeline": Tiny(
        partial(of_control, FluxControlInpaintPipeline), _HALF, _IMAGE | _MASK | _CONTROL
    ),
    "FluxControlNetPipeline": Tiny(partial(with_controlnet, FluxControlNetPipeline), _FLUX, _CONTROL),
    "FluxControlNetImg2ImgPipeline": Tiny(
        partial(with_controlnet, FluxControlNetImg2ImgPipeline), _HALF, _IMAGE | _CONTROL
    ),
    "FluxControlNetInpaintPipeline": Tiny(
        partial(with_controlnet, FluxControlNetInpaintPipeline), _HALF, _IMAGE | _MASK | _CONTROL
    ),
    "Flux2KleinInpaintPipeline": Tiny(
        partial(of_klein, Flux2KleinInpaintPipeline),
        {**_KLEIN, "guidance_scale": 4.0, "strength": 0.7},
        {"image": pictures(8), "mask_image": masks(8)},
    ),
    "Flux2KleinKVPipeline": Tiny(partial(of_klein, Flux2KleinKVPipeline), _KLEIN, {"image": pictures(64)}),
    "ChromaPipeline": Tiny(partial(of_chroma, ChromaPipeline), _CHROMA),
    "ChromaImg2ImgPipeline": Tiny(partial(of_chroma, ChromaImg2ImgPipeline), {**_CHROMA, "strength": 0.7}, _IMAGE),
    "BriaPipeline": Tiny(bria, {**_SIZE, "guidance_scale": 4.0}),
    "OvisImagePipeline": Tiny(ovis, {**_SIZE, "guidance_scale": 4.0, "max_sequence_length": 64}),
}
