"""Pipelines that make sound: what is heard of a run."""

import json
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer
from diffusion_opd.callbacks.sounds import Sound
from tests.training import lora
from tests.zoo import ZOO

FAMILIES = pytest.mark.parametrize("name", ["StableAudioPipeline", "AceStepPipeline", "LongCatAudioDiTPipeline"])
RATES = {"StableAudioPipeline": 16, "AceStepPipeline": 50, "LongCatAudioDiTPipeline": 8}


def heard(path: Path) -> tuple[int, np.ndarray]:
    with wave.open(str(path)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
        return file.getframerate(), samples.reshape(-1, file.getnchannels()).T


@FAMILIES
def test_a_run_is_heard(tmp_path, name):
    """As WAV files, in TensorBoard and on the card, which says how the sound is made."""
    tiny = ZOO[name]
    args = DiffusionOPDConfig(
        str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=2,
        save_strategy="steps",
        save_steps=2,
        report_to="tensorboard",
        use_cpu=True,
        num_inference_steps=4,
        call_kwargs=dict(tiny.call),
        image_steps=2,
        disable_tqdm=True,
    )
    data = Dataset.from_dict({"prompt": ["rain on a roof", "a far drum roll"] * 2})
    trainer = DiffusionOPDTrainer(
        tiny.make(0), tiny.make(1), args, data, peft_config=lora(target_modules=tiny.lora_targets)
    )
    trainer.train()
    folder = tmp_path / "images" / "step_000002"
    sounds = sorted(folder.glob("*.wav"))
    assert [path.name for path in sounds] == ["00.wav", "01.wav", "02.wav", "03.wav"]
    assert json.loads((folder / "captions.json").read_text()) == list(data["prompt"])
    (again,) = trainer.sample_images([data["prompt"][0]])
    assert isinstance(again, Sound) and again.rate == RATES[name]
    rate, samples = heard(sounds[0])
    assert rate == again.rate and samples.shape == again.samples.shape
    np.testing.assert_allclose(samples / 32767, again.samples.clip(-1, 1), atol=1e-4)

    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "text-to-audio"
    assert card.data.widget[0]["output"]["url"] == "images/step_000002/00.wav"
    assert ").audios[0]" in card.text and "audio = pipe(" in card.text
    assert "from peft import PeftModel" in card.text or hasattr(type(trainer.pipeline), "load_lora_weights")
    events = EventAccumulator(str(next(tmp_path.glob("runs/*"))), size_guidance={"audio": 0})
    events.Reload()
    assert events.Tags()["audio"] == [f"samples/0{number}" for number in range(4)]


def test_a_sound_is_written_as_it_is(tmp_path):
    """Two channels, clipped where it is too loud."""
    samples = torch.tensor([[0.0, 0.5, -0.5, 2.0], [1.0, -1.0, 0.25, -3.0]]).numpy()
    Sound(samples, 8000).save(tmp_path / "a.wav")
    rate, written = heard(tmp_path / "a.wav")
    assert rate == 8000
    np.testing.assert_allclose(written / 32767, samples.clip(-1, 1), atol=1e-4)
