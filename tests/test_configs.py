"""The files of `examples/configs/sd35`, run one after the other as they stand, from nothing to the student: only sizes
and numbers of steps are smaller. Base, published teachers and prompts are folders and files of the names that the files
have, and behind the names of the rewards there are small ones."""

import copy
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import datasets
import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from diffusion_opd.cli.commands import LaunchedCommand
from diffusion_opd.rewards import REWARDS
from tests.editing_pipelines import EDITING, EDITING_CALL, picture
from tests.tiny_pipelines import BUILDERS, CALL, LORA_TARGETS, sd3

FOLDER = Path(__file__).parents[1] / "examples" / "configs" / "sd35"
BASE = "stabilityai/stable-diffusion-3.5-medium"
TASKS = ("aesthetic", "ocr", "geneval")
STAGES = {
    "nft_geneval": "nft",
    "guard_ocr": "grpo",
    "guard_aesthetic": "grpo",
    "opd": "opd",
    "flow_opd": "opd",
    "danceopd_zimage": "opd",
    "multi_reward_guard": "grpo",
    "cascade_nft_1": "nft",
    "cascade_nft_2": "nft",
    "cascade_nft_3": "nft",
}
SMALLER = (
    "--max_steps 2 --save_steps 2 --num_inference_steps 3 --height 16 --width 16 --image_steps 0 --ema_update_every 1 "
    "--report_to none --disable_tqdm true --use_cpu true --fp16 false --learning_rate 1e-2"
).split() + ["--call_kwargs", '{"max_sequence_length": 32}']
SMALLER_GROUPS = "--num_generations 2 --per_device_train_batch_size 2".split()
# Of no consequence, or said of the line before
OURS = ("width", "logging_steps", "image_steps", "output_dir")
METADATA = [
    {"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "two dogs"},
    {
        "tag": "position",
        "include": [{"class": "dog", "count": 1}, {"class": "tv", "count": 1, "position": ["left of", 0]}],
        "prompt": "a tv left of a dog",
    },
]


def brightness(images) -> list[float]:
    return [float(np.asarray(image.convert("L")).mean()) / 255 for image in images]


class Brightness:
    """In the place of a scorer that looks at prompts and pictures."""

    def __init__(self, batch_size: int = 8):
        self.batch_size = batch_size

    def __call__(self, prompts, images):
        return brightness(images)


class Boxes(Brightness):
    """In the place of GenEval, which needs what a prompt asks for."""

    def __call__(self, prompts, images, include, tag):
        assert all(part["class"] in ("dog", "tv") for parts in include for part in parts)
        return [value if kind == "counting" else 1 - value for value, kind in zip(brightness(images), tag, strict=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the recipe is followed."""
    root = tmp_path_factory.mktemp("recipe")
    base = sd3()
    base.save_pretrained(root / BASE)
    with torch.random.fork_rng():
        for seed, name in enumerate(("AesTeacher", "OCRTeacher", "GenEvalTeacher")):
            torch.manual_seed(seed)
            lora = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=LORA_TARGETS)
            get_peft_model(copy.deepcopy(base.transformer), lora).save_pretrained(
                root / "quanhaol/DiffusionOPD" / name / "lora"
            )
    for name in ("ocr", "pickscore", "geneval"):
        (root / "dataset" / name).mkdir(parents=True)
        (root / "dataset" / name / "train.txt").write_text('a sign that says "1"\na sign that says "2"\n')
    lines = "".join(json.dumps(row) + "\n" for row in METADATA * 2)
    (root / "dataset" / "geneval" / "train_metadata.jsonl").write_text(lines)
    return root


@pytest.fixture
def there(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    module = ModuleType("diffusion_opd.rewards.small")
    for name in REWARDS:
        kind = Boxes if name == "geneval" else Brightness
        setattr(module, name, type(name, (kind,), {"__name__": name}))
        monkeypatch.setitem(REWARDS, name, f"small.{name}")
    monkeypatch.setitem(sys.modules, module.__name__, module)


def file_of(name: str) -> Path:
    return FOLDER.parent / f"{name}.yaml" if name == "danceopd_zimage" else FOLDER / f"{name}.yaml"


def settings(name: str) -> dict:
    return yaml.safe_load(file_of(name).read_text())


def run(name: str, *flags: str) -> list[dict]:
    """Follows a file with the script that it is for; returns what was logged."""
    script = importlib.import_module(f"diffusion_opd.scripts.{STAGES[name]}")
    flags = [*SMALLER, *([] if STAGES[name] == "opd" else SMALLER_GROUPS), *flags]
    script.main(*script.make_parser().parse_args_and_config(["--config", str(file_of(name)), *flags]))
    state = Path(settings(name)["output_dir"], "checkpoint-2", "trainer_state.json")
    return [entry for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]


def weights(name: str) -> dict[str, torch.Tensor]:
    return load_file(Path(settings(name)["output_dir"], "pytorch_lora_weights.safetensors"))


def test_every_file_is_run_here():
    assert {path.stem for path in FOLDER.parent.rglob("*.yaml")} == STAGES.keys() | {"evaluate"}


def specialists() -> list[str]:
    return [one["path"] if isinstance(one, dict) else one for one in settings("evaluate")["lora"]]


def test_the_table_is_of_what_the_others_leave_and_its_keys_are_flags():
    left = {settings(name)["output_dir"] for name in ("nft_geneval", "guard_ocr", "guard_aesthetic", "opd")}
    assert set(specialists()) == left
    assert set(settings("evaluate")["metrics"]) <= REWARDS.keys()
    told = LaunchedCommand("evaluate", "").launched(["--config", str(FOLDER / "evaluate.yaml")])
    assert told.config_file is None


@pytest.mark.slow
def test_the_table(there, monkeypatch):
    """Of all rows and metrics; GenEval's file and OCR's are read, the preset is a file."""
    for seed, name in enumerate(specialists()):
        if not Path(name).exists():
            lora = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=LORA_TARGETS)
            torch.manual_seed(seed)
            get_peft_model(sd3().transformer, lora).save_pretrained(name)
    lines = "".join(json.dumps(row) + "\n" for row in METADATA * 4)
    Path("dataset/geneval/test_metadata.jsonl").write_text(lines)
    Path("dataset/ocr/test.txt").write_text('a sign that says "3"\n')
    Path("drawbench.txt").write_text("a cat\na dog\n")
    told = settings("evaluate") | {"height": 16, "width": 16, "num_inference_steps": 2, "dtype": "float32"}
    told |= {"call_kwargs": {"max_sequence_length": 32}, "prompts": told["prompts"] | {"default": "drawbench.txt"}}
    Path("evaluate.yaml").write_text(yaml.safe_dump(told))
    script = importlib.import_module("diffusion_opd.scripts.evaluate")
    script.main(*script.make_parser().parse_args_and_config(["--config", "evaluate.yaml"]))
    results = json.loads(Path("sd35m-evaluation/results.json").read_text())
    assert list(results["models"]) == ["base", *specialists()]
    assert results["settings"]["own_call_kwargs"] == {"sd35m-geneval": {"guidance_scale": 1.0}}
    for own in results["models"].values():
        assert {name: one["scored"] for name, one in own.items()} == dict.fromkeys(told["metrics"], 2) | {
            "geneval": 8,
            "ocr": 1,
        }
        assert own["geneval"]["groups"].keys() == {"counting", "position"}


@pytest.mark.parametrize("name", STAGES)
def test_every_value_has_its_source(name):
    """Behind it, or behind the key that it is part of."""
    for line in file_of(name).read_text().splitlines():
        if line[:1].isalpha() and line.split(":")[0] not in OURS:
            assert " # " in line, line


@pytest.mark.parametrize("name", [name for name, script in STAGES.items() if script != "opd"])
def test_eight_gpus_draw_whole_groups_of_each_task(name):
    given = settings(name)
    rewards, micro_batches = given["reward_funcs"], given["gradient_accumulation_steps"]
    tasks = len(rewards) if isinstance(rewards, dict) else 1
    assert micro_batches % tasks == 0
    drawn = 8 * given["per_device_train_batch_size"] * given.get("steps_per_generation", micro_batches)
    assert drawn % (tasks * given["num_generations"]) == 0
    assert drawn // given["num_generations"] in (48, 54)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rewards"),
    [
        ("nft_geneval", ["geneval"]),
        ("guard_ocr", ["ocr"]),
        ("guard_aesthetic", ["pickscore", "clipscore", "hpsv2"]),
    ],
)
def test_a_specialist(there, name, rewards):
    parts = ["--steps_per_generation", "2"] if name.startswith("guard") else []
    first, second = run(name, "--gradient_accumulation_steps", "1", *parts)
    means = [first[f"rewards/{reward}/mean"] for reward in rewards]
    assert first["reward"] == pytest.approx(sum(means), rel=1e-5)  # 1:1:1
    assert second["grad_norm"] > 0
    lora = weights(name)
    assert all(tensor.shape[0] == 32 for key, tensor in lora.items() if "lora_A" in key)
    pipeline = DiffusionPipeline.from_pretrained(BASE)
    pipeline.load_lora_weights(settings(name)["output_dir"], weight_name="pytorch_lora_weights.safetensors")


@pytest.mark.slow
def test_the_student(there):
    first, second = run("opd", "--per_device_train_batch_size", "1")
    for task in TASKS:
        assert first[f"kl/{task}"] > 0
    manifest = json.loads(Path("sd35m-opd", "teacher_manifest.json").read_text())["teachers"]
    assert [teacher["id"] for teacher in manifest] == list(TASKS)


def save_lora(seed: int, base: DiffusionPipeline, folder: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lora = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=LORA_TARGETS)
        get_peft_model(copy.deepcopy(base.transformer), lora).save_pretrained(folder)


@pytest.mark.slow
def test_the_student_of_flow_opd(there):
    for seed, name in enumerate(("GenEval", "Text", "PickScore")):
        save_lora(seed, sd3(), f"jieliu/SD3.5M-FlowGRPO-{name}")
    first, second = run("flow_opd", "--per_device_train_batch_size", "1")
    assert first["kl/ocr"] > 0 and first["kl/geneval"] > 0 and first["anchor"] > 0 and first["anchor/ocr"] > 0
    assert second["loss"] > 0
    told = json.loads(Path("sd35m-flow-opd", "teacher_manifest.json").read_text())["teachers"]
    assert [teacher["id"] for teacher in told] == ["ocr", "geneval", "anchor"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["zimage", "flux_kontext", "qwen_edit"])
def test_the_student_of_danceopd(there, family):
    """Text-to-image, local and global edits: routes of their own data, of which those that edit hold a source picture;
    Z-Image's pipeline takes none."""
    makers = {**BUILDERS, **EDITING}
    calls = CALL | EDITING_CALL
    base = makers[family](0)
    # A folder of Qwen-Image-Edit is read with torchvision alone
    where = None if family == "qwen_edit" else f"bases/{family}"
    if where:
        base.save_pretrained(where)
    name = "danceopd_zimage"
    script = importlib.import_module("diffusion_opd.scripts.opd")
    told = settings(name)
    for seed, teacher in enumerate(told["teachers"]):
        save_lora(seed, base, teacher["path"])
    rows = [{"uid": n, "task": "edit", "prompt": f"make it red {n}", "source_image": f"{n}.png"} for n in range(2)]
    for number in range(2):
        picture(24, number).save(f"{number}.png")
    for task, file in told["train_files"].items():
        own = [{"prompt": f"a picture {n}"} for n in range(2)] if task == "t2i" else rows
        Path(file).write_text("".join(json.dumps(row) + "\n" for row in own))
    own_call = {key: value for key, value in calls[family].items() if key not in ("height", "width", "guidance_scale")}
    flags = [*SMALLER[:-2], "--call_kwargs", json.dumps(own_call), "--max_steps", "4", "--save_steps", "4"]
    flags += ["--bf16", "false", "--output_dir", f"dance-{family}", "--task_weights", '{"t2i": 1}', "--seed", "3"]
    if family == "qwen_edit":  # each sample needs a picture
        own = {task: file for task, file in told["train_files"].items() if task != "t2i"}
        told |= {"train_files": own, "teachers": told["teachers"][1:]}
        flags += ["--task_weights", "{}"]
        told["teachers"] = [
            teacher | {"guidance_scale": None, "call_kwargs": {"true_cfg_scale": 3.5}} for teacher in told["teachers"]
        ]
    Path("dance.yaml").write_text(yaml.safe_dump(told | ({"model_name_or_path": where} if where else {})))
    parsed = script.make_parser().parse_args_and_config(["--config", "dance.yaml", *flags])
    if not where:
        parsed[0].model_name_or_path = base
    script.main(*parsed)
    state = Path(f"dance-{family}", "checkpoint-4", "trainer_state.json")
    logs = [entry for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
    routes = [[key for key in entry if key.startswith("kl/")] for entry in logs]
    assert all(len(own) == 1 for own in routes) and len({own[0] for own in routes}) > 1  # one a step
    states = [[key for key in entry if key.startswith("kl_step/")] for entry in logs]
    assert all(len(own) == 1 for own in states)
    lora = load_file(Path(f"dance-{family}", "pytorch_lora_weights.safetensors"))
    assert all(tensor.shape[0] == 128 for key, tensor in lora.items() if "lora_A" in key)


@pytest.mark.slow
def test_joint_learning_rewards_each_task_by_its_own(there):
    first, _ = run("multi_reward_guard", "--gradient_accumulation_steps", "3", "--steps_per_generation", "6")
    assert first["reward/ocr"] == pytest.approx(first["rewards/ocr/mean"], rel=1e-5)
    three = sum(first[f"rewards/{name}/mean"] for name in ("pickscore", "clipscore", "hpsv2"))
    assert first["reward/aesthetic"] == pytest.approx(three, rel=1e-5)
    assert "rewards/geneval/mean" in first


@pytest.mark.slow
def test_each_stage_of_the_cascade_goes_on_where_the_last_one_ended(there):
    run("cascade_nft_1", "--gradient_accumulation_steps", "1")
    for name, last in (("cascade_nft_2", "cascade_nft_1"), ("cascade_nft_3", "cascade_nft_2")):
        start = weights(last)
        # Without learning the stage ends where it began
        run(name, "--gradient_accumulation_steps", "1", "--learning_rate", "0", "--ema_decay", "0")
        assert weights(name).keys() == start.keys()
        for key, tensor in weights(name).items():
            assert torch.allclose(tensor, start[key], atol=1e-7), key
