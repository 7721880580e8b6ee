"""A second judge of the text task that nobody here wrote: RapidOCR reads the pictures, enlarged.

    pip install -e ".[rewards]"
    python -m examples.toy_world.study.ocr                         # base, text specialist
    python -m examples.toy_world.study.ocr runs/study/opd/seed-0   # and these students

The same prompts, noise and score (1 - edit distance / length) as the world's own judge, whose score stands beside it.
Upper and lower case count as the same: an O alone has none.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from diffusion_opd.rewards.ocr import TextReader
from examples.toy_world.evaluate import SEED, generate
from examples.toy_world.judges import edit_distance, judge_text
from examples.toy_world.pipeline import TEACHERS, load_base
from examples.toy_world.world import SIZE, Prompt, sample_prompts

SCALE = 4


def reader() -> Callable[[Image.Image], str]:
    """Reads what stands in a picture.

    Raises:
        ImportError: if RapidOCR is missing.
    """
    # "max": a picture is taken as it is; by default its short side would be enlarged to 736 pixels
    engine = TextReader(**{"Det.limit_side_len": SCALE * SIZE, "Det.limit_type": "max"})

    def read(picture: Image.Image) -> str:
        return engine(picture.convert("RGB").resize((SCALE * SIZE,) * 2, Image.Resampling.BICUBIC))

    return read


def score(read: Callable[[Image.Image], str], picture: Image.Image, prompt: Prompt) -> float:
    found = "".join(character for character in read(picture).upper() if character.isalnum())
    return max(0.0, 1 - edit_distance(found, prompt.string) / len(prompt.string))


def main(loras: list[Path], n: int) -> dict[str, tuple[float, float]]:
    """Mean scores of the world's reader and of the OCR package, by model."""
    read, prompts, table = reader(), sample_prompts("text", n, SEED, heldout=True), {}
    print("| model | own reader | RapidOCR |\n|---|---|---|")
    for lora in [None, TEACHERS / "text", *loras]:
        pipeline = load_base()
        if lora is not None:
            pipeline.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")
        pictures = generate(pipeline, prompts, SEED)
        pairs = list(zip(pictures, prompts, strict=True))
        own, other = (np.mean([judge(*pair) for pair in pairs]) for judge in (judge_text, lambda *p: score(read, *p)))
        name = "base" if lora is None else "text teacher" if lora == TEACHERS / "text" else "/".join(lora.parts[-2:])
        table[name] = (float(own), float(other))
        print(f"| {name} | {own:.3f} | {other:.3f} |", flush=True)
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Let an OCR package read the text task.")
    parser.add_argument("loras", nargs="*", type=Path, help="student folders")
    parser.add_argument("-n", type=int, default=120, help="held-out prompts")
    options = parser.parse_args()
    main(options.loras, options.n)
