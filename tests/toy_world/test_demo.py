"""The demo runs from end to end, in two steps and on a few prompts."""

import importlib
import json
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusion_opd.cli.worker import run_script
from examples.toy_world.demo import RECIPE, Progress, distil, main
from examples.toy_world.evaluate import generate
from examples.toy_world.pipeline import load_base
from examples.toy_world.world import TASKS, sample_prompts


@pytest.mark.slow
def test_demo(tmp_path, capsys, monkeypatch, request):
    monkeypatch.setattr(Progress, "every", 2)
    table = main(tmp_path, seed=0, max_steps=2, n=2)
    assert list(table) == ["base", *(f"{task} teacher" for task in TASKS), "student"]
    assert all(0 <= row[task] <= 1 for row in table.values() for task in TASKS)
    assert json.loads((tmp_path / "scores.json").read_text())["table"] == table
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("grid.png", "training.png"))
    # A line of numbers now and then, not the metrics of each step; at the end a command that works as it is
    printed = capsys.readouterr().out
    assert len(re.findall(r"^step +2  loss \d\.\d{4}  KL \d\.\d{5}$", printed, re.MULTILINE)) == 1
    assert "{" not in printed
    command = printed.splitlines()[-1]
    subprocess.run(command, shell=True, check=True, cwd=request.config.rootpath, timeout=300)
    assert Image.open(tmp_path / "picture.png").size == (256, 256)
    # Plain diffusers loads the student, and it draws something else than the base
    student, base = load_base(), load_base()
    student.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    student.set_progress_bar_config(disable=True)
    prompts = sample_prompts(TASKS[0], 1, seed=5, heldout=True)
    a, b = (torch.frombuffer(bytearray(generate(p, prompts)[0].tobytes()), dtype=torch.uint8) for p in (student, base))
    assert (a != b).any()


@pytest.mark.slow
def test_yaml_and_demo_train_the_same_student(tmp_path, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    flags = ["--max_steps", "2", "--image_steps", "0", "--output_dir", str(tmp_path / "yaml"), "--disable_tqdm", "true"]
    run_script("opd", ["--config", "examples/toy_world/opd.yaml", *flags], fail_with_unknown_args=False)
    distil(tmp_path / "demo", seed=0, max_steps=2, num_scored=0, image_steps=0, **RECIPE)
    first, second = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("yaml", "demo"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("missing", ["matplotlib", "rich.console"])
def test_whoever_lacks_the_extra_is_told_so_at_the_start(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "examples.toy_world.extra")
    with pytest.raises(ImportError, match=r"matplotlib and rich: pip install 'diffusion-opd\[examples\]'"):
        importlib.import_module("examples.toy_world.extra")
