"""Frozen weights in fewer bits, from a config: what then works, equals and is refused, with each backend that computes
on a CPU."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from safetensors.torch import load_file
from torch import nn

from diffusion_opd import (
    DiffusionNFTConfig,
    DiffusionNFTTrainer,
    DiffusionOPDTrainer,
    DiffusionROPDConfig,
    DiffusionROPDTrainer,
    Teacher,
)
from diffusion_opd.fingerprint import contradictions, differ, take_fingerprint
from diffusion_opd.quantization import dequantised, is_quantised
from diffusion_opd.student import load_student
from tests.adapters import LORA_FILE, draw, save_diffusers
from tests.quantising import BACKENDS, take
from tests.tiny_pipelines import BUILDERS
from tests.training import PROMPTS, config, lora, trained

PARTS = ["transformer", "text_encoder_3"]
ERRORS = {"torchao": 0.02, "nf4": 0.3, "int8": 0.02}  # of what is drawn on a quantised base


def data_of(*tasks: str) -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS[: 2 * len(tasks)], "teacher_id": [*tasks] * 2})


@pytest.fixture(params=BACKENDS)
def quantised(request) -> str:
    return take(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    BUILDERS["sd3"](0).save_pretrained(folder / "base")
    BUILDERS["sd3"](1).save_pretrained(folder / "whole")
    save_diffusers(folder / "style")
    return folder


def trainer_of(folder: Path, out: Path, quantised: str | None, teachers, **kwargs) -> DiffusionOPDTrainer:
    wanted = None if quantised is None else BACKENDS[quantised] | {"components_to_quantize": PARTS}
    return DiffusionOPDTrainer(
        str(folder / "base"),
        teachers,
        config(out, **{"quantization_config": wanted} | kwargs),
        data_of(*teachers),
        peft_config=lora(),
    )


def whole(module: nn.Module) -> nn.Module:
    """Puts what the quantised layers hold into ordinary ones, as they are read by the backends themselves."""
    for name, layer in list(module.named_modules()):
        weight = getattr(layer, "weight", None)
        if isinstance(layer, nn.Linear) and is_quantised(layer):
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            if hasattr(weight, "quant_state"):
                import bitsandbytes

                values = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
            elif hasattr(layer, "state"):
                scales = layer.state.SCB if layer.state.SCB is not None else weight.SCB
                values = weight.data * scales[:, None] / 127
            else:
                values = weight.qdata * weight.scale
            plain.weight.data, plain.bias = values.float(), layer.bias
            module.set_submodule(name, plain.requires_grad_(False))
    return module


def test_a_run_on_a_quantised_base(quantised: str, folder: Path, tmp_path):
    """LoRA teachers are adapters of it, whole ones are quantised alike; reference, average, resumption, and what is
    saved is the base's."""
    teachers = {
        "lora": str(folder / "style"),
        "pipeline": str(folder / "whole"),
        "denoiser": Teacher(folder / "whole", subfolder="transformer"),
        "base": "base",
    }
    more = {"anchor": "base", "ema_decay": 0.9, "target_extrapolation": 1.5}
    out = tmp_path / "out"
    trainer = trainer_of(folder, out, quantised, teachers, save_strategy="steps", save_steps=1, **more)
    assert is_quantised(trainer.pipeline.text_encoder_3) and not is_quantised(trainer.pipeline.text_encoder)
    assert trainer.teachers["lora"].denoiser is trainer.teachers["base"].denoiser is trainer.model
    for task in ("pipeline", "denoiser"):
        assert trainer.teachers[task].denoiser is not trainer.model and is_quantised(trainer.teachers[task].denoiser)
        assert trainer.teachers[task].pipeline.text_encoder_3 is trainer.pipeline.text_encoder_3  # equal, so shared
    layers = {name: module for name, module in trainer.model.named_modules() if hasattr(module, "base_layer")}
    before = {name: dequantised(layer.base_layer) for name, layer in layers.items()}
    trainer.train()
    assert all(torch.equal(before[name], dequantised(layer.base_layer)) for name, layer in layers.items())

    again = trainer_of(folder, tmp_path / "again", quantised, teachers, **more)
    again.train(resume_from_checkpoint=str(out / "checkpoint-1"))
    assert torch.equal(trained(trainer), trained(again))

    trainer.save_model(str(tmp_path / "saved"))
    plain = BUILDERS["sd3"](0)
    plain.load_lora_weights(tmp_path / "saved")
    state = {key: value for key, value in plain.transformer.state_dict().items() if ".lora_" in key}
    own = {key: value for key, value in trainer.model.state_dict().items() if ".lora_" in key and ".default." in key}
    assert len(state) == len(own) == len(load_file(tmp_path / "saved" / LORA_FILE))
    for key, value in own.items():
        assert torch.equal(value, state[key.replace(".default.", ".default_0.")])
    mine, theirs = draw(trainer.pipeline), draw(plain)
    assert 0 < (mine - theirs).norm() < ERRORS[quantised] * theirs.norm()

    run = json.loads((out / "checkpoint-2" / "run.json").read_text())["made_of"]
    assert set(run["quantization"]) == set(PARTS)
    method = "torchao" if quantised == "torchao" else "bitsandbytes"
    assert {how["quant_method"] for how in run["quantization"].values()} == {method}


@pytest.mark.parametrize("quantised", ["torchao", "nf4"], indirect=True)
def test_a_resumption_on_another_base_is_told(quantised: str, folder: Path, tmp_path, caplog):
    teachers = {"a": str(folder / "style")}
    trainer_of(folder, tmp_path, quantised, teachers, save_strategy="steps", save_steps=1).train()
    plain = trainer_of(folder, tmp_path / "plain", None, teachers)
    with caplog.at_level(logging.WARNING, "diffusion_opd"):
        plain.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert "was made otherwise than this run goes on: quantization: {" in caplog.text and "-> none" in caplog.text
    shutil.copytree(folder, tmp_path / "other")
    BUILDERS["sd3"](3).save_pretrained(tmp_path / "other" / "base")
    other = trainer_of(tmp_path / "other", tmp_path / "others", quantised, teachers)
    with pytest.raises(ValueError, match="was trained on other weights than those of this transformer"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_gradients_are_those_of_the_dequantised_weights(quantised: str, folder: Path, tmp_path):
    """To rounding; LLM.int8 rounds activations too."""

    def gradients(change) -> list[torch.Tensor]:
        trainer = trainer_of(folder, tmp_path, quantised, {"a": str(folder / "style")}, max_grad_norm=0)
        change(trainer.model)
        trainer.current_gradient_accumulation_steps = 1
        rows = [{"prompt": prompt, "teacher_id": "a"} for prompt in PROMPTS[:2]]
        with torch.no_grad():  # `lora_B` begins at zero, and hides the gradient of `lora_A`
            for parameter in trainer.trainable_parameters:
                parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        trainer.training_step(trainer.model, rows)
        return [parameter.grad for parameter in trainer.trainable_parameters]

    mine, theirs = gradients(lambda model: None), gradients(whole)
    tolerance = 0.2 if quantised == "int8" else 1e-4
    for one, other in zip(mine, theirs, strict=True):
        assert (one - other).norm() <= tolerance * other.norm() and other.norm() > 0


@pytest.mark.parametrize("rl", ["nft", "ropd"])
def test_learning_from_rewards_on_a_quantised_base(rl: str, quantised: str, folder: Path, tmp_path):
    cls, make = {
        "nft": (DiffusionNFTTrainer, DiffusionNFTConfig),
        "ropd": (DiffusionROPDTrainer, DiffusionROPDConfig),
    }[rl]
    args = make(
        str(tmp_path),
        quantization_config=BACKENDS[quantised] | {"components_to_quantize": ["transformer"]},
        per_device_train_batch_size=4,
        num_generations=2,
        max_steps=2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        num_inference_steps=3,
        height=32,
        width=32,
        call_kwargs={"max_sequence_length": 16},
        image_steps=0,
        beta=0.1,
    )
    trainer = cls(
        model=str(folder / "base"),
        reward_funcs=lambda prompts, images, **columns: [float(i % 2) for i in range(len(images))],
        teachers=str(folder / "style"),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS[:4]}),
        peft_config=lora(),
    )
    before = trained(trainer).clone()
    trainer.train()
    assert is_quantised(trainer.model) and not torch.equal(before, trained(trainer))


def test_what_is_known_of_a_quantised_base(quantised: str, folder: Path, tmp_path):
    """It is the base that it was made of, and no other."""
    args = config(tmp_path, quantization_config=BACKENDS[quantised] | {"components_to_quantize": ["transformer"]})
    mine = load_student(str(folder / "base"), args, lora(), lambda pipe: None).transformer
    base, other = (BUILDERS["sd3"](seed).transformer for seed in (0, 3))
    fingerprint = take_fingerprint(mine)
    assert not contradictions(base, fingerprint) and not contradictions(mine, take_fingerprint(base))
    assert not differ(fingerprint, take_fingerprint(base)) and differ(fingerprint, take_fingerprint(other))
    assert any(key.endswith("to_q.weight") for key in contradictions(other, fingerprint))
    assert any(key.endswith("to_q.weight") for key in contradictions(mine, take_fingerprint(other)))


# What a user writes


def test_one_backend_for_each_part(folder: Path, tmp_path):
    pytest.importorskip("torchao")
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig as OfTransformers

    one = {"quant_backend": "torchao", "quant_kwargs": {"quant_type": {"Int8WeightOnlyConfig": {"version": 2}}}}
    objects = {
        "transformer": TorchAoConfig(Int8WeightOnlyConfig()),
        "text_encoder": OfTransformers(Int8WeightOnlyConfig()),
    }
    for given in (
        {"quant_mapping": {"transformer": one, "text_encoder": one}},
        json.dumps({"quant_mapping": {"transformer": one, "text_encoder": one}}),
        {"quant_mapping": objects},
        PipelineQuantizationConfig(quant_mapping=objects),
    ):
        args = config(tmp_path, quantization_config=given)
        json.dumps(args.to_dict()["quantization_config"])  # which trackers are told
        pipe = load_student(str(folder / "base"), args, lora(), lambda pipe: None)
        parts = {name for name, part in pipe.components.items() if isinstance(part, nn.Module) and is_quantised(part)}
        assert parts == {"transformer", "text_encoder"}


def test_a_full_student_beside_quantised_encoders(folder: Path, tmp_path):
    pytest.importorskip("torchao")
    wanted = BACKENDS["torchao"] | {"components_to_quantize": "text_encoder_3"}
    args = config(tmp_path, quantization_config=wanted, learning_rate=1e-4)
    trainer = DiffusionOPDTrainer(str(folder / "base"), str(folder / "style"), args, data_of("style"))
    trainer.train()
    assert is_quantised(trainer.pipeline.text_encoder_3)
    trainer.save_model(str(tmp_path / "saved"))
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert is_quantised(again.text_encoder_3) and torch.equal(draw(again), draw(trainer.pipeline))
