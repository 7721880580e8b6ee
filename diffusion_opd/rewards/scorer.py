"""What scorers with a model share: when it is loaded, where it lies, how many pictures it is given, and frames.

This file knows pictures and modules, and no model by name.
"""

import contextlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from PIL.Image import Image
from torch import nn

from ..errors import one_sentence

SCALES = ("training", "table")
# Of a scorer, what may be another without another score
_ANYWHERE = ("model", "device", "batch_size", "placement", "_at_work")
PLACEMENTS = ("device", "cpu")


class Scorer(ABC):
    """
    A reward function that asks a model.

    The model is loaded at the first call, once in each process, and kept in main memory between calls.

    Args:
        device (`str` or `torch.device`, *optional*):
            Where the model computes. `None`: the process's accelerator, or the CPU.
        dtype (`torch.dtype` or its name, *optional*, defaults to `"float32"`):
            Of the model's weights.
        batch_size (`int`, *optional*, defaults to `8`):
            Pictures of one forward pass.
        placement (`str`, *optional*, defaults to `"cpu"`):
            Where the model lies between calls: `"cpu"` leaves the device's memory to the denoiser, `"device"` saves
            the way there and back. Trainers keep it on the device over a whole rollout, and over an evaluation.
        num_frames (`int`, *optional*, defaults to `4`):
            Of a video so many frames are scored, evenly spaced from the first to the last; its score is their mean.
        scale (`str`, *optional*, defaults to `"training"`):
            `"training"`: the number that rewards are made of. `"table"`: the number that papers print.

    Raises:
        ValueError: for arguments out of range.
    """

    __name__ = "scorer"  # as metrics are called

    def __init__(
        self,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "float32",
        batch_size: int = 8,
        placement: str = "cpu",
        num_frames: int = 4,
        scale: str = "training",
    ):
        self.device, self.batch_size, self.placement = device, batch_size, placement
        self.dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        self.num_frames, self.scale = num_frames, scale
        self.model: nn.Module | None = None
        self._at_work = 0
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise ValueError(f"`dtype` of {self.__name__} must be one of floats, as 'bfloat16' is, got {dtype!r}.")
        for name, value, choices in (("scale", scale, SCALES), ("placement", placement, PLACEMENTS)):
            if value not in choices:
                raise ValueError(f"`{name}` of {self.__name__} must be one of {list(choices)}, got {value!r}.")
        for name, number in (("batch_size", batch_size), ("num_frames", num_frames)):
            if number < 1:
                raise ValueError(f"`{name}` of {self.__name__} must be at least 1, got {number}.")

    def made_of(self) -> dict[str, Any]:
        """What its numbers depend on: what a resumed run must have again."""
        return {key: value for key, value in vars(self).items() if key not in _ANYWHERE} | {"dtype": str(self.dtype)}

    def prepare(self) -> None:
        """Loads the model, which the first call does otherwise: what is missing is told before it is needed."""
        if self.model is None:
            self.model = self.load().to(self.dtype).eval().requires_grad_(False)

    @abstractmethod
    def load(self) -> nn.Module:
        """The model, on the CPU, and whatever else `score` needs."""

    @abstractmethod
    def score(self, prompts: Sequence[str], images: Sequence[Image], **columns: Any) -> Sequence[float | None]:
        """One number a picture, on `scale`, or `None` where there is none; at most `batch_size` of them, RGB. The
        model is on its device; gradients are off."""

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], images: Sequence[Any], **columns: Any) -> list[float | None]:
        frames = [frames_of(image, self.num_frames) for image in images]
        flat = [(row, frame) for row, own in enumerate(frames) for frame in own]
        scores: list[list[float | None]] = [[] for _ in images]
        with self.at_work():
            for start in range(0, len(flat), self.batch_size):
                rows = [row for row, _ in flat[start : start + self.batch_size]]
                pictures = [frame for _, frame in flat[start : start + self.batch_size]]
                own = {
                    key: [values[row] for row in rows] for key, values in columns.items() if _of_rows(values, images)
                }
                for row, score in zip(rows, self.score([prompts[row] for row in rows], pictures, **own), strict=True):
                    if score is not None and not math.isfinite(score):
                        raise ValueError(f"the scorer {self.__name__!r} gave {score} for {prompts[row]!r}.")
                    scores[row].append(None if score is None else float(score))
        return [None if None in own else sum(own) / len(own) for own in scores]  # type: ignore[arg-type]

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Keeps the model on its device over several calls."""
        self.prepare()
        model: Any = self.model
        if self.device is None:
            accelerator = torch.accelerator.current_accelerator()
            self.device = (
                "cpu"
                if accelerator is None
                else torch.device(accelerator.type, torch.accelerator.current_device_index())
            )
        model.to(self.device)
        self._at_work += 1
        try:
            yield
        finally:
            self._at_work -= 1
            if self.placement == "cpu" and not self._at_work:
                model.to("cpu")


def frames_of(image: Any, most: int) -> list[Image]:
    """A picture, or of a video at most so many of its frames, evenly spaced; RGB."""
    if isinstance(image, Image):
        return [image.convert("RGB")]
    count = min(most, len(image))
    places = [round(index * (len(image) - 1) / max(1, count - 1)) for index in range(count)]
    return [image[place].convert("RGB") for place in places]


def read_pickle(path: str | os.PathLike, file: str, name: str) -> dict[str, Any]:
    """The weights in a pickle, of which nothing but tensors and plain containers is read.

    Args:
        path (`str`): Hub id, folder or file.
        file (`str`): Its name in a repository or a folder.
        name (`str`): Of the scorer, for the message.

    Raises:
        ValueError: if it cannot be had, or holds anything else.
    """
    with one_sentence(f"the weights {file!r} of {str(path)!r} for the scorer {name!r} cannot be loaded"):
        place = Path(path)
        if place.is_dir():
            place = place / file
        elif not place.is_file():
            place = Path(hf_hub_download(str(path), file))
        return torch.load(place, map_location="cpu", weights_only=True)


def _of_rows(values: Any, images: Sequence[Any]) -> bool:
    return isinstance(values, (list, tuple)) and len(values) == len(images)
