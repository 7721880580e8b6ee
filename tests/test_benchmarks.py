"""The two ways to take a step that the benchmarks compare are the same step, and one of them does less."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from benchmarks import gpu
from benchmarks.common import MODELS, build, check_equal, count_flops, one_pass, peak_memory, two_pass
from benchmarks.footprint import PIPELINES, learnt_step, parameters, parties, peak_of_step, sd3_inputs
from benchmarks.scale import Denoiser, Run, memory_in_all, published

CPU = torch.device("cpu")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [True, False])
def test_one_pass_is_the_released_two_passes(lora, checkpointing):
    """Written without the library's policy: direct calls of the transformer, states kept, the student run again."""
    loss, gradient = check_equal(build("toy", CPU, lora=lora, checkpointing=checkpointing, batch=2, steps=4))
    assert loss < 1e-5
    assert gradient < 1e-5


@pytest.mark.parametrize("name", ["toy", pytest.param("sd35-medium", marks=pytest.mark.nightly)])
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


PUBLISHED_BYTES = {  # of the safetensors on the Hub, in two bytes a number
    "SD3.5-Medium": {
        "denoiser": 4_939_433_672,
        "CLIP-L": 247_323_896,
        "CLIP-G": 1_389_382_688,
        "T5-XXL": 9_524_621_312,
        "VAE": 167_666_902,
    },
    "FLUX.1-dev": {
        "denoiser": 23_802_816_640,
        "CLIP-L": 246_144_352,
        "T5-XXL": 9_524_621_312,
        "VAE": 167_666_902,
    },
    "Qwen-Image": {"denoiser": 40_860_802_176, "Qwen2.5-VL-7B": 16_584_333_312, "VAE": 253_806_966},
}


@pytest.mark.parametrize("name", PIPELINES)
def test_parameters_are_those_of_the_published_files(name):
    for part, size in PUBLISHED_BYTES[name].items():
        assert 2 * parameters(name)[part] == pytest.approx(size, rel=5e-4), part


def test_lora_of_the_cost_model_is_the_counted_one():
    """FLUX.1 has blocks of both kinds."""
    student, _ = parties(PIPELINES["FLUX.1-dev"].denoiser, lora=True, checkpointing=False)
    counted = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    assert published("FLUX.1-dev", layers=57, width=3072, single=38).lora == counted


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [True, False])
def test_counted_memory_of_a_step_is_the_measured_one(lora, checkpointing):
    """What the memory table counts without data, against what the allocator hands out in the same step with data."""

    def inputs() -> dict[str, Tensor]:
        made = sd3_inputs(samples=4, side=32, text=64)
        made |= {"hidden_states": torch.zeros(4, 4, 32, 32), "encoder_hidden_states": torch.zeros(4, 64, 128)}
        made["pooled_projections"] = torch.zeros(4, 128)
        return {key: value.bfloat16() for key, value in made.items()}

    make = partial(SD3Transformer2DModel, **MODELS["toy"].transformer)
    counted = peak_of_step(*parties(make, lora, checkpointing), inputs)

    student, teacher = parties(make, lora, checkpointing)
    for denoiser in {student, teacher}:
        denoiser.to_empty(device="cpu")
        for parameter in denoiser.parameters():
            nn.init.normal_(parameter, std=0.02)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    measured = peak_memory(partial(learnt_step, student, teacher, inputs()), CPU)
    assert counted == pytest.approx(measured, rel=0.03)


@pytest.mark.slow
def test_memory_in_all():
    """SD3.5-Medium, a LoRA on one GPU at 512 pixels: the sum, by hand, but for the activations."""
    run = Run(published("SD3.5-Medium", layers=24, width=1536, text=333, dual=13), batch=1, gpus_a_node=1)
    parts = memory_in_all(run, 512)
    weights = PUBLISHED_BYTES["SD3.5-Medium"]
    # Trained: weight, gradient, two moments; and 3 teachers
    lora = 24 * 2 * 4 * 2 * 1536 * 32 * (16 + 3 * 2)
    assert parts["weights, optimizer"] == pytest.approx(weights["denoiser"] + lora, rel=1e-3)
    # What each of 24 blocks is given, and what the last one, recomputed, keeps
    given = 24 * 2 * (32**2 + 333) * 1536 * 2
    assert given < parts["learning"] < 5 * given
    # The decoder's widest picture, 256 channels of each of six, and what the next layer makes of it
    assert parts["drawing"] == 3 * 6 * 256 * 512**2 * 2
    in_all = sum(weights.values()) + lora + parts["drawing"] + 2**30
    assert parts["in all"] == pytest.approx(in_all, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "step_cost --steps 3 --students lora --checkpointing no",
        pytest.param("overhead", marks=pytest.mark.nightly),
        "overhead --profile",
        pytest.param("growth --groups num_teachers", marks=pytest.mark.nightly),
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


def test_the_table_of_a_gpu_is_made_on_a_cpu_too(tmp_path, monkeypatch, capsys):
    """Each row as soon as it is there; what there is no time for is named."""
    path = tmp_path / "table.md"
    own = ["--model", "toy", "--device", "cpu", "--steps", "2", "--repetitions", "1", "--out", str(path)]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *own, "--rows", "1"])
    gpu.main()
    (row,) = [line for line in path.read_text().splitlines() if line.startswith("| LoRA")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert len(cells) == len(gpu.COLUMNS) and cells[0] == "LoRA, 3, 3" and cells[-2:] == ["n/a", "n/a"]
    assert all(float(cell.split()[0]) > 0 for cell in cells[1:4])
    assert path.read_text() in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["gpu.py", *own, "--minutes", "0"])
    gpu.main()
    assert path.read_text().splitlines()[-1].count(";") == len(gpu.ROWS) - 1  # all are left out
