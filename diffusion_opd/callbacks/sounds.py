"""Sample sounds of pipelines that make audio: what a tracker plays, and a file.

This file knows pipelines, and no trainer.
"""

import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Sound:
    """
    A sound.

    Args:
        samples (`np.ndarray`): Of shape `[channels, samples]`, float32 in [-1, 1].
        rate (`int`): Samples a second.
    """

    samples: np.ndarray
    rate: int

    def save(self, path: Path) -> None:
        """Writes it as WAV, 16 bit."""
        with wave.open(str(path), "wb") as file:
            file.setnchannels(len(self.samples))
            file.setsampwidth(2)
            file.setframerate(self.rate)
            file.writeframes((self.samples.T.clip(-1, 1) * 32767).astype("<i2").tobytes())


def sampling_rate(pipeline: DiffusionPipeline) -> int | None:
    """Samples a second of what a pipeline makes, as its vocoder or VAE says; `None` for one that makes no audio."""
    parts = [getattr(pipeline, name, None) for name in ("vocoder", "audio_vae", "vae")]
    for part in parts:
        config = getattr(part, "config", {})
        for name in ("output_sampling_rate", "sampling_rate", "sample_rate"):
            if (rate := getattr(config, name, None)) is not None:
                return int(rate)
    return None


def makes_sound(pipeline: DiffusionPipeline) -> bool:
    """Whether a pipeline makes audio alone."""
    shows = any(hasattr(pipeline, name) for name in ("image_processor", "video_processor"))
    return not shows and sampling_rate(pipeline) is not None


def as_sound(value: Any, rate: int | None) -> Sound:
    """What a pipeline made of one sample: an array or tensor of shape `[samples]` or `[channels, samples]`."""
    samples = value.detach().float().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    return Sound(np.atleast_2d(samples.astype(np.float32)), rate or 16000)
