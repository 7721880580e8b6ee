"""The tiny pipelines are fit to test with: they run, listen to their prompt, keep what is frozen and survive a save."""

from functools import cache
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model

from tests.tiny_pipelines import BUILDERS, CALL, FLOW, LORA_TARGETS, VP, denoiser

PROMPTS = ["a red cat", "two dogs"]
families = pytest.mark.parametrize("family", FLOW + VP)


@cache
def built(family: str, seed: int = 0) -> DiffusionPipeline:
    return BUILDERS[family](seed)


def sample(pipe: DiffusionPipeline, family: str, prompt: list[str] = PROMPTS, **kwargs) -> Any:
    """Three steps from the noise of seed 1, the same noise for each prompt."""
    generator = [torch.Generator().manual_seed(1) for _ in prompt]
    kwargs = {"output_type": "latent"} | CALL[family] | kwargs
    return pipe(prompt=list(prompt), num_inference_steps=3, generator=generator, **kwargs)[0]


def predict(module: torch.nn.Module, args: tuple, kwargs: dict) -> torch.Tensor:
    prediction = module(*args, **kwargs)[0]
    return torch.stack(list(prediction)) if isinstance(prediction, list) else prediction  # Z-Image: one a picture


def denoiser_call(pipe: DiffusionPipeline, family: str) -> tuple[tuple, dict]:
    """What the pipeline passes to its denoiser in the first step."""
    calls = []
    handle = denoiser(pipe).register_forward_pre_hook(lambda _, args, kw: calls.append((args, kw)), with_kwargs=True)
    sample(pipe, family)
    handle.remove()
    return calls[0]


@families
def test_samples_and_decodes(family: str):
    latents = sample(built(family), family)
    assert latents.shape[0] == len(PROMPTS) and latents.isfinite().all()
    torch.testing.assert_close(sample(built(family), family), latents, rtol=0, atol=0)

    pictures = sample(built(family), family, output_type="pil")
    frames = CALL[family].get("num_frames")
    for picture in pictures:
        assert frames is None or len(picture) == frames
        for frame in [picture] if frames is None else picture:
            assert frame.size == (CALL[family]["width"], CALL[family]["height"])


@families
def test_prompt_reaches_the_sample(family: str):
    first, second = sample(built(family), family)
    changed, same = sample(built(family), family, ["a blue cat", PROMPTS[1]])
    scale = first.abs().max()
    assert (first - second).abs().max() > 1e-3 * scale
    assert (first - changed).abs().max() > 1e-3 * scale
    torch.testing.assert_close(same, second)


@pytest.mark.parametrize("family", [family for family in FLOW + VP if family != "flux"])  # FLUX.1-schnell has none
def test_guidance_reaches_the_sample(family: str):
    key = "true_cfg_scale" if "true_cfg_scale" in CALL[family] else "guidance_scale"
    guided, stronger = (sample(built(family), family, **{key: scale}) for scale in (4.0, 6.0))
    assert (guided - stronger).abs().max() > 1e-3 * guided.abs().max()


@families
def test_seed_draws_the_denoiser_and_nothing_else(family: str):
    student, teacher = built(family), built(family, seed=1)
    for name, module in student.components.items():
        if isinstance(module, torch.nn.Module):
            ours, theirs = module.state_dict(), teacher.components[name].state_dict()
            equal = all(torch.equal(ours[key], theirs[key]) for key in ours)
            assert equal == (module is not denoiser(student)), name
    assert not torch.allclose(sample(student, family), sample(teacher, family), rtol=0.1)


@families
def test_building_is_frozen_and_repeatable(family: str):
    rng = torch.get_rng_state()
    pipe = BUILDERS[family](0)
    assert torch.equal(torch.get_rng_state(), rng)
    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            assert not any(child.training for child in module.modules()), name
            assert not any(parameter.requires_grad for parameter in module.parameters()), name
            for key, value in module.state_dict().items():
                assert torch.equal(value, built(family).components[name].state_dict()[key]), key


@families
def test_round_trip_through_a_folder(family: str, tmp_path):
    pipe = built(family)
    args, kwargs = denoiser_call(pipe, family)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    # matmul folds its batch, and so rounds, differently when a weight asks for gradients, even under `no_grad`
    for module in loaded.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False)

    assert type(loaded) is type(pipe)
    before, after = (
        {key: value for key, value in p.scheduler.config.items() if not key.startswith("_")} for p in (pipe, loaded)
    )
    assert after == before
    with torch.no_grad():
        expected, actual = (predict(denoiser(p), args, kwargs) for p in (pipe, loaded))
    assert torch.equal(actual, expected)
    assert torch.equal(sample(loaded, family), sample(pipe, family))  # tokenizers and encoders too


@families
def test_lora_targets_learn(family: str):
    pipe = BUILDERS[family](0)
    args, kwargs = denoiser_call(pipe, family)
    module = denoiser(pipe)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=LORA_TARGETS), module)
    predict(module, args, kwargs).square().mean().backward()
    learning = [
        name for name, parameter in module.named_parameters() if parameter.grad is not None and parameter.grad.any()
    ]
    for target in LORA_TARGETS:
        assert any(name.endswith(f"{target}.lora_B.default.weight") for name in learning), target
    assert all("lora" in name for name in learning)
