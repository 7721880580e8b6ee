"""Rewards and specialists together on the toy world: two tasks, each with its judge and its specialist."""

import math
from typing import Any

import pytest

from diffusion_opd import (
    DiffusionGRPOConfig,
    DiffusionGRPOTrainer,
    DiffusionNFTConfig,
    DiffusionNFTTrainer,
    DiffusionROPDConfig,
    DiffusionROPDTrainer,
    Teacher,
)
from examples.toy_world.pipeline import BASE, TEACHERS
from examples.toy_world.rewards import lora_config, reward_of, sampling_kwargs, training_prompts

TASKS = ("compose", "style")
SMALL: dict[str, Any] = dict(
    per_device_train_batch_size=6,
    num_generations=6,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    image_steps=0,
    disable_tqdm=True,
)


def trainer_of(cls, config, out, rewards=reward_of, **settings):
    return cls(
        str(BASE),
        {task: rewards(task) for task in TASKS},
        teachers={task: Teacher(TEACHERS / task) for task in TASKS},
        args=config(str(out), **(sampling_kwargs() | SMALL | settings)),
        train_dataset={task: training_prompts(task, 0) for task in TASKS},
        peft_config=lora_config(),
    )


def history(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "config"), [(DiffusionNFTTrainer, DiffusionNFTConfig), (DiffusionGRPOTrainer, DiffusionGRPOConfig)]
)
def test_a_policy_comes_nearer_to_its_specialists_as_it_learns_from_rewards(tmp_path, cls, config):
    trainer = trainer_of(cls, config, tmp_path, max_steps=4, learning_rate=2e-3, distill_beta=10.0)
    trainer.train()
    for task in TASKS:
        distances = history(trainer, f"distill/{task}")
        assert all(0 < value < math.inf for value in distances) and len(distances) == 4
        assert history(trainer, f"reward/{task}")
    assert history(trainer, "distill")[-1] < history(trainer, "distill")[0]


@pytest.mark.slow
def test_experts_are_followed_as_far_as_judges_are_not_content(tmp_path):
    """ROPD with the world's own judges as verifiers: more of an expert where its judge says less."""
    trainer = trainer_of(DiffusionROPDTrainer, DiffusionROPDConfig, tmp_path, max_steps=6, learning_rate=2e-3)
    trainer.train()
    for task in TASKS:
        etas, rewards = history(trainer, f"eta/{task}"), history(trainer, f"reward/{task}")
        assert len(etas) == 6 and all(0 <= eta <= 1 for eta in etas)
        # Of one group of six: with rewards that are all the mean it would be its complement
        assert all(eta <= 1 - reward + 0.35 for eta, reward in zip(etas, rewards, strict=True))
    assert history(trainer, "expert_distance")[-1] < history(trainer, "expert_distance")[0]
    content = trainer_of(
        DiffusionROPDTrainer,
        DiffusionROPDConfig,
        tmp_path / "content",
        rewards=lambda task: lambda images, **columns: [1.0] * len(images),
        max_steps=1,
    )
    content.train()
    assert (
        history(content, "eta/compose") == history(content, "eta/style") == [0] and history(content, "loss")[0] < 1e-9
    )
