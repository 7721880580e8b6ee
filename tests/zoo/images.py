"""Pipelines that make pictures, beside FLUX's kin and Stable Diffusion's."""

from functools import partial
from typing import Any

from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    DDPMScheduler,
    DiffusionPipeline,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    HunyuanDiT2DControlNetModel,
    HunyuanDiT2DModel,
    HunyuanDiTControlNetPipeline,
    HunyuanDiTPAGPipeline,
    HunyuanDiTPipeline,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    QwenImageControlNetInpaintPipeline,
    QwenImageControlNetModel,
    QwenImageControlNetPipeline,
    QwenImageEditInpaintPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    SanaControlNetModel,
    SanaControlNetPipeline,
    SanaPAGPipeline,
    SanaSprintImg2ImgPipeline,
    SanaSprintPipeline,
    SCMScheduler,
    ZImageControlNetModel,
    ZImageControlNetPipeline,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_inpaint
from transformers import BertConfig, BertModel, CLIPTextModelWithProjection

from tests.editing_pipelines import qwen_edit
from tests.tiny_pipelines import clip, frozen, gemma2, kl_vae, qwenimage, sana, t5, zimage

from .parts import altered, config_of, flow, lit, llama, made, masks, pictures, words_tokenizer
from .tiny import Tiny

# As of Qwen-Image-Edit: a 4096th of the megapixel that it makes of every picture
_dimensions = pipeline_qwenimage_edit_inpaint.calculate_dimensions
pipeline_qwenimage_edit_inpaint.calculate_dimensions = lambda area, ratio: _dimensions(max(area // 4096, 1024), ratio)


def qwen_control(cls: type[DiffusionPipeline], seed: int, **config: Any) -> DiffusionPipeline:
    taken = config_of(qwenimage(9).transformer)
    names = "patch_size in_channels out_channels num_layers attention_head_dim num_attention_heads joint_attention_dim"
    taken = {name: taken[name] for name in f"{names} axes_dims_rope".split()}
    controlnet = frozen(9, QwenImageControlNetModel, **taken | config)
    return made(cls, qwenimage(seed), controlnet=lit(controlnet, "controlnet_"))


def z_control(seed: int) -> DiffusionPipeline:
    pipe = zimage(seed)
    controlnet = frozen(
        9,
        ZImageControlNetModel,
        control_layers_places=[0, 1],
        control_in_dim=16,
        dim=32,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
    )
    controlnet.gradient_checkpointing = False  # its class lacks it
    controlnet = ZImageControlNetModel.from_transformer(lit(controlnet, "after_proj", "before_proj"), pipe.transformer)
    return made(ZImageControlNetPipeline, pipe, controlnet=controlnet.requires_grad_(False))


def aura_flow(seed: int) -> DiffusionPipeline:
    text_encoder, tokenizer = t5(umt5=True)
    transformer = frozen(
        seed,
        AuraFlowTransformer2DModel,
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )
    return AuraFlowPipeline(tokenizer, text_encoder, kl_vae(4, 0.13025), transformer, flow(shift=1.73))


def hidream(seed: int) -> DiffusionPipeline:
    text_encoder, tokenizer = clip(CLIPTextModelWithProjection, seed=1)
    text_encoder_2, tokenizer_2 = clip(CLIPTextModelWithProjection, seed=2)
    text_encoder_3, tokenizer_3 = t5()
    text_encoder_4, tokenizer_4 = llama()
    transformer = frozen(
        seed,
        HiDreamImageTransformer2DModel,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[32, 16],
        text_emb_dim=32,
        axes_dims_rope=(8, 4, 4),
        max_resolution=(8, 8),
        llama_layers=[0, 1],
        force_inference_output=True,
    )
    return HiDreamImagePipeline(
        scheduler=flow(shift=3.0),
        vae=kl_vae(4, 0.3611, 0.1159),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
        text_encoder_4=text_encoder_4,
        tokenizer_4=tokenizer_4,
        transformer=transformer,
    )


def bert() -> tuple[Any, Any]:
    tokenizer = words_tokenizer(cls_token="<s>", sep_token="</s>")
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    return frozen(13, BertModel, config), tokenizer


_DIT = dict(
    num_attention_heads=2,
    attention_head_dim=8,
    in_channels=4,
    patch_size=2,
    sample_size=8,
    hidden_size=16,
    cross_attention_dim=16,
    cross_attention_dim_t5=32,
    pooled_projection_dim=16,
    text_len=77,
    text_len_t5=256,
)


def hunyuan_dit(cls: type[DiffusionPipeline], seed: int, **others: Any) -> DiffusionPipeline:
    text_encoder, tokenizer = bert()
    text_encoder_2, tokenizer_2 = t5()
    return cls(
        vae=kl_vae(4, 0.13025),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=frozen(seed, HunyuanDiT2DModel, **_DIT, num_layers=2, activation_fn="gelu-approximate"),
        scheduler=DDPMScheduler(
            beta_end=0.02,
            beta_start=0.00085,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            clip_sample=False,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        **others,
    )


def hunyuan_control(seed: int) -> DiffusionPipeline:
    net = frozen(9, HunyuanDiT2DControlNetModel, **_DIT, transformer_num_layers=2)
    return hunyuan_dit(HunyuanDiTControlNetPipeline, seed, controlnet=lit(net, "controlnet_blocks", "after_proj"))


def lumina(seed: int) -> DiffusionPipeline:
    text_encoder, tokenizer = gemma2()
    transformer = frozen(
        seed,
        LuminaNextDiT2DModel,
        sample_size=4,
        hidden_size=24,
        num_layers=2,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        ffn_dim_multiplier=1.0,
        cross_attention_dim=8,
    )
    return LuminaPipeline(
        transformer=transformer,
        scheduler=flow(shift=6.0),
        vae=kl_vae(4, 0.13025, blocks=4),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


def sana_with(cls: type[DiffusionPipeline], seed: int, **others: Any) -> DiffusionPipeline:
    return made(cls, sana(seed), **{"scheduler": flow(shift=3.0)} | others)


def sana_control(seed: int) -> DiffusionPipeline:
    taken = config_of(sana(9).transformer)
    own = SanaControlNetModel.__init__.__wrapped__ if hasattr(SanaControlNetModel.__init__, "__wrapped__") else None
    names = own.__code__.co_varnames if own else taken
    net = frozen(9, SanaControlNetModel, **{name: value for name, value in taken.items() if name in names})
    return sana_with(SanaControlNetPipeline, seed, controlnet=lit(net, "controlnet_blocks", "input_block"))


def sprint(cls: type[DiffusionPipeline], seed: int) -> DiffusionPipeline:
    pipe = sana(seed)
    transformer = altered(seed, pipe.transformer, guidance_embeds=True, guidance_embeds_scale=0.1)
    return made(cls, pipe, transformer=transformer, scheduler=SCMScheduler(prediction_type="trigflow", sigma_data=0.5))


_SIZE = {"height": 16, "width": 16}
_IMAGE, _MASK, _CONTROL = {"image": pictures()}, {"mask_image": masks()}, {"control_image": pictures(first=5)}
_QWEN = {**_SIZE, "true_cfg_scale": 4.0, "negative_prompt": " ", "max_sequence_length": 64}
_Z = {**_SIZE, "guidance_scale": 4.0, "max_sequence_length": 64}
_COG = {**_SIZE, "guidance_scale": 4.0, "max_sequence_length": 32}
_DIT_CALL = {**_SIZE, "guidance_scale": 4.0, "use_resolution_binning": False}
_SANA = {
    "height": 32,
    "width": 32,
    "guidance_scale": 4.0,
    "max_sequence_length": 32,
    "complex_human_instruction": None,
    "use_resolution_binning": False,
}
_BIG_CONTROL = {"control_image": pictures(32)}

PIPELINES = {
    "QwenImageImg2ImgPipeline": Tiny(
        lambda seed: made(QwenImageImg2ImgPipeline, qwenimage(seed)), {**_QWEN, "strength": 0.7}, _IMAGE
    ),
    "QwenImageInpaintPipeline": Tiny(
        lambda seed: made(QwenImageInpaintPipeline, qwenimage(seed)), {**_QWEN, "strength": 0.7}, _IMAGE | _MASK
    ),
    "QwenImageEditInpaintPipeline": Tiny(
        lambda seed: made(QwenImageEditInpaintPipeline, qwen_edit(seed)),
        {**_QWEN, "strength": 0.7, "max_sequence_length": 512},
        _IMAGE | _MASK,
    ),
    "QwenImageControlNetPipeline": Tiny(partial(qwen_control, QwenImageControlNetPipeline), _QWEN, _CONTROL),
    "QwenImageControlNetInpaintPipeline": Tiny(
        partial(qwen_control, QwenImageControlNetInpaintPipeline, extra_condition_channels=4),
        _QWEN,
        _CONTROL | {"control_mask": masks()},
    ),
    "ZImageImg2ImgPipeline": Tiny(
        lambda seed: made(ZImageImg2ImgPipeline, zimage(seed)), {**_Z, "strength": 0.7}, _IMAGE
    ),
    "ZImageInpaintPipeline": Tiny(
        lambda seed: made(ZImageInpaintPipeline, zimage(seed)), {**_Z, "strength": 0.7}, _IMAGE | _MASK
    ),
    "ZImageControlNetPipeline": Tiny(z_control, _Z, _CONTROL),
    "AuraFlowPipeline": Tiny(aura_flow, _COG),
    "HiDreamImagePipeline": Tiny(hidream, _COG),
    "HunyuanDiTPipeline": Tiny(partial(hunyuan_dit, HunyuanDiTPipeline), _DIT_CALL),
    "HunyuanDiTPAGPipeline": Tiny(
        partial(hunyuan_dit, HunyuanDiTPAGPipeline, pag_applied_layers="blocks.1"), {**_DIT_CALL, "pag_scale": 2.0}
    ),
    "HunyuanDiTControlNetPipeline": Tiny(hunyuan_control, _DIT_CALL, _CONTROL),
    "LuminaPipeline": Tiny(
        lumina,
        {"height": 32, "width": 32, "guidance_scale": 4.0, "max_sequence_length": 32, "negative_prompt": "a blur"},
    ),
    "SanaPAGPipeline": Tiny(
        partial(sana_with, SanaPAGPipeline, pag_applied_layers=["blocks.0"]), {**_SANA, "pag_scale": 2.0}
    ),
    "SanaControlNetPipeline": Tiny(sana_control, _SANA, _BIG_CONTROL),
    "SanaSprintPipeline": Tiny(partial(sprint, SanaSprintPipeline), {**_SANA, "intermediate_timesteps": None}),
    "SanaSprintImg2ImgPipeline": Tiny(
        partial(sprint, SanaSprintImg2ImgPipeline),
        {**_SANA, "intermediate_timesteps": None, "strength": 0.7},
        {"image": pictures(32)},
    ),
}
