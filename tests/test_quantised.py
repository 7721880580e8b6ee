"""Frozen weights in fewer bits, from a config: what then works, equals and is refused, with each backend that computes
on a CPU."""

import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from safetensors.torch import load_file, save_file
from torch import nn

import diffusion_opd
from diffusion_opd import DiffusionOPDTrainer, Teacher
from diffusion_opd.engines import check_quantised
from diffusion_opd.evaluation import evaluate
from diffusion_opd.fingerprint import contradictions, differ, take_fingerprint
from diffusion_opd.quantization import dequantised, is_quantised, keep_layout
from diffusion_opd.sampling import MicroBatch
from diffusion_opd.scripts import opd
from diffusion_opd.student import load_student
from tests.adapters import LORA_FILE, draw, save_diffusers
from tests.poisoned import Poisoned
from tests.quantising import BACKENDS, take
from tests.tiny_pipelines import BUILDERS
from tests.training import PROMPTS, config, lora, trained

PARTS = ["transformer", "text_encoder_3"]
ERRORS = {"torchao": 0.02, "nf4": 0.3, "int8": 0.02}  # of what is drawn on a quantised base


def data_of(*tasks: str) -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS[: 2 * len(tasks)], "teacher_id": [*tasks] * 2})


@pytest.fixture(params=BACKENDS)
def quantised(request, monkeypatch) -> str:
    return take(request.param, monkeypatch.setattr)


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

    # Where whole teachers wait is no matter
    again = trainer_of(folder, tmp_path / "again", quantised, teachers, teacher_placement="cpu", **more)
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


def test_quantised_encoders_and_teachers_wait_in_cpu_memory(quantised: str, folder: Path, tmp_path, monkeypatch):
    """What is away holds nonsense here, and the numbers are the same."""
    teachers = {"lora": str(folder / "style"), "pipeline": str(folder / "whole")}
    there = trainer_of(folder, tmp_path / "there", quantised, teachers)
    there.train()
    for module in ("ahead", "teachers.teachers"):
        monkeypatch.setattr(f"diffusion_opd.{module}.Parts", Poisoned)
    away = trainer_of(folder, tmp_path / "away", quantised, teachers, encode_ahead=2, teacher_placement="cpu")
    away.train()
    assert torch.equal(trained(there), trained(away))


def test_a_call_without_gradient_leaves_a_layer_of_four_bits_as_it_is():
    """As on a CPU with AVX512-BF16, on any."""
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer = layer.to("cpu").requires_grad_(False).eval()
    layer.support_avx512bf16_for_cpu = True
    whole = dequantised(layer)
    keep_layout(layer)
    with torch.no_grad():
        layer(torch.randn(3, 128))
    x = torch.randn(3, 128, requires_grad=True)
    layer(x).sum().backward()
    assert torch.equal(dequantised(layer), whole)
    torch.testing.assert_close(x.grad, whole.float().sum(0).expand(3, 128), rtol=1e-4, atol=1e-4)


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
        trainer.training_step(trainer.model, MicroBatch(rows, 0, 0, [0]))
        return [parameter.grad for parameter in trainer.trainable_parameters]

    mine, theirs = gradients(lambda model: None), gradients(whole)
    tolerance = 0.2 if quantised == "int8" else 1e-4
    for one, other in zip(mine, theirs, strict=True):
        assert (one - other).norm() <= tolerance * other.norm() and other.norm() > 0


@pytest.mark.parametrize(
    ("rl", "quantised"), [("NFT", "torchao"), ("GRPO", "nf4"), ("ROPD", "int8")], indirect=["quantised"]
)
def test_learning_from_rewards_on_a_quantised_base(rl: str, quantised: str, folder: Path, tmp_path):
    make, cls = (getattr(diffusion_opd, f"Diffusion{rl}{part}") for part in ("Config", "Trainer"))
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


def test_counted_bytes_are_those_of_what_is_loaded(quantised: str, folder: Path, tmp_path):
    pytest.importorskip("torchao"), pytest.importorskip("bitsandbytes")
    from benchmarks.quantised import size, weights

    args = config(tmp_path, bf16=True, quantization_config=BACKENDS[quantised] | {"components_to_quantize": PARTS})
    pipe, way = (
        load_student(str(folder / "base"), args, lora(), lambda pipe: None),
        {"torchao": "torchao int8", "nf4": "NF4", "int8": "LLM.int8"}[quantised],
    )
    for part in PARTS:
        loaded, plain = getattr(pipe, part), getattr(BUILDERS["sd3"](0), part)
        state = dict(loaded.named_buffers()) | loaded.state_dict(keep_vars=True)
        state = {id(value): value for key, value in state.items() if ".lora_" not in key}
        held = sum(size(getattr(value, "data", value)) for value in state.values())
        assert weights(plain, way) == pytest.approx(held, rel=0.01)


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


def test_yaml_and_flags(folder: Path, tmp_path):
    """From a file to the saved LoRA, and its pictures on the quantised base."""
    pytest.importorskip("torchao")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:4]))
    (tmp_path / "opd.yaml").write_text(f"""
model_name_or_path: {folder / "base"}
teachers: ["{folder / "style"}"]
train_files: ["{tmp_path / "prompts.txt"}"]
lora_r: 4
lora_target_modules: [to_q, to_v]
quantization_config:
  quant_backend: torchao
  quant_kwargs: {{ quant_type: Int8WeightOnlyConfig }}
  components_to_quantize: [transformer, text_encoder_3]
call_kwargs: {{ max_sequence_length: 16 }}
height: 16
width: 16
num_inference_steps: 2
per_device_train_batch_size: 2
max_steps: 1
image_steps: 0
report_to: none
use_cpu: true
output_dir: {tmp_path / "out"}
""")
    by_file = opd.make_parser().parse_args_and_config(["--config", str(tmp_path / "opd.yaml")])
    flag = json.dumps(BACKENDS["torchao"] | {"components_to_quantize": PARTS})
    flags = ["--output_dir", str(tmp_path), "--teachers", "x", "--quantization_config", flag]
    by_flags = opd.make_parser().parse_args_and_config(flags)
    assert by_file[1].quantization_config == by_flags[1].quantization_config
    opd.main(*by_file)
    draws = {"prompts": str(tmp_path / "prompts.txt"), "output_dir": str(tmp_path / "table"), "dtype": "float32"}
    draws |= {"num_inference_steps": 1, "height": 16, "width": 16, "call_kwargs": {"max_sequence_length": 16}}
    rows = str(folder / "base"), ["jpeg_compressibility"]
    results = evaluate(*rows, lora=[str(tmp_path / "out")], quantization_config=json.loads(flag), **draws)
    assert results["models"].keys() == {"base", "out"}
    assert results["settings"]["quantization_config"] == json.loads(flag)
    with pytest.raises(ValueError, match=r"other settings \(quantization_config \{'quant_backend': 'torchao'"):
        evaluate(*rows, **draws)


# What is refused


def test_a_quantised_student_is_not_trained_in_full_nor_read_first(folder: Path, tmp_path):
    pytest.importorskip("torchao")
    shutil.copytree(folder / "base", tmp_path / "base")
    (tmp_path / "base" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    args = config(tmp_path / "out", quantization_config=BACKENDS["torchao"])
    with pytest.raises(ValueError, match="the student's transformer is quantised, and cannot be trained in full"):
        DiffusionOPDTrainer(str(tmp_path / "base"), str(folder / "style"), args, data_of("style"))


def test_parts_that_are_not_there_are_named(folder: Path, tmp_path):
    pytest.importorskip("torchao")
    wanted = BACKENDS["torchao"] | {"components_to_quantize": ["transformer", "scheduler", "unet"]}
    with pytest.raises(ValueError, match=r"names \['scheduler', 'unet'\], and the models of the student '.*'vae'\]"):
        load_student(str(folder / "base"), config(tmp_path, quantization_config=wanted), lora(), lambda pipe: None)


def test_a_teacher_that_is_more_than_a_lora_has_no_quantised_copy(tmp_path):
    """A Control LoRA, which replaces norms too."""
    pytest.importorskip("torchao")
    BUILDERS["flux"](0).save_pretrained(tmp_path / "base")
    file = save_diffusers(tmp_path / "control", "flux", metadata=False) / LORA_FILE
    norm = {"transformer.transformer_blocks.0.attn.norm_q.weight": torch.full((16,), 2.0)}
    save_file(load_file(file) | norm, file)
    wanted = BACKENDS["torchao"] | {"components_to_quantize": ["transformer"]}
    args = config(tmp_path / "out", "flux", quantization_config=wanted)
    with pytest.raises(ValueError, match="teacher 'a' .* does more to the transformer .* which is not done"):
        DiffusionOPDTrainer(
            str(tmp_path / "base"), {"a": str(tmp_path / "control")}, args, data_of("a"), peft_config=lora()
        )


def test_engines_say_what_they_cannot_hold(folder: Path, tmp_path):
    pytest.importorskip("torchao")
    wanted = BACKENDS["torchao"] | {"components_to_quantize": ["transformer"]}
    args = config(tmp_path, quantization_config=wanted)
    denoiser = load_student(str(folder / "base"), args, lora(), lambda pipe: None).transformer
    check_quantised(denoiser, is_fsdp=False, is_deepspeed=False)
    for engine in ("FSDP2", "DeepSpeed"):
        with pytest.raises(ValueError, match=f"{engine} cannot hold quantised weights of the kind Int8Tensor; use DDP"):
            check_quantised(denoiser, is_fsdp=engine == "FSDP2", is_deepspeed=engine == "DeepSpeed")


@pytest.mark.parametrize("package", ["bitsandbytes", "torchao"])
def test_a_package_that_is_not_there_is_named(package: str, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    backend = {"bitsandbytes": "nf4", "torchao": "torchao"}[package]
    with pytest.raises(ValueError, match=rf"asks for {package}, .*`pip install 'diffusion-opd\[{package}\]'`"):
        config(tmp_path, quantization_config=BACKENDS[backend])


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is one")
def test_bitsandbytes_asks_for_a_gpu(folder: Path, tmp_path):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match="the student '.*' cannot be loaded: No GPU found"):
        load_student(str(folder / "base"), config(tmp_path, quantization_config=BACKENDS["nf4"]), lora(), print)


@pytest.mark.parametrize(
    ("type_", "words"),
    [(None, "None"), ("int8", "'int8'"), ("quantize_", "'quantize_'"), ({"Int8WeightOnlyConfig": 1}, "1}")],
)
def test_types_of_torchao_are_its_configs(type_, words: str, tmp_path):
    pytest.importorskip("torchao")
    given = {"quant_backend": "torchao", "quant_kwargs": {"quant_type": type_}}
    with pytest.raises(
        ValueError, match="must be the name of one of its configs, e.g. 'Int8WeightOnlyConfig'"
    ) as error:
        config(tmp_path, quantization_config=given)
    assert words in str(error.value)
