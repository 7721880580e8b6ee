"""Pipeline classes of diffusers, each of tiny parts: gradients equal those of two passes of the plain pipeline, and
what is saved loads there (see zoo/check.py)."""

import pytest

from tests.zoo import ZOO
from tests.zoo.check import check

# In every run one of each kind: strength, masks, control, guidance by attention, two streams, chunks, caches, schedules
# of other coordinates, one sample a call, sound, blocks; and of LoRA files both
IN_EVERY_RUN = (
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusion3PAGPipeline",
    "FluxControlInpaintPipeline",
    "Flux2KleinKVPipeline",
    "HunyuanImagePipeline",
    "HunyuanDiTPipeline",
    "CogVideoXImageToVideoPipeline",
    "MochiPipeline",
    "Kandinsky5T2VPipeline",
    "LTX2ImageToVideoPipeline",
    "WanVACEPipeline",
    "CosmosTextToWorldPipeline",
    "Cosmos2VideoToWorldPipeline",
    "StableAudioPipeline",
    "AceStepPipeline",
    "HeliosModularPipeline",
    "AnimaModularPipeline",
)
# What is refused, and by which words
REFUSED = {
    "SanaSprintPipeline": "SCMScheduler is not supported",
    "SanaSprintImg2ImgPipeline": "SCMScheduler is not supported",
    "LTXConditionPipeline": "LTXConditionPipeline steps otherwise than `ode`",
}


@pytest.mark.parametrize("way", ["lora", "full"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in IN_EVERY_RUN else pytest.mark.nightly) for name in sorted(ZOO)]
)
def test_a_class_trains(name: str, way: str):
    report = check(name, way)
    if name in REFUSED:
        assert not report["ok"] and REFUSED[name] in report["error"]
    else:
        assert report["ok"], report


def test_those_of_every_run_are_there():
    assert {*IN_EVERY_RUN, *REFUSED} <= ZOO.keys()
    assert len(ZOO) > 160
