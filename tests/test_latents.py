"""The latents of given pictures: what is expected comes from the unmodified pipeline, from its VAE alone, and from the
formulas of the families that are known best."""

import copy
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_512_BIN
from PIL import Image
from torch import Tensor, nn

from diffusion_opd.latents import Latents, find_latents
from diffusion_opd.modular import with_call
from diffusion_opd.policy import Policy
from tests.own_pipelines import Blurs, Clips, Draws, Plain, Repeats, Shown, of
from tests.tiny_pipelines import BUILDERS, CALL
from tests.two_denoisers import TWO, TWO_CALL
from tests.zoo import ZOO

INPUTS = {"prompt": ["a red fox"]}
HALF = [torch.bfloat16, torch.float16]
IN_EVERY_RUN = ("sd3", "flux", "flux2_klein", "qwenimage", "sana", "sdxl", "wan")
FAMILIES = [pytest.param(name, marks=() if name in IN_EVERY_RUN else pytest.mark.nightly) for name in BUILDERS]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pixels_of(frame: Image.Image) -> Tensor:
    return torch.tensor(np.array(frame)).permute(2, 0, 1)[None].contiguous() / 255 * 2 - 1


def found(pipe: DiffusionPipeline, call: dict[str, Any], inputs: Any = INPUTS) -> Latents:
    return find_latents(Policy(pipe, 3, dict(call)), inputs)


@torch.no_grad()
def ended(pipe: DiffusionPipeline, state: Tensor, **call: Any) -> tuple[Any, Tensor]:
    """What a plain call returns whose last state is this one, and what it decodes."""
    pipe, decoded = copy.copy(pipe), []
    whole, vae, scheduler = pipe.vae.decode, copy.copy(pipe.vae), copy.deepcopy(pipe.scheduler)

    def decode(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        decoded.append(z)
        return whole(z, *args, **kwargs)

    vae.decode = decode
    scheduler.step = lambda prediction, timestep, sample, *args, **kwargs: (state.to(sample.dtype),)
    vars(pipe).update(vae=vae, scheduler=scheduler)
    output = pipe(**{"prompt": INPUTS["prompt"], "num_inference_steps": 2, "output_type": "pt", **call})[0]
    return output, decoded[0]


# Against the pipeline itself


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_decoded_is_what_the_plain_pipeline_decodes(family: str, dtype: torch.dtype):
    pipe = BUILDERS[family](0).to(dtype)
    latents = found(pipe, CALL[family])
    state = torch.randn(1, *latents.state_shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    _, expected = ended(pipe, state, **CALL[family])
    tolerance = 4 * torch.finfo(dtype).eps
    assert latents.to_decoder(state).shape == expected.shape
    torch.testing.assert_close(latents.to_decoder(state), expected.float(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(latents.from_decoder(latents.to_decoder(state)), state.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_picture_comes_back_as_its_vae_alone_gives_it_back(family: str):
    pipe = BUILDERS[family](0)
    latents = found(pipe, CALL[family])
    frames = [picture(CALL[family]["width"], CALL[family]["height"], seed) for seed in range(latents.frames)]
    state = latents.encode([frames])
    assert state.shape == (1, *latents.state_shape) and state.dtype == torch.float32 and not state.requires_grad

    pixels = torch.stack([pixels_of(frame) for frame in frames], dim=2)
    is_video = len(latents.decoder_shape) == 5
    with torch.no_grad():
        encoded = pipe.vae.encode(pixels if is_video else pixels[:, :, 0])
        posterior = encoded[0] if family == "sana" else encoded.latent_dist.mode()
        expected = pipe.vae.decode(posterior).sample
    returned, _ = ended(pipe, state, **CALL[family])
    if is_video:
        expected = expected.transpose(1, 2) if returned.ndim == 5 else expected[:, :, 0]
    torch.testing.assert_close(returned, (expected / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-4)


# Against the formulas, in any precision: of x_0 nothing is rounded but what the VAE rounds


def packed(z: Tensor) -> Tensor:
    """FLUX.1: two by two to a token."""
    n, c, h, w = z.shape
    return z.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)


def upcast(vae: Any) -> Any:
    """Its config has diffusers' default, `force_upcast`."""
    return copy.deepcopy(vae).float() if vae.dtype == torch.float16 else vae


FORMULAS = {
    "sd3": lambda z: (z - 0.0609) * 1.5305,
    "flux": lambda z: packed((z - 0.1159) * 0.3611),
    "sdxl": lambda z: z * 0.13025,
    "sd15": lambda z: z * 0.18215,
}


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("family", FORMULAS)
def test_latents_are_those_of_the_formula(family: str, dtype: torch.dtype):
    pipe = BUILDERS[family](0).to(dtype)
    latents = found(pipe, CALL[family] | {"height": 16, "width": 32})
    pictures = [picture(32, 16, seed) for seed in range(2)]
    vae = upcast(pipe.vae)
    pixels = torch.cat([pixels_of(one) for one in pictures]).to(vae.dtype)
    with torch.no_grad():
        z = torch.cat([vae.encode(one[None]).latent_dist.mode().float() for one in pixels])
    torch.testing.assert_close(latents.encode(pictures), FORMULAS[family](z), rtol=1e-5, atol=1e-5)


def test_a_vae_that_does_not_overflow_is_in_its_own_float16():
    pipe = BUILDERS["sd3"](0).to(torch.float16)
    pipe.vae.register_to_config(force_upcast=False)
    one = picture(16, 16)
    with torch.no_grad():
        z = pipe.vae.encode(pixels_of(one).half()).latent_dist.mode().float()
    x = found(pipe, CALL["sd3"]).encode([one])
    torch.testing.assert_close(x, FORMULAS["sd3"](z), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_batch_norms_means_and_deviations_are_undone(dtype: torch.dtype):
    pipe = BUILDERS["flux2_klein"](0)
    pipe.vae.bn.running_mean.normal_(generator=torch.Generator().manual_seed(0))
    pipe.vae.bn.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(1))
    mean, deviation = pipe.vae.bn.running_mean.to(dtype), pipe.vae.bn.running_var.to(dtype)
    pipe.to(dtype)
    latents = found(pipe, CALL["flux2_klein"])
    one, vae = picture(8, 8), upcast(pipe.vae)
    with torch.no_grad():
        z = vae.encode(pixels_of(one).to(vae.dtype)).latent_dist.mode().float()
    deviation = (deviation + pipe.vae.config.batch_norm_eps).sqrt()
    expected = (packed(z) - mean.float()) / deviation.float()
    torch.testing.assert_close(latents.encode([one]), expected, rtol=1e-2, atol=1e-2)


# Pictures


def test_pictures_cover_the_size_and_are_cropped_around_their_middle():
    latents = found(BUILDERS["sd3"](0), CALL["sd3"])
    wide, tall = picture(48, 16), picture(16, 48)
    middle = [wide.crop((16, 0, 32, 16)), tall.crop((0, 16, 16, 32))]
    assert torch.equal(latents.encode([wide, tall]), latents.encode(middle))
    large = wide.resize((96, 32), Image.Resampling.NEAREST)
    small = large.crop((32, 0, 64, 32)).resize((16, 16), Image.Resampling.LANCZOS)
    near = (latents.encode([large]) - latents.encode([small])).abs().mean()
    assert near < 0.2 * (latents.encode([wide]) - latents.encode([tall])).abs().mean()


def test_a_picture_has_the_same_latents_in_any_batch_from_a_file_and_under_autocast(tmp_path):
    latents = found(BUILDERS["sd3"](0).to(torch.bfloat16), CALL["sd3"])
    pictures = [picture(16, 16, seed) for seed in range(3)]
    pictures[1].save(tmp_path / "one.png")
    together = latents.encode([pictures[0], tmp_path / "one.png", {"bytes": None, "path": str(tmp_path / "one.png")}])
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(latents.encode([pictures[1]])[0], together[1])
    assert torch.equal(together[1], together[2]) and not torch.equal(together[0], together[1])
    assert torch.equal(latents.encode([pictures[1].convert("RGBA")])[0], together[1])


def test_a_size_that_the_pipeline_changes_is_that_of_its_pictures():
    """SANA goes to the nearest of the sizes that it was trained at, and scales what it has decoded."""
    pipe = BUILDERS["sana"](0)
    pipe.transformer.register_to_config(sample_size=16)  # of 512 pixels
    latents = found(pipe, CALL["sana"] | {"use_resolution_binning": True, "height": 250, "width": 500})
    assert latents.picture_shape == (1, 3, *map(int, ASPECT_RATIO_512_BIN["0.5"]))


@pytest.mark.parametrize("given, sentence", [(["a.png"], "picture 0 'a.png' cannot be read"), ([3], "is no picture")])
def test_what_is_no_picture_is_told(given: Any, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        found(BUILDERS["sd3"](0), CALL["sd3"]).encode(given)


def test_a_video_of_another_length_is_told():
    latents = found(BUILDERS["wan"](0), CALL["wan"])
    one = picture(16, 16)
    for given in (one, [one] * 4):
        with pytest.raises(ValueError, match=r"WanPipeline makes 5 frame\(s\) a sample as it is called, picture 0 has"):
            latents.encode([given])


# Which pipelines


@pytest.mark.parametrize(
    "name",
    [
        "LattePipeline",  # frames are a batch for its VAE
        "QwenImage21Pipeline",  # with an alpha channel
        "CosmosTextToWorldPipeline",  # a state of EDM
        *[pytest.param(name, marks=pytest.mark.nightly) for name in ("AnimaModularPipeline", "CogVideoXPipeline")],
        *[pytest.param(name, marks=pytest.mark.nightly) for name in ("MochiPipeline", "StableDiffusionXLPAGPipeline")],
    ],
)
def test_other_layouts(name: str):
    tiny = ZOO[name]
    pipe = with_call(tiny.make(0))
    inputs = {"prompt": ["a red fox"], **{key: values[:1] for key, values in tiny.inputs.items()}}
    latents = found(pipe, tiny.call, inputs)
    height, width = latents.picture_shape[-2:]
    frames = [picture(width, height, seed) for seed in range(latents.frames)]
    state = latents.encode([frames])
    assert state.shape == (1, *latents.state_shape) and state.isfinite().all()
    pixels = torch.cat([pixels_of(frame) for frame in frames])
    if len(latents.decoder_shape) == 5:
        pixels = pixels.transpose(0, 1)[None]
    if latents.picture_shape[1] == 4:
        pixels = torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1)
    with torch.no_grad():
        expected = pipe.vae.encode(pixels, return_dict=False)[0].mode()
    torch.testing.assert_close(latents.to_decoder(state), expected, rtol=1e-4, atol=1e-4)


def test_two_denoisers():
    latents = found(TWO["wan22"](0), TWO_CALL["wan22"])
    assert latents.state_shape == (16, 2, 2, 2) and latents.frames == 5


def test_a_pipeline_of_ones_own():
    pipe = of(Shown)
    one = picture(16, 16)
    with torch.no_grad():
        z = pipe.vae.encode(pixels_of(one)).latent_dist.mode()
    torch.testing.assert_close(found(pipe, {}).encode([one]), (z.flip(1) + 1) / 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "make, sentence",
    [
        (Clips, "more is done to its last state than to scale and shift each number, or noise is drawn"),
        (Draws, "more is done to its last state than to scale and shift each number, or noise is drawn"),
        (Blurs, "some numbers are mixed with others, or left out"),
        (Repeats, "some numbers of its state are decoded twice, or not at all"),
        (Plain, "it makes what it returns without a part that decodes"),
    ],
)
def test_another_tail_is_refused(make: type, sentence: str):
    with pytest.raises(ValueError, match=f"^{make.__name__} gives no latents of pictures: {sentence}.$"):
        found(of(make), {})


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("LTX2Pipeline", "it makes several streams, or chunk after chunk"),
        ("HeliosPipeline", "it makes several streams, or chunk after chunk"),
        ("StableDiffusion3InpaintPipeline", "some numbers are mixed with others, or left out"),
        ("Kandinsky5I2VPipeline", "it decodes 192 numbers of the 128 in its state"),
        ("AllegroPipeline", "its VAE fails to decode: Decoding without tiling has not been implemented"),
        ("StableAudioPipeline", r"it decodes \(1, 2, 15\), which is no picture"),
    ],
)
def test_other_pipelines_are_refused(name: str, sentence: str):
    tiny = ZOO[name]
    inputs = {"prompt": ["a red fox"], **{key: values[:1] for key, values in tiny.inputs.items()}}
    with pytest.raises(ValueError, match=f"^{name} gives no latents of pictures: {sentence}"):
        found(tiny.make(0), tiny.call, inputs)


class DecodesOnly(ModelMixin):
    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        return self.vae.decode(*args, **kwargs)


def test_a_vae_that_encodes_no_picture_is_refused():
    pipe = of(Shown)
    pipe.vae.encoder.conv_in.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="Shown .* its AutoencoderKL encodes NaN or infinity"):
        found(pipe, {})
    pipe.vae = DecodesOnly(pipe.vae)
    with pytest.raises(ValueError, match="Shown .* its DecodesOnly does not encode"):
        found(pipe, {})


def test_one_sample_is_asked_for():
    for inputs in ({"prompt": ["a", "b"]}, {}):
        with pytest.raises(ValueError, match=r"latents of StableDiffusion3Pipeline are found with one sample, got"):
            found(BUILDERS["sd3"](0), CALL["sd3"], inputs)


# What is left behind


@pytest.mark.parametrize("family, dtype", [("sdxl", torch.float16), ("flux", torch.bfloat16), ("wan", torch.float32)])
def test_nothing_is_left_behind(family: str, dtype: torch.dtype):
    pipe = BUILDERS[family](0).to(dtype)
    policy = Policy(pipe, 3, dict(CALL[family]))
    parts = dict(pipe.components)
    before = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items() if isinstance(part, nn.Module)}
    config = dict(pipe.config)
    torch.manual_seed(7)
    random = torch.get_rng_state()
    pipe.transformer.requires_grad_(True) if "transformer" in parts else pipe.unet.requires_grad_(True)
    latents = find_latents(policy, INPUTS)
    encoded = latents.encode([[picture(16, 16)] * latents.frames])

    assert all(pipe.components[name] is part for name, part in parts.items()) and latents.vae is pipe.vae
    for name, weights in before.items():
        now = parts[name].state_dict()
        assert all(now[key].dtype == value.dtype and torch.equal(now[key], value) for key, value in weights.items())
    assert "decode" not in vars(pipe.vae) and dict(pipe.config) == config
    assert torch.equal(torch.get_rng_state(), random) and torch.is_grad_enabled()
    assert encoded.grad_fn is None and not latents.scale.requires_grad
    assert all(parameter.grad is None for part in before for parameter in parts[part].parameters())


def test_a_pipeline_that_encodes_in_float32_itself():
    tiny = ZOO["StableDiffusionXLImg2ImgPipeline"]
    pipe = tiny.make(0).to(torch.float16)
    inputs = {"prompt": ["a red fox"], **{key: values[:1] for key, values in tiny.inputs.items()}}
    latents = found(pipe, tiny.call, inputs)
    torch.testing.assert_close(latents.scale, torch.full_like(latents.scale, 1 / 0.13025))
    assert {parameter.dtype for parameter in pipe.vae.parameters()} == {torch.float16}


def test_the_policy_can_be_let_go():
    policy = Policy(BUILDERS["sd3"](0), 3, dict(CALL["sd3"]))
    latents = find_latents(policy, INPUTS)
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(policy)
        find_latents(policy, INPUTS)
        del policy
        assert gone() is None
    finally:
        gc.enable()
    assert latents.encode([picture(16, 16)]).isfinite().all()


def test_the_denoiser_is_asked_once_for_each_kind_of_call():
    pipe = BUILDERS["sd3"](0)
    policy, calls = Policy(pipe, 5, dict(CALL["sd3"])), []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    find_latents(policy, INPUTS)
    assert len(calls) == 1
    find_latents(policy, INPUTS)
    assert len(calls) == 1
