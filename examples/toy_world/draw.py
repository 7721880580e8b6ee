"""Draws a prompt with a student of the demo: diffusers alone, nothing of the library that trained it.

    python -m examples.toy_world.draw runs/demo "a red circle"
    python -m examples.toy_world.draw runs/demo "make the circle blue" --image runs/demo/picture.png

The picture goes into the student's folder.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns at its import that there is no torchvision

from diffusers import FluxKontextPipeline  # noqa: E402
from PIL import Image  # noqa: E402

from examples.toy_world.pipeline import BASE, SAMPLING, quiet  # noqa: E402
from examples.toy_world.world import SIZE  # noqa: E402

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw a prompt with a LoRA of the toy world's base model.")
    parser.add_argument("lora", type=Path, help="its folder")
    parser.add_argument("prompt")
    parser.add_argument("--image", type=Path, help="a picture to change")
    options = parser.parse_args()
    quiet()
    pipe = FluxKontextPipeline.from_pretrained(BASE)
    pipe.load_lora_weights(options.lora, weight_name="pytorch_lora_weights.safetensors")
    image = Image.open(options.image).convert("RGB").resize((SIZE, SIZE)) if options.image else None
    path = options.lora / ("edited.png" if image else "picture.png")
    pipe(image, options.prompt, **SAMPLING).images[0].resize((256, 256)).save(path)
    print(path)
