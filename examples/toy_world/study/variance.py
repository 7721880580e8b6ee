"""The two gradient estimators at the same parameters and the same rollouts: closed-form KL, and PPO-style (paper, Eq.
15-23).

    python -m examples.toy_world.study.variance --rollouts 200

The PPO-style gradient is that of the closed form plus `KL grad log pi`, whose mean is zero. Both parts are collected
apart over many rollouts of the same prompts. The log-density of a step is taken as Flow-GRPO's code takes it (mean over
the latent's elements) and as it is (their sum, which is larger by their number).
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_opd import objectives
from diffusion_opd.policy import Policy
from diffusion_opd.scheduler_proxy import Step
from diffusion_opd.transitions import flow_sde
from examples.toy_world.demo import specialist
from examples.toy_world.evaluate import inputs
from examples.toy_world.pipeline import LATENT_CHANNELS, SAMPLING, load_base
from examples.toy_world.rewards import lora_config
from examples.toy_world.world import SIZE, TASKS, Task, sample_prompts


def estimators(
    student: Policy, teacher: Policy, given: dict[str, list[Any]], seed: int, noise_level: float
) -> list[Tensor]:
    """One rollout of the inputs `given`: the gradient of the mean closed-form KL, and of its likelihood-ratio term,
    each `[parameters]`."""
    parameters = [p for p in student.denoiser.parameters() if p.requires_grad]
    learnt = student.num_inference_steps - 1
    sums = [torch.zeros(sum(p.numel() for p in parameters)) for _ in range(2)]
    noise = torch.Generator().manual_seed(seed)

    def move(step: Step) -> Tensor:
        own = flow_sde(step.sample, step.prediction, step.schedule, step.index, noise_level)
        return own.sample(torch.randn(own.mean.shape, generator=noise))

    size = len(given["prompt"])
    generators = [torch.Generator().manual_seed(seed * size + i) for i in range(size)]
    with student.walk(given, generators, move) as walk, teacher.follow(walk) as follow:
        for visit in walk.visits(range(learnt)):
            with torch.no_grad():
                (target,) = follow(visit)
            (step,) = visit.steps
            own = flow_sde(step.sample, step.prediction, step.schedule, step.index, noise_level)
            theirs = flow_sde(step.sample, target, step.schedule, step.index, noise_level)
            kl = objectives.kl(own, theirs)
            score = kl.detach() * objectives.log_prob(own, step.next_sample)
            for total, loss in zip(sums, (kl, score), strict=True):
                gradients = torch.autograd.grad(loss.mean() / learnt, parameters, retain_graph=True)
                total += torch.cat([gradient.flatten() for gradient in gradients])
    return sums


def measure(task: Task, rollouts: int, batch_size: int, noise_level: float, lora: Path | None) -> dict[str, float]:
    """Means and variances (traces of the covariance) of the estimators of one rollout."""
    pipeline, arguments = load_base(), dict(SAMPLING)
    if lora is None:
        torch.manual_seed(0)
        pipeline.transformer.requires_grad_(False)
        pipeline.transformer.add_adapter(lora_config(rank=32))
    else:
        pipeline.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")
    for name, parameter in pipeline.transformer.named_parameters():
        parameter.requires_grad_("lora_" in name)
    steps = arguments.pop("num_inference_steps")
    student, teacher = Policy(pipeline, steps, arguments), Policy(specialist(task), steps, arguments)
    given = inputs(sample_prompts(task, batch_size, seed=0), seed=0)
    elements = LATENT_CHANNELS * (SIZE // 4) ** 2

    both = [torch.stack(parts) for parts in zip(
        *(estimators(student, teacher, given, seed, noise_level) for seed in range(rollouts)), strict=True
    )]  # fmt: skip
    closed, score = both

    def variance(x: Tensor) -> float:
        return x.var(0).sum().item()

    return {
        "closed_norm": closed.mean(0).norm().item(),
        "closed_variance": variance(closed),
        "ppo_variance": variance(closed + score),
        "ppo_sum_variance": variance(closed + elements * score),
        # 1 if the mean of the likelihood-ratio term is nothing but the error of estimating it
        "score_mean_over_its_error": (score.mean(0).square().sum() / (variance(score) / rollouts)).item(),
    }


def main(rollouts: int, batch_size: int, noise_level: float, lora: Path | None) -> dict[str, Any]:
    print("| task | norm of the mean | var closed | var PPO (mean) | ratio | var PPO (sum) | ratio | mean over error |")
    print("|---|---|---|---|---|---|---|---|")
    results = {}
    for task in TASKS:
        started = time.perf_counter()
        results[task] = r = measure(task, rollouts, batch_size, noise_level, lora)
        cells = [
            f"{r['closed_norm']:.3g}",
            f"{r['closed_variance']:.3g}",
            *(f"{r[k]:.3g} | {r[k] / r['closed_variance']:.3g}" for k in ("ppo_variance", "ppo_sum_variance")),
            f"{r['score_mean_over_its_error']:.2f}",
        ]
        r["seconds"] = time.perf_counter() - started
        print(f"| {task} | {' | '.join(cells)} |", flush=True)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Variance of the two gradient estimators.")
    parser.add_argument("--rollouts", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--noise-level", type=float, default=0.7)
    parser.add_argument("--lora", type=Path, help="measure at this student's weights (default: an untrained LoRA)")
    parser.add_argument("--output", type=Path, default=Path("runs/study/variance.json"))
    options = parser.parse_args()
    found = main(options.rollouts, options.batch_size, options.noise_level, options.lora)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=2))
