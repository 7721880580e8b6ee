"""The parts of the toy world's `FluxKontextPipeline`, small and untrained, and the settings it is sampled with.

Everything is the real class of diffusers or transformers, so the pipeline takes the same way through any code as
FLUX.1-Kontext does: it draws a prompt, or changes a picture that is given besides. This module knows the words of the
world, and nothing of data, judges and training.
"""

import string
from pathlib import Path

import datasets
import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxTransformer2DModel,
)
from transformers import (
    AddedToken,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from examples.toy_world.world import LETTERS, SIZE, WORDS

ASSETS = Path(__file__).parent / "assets"
BASE = ASSETS / "base"
TEACHERS = ASSETS / "teachers"

MAX_TOKENS = 12  # of either tokenizer; the longest prompt has ten words
SHIFT = 3.0  # of the timestep schedule, in training and in sampling
LATENT_CHANNELS = 8
CLIP_WIDTH, T5_WIDTH = 64, 128
DOUBLE_BLOCKS, SINGLE_BLOCKS, HEADS, HEAD_WIDTH = 2, 5, 4, 32  # of the transformer

# Arguments of `pipeline(...)`, the same in training, distillation and evaluation. Without a `true_cfg_scale` there is
# no classifier-free guidance: half the cost, and the specialists do not need it. By itself the pipeline would enlarge
# all pictures to the megapixel that FLUX.1-Kontext was trained on.
SAMPLING = {
    "num_inference_steps": 6,
    "max_sequence_length": MAX_TOKENS,
    "height": SIZE,
    "width": SIZE,
    "max_area": SIZE**2,
    "_auto_resize": False,
}


def quiet() -> None:
    """No bars but a script's own, and no warnings that are no news here: text encoders without a LoRA, prompts that are
    longer than any of the toy world's."""
    datasets.disable_progress_bars()
    for library in (diffusers, transformers):
        library.logging.disable_progress_bar()
        library.logging.set_verbosity_error()


def clip_tokenizer() -> CLIPTokenizer:
    """A token for every word of the world, and single characters for the rest. CLIP's tokenizer lowers the case."""
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for character in string.ascii_lowercase + '"':
        vocab[character] = len(vocab)
        vocab[character + "</w>"] = len(vocab)
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=MAX_TOKENS)
    words = [word for word in dict.fromkeys(WORDS) if len(word) > 1]
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=True) for word in words])
    return tokenizer


def t5_tokenizer() -> T5Tokenizer:
    """The same words as pieces of a unigram model, and the letters that strings are made of."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0), ('▁"', -2.0), ('"', -4.0)]
    pieces += [(f"▁{word}", -2.0) for word in dict.fromkeys(WORDS)]
    pieces += [(letter, -4.0) for letter in LETTERS]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=MAX_TOKENS)


def clip_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=CLIP_WIDTH,
            intermediate_size=2 * CLIP_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """Knows the order of words from the start, as one that was pretrained on text does: each head of its attention
    looks at another place beside a word. From its own initialization, where all places count alike and a word far more
    than those around it, "a circle left of a square" and "a square left of a circle" remained the same to it."""
    heads = (0, -1, 1, -2, 2, -3, 3, -4)
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=T5_WIDTH,
            d_kv=T5_WIDTH // len(heads),
            d_ff=2 * T5_WIDTH,
            num_layers=2,
            num_heads=len(heads),
            relative_attention_num_buckets=16,
            relative_attention_max_distance=MAX_TOKENS,
            dropout_rate=0.0,
        )
    )
    attention = encoder.encoder.block[0].layer[0].SelfAttention
    buckets = attention._relative_position_bucket(torch.tensor(heads), num_buckets=16, max_distance=MAX_TOKENS)
    with torch.no_grad():
        attention.relative_attention_bias.weight.zero_()[buckets, range(len(heads))] = 5.0
        encoder.shared.weight *= 0.3
    return encoder


def vae() -> AutoencoderKL:
    """64 x 64 pixels to 16 x 16 latents."""
    return AutoencoderKL(
        sample_size=SIZE,
        block_out_channels=(16, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        shift_factor=0.0,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def transformer() -> FluxTransformer2DModel:
    """64 image tokens, 64 of a source picture where there is one, and `MAX_TOKENS` of text."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,  # the pipeline packs 2 x 2 latents into a token
        num_layers=DOUBLE_BLOCKS,
        num_single_layers=SINGLE_BLOCKS,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )


def untrained_pipeline(seed: int) -> FluxKontextPipeline:
    torch.manual_seed(seed)
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    return FluxKontextPipeline(
        transformer=transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae(),
        text_encoder=clip_encoder(clip),
        tokenizer=clip,
        text_encoder_2=t5_encoder(t5),
        tokenizer_2=t5,
    )


def load_base() -> FluxKontextPipeline:
    pipeline = FluxKontextPipeline.from_pretrained(BASE)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
