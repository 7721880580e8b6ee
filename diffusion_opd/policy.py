"""A diffusers pipeline as a policy: the student walks, its teachers follow.

No line here knows a model family: the pipeline's own `__call__` runs, paused between denoising steps (see paused.py),
with a proxy in the place of its scheduler (see scheduler_proxy.py). A walk goes where its own prediction and noise
lead, a follower where a walk has gone, through its own `__call__`, so that whatever a pipeline keeps between steps is
right.

Pauses lie before a forward pass of the denoiser: before the first one, then before the first one after each step; and
at the end. So who walks chooses the gradient mode of each forward pass, and meets the predictions of one step, all
streams of it, before the next one begins.

This file knows no trainer, no loss and no data.
"""

import contextlib
import copy
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, NoReturn

import torch
from accelerate.utils import convert_to_fp32
from diffusers import DiffusionPipeline, ModularPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map
from transformers import PreTrainedModel

from .decoding import CHECKER, takes_no_checker, watched_decoders
from .denoisers import denoiser_of, denoisers_of
from .encode_cache import EncodeCache, encoders_of, fresh_containers
from .errors import brief, reason
from .inputs import PICTURE, Inputs, as_arguments, signature
from .modular import FIRST_STATE, forget_graph, own_guiders
from .paused import Paused
from .scheduler_proxy import SchedulerStep, Step, Times, dissolve, own_scheduler, proxy
from .transitions import Schedule

Move = Callable[[Step], Tensor]  # the next state

BACKBONE = ""  # as the name of an adapter: none at all
DEVICE = "_settled_device"  # an attribute of a pipeline that is called


@dataclass(frozen=True)
class Visit:
    """What a pipeline steps between two pauses: one stream, or several (the video and its audio), whose predictions
    may share a graph.

    Attributes:
        index (`int`): How many visits of the walk came before.
        steps (`tuple[Step, ...]`): One a stream.
        denoisers (`frozenset[str]`): Which of the pipeline's were called for it.
    """

    index: int
    steps: tuple[Step, ...]
    denoisers: frozenset[str] = frozenset()

    @property
    def chunk(self) -> int:
        """Which part of what is made part after part; 0 for a pipeline that makes all at once."""
        return self.steps[0].chunk

    def of(self, rows: slice) -> "Visit":
        """Some of its samples."""
        return replace(self, steps=tuple(step.of(rows) for step in self.steps))

    def detach(self) -> "Visit":
        """Without the graph of its predictions."""
        return replace(self, steps=tuple(replace(step, prediction=step.prediction.detach()) for step in self.steps))


class Routed:
    """A denoiser whose calls go to a wrapper (DDP, DeepSpeed, a function) and whose attributes are its own."""

    def __init__(self, module: nn.Module, wrapper: Callable[..., Any]):
        self._module, self._wrapper = module, wrapper

    # Pipelines ask for it (ControlNet-XS)
    __class__ = property(lambda self: type(self._module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapper(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def tuner_layers(denoiser: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]


@contextlib.contextmanager
def active_adapter(layers: Sequence[BaseTunerLayer], name: str | tuple[str, ...]) -> Iterator[None]:
    """Another adapter, several at once, or the bare [`BACKBONE`], for the duration. PEFT's `set_adapter` would also set
    `requires_grad`, which drops gradients and raises under sharding, so what it sets last is set alone."""
    # Past `nn.Module.__setattr__`, which looks for parameters first: hundreds of layers, twice at each pause
    settings = [vars(layer) for layer in layers]
    before = [layer._active_adapter for layer in layers]
    for own in settings:
        own["_active_adapter"] = list(name) if isinstance(name, tuple) else [] if name == BACKBONE else [name]
    try:
        yield
    finally:
        for own, adapter in zip(settings, before, strict=True):
            own["_active_adapter"] = adapter


class Policy:
    """A pipeline that walks, and that follows.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]): Left as it is.
        num_inference_steps (`int`): Denoising steps of a whole walk.
        call_kwargs (`dict`, *optional*): For the pipeline's `__call__`: guidance, size, negative prompt ...
        cache ([`EncodeCache`], *optional*): Shared by the parties of one batch. `None`: its own.
        adapter (`str` or `tuple[str, ...]`, *optional*): PEFT adapter of the denoiser that this policy is, the sum of
            several, or [`BACKBONE`]; by default whatever is active.
        autocast (`Callable`, *optional*): A context manager for each call of the denoiser, and for nothing else of the
            pipeline: a VAE may ask for float32. Under mixed precision what the denoiser predicts is float32.
        timing (`Callable`, *optional*): A context manager for the time that the pipeline runs between two pauses.
        device (`torch.device`, *optional*): Where it runs, though parts of it may wait elsewhere as it begins. `None`:
            where it is.

    Raises:
        ValueError: if the pipeline lacks a seam, or `call_kwargs` holds a key that its `__call__` does not take; and at
            the first run, if that `__call__` fails.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        num_inference_steps: int,
        call_kwargs: dict[str, Any] | None = None,
        cache: EncodeCache | None = None,
        adapter: str | tuple[str, ...] | None = None,
        autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
        timing: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
        device: torch.device | None = None,
    ):
        self.device = device
        self.denoisers = denoisers_of(pipeline)
        check_seams(pipeline)
        self.call_kwargs = dict(call_kwargs or {})
        accepted = inspect.signature(type(pipeline).__call__).parameters
        if unknown := sorted(self.call_kwargs.keys() - accepted.keys()):
            raise ValueError(
                f"{type(pipeline).__name__} takes no argument {unknown}; it takes {sorted(accepted.keys() - {'self'})}."
            )
        self.num_inference_steps, self.adapter = num_inference_steps, adapter
        self.cache = cache or EncodeCache()
        self.pipeline, self.timing = pipeline, timing
        self._autocast = autocast
        self.denoiser = denoiser_of(pipeline)
        named = adapter if isinstance(adapter, tuple) else (adapter,) if adapter else ()
        if absent := [name for name in named if name not in getattr(self.denoiser, "peft_config", {})]:
            known = sorted(getattr(self.denoiser, "peft_config", {}))
            raise ValueError(f"the {self.denoiser_words} has no adapter {absent[0]!r}; it has {known}.")
        # LoRAs may adapt encoders too, which others share
        encoders = [part for part in pipeline.components.values() if _has_adapter(part, named)]
        adapted = [self.denoiser, *encoders] if adapter is not None else []
        self._layers = [layer for part in adapted for layer in tuner_layers(part)]
        self._attention = [module for module in self.denoiser.modules() if hasattr(module, "set_processor")]
        self._encoders = encoders_of(pipeline), named if encoders else ()
        parts: dict[str, Any] = {"scheduler": pipeline.scheduler} | pipeline.components  # of which some lack it
        self._schedulers = {name: own_scheduler(part) for name, part in parts.items() if _is_scheduler(part)}
        self._begins: dict[tuple[int, int], int] = {}
        self._read: dict[Any, Schedule] = {}  # noise levels, by what they were made of
        self._outputs: dict[Any, Any] = {}  # for the empty denoiser: what a real one answers, as meta tensors
        self.has_worked = False
        self.takes_it_bare = False  # a single sample: its texts and its generator, and no lists of one

    @property
    def name(self) -> str:
        return type(self.pipeline).__name__

    @property
    def denoiser_words(self) -> str:
        return " or ".join(self.denoisers)

    def walk(
        self,
        inputs: Inputs,
        generators: list[torch.Generator],
        move: Move,
        denoiser: Callable[..., Any] | None = None,
        output_type: str = "latent",
        probe: Callable[[Step, SchedulerStep], None] | None = None,
        decoded: Callable[[Tensor], None] | None = None,
    ) -> "Walk":
        """The pipeline's own `__call__`, visit by visit.

        Args:
            inputs (`Mapping[str, Sequence]`): Arguments of `__call__` with one value a sample: `{"prompt": [...]}`.
            generators (`list[torch.Generator]`): One a sample, for what the pipeline draws; `move` has its own.
            move (`Callable[[Step], Tensor]`): The next state of a stream, of the shape of `step.sample`. Called without
                gradient, once a step.
            denoiser (`Callable`, *optional*): A wrapper around the denoiser (DDP, DeepSpeed) that its calls go through;
                of several it is given the name of the one that is called before its arguments.
            output_type (`str`, *optional*): `"latent"`, or `"pil"` to decode the final latents; without the pipeline's
                safety checker.
            probe (`Callable`, *optional*): Called at each step before `move`, with what the scheduler's own `step`
                would answer as a function.
            decoded (`Callable`, *optional*): Called with what is decoded, before it is pixels.
        """
        self._check_inputs(inputs, generators)
        return Walk(self, inputs, generators, denoiser, move, output_type, probe, decoded)

    def follow(
        self,
        walk: "Walk | None" = None,
        inputs: Inputs | None = None,
        generators: list[torch.Generator] | None = None,
        denoiser: Callable[..., Any] | None = None,
        times: Mapping[tuple[int, int], Times] | None = None,
        rows: range | None = None,
    ) -> "Follower":
        """Asks this policy at the states of visits: `follow(visit)`.

        Args:
            walk ([`Walk`], *optional*): That it follows: begins at its first state, runs at its timesteps, and draws
                what it draws. `None`: it replays visits of its own class, from `inputs` and `generators`.
            inputs (*optional*): As for [`walk`]. `None`: those of the walk.
            generators (*optional*): As for [`walk`], in the state in which the walk began. `None`: those of the walk.
            denoiser (*optional*): As for [`walk`].
            times (`Mapping`, *optional*): Without a walk, at whose timesteps it runs: `all_times` of one. `None`: its
                own.
            rows (`range`, *optional*): Of a walk, which samples it follows; `inputs` are theirs. `None`: all.
        """
        if walk is None and (inputs is None or generators is None):
            raise ValueError("a follower needs a walk, or the inputs and generators of one.")
        if inputs is not None:
            its = walk.generators if generators is None and walk is not None else generators or []
            self._check_inputs(inputs, its if rows is None else its[rows.start : rows.stop])
        return Follower(self, inputs, generators, denoiser, walk, times, rows)

    def _check_inputs(self, inputs: Inputs, generators: Sequence[torch.Generator]) -> None:
        accepted = signature(type(self.pipeline).__call__).parameters
        if not isinstance(inputs, Mapping) or (unknown := sorted(inputs.keys() - accepted.keys())):
            given = unknown if isinstance(inputs, Mapping) else type(inputs).__name__
            raise ValueError(
                f"`inputs` are arguments of {self.name}, each with one value a sample, e.g. {{'prompt': [...]}}; got "
                f"{given}."
            )
        if not isinstance(generators, (list, tuple)) or not generators:
            raise ValueError(f"`generators` is a list, one a sample, got {brief(generators)}.")
        for name, values in inputs.items():
            if isinstance(values, str) or len(values) != len(generators):
                raise ValueError(
                    f"`inputs` needs a list with one {name!r} a sample, and `generators` one for each; got "
                    f"{brief(values)} for {len(generators)} generators."
                )

    # What walks and followers ask

    def run(self, call: "_Call", denoiser: Callable[..., Any] | None) -> Any:
        """The pipeline's `__call__` for a call; called within it."""
        pipeline = copy.copy(self.pipeline)
        pipeline.__class__ = _settled(_class(pipeline))
        pipeline.set_progress_bar_config(disable=True)
        # Past `DiffusionPipeline.__setattr__`, which writes into the config
        own = vars(pipeline)
        if self.device is not None:
            own[DEVICE] = self.device
        for name, scheduler in self._schedulers.items():
            own[name] = proxy(scheduler, call)
        call.guiders = own_guiders(pipeline)
        if callable(getattr(pipeline, "encode_prompt", None)):
            own["encode_prompt"] = functools.partial(self.cache.encode, pipeline, self._encoders)
        own[FIRST_STATE] = call.first_state
        for name in _state_makers(_class(self.pipeline)):
            own[name] = functools.partial(call.first_state, name, getattr(pipeline, name))
        if takes_no_checker(pipeline):
            own[CHECKER] = None
        own.update(call.decoders())
        through = self.denoiser if denoiser is None else denoiser
        for name, module in self.denoisers.items():
            named = functools.partial(through, name) if len(self.denoisers) > 1 else through
            denoise = functools.partial(self._denoise, named)
            own[name] = Routed(module, functools.partial(call.forward, name, denoise))
        try:
            output = self._call(pipeline, call)
        except Exception as error:
            # Not the pipeline's, or not for how it is called
            if call.is_moving or self.has_worked or isinstance(error, Elsewhere):
                raise
            hint = self._hint(error, call.inputs)
            raise ValueError(f"{self.name} fails in its own `__call__`: {reason(error)}{hint}{self._given}") from error
        finally:
            # Its own functions refer to it: a cycle that would hold the graph until the next garbage collection
            own.clear()
        self.has_worked = True
        return output

    def _call(self, pipeline: DiffusionPipeline, call: "_Call") -> Any:
        method: Any = type(self.pipeline).__call__
        # Of some it is another argument (HeliosPyramid's, one a stage), in `call_kwargs`
        takes_steps = "num_inference_steps" in signature(method).parameters
        steps = {"num_inference_steps": self.num_inference_steps} if takes_steps else {}

        def called() -> Any:
            return method.__wrapped__(
                pipeline,
                **as_arguments(type(self.pipeline), call.inputs, self.takes_it_bare),
                **steps,
                generator=call.generators[0] if self.takes_it_bare else call.generators,
                output_type=call.output_type,
                return_dict=False,
                **fresh_containers(self.call_kwargs),
            )[0]

        try:
            return called()
        except (TypeError, ValueError):
            if self.has_worked or call.has_begun or len(call.generators) > 1:
                raise
            self.takes_it_bare = True
            try:
                return called()
            except Exception:
                self.takes_it_bare = call.has_begun
                if call.has_begun:
                    raise
            raise

    def _denoise(self, denoiser: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._autocast():
            output = denoiser(*args, **kwargs)
            mixed = torch.is_autocast_enabled(next(self.denoiser.parameters()).device.type)
        # As accelerate does it: guidance, kernel and loss are differences of nearly equal numbers
        return convert_to_fp32(output) if mixed else output

    def empty_output(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Zeros in the form of what the denoiser answers to such arguments; `None` if it has not been seen yet."""
        if (output := self._outputs.get(_kind(args, kwargs))) is None:
            return None
        return tree_map(
            lambda x: torch.zeros(x.shape, dtype=x.dtype, device=self._outputs_device) if torch.is_tensor(x) else x,
            output,
        )

    def remember_output(self, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        kind = _kind(args, kwargs)
        plain = (
            Tensor,
            str,
            int,
            float,
            type(None),
        )  # anything else may hold what a pipeline keeps, as a KV cache does
        if kind not in self._outputs and all(isinstance(x, plain) for x in tree_flatten(output)[0]):
            self._outputs_device = next(x.device for x in tree_flatten(output)[0] if torch.is_tensor(x))
            self._outputs[kind] = tree_map(lambda x: x.detach().to("meta") if torch.is_tensor(x) else x, output)

    def paused(self, run: Callable[[], Any], seed: int) -> Paused["Visit"]:
        device = self.device or next(self.denoiser.parameters()).device
        return Paused(run, self._attention, device, seed)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Its adapter, and its time."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.timing())
            if self.adapter is not None:
                stack.enter_context(active_adapter(self._layers, self.adapter))
            yield

    def begin(self, number: int, chunk: int, find: Callable[[], int]) -> int:
        if (number, chunk) not in self._begins:
            self._begins[number, chunk] = find()
        return self._begins[number, chunk]

    def schedule(self, key: Hashable, read: Callable[[], Schedule]) -> Schedule:
        if key not in self._read:
            self._read[key] = read()
        return self._read[key]

    @property
    def _given(self) -> str:
        """What of the configuration a pipeline that fails was called with."""
        given = [f"{name}={textwrap.shorten(repr(value), 50)}" for name, value in self.call_kwargs.items()]
        return f" (called with {', '.join(given)})" if given else ""

    def _hint(self, error: Exception, inputs: Inputs) -> str:
        """What a pipeline that fails may need: encoders that it was loaded without, or arguments without a value, its
        required ones or else its pictures."""
        encoders = [name for name in self.pipeline.components if name.startswith(("text_encoder", "tokenizer"))]
        absent = [name for name in encoders if getattr(self.pipeline, name) is None]
        if absent and "NoneType" in str(error):
            return f"; it is without its {absent}: load it with them, or give it an `encode_prompt` that does without"
        parameters = signature(type(self.pipeline).__call__).parameters.values()
        required = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        pictures = [p.name for p in parameters if p.default is None and PICTURE.search(p.name)]
        needed = [name for name in required if name not in ("self", "prompt")] or pictures
        if not (lacking := [name for name in needed if name not in {*self.call_kwargs, *inputs}]):
            return ""
        return (
            f"; it may need {lacking}: a column of that name, or one for all samples, "
            f"`call_kwargs={{{lacking[0]!r}: ...}}`"
        )


class _Call:
    """A `__call__` of a pipeline that is paused before forward passes of its denoiser: what [`Walk`] and [`Follower`]
    share."""

    output_type = "latent"
    inputs: Inputs
    generators: list[torch.Generator]
    _seed: int  # of the global generators

    def __init__(self, policy: Policy, denoiser: Callable[..., Any] | None):
        self.policy, self._denoiser = policy, denoiser
        self._paused: Paused[Visit] | None = None
        self.proxies: list[Any] = []
        self._streams: dict[int, int] = {}
        self._steps: list[Step] = []  # since the last pause
        self._called: set[str] = set()  # denoisers, since then
        self.place = 0  # the index of the next visit
        self.output: Any = None  # of the pipeline, at its end
        self.is_moving = False  # what others were asked within a step may raise
        self._computes, self._pauses, self.has_begun = True, True, False
        self.guiders: list[Any] = []

    # Asked by the pipeline

    def stream(self, number: int) -> int:
        return self._streams.setdefault(number, len(self._streams))

    def begin(self, number: int, chunk: int, find: Callable[[], int]) -> int:
        return self.policy.begin(number, chunk, find)

    def schedule(self, key: Hashable, read: Callable[[], Schedule]) -> Schedule:
        return self.policy.schedule(key, read)

    def times(self, number: int, chunk: int, own: Times) -> Times:
        raise NotImplementedError

    def first_state(self, name: str, prepare: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def _go(self, step: Step, scheduler_step: SchedulerStep) -> Step:
        """The step with its next state."""
        raise NotImplementedError

    def decoders(self) -> dict[str, Any]:
        """What is in the place of the parts that decode, by their names; nothing: they are."""
        return {}

    def step(self, step: Step, scheduler_step: SchedulerStep) -> Tensor:
        if self._pauses:
            if any(step.stream == other.stream for other in self._steps):
                raise ValueError(
                    f"{self.policy.name} steps its scheduler twice between two calls of its "
                    f"{self.policy.denoiser_words}."
                )
            step = self._go(step, scheduler_step)
            self._steps.append(step)
        next_sample = step.sample if step.next_sample is None else step.next_sample
        for guider in self.guiders:
            forget_graph(guider)
        # What the pipeline goes on with is its own to write into
        return next_sample.to(step.sample.dtype, copy=True)

    def forward(self, name: str, denoise: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._pauses and (self._steps or not self.has_begun):
            self.has_begun = True
            self._pause()
        self._called.add(name)
        if not self._computes:
            output = self.policy.empty_output(args, kwargs)
            if output is not None:
                return output
            with torch.no_grad():  # of a kind that is seen for the first time
                output = denoise(*args, **kwargs)
        else:
            output = denoise(*args, **kwargs)
        self.policy.remember_output(args, kwargs, output)
        return output

    # Asked by who walks or follows

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close(failed=error is not None)

    def close(self, failed: bool = False) -> None:
        """Runs the pipeline to its end with the empty denoiser, so that it puts back what it has changed. With
        `failed`, what it raises on the way is left out."""
        try:
            if self._paused is not None and self._paused.began and not self._paused.ended:
                self._pauses = False
                with torch.no_grad():
                    self._resume(computes=False)
        except Exception:
            if not failed:
                raise
        finally:
            self._end()

    def _end(self) -> None:
        if self._paused is not None:
            self._paused.abandon()
            self._paused = None
        for own in self.proxies:
            dissolve(own)
        self.proxies.clear()
        self._steps = []

    def start(self) -> None:
        """Runs the pipeline up to the first forward pass, if it has not yet: it may do so at any time."""
        if self._paused is None and not self.place:
            self._start()

    def _start(self) -> None:
        self._paused = self.policy.paused(self._run, self._seed)
        if self._resume(computes=True) is None:
            raise ValueError(f"{self.policy.name} never calls its {self.policy.denoiser_words}.")

    def _run(self) -> None:
        self.output = self.policy.run(self, self._denoiser)

    def _pause(self) -> None:
        assert self._paused is not None
        self._paused.pause(self._take())

    def _take(self) -> Visit:
        visit = Visit(self.place, tuple(self._steps), frozenset(self._called))
        self._steps = []
        if visit.steps:
            self._called.clear()
            self.place += 1
        return visit

    def _resume(self, computes: bool) -> Visit | None:
        """Goes on to the next pause: what was stepped until then; `None` at the end if there was nothing."""
        assert self._paused is not None
        self._computes = computes
        try:
            with self.policy.active():
                visit = self._paused.resume()
        except BaseException:
            self._end()
            raise
        if self._paused.ended:
            visit = self._take() if self._steps else None
            self._end()
        return visit


class Walk(_Call):
    """What [`Policy.walk`] returns: an iterator of [`Visit`]s, each forward pass under the gradient mode of who asks
    for it. Used as a context manager, or in a `for` loop, it may be left early.

    Attributes:
        place (`int`): The index of the next visit.
        output: At its end, what the pipeline returns: latents (`Tensor`), images or videos.
    """

    def __init__(
        self,
        policy: Policy,
        inputs: Inputs,
        generators: list[torch.Generator],
        denoiser: Callable[..., Any] | None,
        move: Move,
        output_type: str,
        probe: Callable[[Step, SchedulerStep], None] | None,
        decoded: Callable[[Tensor], None] | None,
    ):
        super().__init__(policy, denoiser)
        self.decoded = decoded
        self.inputs, self.generators, self.output_type = inputs, generators, output_type
        self._seed = generators[0].initial_seed()
        self._move, self._probe = move, probe
        # What a follower needs to know
        self.policy_name, self.policy_class = policy.name, _class(policy.pipeline)
        self.began_with = [generator.get_state() for generator in generators]
        self.all_times: dict[tuple[int, int], Times] = {}
        self.prepared: dict[str, list[Tensor]] = {}
        self._prepared: list[tuple[str, Tensor]] = []  # until the first visit
        self.visited: dict[int, list[int]] = {}  # where in memory the states of each visit are
        self.went: dict[tuple[int, int], tuple[int, Tensor]] = {}  # by stream and chunk: its last step, and where to
        self.changed: set[str] = set()  # of its caller's state, where it pauses
        self.ended = False

    def __iter__(self) -> Iterator[Visit]:
        with self:
            while (visit := self.advance()) is not None:
                yield visit
                del visit  # and with it the graph, before the next one grows

    def __next__(self) -> Visit:
        if (visit := self.advance()) is None:
            raise StopIteration
        return visit

    def advance(self) -> Visit | None:
        """The next visit, `None` at the end."""
        return self._leg(computes=True)

    def visits(
        self,
        places: Sequence[int],
        before_last: Callable[[], Any] | None = None,
        passed: Callable[[Visit], Any] | None = None,
    ) -> Iterator[Visit]:
        """The visits at these places, in rising order, under the caller's gradient mode; those between are walked
        without gradient, those after the last are not walked.

        Args:
            places (`Sequence[int]`): At least one.
            before_last (`Callable`, *optional*): Called before the forward passes of the last.
            passed (`Callable`, *optional*): Called, without gradient, with each visit between: for followers that must
                not jump.
        """
        asked, places = list(places), sorted(set(places))
        if asked != places or not places or places[0] < self.place:
            raise ValueError(f"a walk at visit {self.place} goes on in rising order, and was asked for {asked}.")
        while self.place <= places[-1]:
            place = self.place
            if place == places[-1] and before_last is not None:
                before_last()
            with torch.set_grad_enabled(place in places and torch.is_grad_enabled()):
                visit = self.advance()
            if visit is None:
                raise ValueError(f"a walk of {self.policy.name} ended after {place} of {places[-1] + 1} visits.")
            if place in places:
                yield visit
            elif passed is not None:
                with torch.no_grad():
                    passed(visit)
            del visit  # and with it the graph, before the next one grows

    def jump(self, place: int) -> None:
        """Goes on to a visit with the empty denoiser and without moving: what a pipeline keeps between its steps is
        not what it would have been, but for what depends on their number alone."""
        while self.place < place:
            if self._leg(computes=False) is None:
                raise IndexError(f"{self.policy.name} has {self.place} visits, and not {place + 1}.")

    def plan(self) -> list[Visit]:
        """All visits from here on as they will be, by the empty denoiser: their streams, times and chunks."""
        plan = []
        while (visit := self._leg(computes=False)) is not None:
            plan.append(visit)
        return plan

    def run(self) -> Any:
        """To its end: what the pipeline returns."""
        with self:
            while self.advance() is not None:
                pass
        return self.output

    def _leg(self, computes: bool) -> Visit | None:
        if self.ended:
            return None
        try:
            if self._paused is None:
                self._start()
            self.changed = self._paused.changed if self._paused is not None else set()
            visit = self._resume(computes)
        finally:
            self.ended = self._paused is None  # also by an error: it does not begin anew
        if visit is not None:
            self.visited[visit.index] = [step.sample.data_ptr() for step in visit.steps]
        return visit

    def close(self, failed: bool = False) -> None:
        super().close(failed)
        self.ended = True

    def decoders(self) -> dict[str, Any]:
        return {} if self.decoded is None else watched_decoders(self.policy.pipeline, self.decoded)

    def times(self, number: int, chunk: int, own: Times) -> Times:
        self.all_times[number, chunk] = own
        return own

    def first_state(self, name: str, prepare: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        prepared = prepare(*args, **kwargs)
        first = prepared[0] if isinstance(prepared, tuple) else prepared
        if isinstance(first, Tensor):
            self.prepared.setdefault(name, []).append(first.detach().clone())  # it may be written into
            self._prepared.append((name, first))
        return prepared

    def _go(self, step: Step, scheduler_step: SchedulerStep) -> Step:
        if self.place == 0:
            where = step.sample.data_ptr(), step.sample.shape
            for name in [name for name, first in self._prepared if (first.data_ptr(), first.shape) == where]:
                _states_of(_class(self.policy.pipeline))[name] = step.stream
        else:
            self._prepared.clear()
        if not self._computes:
            return step
        self.is_moving = True
        if self._probe is not None:
            self._probe(step, scheduler_step)
        with torch.no_grad():
            next_sample = self._move(replace(step, prediction=step.prediction.detach())).detach()
        if next_sample.shape != step.sample.shape:
            raise ValueError(
                f"`move` gave a state of shape {tuple(next_sample.shape)}, the visited one is "
                f"{tuple(step.sample.shape)}."
            )
        self.is_moving = False
        self.went[step.stream, step.chunk] = step.index, next_sample.to(step.sample.dtype)
        return replace(step, next_sample=next_sample)


class Elsewhere(ValueError):
    """A follower is not at the state, time or stream that it is asked about."""


class Follower(_Call):
    """What [`Policy.follow`] returns: `follower(visit)` gives the prediction for each of the visit's steps, under the
    caller's gradient mode.

    It goes through its own `__call__`, from each visit to where that visit went (`step.next_sample`). A visit that is
    not the next one is jumped to with the empty denoiser: each stream and each chunk before comes to where the walk has
    left it. Of what a pipeline keeps between its steps only such states are right then.

    Raises:
        Elsewhere: if the pipeline is not at the state, time or stream that it is asked about.
        ValueError: if it is asked at a visit that it has left behind.
    """

    def __init__(
        self,
        policy: Policy,
        inputs: Inputs | None,
        generators: list[torch.Generator] | None,
        denoiser: Callable[..., Any] | None,
        walk: Walk | None,
        times: Mapping[tuple[int, int], Times] | None = None,
        rows: range | None = None,
    ):
        super().__init__(policy, denoiser)
        self._walk, self._times = walk, times if walk is None else walk.all_times
        self._rows = None if rows is None else slice(rows.start, rows.stop)
        self.inputs = walk.inputs if inputs is None else inputs  # type: ignore[union-attr]
        if generators is None:
            own = slice(None) if self._rows is None else self._rows
            states, generators = walk.began_with[own], walk.generators[own]  # type: ignore[union-attr]
        else:
            states = [generator.get_state() for generator in generators]
        self._seed = generators[0].initial_seed()
        self.generators = []
        for generator, state in zip(generators, states, strict=True):
            twin = torch.Generator(generator.device)
            twin.set_state(state)
            self.generators.append(twin)
        self._calls: dict[str, int] = {}
        # By stream: the state that the pipeline was given, and what it was made of
        self._handed: dict[int, tuple[Tensor, Tensor]] = {}

    def start(self, visit: Visit | None = None) -> None:
        """As that of a walk, which has begun; without one for the first visit that it will be asked at."""
        if visit is not None:
            self._ask(visit)
        super().start()

    def _ask(self, visit: Visit) -> None:
        nothing: Any = None  # in the place of the prediction, whose graph must not live until the next question
        self._asked = replace(visit, steps=tuple(replace(step, prediction=nothing) for step in visit.steps))
        self._asked = self._asked if self._rows is None else self._asked.of(self._rows)

    def __call__(self, visit: Visit) -> tuple[Tensor, ...]:
        self._ask(visit)
        where = [step.sample.data_ptr() for step in visit.steps]
        self._is_walked = self._walk is not None and self._walk.visited.get(visit.index) == where
        if self._paused is None:
            if self.place:
                self._not_there(f"it ended after {self.place} visits")
            self._start()
        if visit.index < self.place:
            raise ValueError(
                f"a follower does not go back: it is at visit {self.place}, and was asked at {visit.index}."
            )
        while self.place < visit.index:
            with torch.no_grad():
                self._leg(computes=False)
        steps = self._leg(computes=True).steps
        if len(steps) != len(visit.steps):
            self._not_there(f"it steps {len(steps)} streams, the walk {len(visit.steps)}")
        return tuple(step.prediction for step in steps)

    def _own(self, state: Tensor) -> Tensor:
        return state if self._rows is None else state[self._rows]

    def _leg(self, computes: bool) -> Visit:
        if self._paused is None or (visit := self._resume(computes)) is None:
            self._not_there(f"it ended after {self.place} visits")
        return visit

    def times(self, number: int, chunk: int, own: Times) -> Times:
        if self._times is None or not self._pauses:  # closing, maybe further than the walk has come
            return own
        times = self._times.get((number, chunk))
        if times is None or times.timesteps.shape[0] < own.timesteps.shape[0]:
            self._not_there("it sets its timesteps otherwise")
        # Pipelines write into sigmas (Cosmos-Predict2), which the walk's graph may hold
        return replace(times, sigmas=None if times.sigmas is None else times.sigmas.clone())

    def first_state(self, name: str, prepare: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        prepared = prepare(*args, **kwargs)
        number = self._calls.get(name, 0)
        self._calls[name] = number + 1
        stream = _states_of(_class(self.policy.pipeline) if self._walk is None else self._walk.policy_class).get(name)
        if stream is None:
            return prepared
        if self._walk is not None:
            given = list(map(self._own, self._walk.prepared.get(name, [])[number : number + 1]))
        else:
            steps = self._asked.steps if self._asked.index == number == 0 else ()
            given = [step.sample for step in steps if step.stream == stream]
        if not given:
            return prepared
        first = prepared[0] if isinstance(prepared, tuple) else prepared
        if first.shape != given[0].shape:
            if self._walk is None:  # a visit has a part of it
                return prepared
            self._not_there(f"its first state is {tuple(first.shape)}, the walk's {tuple(given[0].shape)}")
        handed = given[0].to(first.dtype, copy=True)
        self._handed[stream] = handed, given[0]
        return (handed, *prepared[1:]) if isinstance(prepared, tuple) else handed

    def _go(self, step: Step, scheduler_step: SchedulerStep) -> Step:
        asked = {other.stream: other for other in self._asked.steps}.get(step.stream)
        if self._computes:
            asked = self._same(step, asked)
            # Rounded as the student's own, whatever precision this one has
            onward = None if asked.next_sample is None else asked.next_sample.to(asked.sample.dtype)
            return replace(step, next_sample=onward)
        if asked is not None and (step.chunk, step.index + 1) == (asked.chunk, asked.index):  # arrives
            return replace(step, next_sample=self._of_its_shape(step, asked).sample)
        # What is asked may depend on other streams, and on the chunks before
        if self._walk is not None and (went := self._walk.went.get((step.stream, step.chunk))) is not None:
            return replace(step, next_sample=self._own(went[1])) if went[0] == step.index else step
        return step

    def step(self, step: Step, scheduler_step: SchedulerStep) -> Tensor:
        handed = super().step(step, scheduler_step)
        if self._steps and (source := self._steps[-1].next_sample) is not None:
            self._handed[step.stream] = handed, source
        return handed

    def _same(self, step: Step, asked: Step | None) -> Step:
        """What was asked, if the pipeline is there."""
        if asked is None or (step.chunk, step.index) != (asked.chunk, asked.index):
            self._not_there(f"it steps stream {step.stream} at step {step.index} of chunk {step.chunk}")
        self._of_its_shape(step, asked)
        handed, source = self._handed.get(step.stream, (None, None))
        if handed is not None and handed.data_ptr() == step.sample.data_ptr():
            if self._is_walked or source is asked.sample:
                return asked
        # A pipeline that takes its states apart; this waits for the device
        if not torch.equal(step.sample, asked.sample.to(step.sample.dtype)):
            self._not_there("its state is another")
        return asked

    def _of_its_shape(self, step: Step, asked: Step) -> Step:
        if step.sample.shape != asked.sample.shape:
            self._not_there(f"its state is {tuple(step.sample.shape)}, the walk's {tuple(asked.sample.shape)}")
        return asked

    def _not_there(self, what: str) -> NoReturn:
        theirs = self.policy.name if self._walk is None else self._walk.policy_name
        raise Elsewhere(
            f"{self.policy.name} does not come to the states that {theirs} visits: {what}, at visit {self.place}."
        )


def check_seams(pipeline: DiffusionPipeline) -> None:
    """Raises a `ValueError` that names the first seam which the pipeline lacks, or a part that is offloaded."""
    cls = type(pipeline)
    missing = None
    if not hasattr(cls.__call__, "__wrapped__"):
        missing = "its `__call__` is not decorated with `torch.no_grad()`, so there is no version with gradient to run"
    elif not hasattr(getattr(pipeline, "scheduler", None), "step"):
        missing = "it has no `scheduler` with a `step`"
    if missing:
        raise ValueError(f"{cls.__name__} lacks a seam that on-policy distillation needs: {missing}.")
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module) and _is_offloaded(part):
            raise ValueError(
                f"{cls.__name__} is offloaded: its {name} has hooks that move it to and fro; build the pipeline "
                "without `enable_*_offload()` and `device_map`."
            )
        if getattr(part, "is_cache_enabled", False):
            raise ValueError(
                f"{cls.__name__} has a cache enabled on its {name}, which would mix up student and teacher; call its "
                "`disable_cache()`."
            )


def _has_adapter(part: Any, names: Sequence[str]) -> bool:
    return isinstance(part, PreTrainedModel) and bool(set(names) & getattr(part, "peft_config", {}).keys())


def _is_scheduler(part: Any) -> bool:
    return hasattr(part, "step") and hasattr(part, "set_timesteps")


def _is_offloaded(module: nn.Module) -> bool:
    # A registry of diffusers alone says nothing: a pipeline's first call leaves an empty one behind
    registries: list[Any] = [part._diffusers_hook for part in module.modules() if hasattr(part, "_diffusers_hook")]
    return hasattr(module, "_hf_hook") or any(registry.get_hook("group_offloading") for registry in registries)


def _class(pipeline: Any) -> Any:
    return type(pipeline)


@functools.cache
def _settled(cls: Any) -> Any:
    """The class with its device looked up once: `_execution_device` walks all modules at each use."""

    def device(self: DiffusionPipeline) -> torch.device:
        if DEVICE not in vars(self):
            vars(self)[DEVICE] = cls._execution_device.fget(self)
        return vars(self)[DEVICE]

    return type(cls.__name__, (cls,), {"_execution_device": property(device), "__module__": cls.__module__})


@functools.cache
def _state_makers(cls: Any) -> list[str]:
    """Methods that may make the first state of a stream: `prepare_latents`, `prepare_audio_latents` ..."""
    return [name for name in dir(cls) if re.fullmatch(r"prepare_(\w+_)?latents", name) and callable(getattr(cls, name))]


@functools.cache
def _states_of(cls: Any) -> dict[str, int]:
    """Of these methods those that do, and for which stream; walks find out more of them. Blocks of modular pipelines
    may do more to a state before it is visited."""
    return {} if issubclass(cls, ModularPipeline) else {"prepare_latents": 0}


def _kind(args: tuple, kwargs: dict[str, Any]) -> Any:
    """A kind of call of a denoiser: its arguments' names, and the shape of the first, which is the state. Not that of
    the others: on other processes a prompt may be longer."""
    given = {name: value for name, value in kwargs.items() if value is not None}
    first = args[0] if args else next(iter(kwargs.values()), None)
    shapes = [x.shape for x in tree_flatten(first)[0] if torch.is_tensor(x)]
    return len(args), tuple(sorted(given)), tuple(shapes), kwargs.get("return_dict", True)
