"""What plain diffusers makes of the file of a LoRA: `load_lora_weights` itself, into an empty twin of the student.

diffusers reads some twenty spellings, rebuilds ranks and strengths from them, and drops what it does not know, now and
then in a line of its debug log. So it is asked, with all its habits, and each tensor of the file is followed to where
it arrives.

This file knows pipelines and the files of LoRAs, and no trainer, loss or data.
"""

import copy
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..adapters import adapted_layers, changes_base, without_adapters
from ..denoisers import denoisers_of
from ..errors import without_reports
from ..policy import tuner_layers

ADAPTER = "read"

# What wraps a denoiser leaves its name in those of its tensors, ComfyUI its word for a denoiser, and PEFT the adapter's
_WRAPPERS = re.compile(
    r"^(?:base_model\.model\.|module\.|(?:model\.)?diffusion_model\.)+"
    r"|_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\."
)
_ADAPTER_NAME = re.compile(r"(\.lora_(?:embedding_)?[AB])\.[^.]+(\.weight|\.bias)$|(\.lora_magnitude_vector)\..+$")
_NUMBERS = {"item", "tolist", "__float__", "__int__", "__index__", "__bool__", "numpy", "__array__"}


@dataclass
class Adapter:
    """An adapter of one module.

    Attributes:
        tensors (`dict[str, Tensor]`): By their names in the module, as PEFT saves them.
        config ([`~peft.PeftConfig`]): Of the adapter.
        scaling (`dict[str, float]`): The strength of each adapted layer; empty: what the config says.
    """

    tensors: dict[str, Tensor]
    config: Any
    scaling: dict[str, float] = field(default_factory=dict)


@dataclass
class Plain:
    """What `load_lora_weights` has made of a file.

    Attributes:
        adapters (`dict[str, Adapter]`): By the names of the pipeline's parts.
        changes_base (`bool`): Whether it does more to the denoiser than adding a LoRA: it replaces or fuses layers,
            overwrites norms, or adapts otherwise (LoKr).
        unread (`list[str]`): Tensors of the file that reach nothing.
        missing (`list[str]`): Tensors of the adapters that the file does not hold.
    """

    adapters: dict[str, Adapter]
    changes_base: bool
    unread: list[str]
    missing: list[str]


def read_plainly(
    pipeline: DiffusionPipeline,
    name: str,
    tensors: Mapping[str, Tensor],
    metadata: dict[str, Any] | None,
    converted: dict[str, Tensor],
) -> Plain:
    """Loads a LoRA as plain diffusers does, into nothing.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]): Left as it is.
        name (`str`): Of the denoiser that it is for; a second one is loaded as if it were the first.
        tensors, metadata: Of the file.
        converted (`dict[str, Tensor]`): Is filled with what `lora_state_dict` makes of the file.

    Raises:
        Exception: whatever diffusers and PEFT raise.
    """
    first = name.removesuffix("_2")
    denoiser = _empty(denoisers_of(pipeline)[name])
    base = {parameter: parameter._version for parameter in denoiser.parameters()}
    twin = _twin(pipeline, name, denoiser)
    with _Origins(tensors) as origins:
        load_plainly(twin, dict(tensors), metadata, ADAPTER, converted)
    adapters, reached = {}, set(origins.read)
    for key, part in twin.components.items():
        if not isinstance(part, nn.Module) or ADAPTER not in (getattr(part, "peft_config", None) or {}):
            continue
        layers = adapted_layers(part, ADAPTER)
        state = get_peft_model_state_dict(part, adapter_name=ADAPTER)
        scaling = {module: layer.scaling[ADAPTER] for module, layer in layers.items()}
        arrived = [p for layer in layers.values() for p in [*layer.parameters(), *layer.buffers()]]
        reached |= origins.of([*arrived, *scaling.values()])
        numbers = {module: float(value) for module, value in scaling.items()}
        configs: Any = part.peft_config
        adapters[name if key == first else key] = Adapter(state, configs[ADAPTER], numbers)
    reached |= origins.of(denoiser.parameters())
    changed = not base.keys() <= set(denoiser.parameters()) or any(p._version != before for p, before in base.items())
    config = adapters[name].config if name in adapters else None
    changed |= config is not None and (type(config) is not LoraConfig or changes_base(config))
    # What is loaded into empty layers leaves those of which there is nothing without data
    missing = [entry for adapter in adapters.values() for entry, value in adapter.tensors.items() if value.is_meta]
    # Differences of norms and biases, which files of few-step LoRAs hold for the sake of form
    zeros = {key for key, value in tensors.items() if key.endswith((".diff", ".diff_b")) and not value.any()}
    return Plain(adapters, changed, sorted(tensors.keys() - reached - zeros), missing)


def load_into_denoiser(
    pipeline: DiffusionPipeline, name: str, tensors: Mapping[str, Tensor], metadata: dict[str, Any] | None, adapter: str
) -> None:
    """Loads what a file holds for a denoiser into it, as plain diffusers does; nothing into the encoders."""
    load_plainly(_twin(pipeline, name, denoisers_of(pipeline)[name]), dict(tensors), metadata, adapter)


def load_plainly(
    pipeline: DiffusionPipeline,
    tensors: dict[str, Tensor],
    metadata: dict[str, Any] | None,
    adapter: str,
    converted: dict[str, Tensor] | None = None,
) -> None:
    """`pipeline.load_lora_weights`, of tensors that are read already and the metadata that lay beside them."""
    cls: Any = type(pipeline)

    def lora_state_dict(given: Any, **kwargs: Any) -> Any:
        # Of a dict diffusers takes no metadata
        output = cls.lora_state_dict(given, **kwargs)
        if converted is not None:
            converted.update(output[0] if isinstance(output, tuple) else output)
        return (*output[:-1], metadata) if kwargs.get("return_lora_metadata") else output

    own = vars(pipeline)
    own["lora_state_dict"] = lora_state_dict
    try:
        with without_reports():
            pipeline.load_lora_weights(tensors, adapter_name=adapter)
    finally:
        del own["lora_state_dict"]


def plain_spelling(tensors: Mapping[str, Tensor], prefix: str, modules: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of a LoRA by the names that diffusers saves them under, where something that wrapped the denoiser or
    the adapter has left its own in them; and alphas that are whole numbers as floats."""
    known = set(modules)

    def plain(key: str) -> str:
        found = _ADAPTER_NAME.sub(r"\1\2\3", _WRAPPERS.sub("", key))
        found = _WRAPPERS.sub("", found)
        bare = found.removeprefix(prefix)
        is_ours = re.split(r"\.(?:lora_|alpha$)", bare)[0] in known
        return f"{prefix}{bare}" if is_ours else found

    return {plain(key): value if value.is_floating_point() else value.float() for key, value in tensors.items()}


def _twin(pipeline: DiffusionPipeline, name: str, denoiser: nn.Module) -> DiffusionPipeline:
    """A copy of a pipeline with one denoiser, as its first, and encoders without weights."""
    twin = copy.copy(pipeline)
    encoders = {key: part for key, part in pipeline.components.items() if key.startswith("text_encoder")}
    parts = {key: _empty(part) for key, part in encoders.items() if isinstance(part, nn.Module)}
    for part in parts.values():
        if hasattr(part, "load_adapter"):
            part.load_adapter = functools.partial(_load_adapter, part, part.load_adapter)
    # Past `DiffusionPipeline.__setattr__`, which writes into the config
    vars(twin).update(dict.fromkeys(denoisers_of(pipeline)) | parts | {name.removesuffix("_2"): denoiser})
    return twin


def _load_adapter(encoder: Any, load: Callable, *args: Any, adapter_state_dict: Any, **kwargs: Any) -> Any:
    """transformers casts in threads of its own, where nobody follows."""
    state = {key: value.to(encoder.dtype) for key, value in adapter_state_dict.items()}
    return load(*args, adapter_state_dict=state, **kwargs)


def _empty(module: nn.Module) -> Any:
    """A copy without adapters, and without weights."""
    memo: dict[int, Any] = {id(tensor): _nothing_like(tensor) for tensor in [*module.parameters(), *module.buffers()]}
    for layer in tuner_layers(module):  # whose adapters, one for each teacher before, are not even copied
        memo[id(layer)] = copy.deepcopy(layer.get_base_layer(), memo)
    return without_adapters(copy.deepcopy(module, memo))


def _nothing_like(tensor: Tensor) -> Tensor:
    """A float32 tensor of the same shape, that takes no memory if it is a matrix: what is loaded beside it is not
    rounded. A quantised one, of which PEFT asks more, is itself."""
    if type(tensor) not in (Tensor, nn.Parameter) or not tensor.is_floating_point():
        return tensor
    zero = torch.zeros((), dtype=torch.float32)
    nothing = zero.expand(tensor.shape) if tensor.ndim > 1 else zero.expand(tensor.shape).clone()
    return nn.Parameter(nothing, requires_grad=False) if isinstance(tensor, nn.Parameter) else nothing


class _Origins(TorchFunctionMode):
    """Follows tensors through what is computed of them, by their storages."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__()
        self.read: set[str] = set()  # numbers that were read as such
        self._numbers = {key for key, value in tensors.items() if value.numel() == 1}
        self._of: dict[int, set[str]] = {}
        self._alive: list[Any] = []  # or another storage could take its place
        for key, value in tensors.items():
            self._note(value, {key})

    def of(self, tensors: Iterable[Any]) -> set[str]:
        found: set[str] = set()
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                found |= self._of.get(tensor.untyped_storage()._cdata, set())
        return found

    def _note(self, tensor: Tensor, origins: set[str]) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._of:
            self._alive.append(storage)
        self._of.setdefault(storage._cdata, set()).update(origins)

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "__get__" and not isinstance(output, Tensor):  # a dtype, a device: most of what is asked
            return output
        with torch._C.DisableTorchFunction():
            if origins := self.of(tree_leaves((args, kwargs))):
                if name in _NUMBERS:
                    self.read |= origins & self._numbers
                is_written = name.endswith("_") and not name.endswith("__") or name in ("__setitem__", "__set__")
                for tensor in tree_leaves((output, args[:1] if is_written else ())):
                    if isinstance(tensor, Tensor):
                        self._note(tensor, origins)
        return output
