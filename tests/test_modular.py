"""Modular pipelines as students and teachers: by object, by folder and by Hub id, saved, killed and resumed."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from diffusers import FluxPipeline, ModularPipeline
from huggingface_hub import ModelCard

from diffusion_opd import (
    DiffusionGRPOConfig,
    DiffusionGRPOTrainer,
    DiffusionNFTConfig,
    DiffusionNFTTrainer,
    DiffusionOPDConfig,
    DiffusionOPDTrainer,
    Teacher,
)
from tests.hub_server import HubServer, client
from tests.tiny_pipelines import flux
from tests.training import lora, trained
from tests.zoo import ZOO
from tests.zoo.check import predictions

TINY = ZOO["FluxModularPipeline"]
PROMPTS = ["a red fox", "an old tree", "a far hill", "a dry lake"]
DATA = Dataset.from_dict({"prompt": PROMPTS})


def config(out: Path, cls: Any = DiffusionOPDConfig, **kwargs: Any) -> Any:
    defaults = dict(
        per_device_train_batch_size=2,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        num_inference_steps=4,
        call_kwargs=dict(TINY.call),
        learning_rate=1e-2,
        disable_tqdm=True,
        image_steps=0,
    )
    return cls(str(out), **(defaults | kwargs))


def saved(folder: Path, seed: int) -> str:
    TINY.make(seed).save_pretrained(str(folder), overwrite_modular_index=True)
    return str(folder)


def test_the_users_own_pipeline_stays_what_it_is(tmp_path):
    """Of its class, with its blocks and guiders, and called as modular pipelines are."""
    tiny = ZOO["StableDiffusion3ModularPipeline"]
    pipe = tiny.make(0)
    blocks, guider = pipe._blocks, pipe.guider
    args = config(tmp_path, call_kwargs=dict(tiny.call))
    trainer = DiffusionOPDTrainer(pipe, tiny.make(1), args, DATA, peft_config=lora())
    trainer.train()
    assert trainer.pipeline is pipe and type(pipe).__name__ == "StableDiffusion3ModularPipeline"
    assert isinstance(pipe, ModularPipeline) and pipe._blocks is blocks and pipe.guider is guider
    call = {key: value for key, value in tiny.call.items() if key != "guidance_scale"}
    state = pipe(prompt=["a fox"], num_inference_steps=2, generator=torch.Generator().manual_seed(0), **call)
    assert len(state.images) == 1 and state.latents.isfinite().all()
    (image,) = pipe(prompt=["a fox"], num_inference_steps=2, output="images", **call)
    assert image.size == (16, 16)


def test_by_folder_from_the_first_step_to_plain_diffusers(tmp_path):
    """Student and teacher; evaluated, drawn, killed and resumed; what is saved loads where modular pipelines do."""
    student, teacher = saved(tmp_path / "base", 0), saved(tmp_path / "specialist", 1)
    settings = dict(save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, image_steps=2)

    def make(out: Path, **kwargs: Any) -> DiffusionOPDTrainer:
        args = config(out, **settings)
        return DiffusionOPDTrainer(student, teacher, args, DATA, DATA, **kwargs)

    for way, kwargs in {"lora": {"peft_config": lora()}, "full": {}}.items():
        whole = make(tmp_path / way, **kwargs)
        whole.train()
        kls = [entry["eval_kl"] for entry in whole.state.log_history if "eval_kl" in entry]
        assert len(kls) == 2 and kls[1] < kls[0]
        assert len(list((tmp_path / way / "images" / "step_000002").glob("*.png"))) == 4
        shutil.copytree(tmp_path / way / "checkpoint-1", tmp_path / f"{way}_resumed" / "checkpoint-1")
        resumed = make(tmp_path / f"{way}_resumed", **kwargs)
        resumed.train(resume_from_checkpoint=True)
        assert torch.equal(trained(whole), trained(resumed))

        whole.save_model(str(tmp_path / "moved_from"))
        folder = shutil.move(tmp_path / "moved_from", tmp_path / f"{way}_saved")
        plain = ModularPipeline.from_pretrained(str(folder) if way == "full" else student)
        plain.load_components()
        if way == "lora":
            plain.load_lora_weights(str(folder), weight_name="pytorch_lora_weights.safetensors")
        for ours, theirs in zip(predictions(whole.pipeline, TINY), predictions(plain, TINY), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        card = ModelCard.load(tmp_path / way / "README.md").text
        assert "from diffusers import ModularPipeline" in card and "pipe.load_components(" in card
        assert 'output="images")[0]' in card


@pytest.mark.parametrize("name", ["WanModularPipeline", "LTX2ModularPipeline", "FluxKontextModularPipeline"])
def test_videos_and_pictures_are_drawn(tmp_path, name, caplog):
    """In half precision, from a folder; of an edited picture with its source beside it."""
    tiny = ZOO[name]
    tiny.make(0).save_pretrained(str(tmp_path / "base"), overwrite_modular_index=True)
    rows = Dataset.from_dict({"prompt": PROMPTS[:2], **tiny.inputs})
    args = config(tmp_path / "run", max_steps=1, bf16=True, image_steps=1, call_kwargs=dict(tiny.call))
    trainer = DiffusionOPDTrainer(str(tmp_path / "base"), tiny.make(1), args, rows, peft_config=lora())
    trainer.train()
    assert "could not be drawn" not in caplog.text
    names = sorted(path.name for path in (tmp_path / "run" / "images" / "step_000001").glob("*.png"))
    assert names == (["00.png", "00_beside.png", "01.png", "01_beside.png"] if tiny.inputs else ["00.png", "01.png"])


def test_a_teacher_may_be_modular_or_not(tmp_path):
    """A plain FLUX.1 learns from a modular one as from a plain one of the same weights, and the other way round."""
    plain = [flux(seed, guidance_embeds=True) for seed in (0, 1)]
    modular = [TINY.make(seed) for seed in (0, 1)]
    losses = []
    for student, teacher in ((plain[0], plain[1]), (plain[0], modular[1]), (modular[0], plain[1])):
        args = config(tmp_path, max_steps=1)
        trainer = DiffusionOPDTrainer(student, Teacher(teacher, id="t"), args, DATA)
        trainer.train()
        losses.append(next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))
        student.transformer.load_state_dict(flux(0, guidance_embeds=True).transformer.state_dict())
    assert losses[0] > 0 and losses == pytest.approx([losses[0]] * 3, rel=1e-4)
    assert isinstance(plain[0], FluxPipeline)


def red(images: list[Any], **columns: Any) -> list[float]:
    return [sum(image.convert("RGB").resize((1, 1)).getpixel((0, 0))[:1]) / 255 for image in images]


@pytest.mark.parametrize(
    ("cls", "config_class"), [(DiffusionNFTTrainer, DiffusionNFTConfig), (DiffusionGRPOTrainer, DiffusionGRPOConfig)]
)
def test_learning_from_rewards(tmp_path, cls, config_class):
    call = {name: value for name, value in TINY.call.items() if name != "guidance_scale"}
    settings = dict(per_device_train_batch_size=4, num_generations=2, guidance_scale=3.5, call_kwargs=call)
    args = config(tmp_path, config_class, **settings)
    trainer = cls(TINY.make(0), red, args, DATA, peft_config=lora())
    before = trained(trainer).clone()
    trainer.train()
    assert not torch.equal(before, trained(trainer))


def test_a_part_that_cannot_be_loaded_is_named(tmp_path):
    folder = saved(tmp_path / "base", 0)
    shutil.rmtree(Path(folder, "transformer"))
    with pytest.raises(ValueError, match=r"the student '.*base' cannot be loaded.*its transformer cannot be loaded"):
        DiffusionOPDTrainer(folder, TINY.make(1), config(tmp_path), DATA)
    with pytest.raises(
        ValueError, match=r"teacher 'base': '.*base' cannot be loaded as a modular pipeline.*transformer"
    ):
        DiffusionOPDTrainer(TINY.make(0), folder, config(tmp_path), DATA)


CLIENT = """
import torch
from datasets import Dataset
from diffusers import ModularPipeline
from diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer
from tests.zoo import ZOO
from tests.zoo.check import predictions

tiny = ZOO["FluxModularPipeline"]
for name, seed in (("base", 0), ("specialist", 1)):
    tiny.make(seed).save_pretrained(name, repo_id=f"acme/{name}", push_to_hub=True, overwrite_modular_index=True)
args = DiffusionOPDConfig("out", max_steps=1, report_to="none", use_cpu=True, bf16=False, num_inference_steps=3)
args.per_device_train_batch_size, args.call_kwargs, args.image_steps = 2, tiny.call, 0
args.push_to_hub, args.hub_model_id, args.save_strategy, args.learning_rate = True, "me/student", "no", 1e-2
data = Dataset.from_dict({"prompt": ["a fox", "a hill"]})
trainer = DiffusionOPDTrainer("acme/base", "acme/specialist", args, data)
trainer.train()
trainer.push_to_hub()
plain = ModularPipeline.from_pretrained("me/student")
plain.load_components()
pairs = list(zip(predictions(trainer.pipeline, tiny), predictions(plain, tiny), strict=True))
untrained = predictions(tiny.make(0), tiny)
result = {
    "gap": max((a - b).abs().max().item() for a, b in pairs),
    "moved": max((a - b).abs().max().item() for (a, _), b in zip(pairs, untrained, strict=True)),
}
"""


def test_by_hub_id(tmp_path):
    """Pushed in full, it loads by its id alone, on any machine."""
    with HubServer() as hub:
        result = client(hub, tmp_path, CLIENT)
        index = hub.repositories["models/me/student"].at("main").files["modular_model_index.json"].data.decode()
    assert result["gap"] < 1e-5 < 1e-3 < result["moved"]
    assert '"me/student"' in index and str(tmp_path) not in index and '"out"' not in index
