"""Pipelines that come with a state of their own: it is seen, or refused; and files that lack something."""

import logging
from pathlib import Path

import diffusers
import pytest
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from diffusion_opd import DiffusionOPDTrainer
from diffusion_opd.policy import tuner_layers
from diffusion_opd.student import load_student
from tests.adapters import LORA_FILE, draw, load, lora, save_diffusers
from tests.tiny_pipelines import BUILDERS, CALL, denoiser, frozen
from tests.training import config, history, trained
from tests.training import lora as student_lora

DATA = Dataset.from_dict({"prompt": ["a cat", "a dog", "a fox", "a cup"], "teacher_id": ["a"] * 4})


def trainer_of(
    model, out: Path, family: str = "sd3", teachers=None, full: bool = False, **kwargs
) -> DiffusionOPDTrainer:
    peft_config = kwargs.pop("peft_config", None) or student_lora()
    return DiffusionOPDTrainer(
        model,
        teachers or {"a": BUILDERS[family](1)},
        config(out, family, **kwargs),
        DATA,
        peft_config=None if full else peft_config,
    )


def drawn_after(trainer: DiffusionOPDTrainer, folder: Path, family: str = "sd3") -> tuple[torch.Tensor, torch.Tensor]:
    """By the trained student, and by plain diffusers from what it saves."""
    trainer.save_model(str(folder))
    pipe = BUILDERS[family](0)
    pipe.load_lora_weights(folder)
    return draw(trainer.pipeline, family), draw(pipe, family)


# Wrappers


def compiled(pipe: DiffusionPipeline) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


def with_compiled_blocks(pipe: DiffusionPipeline) -> None:
    for index, block in enumerate(pipe.transformer.transformer_blocks):
        pipe.transformer.transformer_blocks[index] = torch.compile(block, backend="eager")


def in_parallel(pipe: DiffusionPipeline) -> None:
    pipe.transformer = torch.nn.DataParallel(pipe.transformer)


@pytest.mark.parametrize("wrap", [compiled, with_compiled_blocks, in_parallel])
def test_a_student_that_comes_wrapped(wrap, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "diffusion_opd"):
        pipe = BUILDERS["sd3"](0)
        wrap(pipe)
        trainer = trainer_of(pipe, tmp_path / "out")
    assert "The student's 'transformer' came compiled, or wrapped" in caplog.text
    trainer.train()
    plain = trainer_of(BUILDERS["sd3"](0), tmp_path / "plain")
    plain.train()
    assert torch.equal(trained(trainer), trained(plain))
    mine, saved = drawn_after(trainer, tmp_path / "saved")
    torch.testing.assert_close(mine, saved)
    assert not any("_orig_mod" in key or "module" in key for key in load_file(tmp_path / "saved" / LORA_FILE))


@pytest.mark.parametrize("wrap", [compiled, with_compiled_blocks])
def test_a_full_student_that_comes_wrapped(wrap, tmp_path):
    pipe = BUILDERS["sd3"](0)
    wrap(pipe)
    trainer = trainer_of(pipe, tmp_path / "out", full=True, learning_rate=1e-4)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again), draw(trainer.pipeline))


@pytest.mark.parametrize("wrap", [compiled, with_compiled_blocks, in_parallel])
def test_a_teacher_that_comes_wrapped(wrap, tmp_path):
    teacher = BUILDERS["sd3"](1)
    wrap(teacher)
    (loaded,) = load(teacher, BUILDERS["sd3"](0))
    assert torch.equal(draw(loaded.pipeline), draw(BUILDERS["sd3"](1)))


def test_fused_projections(tmp_path):
    student = BUILDERS["sd3"](0)
    student.transformer.fuse_qkv_projections()
    with pytest.raises(ValueError, match="the student's transformer has fused projections"):
        trainer_of(student, tmp_path)
    teacher = BUILDERS["flux"](1)
    teacher.transformer.fuse_qkv_projections()
    (loaded,) = load(teacher, BUILDERS["flux"](0))
    torch.testing.assert_close(draw(loaded.pipeline, "flux"), draw(BUILDERS["flux"](1), "flux"))


# Strengths


@pytest.mark.parametrize(
    ("family", "argument"),
    [("sd3", "joint_attention_kwargs"), ("sdxl", "cross_attention_kwargs"), ("wan", "attention_kwargs")],
)
def test_activation_checkpointing_with_a_scale(family: str, argument: str, tmp_path):
    def norms(checkpointed: bool) -> list[float]:
        trainer = trainer_of(
            BUILDERS[family](0),
            tmp_path / str(checkpointed),
            family,
            call_kwargs={**CALL[family], argument: {"scale": 0.5}},
            activation_checkpointing=checkpointed,
            max_steps=3,
        )
        trainer.train()
        assert all(set(layer.scaling.values()) == {4.0} for layer in tuner_layers(denoiser(trainer.pipeline)))
        return history(trainer, "grad_norm")

    assert norms(True) == norms(False)


def test_the_manifest_knows_how_strong_adapters_are():
    def sha256(change=lambda pipe: None) -> str:
        teacher = BUILDERS["sd3"](1)
        frozen(3, lambda: teacher.transformer.add_adapter(lora(), "style") or teacher.transformer)
        frozen(4, lambda: teacher.transformer.add_adapter(lora(), "other") or teacher.transformer)
        teacher.set_adapters("style")
        change(teacher)
        (loaded,) = load(teacher, BUILDERS["sd3"](0))
        return loaded.sha256

    found = [
        sha256(),
        sha256(lambda pipe: pipe.set_adapters("style", 0.5)),
        sha256(lambda pipe: pipe.set_adapters("other")),
        sha256(lambda pipe: pipe.set_adapters(["style", "other"])),
        sha256(lambda pipe: pipe.disable_lora()),
    ]
    assert len(set(found)) == 5 and found[0] == sha256()


def test_the_manifest_knows_a_teachers_own_encoders(tmp_path):
    def sha256(scale: float) -> str:
        teacher = BUILDERS["sd3"](1)
        with torch.no_grad():
            next(teacher.text_encoder.parameters()).mul_(scale)
        (loaded,) = load(teacher, BUILDERS["sd3"](0))
        return loaded.sha256

    assert len({sha256(1.0), sha256(1.5), sha256(2.0)}) == 3


# The student's own LoRA


def test_target_parameters_are_their_layers(tmp_path):
    """Plain diffusers loads no LoRA that names parameters."""
    parameters = ["transformer_blocks.0.attn.to_q.weight", "attn.to_k.weight"]
    by_parameters = LoraConfig(r=4, lora_alpha=8, target_modules=[], target_parameters=parameters)
    trainer = trainer_of(BUILDERS["sd3"](0), tmp_path / "out", peft_config=by_parameters)
    trainer.train()
    mine, saved = drawn_after(trainer, tmp_path / "saved")
    assert torch.equal(mine, saved) and not torch.allclose(mine, draw(BUILDERS["sd3"](0)), rtol=1e-3)
    modules = {key.partition(".lora_")[0] for key in load_file(tmp_path / "saved" / LORA_FILE)}
    assert modules == {
        f"transformer.transformer_blocks.{name}" for name in ("0.attn.to_q", "0.attn.to_k", "1.attn.to_k")
    }
    assert by_parameters.target_parameters == parameters  # the user's own


def test_target_parameters_that_are_no_layers_are_refused(tmp_path):
    for wanted in ("pos_embed.proj.weight", "transformer_blocks.0.attn.to_q.bias", "nothing"):
        config = LoraConfig(r=4, target_modules=[], target_parameters=[wanted])
        with pytest.raises(ValueError, match=r"cannot be loaded by plain diffusers; name linear layers") as refused:
            trainer_of(BUILDERS["sd3"](0), tmp_path, peft_config=config)
        assert wanted in str(refused.value)


# Quantised parts


@pytest.fixture
def int8(tmp_path):
    torchao = pytest.importorskip("torchao.quantization")

    def build(seed: int) -> DiffusionPipeline:
        folder, pipe = tmp_path / f"int8-{seed}", BUILDERS["sd3"](seed)
        pipe.transformer.save_pretrained(folder)
        quantization = diffusers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
        pipe.transformer = type(pipe.transformer).from_pretrained(
            folder, quantization_config=quantization, torch_dtype=torch.float32
        )
        return pipe

    return build


def test_a_quantised_student_and_teacher(int8, tmp_path):
    style = save_diffusers(tmp_path / "style")
    data = Dataset.from_dict({"prompt": ["a cat", "a dog", "a fox", "a cup"], "teacher_id": ["a", "b"] * 2})
    teachers = {"a": int8(1), "b": style}
    run = {"peft_config": student_lora(), "train_dataset": data}
    args = config(tmp_path / "out", max_steps=4, save_strategy="steps", save_steps=2)
    trainer = DiffusionOPDTrainer(int8(0), teachers, args, **run)
    assert trainer.teachers["b"].denoiser is trainer.model  # a quantised base is shared as any
    trainer.train()
    again = DiffusionOPDTrainer(int8(0), {"a": int8(1), "b": style}, config(tmp_path / "again", max_steps=4), **run)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert torch.equal(trained(trainer), trained(again))
    # What is learnt of a quantised base serves the base
    trainer.save_model(str(tmp_path / "saved"))
    plain = BUILDERS["sd3"](0)
    plain.load_lora_weights(tmp_path / "saved")
    torch.testing.assert_close(draw(plain), draw(trainer.pipeline), rtol=0.1, atol=0.1)
    assert trainer.teachers.loaded["a"].sha256 != load(int8(2), BUILDERS["sd3"](0))[0].sha256


def test_a_quantised_student_is_not_trained_in_full(int8, tmp_path):
    with pytest.raises(ValueError, match="the student's transformer is quantised, and cannot be trained in full"):
        trainer_of(int8(0), tmp_path, full=True)


# Files of the student


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    BUILDERS["sd3"](0).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    ("value", "dtype"),
    [("bfloat16", torch.bfloat16), ("torch.bfloat16", torch.bfloat16), (torch.bfloat16, torch.bfloat16)],
)
def test_dtypes_by_both_their_names(key: str, value, dtype: torch.dtype, saved, tmp_path):
    pipe = load_student(str(saved), config(tmp_path, model_init_kwargs={key: value}), student_lora(), lambda pipe: None)
    assert pipe.transformer.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == dtype


def test_dtypes_by_parts(saved, tmp_path):
    dtypes = {"transformer": "bfloat16", "default": "float32"}
    args = config(tmp_path, model_init_kwargs={"torch_dtype": dtypes})
    pipe = load_student(str(saved), args, student_lora(), lambda pipe: None)
    assert (pipe.transformer.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float32)
    with pytest.raises(ValueError, match="dtype 'half' is none|dtype 'float17' is none"):
        trainer_of(str(saved), tmp_path, model_init_kwargs={"torch_dtype": {"vae": "float17"}})


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_3", "vae", "transformer"])
def test_a_student_that_lacks_a_tensor_is_refused(part: str, tmp_path):
    pipe = BUILDERS["sd3"](0)
    pipe.save_pretrained(tmp_path / "model")
    (file,) = (tmp_path / "model" / part).glob("*.safetensors")
    tensors = load_file(file)
    lost = sorted(tensors)[3]
    save_file({key: value for key, value in tensors.items() if key != lost}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks 1 tensors of its {part}, e.g.") as refused:
        trainer_of(str(tmp_path / "model"), tmp_path / "out")
    assert lost.split(".")[-2] in str(refused.value)


def test_a_tiny_unet_has_no_fused_projections_either(tmp_path):
    student = BUILDERS["sdxl"](0)
    assert isinstance(student.unet, UNet2DConditionModel)
    student.fuse_qkv_projections(vae=False)
    with pytest.raises(ValueError, match="the student's unet has fused projections"):
        trainer_of(student, tmp_path, "sdxl")
