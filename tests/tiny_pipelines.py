"""Tiny pipelines of twelve families, built offline in well under a second each.

The classes, the tokenizers' kinds, the schedulers and the latent layout (packing, channels, frames) are those of the
published models; the weights are random and the widths minimal. `seed` draws the denoiser, everything else is the same
for all seeds: two pipelines of one family with two seeds are a student and a teacher that share VAE and text encoders.

This file knows diffusers and transformers, and nothing of diffusion_opd.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

BYTES = sorted(ByteLevel.alphabet())  # the 256 printable characters that stand for bytes in byte-level BPE

# `pipe.transformer` and `pipe.unet` of every family have Linear layers of these names: LoRA targets that always fit.
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def frozen(seed: int, make: Callable[..., torch.nn.Module], *args, **kwargs) -> torch.nn.Module:
    """Makes a module with the weights of `seed`, in eval mode and without gradients; the caller's RNG is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = make(*args, **kwargs)
    return module.eval().requires_grad_(False)


# Tokenizers: every byte or character is a token.


def clip_tokenizer() -> CLIPTokenizer:
    tokens = BYTES + [byte + "</w>" for byte in BYTES] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(chr(code), -3.0) for code in range(33, 127)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def qwen_tokenizer(words: tuple[str, ...] = ()) -> Qwen2Tokenizer:
    """`words` are tokens of their own, with their leading space."""
    tokens = BYTES + ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=4096)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(list(words))
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['content'] is string %}{{ m['content'] }}"
        "{% else %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def gemma_tokenizer() -> GemmaTokenizer:
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"] + [f"<0x{byte:02X}>" for byte in range(256)]
    return GemmaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=512)


# Text encoders, each with its tokenizer. Two encoders of one pipeline get different seeds: were they equal, a test
# could not tell that they are swapped.


def clip(make: type, seed: int = 1, width: int = 16) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        hidden_size=width,
        projection_dim=width,
        intermediate_size=32,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return frozen(seed, make, config), tokenizer


def t5(umt5: bool = False) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    tokenizer = t5_tokenizer()
    make, make_config = (UMT5EncoderModel, UMT5Config) if umt5 else (T5EncoderModel, T5Config)
    config = make_config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_ff=32,
        d_kv=8,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
    )
    return frozen(3, make, config), tokenizer


def qwen3(make: type) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    tokenizer = qwen_tokenizer()
    config = Qwen3Config(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return frozen(4, make, config), tokenizer


# Qwen-Image drops the first 34 tokens of what it encodes, which are its instruction. In bytes the instruction would be
# several times as long, and the denoiser would see that and never the prompt.
QWEN_IMAGE_WORDS = (
    "system",
    "user",
    "assistant",
    "Describe",
    " the",
    " image",
    " by",
    " detailing",
    " color",
    " shape",
)
QWEN_IMAGE_WORDS += (" size", " texture", " quantity", " text", " spatial", " relationships", " of", " objects", " and")
QWEN_IMAGE_WORDS += (" background",)


def qwen2_5_vl() -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    tokenizer = qwen_tokenizer(QWEN_IMAGE_WORDS)
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
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
    )
    return frozen(5, Qwen2_5_VLForConditionalGeneration, config), tokenizer


def gemma2() -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    tokenizer = gemma_tokenizer()
    config = Gemma2Config(
        head_dim=4,
        hidden_size=8,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        attn_implementation="eager",
    )
    return frozen(6, Gemma2Model, config), tokenizer


def kl_vae(latents: int, scaling: float, shift: float | None = None, blocks: int = 2) -> torch.nn.Module:
    """`AutoencoderKL` with `latents` channels that shrinks pictures by 2 ** (blocks - 1)."""
    return frozen(
        7,
        AutoencoderKL,
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(4,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        latent_channels=latents,
        norm_num_groups=1,
        scaling_factor=scaling,
        shift_factor=shift,
        # as published: with a shift (SD3, FLUX.1, Z-Image, Lumina 2) there are no quant convolutions
        use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
    )


# Flow matching


def sd3(seed: int = 0) -> StableDiffusion3Pipeline:
    """As SD3.5-Medium: QK norms, and a first block with dual attention."""
    text_encoder, tokenizer = clip(CLIPTextModelWithProjection, seed=1)
    text_encoder_2, tokenizer_2 = clip(CLIPTextModelWithProjection, seed=2)
    text_encoder_3, tokenizer_3 = t5()
    transformer = frozen(
        seed,
        SD3Transformer2DModel,
        sample_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        # scheduler_config.json of SD3 and SD3.5, as in diffusers' convert_sd3_to_diffusers.py
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_vae(latents=4, scaling=1.5305, shift=0.0609),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )


def flux(seed: int = 0, guidance_embeds: bool = False) -> FluxPipeline:
    """FLUX.1: schnell, or dev with `guidance_embeds`."""
    text_encoder, tokenizer = clip(CLIPTextModel)
    text_encoder_2, tokenizer_2 = t5()
    transformer = frozen(
        seed,
        FluxTransformer2DModel,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )
    # scheduler_config.json of FLUX.1-dev (guidance embedded) and of FLUX.1-schnell
    shift = {"shift": 3.0, "use_dynamic_shifting": True} if guidance_embeds else {"shift": 1.0}
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**shift),
        vae=kl_vae(latents=1, scaling=0.3611, shift=0.1159),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )


def flux2_klein(seed: int = 0) -> Flux2KleinPipeline:
    """As FLUX.2-klein-base: no embedded guidance, two calls a step."""
    text_encoder, tokenizer = qwen3(Qwen3ForCausalLM)
    vae = frozen(
        7,
        AutoencoderKLFlux2,
        sample_size=32,
        block_out_channels=(4,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    transformer = frozen(
        seed,
        Flux2Transformer2DModel,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=256,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    return Flux2KleinPipeline(
        # FLUX.2 takes the scheduler of FLUX.1-dev: diffusers' convert_flux2_to_diffusers.py
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def qwenimage(seed: int = 0) -> QwenImagePipeline:
    text_encoder, tokenizer = qwen2_5_vl()
    vae = frozen(
        7,
        AutoencoderKLQwenImage,
        base_dim=12,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    transformer = frozen(
        seed,
        QwenImageTransformer2DModel,
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    return QwenImagePipeline(
        # scheduler_config.json of Qwen-Image; the shift is exponential in the number of latent tokens
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=1.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            base_image_seq_len=256,
            max_image_seq_len=8192,
            shift_terminal=0.02,
            time_shift_type="exponential",
        ),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def sana(seed: int = 0) -> SanaPipeline:
    text_encoder, tokenizer = gemma2()
    vae = frozen(
        7,
        AutoencoderDC,
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    transformer = frozen(
        seed,
        SanaTransformer2DModel,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
    )
    return SanaPipeline(
        # diffusers' convert_sana_to_diffusers.py, default `--scheduler_type flow-dpm_solver` below 4096 pixels
        scheduler=DPMSolverMultistepScheduler(flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction"),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def zimage_transformer(**config) -> ZImageTransformer2DModel:
    transformer = ZImageTransformer2DModel(**config)
    with torch.no_grad():  # created by `torch.empty`: whatever the memory held
        transformer.x_pad_token.normal_(std=0.02)
        transformer.cap_pad_token.normal_(std=0.02)
    return transformer


def zimage(seed: int = 0) -> ZImagePipeline:
    text_encoder, tokenizer = qwen3(Qwen3Model)
    transformer = frozen(
        seed,
        zimage_transformer,
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        norm_eps=1e-5,
        qk_norm=True,
        cap_feat_dim=16,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 32, 32],
    )
    return ZImagePipeline(
        # scheduler_config.json of Z-Image, the undistilled model (Z-Image-Turbo: 3.0)
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=kl_vae(latents=16, scaling=0.3611, shift=0.1159),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def lumina2(seed: int = 0) -> Lumina2Pipeline:
    text_encoder, tokenizer = gemma2()
    transformer = frozen(
        seed,
        Lumina2Transformer2DModel,
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=8,
        num_layers=2,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=16,
        norm_eps=1e-5,
        axes_dim_rope=(4, 2, 2),
        cap_feat_dim=8,
    )
    return Lumina2Pipeline(
        # scheduler_config.json of Lumina-Image-2.0
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        # The pipeline takes the VAE to shrink by 8, whatever it does.
        vae=kl_vae(latents=4, scaling=0.3611, shift=0.1159, blocks=4),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def ltx(seed: int = 0) -> LTXPipeline:
    text_encoder, tokenizer = t5()
    vae = frozen(
        7,
        AutoencoderKLLTXVideo,
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False, False, False, False, False),
        upsample_residual=(False, False, False, False),
        upsample_factor=(1, 1, 1, 1),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    transformer = frozen(
        seed,
        LTXVideoTransformer3DModel,
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    )
    return LTXPipeline(
        # diffusers' convert_ltx_to_diffusers.py
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.95,
            max_shift=2.05,
            base_image_seq_len=1024,
            max_image_seq_len=4096,
            shift_terminal=0.1,
        ),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def wan(seed: int = 0) -> WanPipeline:
    text_encoder, tokenizer = t5(umt5=True)
    vae = frozen(
        7,
        AutoencoderKLWan,
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    transformer = frozen(
        seed,
        WanTransformer3DModel,
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return WanPipeline(
        # scheduler_config.json of Wan 2.1 and 2.2 T2V (docs/source/en/api/pipelines/wan.md of diffusers); 5.0 for 720p
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


# Variance preserving


def pixart_sigma(seed: int = 0) -> PixArtSigmaPipeline:
    text_encoder, tokenizer = t5()
    transformer = frozen(
        seed,
        PixArtTransformer2DModel,
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,  # the second half is the learned variance, which the pipeline drops
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    return PixArtSigmaPipeline(
        # diffusers' convert_pixart_sigma_to_diffusers.py: all defaults, which are linear betas and epsilon
        scheduler=DPMSolverMultistepScheduler(),
        vae=kl_vae(latents=4, scaling=0.13025),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def sdxl(seed: int = 0) -> StableDiffusionXLPipeline:
    text_encoder, tokenizer = clip(CLIPTextModel, seed=1)
    text_encoder_2, tokenizer_2 = clip(CLIPTextModelWithProjection, seed=2)
    unet = frozen(
        seed,
        UNet2DConditionModel,
        sample_size=32,
        in_channels=4,
        out_channels=4,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=6 * 8 + 16,  # six sizes and crops, and the pooled prompt
        cross_attention_dim=32,
        norm_num_groups=2,
    )
    return StableDiffusionXLPipeline(
        # scheduler_config.json of stable-diffusion-xl-base-1.0
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        vae=kl_vae(latents=4, scaling=0.13025),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        unet=unet,
    )


def sd15(seed: int = 0) -> StableDiffusionPipeline:
    text_encoder, tokenizer = clip(CLIPTextModel, width=32)
    unet = frozen(
        seed,
        UNet2DConditionModel,
        sample_size=32,
        in_channels=4,
        out_channels=4,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=32,
        norm_num_groups=2,
    )
    return StableDiffusionPipeline(
        # scheduler_config.json of stable-diffusion-v1-5
        scheduler=PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        vae=kl_vae(latents=4, scaling=0.18215),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def silent(make: Callable[[int], DiffusionPipeline], seed: int = 0) -> DiffusionPipeline:
    pipe = make(seed)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# name -> builder that takes `seed`
FLOW_BUILDERS = {
    "sd3": sd3,
    "flux": flux,
    "flux_guidance": partial(flux, guidance_embeds=True),
    "flux2_klein": flux2_klein,
    "qwenimage": qwenimage,
    "sana": sana,
    "zimage": zimage,
    "lumina2": lumina2,
    "ltx": ltx,
    "wan": wan,
}
VP_BUILDERS = {"pixart_sigma": pixart_sigma, "sdxl": sdxl, "sd15": sd15}
BUILDERS = {name: partial(silent, make) for name, make in (FLOW_BUILDERS | VP_BUILDERS).items()}
FLOW = tuple(FLOW_BUILDERS)
VP = tuple(VP_BUILDERS)


def flagging(family: str = "sd15") -> DiffusionPipeline:
    """A pipeline whose safety checker finds fault with every picture."""
    side = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    vision = dict(side, image_size=32, patch_size=16)
    sides = CLIPConfig(text_config=dict(side, vocab_size=99), vision_config=vision, projection_dim=16)
    checker = StableDiffusionSafetyChecker(sides).eval()
    checker.concept_embeds_weights.data.fill_(-1.0)
    size = {"height": 32, "width": 32}
    extractor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    parts = BUILDERS[family](0).components | {"safety_checker": checker, "feature_extractor": extractor}
    return type(BUILDERS[family](0))(**parts)


# Arguments of `pipe(...)` for the smallest sample that still has several latent tokens; with guidance, where the family
# has it.
CALL: dict[str, dict[str, Any]] = {
    "sd3": {"height": 16, "width": 16, "guidance_scale": 4.0, "max_sequence_length": 32},
    "flux": {"height": 16, "width": 16, "max_sequence_length": 32},
    "flux_guidance": {"height": 16, "width": 16, "guidance_scale": 3.5, "max_sequence_length": 32},
    "flux2_klein": {
        "height": 8,
        "width": 8,
        "guidance_scale": 4.0,
        "max_sequence_length": 64,
        "text_encoder_out_layers": (1,),
    },
    "qwenimage": {
        "height": 16,
        "width": 16,
        "true_cfg_scale": 4.0,
        "negative_prompt": " ",
        "max_sequence_length": 64,
    },
    "sana": {
        "height": 32,
        "width": 32,
        "guidance_scale": 4.0,
        "max_sequence_length": 32,
        "complex_human_instruction": None,
        "use_resolution_binning": False,
    },
    "zimage": {"height": 16, "width": 16, "guidance_scale": 4.0, "max_sequence_length": 64},
    "lumina2": {
        "height": 32,
        "width": 32,
        "guidance_scale": 4.0,
        "max_sequence_length": 64,
        "system_prompt": "Draw",  # the pipeline's own is longer than 64 characters and would be all that is seen
    },
    "ltx": {"height": 32, "width": 32, "num_frames": 9, "guidance_scale": 3.0, "max_sequence_length": 16},
    "wan": {"height": 16, "width": 16, "num_frames": 5, "guidance_scale": 4.0, "max_sequence_length": 16},
    "pixart_sigma": {
        "height": 16,
        "width": 16,
        "guidance_scale": 4.0,
        "max_sequence_length": 32,
        "use_resolution_binning": False,
    },
    "sdxl": {"height": 16, "width": 16, "guidance_scale": 5.0},
    "sd15": {"height": 16, "width": 16, "guidance_scale": 5.0},
}


def denoiser(pipe: DiffusionPipeline) -> torch.nn.Module:
    return pipe.unet if "unet" in pipe.components else pipe.transformer
