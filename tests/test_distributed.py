"""Two processes give what one gives: same losses, gradients and weights, and gradients cross the wire once a step."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_pipelines import BUILDERS, denoiser

SCRIPT = Path(__file__).with_name("distributed_run.py")


def run(out: Path, *options: str, processes: int = 1, launcher: list[str] | None = None) -> dict:
    out.mkdir()
    command = [sys.executable, str(SCRIPT)]
    if processes > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [*(launcher or torchrun), str(SCRIPT)]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run([*command, str(out), *options], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads((out / "result.json").read_text())


def assert_same_run(one: dict, two: dict, tolerance: float = 2e-5) -> None:
    for key in ("losses", "judged", "grad_norms"):
        assert two[key] == pytest.approx(one[key], rel=max(1e-4, 10 * tolerance), abs=1e-6), key
    # Adam divides by the gradient's own size, so float32 noise of a tiny gradient is not tiny in the weights
    a, b = torch.tensor(one["weights"]), torch.tensor(two["weights"])
    assert (a - b).norm() / a.norm() < tolerance
    assert two["ranks_agree"]


def assert_saved(out: Path, result: dict, family: str) -> None:
    """The last checkpoint, loaded by plain diffusers, holds the weights at the end."""
    folder, pipe = out / "run" / "checkpoint-3", BUILDERS[family](0)
    if (folder / "pytorch_lora_weights.safetensors").is_file():
        pipe.load_lora_weights(str(folder), weight_name="pytorch_lora_weights.safetensors", adapter_name="default")
        module = denoiser(pipe)
    else:
        module = type(denoiser(pipe)).from_pretrained(folder / "transformer")
    parameters = dict(module.named_parameters())
    saved = torch.cat([parameters[name].detach().flatten() for name in result["names"]])
    assert torch.equal(saved, torch.tensor(result["weights"]))


def assert_resumes(out: Path, result: dict, step: int = 2, **start: Any) -> None:
    """From its checkpoint at `step` a run ends as the undisturbed one."""
    resume = ["--resume", str(out / "run" / f"checkpoint-{step}")]
    options = [*start.pop("options"), *resume]
    resumed = run(out.with_name("resumed"), *options, processes=2, **start)
    assert resumed["weights"] == result["weights"]
    for key in ("losses", "judged", "grad_norms"):
        assert resumed[key] == result[key]
    assert resumed["ranks_agree"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "family", "transition"),
    [("lora", "sd3", "flow_sde"), ("full", "sd3", "ode"), ("lora", "wan", "ode"), ("full", "qwenimage", "ode")],
)
def test_ddp_equals_one_process(tmp_path, mode, family, transition):
    options = ["--mode", mode, "--family", family, "--transition", transition]
    one = run(tmp_path / "one", "--batch", "4", *options)
    options += ["--batch", "2", "--engine", "ddp"]
    two = run(tmp_path / "two", *options, processes=2)
    assert (two["wrapper"], two["num_processes"]) == ("DistributedDataParallel", 2)
    assert "MULTI_CPU" in two["distributed_type"]
    assert_same_run(one, two)
    # 2 tasks x 3 learnt steps = 6 backward passes an optimizer step, one synchronisation (a tiny model is one bucket)
    assert two["all_reduces"] == 3
    assert_saved(tmp_path / "two", two, family)
    assert_resumes(tmp_path / "two", two, options=options)


def zero2_launcher(precision: str) -> list[str]:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--use_deepspeed", "--zero_stage", "2"]
    launcher += ["--num_processes", "2", "--num_machines", "1", "--dynamo_backend", "no"]
    return [*launcher, "--mixed_precision", precision]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_zero2_equals_one_process(tmp_path, mode):
    pytest.importorskip("deepspeed")
    launcher = zero2_launcher("no")
    one = run(tmp_path / "one", "--batch", "4", "--mode", mode)
    options = ["--batch", "2", "--engine", "zero2", "--mode", mode]
    two = run(tmp_path / "two", *options, processes=2, launcher=launcher)
    assert (two["wrapper"], two["num_processes"]) == ("DeepSpeedEngine", 2)
    assert "DEEPSPEED" in two["distributed_type"]
    assert_same_run(one, two)
    assert two["engine_steps"] == 3
    assert_saved(tmp_path / "two", two, "sd3")
    assert_resumes(tmp_path / "two", two, options=options, launcher=launcher)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_zero2_in_mixed_precision(tmp_path, mode):
    """The engine casts the student and nothing else: encoders, teachers and start-up checks must meet its dtype."""
    pytest.importorskip("deepspeed")
    one = run(tmp_path / "one", "--batch", "4", "--mode", mode)
    options = ["--batch", "2", "--engine", "zero2", "--mode", mode, "--bf16"]
    two = run(tmp_path / "two", *options, processes=2, launcher=zero2_launcher("bf16"))
    assert two["wrapper"] == "DeepSpeedEngine" and two["ranks_agree"]
    assert two["losses"] == pytest.approx(one["losses"], rel=0.05)


# Groups of samples that span micro-batches and processes; a float's last digit may move a pixel by one of 255 shades
REWARDS = 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("method", "mode"), [("nft", "lora"), ("grpo", "lora"), ("nft", "full")])
def test_learning_from_rewards_in_ddp_equals_one_process(tmp_path, method, mode):
    options = ["--method", method, "--mode", mode]
    one = run(tmp_path / "one", "--batch", "4", *options)
    options += ["--batch", "2", "--engine", "ddp"]
    two = run(tmp_path / "two", *options, processes=2)
    assert (two["wrapper"], two["num_processes"]) == ("DistributedDataParallel", 2)
    assert_same_run(one, two, REWARDS)
    # 2 tasks x 2 micro-batches x 3 learnt steps = 12 backward passes an optimizer step
    assert two["all_reduces"] == 3
    assert_saved(tmp_path / "two", two, "sd3")
    # Between two optimizer steps on one rollout: each process has its own samples
    assert_resumes(tmp_path / "two", two, step=1, options=options)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "mode"), [("nft", "lora"), ("grpo", "full")])
def test_learning_from_rewards_in_zero2_equals_one_process(tmp_path, method, mode):
    pytest.importorskip("deepspeed")
    options = ["--method", method, "--mode", mode]
    one = run(tmp_path / "one", "--batch", "4", *options)
    options += ["--batch", "2", "--engine", "zero2"]
    two = run(tmp_path / "two", *options, processes=2, launcher=zero2_launcher("no"))
    assert (two["wrapper"], two["num_processes"]) == ("DeepSpeedEngine", 2)
    assert_same_run(one, two, REWARDS)
    assert two["engine_steps"] == 3
    assert_saved(tmp_path / "two", two, "sd3")
    assert_resumes(tmp_path / "two", two, step=1, options=options, launcher=zero2_launcher("no"))
