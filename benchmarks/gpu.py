"""
The table of a GPU: a training step in one pass against the released recipe's two, SD3.5-Medium's architecture with
random weights, embeddings in the place of its encoders.

    python -m benchmarks.gpu --out table.md                       # about eight minutes of one H100
    python -m benchmarks.gpu --model toy --device cpu --rows 2    # the same on a CPU, to see that it runs

Each row is written as soon as it is there, the most wanted first; what does not fit into `--minutes` is named. The two
ways take turns within a row. Seconds are of the whole optimizer step; memory is the most that torch had allocated, with
weights; utilisation is the share of a step's time in which a kernel ran; synchronisations are calls within a step at
which the host waits for the device, as torch reports them (`torch.cuda.set_sync_debug_mode`), beside the place of the
commonest. On a CPU the last two are n/a.
"""

import argparse
import gc
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import (
    arguments,
    build,
    interleave,
    machine,
    one_pass,
    optimizer_step,
    peak_memory,
    ratios,
    spread,
    synchronize,
    two_pass,
)
from diffusion_opd.engines import compile_blocks

GIB = 2**30
COLUMNS = (
    "student, teachers, batch",
    "s a step",
    "samples/s",
    "two passes over one",
    "peak GiB, one / two",
    "utilisation",
    "synchronisations",
)


@dataclass(frozen=True)
class Row:
    """What is measured: `batch` samples of each teacher's task."""

    student: str
    teachers: int
    batch: int
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.student}, {self.teachers}, {self.batch}{', compiled' if self.compiled else ''}"


ROWS = (
    Row("LoRA", 3, 3),
    Row("LoRA", 3, 8),
    Row("LoRA", 3, 3, compiled=True),
    Row("full", 3, 3),
    Row("LoRA", 1, 3),
    Row("LoRA", 8, 3),
    Row("LoRA", 3, 8, compiled=True),
    Row("full", 1, 3),
    Row("full", 3, 8),
    Row("full", 8, 3),
    Row("full", 3, 3, compiled=True),
)


def measured(row: Row, options: argparse.Namespace) -> list[str]:
    """The cells of a row."""
    device, is_lora = options.device, row.student == "LoRA"
    parties = build(
        options.model,
        device,
        options.seed,
        lora=is_lora,
        checkpointing=not is_lora,
        num_teachers=row.teachers,
        batch=row.batch,
        steps=options.steps,
    )
    if row.compiled:
        for denoiser in dict.fromkeys((parties.student.transformer, parties.teacher.transformer)):
            compile_blocks(denoiser, row.teachers + 1)
    ways: dict[str, Callable[[], Any]] = {
        "one": partial(optimizer_step, parties, one_pass),
        "two": partial(optimizer_step, parties, two_pass),
    }
    held = _held(device)
    peaks = [held + peak_memory(way, device) for way in ways.values()]  # and the first step of each, which is longer
    times = interleave(ways, options.repetitions)
    seconds = [wall for wall, _ in times["one"]]
    return [
        str(row),
        spread(seconds),
        f"{row.teachers * row.batch / statistics.median(seconds):.2f}",
        spread(ratios(times["two"], times["one"])),
        " / ".join(f"{peak / GIB:.1f}" for peak in peaks),
        _utilisation(ways["one"], device),
        _synchronisations(ways["one"], device),
    ]


def _held(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def _utilisation(step: Callable[[], Any], device: torch.device) -> str:
    if device.type != "cuda":
        return "n/a"
    synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        began = time.perf_counter()
        step()
        synchronize()
        wall = time.perf_counter() - began
    busy = sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6
    return f"{100 * busy / wall:.0f} %"


def _synchronisations(step: Callable[[], Any], device: torch.device) -> str:
    if device.type != "cuda":
        return "n/a"
    places = Counter[str]()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one in caught:
        if "synchronizing" in str(one.message):
            places[f"{Path(one.filename).name}:{one.lineno}"] += 1
    commonest = "".join(f" ({place} {count})" for place, count in places.most_common(1))
    return f"{places.total()}{commonest}"


def _freed(error: Exception | None = None) -> None:
    """What a row has held, and what the traceback of its error does."""
    if error is not None:
        error.__traceback__ = None
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Table:
    """Lines that are printed, and written down at once."""

    def __init__(self, path: Path | None):
        self._path, self._lines = path, list[str]()

    def add(self, line: str) -> None:
        print(line, flush=True)
        self._lines.append(line)
        if self._path is not None:
            self._path.write_text("\n".join(self._lines) + "\n")


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(model="sd35-medium", repetitions=3)
    parser.add_argument("--steps", type=int, default=10, help="denoising steps, of which the last is not learnt")
    parser.add_argument("--rows", type=int, default=len(ROWS), help="the first of the table")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, help="a Markdown file")
    options = parser.parse_args()
    table, began, longest, left_out = Table(options.out), time.monotonic(), 0.0, []
    table.add(f"{machine(options.device)}, diffusers {diffusers.__version__}; {options.model}, {options.steps} steps\n")
    table.add(f"| {' | '.join(COLUMNS)} |")
    table.add("|---" * len(COLUMNS) + "|")
    for row in ROWS[: options.rows]:
        before = time.monotonic()
        if before - began + longest > 60 * options.minutes:
            left_out.append(row)
            continue
        failure: Exception | None = None
        try:
            table.add(f"| {' | '.join(measured(row, options))} |")
        except torch.OutOfMemoryError as error:
            failure = error
            table.add(f"| {row} | out of memory |{' |' * (len(COLUMNS) - 2)}")
        _freed(failure)
        longest = max(longest, time.monotonic() - before)
    if left_out:
        table.add(f"\nLeft out, for want of time: {'; '.join(map(str, left_out))}.")


if __name__ == "__main__":
    main()
