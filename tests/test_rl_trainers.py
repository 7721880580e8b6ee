"""Learning from rewards as its users meet it, on a tiny SD3 (and every family where one matters)."""

import json
import math
from functools import cache

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch.distributions import Normal

from diffusion_opd import DiffusionGRPOConfig, DiffusionNFTTrainer
from diffusion_opd.sampling import noise_generators, seed_of
from tests.card_rules import check_card
from tests.rl_training import (
    CONFIGS,
    DATA,
    GRPO,
    NFT,
    TASKS,
    Record,
    advantages_by_hand,
    config,
    old_weights,
    redness,
    sde_by_hand,
    seeds_seen,
    trainer_of,
    twin_of,
)
from tests.tiny_pipelines import BUILDERS, CALL, denoiser, flagging
from tests.training import FAMILIES, guided_by_hand, history, latents, lora, trained
from tests.zoo import ZOO
from tests.zoo.worlds import Safe

BOTH = pytest.mark.parametrize("cls", [NFT, GRPO])
built = cache(lambda family="sd3": BUILDERS[family](0))  # to compare with; never trained


def brightness(images, **kwargs):
    return [float(np.asarray(image, dtype=float).mean() / 255) for image in images]


# What is learnt


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (NFT, {"old_decay_max": 0.0}),
        (GRPO, {"loss_type": "grpo"}),
        pytest.param(GRPO, {"loss_type": "grpo_guard"}, marks=pytest.mark.nightly),
    ],
)
def test_reward_rises(tmp_path, cls, settings):
    """By more than half of what the samples differ by (over five seeds it rose by 1.5 to 6 times that)."""
    trainer = trainer_of(
        cls,
        tmp_path,
        rewards=brightness,
        data=DATA.select([0]),
        eval_dataset=DATA.select([0] * 8),
        **settings,
        **dict(per_device_train_batch_size=24, num_generations=24, max_steps=10, learning_rate=3e-2),
        **dict(num_inference_steps=2, timestep_fraction=0.5, guidance_scale=1.0, lr_scheduler_type="constant"),
    )
    before = trainer.evaluate()
    trainer.train()
    assert trainer.evaluate()["eval_reward"] > before["eval_reward"] + 0.5 * before["eval_reward_std"]


def assert_learns(trainer, record: Record, student: DiffusionPipeline, loss: torch.Tensor) -> None:
    loss.backward()
    assert history(trainer, "loss")[0] == pytest.approx(loss.item(), rel=1e-4, abs=1e-7)
    expected = {name: p.grad for name, p in student.transformer.named_parameters() if p.grad is not None}
    assert record.gradients[0].keys() == expected.keys() and expected
    for name, gradient in expected.items():
        assert (record.gradients[0][name] - gradient).norm() < 1e-3 * gradient.norm(), name


@pytest.mark.parametrize("loss_type", ["grpo", "grpo_guard"])
def test_first_grpo_loss_and_gradient_are_the_papers(tmp_path, loss_type):
    """Flow-GRPO written down again: the plain pipeline rolls out with the SDE, and the densities are
    torch.distributions'."""
    cls, seeds = seeds_seen(GRPO)
    record, beta, noise_level = Record(), 0.3, 0.6
    trainer = trainer_of(
        cls,
        tmp_path,
        data=TASKS,
        peft_config=lora(init_lora_weights=False),
        callbacks=[record],
        **dict(max_steps=1, max_grad_norm=0, beta=beta, noise_level=noise_level, loss_type=loss_type),
    )
    student, guidance = twin_of(trainer), CALL["sd3"]["guidance_scale"]
    trainer.train()

    losses = []
    for task, prompts in enumerate(first_prompts(trainer)):
        steps, generators = [], [torch.Generator().manual_seed(seed) for seed in seeds[0, task, 0]]

        noisy = noise_generators(generators)

        def step(velocity, timestep, x, steps=steps, generators=noisy, **kwargs):
            mean, std, dt = sde_by_hand(student.scheduler.sigmas, len(steps), noise_level)
            noise = torch.cat([torch.randn(1, *x.shape[1:], generator=generator) for generator in generators])
            steps.append((x, timestep, mean(x, velocity) + std * noise))
            if len(steps) < 3:
                return (steps[-1][2],)
            return (x + dt * velocity,)  # the last step is not learnt, and so not stochastic

        student.scheduler.step = step
        images = student(prompts, num_inference_steps=3, generator=generators, **CALL["sd3"]).images
        advantages = advantages_by_hand(redness(images))
        for index, (x, timestep, following) in enumerate(steps[:2]):
            mean, std, dt = sde_by_hand(student.scheduler.sigmas, index, noise_level)
            mu = mean(x, guided_by_hand(student, x, timestep, prompts, guidance))
            with torch.no_grad():
                mu_base = mean(x, guided_by_hand(built(), x, timestep, prompts, guidance))
            density = Normal(mu, std).log_prob(following).flatten(1).mean(1)
            scale = (std, 1 / abs(dt)) if loss_type == "grpo_guard" else (1.0, 1.0)
            surrogate = -advantages * torch.exp(scale[0] * (density - density.detach()))
            distance = (mu - mu_base).square().mean() / (2 * std**2)
            losses.append(scale[1] * surrogate.mean() + beta * distance)
    assert_learns(trainer, record, student, torch.stack(losses).mean())
    assert history(trainer, "kl")[0] > 0


def first_prompts(trainer) -> list[list[str]]:
    """The prompts of the first optimizer step, by task."""
    batches = list(trainer.get_train_dataloader())[: len(trainer.tasks)]
    return [[example["prompt"] for example in batch] for batch in batches]


def test_first_nft_loss_and_gradient_are_the_papers(tmp_path):
    """DiffusionNFT written down again: the plain pipeline samples, and the two implicit policies see clean latents."""
    cls, seeds = seeds_seen(NFT)
    record, beta, strength = Record(), 0.3, 0.6
    trainer = trainer_of(
        cls,
        tmp_path,
        data=TASKS,
        peft_config=lora(init_lora_weights=False),
        callbacks=[record],
        **dict(max_steps=1, max_grad_norm=0, beta=beta, nft_beta=strength),
    )
    student, guidance = twin_of(trainer), CALL["sd3"]["guidance_scale"]
    trainer.train()

    losses = []
    for task, prompts in enumerate(first_prompts(trainer)):
        sample = {}
        for kind in ("latent", "pil"):
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[0, task, 0]]
            call = CALL["sd3"] | {"generator": generators, "output_type": kind}
            sample[kind] = student(prompts, num_inference_steps=3, **call).images
        x_0, r = sample["latent"], advantages_by_hand(redness(sample["pil"])) / 10 + 0.5
        sigmas = student.scheduler.sigmas[:2]
        for index, (sigma, timestep) in enumerate(zip(sigmas, student.scheduler.timesteps[:2], strict=True)):
            noise_seeds = seeds[2, task * 3 + index, 0]
            noise = torch.cat(
                [torch.randn(1, *x_0.shape[1:], generator=torch.Generator().manual_seed(s)) for s in noise_seeds]
            )
            x = (1 - sigma) * x_0 + sigma * noise
            v = guided_by_hand(student, x, timestep, prompts, guidance)
            with torch.no_grad():
                v_base = guided_by_hand(built(), x, timestep, prompts, guidance)
            v_old = v.detach()
            contrast = 0.0
            for weight, implicit in (
                (r, (1 - strength) * v_old + strength * v),
                (1 - r, (1 + strength) * v_old - strength * v),
            ):
                gap = (x - sigma * implicit - x_0).flatten(1)
                contrast = contrast + weight / strength * gap.square().mean(1) / gap.detach().abs().mean(1)
            losses.append(5 * contrast.mean() + beta * (v - v_base).square().mean())
    assert_learns(trainer, record, student, torch.stack(losses).mean())
    assert history(trainer, "kl")[0] > 0 and history(trainer, "old_distance") == [0.0]


@FAMILIES
def test_on_policy_every_ratio_is_one_in_every_family(tmp_path, family, full):
    """The very numbers that made the samples are what they are learnt from: no log-ratio, not even of rounding."""
    trainer = trainer_of(GRPO, tmp_path, family, full=full, max_steps=1)
    before = trained(trainer).clone()
    trainer.train()
    for name in ("log_ratio/mean", "log_ratio/std", "log_ratio_step/0", "log_ratio_step/1", "clip_ratio/region_mean"):
        assert history(trainer, name) == [0.0], name
    assert history(trainer, "reward_std")[0] > 0 and not torch.equal(trained(trainer), before)


@FAMILIES
def test_nft_learns_and_its_weights_load_in_every_family(tmp_path, family, full):
    trainer = trainer_of(NFT, tmp_path, family, full=full, max_steps=1)
    before = trained(trainer).clone()
    trainer.train()
    assert math.isfinite(history(trainer, "loss")[0]) and history(trainer, "loss/contrast")[0] > 0
    assert history(trainer, "reward_std")[0] > 0 and not torch.equal(trained(trainer), before)
    trainer.save_model()
    if full:
        fresh = DiffusionPipeline.from_pretrained(tmp_path)
    else:
        fresh = BUILDERS[family](0)
        fresh.load_lora_weights(str(tmp_path), weight_name="pytorch_lora_weights.safetensors")
    for pipe in (trainer.pipeline, fresh):  # matmul rounds differently beside a weight that asks for gradients
        denoiser(pipe).requires_grad_(False)
    student = latents(trainer.pipeline, family)
    assert torch.equal(latents(fresh, family), student)
    assert not torch.equal(latents(built(family), family), student)
    assert not list(tmp_path.glob("old*"))  # the final folder is for users


def test_dance_sde_and_cps_learn_too(tmp_path):
    for transition in ("dance_sde", "cps"):
        trainer = trainer_of(GRPO, tmp_path, transition=transition, max_steps=1)
        before = trained(trainer).clone()
        trainer.train()
        assert history(trainer, "log_ratio/std") == [0.0] and not torch.equal(trained(trainer), before)


def test_a_kernel_that_does_not_fit_the_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'cps'.*VP model"):
        trainer_of(GRPO, tmp_path, "sd15", transition="cps")
    with pytest.raises(ValueError, match="step 3 of 3 has zero std under 'cps'.*lower `timestep_fraction`"):
        trainer_of(GRPO, tmp_path, transition="cps", timestep_fraction=1.0)


# Rollouts


@BOTH
def test_two_steps_on_one_rollout(tmp_path, cls):
    asked = []

    def judge(images, prompts, trainer_state):
        asked.append((trainer_state.global_step, prompts))
        return redness(images)

    settings = {"old_decay_max": 0.0} if cls is NFT else {}
    trainer = trainer_of(cls, tmp_path, rewards=judge, num_iterations=2, max_steps=4, **settings)
    trainer.train()
    assert [step for step, _ in asked] == [0, 2] and asked[0][1] != asked[1][1]
    if cls is GRPO:
        first, second, third, fourth = history(trainer, "log_ratio/std")
        assert (first, third) == (0.0, 0.0) and second > 0 and fourth > 0
    else:  # the old policy follows when a rollout is done with
        assert [value > 0 for value in history(trainer, "old_distance")] == [False, True] * 2
        assert len(history(trainer, "old_decay")) == 2


@BOTH
def test_split_of_a_step_does_not_matter(tmp_path, cls):
    """A group that lies in four micro-batches is as one in one."""
    runs = []
    for batch, accumulation in ((4, 1), (1, 4)):
        trainer = trainer_of(
            cls,
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            **dict(beta=0.1, guidance_scale=1.0, optim="sgd", learning_rate=1.0),
        )
        before = trained(trainer).clone()
        trainer.train()
        runs.append(trainer)
    one, other = runs
    for name in ("loss", "grad_norm", "reward", "reward_std"):
        assert history(other, name) == pytest.approx(history(one, name), rel=1e-3, abs=1e-6), name
    assert (trained(other) - trained(one)).norm() < 1e-2 * (trained(one) - before).norm()
    assert all(math.isfinite(value) for entry in other.state.log_history for value in entry.values())


@BOTH
def test_groups_that_do_not_fit_are_refused(tmp_path, cls):
    sentence = r"a rollout has 3 samples of each task \(.*1 processes.*\), which is no multiple of `num_generations=4`"
    with pytest.raises(ValueError, match=sentence):
        trainer_of(cls, tmp_path, per_device_train_batch_size=3)
    with pytest.raises(ValueError, match=r"a rollout has 2 samples.*gradient_accumulation_steps 2 / 2 tasks"):
        trainer_of(cls, tmp_path, data=TASKS, per_device_train_batch_size=2)


def test_noise_stays_in_the_window(tmp_path):
    """The windows of all micro-batches of a rollout are one, those of other rollouts lie elsewhere, and what is not in
    them is the pipeline's own sampler."""
    rollouts, pictures = [], []

    class Watch(GRPO):
        def _generate(self, batches):
            rollouts.append(super()._generate(batches))
            return rollouts[-1]

    CONFIGS[Watch] = DiffusionGRPOConfig
    trainer = trainer_of(
        Watch,
        tmp_path,
        rewards=lambda images, **kwargs: pictures.append(images) or redness(images),
        data=TASKS,
        **dict(num_inference_steps=6, sde_window_size=2, sde_window_range=[1, 5], max_steps=5, learning_rate=0.0),
    )
    trainer.train()
    windows = [[tuple(rollout.tensors["window"].tolist()) for (rollout,) in step] for step in rollouts]
    assert all(len(step) == 2 and step[0] == step[1] for step in windows)
    assert {step[0] for step in windows} <= {(1, 3), (2, 4), (3, 5)} and len({step[0] for step in windows}) > 1

    start, stop = windows[0][0]
    prompts, tensors = rollouts[0][0][0].inputs["prompt"], rollouts[0][0][0].tensors
    assert len(tensors["states"]) == 2
    # learning_rate 0: the policy that rolled out is still there
    seeds = [seed_of(trainer.args.seed, 0, 0, 0, index) for index in range(4)]
    states = []
    plain = BUILDERS["sd3"](0)
    euler = plain.scheduler.step

    def step(velocity, timestep, x, **kwargs):
        index = len(states)
        states.append(x)
        following = euler(velocity, timestep, x, **kwargs)
        if start <= index < stop:  # as it was drawn: its mean depends on the state that is compared
            _, std, _ = sde_by_hand(plain.scheduler.sigmas, index, 0.7)
            following = (tensors["means"][index - start] + std * tensors["noise"][index - start],)
        return following

    plain.scheduler.step = step
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images = plain(prompts, num_inference_steps=6, generator=generators, **CALL["sd3"]).images
    for row in range(2):
        assert torch.allclose(states[start + row], tensors["states"][row], atol=1e-5)
    assert redness(images) == pytest.approx(redness(pictures[0]), abs=1e-3)
    names = {key for entry in trainer.state.log_history for key in entry if key.startswith("log_ratio_step/")}
    assert names == {f"log_ratio_step/{index}" for step in windows for index in range(*step[0])}


# DiffusionNFT's old policy


@pytest.mark.parametrize("full", [False, True])
def test_old_policy_follows_at_its_decay(tmp_path, full):
    record = Record()
    trainer = trainer_of(
        NFT,
        tmp_path,
        full=full,
        callbacks=[record],
        beta=0.1,
        **dict(max_steps=4, old_decay_start=1, old_decay_rate=0.3, old_decay_max=0.5),
    )
    old = old_weights(trainer).clone()
    assert torch.equal(old, trained(trainer))
    trainer.train()
    decays = [0.0, 0.3, 0.5, 0.5]
    assert history(trainer, "old_decay") == pytest.approx(decays)
    for decay, weights in zip(decays, record.weights, strict=True):
        old = decay * old + (1 - decay) * weights
    assert torch.allclose(old_weights(trainer), old, atol=1e-6) and not torch.equal(old, trained(trainer))
    policy = trainer.model if trainer.trains_lora else trainer.old.denoiser
    assert not any(p.requires_grad for name, p in policy.named_parameters() if not trainer.trains_lora or "old" in name)
    if full:  # the base is what the run began with, however much is trained
        untouched = built().transformer.state_dict()
        assert all(torch.equal(value, untouched[key]) for key, value in trainer.base.denoiser.state_dict().items())
    else:
        backbone = {k.replace("base_layer.", ""): v for k, v in trainer.model.state_dict().items() if "lora_" not in k}
        untouched = built().transformer.state_dict()
        assert backbone.keys() == untouched.keys()
        assert all(torch.equal(value, untouched[key]) for key, value in backbone.items())


@pytest.mark.parametrize("full", [False, True])
def test_without_decay_the_old_policy_is_the_trained_one(tmp_path, full):
    trainer = trainer_of(NFT, tmp_path, full=full, old_decay_max=0.0, max_steps=3)
    trainer.train()
    assert torch.equal(old_weights(trainer), trained(trainer))
    assert history(trainer, "old_distance") == [0.0] * 3


# Tasks


@BOTH
def test_tasks_have_their_own_rewards(tmp_path, cls):
    seen = []

    def of(task):
        def judge(prompts, images, shade):
            seen.append((task, prompts, shade))
            return redness(images)

        judge.__name__ = f"judge_{task}"
        return judge

    trainer = trainer_of(
        cls,
        tmp_path,
        rewards={"a": [of("a"), brightness], "b": of("b")},
        data={"b": DATA.select(range(3)), "a": DATA.select(range(3, 6))},
        reward_weights={"a": [1.0, 0.0], "b": 2.0},
        **dict(per_device_train_batch_size=2, gradient_accumulation_steps=4),
    )
    trainer.train()
    assert [task for task, *_ in seen] == ["a", "b", "a", "b"] * 2
    rows = {row["prompt"]: row["shade"] for row in DATA}
    own = {"a": DATA["prompt"][3:], "b": DATA["prompt"][:3]}
    for task in own:
        for step in (0, 1):
            first, second = [prompts for name, prompts, _ in seen if name == task][2 * step : 2 * step + 2]
            assert len({*first, *second}) == 1 and first[0] in own[task]  # one group of four in two micro-batches
    assert all(shade == [rows[prompt] for prompt in prompts] for _, prompts, shade in seen)
    entry = next(entry for entry in trainer.state.log_history if "reward" in entry)
    assert entry["reward/a"] == pytest.approx(entry["rewards/judge_a/mean"])
    assert entry["reward/b"] == pytest.approx(2 * entry["rewards/judge_b/mean"])
    assert entry["reward"] == pytest.approx((entry["reward/a"] + entry["reward/b"]) / 2)
    assert entry["rewards/brightness/mean"] > 0


def only(task: str):
    def judge(images, task, mine=task):
        return [1.0 * index if name == mine else None for index, name in enumerate(task)]

    judge.__name__ = f"only_{task}"
    return judge


def test_a_reward_of_some_tasks_says_none_elsewhere(tmp_path):
    trainer = trainer_of(GRPO, tmp_path, rewards=[only("a"), only("b"), only("c")], data=TASKS, max_steps=1)
    trainer.train()
    assert trainer.tasks == ["a", "b"]
    (entry,) = (entry for entry in trainer.state.log_history if "reward" in entry)
    assert entry["reward/a"] == entry["reward/b"] == entry["rewards/only_a/mean"] == 1.5
    assert "rewards/only_c/mean" not in entry


@BOTH
def test_samples_without_a_reward_teach_nothing(tmp_path, cls):
    trainer = trainer_of(cls, tmp_path, rewards=lambda images: [None] * len(images), max_steps=1, beta=0.0)
    trainer.train()
    assert "reward" not in trainer.state.log_history[0]
    assert history(trainer, "grad_norm")[0] == pytest.approx(0.0, abs=1e-6)


@BOTH
def test_errors_of_a_reward_function_are_the_users_to_see(tmp_path, cls):
    def judge(images):
        raise ZeroDivisionError("of the user's")

    with pytest.raises(ZeroDivisionError, match="of the user's"):
        trainer_of(cls, tmp_path, rewards=judge).train()
    with pytest.raises(ValueError, match="the reward function 'judge' must return a list of 4 rewards, got 1 values"):

        def judge(images):
            return [1.0]

        trainer_of(cls, tmp_path, rewards=judge).train()


@BOTH
def test_streams(tmp_path, cls):
    rows = [{"prompt": f"{task} {i}", "task": task, "n": i} for i in range(3) for task in ("a", "b")]
    numbers = []

    def judge(images, prompts, n):
        assert prompts == [f"{prompts[0][0]} {number}" for number in n]
        numbers.append(n)
        return redness(images)

    settings = dict(num_iterations=2, max_steps=4, num_inference_steps=1, guidance_scale=1.0)
    mixed = IterableDataset.from_generator(lambda: iter(rows))
    streams = {task: IterableDataset.from_generator(lambda task=task: iter(rows[task == "b" :: 2])) for task in "ab"}
    runs = [
        trainer_of(cls, tmp_path, rewards={"a": judge, "b": judge}, data=data, **settings) for data in (mixed, streams)
    ]
    for trainer in runs:
        trainer.train()
    assert numbers == [[0] * 4, [0] * 4, [1] * 4, [1] * 4] * 2
    assert torch.equal(trained(runs[0]), trained(runs[1]))


# Checkpoints


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.nightly)])
@pytest.mark.parametrize(
    ("cls", "settings", "step"),
    [
        (NFT, {"num_iterations": 2}, 3),
        (NFT, {"ema_decay": 0.8, "ema_update_every": 1}, 2),
        (GRPO, {"num_iterations": 2}, 3),
        (GRPO, {"num_iterations": 3, "ema_decay": 0.8, "ema_update_every": 1, "sde_window_size": 1}, 2),
    ],
)
def test_resume_is_exact(tmp_path, cls, settings, step, full):
    settings = dict(max_steps=4, save_strategy="steps", save_steps=step, beta=0.1, data=TASKS, full=full) | settings
    settings |= dict(learning_rate=1e-3, guidance_scale=1.0)
    undisturbed = trainer_of(cls, tmp_path / "a", **settings)
    undisturbed.train()
    resumed = trainer_of(cls, tmp_path / "b", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
    assert torch.equal(trained(undisturbed), trained(resumed))
    for name in ("loss", "kl", "grad_norm", *(["log_ratio/std"] if cls is GRPO else ["old_distance"])):
        assert history(undisturbed, name) == history(resumed, name) and len(history(resumed, name)) == 4, name
    if cls is NFT:
        assert torch.equal(old_weights(undisturbed), old_weights(resumed))
    if undisturbed.ema:
        pairs = zip(undisturbed.ema.shadow_params, resumed.ema.shadow_params, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_checkpoints_that_lack_something_are_refused(tmp_path):
    settings = dict(save_strategy="steps", save_steps=1, max_steps=2)
    trainer_of(GRPO, tmp_path, **settings).train()
    checkpoint = tmp_path / "checkpoint-1"
    with pytest.raises(ValueError, match="was saved by DiffusionGRPO, this run is DiffusionNFT; resume it with that"):
        trainer_of(NFT, tmp_path, **settings).train(resume_from_checkpoint=str(checkpoint))
    sentence = r"lies between two optimizer steps on one rollout and has no rollouts_0\.safetensors; resume with the"
    with pytest.raises(ValueError, match=sentence):
        trainer_of(GRPO, tmp_path, num_iterations=2, **settings).train(resume_from_checkpoint=str(checkpoint))


def test_the_folders_of_a_run(tmp_path):
    trainer = trainer_of(NFT, tmp_path, num_iterations=2, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    names = {folder: {path.name for path in (tmp_path / folder).iterdir()} for folder in ("checkpoint-1", ".")}
    assert {"rollouts_0.safetensors", "old_policy.safetensors"} <= names["checkpoint-1"]
    assert not {"rollouts_0.safetensors", "old_policy.safetensors"} & names["."]
    assert not (tmp_path / "checkpoint-2" / "rollouts_0.safetensors").exists()
    keys = load_file(tmp_path / "checkpoint-2" / "pytorch_lora_weights.safetensors").keys()
    assert keys and not any("old" in key for key in keys)
    assert json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2


# Evaluation, images, card


@BOTH
def test_evaluation_is_the_plain_pipelines(tmp_path, cls):
    """Its own sampler, its own pictures, judged; the same each time, and nothing is left behind."""
    cls, seeds = seeds_seen(cls)
    trainer = trainer_of(
        cls,
        tmp_path,
        rewards={"a": [redness, brightness], "b": brightness},
        reward_weights={"a": [1.0, 2.0], "b": 3.0},
        data=TASKS,
        eval_dataset=TASKS.select(range(5)),
        per_device_eval_batch_size=3,
        peft_config=lora(init_lora_weights=False),
    )
    before = trained(trainer).clone()
    first, second = trainer.evaluate(), trainer.evaluate(TASKS.select(range(5)))
    keys = {key for key in first if "reward" in key}
    assert keys == {
        *("eval_reward", "eval_reward_std", "eval_reward/a", "eval_reward/b"),
        *(f"eval_rewards/{name}/{what}" for name in ("redness", "brightness") for what in ("mean", "std", "a")),
        "eval_rewards/brightness/b",
    }
    assert all(first[key] == second[key] for key in keys)
    assert torch.equal(trained(trainer), before) and all(p.grad is None for p in trainer.model.parameters())

    plain, numbers = twin_of(trainer), {"a": [], "b": []}
    judged = []
    for start in (0, 3):
        rows = TASKS.select(range(start, min(start + 3, 5)))
        generators = [torch.Generator().manual_seed(seeds[prompt]) for prompt in rows["prompt"]]
        images = plain(list(rows["prompt"]), num_inference_steps=3, generator=generators, **CALL["sd3"]).images
        for task, red, bright in zip(rows["task"], redness(images), brightness(images), strict=True):
            numbers[task].append(red + 2 * bright if task == "a" else 3 * bright)
            judged.append(bright)
    every = torch.tensor([*numbers["a"], *numbers["b"]])
    assert first["eval_reward/a"] == pytest.approx(sum(numbers["a"]) / 3, abs=1e-6)
    assert first["eval_reward/b"] == pytest.approx(sum(numbers["b"]) / 2, abs=1e-6)
    assert first["eval_reward"] == pytest.approx(every.mean().item(), abs=1e-6)
    assert first["eval_reward_std"] == pytest.approx(every.std().item(), rel=1e-4)
    assert first["eval_rewards/brightness/mean"] == pytest.approx(sum(judged) / 5, abs=1e-6)
    assert first["eval_rewards/brightness/b"] == pytest.approx(first["eval_reward/b"] / 3, abs=1e-6)


@BOTH
def test_evaluation_does_not_depend_on_how_it_is_cut(tmp_path, cls):
    """Rows that are equal have noise of their own, and which of them is which does not matter."""
    data = DATA.select([0, 1, 1, 2, 3])
    trainer = trainer_of(cls, tmp_path, rewards=[redness, brightness], eval_dataset=data)
    forms = [data, data.select([4, 2, 0, 1, 3]), data.to_iterable_dataset()]
    results = []
    for batch, form in [(1, 0), (2, 0), (5, 0), (3, 1), (2, 2)]:
        trainer.args.per_device_eval_batch_size = batch
        results.append(trainer.evaluate(forms[form]))
    for name in ("reward", "reward_std", "rewards/redness/mean", "rewards/brightness/std"):
        values = [result[f"eval_{name}"] for result in results]
        assert values == pytest.approx([values[0]] * len(values), abs=5e-5), name  # a pixel that rounds otherwise
    assert trainer.evaluate(data.select([1, 1]))["eval_reward_std"] > 1e-3


def test_evaluation_leaves_out_what_was_not_judged(tmp_path):
    trainer = trainer_of(NFT, tmp_path, rewards={"a": redness, "b": only("b")}, data=TASKS)
    metrics = trainer.evaluate(TASKS.select([0, 2]))
    assert "eval_reward/a" in metrics and "eval_rewards/redness/std" in metrics
    assert not {"eval_reward/b", "eval_rewards/only_b/mean", "eval_rewards/only_b/std"} & metrics.keys()
    with pytest.raises(ValueError, match=r"eval_dataset: .* is no prompt for one of the tasks \['a', 'b'\]"):
        trainer.evaluate(Dataset.from_list([{"prompt": "a fox", "task": "c"}]).to_iterable_dataset())


@BOTH
def test_the_best_model_has_the_greatest_reward(tmp_path, cls):
    trainer = trainer_of(
        cls,
        tmp_path,
        rewards=redness,
        eval_dataset=DATA.select([0] * 3),
        **dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, max_steps=4),
        **dict(load_best_model_at_end=True, learning_rate=0.1),
    )
    trainer.train()
    values = history(trainer, "eval_reward")
    best = values.index(max(values)) + 1
    assert len(set(values)) == 4 and trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert trainer.evaluate()["eval_reward"] == pytest.approx(max(values), abs=1e-6)


def test_captions_say_what_the_rewards_are(tmp_path):
    number = only("b")
    trainer = trainer_of(NFT, tmp_path, rewards={"a": [redness, number], "b": number}, data=TASKS)
    prompts = trainer.image_prompts
    images = trainer.sample_images(prompts)
    scores = [f"{value:.3f}" for value in redness(images)]
    assert trainer.image_captions(images) == [
        f"{prompts[0]}, redness {scores[0]}",
        f"{prompts[1]}, redness {scores[1]}",
        f"{prompts[2]}, only_b 0.000",
        f"{prompts[3]}, only_b 1.000",
    ]
    trainer.log_images()
    written = json.loads((tmp_path / "images" / "step_000000" / "captions.json").read_text())
    assert written == trainer.image_captions(images)
    chosen = trainer_of(NFT, tmp_path, image_prompts=["a fox"])
    assert chosen.image_captions(chosen.sample_images(["a fox"])) == ["a fox"]


def test_videos_are_judged_by_their_frames(tmp_path):
    """Also at the end, where sample images are drawn: of a video one frame."""

    def judge(images):
        assert all(isinstance(frames, list) and len(frames) == CALL["wan"]["num_frames"] for frames in images)
        return redness(images)

    trainer = trainer_of(NFT, tmp_path, "wan", rewards=judge, max_steps=1, image_steps=None)
    trainer.train()
    assert len(list((tmp_path / "images" / "step_000001").glob("*.png"))) == 4


@pytest.mark.parametrize(
    ("cls", "settings", "paper"),
    [(NFT, {}, "2509.16117"), (GRPO, {}, "2505.05470"), (GRPO, {"loss_type": "grpo_guard"}, "2510.22319")],
)
def test_card(tmp_path, cls, settings, paper):
    rewards = {"a": [redness, brightness], "b": brightness}
    trainer = trainer_of(
        cls,
        tmp_path,
        rewards=rewards,
        data=TASKS,
        reward_weights={"a": [1.0, 0.5], "b": 2.0},
        image_steps=None,
        max_steps=1,
        save_strategy="steps",
        save_steps=1,
        **settings,
    )
    trainer.train()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "diffusers" and {"diffusion-opd", "trl", "lora"} <= set(card.data.tags)
    assert check_card(card.content) == ([], [])
    assert [item["text"] for item in card.data.widget] == trainer.image_prompts
    for text in (
        paper,
        cls._name,
        "| a | `redness` | 1.0 |",
        "| a | `brightness` | 0.5 |",
        "| b | `brightness` | 2.0 |",
        "| `num_generations` | 4 |",
        "| `optimizer steps` | 1 |",
        "load_lora_weights",
    ):
        assert text in card.text, text
    assert "## Teachers" not in card.text and card.text.count("arxiv") <= 1


@BOTH
def test_bare_defaults_run_on_a_laptop(tmp_path, monkeypatch, cls):
    """A pipeline, a reward and prompts are enough."""
    monkeypatch.chdir(tmp_path)
    trainer = cls(
        BUILDERS["sd3"](0),
        redness,
        CONFIGS[cls](
            "out", max_steps=1, num_inference_steps=2, height=16, width=16, call_kwargs={"max_sequence_length": 32}
        ),
        train_dataset=DATA,
        peft_config=lora(),
    )
    trainer.train()
    assert math.isfinite(history(trainer, "train_loss")[0])
    assert list((tmp_path / "out" / "images" / "step_000001").glob("*.png"))


@pytest.mark.slow
def test_the_frozen_copies_of_a_full_student_are_compiled_too(tmp_path):
    runs = []
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        runs.append(trainer_of(DiffusionNFTTrainer, tmp_path, full=True, beta=0.1, **settings))
        runs[-1].train()
    assert history(runs[0], "loss") == pytest.approx(history(runs[1], "loss"), rel=1e-5)
    kinds = 2  # the last block of SD3 is of another shape
    # One of the student, with gradient; the old and the first policy share one, without
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 * kinds
    assert not torch._dynamo.utils.counters["graph_break"]


@BOTH
def test_checkpointing_of_activations_changes_nothing(tmp_path, cls):
    runs = [trainer_of(cls, tmp_path, gradient_checkpointing=value, beta=0.1) for value in (False, True)]
    for trainer in runs:
        trainer.train()
    assert [trainer.model.is_gradient_checkpointing for trainer in runs] == [False, True]
    assert history(runs[0], "loss") == history(runs[1], "loss")
    assert torch.equal(trained(runs[0]), trained(runs[1]))


@pytest.mark.parametrize("full", [False, True])
@BOTH
def test_bf16(tmp_path, cls, full):
    """Frozen modules in bf16, trained ones in float32; on policy the ratio is one in this precision too."""
    BUILDERS["sd3"](0).save_pretrained(tmp_path / "base")
    trainer = cls(
        str(tmp_path / "base"),
        redness,
        config(cls, tmp_path / "out", bf16=True, beta=0.1),
        train_dataset=DATA,
        peft_config=None if full else lora(),
    )
    trainer.train()
    assert {p.dtype for p in trainer.trainable_parameters} == {torch.float32}
    assert trainer.pipeline.text_encoder.dtype == torch.bfloat16
    assert all(math.isfinite(loss) for loss in history(trainer, "loss"))
    if cls is GRPO:
        assert history(trainer, "log_ratio/std") == [0.0, 0.0]


def test_config_of_another_trainer_is_refused(tmp_path):
    with pytest.raises(TypeError, match="`args` must be a DiffusionGRPOConfig, got DiffusionNFTConfig"):
        GRPO(BUILDERS["sd3"](0), redness, config(NFT, tmp_path), train_dataset=DATA)


# What makes black pictures


@BOTH
def test_a_safety_checker_has_no_part_in_what_is_judged(tmp_path, cls, caplog):
    """As with a pipeline that has none; in sample pictures and what is saved it is as its user gave it."""
    runs = []
    for pipeline in (BUILDERS["sd15"](0), flagging()):
        caplog.clear()
        trainer = cls(
            pipeline,
            brightness,
            config(cls, tmp_path, "sd15"),
            train_dataset=DATA,
            eval_dataset=DATA.select([0]),
            peft_config=lora(),
        )
        assert ("The safety_checker of StableDiffusionPipeline" in caplog.text) == (len(runs) == 1)
        trainer.train()
        runs.append((trainer, trainer.evaluate()["eval_reward"], history(trainer, "reward")))
    plain, checked = runs
    assert checked[1:] == plain[1:] and min(checked[2]) > 0.1
    assert torch.equal(trained(checked[0]), trained(plain[0]))
    pipeline = checked[0].pipeline
    assert pipeline.safety_checker is not None
    assert brightness(checked[0].sample_images(["a fox"])) == [0.0] < brightness(plain[0].sample_images(["a fox"]))


def test_a_guard_that_a_pipeline_asks_for_stays(tmp_path, caplog):
    """Cosmos' says of a prompt that it is not safe with an error, and puts no black frames in its place."""
    asked = []

    class Guard(Safe):
        def check_text_safety(self, text):
            asked.append(text)
            return True

        def check_video_safety(self, video):
            asked.append("video")
            return video

    pipeline = ZOO["Cosmos2TextToImagePipeline"].make(0)
    pipeline.register_modules(safety_checker=Guard())
    call = dict(ZOO["Cosmos2TextToImagePipeline"].call)
    trainer = NFT(
        pipeline,
        redness,
        config(NFT, tmp_path, call_kwargs=call, max_steps=1, guidance_scale=None),
        train_dataset=DATA,
        peft_config=lora(),
    )
    assert "they are judged as it leaves them" in caplog.text
    asked.clear()
    trainer.train()
    assert asked.count("video") == 4 and any("prompt number" in text for text in asked)
