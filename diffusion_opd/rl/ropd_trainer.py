"""DiffusionROPDTrainer: experts taught by outcomes (ROPD, the distillation of MaineCoon).

A student learns from one expert a task, as in on-policy distillation, and a verifier says how much: the more of a
prompt's samples fail, the more of the expert is in what the student is to predict; what it can do already, it keeps.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..inputs import Inputs
from ..objectives import velocity
from ..policy import Visit
from ..scheduler_proxy import Step
from ..targets import mixed
from ..transitions import Schedule
from .config import DiffusionROPDConfig
from .objectives import expert_weights
from .trainer import Answers, DiffusionRLTrainer, Rollout, _move


class DiffusionROPDTrainer(DiffusionRLTrainer):
    """
    Trainer for distillation from experts that is gated by a verifier.

    Example:

    ```python
    from datasets import Dataset
    from peft import LoraConfig
    from diffusion_opd import DiffusionROPDTrainer

    def is_bright(prompts, images, **kwargs):
        pixels = [image.convert("L").resize((1, 1)).getdata() for image in images]
        return [float(sum(pixel) > 127) for pixel in pixels]

    trainer = DiffusionROPDTrainer(
        model="stabilityai/stable-diffusion-3.5-medium",
        reward_funcs=is_bright,
        teachers="me/bright-lora",
        train_dataset=Dataset.from_dict({"prompt": ["a fox in the snow", ...]}),
        peft_config=LoraConfig(
            r=32, lora_alpha=64, target_modules=["to_q", "to_k", "to_v"]
        ),
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~diffusers.DiffusionPipeline`]):
            The student: Hub id or folder of a pipeline, or a loaded pipeline.
        reward_funcs (`Callable`, a list of them, or `{task: callable or list}`):
            The verifier, called as `func(prompts=..., images=..., **columns)`, sync or async; one number in [0, 1] a
            sample, 1 for a success, `None` for no verdict. Of several functions the sum by `reward_weights`.
        args ([`DiffusionROPDConfig`], *optional*):
            The configuration. Defaults to one with `output_dir` `"<model>-DiffusionROPD"`.
        train_dataset (`Dataset`, `IterableDataset` or `{task: dataset}`):
            Columns `prompt`, with several tasks `task`, and whatever the reward functions take.
        eval_dataset (the same, *optional*):
            Evaluated as `eval_reward` and `eval_rewards/<name>/mean`, with the same noise each time.
        callbacks (`list[TrainerCallback]`, *optional*), optimizers (`tuple`, *optional*):
            As for [`~transformers.Trainer`].
        peft_config ([`~peft.LoraConfig`], or a dict of them by denoiser, *optional*):
            Trains a LoRA, of two denoisers (Wan 2.2) one each, or of those that are named (`{"transformer_2": ...}`);
            `None` trains the whole denoiser.
        student_lora (`str` or [`Lora`], *optional*):
            Hub id or folder of a LoRA of the student, in any format that teachers have: its training goes on, with its
            own rank and alpha, in the place of a new one; `beta` measures from it, as TRL does.
        teachers (as of [`DiffusionOPDTrainer`]):
            The experts, one for each task.

    Raises:
        ValueError, TypeError: at once, if anything does not fit together: the sentence names what was given and what to
            do.
    """

    args: DiffusionROPDConfig

    _name = "DiffusionROPD"
    _config_class = DiffusionROPDConfig
    _card_settings = "ropd_alpha"
    _asks_anywhere = False
    _paper: dict[str, Any] = {}

    def _taught(self, args: Any, specs: Any, tasks: Any) -> Any:
        taught = super()._taught(args, specs, tasks)
        if lacking := [task for task in tasks if task not in taught]:
            raise ValueError(f"the tasks {lacking} have no expert; `teachers` needs one for each of {list(tasks)}.")
        return taught

    # It follows a rollout step by step, so streams, chunks and what depends on the steps before are right
    def _require_fitting(self) -> None:
        if self.checked.crosses:
            raise ValueError(
                f"the gradient of {type(self.pipeline).__name__} crosses its denoising steps: something that its first "
                "step computes is used in the second one; ROPD takes pipelines whose steps have each their own."
            )

    def _roll_out(
        self, task: str, inputs: Inputs, generators: list[torch.Generator]
    ) -> tuple[Schedule, dict[str, Tensor], list[Any]]:
        kept: dict[str, Tensor] = {}
        with self._drawing(self.student.policy, task, inputs, generators, partial(_move, self._ode)) as walk:
            for visit in walk:
                for step in visit.steps:
                    self.watch("rollout", task, step.prediction)
                    next_sample: Any = step.next_sample  # a walk has moved
                    if visit.index <= self.learnt[-1]:
                        name = f"{visit.index}.{step.stream}.{step.chunk}.{step.index}"
                        kept |= {f"state.{name}": step.sample, f"next.{name}": next_sample}
                        if visit.index in self.learnt:
                            kept[f"velocity.{name}"] = step.prediction
        return step.schedule, kept, list(walk.output)

    def _visits(self, rollout: Rollout, step: int) -> list[Visit]:
        nothing: Any = None
        steps: dict[int, list[Step]] = {}
        for name, state in _named(rollout.tensors, "state"):
            visit, stream, chunk, index = map(int, name.split("."))
            onward = rollout.tensors[f"next.{name}"]
            steps.setdefault(visit, []).append(
                Step(stream, chunk, index, nothing, state, nothing, rollout.schedule, onward)
            )
        return [Visit(index, tuple(steps[index])) for index in sorted(steps)]

    def _learnt_as(self, task: str, rewards: Tensor, advantages: Tensor) -> Tensor:
        """How much of the expert is in each sample's target."""
        given = rewards[~rewards.isnan()]
        if len(given) and not (0 <= given.min() and given.max() <= 1 + 1e-6):
            names = self.rewards.names(task)
            raise ValueError(
                f"the verifier of task {task!r} ({', '.join(names)}) says {given.min().item():.4g} to "
                f"{given.max().item():.4g}, and a verdict is a number in [0, 1]; scale it, or give `reward_weights`."
            )
        eta = expert_weights(rewards, self.args.num_generations, self.args.ropd_alpha)
        self.record("eta", eta.mean())
        self.record("frac_eta_zero", (eta == 0).float().mean())
        if len(self.tasks) > 1:
            self.record(f"eta/{task}", eta.mean())
        return eta

    def _loss(self, rollout: Rollout, number: int, visit: Visit, answers: Answers) -> Tensor:
        losses, distances, bases = [], [], []
        for place, step in enumerate(visit.steps):
            name = f"velocity.{visit.index}.{step.stream}.{step.chunk}.{step.index}"
            new, expert = answers["student"][place], answers["teacher"][place]
            target = mixed(rollout.tensors[name], expert, rollout.advantages)
            losses.append(velocity(new, target).mean())
            distances.append(velocity(new.detach(), expert).mean())
            if "base" in answers:
                bases.append(velocity(new, answers["base"][place]).mean())
        loss = torch.stack(losses).mean()
        self.record("loss/ropd", loss)
        self.record("expert_distance", torch.stack(distances).mean())
        if bases:
            distance = torch.stack(bases).mean()
            self.record("kl", distance)
            loss = loss + self.args.beta * distance
        return loss


def _named(tensors: Mapping[str, Tensor], kind: str) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        if name.startswith(f"{kind}."):
            yield name.removeprefix(f"{kind}."), tensor
