"""Pipelines that make sound."""

from typing import Any

from diffusers import (
    AceStepConditionEncoder,
    AceStepPipeline,
    AceStepTransformer1DModel,
    AutoencoderOobleck,
    DiffusionPipeline,
    EDMDPMSolverMultistepScheduler,
    LongCatAudioDiTPipeline,
    LongCatAudioDiTTransformer,
    LongCatAudioDiTVae,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
)
from transformers import Qwen3Model

from tests.tiny_pipelines import frozen, qwen3, t5

from .parts import flow, lit
from .tiny import Tiny


def oobleck(channels: int = 4, rate: int = 16) -> AutoencoderOobleck:
    return frozen(
        7,
        AutoencoderOobleck,
        encoder_hidden_size=4,
        downsampling_ratios=[1, 2],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=channels,
        audio_channels=2,
        sampling_rate=rate,
    )


def stable_audio(seed: int) -> DiffusionPipeline:
    text_encoder, tokenizer = t5()
    transformer = frozen(
        seed,
        StableAudioDiTModel,
        sample_size=8,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        out_channels=4,
        cross_attention_dim=8,
        time_proj_dim=8,
        global_states_input_dim=16,
        cross_attention_input_dim=8,
    )
    projection = frozen(
        9, StableAudioProjectionModel, text_encoder_dim=32, conditioning_dim=8, min_value=0, max_value=32
    )
    return StableAudioPipeline(
        vae=oobleck(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        projection_model=projection,
        transformer=transformer,
        # The noise levels of stable-audio-open-1.0, whose own solver draws noise
        scheduler=EDMDPMSolverMultistepScheduler(
            sigma_min=0.3,
            sigma_max=500,
            sigma_data=1.0,
            prediction_type="v_prediction",
            sigma_schedule="exponential",
            solver_order=1,
        ),
    )


def ace_step(seed: int) -> DiffusionPipeline:
    text_encoder, tokenizer = qwen3(Qwen3Model)
    shared: dict[str, Any] = dict(
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=8,
    )
    transformer = frozen(
        seed,
        AceStepTransformer1DModel,
        **shared,
        num_hidden_layers=2,
        in_channels=24,
        audio_acoustic_hidden_dim=8,
        patch_size=2,
    )
    encoder = frozen(
        9,
        AceStepConditionEncoder,
        **shared,
        text_hidden_dim=16,
        timbre_hidden_dim=8,
        num_lyric_encoder_hidden_layers=2,
        num_timbre_encoder_hidden_layers=2,
    )
    return AceStepPipeline(
        vae=oobleck(8, 50),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=lit(transformer, "scale_shift_table", seed=seed),
        condition_encoder=lit(encoder, "silence_latent", "null_condition"),
        scheduler=flow(num_train_timesteps=1, shift=1.0),
    )


def longcat(seed: int) -> DiffusionPipeline:
    text_encoder, tokenizer = t5(umt5=True)
    vae = frozen(
        7,
        LongCatAudioDiTVae,
        channels=16,
        c_mults=[1, 2],
        strides=[2],
        latent_dim=8,
        encoder_latent_dim=16,
        downsampling_ratio=2,
        sample_rate=8,
    )
    transformer = frozen(
        seed, LongCatAudioDiTTransformer, dit_dim=32, dit_depth=2, dit_heads=4, dit_text_dim=32, latent_dim=8
    )
    return LongCatAudioDiTPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=lit(transformer, "proj_out", seed=seed)
    )


_LINEAR = ["to_q", "to_k", "to_v"]

PIPELINES = {
    "StableAudioPipeline": Tiny(stable_audio, {"audio_end_in_s": 0.5, "guidance_scale": 4.0}),
    "AceStepPipeline": Tiny(
        ace_step,
        {
            "audio_duration": 1.0,
            "guidance_scale": 4.0,
            "lyrics": "la la",
            "max_text_length": 64,
            "max_lyric_length": 16,
        },
    ),
    "LongCatAudioDiTPipeline": Tiny(longcat, {"audio_duration_s": 4.0, "guidance_scale": 3.0}, lora_targets=_LINEAR),
}
