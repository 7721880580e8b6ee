"""The recipe, started as a user starts it: `diffusion-opd opd`, with the configs of accelerate that the package ships,
settings from YAML or from flags. What it leaves behind is loaded in plain diffusers."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model

from diffusion_opd import Lora, Teacher
from diffusion_opd.scripts import opd
from tests.hub_server import HubServer, client
from tests.tiny_pipelines import CALL, sd3

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "examples" / "configs" / "sd35" / "opd.yaml"
TASKS = ("aesthetic", "ocr", "geneval")


def parse(*flags: str) -> tuple:
    return opd.make_parser().parse_args_and_config([str(flag) for flag in flags])


TARGETS = parse("--output_dir", "x", "--use_cpu", "true")[0].lora_target_modules

# The settings


def test_recipe_is_the_released_one():
    # fp16 needs a GPU; the rest is as it stands in the file
    script_args, config = parse("--config", RECIPE, "--fp16", "false", "--use_cpu", "true")
    assert config.num_learnt_steps == 9
    assert config.pipeline_kwargs == {
        "guidance_scale": 4.5,
        "height": 512,
        "width": 512,
        "max_sequence_length": 128,
    }
    assert (config.transition, config.noise_level, config.objective) == ("ode", 0.0, "kl")
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 3 * 3
    assert (config.learning_rate, config.weight_decay, config.adam_epsilon) == (3e-4, 1e-4, 1e-8)
    assert (config.adam_beta1, config.adam_beta2, config.max_grad_norm) == (0.9, 0.999, 1.0)
    assert (config.ema_decay, config.ema_update_every, config.lr_scheduler_type) == (0.9, 8, "constant")
    teachers = opd.load_teachers(script_args.teachers).values()
    assert [(teacher.source, teacher.id, teacher.guidance_scale) for teacher in teachers] == [
        ("quanhaol/DiffusionOPD/AesTeacher/lora", "aesthetic", 4.5),
        ("quanhaol/DiffusionOPD/OCRTeacher/lora", "ocr", 4.5),
        ("quanhaol/DiffusionOPD/GenEvalTeacher/lora", "geneval", 1.0),
    ]
    # The parties of the file are also those of the script without it
    assert script_args.train_files.keys() == set(TASKS)
    script_args.train_files = None
    assert script_args == parse("--output_dir", "x", "--use_cpu", "true")[0]


def test_flags_and_yaml_give_the_same_config(tmp_path):
    settings = {**yaml.safe_load(RECIPE.read_text()), "fp16": False, "use_cpu": True, "lora_r": 8}
    settings |= {"teachers": ["style=me/style", "me/ocr"], "train_files": ["style.txt", "ocr.txt"]}
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(settings))
    flags = []
    for key, value in settings.items():
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        flags += [f"--{key}", *values]
    from_file, from_flags = parse("--config", file), parse(*flags)
    for a, b in zip(from_file, from_flags, strict=True):
        assert asdict(a) == asdict(b)
    assert from_file[0].lora_r == 8


def test_a_flag_wins_over_the_file():
    script_args, config = parse(
        "--config", RECIPE, "--fp16", "false", "--use_cpu", "true", "--learning_rate", "1e-5", "--no_use_peft"
    )
    assert (config.learning_rate, config.num_inference_steps, script_args.use_peft) == (1e-5, 10, False)


def test_teachers_as_flags_and_yaml_name_them():
    base = {"path": "me/first", "subfolder": "lora"}
    in_yaml = [{"path": "me/a", "id": "x", "scale": 0.5, "base_lora": base}, "me/b", "c=me/c"]
    first, second, third = opd.load_teachers(in_yaml).values()
    assert first == Teacher("me/a", id="x", scale=0.5, base_lora=Lora("me/first", subfolder="lora"))
    assert (second, third) == (Teacher("me/b", id="b"), Teacher("me/c", id="c"))
    assert opd.load_teachers({"c": "me/c"}) == opd.load_teachers("c=me/c") == {"c": third}


@pytest.mark.parametrize(
    ("teachers", "message"),
    [
        (
            [{"path": "me/a", "guidence_scale": 1.0}],
            r"a teacher has no \['guidence_scale'\]; a Teacher has \['path', 'id'",
        ),
        ([{"id": "a"}], r"a teacher needs a `path`, got \{'id': 'a'\}"),
    ],
)
def test_teachers_that_do_not_fit_are_refused(teachers, message):
    with pytest.raises(ValueError, match=message):
        opd.load_teachers(teachers)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], r"in one of the ways \['train_files', 'dataset_name', 'datasets'\]; got none"),
        (["--train_files", "a.txt", "--dataset_name", "me/prompts"], r"got \['train_files', 'dataset_name'\]"),
        (["--train_files", "a.txt"], r"`train_files` needs one file for each of \['aesthetic', 'ocr', 'geneval'\]"),
        (["--train_files", "a.txt", "b.txt", "c.txt"], "there is no file of prompts 'a.txt'"),
        (
            ["--train_files", "a.doc", "b.txt", "c.txt"],
            r"ends in one of \['.txt', '.json', '.jsonl', '.csv'\], got 'a.doc'",
        ),
    ],
)
def test_prompts_that_do_not_fit_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        opd.main(*parse("--output_dir", "x", "--use_cpu", "true", *flags))


# The runs


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    """A tiny SD3, three teachers as the published ones lie on the Hub, and their prompts."""
    root = tmp_path_factory.mktemp("opd")
    pipeline = sd3()
    pipeline.save_pretrained(root / "base")
    for seed, name in enumerate(("AesTeacher", "OCRTeacher", "GenEvalTeacher")):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            # As the released code saves them: peft's own format and keys
            config = LoraConfig(r=8, lora_alpha=16, init_lora_weights=False, target_modules=TARGETS)
            get_peft_model(copy.deepcopy(pipeline.transformer), config).save_pretrained(
                root / "teachers" / name / "lora"
            )
    (root / "aesthetic.txt").write_text("".join(f"a picture of {i} hills\n" for i in range(8)))
    (root / "ocr.txt").write_text("".join(f'a sign that says "{i}"\n' for i in range(8)))
    # GenEval's prompts come with what its judge needs
    lines = [{"tag": "counting", "include": [{"class": "dog", "count": i}], "prompt": f"{i} dogs"} for i in range(8)]
    (root / "geneval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = yaml.safe_load(RECIPE.read_text())
    for teacher in settings["teachers"]:
        teacher["path"] = str(root / "teachers")
    names = {"aesthetic": "aesthetic.txt", "ocr": "ocr.txt", "geneval": "geneval.jsonl"}
    settings["train_files"] = {task: str(root / name) for task, name in names.items()}
    (root / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return root


def run(
    files: Path,
    out: Path,
    *flags: str,
    launched: bool = False,
    last: int = 2,
    config: str = "recipe.yaml",
    **environment: str,
) -> list[dict]:
    """Starts the recipe, smaller, in this process's place or `launched`; returns what it logged."""
    command = [sys.executable, "-m", f"diffusion_opd.cli.{'main' if launched else 'worker'}", "opd"]
    command += ["--config", files / config, "--output_dir", out, "--model_name_or_path", files / "base"]
    command += ["--height", "16", "--width", "16", "--call_kwargs", '{"max_sequence_length": 32}', "--fp16", "false"]
    command += ["--num_inference_steps", "3", "--image_num_inference_steps", "2", "--ema_update_every", "1"]
    command += ["--max_steps", "2", "--save_steps", "2", "--learning_rate", "1e-2", "--report_to", "none", *flags]
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(files / "cache"), **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert f"Student saved to {out}." in done.stdout
    return json.loads((out / f"checkpoint-{last}" / "trainer_state.json").read_text())["log_history"]


def latents(pipeline: DiffusionPipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        "a hill",
        num_inference_steps=3,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        **CALL["sd3"],
    ).images


def assert_lora_loads(files: Path, out: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(files / "base")
    before = latents(pipeline)
    pipeline.load_lora_weights(out, weight_name="pytorch_lora_weights.safetensors")
    (adapter,) = pipeline.transformer.peft_config.values()
    assert (adapter.r, adapter.lora_alpha) == (32, 64)
    assert (latents(pipeline) - before).abs().max() > 1e-4
    pipeline.unload_lora_weights()
    assert torch.equal(latents(pipeline), before)


@pytest.fixture(scope="session")
def one_process(files, tmp_path_factory) -> tuple[Path, list[dict]]:
    out = tmp_path_factory.mktemp("one") / "student"
    flags = ["--use_cpu", "true", "--per_device_train_batch_size", "4", "--image_steps", "1"]
    return out, run(files, out, *flags)


@pytest.mark.slow
def test_the_recipe_in_half_precision_comes_past_its_first_pictures(files, tmp_path):
    """It saves, and draws, every 30 steps; what it loads is in half precision."""
    recipe, out = yaml.safe_load(RECIPE.read_text()), tmp_path / "student"
    flags = ["--bf16", "true", "--use_cpu", "true", "--max_steps", "31"]
    for name in ("save_steps", "image_steps", "image_num_inference_steps", "ema_update_every"):
        flags += [f"--{name}", str(recipe[name])]
    history = run(files, out, *flags, last=31)
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, 32))
    assert sorted(path.name for path in (out / "images").iterdir()) == ["step_000030", "step_000031"]
    assert len(list((out / "images").rglob("*.png"))) == 2 * 6 and (out / "checkpoint-30").is_dir()
    assert_lora_loads(files, out)


@pytest.mark.slow
def test_one_process(files, one_process):
    out, history = one_process
    for task in TASKS:
        assert history[0][f"kl/{task}"] > 0
    assert_lora_loads(files, out)
    names = {str(path.relative_to(out)) for path in out.rglob("*")}
    assert {"README.md", "pytorch_lora_weights.safetensors", "teacher_manifest.json"} <= names
    assert {f"images/step_00000{step}/0{image}.png" for step in (1, 2) for image in range(6)} <= names
    teachers = json.loads((out / "teacher_manifest.json").read_text())["teachers"]
    assert [teacher["id"] for teacher in teachers] == list(TASKS)
    assert len({teacher["sha256"] for teacher in teachers}) == 3


def assert_same_losses(history: list[dict], reference: list[dict]) -> None:
    for entry, expected in zip(history[:2], reference[:2], strict=True):
        for key in ("loss", "grad_norm", *(f"kl/{task}" for task in TASKS)):
            assert entry[key] == pytest.approx(expected[key], rel=1e-3), key


def launch(config: str) -> list[str]:
    return ["--accelerate_config", config, "--num_processes", "2", "--main_process_port", "0"]


@pytest.mark.slow
def test_two_processes_ddp(files, one_process, tmp_path):
    flags = ["--use_cpu", "true", "--per_device_train_batch_size", "2"]
    history = run(files, tmp_path / "out", *launch("multi_gpu"), *flags, launched=True)
    assert_same_losses(history, one_process[1])
    assert_lora_loads(files, tmp_path / "out")
    # Each process left its random state: there were two, and no engine
    names = {path.name for path in (tmp_path / "out" / "checkpoint-2").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"} <= names


@pytest.mark.slow
def test_two_processes_zero2(files, one_process, tmp_path):
    pytest.importorskip("deepspeed")
    flags = ["--ddp_backend", "gloo", "--bf16", "false", "--per_device_train_batch_size", "2"]
    history = run(files, tmp_path / "out", *launch("zero2"), *flags, launched=True, DS_ACCELERATOR="cpu")
    assert_same_losses(history, one_process[1])
    assert_lora_loads(files, tmp_path / "out")
    # DeepSpeed's own optimizer shards, one a process
    shards = list((tmp_path / "out" / "checkpoint-2" / "global_step2").glob("*optim_states.pt"))
    assert len(shards) == 2


@pytest.mark.slow
def test_whole_denoiser_from_a_dataset_with_evaluation(files, tmp_path):
    rows = {"prompt": [f"prompt {i}" for i in range(12)], "teacher_id": list(TASKS) * 4}
    for split in ("train", "test"):
        Dataset.from_dict(rows).to_json(tmp_path / "prompts" / f"{split}.jsonl")
    settings = yaml.safe_load((files / "recipe.yaml").read_text())
    del settings["train_files"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    flags = ["--dataset_name", tmp_path / "prompts", "--no_use_peft", "--use_cpu", "true", "--image_steps", "0"]
    flags += ["--eval_strategy", "steps", "--eval_steps", "1"]
    history = run(files, tmp_path / "out", *flags, config=tmp_path / "recipe.yaml")
    (first, second) = [entry for entry in history if "eval_loss" in entry]
    assert second["eval_loss"] < first["eval_loss"]
    student = DiffusionPipeline.from_pretrained(tmp_path / "out")
    base = DiffusionPipeline.from_pretrained(files / "base")
    assert (latents(student) - latents(base)).abs().max() > 1e-4


@pytest.mark.slow
def test_pushed_student_is_the_saved_one(files, tmp_path):
    with HubServer() as hub:
        out, home = tmp_path / "student", tmp_path / "home"
        home.mkdir()
        flags = ["--use_cpu", "true", "--push_to_hub", "--image_steps", "2"]
        run(files, out, *flags, **hub.environment(home))
        pushed = hub.repositories["models/me/student"].at("main").files
        assert {"README.md", "pytorch_lora_weights.safetensors", "teacher_manifest.json"} <= pushed.keys()
        client(hub, tmp_path / "elsewhere", LOAD.format(base=str(files / "base"), call=CALL["sd3"]))
    student = DiffusionPipeline.from_pretrained(files / "base")
    student.load_lora_weights(out, weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(torch.load(tmp_path / "elsewhere" / "latents.pt"), latents(student))


LOAD = """
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({base!r})
pipeline.load_lora_weights("me/student")
generator = torch.Generator().manual_seed(0)
latents = pipeline("a hill", num_inference_steps=3, output_type="latent", generator=generator, **{call!r}).images
torch.save(latents, "latents.pt")
result = None
"""
