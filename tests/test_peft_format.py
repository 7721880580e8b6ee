"""Students of pipelines into which diffusers loads no LoRA: theirs is saved in PEFT's format."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline, WanPipeline
from huggingface_hub import ModelCard
from peft import PeftModel

from diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer
from tests.tiny_pipelines import BUILDERS, CALL
from tests.training import lora, trained
from tests.two_denoisers import TWO, TWO_CALL
from tests.zoo.check import predictions
from tests.zoo.known import PIPELINES

TINY = PIPELINES["PixArtSigmaPipeline"]


def trainer_of(out: Path, student=None, teacher=None, **kwargs) -> DiffusionOPDTrainer:
    extra = {key: kwargs.pop(key) for key in ("student_lora",) if key in kwargs}
    args = DiffusionOPDConfig(
        str(out),
        per_device_train_batch_size=2,
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        num_inference_steps=3,
        call_kwargs=dict(CALL["pixart_sigma"]),
        learning_rate=1e-2,
        disable_tqdm=True,
        image_steps=0,
        **kwargs,
    )
    data = Dataset.from_dict({"prompt": ["a fox", "a hill", "a lake", "an oak"]})
    config = None if extra else lora(lora_alpha=16)
    return DiffusionOPDTrainer(
        student or BUILDERS["pixart_sigma"](0),
        teacher or BUILDERS["pixart_sigma"](1),
        args,
        data,
        peft_config=config,
        **extra,
    )


def test_trained_killed_resumed_and_loaded(tmp_path, monkeypatch):
    """The lines of the card, where its folders lie, load it, in place."""
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "base"
    BUILDERS["pixart_sigma"](0).save_pretrained(base)
    whole = trainer_of(tmp_path / "run", str(base))
    whole.train()
    names = {path.name for path in (tmp_path / "run" / "checkpoint-2").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert not names & {"pytorch_lora_weights.safetensors", "transformer"}
    shutil.copytree(tmp_path / "run" / "checkpoint-1", tmp_path / "resumed" / "checkpoint-1")
    resumed = trainer_of(tmp_path / "resumed", str(base))
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(trained(whole), trained(resumed))

    whole.save_model()
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == 16 and config["base_model_name_or_path"] == base.name
    card = ModelCard.load(tmp_path / "run" / "README.md").text
    code = re.search(r"```python\n(.*?)```", card, re.S).group(1)
    assert "from peft import PeftModel\n" in code and "load_lora_weights" not in code
    lines, found = [line for line in code.splitlines() if "= pipe(" not in line], {}
    exec("\n".join(lines), found)  # noqa: S102
    for ours, theirs in zip(predictions(whole.pipeline, TINY), predictions(found["pipe"], TINY), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert isinstance(found["pipe"], DiffusionPipeline) and PeftModel.__name__ in found


def test_it_is_a_teacher_and_a_start_of_others(tmp_path):
    first = trainer_of(tmp_path / "first")
    first.train()
    first.save_model()
    learner = trainer_of(tmp_path / "second", teacher=str(tmp_path / "first"))
    before = learner.evaluate(learner.train_dataset)["eval_kl"]
    learner.train()
    assert before > 0 and learner.evaluate(learner.train_dataset)["eval_kl"] < before
    further = trainer_of(tmp_path / "third", student_lora=str(tmp_path / "first"))
    assert torch.equal(trained(further), trained(first))


def test_two_denoisers_need_a_loader(tmp_path):
    """PEFT's format is for one of them."""

    class Bare(WanPipeline):
        save_lora_weights = lora_state_dict = property()

    parts = TWO["wan22"](0)
    bare = Bare(**parts.components, boundary_ratio=0.875)
    args = DiffusionOPDConfig(str(tmp_path), use_cpu=True, call_kwargs=dict(TWO_CALL["wan22"]), num_inference_steps=3)
    with pytest.raises(ValueError, match="^Bare cannot load LoRAs in plain diffusers.*{'transformer': LoraConfig"):
        DiffusionOPDTrainer(bare, TWO["wan22"](1), args, Dataset.from_dict({"prompt": ["a"]}), peft_config=lora())
