"""Half precision from end to end: user_story.py, told for every family, method and way to train."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.editing_pipelines import EDITING
from tests.hub_server import HubServer
from tests.launched import Launch
from tests.tiny_pipelines import BUILDERS
from tests.two_denoisers import TWO

SCRIPT = Path(__file__).with_name("user_story.py")


@pytest.fixture(scope="module")
def launch(tmp_path_factory) -> Iterator[Launch]:
    """One process has imported everything, and is told the stories."""
    folder = tmp_path_factory.mktemp("stories")
    with HubServer() as hub:
        environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), **hub.environment(folder)}
        process = Launch(folder, [sys.executable, str(SCRIPT)], environment, processes=1)
        yield process
        process.close()


# Plain diffusers loads no LoRA into PixArt
STORIES = [("opd", family, "lora", "bf16") for family in BUILDERS if family != "pixart_sigma"]
STORIES += [("opd", family, "full", "bf16") for family in BUILDERS]
STORIES += [
    (method, family, mode, "bf16")
    for method in ("nft", "grpo")
    for family, mode in (("sd3", "lora"), ("sdxl", "lora"), ("sd3", "full"), ("wan", "full"))
]
STORIES += [(method, "sd3", "lora", "fp16") for method in ("opd", "nft", "grpo")] + [("opd", "sd3", "full", "fp16")]
# Qwen-Image-Edit's processor is loaded with torchvision alone
STORIES += [("opd", family, "lora", "bf16") for family in EDITING if not family.startswith("qwen")]
STORIES += [("opd", family, mode, "bf16") for family in TWO for mode in ("lora", "full")]
STORIES += [(method, "flux_kontext", "lora", "bf16") for method in ("nft", "grpo")]
# Families of tests/zoo, whose LoRAs are in either format
FAMILIES = (
    "ChromaPipeline",
    "AuraFlowPipeline",
    "CogView4Pipeline",
    "HunyuanVideoPipeline",
    "HunyuanDiTPipeline",
    "CogVideoXPipeline",
    "CogVideoXImageToVideoPipeline",
    "MochiPipeline",
    "LTX2Pipeline",
    "LTX2ImageToVideoPipeline",
    "SkyReelsV2DiffusionForcingPipeline",
    "HeliosPipeline",
    "Kandinsky5T2VPipeline",
    "FluxImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLControlNetPipeline",
    "StableAudioPipeline",
)
# In three steps a LoRA of AuraFlow learns no more than bfloat16 rounds
TOLD = [(family, mode) for family in FAMILIES for mode in ("lora", "full")]
STORIES += [("opd", *told, "bf16") for told in TOLD if told != ("AuraFlowPipeline", "lora")]
IN_EVERY_RUN = [
    ("opd", "HunyuanDiTPipeline", "lora", "bf16"),
    ("opd", "flux_kontext", "lora", "bf16"),
    ("opd", "wan22", "lora", "bf16"),
    ("opd", "sd3", "lora", "bf16"),
    ("opd", "wan", "full", "bf16"),
    ("opd", "sd3", "lora", "fp16"),
    ("nft", "sd3", "lora", "bf16"),
    ("grpo", "sdxl", "lora", "bf16"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "family", "mode", "precision"),
    [pytest.param(*one, marks=[] if one in IN_EVERY_RUN else pytest.mark.nightly) for one in STORIES],
)
def test_the_whole_story_in_half_precision(tmp_path, launch, method, family, mode, precision):
    out = tmp_path / "_".join((method, family, mode, precision))
    out.mkdir()
    launch.run([str(out), "--method", method, "--family", family, "--mode", mode, "--precision", precision])
