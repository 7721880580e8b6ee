"""A function that is paused: it runs on a stack of its own, in the same thread, until it pauses, and goes on from there
when it is resumed (a greenlet; SQLAlchemy does the same with it).

torch keeps much of its state by thread, where both stacks would meet it. So at each switch the caller's is put back,
and what the paused function itself had changed (it paused within `torch.no_grad()`, say) is its own when it goes on;
else the caller's holds for it.

This file knows torch, and no pipeline.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode

T = TypeVar("T")


class Paused(Generic[T]):
    """
    A function that pauses.

    Args:
        function (`Callable`): Without arguments; it may call [`pause`].
        modules (`Sequence[nn.Module]`): Attention layers whose `processor` the function may change while others use
            them.
        device (`torch.device`): Whose autocast and global generator are the function's own, besides the CPU's.
        seed (`int`): Of the function's own global generators.
    """

    def __init__(
        self, function: Callable[[], Any], modules: Sequence[nn.Module], device: torch.device, seed: int
    ) -> None:
        self._greenlet = greenlet(function)
        self._modules = modules
        self._device_types = list(dict.fromkeys(["cpu", device.type]))
        self._own: dict[str, Any] = {}  # what the function has changed itself
        self._functions: list[Any] = []
        self._generators = [torch.default_generator]
        if device.type != "cpu" and hasattr(of_device := torch.get_device_module(device), "default_generators"):
            index = of_device.current_device() if device.index is None else device.index
            self._generators.append(of_device.default_generators[index])
        self._random = [torch.Generator(g.device).manual_seed(seed).get_state() for g in self._generators]

    @property
    def began(self) -> bool:
        return bool(self._greenlet) or self._greenlet.dead

    @property
    def ended(self) -> bool:
        return self._greenlet.dead

    @property
    def changed(self) -> set[str]:
        """What of the caller's state the function, where it pauses, has changed itself."""
        return set(self._own)

    def resume(self) -> T | None:
        """Goes on until the function pauses, and returns what it pauses with; `None` at its end. What it raises is
        raised here."""
        caller = getcurrent()
        self._greenlet.parent = caller  # it gets what the function raises
        # With a context of its own the function would not see torch's config, which is kept in context variables
        self._greenlet.gr_context = caller.gr_context
        inference = torch.is_inference_mode_enabled()
        with self._state():
            value = self._greenlet.switch()
        if torch.is_inference_mode_enabled() != inference:
            self._greenlet.throw(GreenletExit)  # leaves that mode
            raise RuntimeError("a function cannot pause within an inference mode of its own: it has no gradient.")
        return None if self._greenlet.dead else value

    def pause(self, value: T) -> None:
        """Called by the function: hands `value` to who resumed it."""
        parent: Any = self._greenlet.parent
        parent.switch(value)

    def abandon(self) -> None:
        """Ends a paused function as an exception does that it cannot catch as an `Exception`."""
        if self.began and not self.ended:
            self._greenlet.parent = getcurrent()
            with self._state():
                self._greenlet.throw(GreenletExit)

    @contextlib.contextmanager
    def _state(self) -> Iterator[None]:
        callers = self._read()
        entered = callers | self._own
        entered["functions"] = callers["functions"] + self._functions
        self._write(callers, entered)
        random = [generator.get_state() for generator in self._generators]
        for generator, state in zip(self._generators, self._random, strict=True):
            generator.set_state(state)
        try:
            yield
        finally:
            left = self._read()
            self._functions = left["functions"][len(callers["functions"]) :]  # a stack, with the caller's below
            for name, value in left.items():
                if name != "functions" and value != entered[name]:
                    self._own.pop(name, None)
                    if value != callers[name]:
                        self._own[name] = value
            self._write(left, callers)
            self._random = [generator.get_state() for generator in self._generators]
            for generator, state in zip(self._generators, random, strict=True):
                generator.set_state(state)

    def _read(self) -> dict[str, Any]:
        return {
            "grad": torch.is_grad_enabled(),
            "autocast": [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in self._device_types],
            "functions": _get_current_function_mode_stack(),
            "processors": [module.processor for module in self._modules],
        }

    def _write(self, now: dict[str, Any], then: dict[str, Any]) -> None:
        if now["grad"] != then["grad"]:
            torch.set_grad_enabled(then["grad"])
        if now["autocast"] != then["autocast"]:
            for device_type, (enabled, dtype) in zip(self._device_types, then["autocast"], strict=True):
                torch.set_autocast_enabled(device_type, enabled)
                torch.set_autocast_dtype(device_type, dtype)
            torch.clear_autocast_cache()  # weights that were cast for one side
        if now["functions"] != then["functions"]:
            for _ in now["functions"]:
                _pop_mode()
            for mode in then["functions"]:
                _push_mode(mode)
        if now["processors"] != then["processors"]:
            for module, before, after in zip(self._modules, now["processors"], then["processors"], strict=True):
                if before is not after:
                    module.set_processor(after)  # type: ignore[operator]
