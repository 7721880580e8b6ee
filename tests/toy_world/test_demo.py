"""The demo runs from end to end, in two steps and on a few prompts."""

import json

import pytest
import torch

from examples.toy_world.demo import main
from examples.toy_world.evaluate import generate
from examples.toy_world.pipeline import load_base
from examples.toy_world.world import TASKS, sample_prompts


@pytest.mark.slow
def test_demo(tmp_path, capsys):
    table = main(tmp_path, seed=0, max_steps=2, n=2)
    assert list(table) == ["base", *(f"{task} teacher" for task in TASKS), "student"]
    assert all(0 <= row[task] <= 1 for row in table.values() for task in TASKS)
    assert json.loads((tmp_path / "scores.json").read_text())["table"] == table
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("grid.png", "training.png"))
    assert "student" in capsys.readouterr().out
    # Plain diffusers loads the student, and it draws something else than the base
    student, base = load_base(), load_base()
    student.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    student.set_progress_bar_config(disable=True)
    prompts = sample_prompts(TASKS[0], 1, seed=5, heldout=True)
    a, b = (torch.frombuffer(bytearray(generate(p, prompts)[0].tobytes()), dtype=torch.uint8) for p in (student, base))
    assert (a != b).any()
