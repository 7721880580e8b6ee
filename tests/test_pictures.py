"""Sample pictures: when they are drawn, and that none of them costs a run."""

import gc
import logging
import math
import weakref
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers import TrainerCallback

from diffusion_opd import (
    DiffusionGRPOConfig,
    DiffusionGRPOTrainer,
    DiffusionNFTConfig,
    DiffusionNFTTrainer,
    DiffusionOPDConfig,
    DiffusionOPDTrainer,
)
from tests.tiny_pipelines import BUILDERS, CALL, LORA_TARGETS, denoiser

HALVES = (torch.bfloat16, torch.float16)
DATA = Dataset.from_dict({"prompt": [f"prompt number {i}" for i in range(8)]})


def brightness(images, **kwargs):
    return [sum(image.convert("L").tobytes()) / 1e5 for image in images]


METHODS = {
    "opd": (DiffusionOPDTrainer, DiffusionOPDConfig, {}),
    "nft": (DiffusionNFTTrainer, DiffusionNFTConfig, {"num_generations": 2}),
    "grpo": (DiffusionGRPOTrainer, DiffusionGRPOConfig, {"num_generations": 2}),
}


def trainer_of(
    out, method: str = "opd", pipeline=None, full: bool = False, callbacks=None, reward=brightness, **kwargs
):
    trainer_class, config_class, own = METHODS[method]
    pipeline = pipeline or BUILDERS["sd3"](0)
    call = dict(CALL["sd3"])
    defaults = dict(
        per_device_train_batch_size=2,
        max_steps=2,
        save_steps=1,
        image_steps=1,
        report_to="none",
        use_cpu=True,
        num_inference_steps=3,
        guidance_scale=call.pop("guidance_scale"),
        call_kwargs=call,
        learning_rate=1e-2,
        disable_tqdm=True,
    )
    return trainer_class(
        pipeline,
        BUILDERS["sd3"](1).to(pipeline.dtype) if method == "opd" else reward,
        config_class(str(out), **(defaults | own | kwargs)),
        train_dataset=DATA,
        callbacks=callbacks,
        peft_config=None if full else LoraConfig(r=2, target_modules=LORA_TARGETS),
    )


@pytest.mark.parametrize("method", METHODS)
def test_pictures_come_after_the_save(tmp_path, method):
    trainer_of(tmp_path, method).train()
    for step in (1, 2):
        pictures = list((tmp_path / "images" / f"step_{step:06d}").glob("*.png"))
        saved = (tmp_path / f"checkpoint-{step}" / "trainer_state.json").stat().st_mtime_ns
        assert len(pictures) == 4 and all(saved < path.stat().st_mtime_ns for path in pictures)


class Spoil(TrainerCallback):
    """What may go wrong with a picture, from the first step on."""

    def __init__(self, how: str, out: Path):
        self.how, self.out = how, out

    def on_step_end(self, args, state, control, **kwargs):
        if self.how == "vae":  # as a half-precision VAE beside latents in float32
            self.trainer.pipeline.vae.to(torch.bfloat16)
        else:  # as a full disk
            (self.out / "images").touch()


@pytest.mark.parametrize(("how", "named"), [("vae", "RuntimeError"), ("folder", "NotADirectoryError")])
def test_a_picture_that_fails_is_a_warning_that_names_it(tmp_path, caplog, how, named):
    plain = trainer_of(tmp_path / "plain", image_steps=0)
    plain.train()
    spoil = Spoil(how, tmp_path / "spoilt")
    trainer = spoil.trainer = trainer_of(tmp_path / "spoilt", callbacks=[spoil])
    with caplog.at_level(logging.WARNING):
        trainer.train()
    told = [record.getMessage() for record in caplog.records if "could not be drawn" in record.getMessage()]
    assert len(told) == 2 and all(named in line and "the run goes on" in line for line in told)
    assert "optimizer step 1 " in told[0] and "optimizer step 2 " in told[1]
    for mine, undisturbed in zip(trainer.trainable_parameters, plain.trainable_parameters, strict=True):
        assert torch.equal(mine, undisturbed)
    assert (tmp_path / "spoilt" / "checkpoint-2").is_dir()


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("this error cannot be printed")


@pytest.mark.parametrize(
    "error", [ValueError, torch.OutOfMemoryError, KeyboardInterrupt, SystemExit, Unprintable], ids=lambda e: e.__name__
)
@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_no_picture_at_the_end_costs_the_run(tmp_path, caplog, error, ema_decay):
    """Whoever interrupts it: with `save_strategy="no"` the trained weights are in the trainer alone."""
    settings = dict(image_steps=None, save_strategy="no", ema_decay=ema_decay, ema_update_every=1)
    plain = trainer_of(tmp_path / "plain", **settings)
    plain.train()
    trainer = trainer_of(tmp_path / "spoilt", **settings)

    def fail(*args, **kwargs):
        raise error("while it is decoded")

    trainer.pipeline.vae.decode = fail
    trainer.train()
    assert "sample pictures" in caplog.text
    for mine, undisturbed in zip(trainer.trainable_parameters, plain.trainable_parameters, strict=True):
        assert torch.equal(mine, undisturbed)
    trainer.save_model()
    assert (tmp_path / "spoilt" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize("number", [math.nan, math.inf, 0.0])
def test_a_picture_of_nan_is_a_warning(tmp_path, caplog, number):
    trainer = trainer_of(tmp_path)
    decode = trainer.pipeline.vae.decode
    trainer.pipeline.vae.decoder.conv_out.bias.data.fill_(number)
    trainer.log_images()
    said = "The sample pictures of optimizer step 0 show NaN or Inf as black or white: the VAE of"
    assert (said in caplog.text) == (number != 0.0)
    assert trainer.pipeline.vae.decode == decode and len(list((tmp_path / "images").rglob("*.png"))) == 4


def test_a_judge_that_fails_on_a_sample_picture_leaves_the_picture(tmp_path, caplog):
    judged = []

    def strict(images, prompts, **kwargs):
        judged.append(len(images))
        if len(images) == 4:  # the sample pictures; a rollout has two
            raise OSError("the reward server is gone")
        return brightness(images)

    trainer = trainer_of(tmp_path, "grpo", reward=strict)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 2 and 4 in judged
    assert "the reward server is gone" in caplog.text
    assert len(list((tmp_path / "images").rglob("*.png"))) == 8


def test_a_run_that_was_killed_before_its_picture_draws_it_when_it_is_resumed(tmp_path):
    trainer_of(tmp_path, max_steps=1, image_steps=0).train()
    trainer_of(tmp_path, max_steps=2).train(resume_from_checkpoint=True)
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["step_000001", "step_000002"]


def test_a_picture_that_fails_holds_nothing(tmp_path):
    """As when memory runs out: what the failed call had made must be gone before the next step needs the room."""
    trainer, held = trainer_of(tmp_path), []

    def out_of_memory(latents, *args, **kwargs):
        held.append(weakref.ref(latents))
        raise torch.OutOfMemoryError("no room")

    trainer.pipeline.vae.decode = out_of_memory
    gc.disable()
    try:
        trainer.log_images()
        assert len(held) == 1 and held[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("image_steps", [1, None])
def test_the_card_shows_the_last_pictures(tmp_path, image_steps):
    trainer_of(tmp_path, image_steps=image_steps).train()
    card = ModelCard.load(tmp_path / "README.md")
    assert [item["output"]["url"].split("/")[1] for item in card.data.widget] == ["step_000002"] * 4


# What a user gets as `trainer.pipeline`


@pytest.mark.parametrize(
    ("loaded", "bf16"),
    [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)],
    ids=["float32-mixed", "half-mixed", "half-float32"],
)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_pipeline_of_any_dtype_trains_and_draws(tmp_path, caplog, method, full, loaded, bf16):
    """Given loaded, in any precision, to a run in any precision."""
    pipeline = BUILDERS["sd3"](0).to(loaded)
    trainer = trainer_of(tmp_path, method, pipeline, full, bf16=bf16, learning_rate=1e-4)
    call = dict(num_inference_steps=2, **CALL["sd3"])
    before = trainer.pipeline(["a fox"], generator=torch.Generator().manual_seed(0), output_type="np", **call).images
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "could not be drawn" not in caplog.text
    after = trainer.pipeline(["a fox"], generator=torch.Generator().manual_seed(0), output_type="np", **call).images
    assert abs(after - before).mean() < 0.1
    latents = trainer.pipeline(["a fox"], output_type="latent", **call)[0]
    assert latents.dtype == loaded
    assert "_original_forward" not in vars(denoiser(trainer.pipeline))


def drawn(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    call = dict(num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0), **CALL["sd3"])
    return pipeline(["a fox"], **call).images.float()


@pytest.mark.parametrize("second", METHODS)
def test_a_student_of_one_run_is_the_student_of_the_next(tmp_path, caplog, second):
    """A specialist first, a distilled student from it afterwards."""
    first = trainer_of(tmp_path / "first", "nft", BUILDERS["sd3"](0).to(torch.bfloat16), full=True, bf16=True)
    first.train()
    trainer = trainer_of(tmp_path / "second", second, first.pipeline, full=True, bf16=True)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "could not be drawn" not in caplog.text
    assert trainer.pipeline(["a fox"], num_inference_steps=2, output_type="latent", **CALL["sd3"])[0].dtype == (
        torch.bfloat16
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_pipeline_of_a_full_student_can_be_cast(tmp_path, dtype):
    trainer = trainer_of(tmp_path, pipeline=BUILDERS["sd3"](0).to(torch.bfloat16), full=True, bf16=True)
    trainer.train()
    before = drawn(trainer.pipeline)
    after = drawn(trainer.pipeline.to(dtype))
    assert (before - after).abs().mean() < 0.02


def test_a_pipeline_that_was_refused_can_be_given_again(tmp_path):
    """ "Remove the column and run the cell again"."""
    pipeline = BUILDERS["sd3"](0)
    args = DiffusionOPDConfig(str(tmp_path), report_to="none", use_cpu=True, call_kwargs=dict(CALL["sd3"]))
    lora = LoraConfig(r=2, target_modules=LORA_TARGETS)
    with pytest.raises(ValueError, match="the `negative_prompt` of row 1 is missing"):
        spoilt = DATA.add_column("negative_prompt", ["blurred", None] * 4)
        DiffusionOPDTrainer(pipeline, BUILDERS["sd3"](1), args, spoilt, peft_config=lora)
    DiffusionOPDTrainer(pipeline, BUILDERS["sd3"](1), args, DATA, peft_config=lora)


def test_a_teacher_in_the_other_half_precision_is_told_of_by_its_dtype(tmp_path):
    """Published in float16 as many are, beside a student in bfloat16. Its VAE is the same, rounded in another way."""
    for seed, dtype in enumerate(HALVES):
        BUILDERS["sd3"](seed).to(dtype).save_pretrained(tmp_path / str(seed))
    student, teacher = (DiffusionPipeline.from_pretrained(tmp_path / str(i), dtype=d) for i, d in enumerate(HALVES))
    args = DiffusionOPDConfig(
        str(tmp_path / "out"), report_to="none", use_cpu=True, bf16=True, call_kwargs=dict(CALL["sd3"])
    )
    sentence = r"of torch.float16 cannot be asked at the student's states of shape .* and torch.bfloat16: Stable"
    with pytest.raises(ValueError, match=sentence):
        DiffusionOPDTrainer(student, teacher, args, DATA, peft_config=LoraConfig(r=2, target_modules=LORA_TARGETS))
