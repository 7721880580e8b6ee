"""Stable Diffusion, its successors, and what else denoises with a UNet or comes from PixArt."""

import inspect
from functools import partial
from typing import Any

import diffusers
from diffusers import (
    AnimateDiffControlNetPipeline,
    AnimateDiffPipeline,
    AnimateDiffSDXLPipeline,
    AnimateDiffVideoToVideoPipeline,
    ControlNetModel,
    DiffusionPipeline,
    MotionAdapter,
    SanaControlNetModel,
    SD3ControlNetModel,
    UNetMotionModel,
)

from tests.tiny_pipelines import frozen, kl_vae, pixart_sigma, sana, sd3, sd15, sdxl

from .parts import altered, config_of, lit, made, masks, pictures, videos
from .tiny import Tiny


def of(name: str, base: Any, seed: int, channels: int | None = None, **others: Any) -> DiffusionPipeline:
    """A class of the parts of another, whose UNet may take more channels."""
    pipe = base(seed)
    if channels is not None:
        others["unet"] = altered(seed, pipe.unet, in_channels=channels)
    if base is sd15:
        others |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    cls = getattr(diffusers, name)
    taken = inspect.signature(cls.__init__).parameters
    return made(cls, pipe, **{key: value for key, value in others.items() if key in taken})


def controlnet(base: Any, make: type = ControlNetModel) -> Any:
    """Whose zero convolutions are not zero."""
    embedding: dict[str, Any] = {"conditioning_embedding_out_channels": (4, 8)}
    module = frozen(9, make.from_unet, base(9).unet, **embedding)
    return lit(module, "controlnet_")


def sd3_wide(seed: int) -> DiffusionPipeline:
    """Of sixteen channels, as published."""
    pipe = sd3(seed)
    transformer = altered(seed, pipe.transformer, in_channels=16, out_channels=16)
    return made(type(pipe), pipe, transformer=transformer, vae=kl_vae(16, 1.5305, 0.0609))


def sd3_controlnet(**others: Any) -> Any:
    config = config_of(sd3(9).transformer)
    config = {name: value for name, value in config.items() if name not in ("out_channels", "qk_norm")}
    return lit(frozen(9, SD3ControlNetModel, **config, **others), "controlnet_blocks", "pos_embed_input")


def sana_controlnet() -> Any:
    taken = config_of(sana(9).transformer)
    module = frozen(9, SanaControlNetModel, **{k: v for k, v in taken.items() if k not in ("guidance_embeds",)})
    return lit(module, "controlnet_blocks", "input_block")


def animated(cls: type[DiffusionPipeline], base: Any, seed: int, **others: Any) -> DiffusionPipeline:
    pipe = base(seed)
    adapter = frozen(
        9,
        MotionAdapter,
        block_out_channels=(4, 8),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=8,
        use_motion_mid_block=base is sd15,
    )
    unet = frozen(seed, UNetMotionModel.from_unet2d, pipe.unet, adapter, load_weights=True)
    others |= {"feature_extractor": None, "image_encoder": None}
    return made(cls, pipe, unet=unet, motion_adapter=adapter, **others)


_SIZE = {"height": 16, "width": 16}
_SD = {**_SIZE, "guidance_scale": 5.0}
_STRENGTH = {"guidance_scale": 5.0, "strength": 0.7}
_PAG = {"pag_scale": 2.0, "pag_applied_layers": ["mid"]}
_SD3 = {**_SIZE, "guidance_scale": 4.0, "max_sequence_length": 32}
_IMAGE, _MASK, _CONTROL = {"image": pictures()}, {"mask_image": masks()}, {"control_image": pictures(first=5)}
_MOTION = {**_SD, "num_frames": 2}


def _two(prefix: str, base: Any) -> dict[str, Tiny]:
    """What there is of Stable Diffusion and of its XL alike."""
    net, sizes = controlnet(base), {} if base is sd15 else _SIZE
    union = {"image": pictures(), "control_image": pictures(first=5)}

    def make(name: str, **others: Any) -> Any:
        return partial(of, prefix + name, base, **others)

    return {
        f"{prefix}Img2ImgPipeline": Tiny(make("Img2ImgPipeline"), _STRENGTH, _IMAGE),
        f"{prefix}InpaintPipeline": Tiny(make("InpaintPipeline", channels=9), {**_STRENGTH, **_SIZE}, _IMAGE | _MASK),
        f"{prefix}InstructPix2PixPipeline": Tiny(
            make("InstructPix2PixPipeline", channels=8),
            {"guidance_scale": 5.0, "image_guidance_scale": 1.5, **sizes},
            _IMAGE,
        ),
        f"{prefix}ControlNetPipeline": Tiny(make("ControlNetPipeline", controlnet=net), _SD, _IMAGE),
        f"{prefix}ControlNetImg2ImgPipeline": Tiny(
            make("ControlNetImg2ImgPipeline", controlnet=net), {**_STRENGTH, **_SIZE}, union
        ),
        f"{prefix}ControlNetInpaintPipeline": Tiny(
            make("ControlNetInpaintPipeline", controlnet=net), {**_STRENGTH, **_SIZE}, union | _MASK
        ),
        f"{prefix}PAGPipeline": Tiny(make("PAGPipeline", pag_applied_layers=["mid"]), {**_SD, "pag_scale": 2.0}),
        f"{prefix}PAGImg2ImgPipeline": Tiny(
            make("PAGImg2ImgPipeline", pag_applied_layers=["mid"]), {**_STRENGTH, "pag_scale": 2.0}, _IMAGE
        ),
        f"{prefix}PAGInpaintPipeline": Tiny(
            make("PAGInpaintPipeline", pag_applied_layers=["mid"]),
            {**_STRENGTH, **_SIZE, "pag_scale": 2.0},
            _IMAGE | _MASK,
        ),
        f"{prefix}ControlNetPAGPipeline": Tiny(
            make("ControlNetPAGPipeline", controlnet=net, pag_applied_layers=["mid"]),
            {**_SD, "pag_scale": 2.0},
            _IMAGE,
        ),
    }


PIPELINES = (
    _two("StableDiffusion", sd15)
    | _two("StableDiffusionXL", sdxl)
    | {
        "StableDiffusion3InpaintPipeline": Tiny(
            partial(of, "StableDiffusion3InpaintPipeline", sd3_wide), {**_SD3, "strength": 0.7}, _IMAGE | _MASK
        ),
        "StableDiffusion3PAGPipeline": Tiny(
            partial(of, "StableDiffusion3PAGPipeline", sd3, pag_applied_layers=["blocks.1"]),
            {**_SD3, "pag_scale": 2.0},
        ),
        "StableDiffusion3PAGImg2ImgPipeline": Tiny(
            partial(of, "StableDiffusion3PAGImg2ImgPipeline", sd3, pag_applied_layers=["blocks.1"]),
            {**_SD3, "pag_scale": 2.0, "strength": 0.7},
            _IMAGE,
        ),
        "StableDiffusion3ControlNetPipeline": Tiny(
            partial(of, "StableDiffusion3ControlNetPipeline", sd3, controlnet=sd3_controlnet()), _SD3, _CONTROL
        ),
        "StableDiffusion3ControlNetInpaintingPipeline": Tiny(
            partial(
                of,
                "StableDiffusion3ControlNetInpaintingPipeline",
                sd3,
                controlnet=sd3_controlnet(extra_conditioning_channels=1),
            ),
            _SD3,
            {"control_image": pictures(first=5), "control_mask": masks()},
        ),
        "PixArtAlphaPipeline": Tiny(
            partial(of, "PixArtAlphaPipeline", pixart_sigma),
            {**_SD3, "use_resolution_binning": False},
        ),
        "PixArtSigmaPAGPipeline": Tiny(
            partial(of, "PixArtSigmaPAGPipeline", pixart_sigma, pag_applied_layers=["blocks.1"]),
            {**_SD3, "use_resolution_binning": False, "pag_scale": 2.0},
        ),
        "AnimateDiffPipeline": Tiny(partial(animated, AnimateDiffPipeline, sd15), _MOTION),
        "AnimateDiffSDXLPipeline": Tiny(partial(animated, AnimateDiffSDXLPipeline, sdxl), _MOTION),
        "AnimateDiffVideoToVideoPipeline": Tiny(
            partial(animated, AnimateDiffVideoToVideoPipeline, sd15), {**_SD, "strength": 0.7}, {"video": videos(2)}
        ),
        "AnimateDiffControlNetPipeline": Tiny(
            partial(animated, AnimateDiffControlNetPipeline, sd15, controlnet=controlnet(sd15)),
            _MOTION,
            {"conditioning_frames": videos(2)},
        ),
    }
)
