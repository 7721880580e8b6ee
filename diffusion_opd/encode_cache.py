"""What `encode_prompt` of a pipeline returned, kept for all who ask the same within a batch.

This file knows pipelines, and no policy or trainer.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image
from torch import Tensor

from .inputs import signature


class EncodeCache:
    """Remembers what `encode_prompt` returned, for all parties that share their encoders. Clear it after each batch.

    The key is every argument of the call, bound to the signature (numbers and flags too, tensors and images by
    content), plus the identity of the modules that encode and the pipeline's settings.

    Args:
        timing (`Callable`, *optional*): A context manager to run the encoders in.
    """

    def __init__(self, timing: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext):
        self._store: dict[Any, Any] = {}
        self._timing = timing
        self.num_encodings = 0

    def clear(self) -> None:
        self._store.clear()

    @contextlib.contextmanager
    def apart(self) -> Iterator[dict[Any, Any]]:
        """For the duration another memory, which is empty and may be put to [`use`] later."""
        before, self._store = self._store, {}
        try:
            yield self._store
        finally:
            self._store = before

    def use(self, store: dict[Any, Any]) -> None:
        self._store = store

    def encode(self, pipeline: DiffusionPipeline, encoders: Any, *args: Any, **kwargs: Any) -> Any:
        """`pipeline.encode_prompt(*args, **kwargs)`, once for equal arguments and `encoders`, without gradient."""
        encode_prompt = type(pipeline).encode_prompt
        bound = signature(encode_prompt).bind(None, *args, **kwargs)
        bound.apply_defaults()
        key = (encode_prompt, encoders, _content(bound.arguments))
        if key not in self._store:
            # Encoders run in their own dtype also inside a party's mixed precision: what is shared must not depend on
            # who asks
            own_dtype = torch.autocast(pipeline._execution_device.type, enabled=False)
            with torch.no_grad(), own_dtype, self._timing():
                # The arguments stay alive with their entry: an object that is known by its id keeps it
                self._store[key] = encode_prompt(pipeline, *args, **kwargs), bound
            self.num_encodings += 1
        return fresh_containers(self._store[key][0])


def encoders_of(pipeline: DiffusionPipeline) -> Any:
    """What `encode_prompt` reads besides its arguments: the modules that encode, and settings as SDXL's
    `force_zeros_for_empty_prompt`."""
    components = pipeline.components
    others = {"scheduler", "transformer", "unet", "vae", "safety_checker", "feature_extractor"}
    parts = {name: id(part) for name, part in components.items() if name not in others}
    settings = {k: v for k, v in pipeline.config.items() if k not in components and not k.startswith("_")}
    return _content([parts, settings])


def _content(value: Any) -> Any:
    """A hashable stand-in that is equal for equal values."""
    if isinstance(value, Tensor):
        raw = value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
        return ("tensor", value.dtype, value.device, value.shape, raw)
    if isinstance(value, (Image, np.ndarray)):
        array = np.asarray(value)
        return (type(value).__name__, array.dtype.str, array.shape, array.tobytes())
    if isinstance(value, dict):
        return ("dict", *((key, _content(item)) for key, item in sorted(value.items())))
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *(_content(item) for item in value))
    try:
        hash(value)
    except TypeError:
        return ("object", id(value))
    return (type(value).__name__, value)


def fresh_containers(value: Any) -> Any:
    """The same in lists and dicts of its own: Z-Image edits the lists of prompts and embeddings that it is given."""
    if type(value) is dict:
        return {key: fresh_containers(item) for key, item in value.items()}
    return type(value)(fresh_containers(item) for item in value) if type(value) in (list, tuple) else value
