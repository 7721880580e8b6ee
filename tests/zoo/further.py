"""Videos of Sana, and Kandinsky 3."""

from functools import partial

from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    Kandinsky3Pipeline,
    Kandinsky3UNet,
    SanaImageToVideoPipeline,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
    VQModel,
)

from tests.tiny_pipelines import frozen, gemma2, t5, wan

from .parts import flow, pictures
from .tiny import Tiny


def sana_video(cls: type[DiffusionPipeline], seed: int) -> DiffusionPipeline:
    text_encoder, tokenizer = gemma2()
    transformer = frozen(
        seed,
        SanaVideoTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=8,
        sample_size=8,
        rope_max_seq_len=32,
    )
    return cls(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=wan(0).vae,
        transformer=transformer,
        scheduler=flow(shift=3.0),
    )


def kandinsky3(seed: int) -> DiffusionPipeline:
    text_encoder, tokenizer = t5()
    unet = frozen(
        seed,
        Kandinsky3UNet,
        time_embedding_dim=4,
        groups=2,
        attention_head_dim=4,
        layers_per_block=2,
        block_out_channels=(16, 32),
        cross_attention_dim=4,
        encoder_hid_dim=32,
    )
    movq = frozen(
        7,
        VQModel,
        block_out_channels=[32, 32],
        down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        latent_channels=4,
        num_vq_embeddings=12,
        vq_embed_dim=4,
        norm_type="spatial",
    )
    return Kandinsky3Pipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        unet=unet,
        scheduler=DDPMScheduler(clip_sample=False),
        movq=movq,
    )


_SANA = {
    "height": 32,
    "width": 32,
    "frames": 5,
    "guidance_scale": 4.0,
    "max_sequence_length": 16,
    "complex_human_instruction": None,
    "use_resolution_binning": False,
}

PIPELINES = {
    "SanaVideoPipeline": Tiny(partial(sana_video, SanaVideoPipeline), _SANA),
    "SanaImageToVideoPipeline": Tiny(partial(sana_video, SanaImageToVideoPipeline), _SANA, {"image": pictures(32)}),
    "Kandinsky3Pipeline": Tiny(kandinsky3, {"height": 16, "width": 16, "guidance_scale": 3.0}),
}
