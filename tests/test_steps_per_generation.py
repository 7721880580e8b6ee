"""Rollouts that are learnt from in several optimizer steps, a part of their micro-batches in each."""

import pytest
import torch
from torch.distributions import Normal
from transformers import TrainerCallback

from diffusion_opd.sampling import noise_generators
from tests.rl_training import (
    CONFIGS,
    DATA,
    GRPO,
    NFT,
    TASKS,
    Record,
    advantages_by_hand,
    old_weights,
    redness,
    sde_by_hand,
    seeds_seen,
    trainer_of,
    twin_of,
)
from tests.tiny_pipelines import CALL
from tests.training import guided_by_hand, history, lora, trained

BOTH = pytest.mark.parametrize("cls", [NFT, GRPO])


def recorded(cls) -> tuple[type, list]:
    """The trainer, noting the micro-batches of each rollout, and of each optimizer step what is learnt from."""
    seen = []

    class Seen(cls):
        _name = cls._name

        def _generate(self, batches):
            seen.append(("rollout", self.state.global_step, [[row["prompt"] for row in batch] for batch in batches]))
            return super()._generate(batches)

        def get_batch_samples(self, *args):
            rollouts, count = super().get_batch_samples(*args)
            if rollouts:
                seen.append(("step", self.state.global_step, rollouts))
            return rollouts, count

    CONFIGS[Seen] = CONFIGS[cls]
    return Seen, seen


# What is learnt from, and when


@BOTH
def test_windows_follow_one_another_and_then_come_again(tmp_path, cls):
    """Of two tasks, four micro-batches: a step has one of each task, twice, and the next rollout has other rows."""
    cls, seen = recorded(cls)
    trainer = trainer_of(
        cls,
        tmp_path,
        data=TASKS,
        **dict(steps_per_generation=4, num_iterations=2, num_generations=8, max_steps=6),
        **dict(num_inference_steps=1, guidance_scale=1.0),
    )
    assert trainer.args.gradient_accumulation_steps == 2
    trainer.train()
    assert [(what, step) for what, step, _ in seen] == [
        *(("rollout", 0), ("step", 0), ("step", 1), ("step", 2), ("step", 3)),
        *(("rollout", 4), ("step", 4), ("step", 5)),
    ]
    steps = [[rollout for (rollout,) in rollouts] for what, _, rollouts in seen if what == "step"]
    assert all([rollout.task for rollout in step] == ["a", "b"] for step in steps)
    assert [[rollout.place for rollout in step] for step in steps] == [[0, 0], [1, 1]] * 3
    for first, again in ((0, 2), (1, 3)):
        assert all(a is b for a, b in zip(steps[first], steps[again], strict=True))
    prompts = [batches for what, _, batches in seen if what == "rollout"]
    for step, batches in ((0, prompts[0][:2]), (1, prompts[0][2:]), (4, prompts[1][:2])):
        assert [rollout.inputs["prompt"] for rollout in steps[step]] == batches
    for place in (0, 1):  # a group of eight lies in both windows
        groups = [{*batches[place], *batches[place + 2]} for batches in prompts]
        assert [len(group) for group in groups] == [1, 1] and groups[0] != groups[1]


@BOTH
def test_each_epoch_shows_each_prompt_in_one_group(tmp_path, cls):
    cls, seen = recorded(cls)
    trainer = trainer_of(
        cls, tmp_path, steps_per_generation=3, max_steps=-1, num_train_epochs=2, num_inference_steps=1, save_steps=2
    )
    trainer.train()
    rollouts = [[batch[0] for batch in batches] for what, _, batches in seen if what == "rollout"]
    assert [step for what, step, _ in seen if what == "rollout"] == [0, 3, 6, 9] and trainer.state.global_step == 12
    for epoch in (rollouts[:2], rollouts[2:]):
        assert sorted(epoch[0] + epoch[1]) == sorted(DATA["prompt"])
    assert history(trainer, "epoch")[:12] == pytest.approx([(step + 1) / 6 for step in range(12)])
    assert [entry["step"] for entry in trainer.state.log_history if "reward" in entry] == [1, 4, 7, 10]


def test_parts_are_those_of_one_step_on_the_whole_rollout(tmp_path):
    """Where nothing moves, the mean of the parts' gradients is the gradient of the whole: the advantages are those of
    the whole rollout."""
    runs = []
    for accumulation in (2, 4):
        record = Record()
        settings = dict(gradient_accumulation_steps=accumulation, steps_per_generation=4, max_steps=4 // accumulation)
        settings |= dict(num_generations=16, learning_rate=0.0, beta=0.1, max_grad_norm=0)
        trainer = trainer_of(GRPO, tmp_path, peft_config=lora(init_lora_weights=False), callbacks=[record], **settings)
        trainer.train()
        runs.append((trainer, record))
    (parts, of_parts), (whole, of_whole) = runs
    assert sum(history(parts, "loss")) / 2 == pytest.approx(history(whole, "loss")[0], rel=1e-5)
    assert history(parts, "reward") == history(whole, "reward")
    first, second = of_parts.gradients
    for name, gradient in of_whole.gradients[0].items():
        assert (first[name] - second[name]).norm() > 0.1 * gradient.norm()
        assert ((first[name] + second[name]) / 2 - gradient).norm() < 1e-4 * gradient.norm(), name


def test_the_second_part_is_learnt_from_off_policy_as_the_paper_says(tmp_path):
    """Flow-GRPO written down again: the weights that rolled out are two optimizer steps old, and the ratio is that of
    torch's densities, clipped."""
    cls, seeds = seeds_seen(GRPO)
    record, noise_level, epsilon = Record(), 0.6, 2e-3
    trainer = trainer_of(
        cls,
        tmp_path,
        data=DATA.select([0]),
        peft_config=lora(init_lora_weights=False),
        callbacks=[record],
        **dict(steps_per_generation=2, num_generations=8, max_steps=2, max_grad_norm=0),
        **dict(noise_level=noise_level, epsilon=epsilon, lr_scheduler_type="constant", learning_rate=1e-3),
    )
    old, guidance = twin_of(trainer), CALL["sd3"]["guidance_scale"]
    trainer.train()

    prompts, drawn, rewards = DATA["prompt"][:1] * 4, [], []
    for place in (0, 1):
        steps, generators = [], [torch.Generator().manual_seed(seed) for seed in seeds[0, 0, place]]
        noisy = noise_generators(generators)

        def step(velocity, timestep, x, steps=steps, generators=noisy, **kwargs):
            mean, std, dt = sde_by_hand(old.scheduler.sigmas, len(steps), noise_level)
            noise = torch.cat([torch.randn(1, *x.shape[1:], generator=generator) for generator in generators])
            steps.append((x, timestep, mean(x, velocity), mean(x, velocity) + std * noise))
            return (steps[-1][3] if len(steps) < 3 else x + dt * velocity,)

        old.scheduler.step = step
        rewards += redness(old(prompts, num_inference_steps=3, generator=generators, **CALL["sd3"]).images)
        drawn.append(steps[:2])
    advantages = advantages_by_hand(rewards)[4:]

    student = twin_of(trainer)  # its weights as they were after the first optimizer step
    student.scheduler.set_timesteps(3)
    student.scheduler.sigmas = old.scheduler.sigmas
    parameters = [parameter for parameter in student.transformer.parameters() if parameter.requires_grad]
    for parameter, weights in zip(parameters, record.weights[0].split([p.numel() for p in parameters]), strict=True):
        parameter.data = weights.view_as(parameter)
    losses, clipped = [], []
    for index, (x, timestep, old_mean, following) in enumerate(drawn[1]):
        mean, std, _ = sde_by_hand(student.scheduler.sigmas, index, noise_level)
        mu = mean(x, guided_by_hand(student, x, timestep, prompts, guidance))
        densities = [Normal(of, std).log_prob(following).flatten(1).mean(1) for of in (mu, old_mean)]
        ratio = torch.exp(densities[0] - densities[1])
        bounded = ratio.clamp(1 - epsilon, 1 + epsilon)
        losses.append(-torch.minimum(advantages * ratio, advantages * bounded).mean())
        clipped.append((advantages * ratio > advantages * bounded).float().mean().item())
    loss = torch.stack(losses).mean()
    loss.backward()
    assert 0 < sum(clipped) / 2 < 1
    assert history(trainer, "clip_ratio/region_mean") == [0.0, pytest.approx(sum(clipped) / 2)]
    assert history(trainer, "loss")[1] == pytest.approx(loss.item(), rel=1e-3, abs=1e-6)
    for name, parameter in student.transformer.named_parameters():
        if parameter.requires_grad:
            assert (record.gradients[1][name] - parameter.grad).norm() < 1e-2 * parameter.grad.norm(), name


def test_the_old_policy_follows_once_a_rollout(tmp_path):
    record = Record()
    trainer = trainer_of(
        NFT,
        tmp_path,
        callbacks=[record],
        **dict(steps_per_generation=2, num_iterations=2, max_steps=8, num_inference_steps=2, guidance_scale=1.0),
        **dict(old_decay_rate=0.3, old_decay_max=0.5),
    )
    old = old_weights(trainer).clone()
    trainer.train()
    assert history(trainer, "old_decay") == pytest.approx([0.3, 0.5])
    for decay, weights in zip((0.3, 0.5), record.weights[3::4], strict=True):
        old = decay * old + (1 - decay) * weights
    assert torch.allclose(old_weights(trainer), old, atol=1e-6)
    distances = history(trainer, "old_distance")
    assert distances[0] == 0.0 and all(distances[step] > 0 for step in (1, 2, 3))


# Resuming


class Killed(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("cls", "settings", "step"),
    [
        (NFT, {}, 1),
        (NFT, {"num_iterations": 2}, 7),
        (GRPO, {"sde_window_size": 1}, 3),
        (GRPO, {"num_iterations": 2, "ema_decay": 0.8, "ema_update_every": 1}, 2),
    ],
)
def test_a_run_that_is_killed_within_a_rollout_goes_on_as_if_it_had_not_been(tmp_path, cls, settings, step):
    settings = dict(max_steps=8 if settings.get("num_iterations") else 4, beta=0.1, data=TASKS) | settings
    settings |= dict(steps_per_generation=4, num_generations=8, learning_rate=1e-3, guidance_scale=1.0)
    settings |= dict(save_strategy="steps", save_steps=1)
    undisturbed = trainer_of(cls, tmp_path / "a", **settings)
    undisturbed.train()
    with pytest.raises(KeyboardInterrupt):
        trainer_of(cls, tmp_path / "b", callbacks=[Killed(step)], **settings).train()
    resumed = trainer_of(cls, tmp_path / "b", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(trained(undisturbed), trained(resumed))
    names = ["loss", "kl", "grad_norm", "reward", *(["log_ratio/std"] if cls is GRPO else ["old_distance"])]
    for name in names:
        assert history(undisturbed, name) == history(resumed, name), name
    assert len(history(resumed, "loss")) == settings["max_steps"]
    if cls is NFT:
        assert torch.equal(old_weights(undisturbed), old_weights(resumed))


def test_a_rollout_of_another_size_is_not_gone_on_with(tmp_path):
    settings = dict(save_strategy="steps", save_steps=1, max_steps=1, num_inference_steps=2)
    trainer_of(GRPO, tmp_path, steps_per_generation=2, **settings).train()
    settings |= dict(max_steps=4)
    with pytest.raises(
        ValueError, match=r"rollouts_0\.safetensors holds a rollout of 2 micro-batches, .*rollouts of 3"
    ):
        trainer_of(GRPO, tmp_path, steps_per_generation=3, **settings).train(resume_from_checkpoint=True)


# What is refused


@BOTH
def test_a_rollout_that_is_not_whole_is_refused(tmp_path, cls):
    with pytest.raises(ValueError, match=r"`steps_per_generation=3` is not a multiple of `gradient_accumulation_.*=2`"):
        trainer_of(cls, tmp_path, steps_per_generation=3, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match=r"`steps_per_generation=3` is not a multiple of `gradient_accumulation_.*=2`"):
        trainer_of(cls, tmp_path, steps_per_generation=3, data=TASKS)
    with pytest.raises(ValueError, match=r"a rollout has 8 samples of each task .*steps_per_generation 2 / 1 tasks\)"):
        trainer_of(cls, tmp_path, steps_per_generation=2, num_generations=6)
