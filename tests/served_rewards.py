"""Reward functions that the tests of the reward server let it serve, by their dotted paths."""

import threading
import time

from PIL import ImageStat

RUNNING = threading.Semaphore(1)


def brightness(prompts, images, bonus=None, **columns):
    """Mean of the pictures, of a video of its frames, and the column `bonus`; one request at a time."""
    if not RUNNING.acquire(blocking=False):
        raise RuntimeError("two requests at once")
    try:
        time.sleep(0.01)
        videos = [image if isinstance(image, list) else [image] for image in images]
        means = [sum(ImageStat.Stat(frame.convert("L")).mean[0] for frame in video) / len(video) for video in videos]
        bonus = bonus or [0.0] * len(means)
        return [None if prompt == "no score" else m + b for prompt, m, b in zip(prompts, means, bonus, strict=True)]
    finally:
        RUNNING.release()


def length(prompts, images, wanted):
    return [float(abs(len(prompt) - number)) for prompt, number in zip(prompts, wanted, strict=True)]


def broken(prompts, images):
    raise RuntimeError("the scorer's model is gone")


def miscounts(prompts, images):
    return [1.0]
