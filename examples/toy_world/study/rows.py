"""The rows of the study: what is trained, with which settings, and at what cost. Budgets were fixed before the runs.

Cost is in denoiser evaluations (cost.py). `STAGE_1` is what the three teachers cost together; joint training on all
rewards gets the same and that of the distillation on top, so that both ways to one model cost the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import StableDiffusion3Pipeline

from examples.toy_world.demo import BATCH_SIZE, MAX_STEPS, distil
from examples.toy_world.pipeline import SAMPLING, load_base
from examples.toy_world.rewards import reinforce
from examples.toy_world.specialists import GRPO, LORA_NAME, NFT, train_specialist
from examples.toy_world.specialists import MAX_STEPS as SPECIALIST_STEPS
from examples.toy_world.study import cost
from examples.toy_world.study.baselines import OffPolicyTrainer, finetune_on_samples, fused
from examples.toy_world.world import MORE_TASKS, TASKS, Task

STEPS = SAMPLING["num_inference_steps"]
LEARNT = STEPS - 1
SHORT = MAX_STEPS // 4  # optimizer steps of the ablations: at MAX_STEPS they would all have arrived

RL_BATCH = NFT["per_device_train_batch_size"]
NFT_COST = cost.nft(cost.Sizes(RL_BATCH, STEPS, LEARNT), asks_base=NFT["beta"] > 0)
GRPO_COST = cost.grpo(cost.Sizes(RL_BATCH, STEPS, LEARNT), asks_base=False, iterations=GRPO["num_iterations"])
OPD_COST = cost.distillation(cost.Sizes(len(TASKS) * BATCH_SIZE, STEPS, LEARNT))
STAGE_1 = SPECIALIST_STEPS["compose"] * NFT_COST + (SPECIALIST_STEPS["text"] + SPECIALIST_STEPS["style"]) * GRPO_COST
TOTAL = STAGE_1 + MAX_STEPS * OPD_COST


@dataclass
class Row:
    """One line of a table: `train(folder, seed)` leaves a student of `tasks` in `folder` and returns its pipeline."""

    train: Callable[[Path, int], StableDiffusion3Pipeline]
    evaluations: float
    settings: dict[str, Any] = field(default_factory=dict)
    tasks: tuple[Task, ...] = TASKS


def opd(max_steps: int, tasks: tuple[Task, ...] = TASKS, **settings: Any) -> Row:
    def train(folder: Path, seed: int) -> StableDiffusion3Pipeline:
        specialists = {task: further_specialist(task, folder.parents[1]) for task in tasks if task not in TASKS}
        return distil(folder, seed, max_steps, tasks, num_scored=0, specialists=specialists, **settings)[0].pipeline

    batch = settings.get("per_device_train_batch_size", BATCH_SIZE)
    sizes = cost.Sizes(len(tasks) * batch, STEPS, LEARNT)
    return Row(train, max_steps * cost.distillation(sizes), settings | {"max_steps": max_steps}, tasks)


def further_specialist(task: Task, output_dir: Path) -> Path:
    """The folder of a specialist that is not shipped: trained by the first row that needs it, the same for all."""
    folder = output_dir / "specialists" / task
    if not (folder / LORA_NAME).is_file():
        train_specialist(task, folder)
    return folder


def rl(algorithm: str, budget: float, **settings: Any) -> Row:
    """All rewards in turn; a micro-batch of one task after the other, so a step costs three times a specialist's."""
    own = (NFT if algorithm == "nft" else GRPO) | settings
    max_steps = int(budget / (len(TASKS) * (NFT_COST if algorithm == "nft" else GRPO_COST)))
    max_steps -= max_steps % own.get("num_iterations", 1)

    def train(folder: Path, seed: int) -> StableDiffusion3Pipeline:
        return reinforce(algorithm, TASKS, folder, seed, rank=32, max_steps=max_steps, **own).pipeline

    return Row(train, budget, own | {"max_steps": max_steps})


def opd_nft_text() -> Row:
    """DiffusionOPD whose text specialist is trained by DiffusionNFT, as long as `nft_all` trains text."""
    steps = int(TOTAL / (len(TASKS) * NFT_COST))

    def train(folder: Path, seed: int) -> StableDiffusion3Pipeline:
        specialist = folder / "text"
        if not (specialist / LORA_NAME).is_file():
            reinforce("nft", ["text"], specialist, seed, max_steps=steps, **NFT)
        return distil(folder, seed, MAX_STEPS, num_scored=0, specialists={"text": specialist})[0].pipeline

    evaluations = TOTAL + steps * NFT_COST - SPECIALIST_STEPS["text"] * GRPO_COST
    return Row(train, evaluations, {"max_steps": MAX_STEPS, "steps of the specialist": steps})


def cascade(budget: float, order: tuple[Task, ...]) -> Row:
    """NFT on one reward after another, each from the student of the one before, a share of the budget each."""
    max_steps = int(budget / len(order) / NFT_COST)

    def train(folder: Path, seed: int) -> StableDiffusion3Pipeline:
        model = load_base()
        for task in order:
            stage = folder / task
            if not (stage / LORA_NAME).is_file():
                reinforce("nft", [task], stage, seed, model=model, rank=32, max_steps=max_steps, **NFT)
                model.unload_lora_weights()
            model = fused(stage, model)
        return model

    return Row(train, budget, NFT | {"max_steps": max_steps, "order": order})


def sft(budget: float, samples: int, batch_size: int, peak_lr: float) -> Row:
    spent = cost.sampling(len(TASKS) * samples, STEPS)
    max_steps = int((budget - spent) / cost.finetuning(batch_size))

    def train(folder: Path, seed: int) -> StableDiffusion3Pipeline:
        return finetune_on_samples(folder, seed, samples, max_steps, batch_size, peak_lr)

    return Row(train, budget, {"samples": samples, "max_steps": max_steps, "batch_size": batch_size, "lr": peak_lr})


def sde(noise_level: float, objective: str = "kl") -> Row:
    transition = "flow_sde" if noise_level else "ode"
    return opd(SHORT, objective=objective, transition=transition, noise_level=noise_level)


ROWS: dict[str, Row] = {
    "opd": opd(MAX_STEPS),
    "grpo_guard_all": rl("grpo", TOTAL),
    "nft_all": rl("nft", TOTAL),
    "opd_nft_text": opd_nft_text(),
    "nft_cascade": cascade(TOTAL, ("text", "compose", "style")),
    # Closed form against PPO-style, and noise levels
    "kl_noise_0": sde(0.0),
    "kl_noise_0.3": sde(0.3),
    "kl_noise_0.7": sde(0.7),
    "kl_noise_1.0": sde(1.0),
    "ppo_noise_0.7": sde(0.7, "policy_gradient"),
    # The same teachers without the student's own states
    "opd_short": opd(SHORT),
    "off_policy_short": opd(SHORT, trainer_class=OffPolicyTrainer),
    "sft_short": sft(SHORT * OPD_COST, samples=200, batch_size=24, peak_lr=2e-3),
    # One teacher alone, with all prompts of a step for it
    **{f"only_{task}": opd(SHORT, (task,), per_device_train_batch_size=len(TASKS) * BATCH_SIZE) for task in TASKS},
    # Up to six teachers, eight prompts a step for each; three are `opd_short`
    **{f"teachers_{n}": opd(SHORT, (*TASKS, *MORE_TASKS)[:n]) for n in (1, 2, 4, 5, 6)},
    "teachers_6_long": opd(MAX_STEPS, TASKS + MORE_TASKS),
}
