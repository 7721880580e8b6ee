"""DiffusionGRPOTrainer: policy gradients through a stochastic sampler (Flow-GRPO, arXiv 2505.05470; GRPO-Guard, arXiv
2510.22319).

The policy draws groups of samples with noise in each learnt step; each step's Gaussian has a likelihood, and the steps
of samples that are better than their group become more likely.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import objectives
from ..inputs import Inputs
from ..policy import Visit
from ..sampling import SEED_TRAIN, noise_generators, normal, seed_of
from ..scheduler_proxy import Step, is_flow
from ..transitions import Schedule, Transition
from .config import DiffusionGRPOConfig
from .objectives import clipped_surrogate, log_ratio, normalised_log_ratio
from .trainer import Answers, DiffusionRLTrainer, Rollout, _move


class DiffusionGRPOTrainer(DiffusionRLTrainer):
    """
    Trainer for Flow-GRPO and GRPO-Guard.

    Example:

    ```python
    from datasets import Dataset
    from peft import LoraConfig
    from diffusion_opd import DiffusionGRPOConfig, DiffusionGRPOTrainer

    def brightness(prompts, images, **kwargs):
        pixels = [image.convert("L").resize((1, 1)).getdata() for image in images]
        return [sum(pixel) / 255 for pixel in pixels]

    trainer = DiffusionGRPOTrainer(
        model="stabilityai/stable-diffusion-3.5-medium",
        reward_funcs=brightness,
        args=DiffusionGRPOConfig("bright", loss_type="grpo_guard"),
        train_dataset=Dataset.from_dict({"prompt": ["a fox in the snow", ...]}),
        peft_config=LoraConfig(
            r=32, lora_alpha=64, target_modules=["to_q", "to_k", "to_v"]
        ),
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~diffusers.DiffusionPipeline`]):
            The policy: Hub id or folder of a pipeline, or a loaded pipeline.
        reward_funcs (`Callable`, a list of them, or `{task: callable or list}`):
            Called as `func(prompts=..., images=..., **columns)`, sync or async; one number a sample, `None` where it
            does not apply. A dict gives each task its own.
        args ([`DiffusionGRPOConfig`], *optional*):
            The configuration. Defaults to one with `output_dir` `"<model>-DiffusionGRPO"`.
        train_dataset (`Dataset`, `IterableDataset` or `{task: dataset}`):
            Columns `prompt`, with several tasks `task`, and whatever the reward functions take.
        eval_dataset (the same, *optional*):
            Evaluated as `eval_reward` and `eval_rewards/<name>/mean`, with the deterministic sampler and the same noise
            each time.
        callbacks (`list[TrainerCallback]`, *optional*), optimizers (`tuple`, *optional*):
            As for [`~transformers.Trainer`].
        peft_config ([`~peft.LoraConfig`], or a dict of them by denoiser, *optional*):
            Trains a LoRA, of two denoisers (Wan 2.2) one each, or of those that are named (`{"transformer_2": ...}`);
            `None` trains the whole denoiser.
        student_lora (`str` or [`Lora`], *optional*):
            Hub id or folder of a LoRA of the student, in any format that teachers have: its training goes on, with its
            own rank and alpha, in the place of a new one; `beta` measures from it, as TRL does.
        teachers (as of [`DiffusionOPDTrainer`], *optional*):
            By task, a specialist each: the loss holds `distill_beta` times the KL of each learnt step to the teacher's,
            at the same states. A task without a teacher has no such term.

    Raises:
        ValueError, TypeError: at once, if anything does not fit together: the sentence names what was given and what to
            do.
    """

    args: DiffusionGRPOConfig

    _name = "DiffusionGRPO"
    _config_class = DiffusionGRPOConfig
    _card_settings = "loss_type epsilon epsilon_high noise_level sde_window_size sde_window_range"

    def _prepare(self) -> None:
        self._paper = _PAPERS[self.args.loss_type]
        transition = self.args.transition or ("flow_sde" if is_flow(self.pipeline.scheduler) else "ddim")
        self.kernel = self.choose_kernel(transition, self.args.noise_level, needs_noise=True)

    def _roll_out(
        self, task: str, inputs: Inputs, generators: list[torch.Generator]
    ) -> tuple[Schedule, dict[str, Tensor], list[Any]]:
        # Of the seed and the step alone, and so the same on all processes
        order = np.random.default_rng(seed_of(self.args.seed, SEED_TRAIN, self.state.global_step))
        window = self.args.sde_window(order.integers)
        kept: dict[str, list[Tensor]] = {"states": [], "means": [], "noise": []}
        noise_of = noise_generators(generators)

        def move(step: Step) -> Tensor:
            if walk.place not in window:
                return _move(self._ode, step)
            transition = self.kernel(step.sample, step.prediction, step.schedule, step.index)
            noise = normal(transition.mean.shape, noise_of, transition.mean.device)
            for name, tensor in zip(kept, (step.sample, transition.mean, noise), strict=True):
                kept[name].append(tensor)
            return transition.sample(noise)

        with self._drawing(self.student.policy, task, inputs, generators, move) as walk:
            for visit in walk:
                (step,) = visit.steps
                self.watch("rollout", task, step.prediction)
        tensors = {name: torch.stack(rows) for name, rows in kept.items()}
        tensors["window"] = torch.tensor([window.start, window.stop])
        return step.schedule, tensors, list(walk.output)

    def _visits(self, rollout: Rollout, step: int) -> list[Visit]:
        places = range(*rollout.tensors["window"].tolist())
        return self._chain(rollout, places, rollout.tensors["states"].unbind())

    def _loss(self, rollout: Rollout, number: int, visit: Visit, answers: Answers) -> Tensor:
        (at,), predictions = visit.steps, {name: prediction for name, (prediction,) in answers.items()}
        args, x, schedule, index = self.args, at.sample, at.schedule, at.index
        old_mean, noise = rollout.tensors["means"][number], rollout.tensors["noise"][number]
        prediction, base = predictions["student"], predictions.get("base")
        step: Transition = self.kernel(x, prediction, schedule, index)
        ratio, weight = log_ratio(step.mean, old_mean, noise, step.std), 1.0
        if args.loss_type == "grpo_guard":
            ratio = normalised_log_ratio(step.mean, old_mean, noise)
            weight = 1 / self._step_size(schedule, index)
        clipped = clipped_surrogate(ratio, rollout.advantages, *args.clip_range)
        loss = weight * clipped.loss.mean()

        self.record("clip_ratio/low_mean", clipped.low.float().mean())
        self.record("clip_ratio/high_mean", clipped.high.float().mean())
        self.record("clip_ratio/region_mean", (clipped.low | clipped.high).float().mean())
        self.record("log_ratio/mean", ratio.mean())
        self.record("log_ratio/std", ratio.std(correction=0))
        self.record(f"log_ratio_step/{visit.index}", ratio.mean())
        if base is not None:
            kl = objectives.kl(step, self.kernel(x, base, schedule, index)).mean()
            self.record("kl", kl)
            loss = loss + args.beta * kl
        if "teacher" in predictions:
            kl = objectives.kl(step, self.kernel(x, predictions["teacher"], schedule, index)).mean()
            loss = loss + self._distilled(rollout.task, kl)
        return loss

    def _step_size(self, schedule: Schedule, index: int) -> float:
        """`|dt|`, or on VP models, which have none, by how much the step's mean moves with the prediction."""
        if schedule.is_flow:
            return schedule.levels[index] - schedule.levels[index + 1]
        return self.kernel(torch.zeros(1), torch.ones(1), schedule, index).mean.abs().item()


_PAPERS = {
    "grpo": {
        "title": "Flow-GRPO: Training Flow Matching Models via Online RL",
        "id": "2505.05470",
        "citation": """@article{liu2025flowgrpo,
  title   = {{Flow-GRPO}: Training Flow Matching Models via Online {RL}},
  author  = {Liu, Jie and Liu, Gongye and Liang, Jiajun and Li, Yangguang and Liu, Jiaheng and Wang, Xintao and
             Wan, Pengfei and Zhang, Di and Ouyang, Wanli},
  journal = {arXiv preprint arXiv:2505.05470},
  year    = {2025}
}""",
    },
    "grpo_guard": {
        "title": "GRPO-Guard: Mitigating Implicit Over-Optimization in Flow Matching via Regulated Clipping",
        "id": "2510.22319",
        "citation": """@article{wang2025grpoguard,
  title   = {{GRPO-Guard}: Mitigating Implicit Over-Optimization in Flow Matching via Regulated Clipping},
  author  = {Wang, Jing and Liang, Jiajun and Liu, Jie and Liu, Henglin and Liu, Gongye and Zheng, Jun and
             Pang, Wanyuan and Ma, Ao and Xie, Zhenyu and Wang, Xintao and Wang, Meng and Wan, Pengfei and
             Liang, Xiaodan},
  journal = {arXiv preprint arXiv:2510.22319},
  year    = {2025}
}""",
    },
}
