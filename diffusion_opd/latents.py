"""The latents of given pictures, as any pipeline has them at the end of its denoising.

Between its last state and what its VAE decodes a pipeline moves elements (unpacks, unpatchifies) and scales them (by a
factor and a shift, by the means and stds of channels), each in a way of its own. So the way is found by going it: the
pipeline's own `__call__` runs with an empty denoiser to last states that we choose, and stops where it would decode.

This file knows policies and VAEs, and no loss, data or trainer.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor, nn

from .inputs import Inputs
from .policy import Policy, Walk
from .scheduler_proxy import SchedulerStep, Step

_BASE = 4096  # digits of an element's index, which float32 holds exactly beside a scale and a shift


class _Decodes(Exception):
    """What a pipeline would have decoded."""

    def __init__(self, latents: Any):
        self.latents = latents


class _Seen:
    """A VAE that does not decode, and whose attributes are its own; it takes what it is given in float32."""

    def __init__(self, vae: Any):
        self._vae = vae

    # Pipelines ask for it
    __class__ = property(lambda self: type(self._vae))
    dtype = torch.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)

    def to(self, *args: Any, **kwargs: Any) -> "_Seen":
        return self  # SDXL's is to be float32 where it decodes

    def decode(self, latents: Any = None, *args: Any, **kwargs: Any) -> NoReturn:
        raise _Decodes(kwargs.get("z", latents))


class _Led(Walk):
    """A walk whose every state is the same, in float32."""

    state: Tensor

    def step(self, step: Step, scheduler_step: SchedulerStep) -> Tensor:
        super().step(step, scheduler_step)
        return self.state.reshape(step.sample.shape).to(step.sample.device, copy=True)


class Latents:
    """
    Makes latents of pictures.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]): Left as it is.
        sources (`Tensor`): Of each element of what is decoded, which element of the last state it is.
        scale, shift (`Tensor`): It is `scale x + shift`; of the shape of what is decoded for one sample.
        state_shape (`torch.Size`): Of the last state of one sample.
    """

    def __init__(
        self, pipeline: DiffusionPipeline, sources: Tensor, scale: Tensor, shift: Tensor, state_shape: torch.Size
    ):
        self._pipeline, self._sources, self._scale, self._shift = pipeline, sources, scale, shift
        self.state_shape = state_shape
        self._stride: int | None = None

    @torch.no_grad()
    def encode(self, pictures: Sequence[Image.Image]) -> Tensor:
        """The clean latents of pictures, which are scaled and cropped to the size that the pipeline makes.

        Args:
            pictures (`Sequence[PIL.Image]`): In RGB.

        Returns:
            `Tensor`: `[len(pictures), *state_shape]`, float32, the mode of what the VAE says.

        Raises:
            ValueError: if the VAE has no such latents for a single picture (of a video of several frames).
        """
        vae: Any = _vae_of(self._pipeline)[1]
        if self._stride is None:
            self._stride = self._measured(vae)
        height, width = (int(side) * self._stride for side in self._scale.shape[-2:])
        pixels = VaeImageProcessor(resample="lanczos").preprocess(list(pictures), height, width, resize_mode="crop")
        latents = self._encoded(vae, pixels)
        if latents.shape[1:] != self._scale.shape:
            raise ValueError(
                f"a picture has latents of shape {tuple(latents.shape[1:])}, and {type(self._pipeline).__name__} makes "
                f"{tuple(self._scale.shape)}; pictures are for pipelines that make one each."
            )
        states = torch.empty(len(pictures), self._sources.numel(), device=latents.device)
        states[:, self._sources] = ((latents.float() - self._shift) / self._scale).flatten(1)
        return states.view(len(pictures), *self.state_shape)

    def _measured(self, vae: Any) -> int:
        """Pixels of an element, along a side."""
        side = 128
        return side // self._encoded(vae, torch.zeros(1, 3, side, side)).shape[-1]

    def _encoded(self, vae: Any, pixels: Tensor) -> Tensor:
        if self._scale.ndim == 4:  # of one frame
            pixels = pixels.unsqueeze(2)
        device, dtype = self._scale.device, vae.dtype
        # Such a VAE overflows in half precision, and its pipeline casts it as it decodes
        upcast = dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
        if upcast:
            vae.to(dtype=torch.float32)
        try:
            output = vae.encode(pixels.to(device, vae.dtype))
        finally:
            if upcast:
                vae.to(dtype=dtype)
        if hasattr(output, "latent_dist"):
            encoded: Tensor = output.latent_dist.mode()
            return encoded
        deterministic: Tensor = output.latents if hasattr(output, "latents") else output.latent
        return deterministic


@torch.no_grad()
def find_latents(policy: Policy, inputs: Inputs) -> Latents:
    """How a pipeline's last state is what its VAE decodes.

    Args:
        policy ([`Policy`]): The pipeline, with its arguments.
        inputs (`Mapping[str, Sequence]`): Of one sample.

    Returns:
        [`Latents`]: of the pipeline, for states of the size that these arguments make.

    Raises:
        ValueError: if it has no VAE that encodes, makes more than one state, or does more to it than moving and scaling
            its elements.
    """
    name = policy.name
    part, vae = _vae_of(policy.pipeline)
    twin = copy.copy(policy.pipeline)
    vars(twin)[part] = _Seen(vae)
    own = Policy(twin, policy.num_inference_steps, policy.call_kwargs, policy.cache, policy.adapter)
    own.has_worked, own.takes_it_bare = True, policy.takes_it_bare
    shape = _shape_of_state(policy, inputs)
    count = shape.numel()

    def seen(state: Tensor) -> Tensor:
        walk = _Led(own, inputs, [torch.Generator().manual_seed(0)], _empty(own), _stays, "pil", None, None)
        walk.state = state
        try:
            walk.run()
        except _Decodes as stopped:
            found: Tensor = stopped.latents
            return found.float()
        raise ValueError(f"the latents of {name} are not known: it makes its pictures without its {part}.")

    shift = seen(torch.zeros(count))
    scale = seen(torch.ones(count)) - shift
    index, sources = torch.arange(count), torch.zeros_like(shift)
    for place in (1, _BASE):
        digits = (seen((index // place % _BASE).float()) - shift) / scale
        sources += place * digits.nan_to_num(-1.0).round()
    chosen = sources.long().flatten()
    if shift.numel() != count or not torch.equal(chosen.sort().values.cpu(), index):
        raise ValueError(
            f"the latents of {name} are not known: it hands {tuple(shift.shape[1:])} to its {part} to decode, which "
            f"are not the {tuple(shape)} elements of its last state, each moved and scaled."
        )
    probe = torch.randn(count, generator=torch.Generator().manual_seed(0))
    expected = scale * probe.to(shift.device)[chosen].view_as(scale) + shift
    if not torch.allclose(seen(probe), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())):
        raise ValueError(f"the latents of {name} are not known: it does more to its last state than scaling it.")
    return Latents(policy.pipeline, chosen, scale[0], shift[0], shape)


def _vae_of(pipeline: DiffusionPipeline) -> tuple[str, Any]:
    found: Mapping[str, Any] = {
        name: part
        for name, part in pipeline.components.items()
        if isinstance(part, nn.Module) and callable(getattr(part, "decode", None)) and hasattr(part, "encode")
    }
    if len(found) != 1:
        raise ValueError(
            f"{type(pipeline).__name__} needs one VAE that encodes pictures, and has {sorted(found) or 'none'}."
        )
    return next(iter(found.items()))


def _shape_of_state(policy: Policy, inputs: Inputs) -> torch.Size:
    with policy.walk(inputs, [torch.Generator().manual_seed(0)], _stays) as dry:
        plan = dry.plan()
    if any(len(visit.steps) > 1 or visit.chunk for visit in plan):
        raise ValueError(
            f"{policy.name} makes several streams, or chunk after chunk, and so no latents of one picture."
        )
    return plan[-1].steps[0].sample.shape[1:]


def _empty(policy: Policy) -> Callable[..., Any]:
    """A denoiser that computes nothing but at its first call."""

    def denoiser(*args: Any, **kwargs: Any) -> Any:
        output = policy.empty_output(args[len(policy.denoisers) > 1 :], kwargs)  # of several, past the name
        return policy.denoiser(*args, **kwargs) if output is None else output

    return denoiser


def _stays(step: Step) -> Tensor:
    return step.sample
