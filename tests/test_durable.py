"""Runs that are killed, pre-empted, fed with NaN, or left without a disk, a Hub or a tracker.

A run that dies is a process of its own, as is the one that resumes it (durable_run.py); they are forked from one that
has imported everything.
"""

import multiprocessing
import os
import signal
import socket
from functools import partial
from pathlib import Path

import pytest
import torch

from diffusion_opd.checkpoints import last_checkpoint, what_is_torn
from tests import durable_run

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.durable_run"])


def started(out: Path, processes: int = 1, **options) -> list[int]:
    """Runs to the end, whatever that is; the exit codes. Once one process was killed, so are the others."""
    out.mkdir(exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    places = [dict(rank=rank, world=processes, port=port) for rank in range(processes)] if processes > 1 else [{}]
    running = [PROCESSES.Process(target=durable_run.run, args=(out,), kwargs=place | options) for place in places]
    for process in running:
        process.start()
    while any(process.exitcode is None for process in running):
        multiprocessing.connection.wait([process.sentinel for process in running if process.exitcode is None], 300)
        if any(process.exitcode == -signal.SIGKILL for process in running):
            for process in running:
                process.kill()
    return [process.exitcode for process in running]


def seen(out: Path, rank: int = 0) -> dict:
    return torch.load(out / f"seen_{rank}.pt")


def assert_same_end(resumed: dict, undisturbed: dict) -> None:
    """Equal to the bit, in all that came after the resumption."""
    assert resumed["ends_at"] == undisturbed["ends_at"]
    assert resumed["prompts"] == undisturbed["prompts"][-len(resumed["prompts"]) :]
    assert resumed["log"] == undisturbed["log"]
    for name in ("weights", "average"):
        assert all(torch.equal(a, b) for a, b in zip(resumed[name], undisturbed[name], strict=True)), name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What runs that nothing happens to saw, made when first asked for."""
    made = {}

    def of(processes: int = 1, **options) -> list[dict]:
        key = (processes, *sorted(options.items()))
        if key not in made:
            out = tmp_path_factory.mktemp("undisturbed")
            assert started(out, processes, **options) == [0] * processes
            made[key] = [seen(out, rank) for rank in range(processes)]
        return made[key]

    return of


slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("place", "begins_at", "options"),
    [
        slow("rollout:3", 3, {}),
        slow("optimizer", 3, {}),
        slow("save:1", 3, {}),
        ("save:2", 3, {}),
        slow("save:4", 3, {}),
        slow("list", 3, {}),
        slow("state", 3, {"save_total_limit": 1}),
        slow("rotate", 4, {"save_total_limit": 1}),
        slow("rollout:3", 3, {"method": "nft"}),
        slow("save:3", 3, {"method": "nft"}),
        slow("optimizer", 3, {"method": "grpo"}),
        slow("save:4", 3, {"method": "grpo"}),
    ],
)
def test_a_killed_run_resumes_as_if_nothing_had_been(tmp_path, undisturbed, place, begins_at, options):
    assert started(tmp_path, die=place, **options) == [-signal.SIGKILL]
    assert started(tmp_path, resume=True, **options) == [0]
    resumed = seen(tmp_path)
    assert resumed["begins_at"] == begins_at
    assert_same_end(resumed, undisturbed(method=options.get("method", "opd"))[0])
