"""Qwen-Image's and Z-Image's further classes, audio, and families of one or two classes each."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    AudioLDM2Pipeline,
    AudioLDM2ProjectionModel,
    AudioLDM2UNet2DConditionModel,
    AutoencoderKL,
    AutoencoderKLQwenImage21,
    AutoencoderSAME,
    AutoencoderTiny,
    ControlNetXSAdapter,
    DDIMScheduler,
    DiffusionPipeline,
    DreamLiteMobilePipeline,
    DreamLitePipeline,
    DreamLiteUNetModel,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    GlmImagePipeline,
    GlmImageTransformer2DModel,
    Ideogram4Pipeline,
    Ideogram4Transformer2DModel,
    JoyImageEditPipeline,
    JoyImageEditPlusPipeline,
    JoyImageEditPlusTransformer3DModel,
    JoyImageEditTransformer3DModel,
    MusicLDMPipeline,
    NucleusMoEImagePipeline,
    NucleusMoEImageTransformer2DModel,
    OmniGenPipeline,
    OmniGenTransformer2DModel,
    PRXPipeline,
    PRXPixelPipeline,
    PRXTransformer2DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    StableAudio3AudioToAudioPipeline,
    StableAudio3DiTModel,
    StableAudio3DurationEmbedder,
    StableAudio3InpaintPipeline,
    StableAudio3Pipeline,
    StableDiffusionControlNetXSPipeline,
    StableDiffusionXLControlNetXSPipeline,
    UNet2DConditionModel,
    UNetControlNetXSModel,
    ZImageControlNetInpaintPipeline,
    ZImageControlNetModel,
)
from diffusers.pipelines.ideogram4 import pipeline_ideogram4
from diffusers.pipelines.joyimage import image_processor
from diffusers.pipelines.omnigen import pipeline_omnigen, processor_omnigen
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_inpaint, pipeline_qwenimage_layered
from transformers import (
    ByT5Tokenizer,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    GlmImageProcessor,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaTokenizer,
    Mistral3Config,
    Mistral3Model,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2VLProcessor,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    Qwen3VLProcessor,
    RobertaTokenizer,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Config,
    T5EncoderModel,
    T5GemmaConfig,
    T5GemmaEncoder,
    T5GemmaEncoderModel,
    T5GemmaModuleConfig,
)
from transformers.models.glm_image.image_processing_pil_glm_image import GlmImageImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.editing_pipelines import mask, with_parts
from tests.streaming_pipelines import picture, wan_vae
from tests.tiny_pipelines import (
    BYTES,
    CALL,
    QWEN_IMAGE_WORDS,
    flux2_klein,
    frozen,
    gemma_tokenizer,
    kl_vae,
    qwen3,
    qwen_tokenizer,
    qwenimage,
    sd15,
    sdxl,
    t5,
    zimage,
)

from .tiny import Tiny

# Of videos they need torchvision
for processor in (Qwen2VLProcessor, Qwen3VLProcessor):
    processor.get_attributes = classmethod(lambda cls: ["image_processor", "tokenizer"])

if not hasattr(pipeline_omnigen, "OmniGenMultiModalProcessor"):
    # Without torchvision it is not imported. Of pictures that it is given it needs transforms; here it is given none
    processor_omnigen.transforms = SimpleNamespace(
        **{name: lambda *args, **kwargs: None for name in ("Compose", "Lambda", "ToTensor", "Normalize")}
    )
    pipeline_omnigen.OmniGenMultiModalProcessor = processor_omnigen.OmniGenMultiModalProcessor

image_processor.BUCKETS[1024][:] = [(32, 32)]  # of JoyImage, as small as the others

# transformers 5 answers with more than the features, which MusicLDM does not know
_features = ClapModel.get_text_features
ClapModel.get_text_features = lambda self, *args, **kwargs: _features(self, *args, **kwargs).pooler_output

# GLM-Image draws a preview of 256 tokens first; here of one
_shape = GlmImageProcessor._get_target_shape
GlmImageProcessor._get_target_shape = lambda self, height, width: (*_shape(self, height, width)[:2], 1, 1)

# As in tests/editing_pipelines.py: these make a picture of a megapixel, or of 640 x 640, of whatever they are given
for module in (pipeline_qwenimage_edit_inpaint, pipeline_qwenimage_layered):
    dimensions = module.calculate_dimensions
    module.calculate_dimensions = lambda area, ratio, dimensions=dimensions: dimensions(32 * 32, ratio)

pipeline_ideogram4.QWEN3_VL_ACTIVATION_LAYERS = (0, 1)  # of the two that the encoder has here


def config_of(part: Any, **others: Any) -> dict[str, Any]:
    return {name: value for name, value in part.config.items() if not name.startswith("_")} | others


def alive(module: torch.nn.Module, seed: int = 11) -> torch.nn.Module:
    """What starts at zero, as layers of ControlNets do, is drawn: it would pass nothing on."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1, generator=generator)
    return module


def pictures(size: int = 16, channels: str = "RGB") -> list:
    return [picture(size, number).convert(channels) for number in range(2)]


def masks(size: int = 16) -> list:
    return [mask(size, number) for number in range(2)]


def sounds() -> list:
    """A second of noise at 16 Hz, on two channels, of a batch of one."""
    return [torch.randn(1, 2, 16, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]


def of(cls: type[DiffusionPipeline], make: Callable[[int], DiffusionPipeline], parts: Any = None) -> Callable:
    """The parts of another pipeline, and those that are made of them."""
    return lambda seed: with_parts(cls, pipe := make(seed), **(parts(pipe, seed) if parts else {}))


def _zimage_control(channels: int, refiner: str | None) -> Callable:
    def parts(pipe: DiffusionPipeline, seed: int) -> dict[str, Any]:
        control = frozen(
            9,
            ZImageControlNetModel,
            control_layers_places=[0],
            control_refiner_layers_places=[0],
            control_in_dim=channels,
            add_control_noise_refiner=refiner,
            dim=32,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
        )
        control.gradient_checkpointing = False  # its class reads it where there is a gradient, and lacks it
        return {"controlnet": alive(control)}

    return parts


# Qwen3-VL: an encoder that reads pictures with a prompt, its tokenizer and its processor. As tests/editing_pipelines.py
# has it of Qwen2.5-VL


def qwen3_vl(make: type = Qwen3VLForConditionalGeneration, patch: int = 4) -> dict[str, Any]:
    tokenizer = qwen_tokenizer(QWEN_IMAGE_WORDS)
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *marks]})
    ids = dict(zip(marks, tokenizer.convert_tokens_to_ids(marks), strict=True))
    width = {"hidden_size": 16, "intermediate_size": 16}
    config = Qwen3VLConfig(
        text_config={
            **width,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "rope_parameters": {"mrope_section": [2, 1, 1], "rope_type": "default", "rope_theta": 1e6},
        },
        vision_config={
            **width,
            "depth": 1,
            "num_heads": 2,
            "out_hidden_size": 16,
            "patch_size": patch,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    sees = Qwen2VLImageProcessorPil(
        patch_size=patch, merge_size=2, min_pixels=(2 * patch) ** 2, max_pixels=(8 * patch) ** 2
    )
    processor = Qwen3VLProcessor(sees, tokenizer, chat_template=tokenizer.chat_template)
    return {"text_encoder": frozen(5, make, config), "tokenizer": tokenizer, "processor": processor}


def qwen21(seed: int) -> QwenImage21Pipeline:
    parts = qwen3_vl(patch=16)  # a token of the encoder is four of the denoiser
    vae = frozen(
        7,
        AutoencoderKLQwenImage21,
        base_dim=4,
        decoder_base_dim=4,
        z_dim=8,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 8,
        latents_std=[1.0] * 8,
    )
    transformer = frozen(
        seed,
        QwenImage21Transformer2DModel,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    return QwenImage21Pipeline(
        scheduler=qwenimage().scheduler,
        vae=vae,
        text_encoder=parts["text_encoder"],
        processor=parts["processor"],
        transformer=transformer,
    )


def t5gemma() -> tuple[Any, T5GemmaConfig]:
    tokenizer = gemma_tokenizer()
    config = T5GemmaModuleConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    return tokenizer, T5GemmaConfig(encoder=config, is_encoder_decoder=False)


def prx(seed: int, **others: Any) -> PRXPipeline:
    tokenizer, config = t5gemma()
    sizes = {"in_channels": 4, "context_in_dim": 16, "hidden_size": 32, "num_heads": 2, "depth": 2, "axes_dim": [8, 8]}
    transformer = frozen(seed, PRXTransformer2DModel, **sizes | others)
    return PRXPipeline(
        transformer=alive(transformer, seed),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=frozen(6, T5GemmaEncoder, config.encoder),
        tokenizer=tokenizer,
        vae=kl_vae(latents=4, scaling=0.3611, shift=0.1159),
    )


def prx_pixel(seed: int) -> PRXPixelPipeline:
    """Pictures themselves are the state, and the denoiser predicts them."""
    text_encoder, tokenizer = qwen3(Qwen3Model)
    transformer = prx(seed, in_channels=3, bottleneck_size=8, resolution_embeds=True).transformer
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return PRXPixelPipeline(transformer, scheduler, text_encoder, tokenizer, prompt_max_tokens=32)


def ernie(seed: int) -> ErnieImagePipeline:
    tokenizer = qwen_tokenizer()
    width = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "head_dim": 8}
    config = Mistral3Config(
        text_config=MistralConfig(vocab_size=len(tokenizer), num_hidden_layers=2, num_key_value_heads=2, **width),
        vision_config=PixtralVisionConfig(num_hidden_layers=1, image_size=16, patch_size=8, **width),
    )
    transformer = frozen(
        seed,
        ErnieImageTransformer2DModel,
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=32,
        in_channels=4,
        out_channels=4,
        text_in_dim=16,
        rope_axes_dim=(8, 4, 4),
    )
    return ErnieImagePipeline(
        transformer=alive(transformer, seed),
        vae=flux2_klein().vae,
        text_encoder=frozen(6, Mistral3Model, config),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=4.0),
    )


def nucleus(seed: int) -> NucleusMoEImagePipeline:
    transformer = frozen(
        seed,
        NucleusMoEImageTransformer2DModel,
        in_channels=16,
        out_channels=4,
        num_layers=5,  # the fourth one has experts
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
        mlp_ratio=6.0,
        num_experts=4,
        moe_intermediate_dim=16,
        capacity_factors=2.0,
    )
    parts = qwen3_vl()
    del parts["tokenizer"]
    with torch.no_grad():  # experts are created by `torch.empty`
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in transformer.named_parameters():
            if name.endswith(("gate_up_proj", "down_proj")):
                parameter.normal_(std=0.1, generator=generator)
    return with_parts(NucleusMoEImagePipeline, qwenimage(), **parts, transformer=transformer)


def ideogram4(seed: int) -> Ideogram4Pipeline:
    """A second denoiser of the same kind, which is no student, is asked without a prompt."""
    parts = qwen3_vl(Qwen3VLModel)
    config = dict(
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        intermediate_size=16,
        adaln_dim=8,
        llm_features_dim=32,
        mrope_section=(2, 1, 1),
    )
    return Ideogram4Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=flux2_klein().vae,
        text_encoder=parts["text_encoder"],
        tokenizer=parts["tokenizer"],
        transformer=frozen(seed, Ideogram4Transformer2DModel, **config),
        unconditional_transformer=frozen(12, Ideogram4Transformer2DModel, **config),
    )


def omnigen(seed: int) -> OmniGenPipeline:
    tokens = ["<unk>", "<s>", "</s>", "▁"] + [f"<0x{byte:02X}>" for byte in range(256)]
    transformer = frozen(
        seed,
        OmniGenTransformer2DModel,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=32,
        num_layers=2,
        pad_token_id=0,
        vocab_size=len(tokens),
        rope_scaling={"short_factor": [1.0] * 4, "long_factor": [1.0] * 4},
        pos_embed_max_size=8,
        time_step_dim=16,
    )
    return OmniGenPipeline(
        transformer=transformer,
        # Its timesteps rise from 0, which is noise, to 1
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1),
        vae=kl_vae(latents=4, scaling=0.13025, blocks=4),  # it takes the VAE to shrink by 8
        tokenizer=LlamaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[]),
    )


def joy(cls: type[DiffusionPipeline], transformer: type, seed: int) -> DiffusionPipeline:
    """The pictures that it is given are part of the state."""
    denoiser = frozen(
        seed,
        transformer,
        hidden_size=32,
        num_attention_heads=2,
        text_dim=16,
        num_layers=2,
        rope_dim_list=[8, 4, 4],
    )
    return cls(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=4.0),
        vae=wan_vae(),
        transformer=alive(denoiser, seed),
        **qwen3_vl(),
    )


def dreamlite(cls: type[DiffusionPipeline], seed: int) -> DiffusionPipeline:
    unet = frozen(
        seed,
        DreamLiteUNetModel,
        block_out_channels=(8, 16),
        down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteCrossAttnNoSelfAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=2,
        cross_attention_dim=16,
        encoder_hid_dim=16,
        encoder_hid_dim_type="text_proj_rms",
        attention_head_dim=2,
        use_linear_projection=True,
        addition_embed_type="time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16,
        ff_mult=2,
    )
    sizes = {"encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4)}
    vae = frozen(7, AutoencoderTiny, **sizes, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    return cls(**qwen3_vl(), vae=vae, unet=unet, scheduler=qwenimage().scheduler)


def stable_audio3(cls: type[DiffusionPipeline], seed: int) -> DiffusionPipeline:
    """As the base model: it is not distilled, has guidance, and no noise is drawn between steps."""
    tokenizer, config = t5gemma()
    vae = frozen(
        7,
        AutoencoderSAME,
        patch_size=2,
        encoder_channels=8,
        encoder_c_mults=(2,),
        encoder_strides=(2,),
        encoder_transformer_depths=(1,),
        latent_dim=4,
        dim_heads=8,
        sampling_rate=16,
    )
    transformer = frozen(
        seed,
        StableAudio3DiTModel,
        io_channels=4,
        embed_dim=32,
        depth=2,
        num_heads=4,
        cond_token_dim=16,
        global_cond_dim=16,
        local_add_cond_dim=5,
        timestep_features_dim=16,
        num_memory_tokens=2,
    )
    return cls(
        vae=alive(vae),
        text_encoder=frozen(6, T5GemmaEncoderModel, config),
        tokenizer=tokenizer,
        duration_embedder=frozen(9, StableAudio3DurationEmbedder, output_dim=16, fourier_dim=16),
        transformer=alive(transformer, seed),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1),
    )


def clap() -> dict[str, Any]:
    """What the pipelines of AudioLDM's kin share."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *BYTES]
    vocab = {token: i for i, token in enumerate(tokens)}
    width = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = ClapConfig(
        text_config={**width, "vocab_size": len(tokens), "max_position_embeddings": 80, "projection_dim": 16},
        audio_config={
            "hidden_size": 16,
            "patch_embeds_hidden_size": 4,
            "depths": [1, 1],
            "num_attention_heads": [2, 2],
            "num_mel_bins": 16,
            "spec_size": 64,
            "window_size": 4,
            "projection_dim": 16,
        },
        projection_dim=16,
    )
    vocoder = SpeechT5HifiGanConfig(
        model_in_dim=16,
        sampling_rate=64,
        upsample_initial_channel=8,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1]],
    )
    betas = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}
    return {
        "vae": frozen(7, AutoencoderKL, **config_of(kl_vae(4, 0.18215), in_channels=1, out_channels=1)),
        "text_encoder": frozen(1, ClapModel, config),
        "tokenizer": RobertaTokenizer(vocab=vocab, merges=[], model_max_length=64),
        "feature_extractor": ClapFeatureExtractor(),
        "scheduler": DDIMScheduler(**betas, clip_sample=False),
        "vocoder": frozen(10, SpeechT5HifiGan, vocoder),
    }


def audioldm2(seed: int) -> AudioLDM2Pipeline:
    text_encoder_2, tokenizer_2 = t5()
    language = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=256, vocab_size=8)
    unet = frozen(
        seed,
        AudioLDM2UNet2DConditionModel,
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=([None, 16, 32], [None, 16, 32]),
    )
    return AudioLDM2Pipeline(
        **clap(),
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        projection_model=frozen(9, AudioLDM2ProjectionModel, 16, 32, 16),
        language_model=frozen(8, GPT2LMHeadModel, language),
        unet=unet,
    )


def musicldm(seed: int) -> MusicLDMPipeline:
    """Its denoiser is told the prompt as a class."""
    config = config_of(
        sd15().unet,
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=16,
        class_embeddings_concat=True,
        cross_attention_dim=(4, 8),
    )
    return MusicLDMPipeline(**clap(), unet=frozen(seed, UNet2DConditionModel, **config))


def control_xs(cls: type[DiffusionPipeline], make: Callable[[int], DiffusionPipeline], seed: int) -> DiffusionPipeline:
    """The denoiser is made of a U-Net and of an adapter."""
    pipe = make(seed)
    # Read from files its middle block has as many groups as the U-Net; an adapter's has as many as channels
    changes = {"layers_per_block": 2, "sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4}
    unet = frozen(seed, UNet2DConditionModel, **config_of(pipe.unet, **changes))
    sizes = {"block_out_channels": (4, 4), "num_attention_heads": (2, 2), "conditioning_embedding_out_channels": (4, 4)}
    adapter = frozen(9, partial(ControlNetXSAdapter.from_unet, unet), **sizes)
    both = alive(frozen(seed, UNetControlNetXSModel.from_unet, unet, alive(adapter)), seed)
    others = {"safety_checker": None, "requires_safety_checker": False} if "XL" not in cls.__name__ else {}
    return with_parts(cls, pipe, unet=both, controlnet=adapter, **others)


def glm(seed: int) -> GlmImagePipeline:
    """A language model draws tokens of the picture, 32 pixels each, which the denoiser is told; of the prompt itself it
    is told what is in quotes. Without pictures: diffusers reads those as another version of transformers had them."""
    marks = ["<|begin_of_image|>", "<|end_of_image|>", "<|image|>", "<sop>", "<eop>"]
    start, end, image, grid_start, grid_end = marks
    base = qwen_tokenizer()
    base.add_special_tokens({"additional_special_tokens": marks})
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=base.backend_tokenizer,
        pad_token=base.pad_token,
        bos_token=start,
        padding_side="left",
        extra_special_tokens={"image_token": image, "grid_bos_token": grid_start, "grid_eos_token": grid_end},
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{% for c in m['content'] %}"
        f"{{% if c['type'] == 'image' %}}{start}{image}{end}"
        "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    width = {"hidden_size": 16, "intermediate_size": 16}
    sees = GlmImageConfig(
        text_config={
            **width,
            "vocab_size": len(tokenizer),
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "pad_token_id": tokenizer.pad_token_id,
            "vision_vocab_size": 32,
            "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e4},
        },
        vision_config={**width, "depth": 1, "num_heads": 2, "image_size": 64, "patch_size": 32},
        vq_config={"embed_dim": 8, "num_embeddings": 32, "latent_channels": 16},
        **{
            f"image_{name}token_id": tokenizer.convert_tokens_to_ids(mark)
            for name, mark in (("", image), ("start_", start), ("end_", end))
        },
    )
    reads = GlmImageImageProcessorPil(
        patch_size=32, merge_size=1, temporal_patch_size=1, min_pixels=32 * 32, max_pixels=64 * 64
    )
    letters = ByT5Tokenizer()
    text = T5Config(vocab_size=len(letters), d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    transformer = frozen(
        seed,
        GlmImageTransformer2DModel,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=32,
    )
    latents = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    return GlmImagePipeline(
        tokenizer=letters,
        processor=GlmImageProcessor(reads, tokenizer, chat_template=tokenizer.chat_template),
        text_encoder=frozen(3, T5EncoderModel, text),
        vision_language_encoder=frozen(5, GlmImageForConditionalGeneration, sees),
        vae=frozen(7, AutoencoderKL, **config_of(kl_vae(4, 1.0, blocks=4), **latents)),
        transformer=alive(transformer, seed),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
        ),
    )


_QWEN, _ZIMAGE = CALL["qwenimage"], CALL["zimage"]
_SIZE = {"height": 16, "width": 16}
_PLAIN = {**_SIZE, "guidance_scale": 4.0, "use_resolution_binning": False}
# Whose prompt is no list, where the check knows of such
_BARE = {"bare": True} if "bare" in Tiny.__dataclass_fields__ else {}
_JOY = ["img_attn_qkv", "img_attn_proj", "txt_attn_qkv"]
_AUDIO3 = ["to_qkv", "to_q", "to_kv", "to_out"]
_PRX = ["img_qkv_proj", "to_out.0"]
_LAYERS = {name: value for name, value in _QWEN.items() if name not in ("height", "width")}

PIPELINES = {
    "ZImageControlNetInpaintPipeline": Tiny(
        of(ZImageControlNetInpaintPipeline, zimage, _zimage_control(33, "control_noise_refiner")),
        _ZIMAGE,
        {"image": pictures(), "mask_image": masks(), "control_image": pictures()},
    ),
    "QwenImage21Pipeline": Tiny(
        qwen21, {"output_resolution": 64, "true_cfg_scale": 4.0, "negative_prompt": " "}, {"image": pictures(64)}
    ),
    "PRXPixelPipeline": Tiny(prx_pixel, {**_PLAIN, "height": 8, "width": 8}, lora_targets=_PRX),
    "ErnieImagePipeline": Tiny(ernie, {"height": 8, "width": 8, "guidance_scale": 4.0}),
    "NucleusMoEImagePipeline": Tiny(
        nucleus, {**_SIZE, "guidance_scale": 4.0, "max_sequence_length": 512, "return_index": -1}
    ),
    "Ideogram4Pipeline": Tiny(
        ideogram4,
        {"height": 8, "width": 8, "guidance_scale": 4.0, "guidance_schedule": None, "max_sequence_length": 64},
    ),
    "OmniGenPipeline": Tiny(omnigen, {"height": 32, "width": 32, "guidance_scale": 2.5}),
    "JoyImageEditPipeline": Tiny(
        partial(joy, JoyImageEditPipeline, JoyImageEditTransformer3DModel),
        {"guidance_scale": 4.0},
        {"image": pictures(32)},
        lora_targets=_JOY,
    ),
    "JoyImageEditPlusPipeline": Tiny(
        partial(joy, JoyImageEditPlusPipeline, JoyImageEditPlusTransformer3DModel),
        {"height": 32, "width": 32, "guidance_scale": 4.0},
        {"images": [[one, other] for one, other in zip(pictures(32), reversed(pictures(32)), strict=True)]},
        lora_targets=_JOY,
    ),
    "DreamLitePipeline": Tiny(
        partial(dreamlite, DreamLitePipeline),
        {**_SIZE, "guidance_scale": 3.5, "image_guidance_scale": 1.5},
        {"image": pictures()},
        **_BARE,
    ),
    "DreamLiteMobilePipeline": Tiny(partial(dreamlite, DreamLiteMobilePipeline), _SIZE, **_BARE),
    "StableAudio3Pipeline": Tiny(
        partial(stable_audio3, StableAudio3Pipeline), {"duration": 1.0, "guidance_scale": 4.0}, lora_targets=_AUDIO3
    ),
    "StableAudio3AudioToAudioPipeline": Tiny(
        partial(stable_audio3, StableAudio3AudioToAudioPipeline),
        # With the noise levels of full generation the first ones would rise
        {"duration": 1.0, "init_noise_level": 0.6, "logsnr_min": -2.0, "logsnr_max": 3.0},
        {"audio": sounds()},
        lora_targets=_AUDIO3,
    ),
    "StableAudio3InpaintPipeline": Tiny(
        partial(stable_audio3, StableAudio3InpaintPipeline),
        {"duration": 1.0, "mask_start_seconds": 0.25, "mask_end_seconds": 0.75},
        {"audio": sounds()},
        lora_targets=_AUDIO3,
    ),
    "AudioLDM2Pipeline": Tiny(audioldm2, {"audio_length_in_s": 1.0, "guidance_scale": 3.5, "max_new_tokens": 2}),
    "MusicLDMPipeline": Tiny(musicldm, {"audio_length_in_s": 1.0, "guidance_scale": 2.0}),
    "StableDiffusionControlNetXSPipeline": Tiny(
        partial(control_xs, StableDiffusionControlNetXSPipeline, sd15), CALL["sd15"], {"image": pictures()}
    ),
    "StableDiffusionXLControlNetXSPipeline": Tiny(
        partial(control_xs, StableDiffusionXLControlNetXSPipeline, sdxl), CALL["sdxl"], {"image": pictures()}
    ),
    "GlmImagePipeline": Tiny(
        glm,
        {"height": 64, "width": 64, "guidance_scale": 1.5},
        prompts=("a sign that says 'red'", "a sign that says 'oak'"),
    ),
}
