"""Video pipelines, and pictures of the same families: CogVideoX, CogView, HunyuanVideo, Kandinsky and others."""

import functools
import inspect
import re
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import (
    AllegroPipeline,
    AllegroTransformer3DModel,
    AutoencoderKLAllegro,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanImage,
    AutoencoderKLHunyuanImageRefiner,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLMagvit,
    AutoencoderKLMochi,
    CogVideoXDDIMScheduler,
    CogVideoXFunControlPipeline,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CogVideoXVideoToVideoPipeline,
    CogView3PlusPipeline,
    CogView3PlusTransformer2DModel,
    CogView4ControlPipeline,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    ConsisIDPipeline,
    ConsisIDTransformer3DModel,
    DDIMScheduler,
    DiffusionPipeline,
    EasyAnimateInpaintPipeline,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanImagePipeline,
    HunyuanImageRefinerPipeline,
    HunyuanImageTransformer2DModel,
    HunyuanSkyreelsImageToVideoPipeline,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoFramepackPipeline,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    Kandinsky5I2IPipeline,
    Kandinsky5I2VPipeline,
    Kandinsky5T2IPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
    Kandinsky6TI2VAPipeline,
    Kandinsky6Transformer3DModel,
    LattePipeline,
    LatteTransformer3DModel,
    MMAudioVAE,
    MMAudioVocoder,
    MochiPipeline,
    MochiTransformer3DModel,
    MotifVideoImage2VideoPipeline,
    MotifVideoPipeline,
    MotifVideoTransformer3DModel,
)
from diffusers.guiders import AdaptiveProjectedMixGuidance, ClassifierFreeGuidance
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video, pipeline_hunyuan_video_image2video
from diffusers.pipelines.kandinsky6 import pipeline_kandinsky6_ti2va
from transformers import (
    ByT5Tokenizer,
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPVisionConfig,
    GlmConfig,
    GlmModel,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
    T5Gemma2Encoder,
    T5Gemma2EncoderConfig,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.editing_pipelines import with_parts
from tests.streaming_pipelines import picture, wan_vae
from tests.tiny_pipelines import clip, frozen, gemma_tokenizer, kl_vae, qwen_tokenizer, t5

from .tiny import Tiny


def film(size: int, frames: int, seed: int) -> list:
    return [picture(size, 100 * seed + frame) for frame in range(frames)]


def pictures(size: int) -> list:
    return [picture(size, seed) for seed in (1, 2)]


def films(size: int, frames: int) -> list:
    return [film(size, frames, seed) for seed in (1, 2)]


def constants(cls: type[DiffusionPipeline], **values: Any) -> None:
    """Smaller ones than its `__init__` sets, of a pipeline that is loaded again too."""
    init = cls.__init__

    @functools.wraps(init)
    def small(self: DiffusionPipeline, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        vars(self).update(values)

    cls.__init__ = small


_TOKENS = {"tokenizer_max_length": 32, "tokenizer_2_max_length": 32}
for _cls in (HunyuanVideo15Pipeline, HunyuanVideo15ImageToVideoPipeline, HunyuanImagePipeline):
    constants(_cls, **_TOKENS)
constants(HunyuanVideo15Pipeline, vision_num_semantic_tokens=9)
for _cls in (Kandinsky5T2IPipeline, Kandinsky5I2IPipeline):
    constants(_cls, resolutions=[(32, 32)])


def text(pair: tuple, suffix: str = "") -> dict[str, Any]:
    """A text encoder and its tokenizer, as parts of a pipeline."""
    return {f"text_encoder{suffix}": pair[0], f"tokenizer{suffix}": pair[1]}


_TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.5,  # of an inner state that is not small beside the biases of what reads it
}


# The family of CogVideoX and CogView

_COGVIDEOX = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 32,
    "num_layers": 2,
    "sample_width": 4,
    "sample_height": 4,
    "sample_frames": 9,
    "max_text_seq_length": 32,
    "use_rotary_positional_embeddings": True,
}


def cogvideox(seed: int, cls: type[DiffusionPipeline] = CogVideoXPipeline, **others: Any) -> DiffusionPipeline:
    """Rotary positions, as of CogVideoX-5b."""
    vae = frozen(
        7,
        AutoencoderKLCogVideoX,
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(4, 4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    return cls(
        # scheduler_config.json of CogVideoX-2b
        scheduler=CogVideoXDDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=3.0,
            timestep_spacing="trailing",
        ),
        vae=vae,
        transformer=frozen(seed, CogVideoXTransformer3DModel, **_COGVIDEOX | others),
        **text(t5()),
    )


def consisid(seed: int) -> ConsisIDPipeline:
    """With its encoder of a face, which is a part of the denoiser."""
    transformer = frozen(
        seed,
        ConsisIDTransformer3DModel,
        **_COGVIDEOX
        | {
            "num_attention_heads": 3,  # the face has two thirds of the width
            "in_channels": 8,
            "is_train_face": True,
            "cross_attn_dim_head": 8,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 8,
            "LFE_vit_dim": 8,
            "LFE_depth": 2,
            "LFE_dim_head": 4,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 2,
            "LFE_num_querie": 4,
            "LFE_output_dim": 32,
            "LFE_num_scale": 2,
        },
    )
    return with_parts(ConsisIDPipeline, cogvideox(seed), transformer=transformer)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


_COGVIEW = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "text_embed_dim": 32,
    "time_embed_dim": 8,
    "condition_dim": 4,
    "pos_embed_max_size": 16,
    "sample_size": 8,
}


def cogview3(seed: int) -> CogView3PlusPipeline:
    return with_parts(
        CogView3PlusPipeline,
        cogvideox(seed),
        # diffusers' convert_cogview3_to_diffusers.py
        scheduler=CogVideoXDDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=4.0,
            timestep_spacing="trailing",
        ),
        vae=kl_vae(latents=4, scaling=1.0),
        transformer=frozen(seed, CogView3PlusTransformer2DModel, **_COGVIEW),
    )


def cogview4(seed: int, cls: type[DiffusionPipeline] = CogView4Pipeline, channels: int = 4) -> DiffusionPipeline:
    tokenizer = qwen_tokenizer()  # GLM's is of bytes too
    tokenizer.padding_side = "left"
    config = GlmConfig(
        **_TEXT,
        head_dim=8,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    transformer = _COGVIEW | {"in_channels": channels, "text_embed_dim": 16, "rope_axes_dim": (4, 4)}
    return cls(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
        ),
        vae=kl_vae(latents=4, scaling=1.0),
        transformer=frozen(seed, CogView4Transformer2DModel, **transformer),
        text_encoder=frozen(5, GlmModel, config),
        tokenizer=tokenizer,
    )


# HunyuanVideo


def instructed(instruction: str, length: int, words: tuple[str, ...] = ()) -> Any:
    """A tokenizer of which an instruction before the prompt takes `length` tokens, as of the published one: pipelines
    cut away as many."""
    tokenizer = qwen_tokenizer(words)
    parts = [part for part in re.split(r"(<[^<>]+>)", instruction) if part]
    tokenizer.add_special_tokens({"additional_special_tokens": sorted({part for part in parts if part[0] == "<"})})
    *others, longest = sorted(parts, key=len)
    count = length - sum(len(tokenizer(part)["input_ids"]) for part in others)
    size = len(longest) // count
    starts = [index * size for index in range(count)]
    tokenizer.add_tokens([longest[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)])
    assert len(tokenizer(instruction)["input_ids"]) == length
    return tokenizer


def before_prompt(module: Any) -> tuple[str, int]:
    template = module.DEFAULT_PROMPT_TEMPLATE
    return template["template"].split("{}")[0], template["crop_start"]


def qwen2_5_vl(tokenizer: Any) -> dict[str, Any]:
    """An encoder that reads pictures too, with its tokenizer, as parts of a pipeline."""
    marks = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks)}, replace_extra_special_tokens=False)
    start, end, image, video = tokenizer.convert_tokens_to_ids(marks)
    config = Qwen2_5_VLConfig(
        text_config=qwen_text(tokenizer),
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "patch_size": 4,
            "window_size": 16,
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    return text((frozen(5, Qwen2_5_VLForConditionalGeneration, config), tokenizer))


def qwen_text(tokenizer: Any) -> dict[str, Any]:
    return _TEXT | {
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6},
    }


_HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": 16,
    "pooled_projection_dim": 16,
    "rope_axes_dim": (4, 6, 6),
}


def hunyuan_vae() -> AutoencoderKLHunyuanVideo:
    return frozen(
        7,
        AutoencoderKLHunyuanVideo,
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3,
        block_out_channels=(4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        spatial_compression_ratio=4,
    )


def hunyuan(
    seed: int,
    cls: type[DiffusionPipeline] = HunyuanVideoPipeline,
    transformer: type[torch.nn.Module] = HunyuanVideoTransformer3DModel,
    parts: dict[str, Any] | None = None,
    **others: Any,
) -> DiffusionPipeline:
    tokenizer = instructed(*before_prompt(pipeline_hunyuan_video))
    config = LlamaConfig(**_TEXT, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    return cls(
        **{
            # diffusers' convert_hunyuan_video_to_diffusers.py
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
            "vae": hunyuan_vae(),
            "transformer": frozen(seed, transformer, **_HUNYUAN | others),
            **text((frozen(5, LlamaModel, config), tokenizer)),
            **text(clip(CLIPTextModel), "_2"),
        }
        | (parts or {})
    )


def hunyuan_i2v(seed: int) -> HunyuanVideoImageToVideoPipeline:
    """As the latest of them: the first frame of the state is replaced by the picture's."""
    instruction = before_prompt(pipeline_hunyuan_video_image2video)
    tokenizer = instructed(*instruction, words=("system", "user", "assistant"))
    config = LlavaConfig(
        text_config=LlamaConfig(**_TEXT, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id),
        # 576 patches, as the instruction says
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=48,
            patch_size=2,
            projection_dim=16,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    parts = text((frozen(5, LlavaForConditionalGeneration, config), tokenizer)) | {
        "image_processor": CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    }
    return hunyuan(seed, HunyuanVideoImageToVideoPipeline, parts=parts, image_condition_type="token_replace")


def siglip(size: int, patch: int) -> dict[str, Any]:
    config = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=size,
        patch_size=patch,
    )
    return {
        "image_encoder": frozen(8, SiglipVisionModel, config),
        "feature_extractor": SiglipImageProcessor(size={"height": size, "width": size}),
    }


def framepack(seed: int) -> HunyuanVideoFramepackPipeline:
    """A video section after section, the last one first."""
    return hunyuan(
        seed,
        HunyuanVideoFramepackPipeline,
        HunyuanVideoFramepackTransformer3DModel,
        parts=siglip(16, 8),
        has_image_proj=True,
        image_proj_dim=16,
        has_clean_x_embedder=True,
    )


def byt5() -> tuple[torch.nn.Module, Any]:
    """Reads what is in quotes."""
    tokenizer = ByT5Tokenizer()
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_ff=32, d_kv=8, num_layers=1, num_heads=2)
    return frozen(6, T5EncoderModel, config), tokenizer


_FEW = {"out_channels": 3, "in_channels": 3, "layers_per_block": 1, "spatial_compression_ratio": 4}


def hunyuan15(
    seed: int, cls: type[DiffusionPipeline] = HunyuanVideo15Pipeline, parts: dict[str, Any] | None = None
) -> DiffusionPipeline:
    message = inspect.signature(HunyuanVideo15Pipeline._get_mllm_prompt_embeds).parameters["system_message"].default
    tokenizer = instructed(f"<|im_start|>system\n{message}<|im_end|>\n<|im_start|>user\n", 108)
    config = {
        name: value for name, value in _HUNYUAN.items() if name not in ("num_single_layers", "pooled_projection_dim")
    }
    transformer = frozen(
        seed,
        HunyuanVideo15Transformer3DModel,
        **config
        | {
            "in_channels": 9,
            "text_embed_2_dim": 32,
            "image_embed_dim": 16,
            "target_size": 16,
            "rope_axes_dim": (4, 6, 6),
        },
    )
    return cls(
        # Guidance as in diffusers' docs of HunyuanVideo-1.5
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
        vae=frozen(7, AutoencoderKLHunyuanVideo15, **_FEW, latent_channels=4, block_out_channels=(16, 16, 16)),
        transformer=transformer,
        **text((frozen(5, Qwen2_5_VLTextModel, Qwen2_5_VLTextConfig(**qwen_text(tokenizer))), tokenizer)),
        **text(byt5(), "_2"),
        **parts or {},
    )


def hunyuan_image(seed: int) -> HunyuanImagePipeline:
    template = inspect.signature(HunyuanImagePipeline._get_qwen_prompt_embeds).parameters["template"].default
    config = {name: value for name, value in _HUNYUAN.items() if name != "pooled_projection_dim"}
    return HunyuanImagePipeline(
        # Its guidance changes its kind after the fifth step: here after the first
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        guider=AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=1),
        ocr_guider=AdaptiveProjectedMixGuidance(guidance_scale=4.0, adaptive_projected_guidance_start_step=1),
        vae=frozen(
            7,
            AutoencoderKLHunyuanImage,
            **_FEW,
            latent_channels=4,
            block_out_channels=(32, 32, 32),
            sample_size=32,
            scaling_factor=0.75,
        ),
        transformer=frozen(
            seed, HunyuanImageTransformer2DModel, **config | {"text_embed_2_dim": 32, "rope_axes_dim": (8, 8)}
        ),
        **qwen2_5_vl(instructed(template.split("{}")[0], 34)),
        **text(byt5(), "_2"),
    )


def hunyuan_refiner(seed: int) -> HunyuanImageRefinerPipeline:
    """Two frames of its VAE are one of the denoiser, of twice as many channels."""
    instruction = (
        "<|start_header_id|>system<|end_header_id|>\n\nDescribe the image by detailing the color, shape, size, texture,"
        " quantity, text, spatial relationships of the objects and background:<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\n"
    )
    config = {name: value for name, value in _HUNYUAN.items() if name != "pooled_projection_dim"}
    return HunyuanImageRefinerPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=4.0),
        guider=AdaptiveProjectedMixGuidance(guidance_scale=2.0),
        vae=frozen(7, AutoencoderKLHunyuanImageRefiner, **_FEW, latent_channels=2, block_out_channels=(16, 16, 16)),
        transformer=frozen(
            seed,
            HunyuanImageTransformer2DModel,
            **config | {"in_channels": 8, "patch_size": (1, 1, 1), "guidance_embeds": True},
        ),
        **qwen2_5_vl(instructed(instruction, 36)),
    )


# Families of one or a few classes each


def mochi(seed: int) -> MochiPipeline:
    vae = frozen(
        7,
        AutoencoderKLMochi,
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    )
    transformer = frozen(
        seed,
        MochiTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        text_embed_dim=32,
        time_embed_dim=4,
        max_sequence_length=32,
    )
    return MochiPipeline(
        # diffusers' convert_mochi_to_diffusers.py: from 0, which is noise, to 1
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=vae,
        transformer=transformer,
        **text(t5()),
    )


def allegro(seed: int) -> AllegroPipeline:
    vae = frozen(
        7,
        AutoencoderKLAllegro,
        down_block_types=("AllegroDownBlock3D",) * 3,
        up_block_types=("AllegroUpBlock3D",) * 3,
        block_out_channels=(8, 8, 8),
        temporal_downsample_blocks=(True, True, False),
        temporal_upsample_blocks=(False, True, True),
        layers_per_block=1,
        norm_num_groups=2,
    )
    transformer = frozen(
        seed,
        AllegroTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        cross_attention_dim=24,
        sample_width=4,
        sample_height=4,
        sample_frames=2,
        caption_channels=32,
    )
    return AllegroPipeline(
        scheduler=EulerAncestralDiscreteScheduler(timestep_spacing="trailing"),
        vae=vae,
        transformer=transformer,
        **text(t5()),
    )


def latte(seed: int) -> LattePipeline:
    transformer = frozen(
        seed,
        LatteTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,  # the second half is the learned variance, which the pipeline drops
        num_layers=1,
        cross_attention_dim=16,
        attention_bias=True,
        sample_size=4,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=32,
        video_length=2,
    )
    return LattePipeline(
        scheduler=DDIMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False),
        vae=kl_vae(latents=4, scaling=0.18215),
        transformer=transformer,
        **text(t5()),
    )


def easyanimate(seed: int, cls: type[DiffusionPipeline] = EasyAnimatePipeline, **others: Any) -> DiffusionPipeline:
    tokenizer = qwen_tokenizer()
    config = Qwen2VLConfig(
        text_config=qwen_text(tokenizer),
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2},
    )
    vae = frozen(
        7,
        AutoencoderKLMagvit,
        latent_channels=4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    transformer = frozen(
        seed,
        EasyAnimateTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=16,
        **{"in_channels": 4, "out_channels": 4, "patch_size": 2, "time_embed_dim": 8, "text_embed_dim": 16} | others,
        num_layers=2,
        mmdit_layers=1,
    )
    return cls(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        transformer=transformer,
        text_encoder=frozen(5, Qwen2VLForConditionalGeneration, config),
        tokenizer=tokenizer,
    )


def motif(
    seed: int, cls: type[DiffusionPipeline] = MotifVideoPipeline, image_embed_dim: int | None = None
) -> DiffusionPipeline:
    """Of its encoder the second part sees the picture of image to video."""
    tokenizer = gemma_tokenizer()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = T5Gemma2EncoderConfig(
        text_config=_TEXT | {"head_dim": 8, "vocab_size": len(tokenizer), "dropout_rate": 0.0},
        vision_config=vision | {"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8},
        mm_tokens_per_image=4,
        image_token_index=len(tokenizer) - 1,
    )
    config_of_it = {name: value for name, value in _HUNYUAN.items() if "refiner" not in name and "pooled" not in name}
    transformer = frozen(
        seed,
        MotifVideoTransformer3DModel,
        **config_of_it
        | {
            "in_channels": 33,
            "out_channels": 16,
            "num_single_layers": 2,
            "num_decoder_layers": 1,
            "image_embed_dim": image_embed_dim,
            "enable_text_cross_attention_dual": True,
            "enable_text_cross_attention_single": True,
        },
    )
    return cls(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        guider=ClassifierFreeGuidance(guidance_scale=8.0),
        vae=wan_vae(),
        transformer=transformer,
        feature_extractor=SiglipImageProcessor(size={"height": 16, "width": 16}),
        text_encoder=frozen(5, T5Gemma2Encoder, config, eoi_token_index=len(tokenizer) - 2),
        tokenizer=tokenizer,
    )


# Kandinsky

# Of videos they need torchvision
for _cls in (Qwen2VLProcessor, Qwen2_5_VLProcessor):
    _cls.get_attributes = classmethod(lambda cls: ["image_processor", "tokenizer"])


def seeing(instruction: str, length: int, make: type = Qwen2VLProcessor) -> dict[str, Any]:
    parts = qwen2_5_vl(instructed(instruction, length))
    sees = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=8 * 8, max_pixels=32 * 32)
    return parts | {"tokenizer": make(sees, parts["tokenizer"])}


def gated(make: type, **config: Any) -> torch.nn.Module:
    """Begins with gates that are closed: nothing would reach the prediction."""
    transformer = make(**config)
    for parameter in transformer.parameters():
        if parameter.ndim == 2 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return transformer


def kandinsky5(
    seed: int, cls: type[DiffusionPipeline] = Kandinsky5T2VPipeline, visual_cond: bool = True
) -> DiffusionPipeline:
    is_video = cls in (Kandinsky5T2VPipeline, Kandinsky5I2VPipeline)
    transformer = frozen(
        seed,
        gated,
        Kandinsky5Transformer3DModel,
        in_text_dim=16,
        in_text_dim2=16,
        time_dim=16,
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 6, 6),
        visual_cond=visual_cond,
    )
    return cls(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=hunyuan_vae() if is_video else kl_vae(latents=4, scaling=0.3611, shift=0.1159, blocks=4),
        transformer=transformer,
        **seeing(*_KANDINSKY[cls]),
        **text(clip(CLIPTextModel), "_2"),
    )


def kandinsky6(seed: int) -> Kandinsky6TI2VAPipeline:
    """A video and its audio; of a picture the state has a frame more, behind the others."""
    transformer = frozen(
        seed,
        Kandinsky6Transformer3DModel,
        in_visual_dim=4,
        out_visual_dim=4,
        in_audio_dim=4,
        out_audio_dim=4,
        in_text_dim=16,
        in_text_dim2=16,
        time_dim=16,
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 6, 6),
        visual_token_type_num_embeddings=2,
    )
    template = pipeline_kandinsky6_ti2va._PROMPT_TEMPLATE.split("{}")[0]
    return Kandinsky6TI2VAPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=hunyuan_vae(),
        transformer=transformer,
        audio_vae=frozen(9, MMAudioVAE, mel_bins=8, latent_channels=4, hidden_channels=32, layers_per_block=1),
        vocoder=frozen(
            10,
            MMAudioVocoder,
            num_mels=8,
            upsample_initial_channel=16,
            upsample_rates=(2, 2),
            upsample_kernel_sizes=(4, 4),
            resblock_kernel_sizes=(3,),
            resblock_dilation_sizes=((1, 3, 5),),
        ),
        **seeing(template, pipeline_kandinsky6_ti2va._QWEN_CROP_START, Qwen2_5_VLProcessor),
        **text(clip(CLIPTextModel), "_2"),
    )


_SYSTEM = "<|im_start|>system\nYou are a prompt engineer. "
_PAINTED = (
    _SYSTEM
    + "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of"
    " the objects and background:<|im_end|>\n<|im_start|>user\n"
)
_EDITED = (
    _SYSTEM + "Based on the provided source image (first image) and target image (second image), create an interesting"
    " text prompt that can be used together with the source image to create the target image:<|im_end|><|im_start|>user"
)
_FILMED = (
    _SYSTEM
    + """Describe the video in detail.
Describe how the camera moves or shakes, describe the zoom and view angle, whether it follows the objects.
Describe the location of the video, main characters or objects and their action.
Describe the dynamism of the video and presented actions.
Name the visual style of the video: whether it is a professional footage, user generated content, some kind of \
animation, video game or scren content.
Describe the visual effects, postprocessing and transitions if they are presented in the video.
Pay attention to the order of key actions shown in the scene.<|im_end|>
<|im_start|>user
"""
)
_KANDINSKY = {
    Kandinsky5T2IPipeline: (_PAINTED, 40),
    Kandinsky5I2IPipeline: (_EDITED, 54),
    Kandinsky5T2VPipeline: (_FILMED, 128),
    Kandinsky5I2VPipeline: (_FILMED, 128),
}


def clip_of(frames: int, size: int, seed: int, channels: int = 3) -> torch.Tensor:
    """A video as EasyAnimate takes it: of numbers from 0 to 1."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.random((1, channels, frames, size, size), dtype=np.float32))


_VIDEO = {"height": 16, "width": 16, "num_frames": 9, "guidance_scale": 6.0, "max_sequence_length": 32}
_NO_FRAMES = {name: value for name, value in _VIDEO.items() if name != "num_frames"}
_PICTURE = {"height": 16, "width": 16, "guidance_scale": 5.0, "max_sequence_length": 32}
_FACE = {"id_cond": noise(1, 8), "id_vit_hidden": [noise(1, 4, 8, seed=1), noise(1, 4, 8, seed=2)]}
_EASY = {"height": 32, "width": 32, "num_frames": 5, "guidance_scale": 5.0, "negative_prompt": "blurry"}

_SIZES = {"height": 16, "width": 16, "num_frames": 9}
_ATTENTION = r".*attention\.(to_query|to_key|to_value|out_layer)"  # of Kandinsky
_MOTIF = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 32}
_DRAWN = {"height": 32, "width": 32, "guidance_scale": 3.5, "max_sequence_length": 128}
_QUOTES = ('a sign says "go"', 'a page says "no"')
_HUNYUAN_CALL = {**_VIDEO, "true_cfg_scale": 2.0, "negative_prompt": "blurry"}

PIPELINES = {
    "HunyuanVideoPipeline": Tiny(hunyuan, _HUNYUAN_CALL),
    "HunyuanVideoImageToVideoPipeline": Tiny(hunyuan_i2v, _HUNYUAN_CALL, {"image": pictures(16)}),
    "HunyuanSkyreelsImageToVideoPipeline": Tiny(
        partial(hunyuan, cls=HunyuanSkyreelsImageToVideoPipeline, in_channels=8),
        _HUNYUAN_CALL,
        {"image": pictures(16)},
    ),
    "HunyuanVideoFramepackPipeline": Tiny(
        framepack, {**_HUNYUAN_CALL, "num_frames": 10, "latent_window_size": 2}, {"image": pictures(16)}
    ),
    "HunyuanVideo15Pipeline": Tiny(hunyuan15, _SIZES, prompts=_QUOTES),
    "HunyuanVideo15ImageToVideoPipeline": Tiny(
        partial(hunyuan15, cls=HunyuanVideo15ImageToVideoPipeline, parts=siglip(6, 2)),
        {"num_frames": 9},
        {"image": pictures(16)},
        prompts=_QUOTES,
    ),
    "HunyuanImagePipeline": Tiny(hunyuan_image, {"height": 16, "width": 16}, prompts=_QUOTES),
    "HunyuanImageRefinerPipeline": Tiny(hunyuan_refiner, {"height": 16, "width": 16}, {"image": pictures(16)}),
    "CogVideoXPipeline": Tiny(cogvideox, _VIDEO),
    "CogVideoXImageToVideoPipeline": Tiny(
        partial(cogvideox, cls=CogVideoXImageToVideoPipeline, in_channels=8), _VIDEO, {"image": pictures(16)}
    ),
    "CogVideoXVideoToVideoPipeline": Tiny(
        partial(cogvideox, cls=CogVideoXVideoToVideoPipeline), _NO_FRAMES | {"strength": 0.7}, {"video": films(16, 9)}
    ),
    "CogVideoXFunControlPipeline": Tiny(
        partial(cogvideox, cls=CogVideoXFunControlPipeline, in_channels=8), _NO_FRAMES, {"control_video": films(16, 9)}
    ),
    "ConsisIDPipeline": Tiny(consisid, _VIDEO | _FACE, {"image": pictures(16)}),
    "CogView3PlusPipeline": Tiny(cogview3, _PICTURE),
    "CogView4Pipeline": Tiny(cogview4, _PICTURE | {"negative_prompt": "blurry"}),
    "CogView4ControlPipeline": Tiny(
        partial(cogview4, cls=CogView4ControlPipeline, channels=8),
        _PICTURE | {"negative_prompt": "blurry"},
        {"control_image": pictures(16)},
    ),
    "MochiPipeline": Tiny(mochi, {**_VIDEO, "height": 32, "width": 32, "num_frames": 7}),
    "AllegroPipeline": Tiny(allegro, {**_VIDEO, "num_frames": 8}),
    "LattePipeline": Tiny(latte, {"height": 8, "width": 8, "video_length": 2, "guidance_scale": 7.5}),
    "EasyAnimatePipeline": Tiny(easyanimate, _EASY),
    "EasyAnimateInpaintPipeline": Tiny(
        # With `True` the first fails for a list of generators, and the second for what the config of the VAE lacks
        partial(
            easyanimate,
            cls=EasyAnimateInpaintPipeline,
            in_channels=12,
            add_noise_in_inpaint_model=False,
            resize_inpaint_mask_directly=False,
        ),
        _EASY | {"strength": 0.7},
        {
            "video": [clip_of(5, 32, 1), clip_of(5, 32, 2)],
            "mask_video": [255 * clip_of(5, 32, s, 1).round() for s in (3, 4)],
        },
    ),
    "MotifVideoPipeline": Tiny(motif, _MOTIF),
    "MotifVideoImage2VideoPipeline": Tiny(
        partial(motif, cls=MotifVideoImage2VideoPipeline, image_embed_dim=16), _MOTIF, {"image": pictures(32)}
    ),
    "Kandinsky5T2IPipeline": Tiny(
        partial(kandinsky5, cls=Kandinsky5T2IPipeline, visual_cond=False), _DRAWN, lora_targets=_ATTENTION
    ),
    "Kandinsky5I2IPipeline": Tiny(
        partial(kandinsky5, cls=Kandinsky5I2IPipeline), _DRAWN, {"image": pictures(32)}, lora_targets=_ATTENTION
    ),
    "Kandinsky5T2VPipeline": Tiny(kandinsky5, _VIDEO, lora_targets=_ATTENTION),
    "Kandinsky5I2VPipeline": Tiny(
        partial(kandinsky5, cls=Kandinsky5I2VPipeline), _VIDEO, {"image": pictures(16)}, lora_targets=_ATTENTION
    ),
    "Kandinsky6TI2VAPipeline": Tiny(kandinsky6, _VIDEO, {"image": pictures(16)}, lora_targets=_ATTENTION),
}
