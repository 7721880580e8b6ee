"""What the pipelines here are made of besides the parts of tiny_pipelines.py."""

from typing import Any

import tokenizers
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tests.editing_pipelines import mask, with_parts
from tests.streaming_pipelines import picture
from tests.tiny_pipelines import frozen


def config_of(module: Any) -> dict[str, Any]:
    return {name: value for name, value in module.config.items() if not name.startswith("_")}


def altered(seed: int, module: nn.Module, make: type | None = None, **changes: Any) -> Any:
    """A module of another seed, and of a config with changes."""
    return frozen(seed, make or type(module), **config_of(module) | changes)


def made(cls: type[DiffusionPipeline], pipe: DiffusionPipeline, **others: Any) -> DiffusionPipeline:
    """A class of the parts of another pipeline."""
    return with_parts(cls, pipe, **others)


def pictures(size: int = 16, first: int = 1) -> list[Any]:
    return [picture(size, first), picture(size, first + 1)]


def masks(size: int = 16) -> list[Any]:
    return [mask(size, 0), mask(size, 1)]


def videos(frames: int, size: int = 16, first: int = 1) -> list[Any]:
    return [[picture(size, first + 20 * video + frame) for frame in range(frames)] for video in range(2)]


def flow(**config: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**config)


def lit(module: nn.Module, *names: str, seed: int = 9) -> nn.Module:
    """A module whose parameters with these in their names, zeros at first, are not."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for name, parameter in module.named_parameters():
            if any(part in name for part in names):
                parameter.normal_(std=0.1)
    return module.eval().requires_grad_(False)


def vision(size: int = 16, projection: int = 16) -> dict[str, Any]:
    """An encoder of pictures, and its processor."""
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=size,
        patch_size=8,
        projection_dim=projection,
    )
    processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return {"image_encoder": frozen(8, CLIPVisionModelWithProjection, config), "feature_extractor": processor}


def words_tokenizer(**special: str) -> Any:
    """A tokenizer of words, for encoders that take any: characters, with special tokens."""
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *map(chr, range(32, 127))]
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    given = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=model, model_max_length=512, **given)


def llama() -> tuple[Any, Any]:
    tokenizer = words_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    return frozen(11, LlamaForCausalLM, config), tokenizer
