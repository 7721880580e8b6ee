"""The rows of the study: what is trained, with which settings, and at what cost. Budgets were fixed before the runs.

Cost is in denoiser evaluations (cost.py). `STAGE_1` is what the teachers cost together; joint training on all
rewards gets the same and that of the distillation on top, so that both ways to one model cost the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import FluxKontextPipeline

from diffusion_opd import Teacher
from diffusion_opd.queries import QUERIES, first_steps
from examples.toy_world.demo import BATCH_SIZE, LEARNING_RATE, distil
from examples.toy_world.pipeline import SAMPLING, TEACHERS, load_base
from examples.toy_world.rewards import reinforce, sampling_kwargs
from examples.toy_world.specialists import GRPO, LORA_NAME, NFT, train_specialist
from examples.toy_world.specialists import MAX_STEPS as SPECIALIST_STEPS
from examples.toy_world.study import cost
from examples.toy_world.study.baselines import OffPolicyTrainer, finetune_on_samples, fused
from examples.toy_world.world import MORE_TASKS, TASKS, Task

STEPS = SAMPLING["num_inference_steps"]
LEARNT = STEPS - 1
GUIDANCE = {"true_cfg_scale": 2.5, "negative_prompt": ""}
WORDS: dict[Task, str] = {"warm": "make", "dark": "into", "large": "turn"}  # no prompt without a source begins so
LONG = 70  # optimizer steps of DiffusionOPD
SHORT = LONG // 4  # of the ablations: at the long length they would all have arrived

RL_BATCH = NFT["per_device_train_batch_size"]
NFT_COST = cost.nft(cost.Sizes(RL_BATCH, STEPS, LEARNT), asks_base=NFT["beta"] > 0)
GRPO_COST = cost.grpo(cost.Sizes(RL_BATCH, STEPS, LEARNT), asks_base=False, iterations=GRPO["num_iterations"])
OPD_COST = cost.distillation(cost.Sizes(len(TASKS) * BATCH_SIZE, STEPS, LEARNT))
STAGE_1 = sum(SPECIALIST_STEPS[task] for task in TASKS) * NFT_COST
TOTAL = STAGE_1 + LONG * OPD_COST


@dataclass
class Row:
    """One line of a table: `train(folder, seed)` leaves a student of `tasks` in `folder` and returns its pipeline,
    which is used with `sampling` over the world's settings, and is told which of some tasks is meant by `words`."""

    train: Callable[[Path, int], FluxKontextPipeline]
    evaluations: float
    settings: dict[str, Any] = field(default_factory=dict)
    tasks: tuple[Task, ...] = TASKS
    sampling: dict[str, Any] = field(default_factory=dict)
    words: dict[Task, str] = field(default_factory=dict)


def opd(
    max_steps: int,
    tasks: tuple[Task, ...] = TASKS,
    guided: Sequence[str] = (),
    words: dict[Task, str] | None = None,
    **settings: Any,
) -> Row:
    """`guided`: who is asked with guidance, `"student"` or `"teachers"` or both. `words`: what goes ahead of the
    student's prompts of some tasks; their teachers read them without it."""
    words = words or {}
    evaluations = max_steps * step_cost(tasks, settings | {"guided": guided})
    asked, sampling = (GUIDANCE if who in guided else {} for who in ("teachers", "student"))
    own = {"call_kwargs": sampling_kwargs()["call_kwargs"] | sampling} | settings

    def train(folder: Path, seed: int) -> FluxKontextPipeline:
        paths = {t: TEACHERS / t if t in TASKS else further_specialist(t, folder.parents[1]) for t in tasks}
        specialists = {
            task: Teacher(str(path), call_kwargs=asked, columns={"prompt": "plain"} if task in words else {})
            for task, path in paths.items()
        }
        trainer, *_ = distil(folder, seed, max_steps, tasks, num_scored=0, specialists=specialists, words=words, **own)
        return trainer.pipeline

    about = settings | {"max_steps": max_steps, "guided": guided, "words": words}
    return Row(train, evaluations, about, tasks, sampling, words)


def step_cost(tasks: tuple[Task, ...], settings: dict[str, Any]) -> float:
    """Of one optimizer step of a distillation with these settings."""
    batch = settings.get("per_device_train_batch_size", BATCH_SIZE)
    turns = sum(settings.get("task_weights", {}).get(task, 1) for task in tasks)
    if settings.get("task_sampling") == "random":
        turns = settings.get("gradient_accumulation_steps", 1)
    learnt, visited = LEARNT, None
    if query := settings.get("query"):
        candidates = [0] * len(first_steps([0] * STEPS, settings.get("timestep_fraction", LEARNT / STEPS)))
        learnt, rng = settings["num_queries"], np.random.default_rng(0)
        shape = tuple(settings.get("query_beta", (1.0, 1.0)))
        drawn = [QUERIES[query].choose(candidates, learnt, rng, shape) for _ in range(20_000)]
        visited = float(np.mean([states[-1] + 1 for states in drawn]))
    asked = 1 + sum(name in settings for name in ("target_extrapolation", "anchor"))
    split, guided = "guidance_split" in settings, settings.get("guided", ())
    branches, of_others = (1 + (who in guided) + split for who in ("student", "teachers"))
    return cost.distillation(cost.Sizes(turns * batch, STEPS, learnt), asked * of_others, visited, branches)


def as_short(tasks: tuple[Task, ...] = TASKS, **settings: Any) -> Row:
    """A distillation with other settings at the cost of `opd_short`: with more steps where one costs less."""
    return opd(int(SHORT * step_cost(tasks, {}) / step_cost(tasks, settings)), tasks, **settings)


def further_specialist(task: Task, output_dir: Path) -> Path:
    """The folder of a specialist that is not shipped: trained by the first row that needs it, the same for all."""
    folder = output_dir / "specialists" / task
    if not (folder / LORA_NAME).is_file():
        train_specialist(task, folder)
    return folder


def rl(algorithm: str, budget: float, **settings: Any) -> Row:
    """All rewards in turn; a micro-batch of one task after the other, so a step costs that of all specialists."""
    own = (NFT if algorithm == "nft" else GRPO) | settings
    max_steps = int(budget / (len(TASKS) * (NFT_COST if algorithm == "nft" else GRPO_COST)))
    max_steps -= max_steps % own.get("num_iterations", 1)

    def train(folder: Path, seed: int) -> FluxKontextPipeline:
        return reinforce(algorithm, TASKS, folder, seed, rank=32, max_steps=max_steps, **own).pipeline

    return Row(train, budget, own | {"max_steps": max_steps})


def cascade(budget: float, order: tuple[Task, ...]) -> Row:
    """NFT on one reward after another, each from the student of the one before, a share of the budget each."""
    max_steps = int(budget / len(order) / NFT_COST)

    def train(folder: Path, seed: int) -> FluxKontextPipeline:
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

    def train(folder: Path, seed: int) -> FluxKontextPipeline:
        return finetune_on_samples(folder, seed, samples, max_steps, batch_size, peak_lr)

    return Row(train, budget, {"samples": samples, "max_steps": max_steps, "batch_size": batch_size, "lr": peak_lr})


def rewarded(algorithm: str, budget: float, **settings: Any) -> Row:
    """Rewards and teachers together: ROPD, or DiffusionNFT with the distance to the teachers besides. Two prompts of
    each task an optimizer step, drawn four times each."""
    iterations = 2 if algorithm == "ropd" else 1  # in the first one ROPD's target is the teacher's answer alone
    batch = {"per_device_train_batch_size": BATCH_SIZE, "num_generations": 4, "num_iterations": iterations}
    own = batch | {"lr_scheduler_type": "cosine", "learning_rate": LEARNING_RATE} | settings
    sizes = cost.Sizes(len(TASKS) * BATCH_SIZE, STEPS, LEARNT)
    step = cost.ropd(sizes, iterations) if algorithm == "ropd" else cost.nft(sizes, own["beta"] > 0, asks_teacher=True)
    max_steps = int(budget / step) // iterations * iterations

    def train(folder: Path, seed: int) -> FluxKontextPipeline:
        teachers = {task: str(TEACHERS / task) for task in TASKS}
        settings = own | {"max_steps": max_steps}
        return reinforce(algorithm, TASKS, folder, seed, teachers=teachers, rank=32, **settings).pipeline

    return Row(train, max_steps * step, own | {"max_steps": max_steps})


def sde(noise_level: float, objective: str = "kl") -> Row:
    transition = "flow_sde" if noise_level else "ode"
    return opd(SHORT, objective=objective, transition=transition, noise_level=noise_level)


ROWS: dict[str, Row] = {
    "opd": opd(LONG),
    "grpo_guard_all": rl("grpo", TOTAL),
    "nft_all": rl("nft", TOTAL),
    "nft_cascade": cascade(TOTAL, ("text", "compose", "style", "edit")),
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
    # Recipes, at the cost of `opd_short`
    **{f"beyond_{by}": as_short(target_extrapolation=by) for by in (1.1, 1.25, 1.5)},
    **{f"anchor_{beta}": as_short(anchor="base", anchor_beta=beta) for beta in (0.02, 0.1)},
    **{f"random_{n}": as_short(query="random", num_queries=n) for n in (1, 2, 4)},
    "beta_5_2": as_short(query="beta", num_queries=1, query_beta=[5.0, 2.0]),
    "beta_2_5": as_short(query="beta", num_queries=1, query_beta=[2.0, 5.0]),
    "compose_twice": as_short(task_weights={"compose": 2}),
    "danceopd": as_short(
        query="beta",
        num_queries=1,
        query_beta=[5.0, 2.0],
        timestep_fraction=1.0,
        task_sampling="random",
        gradient_accumulation_steps=len(TASKS),
    ),
    # Guidance: into the weights, kept, or with its branches apart; each student is used as it was taught
    "folded": as_short(guided=["teachers"]),
    "guided": as_short(guided=["student", "teachers"]),
    "split": as_short(guided=["student", "teachers"], guidance_split=1.0),
    # Rewards and teachers together
    "ropd": rewarded("ropd", SHORT * OPD_COST),
    "nft_taught": rewarded("nft", SHORT * OPD_COST, beta=0.0),
    # One teacher alone, with all prompts of a step for it
    **{f"only_{task}": opd(SHORT, (task,), per_device_train_batch_size=len(TASKS) * BATCH_SIZE) for task in TASKS},
    # Up to seven teachers, eight prompts a step for each; four are `opd_short`
    **{f"teachers_{n}": opd(SHORT, (*TASKS, *MORE_TASKS)[:n]) for n in (1, 2, 3, 5, 6, 7)},
    "teachers_7_long": opd(LONG, TASKS + MORE_TASKS),
    "teachers_7_words": opd(SHORT, TASKS + MORE_TASKS, words=WORDS),
    "teachers_7_weighted": opd(SHORT, TASKS + MORE_TASKS, task_weights={"compose": 3}),
}
