"""Distillation where there are rewards: teachers beside the reward's own loss, and ROPD, whose verifier says how much
of an expert is learnt. What is expected is computed a second time, by hand: plain pipelines sample, and are asked at
the states where the trainer asked."""

import math
from typing import Any

import pytest
import torch
from datasets import Dataset
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from diffusion_opd import DiffusionROPDConfig, DiffusionROPDTrainer, Teacher
from diffusion_opd.rl.objectives import expert_weights
from tests import rl_training
from tests.adapters import save_peft
from tests.editing_pipelines import EDITING, EDITING_CALL, picture
from tests.rl_training import (
    CONFIGS,
    DATA,
    GRPO,
    NFT,
    TASKS,
    Record,
    redness,
    sde_by_hand,
    seeds_seen,
    trainer_of,
    twin_of,
)
from tests.streaming_pipelines import STREAMING, STREAMING_CALL
from tests.tiny_pipelines import BUILDERS, CALL
from tests.training import guided_by_hand, history, lora, trained

ROPD = DiffusionROPDTrainer
CONFIGS[ROPD] = DiffusionROPDConfig
GUIDANCE = CALL["sd3"]["guidance_scale"]


def experts() -> dict[str, Any]:
    return {"a": Teacher(BUILDERS["sd3"](1), guidance_scale=1.0), "b": BUILDERS["sd3"](2)}


def taught(cls, out, teachers=None, data=TASKS, rewards=redness, family="sd3", full=False, **kwargs):
    """As `trainer_of`, with teachers."""
    callbacks = kwargs.pop("callbacks", None)
    peft_config = kwargs.pop("peft_config", None) or lora()
    return cls(
        BUILDERS[family](0),
        rewards,
        args=rl_training.config(cls, out, family, **kwargs),
        train_dataset=data,
        peft_config=None if full else peft_config,
        callbacks=callbacks,
        teachers=experts() if teachers is None else teachers,
    )


def visited(cls) -> tuple[type, list]:
    """The trainer, noting what is asked about, and what the loss is made of."""
    seen: list = []

    class Seen(cls):
        _name = cls._name

        def _loss(self, rollout, number, visit, answers):
            seen.append((rollout, visit))
            return super()._loss(rollout, number, visit, answers)

    CONFIGS[Seen] = CONFIGS[cls]
    return Seen, seen


# Teachers beside a reward's own loss


@pytest.mark.parametrize("cls", [NFT, GRPO])
def test_a_teacher_adds_its_distance(tmp_path, cls):
    """The gradient with teachers is the one without, and `distill_beta` times that of the distance at the very states,
    under each teacher's own guidance; of a task without a teacher there is none."""
    settings = dict(max_steps=1, max_grad_norm=0, peft_config=lora(init_lora_weights=False), beta=0.0)
    records = Record(), Record()
    without = trainer_of(cls, tmp_path / "without", data=TASKS, callbacks=[records[0]], **settings)
    own, seen = visited(cls)
    with_them = taught(own, tmp_path / "with", callbacks=[records[1]], distill_beta=0.5, **settings)
    student = twin_of(with_them)
    without.train()
    with_them.train()
    plain = {"a": (BUILDERS["sd3"](1), 1.0), "b": (BUILDERS["sd3"](2), None)}
    guidance = with_them.args.guidance_scale
    student.scheduler.set_timesteps(3)
    distances: dict[str, list] = {"a": [], "b": []}
    for rollout, visit in seen:
        (step,) = visit.steps
        time, prompts = student.scheduler.timesteps[visit.index], rollout.inputs["prompt"]
        teacher, scale = plain[rollout.task]
        mine = guided_by_hand(student, step.sample, time, prompts, guidance)
        with torch.no_grad():
            theirs = guided_by_hand(teacher, step.sample, time, prompts, guidance if scale is None else scale)
        if cls is GRPO:
            mean, std, _ = sde_by_hand(student.scheduler.sigmas, visit.index, with_them.args.noise_level)
            distance = (mean(step.sample, mine) - mean(step.sample, theirs)).square().mean() / (2 * std**2)
        else:
            distance = (mine - theirs).square().mean()
        distances[rollout.task].append(distance)
    means = {task: torch.stack(values).mean() for task, values in distances.items()}
    total = torch.stack([value for values in distances.values() for value in values]).mean()
    (0.5 * total).backward()
    assert history(with_them, "distill")[0] == pytest.approx(total.item(), rel=1e-4)
    for task, mean in means.items():
        assert history(with_them, f"distill/{task}")[0] == pytest.approx(mean.item(), rel=1e-4)
    assert history(with_them, "loss")[0] - history(without, "loss")[0] == pytest.approx(0.5 * total.item(), rel=1e-3)
    checked = 0
    for name, parameter in student.transformer.named_parameters():
        if parameter.grad is not None:
            gap = records[1].gradients[0][name] - records[0].gradients[0][name] - parameter.grad
            assert gap.norm() < 2e-3 * parameter.grad.norm() + 1e-6, name
            checked += 1
    assert checked


@pytest.mark.parametrize("cls", [NFT, GRPO, ROPD])
@pytest.mark.parametrize("placement", ["device", "cpu"])
def test_adapters_and_whole_denoisers_teach(tmp_path, cls, placement):
    """A LoRA, and another denoiser that waits in CPU memory; of a full student too."""
    teachers = {"a": str(save_peft(tmp_path / "lora", BUILDERS["sd3"](0))), "b": BUILDERS["sd3"](2)}
    verdict = [lambda images, **kwargs: [0.0] * len(images)]
    for full in (False, True):
        out = tmp_path / f"{full}"
        trainer = taught(
            cls, out, teachers, rewards=verdict, full=full, teacher_placement=placement, learning_rate=1e-3
        )
        trainer.train()
        name = "expert_distance" if cls is ROPD else "distill/a"
        assert all(0 < value < math.inf for value in history(trainer, name))
        trainer.save_model(out / "saved")
        assert '"id": "b"' in (out / "saved" / "teacher_manifest.json").read_text()
        trainer.create_model_card()
        assert "teacher" in (out / "README.md").read_text().lower()


def test_a_teacher_is_asked_at_the_timesteps_of_the_student(tmp_path):
    """Its own scheduler may have another shift; of equal weights it says the same."""
    teacher = BUILDERS["sd3"](0)
    teacher.scheduler = FlowMatchEulerDiscreteScheduler.from_config(teacher.scheduler.config, shift=1.0)
    assert BUILDERS["sd3"](0).scheduler.config.shift != 1.0
    for cls in (NFT, GRPO):
        trainer = taught(cls, tmp_path / cls._name, {"all": teacher}, data=DATA, max_steps=1)
        trainer.train()
        assert history(trainer, "distill")[0] < 1e-9


def test_a_teacher_of_a_reward_reads_columns_of_its_own(tmp_path):
    """And a run that is killed within a rollout goes on with what it was told."""
    data = DATA.map(lambda row: {"told": row["prompt"] + " in red"})
    teachers = {"all": Teacher("base", columns={"prompt": "told"})}
    settings = dict(num_iterations=2, max_steps=4, save_strategy="steps", save_steps=1, data=data)
    whole = taught(NFT, tmp_path, teachers, **settings)
    whole.train()
    assert history(whole, "distill")[0] > 1e-8
    again = taught(NFT, tmp_path, teachers, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(trained(whole), trained(again))
    other = taught(NFT, tmp_path, {"all": BUILDERS["sd3"](2)}, **settings)
    with pytest.raises(ValueError, match="checkpoint-3"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    none = trainer_of(NFT, tmp_path, **settings)
    with pytest.raises(ValueError, match="checkpoint-3 learnt from the teachers"):
        none.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize(
    ("teachers", "settings", "sentence"),
    [
        ({"c": 1}, {}, r"the teachers \['c'\] have no task; the tasks are \['a', 'b'\]"),
        (None, {"distill_beta": 0.5}, "`distill_beta=0.5` weighs the distance to the `teachers`, and there are none"),
        ({"a": 1}, {"distill_beta": 0.0}, "`distill_beta` must be above 0"),
    ],
)
def test_teachers_that_do_not_fit_a_reward(tmp_path, teachers, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        if teachers is None:
            trainer_of(NFT, tmp_path, data=TASKS, **settings)
        else:
            taught(NFT, tmp_path, {key: BUILDERS["sd3"](seed) for key, seed in teachers.items()}, **settings)


# ROPD


def test_how_much_of_an_expert():
    """By its formula, in Python's own numbers."""
    groups = [[0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0], [0.5, 0.25, 1.0, 0.0]]
    rewards = torch.tensor(groups, dtype=torch.float32).flatten()
    given = expert_weights(rewards, 4, 0.8).view(-1, 4).tolist()
    for group, eta in zip(groups, given, strict=True):
        m = sum(group) / 4
        expected = [0.8 * (1 - m) / (r + 1 - m) if m < 1 else 0.0 for r in group]
        assert eta == pytest.approx(expected)
    assert given[0] == pytest.approx([0.8] * 4) and given[1] == [0.0] * 4
    assert given[2][0] < given[2][1] == pytest.approx(0.8)  # within a mixed group successes have less
    nan = math.nan
    assert expert_weights(torch.tensor([nan, 0.0, 1.0, nan]), 4, 1.0).tolist() == pytest.approx([0, 1, 1 / 3, 0])
    assert expert_weights(torch.full((4,), nan), 4, 1.0).tolist() == [0.0] * 4


def test_first_ropd_loss_and_gradient_by_hand(tmp_path):
    """The plain student draws a prompt four times, a verifier judges each, and at each state the target lies between
    what the student says and what the expert says."""

    def verdict(images, **kwargs):
        values = redness(images)
        middle = sorted(values)[len(values) // 2]
        return [float(value >= middle) if index % 4 else 0.25 for index, value in enumerate(values)]

    own, seeds = seeds_seen(ROPD)
    record = Record()
    trainer = taught(
        own,
        tmp_path,
        rewards=verdict,
        callbacks=[record],
        peft_config=lora(init_lora_weights=False),
        **dict(max_steps=1, max_grad_norm=0, ropd_alpha=0.9),
    )
    student = twin_of(trainer)
    trainer.train()
    plain = {"a": (BUILDERS["sd3"](1), 1.0), "b": (BUILDERS["sd3"](2), GUIDANCE)}
    losses, etas = [], {}
    batches = list(trainer.get_train_dataloader())[:2]
    for number, batch in enumerate(batches):
        task, prompts, steps = batch[0]["task"], [row["prompt"] for row in batch], []
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[0, number, 0]]

        def step(velocity, timestep, x, steps=steps, **kwargs):
            dt = student.scheduler.sigmas[len(steps) + 1] - student.scheduler.sigmas[len(steps)]
            steps.append((x, timestep, velocity))
            return (x + dt * velocity,)

        student.scheduler.step = step
        images = student(prompts, num_inference_steps=3, generator=generators, **CALL["sd3"]).images
        rewards = verdict(images)
        mean = sum(rewards) / 4
        eta = torch.tensor([0.9 * (1 - mean) / (r + 1 - mean) for r in rewards])
        etas[task] = eta.mean().item()
        teacher, scale = plain[task]
        for x, timestep, old in steps[:2]:
            with torch.no_grad():
                expert = guided_by_hand(teacher, x, timestep, prompts, scale)
            target = (1 - eta).view(-1, 1, 1, 1) * old + eta.view(-1, 1, 1, 1) * expert
            losses.append((guided_by_hand(student, x, timestep, prompts, GUIDANCE) - target).square().mean())
    loss = torch.stack(losses).mean()
    loss.backward()
    assert history(trainer, "loss")[0] == pytest.approx(loss.item(), rel=1e-4)
    for task, eta in etas.items():
        assert history(trainer, f"eta/{task}")[0] == pytest.approx(eta, rel=1e-4)
    expected = {name: p.grad for name, p in student.transformer.named_parameters() if p.grad is not None}
    assert record.gradients[0].keys() == expected.keys() and expected
    for name, gradient in expected.items():
        assert (record.gradients[0][name] - gradient).norm() < 1e-3 * gradient.norm(), name


def always(value: float):
    return [lambda images, **kwargs: [value] * len(images)]


def test_what_passes_is_kept_and_what_fails_is_learnt(tmp_path):
    passes = taught(ROPD, tmp_path / "passes", rewards=always(1.0), max_steps=2)
    before = trained(passes).clone()
    passes.train()
    assert history(passes, "eta") == [0, 0] and history(passes, "frac_eta_zero") == [1, 1]
    assert max(history(passes, "loss")) < 1e-10 and (trained(passes) - before).norm() < 1e-3 * before.norm()
    fails = taught(ROPD, tmp_path / "fails", rewards=always(0.0), max_steps=8, learning_rate=3e-3, full=True)
    fails.train()
    distances = history(fails, "expert_distance")
    assert history(fails, "eta") == [1] * 8 and distances[-1] < 0.8 * distances[0]
    assert history(fails, "loss") == pytest.approx(distances, rel=1e-4)  # on policy the target is the expert


@pytest.mark.parametrize(("family", "full"), [("sd3", False), ("sd3", True), ("ltx2", False), ("helios", False)])
def test_a_killed_ropd_run_goes_on_within_a_rollout(tmp_path, family, full):
    """To the bit, in whatever order a pipeline's states lie in memory."""

    def trainer(out):
        call = dict(STREAMING_CALL.get(family) or CALL[family])
        return ROPD(
            (STREAMING | BUILDERS)[family](0),
            lambda images, **columns: [float(index % 2) for index in range(len(images))],
            teachers=(STREAMING | BUILDERS)[family](1),
            args=DiffusionROPDConfig(
                str(tmp_path / out),
                **dict(per_device_train_batch_size=2, num_generations=2, max_steps=4, logging_steps=1, save_steps=1),
                **dict(report_to="none", use_cpu=True, num_inference_steps=3, call_kwargs=call, disable_tqdm=True),
                **dict(image_steps=0, learning_rate=1e-3, num_iterations=2, save_strategy="steps"),
            ),
            train_dataset=Dataset.from_dict({"prompt": ["a red fox", "two blue birds"]}),
            peft_config=None if full else lora(),
        )

    whole = trainer("a")
    whole.train()
    again = trainer("a")
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert torch.equal(trained(whole), trained(again))
    assert history(whole, "loss")[-1:] == history(again, "loss")[-1:]


@pytest.mark.parametrize("family", ["ltx2", "helios", "skyreels_ar"])
def test_joint_audio_and_video_and_chunk_after_chunk(tmp_path, family):
    """Models like MaineCoon's: the student follows its own rollout through all streams and chunks and says the very
    same, so what passes has no loss; and an expert of the student's weights has none either, another one has."""
    call = dict(STREAMING_CALL[family])
    losses = {}
    for name, reward, seed in (("passes", 1.0, 1), ("equal", 0.0, 0), ("fails", 0.0, 1)):
        trainer = ROPD(
            STREAMING[family](0),
            always(reward),
            teachers=STREAMING[family](seed),
            args=DiffusionROPDConfig(
                str(tmp_path / name),
                **dict(per_device_train_batch_size=2, num_generations=2, max_steps=1, logging_steps=1),
                **dict(report_to="none", use_cpu=True, num_inference_steps=4, call_kwargs=call, disable_tqdm=True),
                **dict(save_strategy="no", image_steps=0, learning_rate=1e-4),
            ),
            train_dataset=Dataset.from_dict({"prompt": ["a red fox", "two blue birds"]}),
            peft_config=lora(),
        )
        trainer.train()
        losses[name] = history(trainer, "loss")[0]
        assert history(trainer, "grad_norm")[0] >= 0
    assert losses["passes"] < 1e-9 and losses["equal"] < 1e-9 < 1e-6 < losses["fails"]


def test_an_editing_student_is_taught_by_outcomes(tmp_path):
    rows = {"prompt": ["make it red", "make it blue"], "image": [picture(24, number) for number in range(2)]}
    trainer = ROPD(
        EDITING["flux_kontext"](0),
        always(0.0),
        teachers=EDITING["flux_kontext"](1),
        args=DiffusionROPDConfig(
            str(tmp_path),
            **dict(per_device_train_batch_size=2, num_generations=2, max_steps=2, logging_steps=1, save_steps=1),
            **dict(report_to="none", use_cpu=True, num_inference_steps=3, call_kwargs=EDITING_CALL["flux_kontext"]),
            **dict(image_steps=0, num_iterations=2, disable_tqdm=True, learning_rate=1e-3),
        ),
        train_dataset=Dataset.from_dict(rows),
        peft_config=lora(),
    )
    trainer.train()
    assert history(trainer, "loss")[1] < history(trainer, "loss")[0]


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        (
            dict(rewards=always(1.5)),
            r"the verifier of task 'a' .* says 1.5 to 1.5, and a verdict is a number in \[0, 1\]",
        ),
        (dict(teachers={"a": 1}), r"the tasks \['b'\] have no expert"),
        (dict(ropd_alpha=0.0), r"`ropd_alpha` must be in \(0, 1\], got 0.0"),
        (dict(distill_beta=1.0), "`distill_beta=1.0` has no part in ROPD"),
    ],
)
def test_what_does_not_fit_ropd(tmp_path, kwargs, sentence):
    if "teachers" in kwargs:
        kwargs["teachers"] = {key: BUILDERS["sd3"](seed) for key, seed in kwargs["teachers"].items()}
    with pytest.raises(ValueError, match=sentence):
        taught(ROPD, tmp_path, **kwargs).train()


def test_a_verifier_without_a_verdict(tmp_path):
    """Its sample is not learnt from, and has no part in its group."""
    calls = []

    def sometimes(images, **kwargs):
        calls.append(len(images))
        return [None, 0.0, 1.0, None]

    trainer = taught(ROPD, tmp_path, rewards=sometimes, max_steps=1)
    trainer.train()
    assert history(trainer, "eta")[0] == pytest.approx((0 + 1 + 1 / 3 + 0) / 4) and calls == [4, 4]
    assert history(trainer, "frac_eta_zero")[0] == 0.5
    assert isinstance(trainer.pipeline, StableDiffusion3Pipeline)
