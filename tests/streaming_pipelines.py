"""Tiny pipelines whose runs are more than one state after another, built offline: several streams (LTX-2, SkyReels-V2
diffusion forcing), one part after another (Helios), a start in the middle of the schedule (img2img), a state of which
the scheduler sees a slice (LTX image-to-video), conditioning that is drawn (FLUX control).

As in tiny_pipelines.py, whose tokenizers and encoders these share: the classes and schedulers of the published models,
random weights, `seed` draws the denoiser. The schedulers are of first order, so that a plain call goes where the ODE
goes.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxControlPipeline,
    FluxImg2ImgPipeline,
    FluxTransformer2DModel,
    HeliosPipeline,
    HeliosScheduler,
    HeliosTransformer3DModel,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    LTXImageToVideoPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2Transformer3DModel,
    StableDiffusion3Img2ImgPipeline,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.helios import pipeline_helios
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from diffusers.pipelines.skyreels_v2 import pipeline_skyreels_v2_diffusion_forcing
from PIL import Image

from tests.tiny_pipelines import flux, frozen, gemma2, ltx, sd3, silent, t5

for module in (pipeline_helios, pipeline_skyreels_v2_diffusion_forcing):
    if not hasattr(module, "ftfy"):  # mends broken Unicode; they need it, and nothing else here does
        module.ftfy = SimpleNamespace(fix_text=str)


def ltx2(seed: int = 0) -> LTX2Pipeline:
    """A video and its audio; the audio has a deep copy of the scheduler."""
    text_encoder, tokenizer = gemma2()
    vae = frozen(
        7,
        AutoencoderKLLTX2Video,
        latent_channels=4,
        block_out_channels=(8,),
        down_block_types=("LTX2VideoDownBlock3D",),
        decoder_block_out_channels=(8,),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_type=("spatiotemporal",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=4,
    )
    audio_vae = frozen(
        8, AutoencoderKLLTX2Audio, base_channels=4, ch_mult=(1,), num_res_blocks=1, latent_channels=2, mel_bins=8
    )
    connectors = frozen(
        9,
        LTX2TextConnectors,
        caption_channels=8,
        text_proj_in_factor=3,  # the states of the encoder: its embedding, two layers
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=4,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=4,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=4,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=4,
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
    )
    vocoder = frozen(
        10,
        LTX2Vocoder,
        in_channels=16,
        hidden_channels=8,
        upsample_kernel_sizes=[3, 3],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
    )
    transformer = frozen(
        seed,
        LTX2VideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        caption_channels=8,
        rope_double_precision=False,
        perturbed_attn=True,
    )
    return LTX2Pipeline(
        # diffusers' convert_ltx2_to_diffusers.py
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.95,
            max_shift=2.05,
            base_image_seq_len=1024,
            max_image_seq_len=4096,
            shift_terminal=0.1,
        ),
        vae=vae,
        audio_vae=audio_vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        connectors=connectors,
        transformer=transformer,
        vocoder=vocoder,
    )


def wan_vae() -> AutoencoderKLWan:
    return frozen(
        7,
        AutoencoderKLWan,
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )


def skyreels(seed: int = 0) -> SkyReelsV2DiffusionForcingPipeline:
    """A scheduler for each latent frame."""
    text_encoder, tokenizer = t5(umt5=True)
    transformer = frozen(
        seed,
        SkyReelsV2Transformer3DModel,
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=32,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return SkyReelsV2DiffusionForcingPipeline(
        # As published (`flow_shift=8.0`), but UniPC of first order, which is Euler
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=8.0,
            solver_order=1,
            disable_corrector=list(range(100)),
        ),
        vae=wan_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def helios(seed: int = 0) -> HeliosPipeline:
    """A video chunk after chunk; each sees what was made before."""
    text_encoder, tokenizer = t5(umt5=True)
    transformer = frozen(
        seed,
        HeliosTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=32,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        rope_dim=(4, 4, 4),
    )
    return HeliosPipeline(
        scheduler=HeliosScheduler(stages=1, scheduler_type="euler", use_dynamic_shifting=True),
        vae=wan_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def sd3_img2img(seed: int = 0) -> StableDiffusion3Img2ImgPipeline:
    return StableDiffusion3Img2ImgPipeline.from_pipe(sd3(seed))


def flux_img2img(seed: int = 0) -> FluxImg2ImgPipeline:
    return FluxImg2ImgPipeline.from_pipe(flux(seed, guidance_embeds=True))


def ltx_i2v(seed: int = 0) -> LTXImageToVideoPipeline:
    """The first latent frame is the picture's, and the scheduler does not see it."""
    return LTXImageToVideoPipeline.from_pipe(ltx(seed))


def flux_control(seed: int = 0) -> FluxControlPipeline:
    """The control picture is drawn from its VAE's posterior."""
    parts = flux(seed, guidance_embeds=True).components
    config = dict(parts["transformer"].config) | {"in_channels": 8, "out_channels": 4}
    parts["transformer"] = frozen(
        seed, FluxTransformer2DModel, **{name: value for name, value in config.items() if not name.startswith("_")}
    )
    return FluxControlPipeline(**{name: parts[name] for name in parts if "image" not in name and "feature" not in name})


def picture(size: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def builder(make: Callable[[int], DiffusionPipeline]) -> Callable[..., DiffusionPipeline]:
    return lambda seed=0: silent(make, seed)


STREAMING = {
    name: builder(make)
    for name, make in {
        "ltx2": ltx2,
        "skyreels": skyreels,
        "skyreels_ar": skyreels,
        "helios": helios,
        "sd3_img2img": sd3_img2img,
        "flux_img2img": flux_img2img,
        "ltx_i2v": ltx_i2v,
        "flux_control": flux_control,
    }.items()
}

_SKYREELS = {"height": 16, "width": 16, "num_frames": 9, "guidance_scale": 4.0, "max_sequence_length": 16}
# Arguments of `pipe(...)`, as in tiny_pipelines.py
STREAMING_CALL: dict[str, dict[str, Any]] = {
    "ltx2": {
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "frame_rate": 25.0,
        "guidance_scale": 3.0,
        "audio_guidance_scale": 5.0,
        "stg_scale": 1.0,
        "modality_scale": 2.0,
        "guidance_rescale": 0.5,
        "spatio_temporal_guidance_blocks": [1],
        "max_sequence_length": 16,
    },
    "skyreels": _SKYREELS,
    "skyreels_ar": {**_SKYREELS, "ar_step": 2, "causal_block_size": 1},
    "helios": {
        "height": 16,
        "width": 16,
        "num_frames": 10,
        "guidance_scale": 4.0,
        "max_sequence_length": 16,
        "num_latent_frames_per_chunk": 2,
        "history_sizes": [4, 2, 1],
    },
    "sd3_img2img": {"strength": 0.5, "height": 16, "width": 16, "guidance_scale": 4.0, "max_sequence_length": 32},
    "flux_img2img": {
        "image": picture(16),
        "strength": 0.5,
        "height": 16,
        "width": 16,
        "guidance_scale": 3.5,
        "max_sequence_length": 32,
    },
    "ltx_i2v": {"height": 32, "width": 32, "num_frames": 9, "guidance_scale": 3.0, "max_sequence_length": 16},
    "flux_control": {
        "control_image": picture(16),
        "height": 16,
        "width": 16,
        "guidance_scale": 3.5,
        "max_sequence_length": 32,
    },
}
# What these take a sample of besides a prompt; FLUX takes one picture for all, LTX and SD3 one for each
PICTURES = {"sd3_img2img": [picture(16, seed) for seed in (1, 2)], "ltx_i2v": [picture(32, seed) for seed in (1, 2)]}
