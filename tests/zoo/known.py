"""The families that have tests of their own."""

from functools import partial

from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

from tests.editing_pipelines import EDITING, EDITING_CALL, EDITING_INPUTS
from tests.streaming_pipelines import PICTURES, STREAMING, STREAMING_CALL
from tests.tiny_pipelines import BUILDERS, CALL
from tests.two_denoisers import TWO, TWO_CALL, TWO_INPUTS

from .tiny import Tiny

_MAKE = BUILDERS | STREAMING | EDITING | TWO
_CALL = CALL | STREAMING_CALL | EDITING_CALL | TWO_CALL
_INPUTS = {name: {"image": pictures} for name, pictures in PICTURES.items()} | EDITING_INPUTS | TWO_INPUTS

_CLASSES = {
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux_guidance",
    "Flux2KleinPipeline": "flux2_klein",
    "QwenImagePipeline": "qwenimage",
    "SanaPipeline": "sana",
    "ZImagePipeline": "zimage",
    "Lumina2Pipeline": "lumina2",
    "LTXPipeline": "ltx",
    "WanPipeline": "wan",
    "PixArtSigmaPipeline": "pixart_sigma",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionPipeline": "sd15",
    "LTX2Pipeline": "ltx2",
    "SkyReelsV2DiffusionForcingPipeline": "skyreels",
    "HeliosPipeline": "helios",
    "StableDiffusion3Img2ImgPipeline": "sd3_img2img",
    "LTXImageToVideoPipeline": "ltx_i2v",
    "FluxControlPipeline": "flux_control",
    "FluxKontextPipeline": "flux_kontext",
    "QwenImageEditPipeline": "qwen_edit",
    "QwenImageEditPlusPipeline": "qwen_edit_plus",
    "FluxFillPipeline": "flux_fill",
    "WanImageToVideoPipeline": "wan_i2v",
}


def first_order(pipe):
    """Solvers of first order, Wan's and Sana's, are Euler's."""
    if isinstance(pipe.scheduler, (UniPCMultistepScheduler, DPMSolverMultistepScheduler)):
        others = {"disable_corrector": list(range(100))} if isinstance(pipe.scheduler, UniPCMultistepScheduler) else {}
        scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, solver_order=1, **others)
        pipe.register_modules(scheduler=scheduler)
    return pipe


def _make(family: str, seed: int):
    return first_order(_MAKE[family](seed))


PIPELINES = {
    name: Tiny(partial(_make, family), _CALL[family], {k: v[:2] for k, v in _INPUTS.get(family, {}).items()})
    for name, family in _CLASSES.items()
}
