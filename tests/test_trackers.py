"""What reaches Weights & Biases (offline) and Trackio (its local database) from a run with rewards; TensorBoard is in
test_trainer.py. In a process of its own: both keep threads and settings for the whole process."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

RUN = """
import sys
from datasets import Dataset
from peft import LoraConfig
from diffusion_opd import DiffusionGRPOConfig, DiffusionGRPOTrainer
from tests.tiny_pipelines import BUILDERS, CALL, LORA_TARGETS

def dark(prompts, images, **columns):
    return [1 - sum(image.convert("L").tobytes()) / len(image.convert("L").tobytes()) / 255 for image in images]

args = DiffusionGRPOConfig("out", max_steps=2, report_to=sys.argv[1], logging_steps=1, image_steps=2, num_generations=2)
args.per_device_train_batch_size, args.num_inference_steps, args.call_kwargs = 4, 3, CALL["sd3"]
prompts = Dataset.from_dict({"prompt": ["a", "b", "c", "d"]})
lora = LoraConfig(r=2, target_modules=LORA_TARGETS)
DiffusionGRPOTrainer(BUILDERS["sd3"](0), dark, args, prompts, peft_config=lora).train()
"""
SOUND = """
import sys
from datasets import Dataset
from diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer
from tests.zoo import ZOO

tiny = ZOO["StableAudioPipeline"]
args = DiffusionOPDConfig("out", max_steps=1, report_to=sys.argv[1], image_steps=1, num_inference_steps=3)
args.per_device_train_batch_size, args.call_kwargs = 2, tiny.call
DiffusionOPDTrainer(tiny.make(0), tiny.make(1), args, Dataset.from_dict({"prompt": ["rain", "a drum"]})).train()
"""
METRICS = {"train/reward", "train/reward_std", "train/rewards/dark/mean", "train/rewards/dark/std"}


def start(script: str, tracker: str, folder: Path) -> None:
    place = {"WANDB_MODE": "offline", "WANDB_DIR": str(folder), "TRACKIO_DIR": str(folder / "trackio")}
    environment = os.environ | place | {"PYTHONPATH": str(Path(__file__).parent.parent), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, tracker],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def run(tracker: str, folder: Path) -> tuple[list[str], list[Image.Image]]:
    """The captions and sample images of a run, from its own folder."""
    start(RUN, tracker, folder)
    images = folder / "out" / "images" / "step_000002"
    captions = json.loads((images / "captions.json").read_text())
    assert len(captions) == 4 and all(", dark 0." in caption for caption in captions)
    return captions, [Image.open(path) for path in sorted(images.glob("*.png"))]


@pytest.mark.slow
def test_weights_and_biases(tmp_path):
    captions, drawn = run("wandb", tmp_path)
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    shown = {Image.open(path).tobytes() for path in (folder / "files" / "media" / "images").glob("samples_*.png")}
    assert shown == {image.tobytes() for image in drawn}
    (records,) = folder.glob("*.wandb")
    written = records.read_bytes()
    assert all(name.encode() in written for name in METRICS | set(captions))


@pytest.mark.slow
def test_trackio(tmp_path):
    captions, drawn = run("trackio", tmp_path)
    (database,) = tmp_path.glob("trackio/*.db")
    with sqlite3.connect(database) as connection:
        records = [json.loads(row) for (row,) in connection.execute("select metrics from metrics")]
    assert sum(METRICS <= record.keys() for record in records) == 2
    (samples,) = [record["samples"] for record in records if "samples" in record]
    assert samples["caption"] == " | ".join(captions)
    grid = Image.open(tmp_path / "trackio" / "media" / samples["file_path"]).convert("RGB")
    width = drawn[0].width
    tiles = [grid.crop((index * width, 0, (index + 1) * width, grid.height)) for index in range(len(drawn))]
    assert [tile.tobytes() for tile in tiles] == [image.tobytes() for image in drawn]


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_sounds(tmp_path, tracker):
    """The very files are played."""
    start(SOUND, tracker, tmp_path)
    drawn = {path.read_bytes() for path in (tmp_path / "out" / "images" / "step_000001").glob("*.wav")}
    where = "wandb/offline-run-*/files/media/audio/*.wav" if tracker == "wandb" else "trackio/media/**/*.wav"
    shown = {path.read_bytes() for path in tmp_path.glob(where)}
    assert len(drawn) == 2 and shown == drawn
