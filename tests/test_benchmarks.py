"""The two ways to take a step that the benchmarks compare are the same step, and one of them does less."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.common import MODELS, build, check_equal, count_flops, one_pass, two_pass
from benchmarks.scale import Denoiser, Run

CPU = torch.device("cpu")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [True, False])
def test_one_pass_is_the_released_two_passes(lora, checkpointing):
    """Written without the library's policy: direct calls of the transformer, states kept, the student run again."""
    loss, gradient = check_equal(build("toy", CPU, lora=lora, checkpointing=checkpointing, batch=2, steps=4))
    assert loss < 1e-5
    assert gradient < 1e-5


@pytest.mark.parametrize("name", ["toy", pytest.param("sd35-medium", marks=pytest.mark.slow)])
def test_one_pass_saves_a_third_of_the_operations(name):
    """10 rollout steps, 10 questions to the teacher, 9 learnt steps against 9 and 9: LoRA, without checkpointing."""
    one, two, lean = (
        count_flops(name, way, lora=True, checkpointing=False)
        for way in (one_pass, two_pass, partial(two_pass, lean=True))
    )
    assert two / one > 1.35
    # Also where the two passes leave out what they do not use
    assert lean / one > 1.3


@pytest.mark.parametrize("full", [False, True])
def test_operations_of_the_cost_model_are_the_counted_ones(full):
    """SD3.5-Medium at 512 pixels, activations recomputed."""
    settings = dict(num_teachers=3, batch=2, steps=10, teacher_guidance=[4.5])
    counted = count_flops("sd35-medium", one_pass, lora=not full, checkpointing=True, **settings)
    denoiser = Denoiser("", 2.5e9, layers=24, width=1536, picture=32**2, text=MODELS["sd35-medium"].tokens, dual=13)
    assert Run(denoiser, teachers=3, full=full, batch=2, learnt=9).operations == pytest.approx(counted, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "step_cost --steps 3 --students lora --checkpointing no",
        "overhead",
        "overhead --profile",
        "growth --groups num_teachers",
    ],
)
def test_benchmark_runs(command):
    done = subprocess.run(
        [sys.executable, "-m", *f"benchmarks.{command} --repetitions 1 --batch 1 --device cpu".split()],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "thread(s) used" in done.stdout
