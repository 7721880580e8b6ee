"""Does a picture hold the text that its prompt asks for?

This file knows texts and how far they lie apart, and RapidOCR as the reader.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL.Image import Image
from torch import nn

from .scorer import Scorer

_QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')


class OCR(Scorer):
    """
    How close what is read in a picture comes to the text that was asked for, from 0 to 1.

    `1 - min(d, n) / n` with the edit distance `d` between what is read and the text of `n` characters, both without
    spaces and in lower case; 1 where the text stands within what is read. It is the same on both scales. Source: the
    OCR reward of Flow-GRPO (Liu et al. 2025, https://arxiv.org/abs/2505.05470).

    The text is the dataset's column `column` where a row has one, else what stands between the first pair of quotes in
    the prompt (`"..."` or `“...”`). Without either the score is `None`.

    RapidOCR reads, with the PP-OCR weights in its wheel, on the CPU and offline; the lines that it finds are joined
    from the top to the bottom. The published numbers are PaddleOCR's, which is not used here: expect others.

    Args:
        column (`str`, *optional*, defaults to `"target"`):
            The dataset's column with the text, e.g. `"text"` for LongText-Bench.
        kwargs: As of [`Scorer`]. The reader is not torch's, so `device`, `dtype` and `placement` make no difference.

    Raises:
        ImportError: at the first call, if RapidOCR is missing.
    """

    __name__ = "ocr"

    def __init__(self, column: str = "target", **kwargs: Any):
        super().__init__(**kwargs)
        self.column = column

    def load(self) -> nn.Module:
        return TextReader()

    def score(self, prompts: Sequence[str], images: Sequence[Image], **columns: Any) -> list[float | None]:
        given = columns.get(self.column) or [None] * len(prompts)
        targets = [text or quoted(prompt) for prompt, text in zip(prompts, given, strict=True)]
        return [
            None if target is None else closeness(self.model(image), target)  # type: ignore[misc]
            for image, target in zip(images, targets, strict=True)
        ]


class TextReader(nn.Module):
    """
    Reads pictures with RapidOCR.

    Args:
        params: Of RapidOCR, e.g. `{"Det.limit_type": "max"}`, beside those that keep it quiet.

    Raises:
        ImportError: if it is missing.
    """

    def __init__(self, **params: Any):
        super().__init__()
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise ImportError("reading the pictures needs RapidOCR: pip install 'diffusion-opd[rewards]'") from error
        # Lines lie the right way up in pictures from prompts, so what turns them round is left out, as Flow-GRPO does
        self._engine: Any = RapidOCR(params={"Global.log_level": "critical", "Global.use_cls": False, **params})

    def forward(self, image: Image) -> str:
        """All lines, joined without a space."""
        return "".join(self._engine(np.asarray(image.convert("RGB"))[:, :, ::-1]).txts or ())


def quoted(prompt: str) -> str | None:
    """What stands between the first pair of quotes."""
    found = _QUOTED.search(prompt)
    return found and (found[1] or found[2])


def closeness(read: str, target: str) -> float | None:
    """`1 - min(d, n) / n` of a reading to a text of `n` characters, as in [`OCR`]; `None` for a text of spaces."""
    read, target = (text.replace(" ", "").lower() for text in (read, target))
    if not target:
        return None
    distance = 0 if target in read else edit_distance(read, target)
    return 1 - min(distance, len(target)) / len(target)


def edit_distance(a: str, b: str) -> int:
    """The least number of characters to insert, delete or replace that makes one text of the other."""
    row = list(range(len(b) + 1))
    for i, one in enumerate(a, 1):
        previous, row = row, [i]
        for j, other in enumerate(b, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (one != other)))
    return row[-1]
