"""Only what a run wrote is deleted or overwritten; finished is finished; and a resumed run is the same run, or says how
it differs."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from trl import TrlParser

from diffusion_opd import DiffusionNFTConfig, DiffusionNFTTrainer, DiffusionOPDConfig, DiffusionOPDTrainer, Teacher
from diffusion_opd.checkpoints import last_checkpoint, what_is_torn
from diffusion_opd.runs import hash_function
from tests.tiny_pipelines import BUILDERS, CALL
from tests.training import DATA, config, history, lora, trained, trainer_of

EVERY_STEP = {"save_strategy": "steps", "save_steps": 1}
CONSTANT = {"lr_scheduler_type": "constant"}  # whatever `max_steps` is


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_in(folder: Path, max_steps: int = 2, **kwargs):
    trainer = trainer_of(folder, max_steps=max_steps, **EVERY_STEP | kwargs)
    trainer.train()
    return trainer


# What others have written


def of_another_program(folder: Path) -> Path:
    """As diffusers' own scripts leave it."""
    folder.mkdir(parents=True)
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        (folder / name).write_bytes(b"x")
    save_file({"transformer.x": torch.ones(3)}, folder / "pytorch_lora_weights.safetensors")
    return folder


def slimmed(folder: Path) -> Path:
    """A checkpoint of an earlier run that somebody has reduced to its LoRA."""
    run_in(folder.parent / "earlier", 1)
    folder.mkdir(parents=True)
    shutil.copy(folder.parent / "earlier/checkpoint-1/pytorch_lora_weights.safetensors", folder)
    return folder


def a_link(folder: Path) -> Path:
    target = of_another_program(folder.parent / "elsewhere")
    folder.symlink_to(target)
    return target


@pytest.mark.parametrize("make", [of_another_program, slimmed, a_link])
def test_a_folder_of_others_is_left_alone(make, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    theirs = make(out / "checkpoint-1000") if make is not a_link else a_link(out / "checkpoint-1000")
    before = snapshot(theirs)
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        trainer_of(out).train(resume_from_checkpoint=True)
    trainer = run_in(out, 3, save_total_limit=1)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-1000", "checkpoint-3"]
    assert last_checkpoint(out) == str(out / "checkpoint-3")
    trainer_of(out, max_steps=4, **EVERY_STEP, save_total_limit=1).train(resume_from_checkpoint=True)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-1000", "checkpoint-4"]
    assert snapshot(theirs) == before and trainer.state.global_step == 3


def test_a_folder_in_the_place_of_a_checkpoint_is_refused_at_the_start(tmp_path):
    before = snapshot(of_another_program(tmp_path / "checkpoint-2"))
    trainer = trainer_of(tmp_path, max_steps=3, **EVERY_STEP)
    with pytest.raises(ValueError, match=r"holds checkpoints of another run \(checkpoint-2\), which this one would"):
        trainer.train()
    assert snapshot(tmp_path / "checkpoint-2") == before and trainer.state.global_step == 0
    trainer_of(tmp_path, max_steps=3).train()  # which saves none


def test_names_that_only_begin_like_a_checkpoint(tmp_path):
    run_in(tmp_path, 2)
    for name in ("checkpoint-2-best", "checkpoint-1.old", "checkpoint-best"):
        shutil.copytree(tmp_path / "checkpoint-1", tmp_path / name)
    trainer_of(tmp_path, max_steps=4, save_total_limit=1, **EVERY_STEP).train(resume_from_checkpoint=True)
    names = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert names == ["checkpoint-1.old", "checkpoint-2-best", "checkpoint-4", "checkpoint-best"]


def test_a_link_to_a_checkpoint_is_resumed_and_not_rotated(tmp_path):
    run_in(tmp_path / "run", 2, **CONSTANT)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/checkpoint-2").symlink_to(tmp_path / "run/checkpoint-2")
    trainer = trainer_of(tmp_path / "out", max_steps=4, save_total_limit=1, **CONSTANT, **EVERY_STEP)
    trainer.train(resume_from_checkpoint=True)
    assert (tmp_path / "out/checkpoint-2").is_symlink() and what_is_torn(tmp_path / "run/checkpoint-2") is None
    assert torch.equal(trained(trainer), trained(run_in(tmp_path / "whole", 4, **CONSTANT)))


@pytest.mark.parametrize("names", [["optimizer.pt", "scheduler.pt"], ["optimizer.pt", "trainer_state.json"]])
def test_a_checkpoint_of_its_own_that_somebody_has_slimmed_stays(names: list[str], tmp_path):
    run_in(tmp_path, 2, **CONSTANT)
    for name in names:
        (tmp_path / "checkpoint-1" / name).unlink()
    before = snapshot(tmp_path / "checkpoint-1")
    trainer = trainer_of(tmp_path, max_steps=4, save_total_limit=1, **CONSTANT, **EVERY_STEP)
    trainer.train(resume_from_checkpoint=True)
    assert snapshot(tmp_path / "checkpoint-1") == before
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-4"]


# Two runs in one folder


def test_another_runs_checkpoints_are_neither_overwritten_nor_resumed(tmp_path):
    run_in(tmp_path / "a", 2)
    before = snapshot(tmp_path / "a/checkpoint-2")
    with pytest.raises(ValueError, match="holds checkpoints of another run .checkpoint-1, checkpoint-2."):
        run_in(tmp_path / "a", 3, seed=1)
    run_in(tmp_path / "b", 3, seed=1)
    shutil.copytree(tmp_path / "b/checkpoint-3", tmp_path / "a/checkpoint-3")
    with pytest.raises(ValueError, match=r"several runs \(checkpoint-1, checkpoint-2 \| checkpoint-3\); name the one"):
        trainer_of(tmp_path / "a", max_steps=4).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"holds checkpoints of another run \(checkpoint-3\)"):
        trainer_of(tmp_path / "a", max_steps=4, **EVERY_STEP).train(
            resume_from_checkpoint=str(tmp_path / "a/checkpoint-2")
        )
    assert snapshot(tmp_path / "a/checkpoint-2") == before


def test_a_trainer_that_trains_again_is_the_same_run(tmp_path):
    trainer = run_in(tmp_path, 2)
    trainer.train()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_half_written_checkpoints_of_other_runs_stay(tmp_path):
    run_in(tmp_path / "a", 3)
    run_in(tmp_path / "b", 4)
    theirs = shutil.copytree(tmp_path / "b/checkpoint-4", tmp_path / "a/checkpoint-4")
    for folder in (tmp_path / "a/checkpoint-3", theirs):  # as a run that was killed meanwhile leaves it
        (folder / "trainer_state.json").unlink()
        (folder / "unfinished").touch()
    before = snapshot(theirs)
    trainer_of(tmp_path / "c", max_steps=3, **EVERY_STEP).train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    assert (tmp_path / "a/checkpoint-3").is_dir()  # another folder than that of the run
    trainer_of(tmp_path / "a", max_steps=2, **EVERY_STEP).train(resume_from_checkpoint=True)
    assert not (tmp_path / "a/checkpoint-3").exists() and snapshot(theirs) == before


WAITS = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from transformers import TrainerCallback
from trl import TrlParser
from tests.training import trainer_of
class Wait(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        Path({flag!r}).touch()
        time.sleep(60)
trainer_of({out!r}, max_steps=3, callbacks=[Wait()]).train()
"""


def test_two_runs_at_the_same_time(tmp_path):
    """In two processes; the one that is killed lets go of the folder."""
    out, flag = tmp_path / "out", tmp_path / "trains"
    script = WAITS.format(root=str(Path(__file__).parents[1]), flag=str(flag), out=str(out))
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not flag.exists():
            assert other.poll() is None
            time.sleep(0.05)
        with pytest.raises(ValueError, match=f"another run trains in {out}; give this one an `output_dir` of its own"):
            trainer_of(out).train()
    finally:
        other.kill()
        other.wait()
    trainer_of(out).train()


def test_a_student_in_shards_in_the_place_of_a_whole_one(tmp_path):
    trainer = trainer_of(tmp_path / "run", full=True, learning_rate=1e-3)
    trainer.train()
    out, save = tmp_path / "out", trainer.pipeline.save_pretrained
    BUILDERS["sd3"](5).save_pretrained(out)
    (out / "transformer/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another variant")
    trainer.pipeline.save_pretrained = lambda folder: save(folder, max_shard_size="20KB")
    trainer.save_model(str(out))
    saved, wanted = DiffusionPipeline.from_pretrained(out).transformer.state_dict(), trainer.model.state_dict()
    assert all(torch.equal(saved[key], wanted[key]) for key in wanted)
    assert (out / "transformer/diffusion_pytorch_model.fp16.safetensors").exists()
    trainer.load_weights(out)


def test_a_full_student_in_the_place_of_shards(tmp_path):
    pipe = BUILDERS["sd3"](3)
    pipe.save_pretrained(tmp_path, max_shard_size="50KB")
    assert list((tmp_path / "transformer").glob("*.index.json")) and list(
        (tmp_path / "text_encoder").glob("*.index.json")
    )
    trainer = trainer_of(tmp_path, full=True, learning_rate=1e-4)
    trainer.train()
    trainer.save_model()
    again = DiffusionPipeline.from_pretrained(tmp_path)
    saved, wanted = again.transformer.state_dict(), trainer.pipeline.transformer.state_dict()
    assert saved.keys() == wanted.keys() and all(torch.equal(saved[key], wanted[key]) for key in saved)
    encoder = again.text_encoder.state_dict()
    assert all(torch.equal(encoder[k], v) for k, v in trainer.pipeline.text_encoder.state_dict().items())


# Whole is as it was written


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "optimizer.pt", "rng_state.pth"])
def test_flipped_bytes_are_found(name: str, tmp_path, caplog):
    trainer = run_in(tmp_path, 2)
    path = tmp_path / "checkpoint-2" / name
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(255 - byte for byte in content[middle : middle + 64])
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"checkpoint-2 is no whole checkpoint: its {name} is not as it was written"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    assert "checkpoint-2 is no whole checkpoint, and is passed over: its" in caplog.text


def test_a_state_that_somebody_has_edited_is_found(tmp_path):
    run_in(tmp_path, 1)
    path = tmp_path / "checkpoint-1/trainer_state.json"
    path.write_text(path.read_text().replace('"best_metric": null', '"best_metric": 1234'))
    assert what_is_torn(tmp_path / "checkpoint-1") == "its trainer_state.json is not as it was written"


def test_a_file_that_was_not_saved_with_it_does_not_win(tmp_path):
    run_in(tmp_path, 2, full=True, learning_rate=1e-4)
    folder = tmp_path / "checkpoint-2"
    (shard,) = (folder / "transformer").glob("*.safetensors")
    stale = {key: value + 1 for key, value in load_file(shard).items()}
    save_file(stale, folder / "transformer/diffusion_pytorch_model-00002-of-00002.safetensors")
    assert what_is_torn(folder).startswith("it holds transformer/diffusion_pytorch_model-00002-of")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    (folder / "notes.txt").write_text("of mine")
    (folder / "transformer/diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    assert what_is_torn(folder) is None


def of_an_older_version(folder: Path) -> None:
    (folder / "run.json").unlink()
    listed = json.loads((folder / "checkpoint_files.json").read_text())
    sizes = {name: entry["size"] for name, entry in listed.items() if name != "run.json"}
    (folder / "checkpoint_files.json").write_text(json.dumps(sizes))


def test_a_checkpoint_of_an_older_version_is_resumed(tmp_path):
    run_in(tmp_path, 2, **CONSTANT)
    for path in tmp_path.glob("checkpoint-*"):
        of_an_older_version(path)
    trainer = trainer_of(tmp_path, max_steps=3, **CONSTANT, **EVERY_STEP)
    trainer.train(resume_from_checkpoint=True)
    assert torch.equal(trained(trainer), trained(run_in(tmp_path / "whole", 3, **CONSTANT)))


# Finished is finished


@pytest.mark.parametrize(("max_steps", "scheduler"), [(2, "constant"), (3, "linear"), (5, "constant")])
@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_a_finished_run_is_not_trained_further(max_steps: int, scheduler: str, ema_decay: float | None, tmp_path):
    """An epoch has three steps here."""
    settings = {"lr_scheduler_type": scheduler, "ema_decay": ema_decay, "ema_update_every": 2}
    first = run_in(tmp_path, max_steps, **settings)
    before = snapshot(tmp_path / f"checkpoint-{max_steps}")
    for _ in range(2):
        again = trainer_of(tmp_path, max_steps=max_steps, **EVERY_STEP, **settings)
        output = again.train(resume_from_checkpoint=last_checkpoint(tmp_path))
        assert again.state.global_step == output.global_step == max_steps
        assert torch.equal(trained(again), trained(first))
        assert output.training_loss == pytest.approx(first.state.log_history[-1]["train_loss"])
    assert snapshot(tmp_path / f"checkpoint-{max_steps}") == before


def test_the_loss_of_a_resumed_run_is_that_of_the_whole_run(tmp_path):
    whole = run_in(tmp_path / "whole", 5, lr_scheduler_type="constant", logging_steps=2)
    run_in(tmp_path / "run", 3, lr_scheduler_type="constant", logging_steps=2)
    resumed = trainer_of(tmp_path / "run", max_steps=5, lr_scheduler_type="constant", logging_steps=2, **EVERY_STEP)
    output = resumed.train(resume_from_checkpoint=True)
    assert torch.equal(trained(resumed), trained(whole))
    assert output.training_loss == pytest.approx(whole.state.log_history[-1]["train_loss"], rel=1e-6)
    by_hand = run_in(tmp_path / "each", 5, lr_scheduler_type="constant", logging_steps=1)
    assert output.training_loss == pytest.approx(sum(history(by_hand, "loss")) / 5, rel=1e-5)
    assert output.metrics["train_loss"] == output.training_loss == resumed.state.log_history[-1]["train_loss"]


@pytest.mark.parametrize("value", [True, "true", "True"])
def test_resuming_by_the_arguments(value, tmp_path):
    run_in(tmp_path, 2, lr_scheduler_type="constant")
    trainer = trainer_of(
        tmp_path, max_steps=3, resume_from_checkpoint=value, lr_scheduler_type="constant", **EVERY_STEP
    )
    trainer.train()
    assert torch.equal(trained(trainer), trained(run_in(tmp_path / "whole", 3, lr_scheduler_type="constant")))
    path = trainer_of(tmp_path / "b", max_steps=3, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert path.train().global_step == 3
    for value in (False, "false"):
        assert trainer_of(tmp_path / "c", max_steps=1, resume_from_checkpoint=value).train().global_step == 1


@pytest.mark.parametrize("steps", [{"max_steps": 0}, {"max_steps": -1, "num_train_epochs": 0}])
def test_no_steps_at_all(steps: dict, tmp_path):
    trainer = trainer_of(tmp_path, ema_decay=0.5, **EVERY_STEP | steps)
    before = trained(trainer)
    output = trainer.train()
    assert (output.global_step, output.training_loss) == (0, 0.0) and torch.equal(trained(trainer), before)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_flags_and_yaml(tmp_path):
    def parsed(*flags: str, text: str = "") -> str | None:
        (tmp_path / "config.yaml").write_text(f"output_dir: out\n{text}\n")
        parser = TrlParser(DiffusionOPDConfig)
        (args,) = parser.parse_args_and_config(["--config", str(tmp_path / "config.yaml"), *flags])
        return args.resume_from_checkpoint

    flag = "--resume_from_checkpoint"
    assert parsed() is None and parsed(flag, "out/checkpoint-3") == "out/checkpoint-3"
    assert parsed(text="resume_from_checkpoint: true") == parsed(flag) == parsed(flag, "true") == "true"
    assert parsed(text="resume_from_checkpoint: false") == parsed(flag, "false") == "false"


def test_the_best_and_the_last_stay(tmp_path):
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "kl",
        "eval_dataset": DATA.select(range(4)),
    }
    for limit in (1, 2):
        out = tmp_path / str(limit)
        trainer = run_in(out, 5, load_best_model_at_end=True, save_total_limit=limit, **settings)
        values = history(trainer, "eval_kl")
        best = 1 + values.index(min(values))
        stay = {best} if limit == 1 else {best, 5} if best != 5 else {4, 5}
        assert sorted(path.name for path in out.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in sorted(stay)]


def test_weights_alone_are_rotated_and_not_resumed(tmp_path):
    run_in(tmp_path, 3, save_only_model=True, save_total_limit=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    with pytest.raises(ValueError, match="checkpoint-3 is no whole checkpoint: it has no readable checkpoint_files"):
        trainer_of(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_step_that_is_left_out_moves_no_average(tmp_path):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.now = state.global_step in (1, 2)

    trainer = trainer_of(tmp_path, max_steps=4, ema_decay=0.9, ema_update_every=1, nan_policy="skip", **EVERY_STEP)
    poison, averages = Poison(), []
    trainer.add_callback(poison)
    trainer.model.register_forward_hook(lambda *_: (_[2][0] * torch.nan,) if poison.now else None)

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            averages.append(torch.cat([p.flatten() for p in trainer.ema.shadow_params]).clone())

    trainer.add_callback(Watch())
    trainer.train()
    assert torch.equal(averages[0], averages[1]) and torch.equal(averages[1], averages[2])
    assert not torch.equal(averages[2], averages[3])


# What a run is made of


def warnings_of(caplog, trainer, checkpoint: Path) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "diffusion_opd"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    said = [record.getMessage().removeprefix("[RANK 0] ") for record in caplog.records]
    return [message for message in said if "was made otherwise" in message]


OTHERS = {
    "seed": ({"seed": 7}, "seed: 42 -> 7"),
    "objective": ({"objective": "velocity"}, "objective: 'kl' -> 'velocity'"),
    "steps of denoising": ({"num_inference_steps": 3}, "num_inference_steps: 4 -> 3"),
    "learning rate": ({"learning_rate": 0.5}, "learning_rate: 0.01 -> 0.5"),
    "data": (
        {"data": Dataset.from_dict({"prompt": ["another", "prompts"] * 6, "teacher_id": ["a", "b"] * 6})},
        "train_dataset: ",
    ),
    "guidance": (
        {"call_kwargs": {**CALL["sd3"], "guidance_scale": 2.0}},
        "call_kwargs.guidance_scale: 4.0 -> 2.0",
    ),
    "a teacher's guidance": (
        {"teachers": {"a": Teacher(BUILDERS["sd3"](1), guidance_scale=1.5), "b": BUILDERS["sd3"](2)}},
        "teachers.a.call_kwargs.guidance_scale: none -> 1.5",
    ),
}


class Judge:
    def __init__(self, wanted: int):
        self.wanted = wanted

    def __call__(self, images, **kwargs) -> list[float]:
        return [float(image.width == self.wanted) for image in images]


def judge(images, wanted: int = 1, **kwargs) -> list[float]:
    return [float(image.width == wanted) for image in images]


def closure(wanted: int):
    return lambda images, **kwargs: [float(image.width == wanted) for image in images]


@pytest.mark.parametrize("make", [Judge, closure, lambda wanted: partial(judge, wanted=wanted)])
def test_functions_are_told_apart_by_what_they_hold(make):
    assert hash_function(make(1)) == hash_function(make(1)) != hash_function(make(2))


def test_a_reward_whose_file_is_edited_while_the_run_starts(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def reward(images, **kwargs):\n    return [0.0 for _ in images]\n")
    namespace: dict = {}
    exec(compile(file.read_text(), str(file), "exec"), namespace)
    whole = hash_function(namespace["reward"])
    file.write_text("def reward(images, **kwargs):\n    return [score(\n")  # saved half-way
    assert hash_function(namespace["reward"]) != whole


def test_what_makes_no_difference_is_not_mentioned(tmp_path, caplog):
    """The samples of a step, in other micro-batches; and another place of the same pictures and prompts."""
    run_in(tmp_path, 1, per_device_train_batch_size=2)
    other = trainer_of(
        tmp_path / "b", max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=4, **EVERY_STEP
    )
    assert warnings_of(caplog, other, tmp_path / "checkpoint-1") == []


def test_another_schedule_is_mentioned(tmp_path, caplog):
    run_in(tmp_path, 1)
    pipe = BUILDERS["sd3"](0)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=7.0)
    teachers = {"a": BUILDERS["sd3"](1), "b": BUILDERS["sd3"](2)}
    other = DiffusionOPDTrainer(pipe, teachers, config(tmp_path / "c", max_steps=1), DATA, peft_config=lora())
    (warning,) = warnings_of(caplog, other, tmp_path / "checkpoint-1")
    assert "scheduler.shift: " in warning and "-> 7.0" in warning


@pytest.mark.parametrize("kind", OTHERS)
def test_what_differs_is_said_once(kind: str, tmp_path, caplog):
    run_in(tmp_path, 1)
    checkpoint, (settings, words) = tmp_path / "checkpoint-1", OTHERS[kind]
    same = trainer_of(tmp_path / "same", max_steps=3)  # further, and elsewhere
    assert warnings_of(caplog, same, checkpoint) == []
    (warning,) = warnings_of(caplog, trainer_of(tmp_path / "other", max_steps=1, **settings), checkpoint)
    assert warning.startswith(f"{checkpoint} was made otherwise than this run goes on: ") and words in warning
    assert "\n" not in warning


def test_another_function_of_the_same_weights_is_refused(tmp_path):
    run_in(tmp_path, 1)
    checkpoint = str(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match=r"another `peft_config` of the transformer \(lora_alpha: 16 -> 8\); resume"):
        trainer_of(tmp_path / "b", max_steps=2, peft_config=lora(lora_alpha=8)).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="was trained on other weights than those of this transformer"):
        trainer = trainer_of(tmp_path / "c", max_steps=2)
        other = type(trainer)(
            BUILDERS["sd3"](5),
            {"a": BUILDERS["sd3"](1), "b": BUILDERS["sd3"](2)},
            trainer.args,
            DATA,
            peft_config=lora(),
        )
        other.train(resume_from_checkpoint=checkpoint)


def test_another_base_of_a_full_student_is_mentioned(tmp_path, caplog):
    """Its teachers may be LoRAs of that base."""
    run_in(tmp_path, 1, full=True)
    checkpoint = tmp_path / "checkpoint-1"
    assert warnings_of(caplog, trainer_of(tmp_path / "b", full=True, max_steps=1), checkpoint) == []
    teachers = {"a": BUILDERS["sd3"](1), "b": BUILDERS["sd3"](2)}
    other = DiffusionOPDTrainer(BUILDERS["sd3"](5), teachers, config(tmp_path / "c", max_steps=1), DATA)
    (warning,) = warnings_of(caplog, other, checkpoint)
    assert "first weights: " in warning


def brightness(images, **kwargs) -> list[float]:
    return [sum(image.resize((1, 1)).getpixel((0, 0))) / 765 for image in images]


def written_otherwise():
    def brightness(images, **kwargs) -> list[float]:
        return [-sum(image.resize((1, 1)).getpixel((0, 0))) / 765 for image in images]

    return brightness


def test_rewards_that_are_written_otherwise(tmp_path, caplog):
    def trainer(out: str, reward, **kwargs) -> DiffusionNFTTrainer:
        args = DiffusionNFTConfig(
            output_dir=str(tmp_path / out),
            use_cpu=True,
            per_device_train_batch_size=2,
            num_generations=2,
            num_inference_steps=2,
            report_to="none",
            disable_tqdm=True,
            image_steps=0,
            max_steps=1,
            call_kwargs={key: value for key, value in CALL["sd3"].items() if key != "guidance_scale"},
            **kwargs,
        )
        data = Dataset.from_dict({"prompt": ["a cat", "a dog"]})
        return DiffusionNFTTrainer(BUILDERS["sd3"](0), reward, args, data, peft_config=lora())

    trainer("a", brightness, **EVERY_STEP).train()
    checkpoint = tmp_path / "a/checkpoint-1"
    assert warnings_of(caplog, trainer("b", brightness), checkpoint) == []
    (warning,) = warnings_of(caplog, trainer("c", written_otherwise()), checkpoint)
    assert "reward_funcs." in warning and "brightness: " in warning
    (warning,) = warnings_of(caplog, trainer("d", brightness, reward_weights=[2.0]), checkpoint)
    assert "reward_weights: " in warning


def test_the_record_names_no_place(tmp_path):
    run_in(tmp_path, 1)
    text = (tmp_path / "checkpoint-1/run.json").read_text()
    assert str(tmp_path) not in text and os.path.expanduser("~") not in text


def test_a_save_that_nobody_planned_overwrites_nothing_of_others(tmp_path):
    """`save_strategy="no"` looks for nothing at the start, and a callback may ask for a checkpoint all the same."""

    class Save(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = True

    before = snapshot(of_another_program(tmp_path / "checkpoint-1"))
    trainer = trainer_of(tmp_path, callbacks=[Save()])
    with pytest.raises(ValueError, match="checkpoint-1 is another run's checkpoint, and is not overwritten"):
        trainer.train()
    assert snapshot(tmp_path / "checkpoint-1") == before
