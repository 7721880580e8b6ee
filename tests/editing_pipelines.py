"""Tiny pipelines that make each sample of a picture of its own: editing, inpainting, control, image to video.

As in tiny_pipelines.py classes, schedulers and layouts are those of the published models, and two seeds share all but
the denoiser. This file knows diffusers and transformers, and nothing of diffusion_opd.
"""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from diffusers import (
    DiffusionPipeline,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.streaming_pipelines import STREAMING, STREAMING_CALL, builder, picture
from tests.tiny_pipelines import QWEN_IMAGE_WORDS, flux, frozen, qwen_tokenizer, qwenimage, wan

# Qwen-Image-Edit makes a megapixel of every picture, whatever size is asked for: here a 4096th of it, 16 x 16 pixels
for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
    dimensions = module.calculate_dimensions
    module.calculate_dimensions = lambda area, ratio, dimensions=dimensions: dimensions(
        max(area // 4096, 32 * 32), ratio
    )


def with_parts(cls: type[DiffusionPipeline], pipe: DiffusionPipeline, **others: Any) -> DiffusionPipeline:
    """The parts of another pipeline that a class takes, and others."""
    expected, optional = cls._get_signature_keys(cls)
    return cls(**{name: part for name, part in pipe.components.items() if name in expected} | others)


def flux_kontext(seed: int = 0) -> FluxKontextPipeline:
    return with_parts(FluxKontextPipeline, flux(seed, guidance_embeds=True))


def flux_fill(seed: int = 0) -> FluxFillPipeline:
    """The denoiser is given the masked picture and its mask beside the state: 4 + 4 + 16 channels."""
    pipe = flux(seed, guidance_embeds=True)
    config = {name: value for name, value in pipe.transformer.config.items() if not name.startswith("_")}
    config |= {"in_channels": 24, "out_channels": 4}
    return with_parts(FluxFillPipeline, pipe, transformer=frozen(seed, FluxTransformer2DModel, **config))


def _qwen_sees() -> dict[str, Any]:
    """An encoder that reads pictures with a prompt, and its processor."""
    tokenizer = qwen_tokenizer(QWEN_IMAGE_WORDS)
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *marks]})
    ids = dict(zip(marks, tokenizer.convert_tokens_to_ids(marks), strict=True))
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "patch_size": 4,
            "window_size": 16,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    sees = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=8 * 8, max_pixels=32 * 32)
    with patch.object(Qwen2VLProcessor, "check_argument_for_proper_class"):  # of videos it needs torchvision
        processor = Qwen2VLProcessor(sees, tokenizer)
    return {
        "text_encoder": frozen(5, Qwen2_5_VLForConditionalGeneration, config),
        "tokenizer": tokenizer,
        "processor": processor,
    }


def qwen_edit(seed: int = 0) -> QwenImageEditPipeline:
    return with_parts(QwenImageEditPipeline, qwenimage(seed), **_qwen_sees())


def qwen_edit_plus(seed: int = 0) -> QwenImageEditPlusPipeline:
    """Several pictures a sample; one sample a call."""
    return with_parts(QwenImageEditPlusPipeline, qwenimage(seed), **_qwen_sees())


def wan_i2v(seed: int = 0) -> WanImageToVideoPipeline:
    """Wan 2.1: the picture is given in the latents (16 + 4 + 16 channels) and through an encoder."""
    pipe = wan(seed)
    config = {name: value for name, value in pipe.transformer.config.items() if not name.startswith("_")}
    config |= {"in_channels": 36, "image_dim": 16, "added_kv_proj_dim": 24}
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )
    return with_parts(
        WanImageToVideoPipeline,
        pipe,
        transformer=frozen(seed, WanTransformer3DModel, **config),
        image_encoder=frozen(8, CLIPVisionModelWithProjection, vision),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
    )


def mask(size: int, seed: int = 0) -> Image.Image:
    """White where a picture is to be filled."""
    whole = Image.new("L", (size, size), 0)
    whole.paste(255, (0, 0, size // 2, size // 2 + 2 * seed))
    return whole


EDITING: dict[str, Callable[..., DiffusionPipeline]] = {
    name: builder(make)
    for name, make in {
        "flux_kontext": flux_kontext,
        "qwen_edit": qwen_edit,
        "qwen_edit_plus": qwen_edit_plus,
        "flux_fill": flux_fill,
        "wan_i2v": wan_i2v,
    }.items()
} | {name: STREAMING[name] for name in ("flux_control", "ltx_i2v")}

_QWEN = {"height": 16, "width": 16, "true_cfg_scale": 4.0, "max_sequence_length": 512}
# Arguments of `pipe(...)` that hold for all samples
EDITING_CALL: dict[str, dict[str, Any]] = {
    "flux_kontext": {
        "height": 16,
        "width": 16,
        "guidance_scale": 3.5,
        "max_sequence_length": 32,
        "max_area": 16 * 16,
        "_auto_resize": False,
    },
    "qwen_edit": {**_QWEN, "negative_prompt": " "},
    "qwen_edit_plus": {**_QWEN, "negative_prompt": " "},
    "flux_fill": {"height": 16, "width": 16, "guidance_scale": 30.0, "max_sequence_length": 32},
    "flux_control": {key: value for key, value in STREAMING_CALL["flux_control"].items() if key != "control_image"},
    "wan_i2v": {"height": 16, "width": 16, "num_frames": 5, "guidance_scale": 4.0, "max_sequence_length": 16},
    "ltx_i2v": STREAMING_CALL["ltx_i2v"],
}
_SIZE = {"ltx_i2v": 32}
# What four samples are made of besides their prompts
EDITING_INPUTS: dict[str, dict[str, list[Any]]] = {
    name: {"control_image" if name == "flux_control" else "image": [picture(_SIZE.get(name, 16), n) for n in range(4)]}
    for name in EDITING
}
EDITING_INPUTS["flux_fill"]["mask_image"] = [mask(16, number) for number in range(4)]
EDITING_INPUTS["qwen_edit_plus"]["image"] = [[picture(16, number), picture(16, number + 4)] for number in range(4)]
# These take one sample a call
ONE_A_CALL = ("qwen_edit_plus", "wan_i2v")
