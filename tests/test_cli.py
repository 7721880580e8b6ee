"""`diffusion-opd` as a shell sees it: what it prints, what it refuses and with which exit code, and what reaches the
processes that it starts."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

import diffusion_opd
from diffusion_opd.checkpoints import last_checkpoint
from diffusion_opd.cli import worker
from diffusion_opd.cli.commands import LaunchedCommand
from diffusion_opd.cli.main import main
from diffusion_opd.scripts.arguments import RLScriptArguments, load_data, load_rewards, student_arguments
from diffusion_opd.teachers import Lora
from tests.adapters import save_peft
from tests.tiny_pipelines import sd3

COMMANDS = ["opd", "nft", "grpo", "ropd", "evaluate", "reward-serve"]
CONFIGS = Path(diffusion_opd.__file__).parent / "accelerate_configs"


def stopped(capsys, *argv: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command that ends the process."""
    with pytest.raises(SystemExit) as end:
        main([str(part) for part in argv])
    return end.value.code, *capsys.readouterr()


# Help


def test_alone_it_lists_the_commands(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n    {name}" in printed for name in COMMANDS)
    assert stopped(capsys, "--help") == (0, printed, "")
    assert stopped(capsys, "--version")[:2] == (0, f"{diffusion_opd.__version__}\n")


@pytest.mark.parametrize("name", ["opd", "nft", "grpo", "ropd"])
def test_help_of_a_command_begins_with_its_own_flags(capsys, name):
    code, short, _ = stopped(capsys, name, "--help")
    assert code == 0 and short.startswith(f"usage: diffusion-opd {name} [--config FILE] [flags]\n")
    own = "--teachers" if name == "opd" else "--reward_funcs"
    assert short.index(own) < short.index("--model_name_or_path") < short.index("--guidance_scale")
    assert short.index("--guidance_scale") < short.index("--output_dir")
    assert "zero2" in short and "--num_processes" in short
    # Of transformers' own only the usual ones, all of them where asked
    code, long, _ = stopped(capsys, name, "--help_all")
    assert code == 0 and "--adam_beta1 NUMBER" not in short and "--adam_beta1 NUMBER" in long
    assert len(short.splitlines()) < 230 < len(long.splitlines())


# Mistakes


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (
            ["odp"],
            "argument COMMAND: invalid choice: 'odp' (choose from 'opd', 'nft', 'grpo', 'ropd', 'evaluate', "
            "'reward-serve')",
        ),
        (["--verison"], "'--verison' is no command and no flag."),
        (["opd", "--lerning_rate", "1"], "nothing is called '--lerning_rate'; does it mean '--learning_rate'?"),
        (["opd", "--num_proceses", "2"], "nothing is called '--num_proceses'; does it mean '--num_processes'?"),
        (["opd", "--xyz"], "nothing is called '--xyz'."),
        (["opd", "--lr=1"], "nothing is called '--lr=1'"),
        (["nft", "prompts.txt"], "'prompts.txt' belongs to no flag."),
        (["opd", "--objective", "kullback"], "argument --objective: invalid choice: 'kullback' (choose from"),
        (["opd", "--max_steps", "many"], "argument --max_steps/--max-steps: invalid int value: 'many'"),
        (["opd", "--config"], "`--config` needs a file."),
        (["opd", "--config", "none.yaml"], "there is no file 'none.yaml'."),
        (["opd", "--config", "list.yaml"], "Config file list.yaml must contain a YAML mapping."),
        (["opd", "--config", "broken.yaml"], "broken.yaml"),
        (["opd", "--config", "typo.yaml"], "nothing is called '--teacher'; does it mean '--teachers'?"),
        (
            ["opd", "--accelerate_config", "zero9"],
            "'zero9' is no file, and none of ['fsdp2', 'multi_gpu', 'multi_node'",
        ),
        (["grpo", "--num_processes", "two"], "argument --num_processes/--num-processes: invalid int value: 'two'"),
    ],
)
def test_a_mistake_is_one_sentence(capsys, tmp_path, monkeypatch, argv, sentence):
    monkeypatch.chdir(tmp_path)
    Path("list.yaml").write_text("- a\n- b\n")
    Path("broken.yaml").write_text("a: [1,\nb: 2\n")
    Path("typo.yaml").write_text("teacher: me/a\n")
    code, printed, told = stopped(capsys, *argv)
    assert code == 2 and printed == ""
    assert told.startswith("diffusion-opd") and told.count("\n") == 1
    assert sentence in told


def test_what_a_config_refuses_is_one_sentence(capsys):
    with pytest.raises(SystemExit) as end:
        worker.run_script("opd", ["--use_cpu", "true", "--noise_level", "0.5"])
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("diffusion-opd opd: error: `transition='ode'` has no noise") and told.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--accelerate_config", "single_gpu"],
        pytest.param(["--accelerate_config", "multi_gpu", "--num_processes", "2"], marks=pytest.mark.nightly),
    ],
)
def test_what_the_library_refuses_is_one_sentence_of_the_started_processes(capfd, tmp_path, flags):
    flags = [*flags, "--main_process_port", "0"]
    flags += ["--use_cpu", "true", "--output_dir", str(tmp_path / "out"), "--train_files", "prompts.txt"]
    assert main(["opd", *flags]) == 2
    told = capfd.readouterr().err
    sentence = "`train_files` needs one file for each of ['aesthetic', 'ocr', 'geneval']; got ['prompts.txt']."
    assert told.count(f"diffusion-opd opd: error: {sentence}\n") == 1
    assert "Traceback" not in told


@pytest.mark.slow
def test_a_command_that_is_terminated_saves_and_ends(mine):
    """What a cluster sends reaches the process that trains."""
    flags = [*SMALL, "--reward_funcs", "my_rewards.red", "--train_files", "prompts.csv", "--max_steps", "100000"]
    flags += [
        "--enable_jit_checkpoint",
        "true",
        "--save_strategy",
        "steps",
        "--save_steps",
        "1",
        "--save_total_limit",
        "2",
    ]
    command = [sys.executable, "-m", "diffusion_opd.cli.main", "grpo", *flags, "--accelerate_config", "single_gpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while process.poll() is None and not list(Path("out").glob("checkpoint-*/checkpoint_files.json")):
        time.sleep(0.2)
    process.terminate()
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 0, told
    assert last_checkpoint("out") is not None and "Student saved to out." in told


MINE = """
def fails(prompts, images):
    raise ValueError("the server is down")

def always(images, **columns):
    return [1.0] * len(images)

def red(prompts, images, weight_of_red=1.0):
    return [weight_of_red * image.getpixel((0, 0))[0] / 255 for image in images]
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with functions of the user's own, a model and prompts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    Path("my_rewards.py").write_text(MINE)
    Path("prompts.csv").write_text('prompt,colour\n"a fox, red",red\nan owl,grey\n')
    sd3().save_pretrained("base")
    yield
    sys.modules.pop("my_rewards", None)


SMALL = (
    "--model_name_or_path base --output_dir out --use_cpu true --max_steps 1 --num_inference_steps 2 --height 16 "
    "--width 16 --num_generations 2 --per_device_train_batch_size 2 --image_steps 0 --report_to none --save_strategy no"
).split() + ["--call_kwargs", '{"max_sequence_length": 32}']


def test_an_error_of_somebody_else_keeps_its_traceback(mine):
    with pytest.raises(ValueError, match="the server is down"):
        worker.run_script("nft", [*SMALL, "--train_files", "prompts.csv", "--reward_funcs", "my_rewards.fails"])


def test_experts_by_flags(mine):
    """Of a single task the expert needs no name; with teachers NFT is taught besides."""
    save_peft(Path("expert"), sd3())
    given = [*SMALL, "--train_files", "prompts.csv", "--teachers", "expert"]
    worker.run_script("ropd", [*given, "--reward_funcs", "my_rewards.always", "--output_dir", "ropd"])
    assert json.loads(Path("ropd", "teacher_manifest.json").read_text())["teachers"][0]["source"].startswith("expert")
    worker.run_script(
        "nft", [*given, "--reward_funcs", "my_rewards.red", "--distill_beta", "0.5", "--output_dir", "nft"]
    )
    assert Path("nft", "teacher_manifest.json").is_file()


def test_a_function_of_the_current_folder_rewards(mine):
    worker.run_script("grpo", [*SMALL, "--train_files", "prompts.csv", "--reward_funcs", "my_rewards.red"])
    assert Path("out", "pytorch_lora_weights.safetensors").is_file()


# What reaches whom


def launched(*flags: str) -> tuple:
    """What accelerate is told, and the flags of the script."""
    told = LaunchedCommand("opd", "").launched([str(flag) for flag in flags])
    name, *own = told.training_script_args
    assert (name, told.training_script, told.module) == ("opd", "diffusion_opd.cli.worker", True)
    return told, own


def test_flags_go_to_whom_they_belong(tmp_path):
    told, own = launched("--seed", "8", "--num_processes", "8", "--accelerate_config", "zero2", "--max_steps", "8")
    assert told.num_processes == 8 and told.config_file == str(CONFIGS / "zero2.yaml")
    assert own == ["--seed", "8", "--max_steps", "8"]
    told, own = launched("--main_process_port=29501", "--gpu_ids", "0,1", "--use_deepspeed", "--no_use_peft")
    assert (told.main_process_port, told.gpu_ids, told.use_deepspeed) == (29501, "0,1", True)
    assert own == ["--no_use_peft"]


def test_the_file_tells_accelerate_too_and_a_flag_goes_before_it(tmp_path):
    cluster, file = tmp_path / "cluster.yaml", tmp_path / "run.yaml"
    cluster.write_text((CONFIGS / "multi_gpu.yaml").read_text())
    file.write_text(
        yaml.safe_dump({"num_processes": 4, "accelerate_config": str(cluster), "max_steps": 3, "lora_r": 4})
    )
    told, own = launched("--config", file)
    assert (told.num_processes, told.config_file) == (4, str(cluster))
    assert launched(f"--config={file}") == launched("--config", file)
    told, own = launched("--config", file, "--num_processes", "2", "--accelerate_config", "fsdp2", "--lora_r", "8")
    assert (told.num_processes, told.config_file) == (2, str(CONFIGS / "fsdp2.yaml"))
    _, parser = worker.script("opd")
    script_args, config = parser.parse_args_and_config([*own, "--use_cpu", "true"], fail_with_unknown_args=False)
    assert (config.max_steps, script_args.lora_r) == (3, 8)


# From names to objects


def test_rewards_as_flags_and_yaml_name_them(mine):
    (red,), weights = load_rewards(["my_rewards.red"])
    assert red.__name__ == "red" and weights is None
    entry = {"name": "my_rewards.red", "weight": 2, "weight_of_red": 0.5}
    funcs, weights = load_rewards([entry, "my_rewards.red"])
    assert weights == [2, 1.0] and funcs[0].keywords == {"weight_of_red": 0.5}
    funcs, weights = load_rewards({"a": "my_rewards.red", "b": ["my_rewards.red", entry]})
    assert weights == {"a": [1.0], "b": [1.0, 2]}
    assert funcs["a"][0] is funcs["b"][0]  # a model that two tasks ask is loaded once
    assert load_rewards(entry)[1] == [2]


def test_a_lora_that_is_gone_on_with_brings_its_own_settings():
    script_args = RLScriptArguments(student_lora={"path": "me/first", "subfolder": "lora"})
    assert student_arguments(script_args)["student_lora"] == Lora("me/first", subfolder="lora")
    assert student_arguments(script_args)["peft_config"] is None
    assert student_arguments(RLScriptArguments(lora_init="true"))["peft_config"].init_lora_weights is True
    assert student_arguments(RLScriptArguments(use_peft=False))["peft_config"] is None


def test_prompts_from_files_datasets_and_mixtures(mine, tmp_path):
    rows = [{"prompt": "two dogs", "include": [{"class": "dog", "count": 2}]}, {"prompt": "a tv", "include": []}]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("prompts.txt").write_text("a hill\na tree\n")

    def load(tasks=None, evaluates=False, **ways) -> dict:
        return load_data(RLScriptArguments(**ways), evaluates, tasks)

    assert load(train_files="prompts.csv")["train_dataset"][0] == {"prompt": "a fox, red", "colour": "red"}
    by_task = load(
        tasks=["a", "b"], train_files=["prompts.txt", "prompts.jsonl"], eval_files={"b": "prompts.txt"}, evaluates=True
    )
    assert by_task["train_dataset"]["a"]["prompt"] == ["a hill", "a tree"]
    assert by_task["train_dataset"]["b"][0] == rows[0]
    assert list(by_task["eval_dataset"]) == ["b"]
    assert "eval_dataset" not in load(train_files="prompts.txt", eval_files=["prompts.txt"])

    Dataset.from_dict({"prompt": ["a", "b"]}).to_json(tmp_path / "hub" / "train.jsonl")
    Dataset.from_dict({"prompt": ["c"]}).to_json(tmp_path / "hub" / "test.jsonl")
    loaded = load(dataset_name=str(tmp_path / "hub"), evaluates=True)
    assert loaded["train_dataset"]["prompt"] == ["a", "b"] and loaded["eval_dataset"]["prompt"] == ["c"]

    part = {"path": "json", "data_files": "prompts.jsonl", "columns": ["prompt"]}
    mixed = load(datasets=[part, {**part, "split": "train[:1]"}])
    assert mixed["train_dataset"]["prompt"] == ["two dogs", "a tv", "two dogs"]
    with pytest.raises(ValueError, match=r"the dataset has no split 'test', only \['train'\]"):
        load(datasets=[part], evaluates=True)


def test_columns_of_files_are_renamed(tmp_path):
    rows = [{"prompt": "a fox", "source_image": "a.png", "other": "b.png"}]
    Path(tmp_path, "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def columns(given) -> list[str]:
        told = RLScriptArguments(train_files=[str(tmp_path / "edits.jsonl")], rename_columns=given)
        return load_data(told, False, None)["train_dataset"].column_names

    assert columns(["source_image=image"]) == columns({"source_image": "image"}) == ["prompt", "image", "other"]
    for given, sentence in (
        (["source_image=image", "other=image"], "gives two columns one name"),
        (["source_image=other"], "would make a second 'other'"),
        (["nothing=image"], "names 'nothing', and the data has"),
        (["image"], "are pairs as old=new, got 'image'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            columns(given)
