"""Frozen weights in fewer bits: what a user says of them, in diffusers' words, as the config of each part of a
pipeline; and what a module holds that is quantised.

diffusers' own [`~diffusers.PipelineQuantizationConfig`] takes no name of a torchao type, as YAML has it, and one
backend for a whole pipeline only where its config is the same in diffusers and transformers, which torchao's is not.

This file knows pipelines' indices and modules, and no trainer or teacher.
"""

import copy
import importlib.util
import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import diffusers
import transformers
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as OF_DIFFUSERS
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as OF_TRANSFORMERS

from .errors import brief, one_sentence

# Those on whose weights PEFT trains a LoRA, the package of each, and what its config is told besides
BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "bitsandbytes_4bit": ("bitsandbytes", {"load_in_4bit": True}),
    "bitsandbytes_8bit": ("bitsandbytes", {"load_in_8bit": True}),
    "torchao": ("torchao", {}),
}
_FIELDS = ("quant_backend", "quant_kwargs", "components_to_quantize", "quant_mapping")
_OF_BITSANDBYTES = ("Params4bit", "Int8Params")

# Each layer of LLM.int8 warns in each forward pass that it rounds its inputs
logging.getLogger("bitsandbytes.autograd._functions").addFilter(lambda record: record.levelno > logging.WARNING)


def check_quantization(given: Any) -> None:
    """Refuses what is no quantisation, and a backend that is not installed; loads nothing.

    Raises:
        TypeError, ValueError: saying what is wrong.
    """
    if isinstance(given, PipelineQuantizationConfig):
        return
    if not isinstance(given, Mapping):
        raise TypeError(
            "`quantization_config` must be a `PipelineQuantizationConfig` of diffusers, or a dict of "
            f"{list(_FIELDS)}, got {brief(given)}."
        )
    if unknown := sorted(given.keys() - set(_FIELDS)):
        raise ValueError(f"`quantization_config` has no {unknown}; a `PipelineQuantizationConfig` has {list(_FIELDS)}.")
    mapping = given.get("quant_mapping")
    if (mapping is None) == (given.get("quant_backend") is None):
        raise ValueError(
            "`quantization_config` needs either a `quant_backend` or a `quant_mapping` of parts, got "
            f"{list(given) or 'neither'}."
        )
    if mapping is None:
        _make(given, OF_DIFFUSERS)
    elif more := sorted(given.keys() - {"quant_mapping"}):
        raise ValueError(f"`quantization_config`: `quant_mapping` says all of each part; leave {more} out.")
    elif not isinstance(mapping, Mapping) or not mapping:
        raise TypeError(
            f"`quantization_config`: `quant_mapping` must be a dict by parts of the pipeline, got {brief(mapping)}."
        )
    else:
        for own in mapping.values():
            if isinstance(own, Mapping):
                _make(own, OF_DIFFUSERS)


def configs_by_part(given: Any, index: Mapping[str, Any], who: str, only_known: bool = False) -> dict[str, Any]:
    """The config of each part of a pipeline that is to be quantised.

    Args:
        given (`dict` or [`~diffusers.PipelineQuantizationConfig`], *optional*): That [`check_quantization`] has seen.
        index (`dict`): Of the pipeline.
        who (`str`): What a sentence calls the pipeline.
        only_known (`bool`, *optional*, defaults to `False`): Whether parts may be named that it has not.

    Raises:
        ValueError: if a part is named that the pipeline has not, or that is no model.
    """
    if given is None:
        return {}
    modules = dict(_modules(index))
    told = {name: getattr(given, name) for name in _FIELDS} if isinstance(given, PipelineQuantizationConfig) else given
    mapping, names = told.get("quant_mapping"), told.get("components_to_quantize")
    if mapping is None:
        names = [names] if isinstance(names, str) else names
        mapping = dict.fromkeys(names or modules, told)
    unknown = sorted(mapping.keys() - modules.keys())
    if unknown and not only_known:
        raise ValueError(f"`quantization_config` names {unknown}, and the models of {who} are {sorted(modules)}.")
    return {
        name: _make(own, OF_TRANSFORMERS if modules[name] is transformers else OF_DIFFUSERS)
        if isinstance(own, Mapping)
        else copy.deepcopy(own)  # loading writes into it
        for name, own in mapping.items()
        if name in modules
    }


def _modules(index: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The parts of an index that are models, and the libraries of their classes."""
    for name, entry in index.items():
        if not isinstance(entry, (list, tuple)) or len(entry) < 2:
            continue
        hint = entry[2].get("type_hint") if len(entry) > 2 and isinstance(entry[2], Mapping) else None  # modular
        library, cls = entry[:2] if entry[1] else hint or (None, None)
        for known in (transformers, diffusers):
            found = getattr(known, str(cls), None)
            if library != "diffusers" or known is diffusers:
                if isinstance(found, type) and issubclass(found, nn.Module):
                    yield name, known
                    break


def _make(told: Mapping[str, Any], classes: Mapping[str, Any]) -> Any:
    """A config from what a dict says of it."""
    backend, kwargs = told.get("quant_backend"), told.get("quant_kwargs") or {}
    if backend not in BACKENDS:
        raise ValueError(
            f"`quantization_config`: `quant_backend` must be one of {list(BACKENDS)}, on whose weights PEFT trains a "
            f"LoRA, got {backend!r}."
        )
    package, meant = BACKENDS[backend]
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"`quantization_config` asks for {package}, which is not installed; "
            f"`pip install 'diffusion-opd[{package}]'`."
        )
    if not isinstance(kwargs, Mapping):
        raise TypeError(f"`quantization_config`: `quant_kwargs` must be a dict, got {brief(kwargs)}.")
    kwargs = {**meant, **kwargs}
    if backend == "torchao":
        kwargs["quant_type"] = _torchao_type(kwargs.get("quant_type"))
    with one_sentence(f"`quantization_config`: {backend} cannot be had with {dict(kwargs)}"):
        return classes[backend](**kwargs)


def _torchao_type(told: Any) -> Any:
    """A type of torchao's from its name, or `{name: arguments}`."""
    if not isinstance(told, (str, Mapping, type(None))):
        return told
    import torchao.quantization  # prints lines of warnings

    ((name, kwargs),) = told.items() if isinstance(told, Mapping) and len(told) == 1 else [(told, None)]
    cls = getattr(torchao.quantization, name, None) if isinstance(name, str) and name.endswith("Config") else None
    if cls is None or not isinstance(kwargs, (Mapping, type(None))):
        raise ValueError(
            "`quantization_config`: `quant_type` of torchao must be the name of one of its configs, e.g. "
            f"'Int8WeightOnlyConfig', or {{name: arguments}}, got {told!r}."
        )
    with one_sentence(f"`quantization_config`: {name} of torchao cannot be had with {dict(kwargs or {})}"):
        return cls(**(kwargs or {}))


def as_json(given: Any) -> Any:
    """What was given, as JSON has it."""
    if isinstance(given, PipelineQuantizationConfig):
        given = {name: value for name in _FIELDS if (value := getattr(given, name))}
    return json.loads(json.dumps(given, default=lambda v: v.to_dict() if hasattr(v, "to_dict") else str(v)))


# What a module holds


def is_quantised(module: nn.Module) -> bool:
    return any(is_quantised_weight(parameter) for parameter in module.parameters())


def is_quantised_weight(weight: Tensor) -> bool:
    """Quantised ones are of other types, or of a class of their own."""
    is_own = type(weight).__name__ in _OF_BITSANDBYTES or type(weight.data) is not Tensor
    return is_own or not weight.is_floating_point() or weight.itemsize == 1


def can_be_dequantised(weight: Tensor) -> bool:
    return type(weight).__name__ in _OF_BITSANDBYTES or type(weight.data) is not Tensor


def dequantised(layer: Any) -> Tensor:
    """The quantised weight of a layer as an ordinary tensor."""
    if type(layer.weight).__name__ in _OF_BITSANDBYTES:
        return dequantize_bnb_weight(layer.weight, getattr(layer, "state", None))
    return layer.weight.dequantize()


def keep_layout(module: nn.Module) -> None:
    """Lets quantised weights lie as they are. On a CPU with AVX512-BF16 bitsandbytes (0.50) packs those of a 4-bit
    layer anew in its first evaluated call without gradient: what is learnt through it afterwards gets no gradient, and
    whoever reads the weights reads others (https://github.com/bitsandbytes-foundation/bitsandbytes/issues/2078)."""
    packing = "support_avx512bf16_for_cpu"
    for layer in module.modules():
        if getattr(layer, packing, False):
            setattr(layer, packing, False)


def quantisations(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """How each quantised part of a pipeline is, as JSON has it."""
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return {name: _how(part) for name, part in parts.items() if is_quantised(part)}


def _how(module: nn.Module) -> Any:
    config = getattr(getattr(module, "config", None), "quantization_config", None)
    if config is not None:
        return as_json(config)
    return sorted({type(p).__name__ for p in module.parameters() if is_quantised_weight(p)})


def precision(module: nn.Module) -> str:
    """In what a module holds its weights, in a word or two."""
    for parameter in module.parameters():
        if is_quantised_weight(parameter):
            kind = getattr(getattr(parameter, "quant_state", None), "quant_type", None)
            return f"{type(parameter).__name__} {kind or ''}".strip()
    return str(next(module.parameters()).dtype)
