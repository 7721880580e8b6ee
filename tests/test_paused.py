"""A function that pauses shares its thread with who resumes it: what torch keeps by thread is each side's own."""

import contextlib
import contextvars
import gc
import signal
import traceback
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from diffusion_opd.paused import Paused


class Call:
    """A function that pauses when `body` asks it to, and notes what it sees on both sides of the pause."""

    def __init__(self, look: Callable[[], Any], within: Callable[[], Any] = contextlib.nullcontext, modules: Any = ()):
        self.look, self.within, self.seen = look, within, []
        self.paused: Paused[str] = Paused(self.run, modules, torch.device("cpu"), seed=3)

    def run(self) -> None:
        self.note_and_pause()
        with self.within():
            self.note_and_pause()
            self.note_and_pause()
        self.note_and_pause()

    def note_and_pause(self) -> None:
        self.seen.append(self.look())
        self.paused.pause("here")
        self.seen.append(self.look())

    def resume_to_the_end(self) -> None:
        while not self.paused.ended:
            self.paused.resume()


def test_it_goes_on_where_it_paused():
    seen = []

    def function() -> None:
        seen.append("first")
        paused.pause(1)
        seen.append("second")
        paused.pause(2)

    paused: Paused[int] = Paused(function, [], torch.device("cpu"), seed=0)
    assert not paused.began and not paused.ended
    assert paused.resume() == 1 and seen == ["first"] and paused.began
    assert paused.resume() == 2 and seen == ["first", "second"]
    assert paused.resume() is None and paused.ended


def test_gradient_mode_is_the_callers_unless_it_changed_it_itself():
    call = Call(torch.is_grad_enabled, torch.no_grad)
    with torch.no_grad():
        call.paused.resume()
    call.paused.resume()  # sees the caller's, then enters its own
    assert torch.is_grad_enabled()  # though it paused within `no_grad`
    with torch.no_grad():
        call.paused.resume()  # the caller's is the same for once
    call.paused.resume()
    assert torch.is_grad_enabled()
    call.resume_to_the_end()
    assert torch.is_grad_enabled()
    assert call.seen == [False, True, False, False, False, False, True, True]


def test_autocast_is_the_callers_unless_it_changed_it_itself():
    def look() -> Any:
        return torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    plain, half = look(), (True, torch.float16)
    call = Call(look, lambda: torch.autocast("cpu", torch.float16))
    call.paused.resume()
    with torch.autocast("cpu", torch.bfloat16):
        call.paused.resume()
        assert look() == (True, torch.bfloat16)
    assert look() == plain
    call.paused.resume()
    assert look() == plain
    call.resume_to_the_end()
    assert look() == plain
    # What it leaves at its end is what it had found, the caller's of then
    assert call.seen[:6] == [plain, (True, torch.bfloat16), half, half, half, half]


class Doubled(TorchFunctionMode):
    """Doubles what `torch.ones` gives."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.ones else result


def test_function_modes_are_put_back():
    call = Call(lambda: torch.ones(1).item(), Doubled)
    call.paused.resume()
    with Doubled():
        call.paused.resume()  # pauses within a mode of its own on top of the caller's
        assert torch.ones(1) == 2
    assert torch.ones(1) == 1
    call.paused.resume()
    assert torch.ones(1) == 1
    call.resume_to_the_end()
    assert torch.ones(1) == 1
    assert call.seen == [1, 2, 4, 2, 2, 2, 1, 1]


def test_its_global_generator_is_its_own():
    """Seeded alike for every party; the caller's goes on as if nothing had been drawn."""
    twins = [Call(lambda: torch.rand(1).item()) for _ in range(2)]
    torch.manual_seed(0)
    expected = torch.rand(3).tolist()
    torch.manual_seed(0)
    drawn = []
    for twin in twins:
        twin.paused.resume()
    drawn.append(torch.rand(1).item())
    twins[0].resume_to_the_end()
    drawn.append(torch.rand(1).item())
    twins[1].resume_to_the_end()
    drawn.append(torch.rand(1).item())
    assert drawn == expected
    assert twins[0].seen == twins[1].seen == torch.rand(8, generator=torch.Generator().manual_seed(3)).tolist()


def test_context_variables_are_the_callers():
    """torch keeps overrides of its config there: `recompile_limit`, which would fall back to 8."""
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)
    limit = torch.compiler.config.recompile_limit
    call = Call(lambda: (variable.get(), torch.compiler.config.recompile_limit))
    variable.set(1)
    torch.compiler.config.recompile_limit = limit + 9
    try:
        call.paused.resume()
        variable.set(2)
        call.paused.resume()
    finally:
        torch.compiler.config.recompile_limit = limit
    assert call.seen[:3] == [(1, limit + 9), (2, limit + 9), (2, limit + 9)]


class Layer(nn.Module):
    """An attention layer, as far as processors go."""

    def __init__(self) -> None:
        super().__init__()
        self.processor: Any = "plain"

    def set_processor(self, processor: Any) -> None:
        self.processor = processor


def test_attention_processors_are_put_back():
    layer = Layer()

    @contextlib.contextmanager
    def guided() -> Any:
        before = layer.processor
        layer.set_processor("guided")
        try:
            yield
        finally:
            layer.set_processor(before)

    calls = [Call(lambda: layer.processor, guided, [layer]) for _ in range(2)]
    for call in calls:
        call.paused.resume()
        call.paused.resume()
        assert layer.processor == "plain"
    for call in calls:
        call.resume_to_the_end()
        assert layer.processor == "plain"
        assert call.seen == ["plain", "plain", "guided", "guided", "guided", "guided", "plain", "plain"]


def test_an_error_reaches_who_asked_with_its_traceback():
    def fails() -> None:
        paused.pause(1)
        raise KeyError("on purpose")

    paused: Paused[int] = Paused(fails, [], torch.device("cpu"), seed=0)

    def first() -> None:
        paused.resume()

    def second() -> None:
        with torch.no_grad(), pytest.raises(KeyError, match="on purpose") as caught:
            paused.resume()
        names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
        assert names[0] == "second" and names[-1] == "fails"

    first()
    second()
    assert paused.ended and torch.is_grad_enabled()


def test_an_inference_mode_of_its_own_is_refused():
    call = Call(torch.is_inference_mode_enabled, torch.inference_mode)
    call.paused.resume()
    with pytest.raises(RuntimeError, match="inference mode of its own"):
        call.paused.resume()
    assert not torch.is_inference_mode_enabled() and call.paused.ended


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "while it pauses"])
def test_signals(number: int, inside: bool):
    """Ctrl-C, and what a cluster sends: their handlers' exceptions reach the caller from either side."""

    class Told(BaseException):
        pass

    def tell(*args: Any) -> None:
        raise KeyboardInterrupt if number == signal.SIGINT else Told

    def function() -> None:
        try:
            paused.pause(1)
            if inside:
                signal.raise_signal(number)
            paused.pause(2)
        finally:
            cleaned.append(True)

    cleaned: list[bool] = []
    paused: Paused[int] = Paused(function, [], torch.device("cpu"), seed=0)
    before = signal.signal(number, tell)
    try:
        paused.resume()
        with pytest.raises((KeyboardInterrupt, Told)):
            if not inside:
                signal.raise_signal(number)
            paused.resume()
    finally:
        signal.signal(number, before)
    assert cleaned == ([True] if inside else [])
    paused.abandon()
    assert cleaned == [True]


def test_nothing_of_an_abandoned_one_stays():
    class Thing:
        pass

    def function() -> None:
        thing = Thing()
        held.append(weakref.ref(thing))
        paused.pause(1)

    held: list[Any] = []
    gc.collect()
    gc.disable()
    try:
        paused: Paused[int] = Paused(function, [], torch.device("cpu"), seed=0)
        paused.resume()
        assert held[0]() is not None
        paused.abandon()
        assert held[0]() is None
    finally:
        gc.enable()
