"""Runs that are killed, pre-empted, fed with NaN, or left without a disk, a Hub or a tracker.

A run that dies is a process of its own, as is the one that resumes it (durable_run.py); they are forked from one that
has imported everything.
"""

import copy
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from diffusion_opd import DiffusionOPDConfig
from diffusion_opd.checkpoints import last_checkpoint, what_is_torn
from tests import durable_run, rl_training
from tests.durable_run import Poison
from tests.hub_server import HubServer, client
from tests.launched import held_port
from tests.rl_training import GRPO, NFT
from tests.tiny_pipelines import BUILDERS
from tests.training import DATA, history, trained, trainer_of

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.durable_run"])


def started(out: Path, processes: int = 1, **options) -> list[int]:
    """Runs to the end, whatever that is; the exit codes. Once one process was killed, so are the others."""
    out.mkdir(exist_ok=True)
    with held_port() as port:
        places = [dict(rank=rank, world=processes, port=port) for rank in range(processes)] if processes > 1 else [{}]
        running = [PROCESSES.Process(target=durable_run.run, args=(out,), kwargs=place | options) for place in places]
        for process in running:
            process.start()
        while any(process.exitcode is None for process in running):
            multiprocessing.connection.wait([process.sentinel for process in running if process.exitcode is None], 300)
            if any(process.exitcode == -signal.SIGKILL for process in running):
                for process in running:
                    process.kill()
        return [process.exitcode for process in running]


def seen(out: Path, rank: int = 0) -> dict:
    return torch.load(out / f"seen_{rank}.pt")


def assert_same_end(resumed: dict, undisturbed: dict) -> None:
    """Equal to the bit, in all that came after the resumption."""
    assert resumed["ends_at"] == undisturbed["ends_at"]
    assert resumed["prompts"] == undisturbed["prompts"][-len(resumed["prompts"]) :]
    assert resumed["log"] == undisturbed["log"]
    for name in ("weights", "average"):
        assert all(torch.equal(a, b) for a, b in zip(resumed[name], undisturbed[name], strict=True)), name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What runs that nothing happens to saw, made when first asked for."""
    made = {}

    def of(processes: int = 1, **options) -> list[dict]:
        key = (processes, *sorted(options.items()))
        if key not in made:
            out = tmp_path_factory.mktemp("undisturbed")
            assert started(out, processes, **options) == [0] * processes
            made[key] = [seen(out, rank) for rank in range(processes)]
        return made[key]

    return of


slow = partial(pytest.param, marks=pytest.mark.slow)
nightly = partial(pytest.param, marks=(pytest.mark.slow, pytest.mark.nightly))


@pytest.mark.parametrize(
    ("place", "begins_at", "options"),
    [
        ("save:2", 3, {}),
        slow("list", 3, {}),
        slow("rotate", 4, {"save_total_limit": 1}),
        slow("rollout:3", 3, {"method": "nft"}),
        nightly("rollout:3", 3, {}),
        nightly("optimizer", 3, {}),
        nightly("state", 3, {"save_total_limit": 1}),
        nightly("save:4", 3, {"method": "grpo"}),
    ],
)
def test_a_killed_run_resumes_as_if_nothing_had_been(tmp_path, undisturbed, place, begins_at, options):
    assert started(tmp_path, die=place, **options) == [-signal.SIGKILL]
    assert started(tmp_path, resume=True, **options) == [0]
    resumed = seen(tmp_path)
    assert resumed["begins_at"] == begins_at
    assert_same_end(resumed, undisturbed(method=options.get("method", "opd"))[0])


@pytest.mark.slow
def test_a_killed_process_of_two(tmp_path, undisturbed):
    """The other process has written its part, and waits."""
    assert -signal.SIGKILL in started(tmp_path, 2, die="save:1", dying_rank=1)
    assert started(tmp_path, 2, resume=True) == [0, 0]
    for rank in range(2):
        resumed = seen(tmp_path, rank)
        assert resumed["begins_at"] == 3
        assert_same_end(resumed, undisturbed(2)[rank])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_two_processes_that_share_the_weights(tmp_path, undisturbed, engine):
    """Stopped by NaN that one of them has seen, then one killed while it writes its part of the engine's state."""
    if engine == "zero3":
        pytest.importorskip("deepspeed")
    assert started(tmp_path, 2, engine=engine, poisoned=(1, (3,))) == [1, 1]
    for rank in range(2):
        error = (tmp_path / f"error_{rank}.txt").read_text()
        assert "optimizer step 3: NaN or Inf in the prediction of teacher 'b'; mend that" in error
    assert -signal.SIGKILL in started(tmp_path, 2, engine=engine, resume=True, die="save:1", dying_rank=1)
    assert started(tmp_path, 2, engine=engine, resume=True) == [0, 0]
    for rank in range(2):
        resumed = seen(tmp_path, rank)
        assert resumed["begins_at"] == 3
        assert_same_end(resumed, undisturbed(2, engine=engine)[rank])


def test_torn_checkpoints_are_refused(tmp_path):
    settings = dict(max_steps=2, save_strategy="steps", save_steps=1)
    trainer = trainer_of(tmp_path, **settings)
    trainer.train()
    first, second = tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"
    assert last_checkpoint(tmp_path) == str(second)
    for name, reason in {
        "optimizer.pt": "its optimizer.pt has",
        "checkpoint_files.json": "it has no readable checkpoint_files.json",
    }.items():
        durable_run.halve(second / name)
        with pytest.raises(ValueError, match=f"checkpoint-2 is no whole checkpoint: {reason}.*takes the last whole"):
            trainer.train(resume_from_checkpoint=str(second))
        assert last_checkpoint(tmp_path) == str(first)
    (first / "scheduler.pt").unlink()
    with pytest.raises(ValueError, match="holds no whole checkpoint; start anew, without `resume_from_checkpoint`"):
        trainer.train(resume_from_checkpoint=True)
    assert second.is_dir(), "it was written to its end once, and what is left may be of use"
    (second / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    assert second.is_dir(), "nothing is resumed, so nothing is cleared away"


# NaN and Inf


def poison(trainer, what: str, steps: tuple[int, ...]) -> None:
    """Makes NaN or Inf of one thing in some optimizer steps."""
    callback = Poison(steps)
    trainer.add_callback(callback)
    if what == "student":
        callback.of(trainer.model)
    elif what == "teacher":
        callback.of(trainer.teachers["b"].denoiser)
    elif what == "loss":  # a finite prediction whose square is not
        trainer.teachers["b"].denoiser.register_forward_hook(lambda *_: (_[2][0] * 1e30,) if callback.now else None)
    else:
        parameter = trainer.trainable_parameters[0]
        parameter.register_hook(lambda gradient: gradient * math.inf if callback.now else None)


CAUSES = {
    "student": "the student's prediction for task 'a'",
    "teacher": "the prediction of teacher 'b'",
    "loss": "the loss of task 'b'",
    "gradient": "the gradient",
}


@pytest.fixture(scope="module")
def one_step(tmp_path_factory) -> torch.Tensor:
    """The weights after one good step."""
    trainer = trainer_of(tmp_path_factory.mktemp("one"), max_steps=1, lr_scheduler_type="constant")
    trainer.train()
    return trained(trainer)


@pytest.mark.parametrize("what", CAUSES)
def test_the_run_stops_before_the_weights_change(tmp_path, what, one_step):
    trainer = trainer_of(tmp_path, teachers=teachers(), max_steps=3, lr_scheduler_type="constant")
    poison(trainer, what, (2,))
    with pytest.raises(FloatingPointError, match=f"^optimizer step 2: NaN or Inf in {CAUSES[what]}; mend that, or"):
        trainer.train()
    assert torch.equal(trained(trainer), one_step)


@pytest.mark.parametrize("what", CAUSES)
def test_a_step_with_nan_is_left_out(tmp_path, what, caplog):
    weights, states = [], []

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            weights.append(trained(trainer))
            states.append(copy.deepcopy(optimizer.state_dict()["state"]))

    settings = dict(max_steps=3, logging_steps=3, nan_policy="skip", ema_decay=0.5, ema_update_every=1)
    trainer = trainer_of(tmp_path, callbacks=[Record()], teachers=teachers(), **settings)
    poison(trainer, what, (2,))
    trainer.train()
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    for before, after in zip(states[0].values(), states[1].values(), strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.isfinite().all() for parameter in trainer.ema.shadow_params)
    assert history(trainer, "skipped_steps") == [1]
    assert f"Optimizer step 2 is left out: NaN or Inf in {CAUSES[what]}." in caplog.text


def test_the_log_shows_the_other_steps(tmp_path):
    """A mean over three steps of which the second is left out is that over the two lines of a log of each step."""
    logs = []
    for logging_steps in (3, 1):
        settings = dict(max_steps=3, logging_steps=logging_steps, nan_policy="skip")
        trainer = trainer_of(tmp_path, teachers=teachers(), **settings)
        poison(trainer, "teacher", (2,))
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    (mean,), lines = logs
    assert [line["step"] for line in lines] == [1, 3]
    assert [line["skipped_steps"] for line in lines] == [0, 1]
    for name in ("loss", "kl", "kl/a", "kl/b"):
        assert mean[name] == pytest.approx(sum(line[name] for line in lines) / 2), name


def teachers() -> dict:
    return {"a": BUILDERS["sd3"](1), "b": BUILDERS["sd3"](2)}


@pytest.mark.parametrize("cls", [NFT, GRPO])
def test_nan_while_learning_from_rewards(tmp_path, cls):
    settings = dict(max_steps=3, beta=0.1, learning_rate=1e-3, lr_scheduler_type="constant", num_iterations=2)
    untouched = rl_training.trainer_of(cls, tmp_path, **settings | {"max_steps": 1})
    untouched.train()
    stopped = rl_training.trainer_of(cls, tmp_path, **settings)
    poison(stopped, "student", (2,))
    with pytest.raises(FloatingPointError, match="optimizer step 2: NaN or Inf in the student's prediction for task"):
        stopped.train()
    assert torch.equal(trained(stopped), trained(untouched))
    skipping = rl_training.trainer_of(cls, tmp_path, nan_policy="skip", **settings)
    poison(skipping, "student", (2,))
    skipping.train()
    assert history(skipping, "skipped_steps") == [0, 1]
    assert trained(skipping).isfinite().all() and not torch.equal(trained(skipping), trained(untouched))


@pytest.mark.parametrize("cls", [NFT, GRPO])
def test_nan_in_a_rollout_is_seen(tmp_path, cls):
    trainer = rl_training.trainer_of(cls, tmp_path)
    trainer.model.register_forward_hook(
        lambda _, inputs, output: None if torch.is_grad_enabled() else (output[0] * math.nan,)
    )
    with pytest.raises(FloatingPointError, match="optimizer step 1: NaN or Inf in the rollout of task 'all'"):
        trainer.train()


def overflow(pipeline, number: float) -> None:
    """As a VAE in half precision: of NaN diffusers makes black pixels, of Inf white ones."""
    pipeline.vae.decoder.conv_out.bias.data.fill_(number)


DECODED = r"NaN or Inf in what the VAE decoded of task 'all'"


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("cls", [NFT, GRPO])
def test_pictures_of_nan_are_not_judged(tmp_path, cls, number):
    asked = []
    trainer = rl_training.trainer_of(cls, tmp_path, rewards=lambda images: asked.append(images))
    before = trained(trainer)
    overflow(trainer.pipeline, number)
    with pytest.raises(FloatingPointError, match=f"^optimizer step 1: {DECODED}; mend that, or leave out such steps"):
        trainer.train()
    assert torch.equal(trained(trainer), before) and not asked


@pytest.mark.parametrize("cls", [NFT, GRPO])
def test_every_step_on_a_rollout_of_nan_is_left_out(tmp_path, cls):
    asked, weights = [], []

    class Mend(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            weights.append(trained(trainer))
            if state.global_step == 2:
                overflow(trainer.pipeline, 0.0)

    def judge(images, trainer_state):
        asked.append(trainer_state.global_step)
        return rl_training.redness(images)

    settings = dict(nan_policy="skip", num_iterations=2, max_steps=4, beta=0.1, callbacks=[Mend()])
    trainer = rl_training.trainer_of(cls, tmp_path, rewards=judge, **settings)
    before = trained(trainer)
    overflow(trainer.pipeline, math.nan)
    trainer.train()
    assert [torch.equal(before, after) for after in weights] == [True, True, False, False] and asked == [2]
    assert sum(history(trainer, "skipped_steps")) == 2


class Bad(TrainerCallback):
    """The VAE, or a teacher, that gives NaN from a step on until another."""

    def __init__(self, weight, steps):
        self.weight, self.good, self.steps = weight, weight.detach().clone(), steps

    def on_step_end(self, args, state, control, **kwargs):
        self.weight.data.copy_(self.good * (math.nan if state.global_step in self.steps else 1))


@pytest.mark.parametrize("method", ["opd", "grpo"])
def test_nan_in_an_evaluation(tmp_path, method, caplog):
    """An error; or an evaluation that no checkpoint is the best by, whichever way its metric is better."""
    settings = dict(max_steps=3, eval_steps=1, eval_strategy="steps", save_strategy="steps", save_steps=1)
    settings |= dict(load_best_model_at_end=True, nan_policy="skip")

    def make(steps, **kwargs):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        if method == "opd":
            data = DATA.select(range(2))
            trainer = trainer_of(out, teachers=teachers(), eval_dataset=data, **settings | kwargs)
            weight = next(trainer.teachers["b"].denoiser.parameters())
        else:
            data = rl_training.DATA.select(range(2))
            trainer = rl_training.trainer_of(GRPO, out, eval_dataset=data, **settings | kwargs)
            weight = trainer.pipeline.vae.decoder.conv_out.bias
        trainer.add_callback(Bad(weight, steps))
        return trainer

    what, metric = ("the prediction of teacher 'b'", "kl") if method == "opd" else (DECODED[14:], "reward")
    for greater in (True, False):
        trainer = make((1,), metric_for_best_model=metric, greater_is_better=greater)
        trainer.train()
        first, *others = history(trainer, f"eval_{metric}")
        assert math.isnan(first) and all(map(math.isfinite, others))
        best = others.index(max(others) if greater else min(others)) + 2
        assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert f"The metrics of the evaluation after optimizer step 1 are NaN: NaN or Inf in {what}." in caplog.text
    assert "No evaluation has given" not in caplog.text

    trainer = make((1, 2, 3))
    trainer.train()
    assert all(map(math.isnan, history(trainer, f"eval_{metric}")))
    assert trainer.state.best_model_checkpoint is None and "the weights are those of the last step" in caplog.text
    with pytest.raises(
        FloatingPointError, match=f"^evaluation after optimizer step 1: NaN or Inf in {what}; mend that"
    ):
        make((1,), nan_policy="raise").train()


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "engine"), [nightly("raise", None), ("skip", None), ("skip", "fsdp2")])
def test_all_processes_agree_on_nan_in_one(tmp_path, policy, engine):
    codes = started(tmp_path, 2, poisoned=(1, (3,)), nan_policy=policy, engine=engine)
    if policy == "raise":
        assert codes == [1, 1]
        return
    assert codes == [0, 0]
    one, two = seen(tmp_path, 0), seen(tmp_path, 1)
    assert [entry["step"] for entry in one["log"]] == [1, 2, 4, 5]
    assert [entry["skipped_steps"] for entry in one["log"]] == [0, 0, 1, 0]
    for name in ("weights", "average"):
        pairs = list(zip(one[name], two[name], strict=True))
        assert all(a.isfinite().all() and b.isfinite().all() for a, b in pairs)
        assert engine is not None or all(torch.equal(a, b) for a, b in pairs)


def test_skipping_is_refused_where_it_cannot_work(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="`nan_policy` must be one of \\['raise', 'skip'\\], got 'ignore'"):
        DiffusionOPDConfig(str(tmp_path), nan_policy="ignore")
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="`nan_policy='skip'` does not work with DeepSpeed, which updates the weights"):
        DiffusionOPDConfig(str(tmp_path), nan_policy="skip")


# Pre-emption


@pytest.mark.slow
def test_sigterm_saves_and_ends_the_run(tmp_path, undisturbed):
    preempted = dict(die="rollout:3", end_with=signal.SIGTERM, enable_jit_checkpoint=True, save_strategy="no")
    assert started(tmp_path, **preempted) == [0]
    assert seen(tmp_path)["ends_at"] == 4
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-4"]
    assert started(tmp_path, resume=True) == [0]
    assert_same_end(seen(tmp_path), undisturbed()[0])


@pytest.mark.slow
def test_sigterm_to_one_process_ends_both(tmp_path, undisturbed):
    preempted = dict(die="rollout:3", end_with=signal.SIGTERM, enable_jit_checkpoint=True, save_strategy="no")
    assert started(tmp_path, 2, dying_rank=1, **preempted) == [0, 0]
    assert [seen(tmp_path, rank)["ends_at"] for rank in range(2)] == [4, 4]
    assert started(tmp_path, 2, resume=True) == [0, 0]
    for rank in range(2):
        assert_same_end(seen(tmp_path, rank), undisturbed(2)[rank])


@pytest.mark.slow
def test_sigterm_to_torchrun(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [durable_run.__file__, str(tmp_path), "--die=rollout:3", f"--end_with={int(signal.SIGTERM)}", "--of_all"]
    command += ["--enable_jit_checkpoint", "--save_strategy=no"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run(command, env=environment, capture_output=True, timeout=300)
    assert [seen(tmp_path, rank)["ends_at"] for rank in range(2)] == [4, 4]
    assert last_checkpoint(tmp_path / "run") == str(tmp_path / "run/checkpoint-4")


# Around the run


@pytest.mark.slow
@pytest.mark.parametrize("size", [nightly(16_000), 30_000])  # the weights do not fit, or the optimizer
def test_a_full_disk(tmp_path, undisturbed, size):
    assert started(tmp_path, disk=size) == [1]
    error = (tmp_path / "error_0.txt").read_text().strip()
    run = tmp_path / "run"
    assert error.endswith(
        f"This was while {run}/checkpoint-4 was saved; the last whole checkpoint is {run}/checkpoint-3."
    )
    assert started(tmp_path, resume=True) == [0]
    assert seen(tmp_path)["begins_at"] == 3
    assert_same_end(seen(tmp_path), undisturbed()[0])


@pytest.mark.slow
def test_a_tracker_that_cannot_write(tmp_path, undisturbed):
    assert started(tmp_path, die="save:2") == [-signal.SIGKILL]
    (tmp_path / "run/runs").write_text("a file where TensorBoard wants a folder")
    assert started(tmp_path, resume=True, report_to="tensorboard") == [1]
    assert "runs" in (tmp_path / "error_0.txt").read_text().splitlines()[-1]
    assert started(tmp_path, resume=True) == [0]
    assert_same_end(seen(tmp_path), undisturbed()[0])


@pytest.mark.slow
def test_a_hub_that_goes_away(tmp_path):
    with HubServer() as hub:
        result = client(hub, tmp_path / "home", LOSE_THE_HUB)
    assert result["start"].startswith("the repository 'me/again' cannot be had to push to (`hf auth login`")
    assert result["steps"] == 3 and result["last"] == "out/checkpoint-3"
    assert "An upload to me/out failed (" in result["warning"]
    # What is published of the steps before can be resumed from
    files = hub.repositories["models/me/out"].at("main").files
    for name in [name for name in files if name.startswith("last-checkpoint/")]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(files[name].data)
    assert what_is_torn(tmp_path / "last-checkpoint") is None


LOSE_THE_HUB = """
import logging
import socket
import time
from transformers import TrainerCallback
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import hf_api
from diffusion_opd import publishing
from diffusion_opd.checkpoints import last_checkpoint
from tests.training import trainer_of

warnings = []
class Keep(logging.Handler):
    def emit(self, record):
        warnings.append(record.getMessage())
publishing.logger.logger.addHandler(Keep())

nobody = socket.socket()  # a port that is taken, and at which nobody listens
nobody.bind(("127.0.0.1", 0))
class Unplug(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            hf_api().endpoint = f"http://127.0.0.1:{nobody.getsockname()[1]}"
            args.hub_strategy = HubStrategy.EVERY_SAVE
            time.sleep = lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01))  # else a try takes half a minute

trainer = trainer_of(
    "out", push_to_hub=True, hub_model_id="me/out", hub_always_push=True, hub_strategy="checkpoint", max_steps=3,
    save_strategy="steps", save_steps=1, callbacks=[Unplug()],
)
trainer.train()
result = {"steps": trainer.state.global_step, "last": last_checkpoint("out"), "warning": warnings[-1]}
try:
    trainer_of("again", push_to_hub=True, hub_model_id="me/again")
except ValueError as error:
    result["start"] = str(error)
"""
