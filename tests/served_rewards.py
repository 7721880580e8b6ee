"""Reward functions that the tests of the reward server let it serve, by their dotted paths."""

import asyncio
import threading
import time
from pathlib import Path

from PIL import ImageChops, ImageStat

RUNNING = threading.Semaphore(1)


def brightness(prompts, images, bonus=None, **columns):
    """Mean of the pictures, of a video of its frames, and the column `bonus`; refuses two requests at a time."""
    if not RUNNING.acquire(blocking=False):
        raise RuntimeError("two requests at once")
    try:
        time.sleep(0.01)
        videos = [image if isinstance(image, list) else [image] for image in images]
        means = [sum(ImageStat.Stat(frame.convert("L")).mean[0] for frame in video) / len(video) for video in videos]
        scores = [mean + more for mean, more in zip(means, bonus or [0.0] * len(means), strict=True)]
        special = {"no score": None, "nan": float("nan")}
        return [special.get(prompt, score) for prompt, score in zip(prompts, scores, strict=True)]
    finally:
        RUNNING.release()


def length(prompts, images, wanted):
    return [float(abs(len(prompt) - number)) for prompt, number in zip(prompts, wanted, strict=True)]


class Halved:
    """On the scale of training half of what a table has."""

    __name__ = "halved"

    def __init__(self):
        self.scale = "training"

    def __call__(self, images):
        return [(0.5 if self.scale == "training" else 1.0) * mean for mean in brightness([""] * len(images), images)]


async def difference(images, source):
    """Of each picture and that of the column `source`, if there is one."""
    await asyncio.sleep(0)
    apart = [other and ImageChops.difference(image, other) for image, other in zip(images, source, strict=True)]
    return [other and ImageStat.Stat(other).mean[0] for other in apart]


def gated(prompts, images, folder):
    """Writes down that it was asked, and answers when the folder holds a file `open`."""
    with Path(folder, "asked").open("a") as file:
        file.write(f"{prompts[0]}\n")
    while not Path(folder, "open").exists():
        time.sleep(0.01)
    return [float(len(prompt)) for prompt in prompts]


def broken(prompts, images):
    raise RuntimeError("the scorer's model is gone")


def miscounts(prompts, images):
    return [1.0]
