"""Tiny pipelines of two denoisers, one for high noise and one for low: Wan 2.2's.

As in tiny_pipelines.py two seeds share all but the denoisers.
"""

from typing import Any

from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel

from tests.streaming_pipelines import builder, picture
from tests.tiny_pipelines import CALL, frozen, wan


def wan22(seed: int = 0) -> WanPipeline:
    parts = wan(seed).components
    return WanPipeline(**parts | {"transformer_2": wan(seed + 100).transformer}, boundary_ratio=0.875)


def wan22_i2v(seed: int = 0) -> WanImageToVideoPipeline:
    """The picture is given in the latents (16 + 4 + 16 channels), and without an encoder."""
    parts = wan(seed).components
    config = {name: value for name, value in parts["transformer"].config.items() if not name.startswith("_")}
    config |= {"in_channels": 36}
    parts["transformer"] = frozen(seed, WanTransformer3DModel, **config)
    parts["transformer_2"] = frozen(seed + 100, WanTransformer3DModel, **config)
    return WanImageToVideoPipeline(**parts, boundary_ratio=0.875)


TWO = {"wan22": builder(wan22), "wan22_i2v": builder(wan22_i2v)}
# With another guidance for low noise
TWO_CALL: dict[str, dict[str, Any]] = {name: {**CALL["wan"], "guidance_scale_2": 3.0} for name in TWO}
TWO_INPUTS: dict[str, dict[str, list[Any]]] = {
    "wan22": {},
    "wan22_i2v": {"image": [picture(16, number) for number in range(4)]},
}
