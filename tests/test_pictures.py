"""Sample pictures: when they are drawn, and that none of them costs a run."""

import logging
from pathlib import Path

import pytest
import torch
from datasets import Dataset
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
