"""Students that make each sample of a picture of its own, from the first step to plain diffusers, on real classes."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from diffusers import DiffusionPipeline, FluxPipeline
from huggingface_hub import ModelCard
from PIL import Image
from torch import Tensor
from transformers import TrainerCallback

from diffusion_opd import (
    DiffusionGRPOConfig,
    DiffusionGRPOTrainer,
    DiffusionNFTConfig,
    DiffusionNFTTrainer,
    DiffusionOPDConfig,
    DiffusionOPDTrainer,
    Teacher,
)
from diffusion_opd.files import LORA_NAME
from diffusion_opd.sampling import seed_of
from tests.editing_pipelines import EDITING, EDITING_CALL, EDITING_INPUTS, ONE_A_CALL, with_parts
from tests.one_by_one import loss_of, run
from tests.streaming_pipelines import picture
from tests.tiny_pipelines import flux
from tests.training import lora, trained

PROMPTS = ["at night", "in winter", "as a drawing", "without the bench"]
STEPS = 4
families = pytest.mark.parametrize("family", EDITING)


def rows(family: str, **others: list[Any]) -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS, **EDITING_INPUTS[family], **others})


def config(out: Path, family: str, **kwargs: Any) -> DiffusionOPDConfig:
    defaults = dict(
        per_device_train_batch_size=2,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        num_inference_steps=STEPS,
        call_kwargs=dict(EDITING_CALL[family]),
        learning_rate=1e-2,
        disable_tqdm=True,
        image_steps=0,
    )
    return DiffusionOPDConfig(str(out), **(defaults | kwargs))


def trainer_of(out: Path, family: str, data: Any = None, teachers: Any = None, **kwargs: Any) -> DiffusionOPDTrainer:
    extra = {key: kwargs.pop(key) for key in ("eval_dataset", "callbacks") if key in kwargs}
    return DiffusionOPDTrainer(
        EDITING[family](0),
        teachers or EDITING[family](1),
        config(out, family, **kwargs),
        rows(family) if data is None else data,
        peft_config=lora(init_lora_weights=False),
        **extra,
    )


def own(row: dict[str, Any], family: str) -> dict[str, Any]:
    """What the pipeline is given of a row."""
    return {name: row[name] for name in ("prompt", *EDITING_INPUTS[family])}


def by_hand(
    student: DiffusionPipeline, teacher: DiffusionPipeline, family: str, batch: list[Any], told: list[Any] | None = None
) -> Tensor:
    """The loss of a first step, sample by sample; of `told` the teacher's inputs."""
    rows = list(zip([own(row, family) for row in batch], told or [own(row, family) for row in batch], strict=True))
    seeds = [seed_of(42, 0, 0, 0, index) for index in range(len(batch))]
    return loss_of(student, teacher, rows, EDITING_CALL[family], seeds, STEPS, STEPS - 1)


class Gradients(TrainerCallback):
    """Those of each optimizer step, unclipped."""

    def __init__(self) -> None:
        self.seen: list[list[Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append([p.grad.clone() for p in model.parameters() if p.requires_grad])


@families
def test_the_gradient_is_that_of_two_passes(tmp_path, family):
    """Each sample alone, with its own picture: the student draws; then at its states the teacher is asked, and the
    student again, with gradient."""
    gradients, batches = Gradients(), []

    class Watch(DiffusionOPDTrainer):
        def training_step(self, model, inputs, *args):
            batches.append(inputs)
            return super().training_step(model, inputs, *args)

    trainer = Watch(
        EDITING[family](0),
        EDITING[family](1),
        config(tmp_path, family, max_steps=1, max_grad_norm=0.0),
        rows(family),
        peft_config=lora(init_lora_weights=False),
        callbacks=[gradients],
    )
    assert trainer.together == (1 if family in ONE_A_CALL or family == "qwen_edit" else None)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    ((batch,), (found,)) = batches, gradients.seen
    assert len(batch) == 2
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            if name in before:
                p.copy_(before[name])
    weights = [p for p in trainer.model.parameters() if p.requires_grad]
    loss = by_hand(trainer.pipeline, EDITING[family](1), family, batch)
    expected = torch.autograd.grad(loss, weights)
    scale = max(gradient.abs().max() for gradient in expected)
    assert scale > 0
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours / scale, theirs / scale, rtol=1e-3, atol=1e-4)


@families
def test_a_picture_of_another_row_is_another_lesson(tmp_path, family):
    """What is drawn depends on the row's own picture."""
    trainer = trainer_of(tmp_path, family)
    name = next(iter(EDITING_INPUTS[family]))
    first, second = ({key: values[number] for key, values in EDITING_INPUTS[family].items()} for number in (0, 1))
    first["prompt"] = PROMPTS[0]
    mine, other = trainer.sample_images([first])[0], trainer.sample_images([{**first, name: second[name]}])[0]
    assert not np.array_equal(np.asarray(mine), np.asarray(other))


@families
def test_a_run_from_pictures_to_plain_diffusers(tmp_path, family):
    """Trained, evaluated, drawn, killed and resumed, and loaded in plain diffusers."""
    settings = dict(save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, image_steps=2)
    whole = trainer_of(tmp_path / "whole", family, eval_dataset=rows(family), **settings)
    whole.train()
    metrics = [entry["eval_kl"] for entry in whole.state.log_history if "eval_kl" in entry]
    assert len(metrics) == 2 and metrics[1] < metrics[0]

    shown = tmp_path / "whole" / "images" / "step_000002"
    names = {path.name for path in shown.glob("*.png")}
    assert names == {f"0{number}{end}.png" for number in range(4) for end in ("", "_beside")}
    result, sheet = (Image.open(shown / f"00{end}.png") for end in ("", "_beside"))
    assert sheet.height == result.height and sheet.width >= 2 * result.width
    on_the_right = sheet.crop((sheet.width - result.width, 0, sheet.width, sheet.height))
    assert np.array_equal(np.asarray(on_the_right), np.asarray(result.convert("RGB")))
    card = ModelCard.load(tmp_path / "whole" / "README.md")
    is_video = family.endswith("i2v")
    assert card.data.pipeline_tag == ("image-to-video" if is_video else "image-to-image")
    assert card.data.widget[0]["output"]["url"] == "images/step_000002/00_beside.png"
    assert 'load_image("...")' in card.text and "from diffusers.utils import load_image" in card.text

    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "resumed" / "checkpoint-1")
    resumed = trainer_of(tmp_path / "resumed", family, eval_dataset=rows(family), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(trained(whole), trained(resumed))

    whole.save_model(str(tmp_path / "saved"))
    plain = EDITING[family](0)
    plain.load_lora_weights(tmp_path / "saved", weight_name=LORA_NAME)
    row = {"prompt": PROMPTS[0]} | {name: values[0] for name, values in EDITING_INPUTS[family].items()}
    runs = [run(pipe, row, EDITING_CALL[family], 3, STEPS) for pipe in (whole.pipeline, plain)]
    for ours, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(ours.prediction, theirs.prediction, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["flux_kontext", "qwen_edit_plus", "wan_i2v"])
def test_half_precision(tmp_path, family):
    """Parts in bfloat16 as they are loaded for a GPU, pictures too."""
    pipelines = [EDITING[family](seed).to(torch.bfloat16) for seed in (0, 1)]
    args = config(tmp_path, family, bf16=True, image_steps=2)
    trainer = DiffusionOPDTrainer(pipelines[0], pipelines[1], args, rows(family), peft_config=lora())
    trainer.train()
    assert len(list((tmp_path / "images" / "step_000002").glob("*_beside.png"))) == 4
    assert all(np.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


# What may be given


def losses(trainer: DiffusionOPDTrainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def saved(folder: Path) -> list[str]:
    paths = [str(folder / f"{number}.png") for number in range(4)]
    for path, one in zip(paths, EDITING_INPUTS["flux_kontext"]["image"], strict=True):
        one.save(path)
    return paths


FORMS: dict[str, Callable[[Dataset, Path], Any]] = {
    "paths": lambda whole, folder: whole.remove_columns("image").add_column("image", saved(folder)),
    "undecoded": lambda whole, folder: whole.cast_column("image", ImageFeature(decode=False)),
    "dict": lambda whole, folder: {"teacher": whole},
    "shuffled before": lambda whole, folder: whole.select([3, 2, 1, 0]).select([3, 2, 1, 0]),
    "stream": lambda whole, folder: whole.to_iterable_dataset(),
    "streams": lambda whole, folder: {"teacher": whole.to_iterable_dataset()},
}


def test_all_forms_of_data_are_one(tmp_path):
    whole, found = rows("flux_kontext"), {}
    for form, make in {"whole": lambda whole, folder: whole, **FORMS}.items():
        found[form] = losses(trainer_of(tmp_path / form, "flux_kontext", make(whole, tmp_path)))
    assert found.pop("stream") == found.pop("streams")  # in the order of the stream
    assert all(own == found["whole"] for own in found.values()), found


def first_batch(trainer: DiffusionOPDTrainer, count: int = 2) -> list[dict[str, Any]]:
    order = list(trainer._get_train_sampler())[:count]
    return trainer.data.read([trainer.data.train[row] for row in order])


def test_a_teacher_reads_other_columns(tmp_path):
    """What it does at a richer prompt and for another picture, as if these were its own."""
    rich = [f"{prompt}, with every detail kept" for prompt in PROMPTS]
    data = rows("flux_kontext", rich=rich, other=[picture(16, number + 40) for number in range(4)])
    teacher = Teacher(EDITING["flux_kontext"](0), id="t", columns={"prompt": "rich", "image": "other"})
    trainer = trainer_of(tmp_path, "flux_kontext", data, teacher, max_steps=1)
    batch = first_batch(trainer)
    told = [{"prompt": row["rich"], "image": row["other"]} for row in batch]
    before = by_hand(trainer.pipeline, EDITING["flux_kontext"](0), "flux_kontext", batch, told).item()
    assert losses(trainer)[0] == pytest.approx(before, rel=1e-3) and before > 0


def test_tasks_with_and_without_pictures(tmp_path, caplog):
    """One student learns to draw from text, by a teacher that takes no pictures, and to edit, by another."""
    draws = with_parts(FluxPipeline, flux(3, guidance_embeds=True))
    data = {"draw": Dataset.from_dict({"prompt": PROMPTS}), "edit": rows("flux_kontext")}
    teachers = {"draw": draws, "edit": EDITING["flux_kontext"](1)}
    trainer = trainer_of(tmp_path, "flux_kontext", data, teachers, eval_dataset=data, max_steps=4, image_steps=4)
    assert "Teacher 'draw' is asked without ['_auto_resize', 'image', 'max_area'], which FluxPipeline does not" in (
        caplog.text
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_kl/draw"] < before["eval_kl/draw"] and after["eval_kl/edit"] < before["eval_kl/edit"]
    names = sorted(path.name for path in (tmp_path / "images" / "step_000004").glob("*.png"))
    assert len([name for name in names if "beside" not in name]) == 4


def test_pictures_of_two_sizes(tmp_path):
    """They never meet in a batch, and a resumed run sees what the undisturbed one saw."""
    sizes = [16, 32, 16, 32, 16, 16]
    images = [picture(size, number) for number, size in enumerate(sizes)]
    data = Dataset.from_dict({"prompt": [f"number {n}" for n in range(6)], "image": images})
    seen: dict[str, list[list[str]]] = {}

    class Watch(DiffusionOPDTrainer):
        def training_step(self, model, inputs, *args):
            assert len({row["image"].size for row in inputs}) == 1
            seen.setdefault(self.args.output_dir, []).append([row["prompt"] for row in inputs])
            return super().training_step(model, inputs, *args)

    def make(out: Path) -> Watch:
        args = config(out, "flux_kontext", max_steps=6, save_strategy="steps", save_steps=4)
        return Watch(EDITING["flux_kontext"](0), EDITING["flux_kontext"](1), args, data, peft_config=lora())

    whole = make(tmp_path / "whole")
    whole.train()
    shown = seen[str(tmp_path / "whole")]
    assert {prompt for batch in shown[:3] for prompt in batch} == set(data["prompt"])  # an epoch shows all
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    resumed = make(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=True)
    assert seen[str(tmp_path / "resumed")] == shown[4:]
    assert torch.equal(trained(whole), trained(resumed))
    assert whole.evaluate(data)["eval_kl"] > 0  # a batch of all


# Learning from rewards


def kept_red(images: list[Any], image: list[Image.Image], prompts: list[str], **kwargs: Any) -> list[float]:
    """How much redder than its own source a result is."""
    assert len(images) == len(image) == len(prompts) and all(isinstance(one, Image.Image) for one in image)
    middle = [one[len(one) // 2] if isinstance(one, list) else one for one in images]
    reds = [[np.asarray(one.convert("RGB"), dtype=float)[..., 0].mean() for one in of] for of in (middle, image)]
    return [(made - source) / 255 for made, source in zip(*reds, strict=True)]


def rl_trainer_of(cls: type, out: Path, family: str, **kwargs: Any) -> Any:
    settings = dict(
        per_device_train_batch_size=4,
        num_generations=2,
        num_iterations=2,
        max_steps=4,
        save_strategy="steps",
        save_steps=1,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        num_inference_steps=3,
        guidance_scale=EDITING_CALL[family]["guidance_scale"],
        call_kwargs={name: value for name, value in EDITING_CALL[family].items() if name != "guidance_scale"},
        learning_rate=1e-2,
        disable_tqdm=True,
        image_steps=4,
    )
    own_config = {DiffusionNFTTrainer: DiffusionNFTConfig, DiffusionGRPOTrainer: DiffusionGRPOConfig}[cls]
    data = rows(family)
    return cls(
        EDITING[family](0),
        kept_red,
        own_config(str(out), **(settings | kwargs)),
        data,
        data,
        peft_config=lora(init_lora_weights=False),
    )


@pytest.mark.parametrize("family", ["flux_kontext", "wan_i2v"])
@pytest.mark.parametrize("cls", [DiffusionNFTTrainer, DiffusionGRPOTrainer])
def test_rewards_of_edited_pictures(tmp_path, cls, family):
    """Reward functions see the source; a run that is killed between two steps on one rollout goes on with its
    pictures."""
    whole = rl_trainer_of(cls, tmp_path / "whole", family)
    whole.train()
    metrics = whole.evaluate()
    assert np.isfinite(metrics["eval_reward"]) and "eval_rewards/kept_red/mean" in metrics
    captions = (tmp_path / "whole" / "images" / "step_000004" / "captions.json").read_text()
    assert "at night, kept_red" in captions
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    resumed = rl_trainer_of(cls, tmp_path / "resumed", family)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(trained(whole), trained(resumed))
