"""A student that goes on with a LoRA, and teachers that were made on top of one: the cascade."""

import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from torch import Tensor, nn

from diffusion_opd import (
    DiffusionGRPOConfig,
    DiffusionGRPOTrainer,
    DiffusionNFTConfig,
    DiffusionNFTTrainer,
    DiffusionOPDTrainer,
    Lora,
    Teacher,
    fingerprint,
)
from diffusion_opd.files import LORA_NAME
from tests.adapters import save_diffusers, save_peft
from tests.one_by_one import run
from tests.tiny_pipelines import BUILDERS, CALL, LORA_TARGETS
from tests.training import config, lora, trained

DATA = Dataset.from_dict({"prompt": [f"prompt number {i}" for i in range(8)]})


def predictions(pipe: DiffusionPipeline) -> list[Tensor]:
    return [step.prediction for step in run(pipe, {"prompt": "a fox"}, CALL["sd3"], 3, 4)]


def assert_alike(ours: list[Tensor], theirs: list[Tensor], **tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **({"rtol": 1e-4, "atol": 1e-5} | tolerance))


def differ(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return not torch.allclose(ours[0], theirs[0], rtol=1e-3, atol=1e-4)


def plain(*folders: Path, fuse: bool = False) -> DiffusionPipeline:
    """Plain diffusers with LoRAs one after the other, the last of them not fused."""
    pipe = BUILDERS["sd3"](0)
    for number, folder in enumerate(folders):
        pipe.load_lora_weights(folder, weight_name=LORA_NAME, adapter_name=f"a{number}")
        if fuse and number < len(folders) - 1:
            pipe.fuse_lora()
            pipe.unload_lora_weights()
    return pipe


def trainer_of(out: Path, student_lora: Any, teachers: Any = None, pipeline: Any = None, **kwargs: Any) -> Any:
    peft_config = kwargs.pop("peft_config", None)
    return DiffusionOPDTrainer(
        pipeline or BUILDERS["sd3"](0),
        teachers or BUILDERS["sd3"](1),
        config(out, **kwargs),
        DATA,
        peft_config=peft_config,
        student_lora=student_lora,
    )


@pytest.mark.parametrize("save", [save_peft, save_diffusers])
def test_training_goes_on_from_it(tmp_path, save):
    """It begins where plain diffusers with that LoRA is, and what is saved loads on the original base."""
    start = save(tmp_path / "start", r=4, lora_alpha=12)
    trainer = trainer_of(tmp_path / "out", str(start))
    other = BUILDERS["sd3"](0)
    if save is save_peft:
        other.transformer = PeftModel.from_pretrained(other.transformer, str(start)).get_base_model()
    else:
        other = plain(start)
    assert_alike(predictions(trainer.pipeline), predictions(other))
    assert {p.dtype for p in trainer.trainable_parameters} == {torch.float32}
    before = trained(trainer)
    trainer.train()
    assert not torch.equal(trained(trainer), before)
    trainer.save_model(str(tmp_path / "saved"))
    saved = plain(tmp_path / "saved")
    assert_alike(predictions(saved), predictions(trainer.pipeline))
    config_of = next(iter(saved.transformer.peft_config.values()))
    assert (config_of.r, config_of.lora_alpha) == (4, 12)


def test_it_is_resumed(tmp_path):
    start = save_diffusers(tmp_path / "start")
    settings = dict(save_strategy="steps", save_steps=1, ema_decay=0.9)
    whole = trainer_of(tmp_path / "whole", str(start), **settings)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "resumed" / "checkpoint-1")
    resumed = trainer_of(tmp_path / "resumed", Lora(str(start)), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(trained(whole), trained(resumed))


def test_a_published_student_goes_on(tmp_path):
    """In half precision from a folder, with LoRA teachers on the same backbone."""
    BUILDERS["sd3"](0).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    teacher = {"t": str(save_peft(tmp_path / "teacher", seed=5))}
    first = trainer_of(tmp_path / "first", None, teacher, str(tmp_path / "base"), peft_config=lora(), bf16=True)
    first.train()
    first.save_model()
    second = trainer_of(tmp_path / "second", str(tmp_path / "first"), teacher, str(tmp_path / "base"), bf16=True)
    assert torch.equal(trained(first), trained(second))
    second.train()
    second.create_model_card()
    card = (tmp_path / "second" / "README.md").read_text()
    assert "gone on with from first (local) and trained with" in card
    assert "| `student_lora` | first (local) |" in card


def test_a_teacher_that_is_its_start_has_nothing_to_teach(tmp_path, caplog):
    start = str(save_diffusers(tmp_path / "start"))
    trainer_of(tmp_path / "out", start, {"t": start})
    assert "predicts exactly what the untrained student predicts" in caplog.text


def dark(images: list[Any], **kwargs: Any) -> list[float]:
    return [-float(torch.tensor(list(image.convert("L").tobytes())).float().mean()) for image in images]


def rl_trainer_of(cls: type, out: Path, pipeline: Any = None, **kwargs: Any) -> Any:
    own_config = {DiffusionNFTTrainer: DiffusionNFTConfig, DiffusionGRPOTrainer: DiffusionGRPOConfig}[cls]
    call = {name: value for name, value in CALL["sd3"].items() if name != "guidance_scale"}
    args = own_config(
        str(out),
        per_device_train_batch_size=4,
        num_generations=2,
        max_steps=2,
        num_inference_steps=3,
        guidance_scale=1.0,
        call_kwargs=call,
        report_to="none",
        use_cpu=True,
        bf16=False,
        image_steps=0,
        learning_rate=1e-2,
        beta=0.1,
        logging_steps=1,
        disable_tqdm=True,
    )
    return cls(pipeline or BUILDERS["sd3"](0), dark, args, DATA, **kwargs)


@pytest.mark.parametrize("cls", [DiffusionNFTTrainer, DiffusionGRPOTrainer])
def test_rewards_measure_from_it(tmp_path, cls):
    """At the first step nothing is further from the reference than the start is, which is none."""
    start = save_diffusers(tmp_path / "start")
    trainer = rl_trainer_of(cls, tmp_path / "out", student_lora=str(start))
    expected = predictions(plain(start))
    for policy in filter(None, (trainer.base, getattr(trainer, "old", None))):
        with policy.active():
            assert_alike(predictions(policy.pipeline), expected)
    trainer.train()
    kls = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kls[0] == pytest.approx(0, abs=1e-9) and kls[-1] > 0


# A cascade: a second specialist on top of the first


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> tuple[Path, Path, Path]:
    """The first stage; a second that was trained on the first one fused; a second that went on with it."""
    folder = tmp_path_factory.mktemp("cascade")
    first = rl_trainer_of(DiffusionNFTTrainer, folder / "first", peft_config=lora(init_lora_weights=False))
    first.train()
    first.save_model()
    fused = plain(folder / "first")
    fused.fuse_lora()
    fused.unload_lora_weights()
    second = rl_trainer_of(DiffusionNFTTrainer, folder / "fused", fused, peft_config=lora(init_lora_weights=False))
    second.train()
    second.save_model()
    gone_on = rl_trainer_of(DiffusionNFTTrainer, folder / "gone_on", student_lora=str(folder / "first"))
    gone_on.train()
    gone_on.save_model()
    return folder / "first", folder / "fused", folder / "gone_on"


@pytest.mark.parametrize("kept", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loaded", [torch.float32, torch.float16, torch.bfloat16])
def test_a_base_is_the_same_in_every_precision_for_all_values_that_it_can_have(kept, loaded):
    """Values halfway between two of bfloat16 are moved the farthest; a specialist of the toy world was refused in
    bfloat16 for one of them, whose five written digits had moved it a little more."""
    halfway = torch.tensor([(1 + (2 * k + 1) / 256) * 2.0**e for e in range(-8, 0) for k in range(128)])
    base = nn.Linear(32, 32, bias=False).requires_grad_(False)
    base.weight.copy_(halfway.reshape(32, 32))
    written = fingerprint.take_fingerprint(deepcopy(base).to(kept))
    assert fingerprint.contradictions(deepcopy(base).to(loaded), written) == []
    assert not fingerprint.differ(written, fingerprint.take_fingerprint(deepcopy(base).to(loaded)))
    base.weight *= 1.02
    assert fingerprint.contradictions(deepcopy(base).to(loaded), written) == ["weight"]


def test_a_lora_of_a_fused_base_is_told_from_one_of_the_base(tmp_path, stages):
    first, fused, gone_on = stages
    sentence = "was trained on other weights than those of the student's transformer; as when another LoRA was fused"
    with pytest.raises(ValueError, match=f"^teacher 't': the LoRA .* {sentence}"):
        trainer_of(tmp_path, None, {"t": str(fused)}, peft_config=lora())
    with pytest.raises(ValueError, match=f"^`student_lora`: the LoRA .* {sentence}"):
        trainer_of(tmp_path, str(fused))
    with pytest.raises(ValueError, match="^teacher 't': the LoRA .* was trained on other weights than those of"):
        trainer_of(tmp_path, None, Teacher(str(gone_on), id="t", base_lora=str(first)), peft_config=lora())


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_a_teacher_of_a_cascade(tmp_path, stages, full):
    first, fused, gone_on = stages
    teachers = {"fused": Teacher(str(fused), base_lora=str(first)), "gone_on": str(gone_on)}
    data = {task: DATA for task in teachers}
    trainer = DiffusionOPDTrainer(
        BUILDERS["sd3"](0), teachers, config(tmp_path, save_strategy="steps", save_steps=1), data,
        peft_config=None if full else lora(),
    )  # fmt: skip
    expected = {"fused": plain(first, fused, fuse=True), "gone_on": plain(gone_on)}
    for key, policy in trainer.teachers.items():
        with policy.active():
            found = predictions(policy.pipeline)
        assert_alike(found, predictions(expected[key]), rtol=1e-3, atol=1e-4)
        assert differ(found, predictions(BUILDERS["sd3"](0)))
    assert differ(predictions(expected["fused"]), predictions(plain(fused)))
    trainer.train()

    teachers = {
        "fused": Teacher(str(fused), base_lora=str(save_diffusers(tmp_path / "other"))),
        "gone_on": str(gone_on),
    }
    with pytest.raises(ValueError, match="was trained on other weights"):
        DiffusionOPDTrainer(BUILDERS["sd3"](0), teachers, config(tmp_path), data, peft_config=lora())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_precision_is_the_same_base(tmp_path, stages, dtype):
    first, *_ = stages
    student = BUILDERS["sd3"](0).to(dtype)
    trainer_of(tmp_path, None, {"t": str(first)}, student, peft_config=lora())


def test_readers_of_the_file_find_what_they_look_for(stages):
    with safe_open(stages[0] / LORA_NAME, "pt") as file:
        assert {"format", "lora_adapter_metadata"} <= file.metadata().keys()


# What is refused


def beneath(path: Any, base_lora: str) -> dict[str, Any]:
    return dict(student_lora=None, peft_config=lora(), teachers=Teacher(path, id="t", base_lora=base_lora))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda start: dict(student_lora=start, peft_config=lora()), "`student_lora` brings its own rank, alpha and"),
        (lambda start: dict(student_lora="nowhere/at/all"), "`student_lora`: 'nowhere/at/all' is neither a folder nor"),
        (lambda start: dict(student_lora=Lora(start, weight_name="a.safetensors")), "`student_lora`: '"),
        (
            lambda start: beneath(BUILDERS["sd3"](1), start),
            "teacher 't': 'a loaded StableDiffusion3Pipeline' is no LoRA, and has no `base_lora`",
        ),
        (lambda start: beneath(start, "no/where/at/all"), "the `base_lora` of teacher 't': 'no/where/at/all' is"),
    ],
)
def test_refusals(tmp_path, make, words):
    start = save_diffusers(tmp_path / "start")
    with pytest.raises(ValueError) as refusal:
        trainer_of(tmp_path / "out", **make(str(start)))
    assert str(refusal.value).startswith(words), refusal.value
    assert "\n" not in str(refusal.value)


def test_a_loaded_pipeline_is_no_lora(tmp_path):
    with pytest.raises(TypeError, match="^`student_lora` is a Hub id, a folder, a file or a `Lora`, got"):
        trainer_of(tmp_path, BUILDERS["sd3"](1))


def test_a_lora_of_another_model_is_refused(tmp_path):
    other = save_diffusers(tmp_path / "start", BUILDERS["flux"](0))
    with pytest.raises(ValueError, match="^`student_lora`: the LoRA .* was made for another model"):
        trainer_of(tmp_path / "out", str(other))


def test_targets_that_are_written_otherwise(tmp_path):
    """Without metadata, as other trainers save it: ranks from the shapes."""
    start = save_diffusers(tmp_path / "start", metadata=False, r=4, lora_alpha=4)
    trainer = trainer_of(tmp_path / "out", str(start))
    assert_alike(predictions(trainer.pipeline), predictions(plain(start)))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert_alike(predictions(plain(tmp_path / "saved")), predictions(trainer.pipeline))
    assert isinstance(next(iter(trainer.model.peft_config.values())), LoraConfig) and LORA_TARGETS
