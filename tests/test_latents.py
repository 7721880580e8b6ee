"""Latents of pictures: what is found by going a pipeline's way to its VAE is that way."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffusion_opd.latents import find_latents
from diffusion_opd.policy import Policy
from tests.editing_pipelines import EDITING, EDITING_CALL, EDITING_INPUTS
from tests.streaming_pipelines import STREAMING, STREAMING_CALL
from tests.tiny_pipelines import BUILDERS, CALL

MAKERS = {**BUILDERS, **{name: EDITING[name] for name in ("flux_kontext", "flux_fill", "qwen_edit")}}
CALLS = CALL | EDITING_CALL
VIDEOS = ("ltx", "wan")
STEPS = 2


def inputs(family: str) -> dict[str, list]:
    pictures = EDITING_INPUTS.get(family, {}) if family in EDITING else {}
    return {"prompt": ["a fox"]} | {name: values[:1] for name, values in pictures.items()}


def made(family: str, dtype: torch.dtype = torch.float32) -> tuple[DiffusionPipeline, Policy]:
    pipeline = MAKERS[family](0).to(dtype=dtype)
    return pipeline, Policy(pipeline, STEPS, dict(CALLS[family]))


def picture(seed: int = 0, size: int = 40) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def decoded_by(pipeline: DiffusionPipeline, family: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The last state of a plain call, and what it has decoded of it."""
    caught, states = [], []
    decode, step = pipeline.vae.decode, pipeline.scheduler.step

    def watched(latents, *args, **kwargs):
        caught.append(latents.clone())
        return decode(latents, *args, **kwargs)

    def stepped(*args, **kwargs):
        output = step(*args, **kwargs)
        states.append(output[0].clone())
        return output

    pipeline.set_progress_bar_config(disable=True)
    given = {name: values if name == "prompt" else values[0] for name, values in inputs(family).items()}
    given |= CALLS[family] | {"num_inference_steps": STEPS}
    pipeline.vae.decode, pipeline.scheduler.step = watched, stepped
    pipeline(**given, output_type="pil", generator=torch.Generator().manual_seed(0))
    del pipeline.vae.decode, pipeline.scheduler.step
    (before,) = caught
    return states[-1], before


@pytest.mark.parametrize("family", [name for name in MAKERS if name not in VIDEOS])
def test_they_are_decoded_to_the_picture(family):
    """A plain call's last state and what it decodes of it are related as was found; and the latents of a picture come
    to what the VAE has encoded."""
    pipeline, policy = made(family)
    vae = pipeline.vae
    found = find_latents(policy, inputs(family))
    latents, before = decoded_by(pipeline, family)
    flat = latents.reshape(-1)
    assert flat.numel() == before.numel()
    expected = found._scale * flat[found._sources].view(found._scale.shape) + found._shift
    assert torch.allclose(expected, before[0], atol=1e-5)
    states = found.encode([picture(0), picture(1)])
    assert states.shape == (2, *found.state_shape) and states.dtype == torch.float32 and not states.requires_grad
    again = found._scale * states[1].reshape(-1)[found._sources].view(found._scale.shape) + found._shift
    side = vae.decode(before).sample.shape[-1]
    pixels = torch.from_numpy(np.asarray(picture(1).resize((side, side), Image.LANCZOS)).copy()).permute(2, 0, 1)
    pixels = pixels[None].float() / 127.5 - 1
    encoded = vae.encode(pixels.unsqueeze(2) if again.ndim == 4 else pixels)
    plain = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
    assert torch.allclose(again, plain[0], atol=1e-4)
    assert pipeline.vae is vae and "_vae" not in vars(vae)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["sd3", "flux", "sdxl"])
def test_in_half_precision_the_way_is_as_exact(family, dtype):
    whole, half = (find_latents(made(family, one)[1], inputs(family)) for one in (torch.float32, dtype))
    assert torch.equal(whole._sources, half._sources)
    assert torch.allclose(whole._scale, half._scale) and torch.allclose(whole._shift, half._shift, atol=1e-6)
    states = half.encode([picture()])
    gap = (states - whole.encode([picture()])).norm() / states.norm()
    assert gap < 0.05 and states.dtype == torch.float32


def test_formulas_of_three_pipelines():
    """SD3 scales and shifts, FLUX packs squares of two pixels besides, SDXL scales."""
    for family in ("sd3", "flux", "sdxl"):
        pipeline, policy = made(family)
        vae = pipeline.vae
        (states,) = find_latents(policy, inputs(family)).encode([picture(size=16)]).unbind()
        pixels = pipeline.image_processor.preprocess(picture(size=16), 16, 16)
        z = (vae.encode(pixels).latent_dist.mode() - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
        if family == "flux":
            _, channels, height, width = z.shape
            z = z.view(1, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
            z = z.reshape(1, height // 2 * (width // 2), channels * 4)
        assert torch.allclose(states, z[0], atol=1e-5), family


def test_a_vae_that_overflows_encodes_in_float32():
    pipeline, policy = made("sdxl", torch.float16)
    pipeline.vae.register_to_config(force_upcast=True)
    seen = []
    pipeline.vae.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    find_latents(policy, inputs("sdxl")).encode([picture()])
    assert set(seen) == {torch.float32} and pipeline.vae.dtype == torch.float16


@pytest.mark.parametrize("family", VIDEOS)
def test_a_picture_is_no_video(family):
    _, policy = made(family)
    with pytest.raises(ValueError, match="a picture has latents of shape .*; pictures are for pipelines that make one"):
        find_latents(policy, inputs(family)).encode([picture()])


def test_who_has_no_latents_of_a_picture():
    helios = Policy(STREAMING["helios"](0), STEPS, dict(STREAMING_CALL["helios"]))
    with pytest.raises(ValueError, match="HeliosPipeline makes several streams, or chunk after chunk"):
        find_latents(helios, inputs("helios"))
    ltx2 = Policy(STREAMING["ltx2"](0), STEPS, dict(STREAMING_CALL["ltx2"]))
    with pytest.raises(ValueError, match="needs one VAE that encodes pictures, and has .*audio_vae"):
        find_latents(ltx2, inputs("ltx2"))
