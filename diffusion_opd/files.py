"""Files that tell what a folder or a repository holds, and what the student and its teachers read of them alike.

This file knows names and configs, and loads nothing.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

INDEX_NAME = "model_index.json"  # of a pipeline
MODULAR_INDEX_NAME = "modular_model_index.json"
CONFIG_NAME = "config.json"  # of a denoiser
LORA_NAME = "pytorch_lora_weights.safetensors"  # diffusers format
PEFT_CONFIG_NAME, PEFT_WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."  # of its tensors


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, as [`parse_json`]."""
    return parse_json(path.read_bytes(), path.name)


def parse_json(text: str | bytes, name: str) -> dict[str, Any]:
    """The JSON object that a text is, which is called `name` in the sentence that says that it is none.

    Raises:
        ValueError: if it is none.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # no JSON, no text, or lists in lists without end
        content = error
    if not isinstance(content, dict):
        raise ValueError(f"{name} is no JSON object")
    return content


def parts_named(index: Mapping[str, Any]) -> dict[str, str]:
    """The classes of the parts that the index of a pipeline names."""
    entries = {key: entry for key, entry in index.items() if isinstance(entry, list) and len(entry) > 1}
    return {key: str(entry[1]) for key, entry in entries.items() if entry[0] and entry[1]}


def absent_parts(index: Mapping[str, Any]) -> dict[str, Any]:
    """For `from_pretrained`: optional parts that a saved pipeline was without (an SD3 without T5), which diffusers
    would miss."""
    return {key: None for key, entry in index.items() if entry == [None, None]}


def name_or_path(pipeline: DiffusionPipeline) -> str | None:
    """The folder or repository that a pipeline was loaded from."""
    # diffusers has no public name for it
    found = pipeline.config.get("_name_or_path") or getattr(pipeline, "_pretrained_model_name_or_path", None)
    return None if found is None else str(found)  # it may be a `Path`


def lora_name(denoiser: str) -> str:
    """The file of a denoiser's LoRA: what plain diffusers looks for, and of a second denoiser one beside it."""
    first = denoiser.removesuffix("_2")
    return LORA_NAME if denoiser == first else LORA_NAME.replace(".", f"_{denoiser}.")
