"""What a pipeline decodes is seen before it is pixels, whatever its class calls the part that decodes."""

import contextlib
import math

import numpy as np
import pytest
import torch

from diffusion_opd.decoding import has_checker, takes_no_checker
from diffusion_opd.modular import with_call
from diffusion_opd.policy import Policy
from diffusion_opd.startup import seeded
from tests.tiny_pipelines import BUILDERS, CALL
from tests.zoo import ZOO

NAMES = ["Kandinsky3Pipeline", "AnimaModularPipeline", "WanModularPipeline", "Cosmos2TextToImagePipeline", *BUILDERS]
IN_EVERY_RUN = {*NAMES[:4], "sd3", "wan", "sd15"}


def made(name: str):
    return (BUILDERS[name](0), CALL[name]) if name in BUILDERS else (with_call(ZOO[name].make(0)), ZOO[name].call)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in IN_EVERY_RUN else pytest.mark.nightly) for name in NAMES],
)
def test_what_is_decoded_is_seen(name: str):
    pipeline, call = made(name)
    policy, seen = Policy(pipeline, 2, dict(call)), []

    def pictures(**kwargs):
        walk = policy.walk({"prompt": ["a red fox"]}, seeded(1), lambda step: step.sample, output_type="pil", **kwargs)
        return np.stack([np.asarray(picture) for picture in walk.run()])

    parts = dict(pipeline.components)
    assert (pictures() == pictures(decoded=seen.append)).all()
    assert seen and all(tensor.isfinite().all() for tensor in seen)
    assert all(pipeline.components[key] is part for key, part in parts.items())
    for part in parts.values():
        if isinstance(part, torch.nn.Module) and hasattr(part, "decode"):
            next(part.parameters()).data.fill_(math.nan), list(part.parameters())[-1].data.fill_(math.nan)
    seen.clear()
    with contextlib.suppress(ValueError):  # of a pipeline that cannot make a picture of it
        pictures(decoded=seen.append)
    assert not all(tensor.isfinite().all() for tensor in seen)


def test_which_pipelines_draw_without_their_checker():
    assert has_checker(ZOO["Cosmos2TextToImagePipeline"].make(0))
    assert not takes_no_checker(ZOO["Cosmos2TextToImagePipeline"].make(0))
    assert takes_no_checker(BUILDERS["sd15"](0)) and not has_checker(BUILDERS["sd15"](0))
