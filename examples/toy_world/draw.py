"""Draws a prompt with a student of the demo: diffusers alone, nothing of the library that trained it.

    python -m examples.toy_world.draw runs/demo "a yellow circle at dusk"

The picture goes into the student's folder.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns at its import that there is no torchvision

from diffusers import StableDiffusion3Pipeline  # noqa: E402

from examples.toy_world.pipeline import BASE, SAMPLING, quiet  # noqa: E402

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw a prompt with a LoRA of the toy world's base model.")
    parser.add_argument("lora", type=Path, help="its folder")
    parser.add_argument("prompt")
    options = parser.parse_args()
    quiet()
    pipe = StableDiffusion3Pipeline.from_pretrained(BASE)
    pipe.load_lora_weights(options.lora, weight_name="pytorch_lora_weights.safetensors")
    path = options.lora / "picture.png"
    pipe(options.prompt, **SAMPLING).images[0].resize((256, 256)).save(path)
    print(path)
