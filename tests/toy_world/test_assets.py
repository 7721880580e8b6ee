"""The committed models load the plain way and are small, and each specialist leads in its own task."""

import pytest
import torch
from diffusers import FluxKontextPipeline

from examples.toy_world.evaluate import evaluate
from examples.toy_world.pipeline import ASSETS, BASE, SAMPLING, TEACHERS, load_base
from examples.toy_world.world import SIZE, TASKS


def test_base_loads_with_no_special_argument_in_single_precision():
    pipeline = FluxKontextPipeline.from_pretrained(BASE)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        assert {p.dtype for p in getattr(pipeline, name).parameters()} == {torch.float32}
    picture = pipeline(prompt="a red circle", **SAMPLING).images[0]
    assert picture.size == pipeline(picture, "make the circle blue", **SAMPLING).images[0].size == (SIZE, SIZE)


def test_assets_are_small():
    assert sum(f.stat().st_size for f in ASSETS.rglob("*") if f.is_file()) < 12e6


@pytest.mark.parametrize("task", TASKS)
def test_specialists_are_loras_with_rank_and_alpha(task):
    pipeline = load_base()
    pipeline.load_lora_weights(TEACHERS / task, weight_name="pytorch_lora_weights.safetensors")
    (config,) = pipeline.transformer.peft_config.values()
    assert (config.r, config.lora_alpha) == (16, 32)


@pytest.mark.slow
def test_each_specialist_leads_in_its_own_task_only():
    scores = {"base": evaluate(load_base())}
    for task in TASKS:
        pipeline = load_base()
        pipeline.load_lora_weights(TEACHERS / task, weight_name="pytorch_lora_weights.safetensors")
        scores[task] = evaluate(pipeline)
    for task in TASKS:
        assert scores["base"][task] < 0.5 and scores[task][task] > 0.85
        gap = scores[task][task] - scores["base"][task]
        for other in TASKS:
            if other != task:
                assert scores[other][task] < scores[task][task] - 0.25 * gap
