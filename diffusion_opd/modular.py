"""Modular pipelines of diffusers, which are trees of blocks (`modular_model_index.json`), called as others are.

`DiffusionPipeline`s have a `__call__` with a signature, decorated once with `torch.no_grad()`. Of a modular pipeline
the arguments are what its blocks take, and each block has a `torch.no_grad` of its own.

This file knows pipelines, and no policy or trainer.
"""

import copy
import functools
import inspect
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from diffusers import DiffusionPipeline, ModularPipeline
from diffusers.guiders import BaseGuidance
from diffusers.modular_pipelines import PipelineState
from greenlet import getcurrent

from .disclosure import forget_places
from .files import CONFIG_NAME, INDEX_NAME, MODULAR_INDEX_NAME

# Each block around the one that fails logs the whole traceback of what is raised anyway; within a paused call it may be
# caught
logging.getLogger("diffusers.modular_pipelines.modular_pipeline").addFilter(lambda _: getcurrent().parent is None)

# Of a copy of a pipeline: what may replace the first state that a block has made, `(name, make) -> state`
FIRST_STATE = "_first_state"
GUIDANCE = "guidance_scale"  # an attribute of guiders, and no argument of their blocks

_TEXT = re.compile(r"(negative_)?prompt(_\d+)?")
_RESULTS = ("images", "videos", "audios", "audio", "sound")


def is_pipeline(value: Any) -> TypeGuard[DiffusionPipeline]:
    """Whether something is a loaded pipeline, modular or not."""
    return isinstance(value, (DiffusionPipeline, ModularPipeline))


def with_call(pipeline: Any) -> Any:
    """A pipeline whose class has a `__call__` with a signature: any but a modular one is that already. A modular one
    stays itself, of a class of the same name."""
    if isinstance(pipeline, ModularPipeline) and not hasattr(type(pipeline).__call__, "__wrapped__"):
        pipeline.__class__ = _class_with_call(type(pipeline), pipeline._blocks, has_guiders(pipeline))
    return pipeline


def load_modular(
    path: str, hub: Mapping[str, Any], quantised: Mapping[str, Any] | None = None, **kwargs: Any
) -> ModularPipeline:
    """A modular pipeline with its components.

    Args:
        path (`str`): Hub id or folder.
        hub (`Mapping`): For the index: `revision`, `token` ...
        quantised (`Mapping`, *optional*): The `quantization_config` of each component that has one.
        kwargs: For the components, each a value or a dict by their names with a `"default"`.

    Raises:
        ValueError: if a component that the index names cannot be loaded.
    """
    pipeline = ModularPipeline.from_pretrained(path, **hub)
    for name, spec in pipeline._component_specs.items():
        if spec.default_creation_method != "from_pretrained" or spec.pretrained_model_name_or_path is None:
            continue
        own = {
            key: value.get(name, value.get("default")) if isinstance(value, Mapping) else value
            for key, value in kwargs.items()
        }
        if quantised and name in quantised:
            own["quantization_config"] = quantised[name]
        if not (isinstance(spec.type_hint, type) and issubclass(spec.type_hint, torch.nn.Module)):
            own.pop("use_safetensors", None)
        try:  # its `load_components` would only log what cannot be loaded
            pipeline.register_components(**{name: spec.load(**own)})
        except Exception as error:
            raise ValueError(f"its {name} cannot be loaded ({type(error).__name__}: {error})") from error
    return with_call(pipeline)


def save_pipeline(pipeline: Any, folder: str | os.PathLike, repo_id: str | None = None) -> None:
    """Saves a pipeline with its components.

    Args:
        folder (`str`): Where to.
        repo_id (`str`, *optional*): Where it will be on the Hub. The index of a modular pipeline says where each
            component is: there, or in the folder.
    """
    configs = [Path(folder, INDEX_NAME), *(Path(folder, name, CONFIG_NAME) for name in pipeline.components)]
    if not isinstance(pipeline, ModularPipeline):
        pipeline.save_pretrained(folder)
        forget_places(configs)
        return
    config = copy.deepcopy(dict(pipeline.config))
    pipeline.save_pretrained(os.fspath(folder), overwrite_modular_index=True)
    pipeline.register_to_config(**config)  # which it has made speak of the folder
    index = Path(folder, MODULAR_INDEX_NAME)
    content = json.loads(index.read_text())
    for name, entry in content.items():
        if repo_id is not None and isinstance(entry, list) and len(entry) == 3 and Path(folder, name).is_dir():
            entry[2]["pretrained_model_name_or_path"] = repo_id
    index.write_text(json.dumps(content, indent=2) + "\n")
    forget_places(configs if repo_id is None else [*configs, index])  # where it is read from here, unless it goes up


def _class_with_call(cls: Any, blocks: Any, has_guider: bool) -> Any:
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    for given in blocks.inputs:
        if given.name is not None and given.name not in {parameter.name for parameter in parameters}:
            default = inspect.Parameter.empty if given.required and given.default is None else given.default
            hint = str | list[str] if _TEXT.fullmatch(given.name) else given.type_hint
            parameters.append(
                inspect.Parameter(
                    given.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=default,
                    annotation=inspect.Parameter.empty if hint is None else hint,
                )
            )
    if has_guider:
        parameters.append(
            inspect.Parameter(GUIDANCE, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=float | None)
        )

    def whole_call(self: Any, state: Any = None, output: Any = None, **kwargs: Any) -> Any:
        pipeline = copy.copy(self)
        own_guiders(pipeline)
        _set_guidance(pipeline, kwargs)
        return cls.__call__(pipeline, state, output, **kwargs)

    def differentiable_call(self: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Of a copy of the pipeline, with guiders of its own."""
        _set_guidance(self, kwargs)
        return _run(self, kwargs)

    whole_call.__wrapped__ = differentiable_call  # type: ignore[attr-defined]
    whole_call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    whole_call.__doc__ = cls.__call__.__doc__
    return type(cls.__name__, (cls,), {"__call__": whole_call, "__module__": cls.__module__})


def guiders_of(pipeline: Any) -> dict[str, BaseGuidance]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, BaseGuidance)}


def has_guiders(pipeline: Any) -> bool:
    """Whether the guidance scale of a pipeline is that of its guiders, and no argument of its call."""
    takes_it = isinstance(pipeline, ModularPipeline) and GUIDANCE not in pipeline._blocks.input_names
    return takes_it and any(hasattr(guider, GUIDANCE) for guider in guiders_of(pipeline).values())


def own_guiders(pipeline: Any) -> list[BaseGuidance]:
    """Gives a copy of a pipeline guiders of its own: they count steps, and some remember them."""
    own = {name: copy.deepcopy(guider) for name, guider in guiders_of(pipeline).items()}
    vars(pipeline).update(own)  # past `DiffusionPipeline.__setattr__`, which writes into the config
    return list(own.values())


def forget_graph(part: Any) -> None:
    """Detaches what a guider keeps of earlier predictions (the momentum of adaptive projected guidance): a gradient is
    one of a single step."""
    for name, value in vars(part).items():
        if isinstance(value, torch.Tensor):
            if value.requires_grad:
                setattr(part, name, value.detach())
        elif hasattr(value, "__dict__") and type(value).__module__.startswith("diffusers."):
            forget_graph(value)


def _set_guidance(pipeline: Any, kwargs: dict[str, Any]) -> None:
    """Takes the guidance scale of a pipeline's guiders out of `kwargs`, and sets it."""
    if not has_guiders(pipeline):
        return
    scale = kwargs.pop(GUIDANCE, None)
    for guider in guiders_of(pipeline).values():
        if scale is not None and hasattr(guider, GUIDANCE):
            setattr(guider, GUIDANCE, scale)


def _run(pipeline: Any, kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What the blocks make of the arguments, with gradient; with `output_type="latent"` the decoders are left out."""
    kwargs.pop("return_dict", None)
    is_latent = kwargs.get("output_type") == "latent"
    blocks = _differentiable(pipeline._blocks)  # `blocks` is a copy, down to the last
    if is_latent:
        kept = {name: block for name, block in blocks.sub_blocks.items() if "decode" not in name}
        blocks.sub_blocks = type(blocks.sub_blocks)(kept)
    vars(pipeline)["_blocks"] = blocks
    pipeline.set_progress_bar_config(disable=True)
    state = PipelineState()
    for given in pipeline._blocks.inputs:
        if given.name in kwargs:
            state.set(given.name, kwargs[given.name], given.kwargs_type)
        elif given.name is not None and given.name not in state.values:
            state.set(given.name, given.default, given.kwargs_type)
    _, state = blocks(pipeline, state)
    names = ("latents", "audio_latents") if is_latent else _RESULTS
    return tuple(state.values[name] for name in names if state.values.get(name) is not None)


def _differentiable(block: Any) -> Any:
    """A copy of a tree of blocks without the `torch.no_grad` of each."""
    twin = copy.copy(block)
    cls: Any = type(block)
    twin.__class__ = _without_no_grad(cls)
    if getattr(block, "sub_blocks", None):
        twin.sub_blocks = type(block.sub_blocks)(
            {name: _differentiable(sub_block) for name, sub_block in block.sub_blocks.items()}
        )
    return twin


@functools.cache
def _without_no_grad(cls: Any) -> Any:
    whole = getattr(cls.__call__, "__wrapped__", cls.__call__)
    makes_states = re.search(r"Prepare\w*Latents", cls.__name__) is not None
    if whole is cls.__call__ and not makes_states:
        return cls

    def call(self: Any, components: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
        components, state = whole(self, components, state, *args, **kwargs)
        hand = vars(components).get(FIRST_STATE)
        for name in {output.name for output in self.intermediate_outputs} if hand is not None else ():
            if re.fullmatch(r"(\w+_)?latents", name) and isinstance(latents := state.get(name), torch.Tensor):
                state.set(name, hand(f"prepare_{name}", lambda latents=latents: latents))
        return components, state

    own = {"__call__": call if makes_states else whole, "__module__": cls.__module__}
    return type(cls.__name__, (cls,), own)
