"""Pipelines of two denoisers, one for high noise and one for low (Wan 2.2), from the first step to plain diffusers."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline, WanPipeline
from peft import LoraConfig
from torch import Tensor
from transformers import TrainerCallback
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from diffusion_opd import (
    DiffusionGRPOConfig,
    DiffusionGRPOTrainer,
    DiffusionNFTConfig,
    DiffusionNFTTrainer,
    DiffusionOPDConfig,
    DiffusionOPDTrainer,
    Teacher,
)
from diffusion_opd.policy import Policy
from diffusion_opd.sampling import seed_of
from diffusion_opd.transitions import ode
from tests.one_by_one import loss_of, run
from tests.tiny_pipelines import BUILDERS, LORA_TARGETS, wan
from tests.training import lora, trained
from tests.two_denoisers import TWO, TWO_CALL, TWO_INPUTS

PROMPTS = ["a red fox", "two blue birds", "a boat", "snow"]
STEPS = 4
FILES = {"transformer": "pytorch_lora_weights.safetensors"}
FILES["transformer_2"] = "pytorch_lora_weights_transformer_2.safetensors"
families = pytest.mark.parametrize("family", TWO)


def config(out: Path, family: str, **kwargs: Any) -> DiffusionOPDConfig:
    defaults = dict(
        per_device_train_batch_size=2,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        num_inference_steps=STEPS,
        call_kwargs=dict(TWO_CALL[family]),
        learning_rate=1e-2,
        disable_tqdm=True,
        image_steps=0,
    )
    return DiffusionOPDConfig(str(out), **(defaults | kwargs))


def rows(family: str) -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS, **TWO_INPUTS[family]})


def trainer_of(
    out: Path,
    family: str = "wan22",
    teachers: Any = None,
    peft_config: Any = "lora",
    callbacks: Any = None,
    **kwargs: Any,
) -> DiffusionOPDTrainer:
    return DiffusionOPDTrainer(
        TWO[family](0),
        teachers or TWO[family](1),
        config(out, family, **kwargs),
        rows(family),
        peft_config=lora(init_lora_weights=False) if peft_config == "lora" else peft_config,
        callbacks=callbacks,
    )


def predictions(pipe: DiffusionPipeline, family: str = "wan22") -> list[Tensor]:
    """At all steps of a sample, of both denoisers."""
    row = {"prompt": PROMPTS[0]} | {name: values[0] for name, values in TWO_INPUTS[family].items()}
    return [step.prediction for step in run(pipe, row, TWO_CALL[family], 3, STEPS)]


def assert_alike(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Gradients(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


@families
def test_a_walk_is_the_pipelines_own_run(family):
    policy = Policy(TWO[family](0), STEPS, TWO_CALL[family])
    row = {"prompt": PROMPTS[0]} | {name: values[0] for name, values in TWO_INPUTS[family].items()}
    inputs = {name: [value] for name, value in row.items()}
    with (
        torch.no_grad(),
        policy.walk(
            inputs,
            [torch.Generator().manual_seed(3)],
            lambda step: ode(step.sample, step.prediction, step.schedule, step.index).mean,
        ) as walk,
    ):
        visits = list(walk)
    assert [sorted(visit.denoisers) for visit in visits] == [["transformer"]] * 2 + [["transformer_2"]] * 2
    assert_alike([visit.steps[0].prediction for visit in visits], predictions(TWO[family](0), family))


@families
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_the_gradient_of_both_is_that_of_two_passes(tmp_path, family, full):
    gradients, batches = Gradients(), []

    class Watch(DiffusionOPDTrainer):
        def training_step(self, model, inputs, *args):
            batches.append(inputs)
            return super().training_step(model, inputs, *args)

    trainer = Watch(
        TWO[family](0),
        TWO[family](1),
        config(tmp_path, family, max_steps=1, max_grad_norm=0.0),
        rows(family),
        peft_config=None if full else lora(init_lora_weights=False),
        callbacks=[gradients],
    )
    assert {name for place in trainer.learnt for name in trainer.plan[place].denoisers} == set(FILES)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            p.copy_(before[name])
    ((batch,), (found,)) = batches, gradients.seen
    given = [{name: row[name] for name in ("prompt", *TWO_INPUTS[family])} for row in batch]
    seeds = [seed_of(42, 0, 0, 0, index) for index in range(len(batch))]
    loss = loss_of(
        trainer.pipeline,
        TWO[family](1),
        list(zip(given, given, strict=True)),
        TWO_CALL[family],
        seeds,
        STEPS,
        STEPS - 1,
    )
    weights = {name: p for name, p in trainer.model.named_parameters() if name in found}
    expected = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
    for part in FILES:
        scale = max(gradient.abs().max() for name, gradient in expected.items() if name.startswith(f"{part}."))
        assert scale > 0
        for name in expected:
            if name.startswith(f"{part}."):
                torch.testing.assert_close(found[name] / scale, expected[name] / scale, rtol=1e-3, atol=1e-4)


@families
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_a_run_from_two_experts_to_plain_diffusers(tmp_path, family, full):
    """Trained, drawn, resumed, and loaded in plain diffusers."""
    settings = dict(save_strategy="steps", save_steps=1, image_steps=2, ema_decay=0.5, ema_update_every=1)
    make = dict(family=family, peft_config=None if full else "lora", **settings)
    whole = trainer_of(tmp_path / "whole", **make)
    whole.train()
    assert len(list((tmp_path / "whole" / "images" / "step_000002").glob("0?.png"))) == 4
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "resumed" / "checkpoint-1")
    resumed = trainer_of(tmp_path / "resumed", **make)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(trained(whole), trained(resumed))

    whole.save_model(str(tmp_path / "saved"))
    if full:
        plain = DiffusionPipeline.from_pretrained(tmp_path / "saved")
        plain.set_progress_bar_config(disable=True)
    else:
        plain = TWO[family](0)
        plain.load_lora_weights(tmp_path / "saved", weight_name=FILES["transformer"])
        plain.load_lora_weights(tmp_path / "saved", weight_name=FILES["transformer_2"], load_into_transformer_2=True)
    assert_alike(predictions(whole.pipeline, family), predictions(plain, family))
    card = (tmp_path / "whole" / "README.md").read_text()
    assert ("load_into_transformer_2=True" in card) is not full


@pytest.mark.parametrize("name", FILES)
def test_one_of_them_can_be_trained(tmp_path, name):
    trainer = trainer_of(tmp_path, peft_config={name: lora(init_lora_weights=False)})
    assert {key.partition(".")[0] for key, p in trainer.model.named_parameters() if p.requires_grad} == {name}
    before = trained(trainer)
    trainer.train()
    assert not torch.equal(before, trained(trainer))
    trainer.save_model(str(tmp_path / "saved"))
    assert {path.name for path in (tmp_path / "saved").glob("*.safetensors")} == {FILES[name]}
    trainer.load_weights(tmp_path / "saved")


def test_each_may_have_a_lora_of_its_own(tmp_path):
    trainer = trainer_of(tmp_path, peft_config={"transformer": lora(r=2), "transformer_2": lora(r=8, lora_alpha=4)})
    ranks = {name: part.peft_config["default"].r for name, part in trainer.student.trained.items()}
    assert ranks == {"transformer": 2, "transformer_2": 8}


# Teachers


def with_loras(seed: int) -> DiffusionPipeline:
    """Both experts changed, by LoRAs that plain diffusers could have made."""
    pipe = TWO["wan22"](0)
    for number, name in enumerate(FILES):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + number)
            setting = LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, target_modules=LORA_TARGETS)
            getattr(pipe, name).add_adapter(setting, "default")
    return pipe


def saved_loras(folder: Path, seed: int, names: dict[str, str]) -> DiffusionPipeline:
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict

    pipe = with_loras(seed)
    for name, file in names.items():
        part = getattr(pipe, name)
        WanPipeline.save_lora_weights(
            folder,
            transformer_lora_layers=get_peft_model_state_dict(part, adapter_name="default"),
            weight_name=file,
            **_collate_lora_metadata({"transformer": part}),
        )
    return pipe


@pytest.mark.parametrize("names", [FILES, {"transformer": "high.safetensors", "transformer_2": "low.safetensors"}])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_a_teacher_with_a_file_for_each(tmp_path, names, full):
    expected = predictions(saved_loras(tmp_path / "teacher", 7, names))
    spec = Teacher(str(tmp_path / "teacher"), id="t", weight_name=None if names is FILES else names)
    trainer = trainer_of(tmp_path / "out", teachers=spec, peft_config=None if full else "lora")
    with trainer.teachers["t"].active():
        assert_alike(predictions(trainer.teachers["t"].pipeline), expected)
    trainer.train()


def test_a_teacher_may_adapt_one(tmp_path):
    saved_loras(tmp_path / "teacher", 7, {"transformer_2": FILES["transformer_2"]})
    trainer = trainer_of(tmp_path / "out", teachers=Teacher(str(tmp_path / "teacher"), id="t"))
    base, both = predictions(TWO["wan22"](0)), predictions(with_loras(7))
    with trainer.teachers["t"].active():
        found = predictions(trainer.teachers["t"].pipeline)
    assert_alike(found[:1], base[:1])
    assert not torch.allclose(found[-1], base[-1], atol=1e-3) and not torch.allclose(found[0], both[0], atol=1e-3)
    trainer.train()


def test_a_pipeline_from_a_folder(tmp_path):
    TWO["wan22"](1).save_pretrained(tmp_path / "teacher")
    TWO["wan22"](0).save_pretrained(tmp_path / "student")
    trainer = DiffusionOPDTrainer(
        str(tmp_path / "student"),
        {"t": str(tmp_path / "teacher")},
        config(tmp_path / "out", "wan22", bf16=True),
        rows("wan22"),
        peft_config=lora(),
    )
    assert trainer.pipeline.transformer_2.blocks[0].ffn.net[2].weight.dtype == torch.bfloat16
    trainer.train()


def test_a_teacher_of_one_denoiser_and_a_student_of_one(tmp_path):
    """Wan 2.1 teaches Wan 2.2, and the other way round."""
    teacher = Teacher(BUILDERS["wan"](1), id="t", call_kwargs={"guidance_scale_2": None})
    trainer_of(tmp_path / "a", teachers=teacher).train()
    call = {name: value for name, value in TWO_CALL["wan22"].items() if name != "guidance_scale_2"}
    args = config(tmp_path / "b", "wan22", call_kwargs=call)
    DiffusionOPDTrainer(BUILDERS["wan"](0), TWO["wan22"](1), args, rows("wan22"), peft_config=lora()).train()


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_teachers_wait_on_the_cpu(tmp_path, full):
    there = trainer_of(tmp_path / "a", peft_config=None if full else "lora")
    waiting = trainer_of(tmp_path / "b", peft_config=None if full else "lora", teacher_placement="cpu")
    for trainer in (there, waiting):
        trainer.train()
    assert torch.equal(trained(there), trained(waiting))


# Rewards


def bright(images: list[Any], **kwargs: Any) -> list[float]:
    return [float(torch.tensor(list(video[0].convert("L").tobytes())).float().mean()) for video in images]


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize(
    ("cls", "own_config"), [(DiffusionNFTTrainer, DiffusionNFTConfig), (DiffusionGRPOTrainer, DiffusionGRPOConfig)]
)
def test_rewards(tmp_path, cls, own_config, full):
    call = {name: value for name, value in TWO_CALL["wan22"].items() if not name.startswith("guidance")}
    args = own_config(
        str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=2,
        max_steps=2,
        num_inference_steps=STEPS,
        call_kwargs=call,
        report_to="none",
        use_cpu=True,
        bf16=False,
        image_steps=0,
        learning_rate=1e-2,
        beta=0.01,
        disable_tqdm=True,
    )
    trainer = cls(TWO["wan22"](0), bright, args, rows("wan22"), peft_config=None if full else lora())
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    moved = {n.partition(".")[0] for n, p in trainer.model.named_parameters() if n in before and (p != before[n]).any()}
    assert moved == set(FILES)


# What is refused, and what is said


def test_a_denoiser_that_no_learnt_step_calls_stays(tmp_path, caplog):
    trainer = trainer_of(tmp_path, timestep_fraction=0.5)
    assert "The transformer_2 is called at none of the steps that are learnt (2 of 4" in caplog.text
    assert {name.partition(".")[0] for name, p in trainer.model.named_parameters() if p.requires_grad} == {
        "transformer"
    }
    trainer.train()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_config": {"transformer_3": lora()}}, "`peft_config` names ['transformer_3'], and the denoisers of Wan"),
        (
            {"peft_config": {"transformer_2": lora()}, "timestep_fraction": 0.5},
            "`peft_config` names 'transformer_2', which is called at none of the steps that are learnt",
        ),
        (
            {"teachers": Teacher("nowhere", id="t", weight_name={"unet": "a.safetensors"})},
            "teacher 't': 'nowhere'",
        ),
        ({"ddp_find_unused_parameters": True}, "`ddp_find_unused_parameters=True` would leave the gradient"),
    ],
)
def test_refusals(tmp_path, settings, words):
    with pytest.raises(ValueError) as refusal:
        trainer_of(tmp_path, **settings)
    assert str(refusal.value).startswith(words), refusal.value


def test_what_a_teacher_has_to_teach_is_looked_for_in_both(tmp_path, caplog):
    teacher = TWO["wan22"](0)
    for transformer_2, warned in ((teacher.transformer_2, True), (TWO["wan22"](1).transformer_2, False)):
        teacher.transformer_2 = transformer_2
        trainer_of(tmp_path, teachers={"t": teacher}, peft_config=lora())
        assert ("there is nothing to learn from it" in caplog.text) == warned
        caplog.clear()


def test_zero3_is_refused(tmp_path):
    live = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    with pytest.raises(ValueError, match=r"^ZeRO-3 does not train several denoisers \(transformer, transformer_2\)"):
        trainer_of(tmp_path)
    assert live.is_zero3()


def test_a_bare_denoiser_is_no_teacher_of_two(tmp_path):
    wan(1).transformer.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"is one denoiser, and the student's WanPipeline has \['transformer', 'tr"):
        trainer_of(tmp_path / "out", teachers={"t": str(tmp_path / "teacher")})
