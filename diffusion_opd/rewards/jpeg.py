"""How well a picture can be compressed: a reward without a model, to try a training with.

This file knows Pillow's JPEG, and no model.
"""

import io
from collections.abc import Sequence
from typing import Any

from PIL.Image import Image
from torch import nn

from .scorer import Scorer


class JPEGCompressibility(Scorer):
    """
    Minus the size, in kB (1000 bytes), of a picture as JPEG of quality 95: plain pictures score highest.

    The reward of DDPO (Black et al. 2023, https://arxiv.org/abs/2305.13301, `jpeg_compressibility`), the same number on
    both scales. Flow-GRPO divides it by 500; a weight of .002 does the same.

    Takes what a [`Scorer`] takes, of which only `num_frames` makes a difference without a model.
    """

    __name__ = "jpeg_compressibility"

    def load(self) -> nn.Module:
        return nn.Identity()

    def score(self, prompts: Sequence[str], images: Sequence[Image], **columns: Any) -> list[float]:
        files = [io.BytesIO() for _ in images]
        for image, file in zip(images, files, strict=True):
            image.save(file, format="JPEG", quality=95)
        return [-file.tell() / 1000 for file in files]
