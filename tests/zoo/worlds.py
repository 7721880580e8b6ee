"""Videos of Wan's kin, SkyReels', LTX's and Cosmos'."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import (
    AnyFlowTransformer3DModel,
    AutoencoderKLCosmos,
    ChronoEditTransformer3DModel,
    CosmosTransformer3DModel,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMapEulerDiscreteScheduler,
    WanAnimateTransformer3DModel,
    WanVACETransformer3DModel,
)
from diffusers.models.transformers import transformer_cosmos
from diffusers.pipelines.anyflow import pipeline_anyflow, pipeline_anyflow_far
from diffusers.pipelines.chronoedit import pipeline_chronoedit
from diffusers.pipelines.cosmos import pipeline_cosmos2_5_predict
from diffusers.pipelines.lucy import pipeline_lucy_edit
from diffusers.pipelines.wan import pipeline_wan_animate, pipeline_wan_vace, pipeline_wan_video2video
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from tests.streaming_pipelines import ltx2, skyreels
from tests.tiny_pipelines import frozen, ltx, qwen2_5_vl, t5, wan

from .known import first_order
from .parts import altered, config_of, flow, made, masks, pictures, videos, vision
from .tiny import Tiny

for module in (
    pipeline_anyflow,
    pipeline_anyflow_far,
    pipeline_chronoedit,
    pipeline_lucy_edit,
    pipeline_wan_animate,
    pipeline_wan_vace,
    pipeline_wan_video2video,
):
    if not hasattr(module, "ftfy"):  # mends broken Unicode; they need it, and nothing else here does
        module.ftfy = SimpleNamespace(fix_text=str)

# torchvision has no build for this torch: what Cosmos takes of it, by other means
if not hasattr(transformer_cosmos, "transforms"):
    transformer_cosmos.transforms = SimpleNamespace(
        functional=SimpleNamespace(
            resize=lambda image, size, interpolation: nn.functional.interpolate(image, size=size, mode="nearest")
        ),
        InterpolationMode=SimpleNamespace(NEAREST="nearest"),
    )
if not hasattr(pipeline_cosmos2_5_predict, "torchvision"):
    to_tensor = SimpleNamespace(to_tensor=lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)
    pipeline_cosmos2_5_predict.torchvision = SimpleNamespace(transforms=SimpleNamespace(functional=to_tensor))


def of(name: str, base: Any, seed: int, make: Any = None, takes: dict[str, Any] | None = None, **others: Any) -> Any:
    """A class of the parts of another, whose transformer may be of another class and config."""
    pipe = base(seed)
    if make is not None or takes:
        others["transformer"] = altered(seed, pipe.transformer, make, **takes or {})
    return first_order(made(getattr(diffusers, name), pipe, **others))


def clip_vision(width: int = 16) -> dict[str, Any]:
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return {"image_encoder": frozen(8, CLIPVisionModel, config), "image_processor": processor}


def projected_vision() -> dict[str, Any]:
    parts = vision()
    return {"image_encoder": parts["image_encoder"], "image_processor": parts["feature_extractor"]}


def animate(seed: int) -> DiffusionPipeline:
    config = config_of(wan(seed).transformer)
    config |= {
        "in_channels": 36,
        "latent_channels": 16,
        "image_dim": 16,
        "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
        "motion_encoder_size": 16,
        "motion_style_dim": 8,
        "motion_dim": 4,
        "motion_encoder_dim": 8,
        "face_encoder_hidden_dim": 8,
        "face_encoder_num_heads": 2,
        "inject_face_latents_blocks": 1,
        "added_kv_proj_dim": 24,
    }
    return of(
        "WanAnimatePipeline",
        wan,
        seed,
        transformer=frozen(seed, WanAnimateTransformer3DModel, **config),
        **clip_vision(),
    )


def any_flow(name: str, make: Any, seed: int, **takes: Any) -> DiffusionPipeline:
    config = {name: value for name, value in config_of(wan(seed).transformer).items() if name != "qk_norm"}
    config = {key: value for key, value in config.items() if key not in ("added_kv_proj_dim", "pos_embed_seq_len")}
    return made(
        getattr(diffusers, name),
        wan(seed),
        transformer=frozen(seed, make, **config | takes),
        scheduler=FlowMapEulerDiscreteScheduler(shift=5.0),
    )


class Safe(nn.Module):
    """Stands in for Cosmos' guard, which is a language model of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.dummy = nn.Parameter(torch.zeros(1), requires_grad=False)

    device = property(lambda self: self.dummy.device)
    dtype = property(lambda self: self.dummy.dtype)

    def check_text_safety(self, text: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


_COSMOS = dict(
    in_channels=17,
    out_channels=16,
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=2,
    mlp_ratio=2,
    text_embed_dim=32,
    adaln_lora_dim=4,
    max_size=(4, 32, 32),
    patch_size=(1, 2, 2),
    rope_scale=(1.0, 4.0, 4.0),
    concat_padding_mask=True,
    extra_pos_embed_type="learnable",
)


def cosmos_vae() -> AutoencoderKLCosmos:
    return frozen(
        7,
        AutoencoderKLCosmos,
        latent_channels=16,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        patch_size=4,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
        latents_mean=None,
        latents_std=None,
    )


def cosmos(name: str, seed: int, channels: int = 16, **others: Any) -> DiffusionPipeline:
    text_encoder, tokenizer = t5()
    parts = {
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "transformer": frozen(seed, CosmosTransformer3DModel, **_COSMOS | {"in_channels": channels}),
        "safety_checker": Safe(),
    }
    return getattr(diffusers, name)(**parts | others)


def cosmos1(name: str, seed: int, channels: int = 16) -> DiffusionPipeline:
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, final_sigmas_type="sigma_min")
    return cosmos(name, seed, channels, vae=cosmos_vae(), scheduler=scheduler)


def cosmos2(name: str, seed: int, channels: int = 16) -> DiffusionPipeline:
    return cosmos(name, seed, channels, vae=wan(0).vae, scheduler=flow(use_karras_sigmas=True))


def cosmos25(seed: int) -> DiffusionPipeline:
    text_encoder, tokenizer = qwen2_5_vl()
    return first_order(
        cosmos(
            "Cosmos2_5_PredictBasePipeline",
            seed,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=frozen(
                seed,
                CosmosTransformer3DModel,
                **_COSMOS
                | {
                    "extra_pos_embed_type": None,
                    "text_embed_dim": 32,
                    "use_crossattn_projection": True,
                    "crossattn_proj_in_channels": 32,
                    "encoder_hidden_states_channels": 32,
                },
            ),
            vae=wan(0).vae,
            scheduler=wan(0).scheduler,
        )
    )


_WAN = {"height": 16, "width": 16, "num_frames": 5, "guidance_scale": 4.0, "max_sequence_length": 16}
_V2V = {key: value for key, value in _WAN.items() if key != "num_frames"} | {"strength": 0.7}
_REELS = {**_WAN, "num_frames": 9}
_LTX = {"height": 32, "width": 32, "num_frames": 9, "guidance_scale": 3.0, "max_sequence_length": 16}
_LTX2 = {
    "height": 32,
    "width": 32,
    "num_frames": 5,
    "frame_rate": 25.0,
    "guidance_scale": 3.0,
    "audio_guidance_scale": 5.0,
    "stg_scale": 0.0,
    "audio_stg_scale": 0.0,
    "modality_scale": 2.0,
    "guidance_rescale": 0.5,
    "max_sequence_length": 16,
}
_COSMOS_CALL = {"height": 32, "width": 32, "guidance_scale": 3.0, "max_sequence_length": 16}
_COSMOS_VIDEO = {**_COSMOS_CALL, "num_frames": 9}

PIPELINES = {
    "WanVideoToVideoPipeline": Tiny(
        partial(of, "WanVideoToVideoPipeline", wan, scheduler=flow(shift=3.0)), _V2V, {"video": videos(5)}
    ),
    "WanVACEPipeline": Tiny(
        partial(
            of,
            "WanVACEPipeline",
            wan,
            make=WanVACETransformer3DModel,
            takes={"vace_layers": [0], "vace_in_channels": 96},
            scheduler=flow(shift=3.0),
        ),
        _WAN,
        {"video": videos(5), "mask": [[one] * 5 for one in masks()]},
        bare=True,
    ),
    "WanAnimatePipeline": Tiny(
        animate,
        {
            "height": 16,
            "width": 16,
            "segment_frame_length": 5,
            "guidance_scale": 3.0,
            "max_sequence_length": 16,
        },
        {"image": pictures(), "pose_video": videos(5), "face_video": videos(5, first=60)},
    ),
    "LucyEditPipeline": Tiny(
        partial(of, "LucyEditPipeline", wan, takes={"in_channels": 32}, scheduler=flow(shift=5.0)),
        _WAN,
        {"video": videos(5)},
    ),
    "SkyReelsV2Pipeline": Tiny(partial(of, "SkyReelsV2Pipeline", skyreels), _REELS),
    "SkyReelsV2ImageToVideoPipeline": Tiny(
        partial(
            of,
            "SkyReelsV2ImageToVideoPipeline",
            skyreels,
            takes={"in_channels": 36, "image_dim": 16, "added_kv_proj_dim": 24},
            **projected_vision(),
        ),
        _REELS,
        {"image": pictures()},
    ),
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": Tiny(
        partial(of, "SkyReelsV2DiffusionForcingImageToVideoPipeline", skyreels), _REELS, {"image": pictures()}
    ),
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": Tiny(
        partial(of, "SkyReelsV2DiffusionForcingVideoToVideoPipeline", skyreels),
        {**_REELS, "num_frames": 9, "base_num_frames": 9, "overlap_history": 5},
        {"video": videos(5)},
    ),
    "ChronoEditPipeline": Tiny(
        partial(
            of,
            "ChronoEditPipeline",
            wan,
            make=ChronoEditTransformer3DModel,
            takes={"in_channels": 36, "image_dim": 16, "added_kv_proj_dim": 24, "rope_temporal_skip_len": 8},
            scheduler=flow(shift=5.0),
            **clip_vision(),
        ),
        _WAN,
        {"image": pictures()},
    ),
    "LTXConditionPipeline": Tiny(
        partial(of, "LTXConditionPipeline", ltx, scheduler=flow()), _LTX, {"image": pictures(32)}
    ),
    "LTX2ImageToVideoPipeline": Tiny(
        partial(of, "LTX2ImageToVideoPipeline", ltx2), {**_LTX2, "image_crf": 0}, {"image": pictures(32)}
    ),
    "LTX2ConditionPipeline": Tiny(partial(of, "LTX2ConditionPipeline", ltx2), _LTX2),
    "LTX2InContextPipeline": Tiny(partial(of, "LTX2InContextPipeline", ltx2), _LTX2),
    "AnyFlowPipeline": Tiny(partial(any_flow, "AnyFlowPipeline", AnyFlowTransformer3DModel), _WAN),
    "CosmosTextToWorldPipeline": Tiny(partial(cosmos1, "CosmosTextToWorldPipeline"), _COSMOS_VIDEO),
    "CosmosVideoToWorldPipeline": Tiny(
        partial(cosmos1, "CosmosVideoToWorldPipeline", channels=17), _COSMOS_VIDEO, {"image": pictures(32)}
    ),
    "Cosmos2TextToImagePipeline": Tiny(partial(cosmos2, "Cosmos2TextToImagePipeline"), _COSMOS_CALL),
    "Cosmos2VideoToWorldPipeline": Tiny(
        partial(cosmos2, "Cosmos2VideoToWorldPipeline", channels=17), _COSMOS_VIDEO, {"image": pictures(32)}
    ),
    "Cosmos2_5_PredictBasePipeline": Tiny(cosmos25, _COSMOS_VIDEO, {"image": pictures(32)}),
}
