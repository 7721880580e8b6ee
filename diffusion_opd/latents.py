"""The final latents of given pictures: where a pipeline's own states would end to show them.

From its last state to what its VAE decodes a pipeline permutes the numbers, scales and shifts each (it unpacks,
unpatchifies, and undoes factors, means and deviations, or a batch norm). So that map is found by asking: the pipeline's
own `__call__` runs, with the empty denoiser, to last states that are chosen here, and is stopped where it decodes. No
line knows a model family.

This file knows policies, and no loss or trainer.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from .decoding import Watched, decoders_of
from .errors import brief, reason
from .inputs import Inputs, read_picture
from .policy import Policy, Walk
from .scheduler_proxy import SchedulerStep, Step

_BASE = 8  # of the digits that say where a number comes from: so few that any precision holds them, scaled and shifted
_MODES = {3: "RGB", 4: "RGBA"}  # by channels
_ROUNDED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Latents:
    """
    How a pipeline's last state becomes what its VAE decodes, and back: element `i` of what is decoded is
    `scale[i] * state[source[i]] + offset[i]`. Made by [`find_latents`].

    Attributes:
        name (`str`): Of the pipeline's class.
        vae (`nn.Module`): The pipeline's own.
        state_shape, decoder_shape (`tuple[int, ...]`): Of one sample's last state, without the batch's dimension, and
            of what is decoded for it, whole.
        picture_shape (`tuple[int, ...]`): Of what the VAE makes of that.
        source, scale, offset (`Tensor`): For each element of what is decoded.
    """

    name: str
    vae: Any
    state_shape: tuple[int, ...]
    decoder_shape: tuple[int, ...]
    picture_shape: tuple[int, ...]
    source: Tensor
    scale: Tensor
    offset: Tensor

    @property
    def frames(self) -> int:
        """How many pictures a sample is."""
        return self.picture_shape[2] if len(self.picture_shape) == 5 else self.picture_shape[0]

    def to_decoder(self, state: Tensor) -> Tensor:
        """What the VAE is given for the last state of one sample, `[1, *state_shape]`, in float32."""
        return (self.scale * state.float().flatten()[self.source] + self.offset).view(self.decoder_shape)

    def from_decoder(self, decoder_input: Tensor) -> Tensor:
        """The last state for which the VAE is given that."""
        numbers = (decoder_input.to(self.offset).flatten() - self.offset) / self.scale
        return torch.empty_like(numbers).scatter_(0, self.source, numbers).view(1, *self.state_shape)

    @torch.no_grad()
    def encode(self, pictures: Sequence[Any]) -> Tensor:
        """
        The final latents of pictures: `Step.sample` at noise level 0. The mode of what the VAE encodes, in its own
        precision, one sample after another, so that a picture has the same latents in any batch.

        Args:
            pictures (`Sequence`):
                One a sample: a PIL image, a path, or what `datasets.Image(decode=False)` gives; of a video the list of
                its frames. Each is scaled to cover the size that the pipeline makes, and cropped around its middle.

        Returns:
            `Tensor`: `[len(pictures), *state_shape]`, float32, without gradient.

        Raises:
            ValueError: if something is no picture, or a video of another number of frames.
        """
        return torch.cat([self.from_decoder(self._encoded(picture, index)) for index, picture in enumerate(pictures)])

    def _encoded(self, picture: Any, index: int) -> Tensor:
        try:
            read = read_picture(picture)
        except ValueError as error:
            raise ValueError(f"picture {index} {error}.") from error
        frames = read if isinstance(read, list) else [read]
        if not all(isinstance(frame, Image.Image) for frame in frames):
            raise ValueError(f"picture {index} is no picture, got {brief(picture)}.")
        if len(frames) != self.frames:
            raise ValueError(
                f"{self.name} makes {self.frames} frame(s) a sample as it is called, picture {index} has {len(frames)}."
            )
        height, width = self.picture_shape[-2:]
        processor = VaeImageProcessor(vae_scale_factor=1)  # the size is what the VAE decodes, whatever its factor
        covered = [processor.resize(frame, height, width, resize_mode="crop") for frame in frames]
        pixels = processor.preprocess([frame.convert(_MODES[self.picture_shape[1]]) for frame in covered])
        if len(self.picture_shape) == 5:
            pixels = pixels.transpose(0, 1)[None]
        with _own_precision(self.vae) as (device, dtype):
            # Of another layout in memory it may be rounded otherwise
            posterior = self.vae.encode(pixels.to(device, dtype).contiguous(), return_dict=False)[0]
        return posterior if isinstance(posterior, Tensor) else posterior.mode()


def find_latents(policy: Policy, inputs: Inputs) -> Latents:
    """
    Asks a pipeline how its last state becomes what it decodes. It denoises nothing but once for each kind of call that
    the policy has not seen yet, encodes its inputs as often as it is asked, and decodes once, to learn the size of its
    pictures.

    Args:
        policy ([`Policy`]): Of the pipeline, called as in the run.
        inputs (`Mapping[str, Sequence]`): Of one sample.

    Raises:
        ValueError: if the map is no permutation with a scale and an offset for each element, or there is no VAE that
            encodes pictures; the sentence says what.
    """
    count = len(next(iter(inputs.values()), ()))
    if count != 1:
        raise ValueError(f"the latents of {policy.name} are found with one sample, got {count}.")
    with torch.no_grad():
        return _found(policy, inputs)


def _found(policy: Policy, inputs: Inputs) -> Latents:
    with policy.walk(inputs, [torch.Generator().manual_seed(0)], _stay) as walk:
        steps = [step for visit in walk.plan() for step in visit.steps]
    if len({(step.stream, step.chunk) for step in steps}) != 1:
        _refuse(policy, "it makes several streams, or chunk after chunk")
    state = steps[-1].sample
    if state.shape[0] != 1:
        _refuse(policy, f"its state for one sample is of shape {tuple(state.shape)}")

    def ask(values: Tensor, seed: int = 0) -> "_Asked":
        asked = _ask(policy, inputs, values.view(state.shape), seed)
        if asked.decoder_input.numel() != state.numel():
            _refuse(policy, f"it decodes {asked.decoder_input.numel()} numbers of the {state.numel()} in its state")
        return asked

    def given(values: Tensor) -> Tensor:
        return ask(values).decoder_input.flatten().float()

    numbers = torch.arange(state.numel(), device=state.device)
    offset = given(torch.zeros(numbers.shape, device=state.device))
    scale = (given(torch.full(numbers.shape, float(_BASE), device=state.device)) - offset) / _BASE
    source, place = torch.zeros_like(numbers), 1
    while place < state.numel():
        digits = (given((numbers // place % _BASE).float()) - offset) / scale
        if not ((digits - digits.round()).abs() < 0.25).all():  # NaN where nothing of the state is decoded
            _refuse(policy, "some numbers are mixed with others, or left out")
        source += digits.round().long() * place
        place *= _BASE
    if not torch.equal(source.sort().values, numbers):
        _refuse(policy, "some numbers of its state are decoded twice, or not at all")

    # Larger than usual, and at another seed: of what is clipped, or drawn, there is no inverse
    generator = torch.Generator().manual_seed(1)
    last = 4 * torch.randn(state.shape, generator=generator).to(state.device)
    asked = ask(last, seed=1)
    if not callable(getattr(asked.part, "encode", None)):
        _refuse(policy, f"its {type(asked.part).__name__} does not encode")
    shape = tuple(asked.decoder_input.shape)
    with _told(policy, "its VAE fails to decode"):
        pictures = asked.decoded()
    found = Latents(policy.name, asked.part, tuple(state.shape[1:]), shape, pictures, source, scale, offset)
    gap = (found.to_decoder(last).flatten() - asked.decoder_input.float().flatten()).abs()
    size = (scale * last.flatten()[source]).abs() + offset.abs()
    if not (gap <= 8 * _rounding(policy) * size).all():
        _refuse(policy, "more is done to its last state than to scale and shift each number, or noise is drawn")
    _check_encoder(policy, found)
    return found


def _check_encoder(policy: Policy, found: Latents) -> None:
    if len(found.picture_shape) not in (4, 5) or found.picture_shape[1] not in _MODES:
        _refuse(policy, f"it decodes {found.picture_shape}, which is no picture")
    height, width = found.picture_shape[-2:]
    with _told(policy, "its VAE fails to encode"):
        encoded = found._encoded([Image.new("RGB", (width, height), "gray")] * found.frames, 0)
    if encoded.shape != found.decoder_shape:
        _refuse(
            policy,
            f"its {type(found.vae).__name__} encodes a picture of the size that it decodes to "
            f"{tuple(encoded.shape)}, and decodes {found.decoder_shape}",
        )
    if not encoded.isfinite().all():
        _refuse(policy, f"its {type(found.vae).__name__} encodes NaN or infinity; {encoded.dtype} is too narrow for it")


def _refuse(policy: Policy, why: str) -> NoReturn:
    raise ValueError(f"{policy.name} gives no latents of pictures: {why}.")


@contextlib.contextmanager
def _told(policy: Policy, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ValueError(f"{policy.name} gives no latents of pictures: {what}: {reason(error)}") from error


def _stay(step: Step) -> Tensor:
    return step.sample


def _rounding(policy: Policy) -> float:
    """Of the coarsest precision among a pipeline's parts, in which it may compute what it decodes."""
    parts = [part for part in policy.pipeline.components.values() if isinstance(part, nn.Module)]
    dtypes = {parameter.dtype for part in parts for parameter in part.parameters()}
    return max(torch.finfo(dtype).eps for dtype in dtypes.intersection(_ROUNDED))


@contextlib.contextmanager
def _own_precision(vae: Any) -> Iterator[tuple[torch.device, torch.dtype]]:
    """Where and in which precision a VAE computes, also inside a party's mixed precision. One that overflows in float16
    (`force_upcast`) is of float32 meanwhile, as diffusers' pipelines have it."""
    is_narrow = vae.dtype == torch.float16 and vae.config.get("force_upcast", False)
    try:
        if is_narrow:
            vae.to(dtype=torch.float32)
        with torch.autocast(vae.device.type, enabled=False):
            yield vae.device, vae.dtype
    finally:
        if is_narrow:
            vae.to(dtype=torch.float16)


# Asking


@dataclass(frozen=True)
class _Asked:
    """What a part of a pipeline was asked to decode."""

    part: Any
    arguments: tuple[tuple[Any, ...], dict[str, Any]]

    @property
    def decoder_input(self) -> Tensor:
        return next(x for x in tree_flatten(self.arguments)[0] if torch.is_tensor(x))

    def decoded(self) -> tuple[int, ...]:
        """The shape of what it makes of that."""
        with _own_precision(self.part) as (_, dtype):
            args, kwargs = tree_map(
                lambda x: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x, self.arguments
            )
            output = self.part.decode(*args, **kwargs)
        return tuple(next(x for x in tree_flatten(output)[0] if torch.is_tensor(x)).shape)


class _Decodes(BaseException):
    """Stops a pipeline where it decodes; what it does about an `Exception` is not meant."""

    def __init__(self, asked: _Asked):
        self.asked = asked


class _Ending(Walk):
    """A walk by the empty denoiser to a given last state, which stops at what is decoded. That state has a precision of
    its own, which the pipeline's tail takes over as far as it asks for that of the state or of the VAE: scales and
    offsets are then as exact as that."""

    def __init__(self, policy: Policy, inputs: Inputs, last: Tensor, seed: int):
        generators = [torch.Generator().manual_seed(seed)]
        super().__init__(policy, inputs, generators, None, _stay, output_type="pil", probe=None, decoded=None)
        self.last, self.is_there = last, False

    def step(self, step: Step, scheduler_step: SchedulerStep) -> Tensor:
        next_sample = super().step(step, scheduler_step)
        if step.index + 2 < len(step.schedule.levels):
            return next_sample
        self.is_there = True
        return self.last.clone()

    def decoders(self) -> dict[str, Any]:
        return {name: _Decoder(part, self) for name, part in decoders_of(self.policy.pipeline).items()}


class _Decoder(Watched):
    """A part that is not asked to decode, nor to change its precision for that: stopped, a pipeline would not change it
    back."""

    def __init__(self, module: Any, ending: _Ending):
        super().__init__(module, lambda decoded: None)
        self._ending = ending

    @property
    def dtype(self) -> torch.dtype:
        own: torch.dtype = self._module.dtype
        return self._ending.last.dtype if self._ending.is_there else own

    def to(self, *args: Any, **kwargs: Any) -> Any:
        if not self._ending.is_there:  # to encode
            self._module.to(*args, **kwargs)
        return self

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        raise _Decodes(_Asked(self._module, (args, kwargs)))


def _ask(policy: Policy, inputs: Inputs, last: Tensor, seed: int) -> _Asked:
    try:
        with _told(policy, "it fails before it decodes"), _Ending(policy, inputs, last, seed) as ending:
            ending.plan()
    except _Decodes as stop:
        return stop.asked
    _refuse(policy, "it makes what it returns without a part that decodes")
