"""DiffusionNFTTrainer: online reinforcement learning on the forward process (DiffusionNFT, arXiv 2509.16117).

No likelihoods and no stochastic sampler: the old policy draws samples, the rewards say how good each was, and the
trained policy is contrasted with the old one at noised versions of these samples.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import STUDENT_ADAPTER
from ..inputs import Inputs
from ..objectives import velocity
from ..policy import Policy, Visit
from ..sampling import SEED_NOISE, normal
from ..scheduler_proxy import Step
from ..shards import local_shards, reshard, shards_changed
from ..transitions import Schedule, denoised, noised
from .config import DiffusionNFTConfig
from .objectives import nft, optimality
from .trainer import Answers, DiffusionRLTrainer, Rollout, _move

OLD_ADAPTER = "old"
OLD_NAME = "old_policy.safetensors"


class DiffusionNFTTrainer(DiffusionRLTrainer):
    """
    Trainer for DiffusionNFT.

    Example:

    ```python
    from datasets import Dataset
    from peft import LoraConfig
    from diffusion_opd import DiffusionNFTTrainer

    def brightness(prompts, images, **kwargs):
        pixels = [image.convert("L").resize((1, 1)).getdata() for image in images]
        return [sum(pixel) / 255 for pixel in pixels]

    trainer = DiffusionNFTTrainer(
        model="stabilityai/stable-diffusion-3.5-medium",
        reward_funcs=brightness,
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
        args ([`DiffusionNFTConfig`], *optional*):
            The configuration. Defaults to one with `output_dir` `"<model>-DiffusionNFT"`.
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
            By task, a specialist each: the loss holds `distill_beta` times the mean squared distance of the velocities,
            at the same noised samples. A task without a teacher has no such term.

    Raises:
        ValueError, TypeError: at once, if anything does not fit together: the sentence names what was given and what to
            do.
    """

    args: DiffusionNFTConfig

    _name = "DiffusionNFT"
    _config_class = DiffusionNFTConfig
    _card_settings = "nft_beta old_decay_start old_decay_rate old_decay_max"
    _paper = {
        "title": "DiffusionNFT: Online Diffusion Reinforcement with Forward Process",
        "id": "2509.16117",
        "citation": """@article{zheng2025diffusionnft,
  title   = {{DiffusionNFT}: Online Diffusion Reinforcement with Forward Process},
  author  = {Zheng, Kaiwen and Chen, Huayu and Ye, Haotian and Wang, Haoxiang and Zhang, Qinsheng and Jiang, Kai and
             Su, Hang and Ermon, Stefano and Zhu, Jun and Liu, Ming-Yu},
  journal = {arXiv preprint arXiv:2509.16117},
  year    = {2025}
}""",
    }

    def _prepare(self) -> None:
        self.old = self.policy_of(*self.frozen(OLD_ADAPTER, torch.float32))
        self._old_weights: list[Tensor] = []

    def _roll_out(
        self, task: str, inputs: Inputs, generators: list[torch.Generator]
    ) -> tuple[Schedule, dict[str, Tensor], list[Any]]:
        with self._drawing(self.old, task, inputs, generators, partial(_move, self._ode)) as walk:
            for visit in walk:
                (step,) = visit.steps
                self.watch("rollout", task, step.prediction)
        return step.schedule, {"x_0": step.next_sample}, list(walk.output)

    def _visits(self, rollout: Rollout, step: int) -> list[Visit]:
        x_0, states = rollout.tensors["x_0"], []
        for place in self.learnt:
            key = self.tasks.index(rollout.task) * self.args.num_inference_steps + place
            generators = self._own_generators(rollout, SEED_NOISE, step, key, rollout.place)
            noise = normal(x_0.shape, generators, x_0.device)
            # In the dtype that the denoiser is given in a rollout
            ((_, index),) = self.plan[place].levels
            states.append(noised(x_0, noise, rollout.schedule, index).to(self._state_dtype))
        return self._chain(rollout, self.learnt, states)

    def _compared(self, task: str) -> dict[str, Policy]:
        return {"old": self.old} | super()._compared(task)

    def _loss(self, rollout: Rollout, number: int, visit: Visit, answers: Answers) -> Tensor:
        args, x_0 = self.args, rollout.tensors["x_0"]
        (step,), predictions = visit.steps, {name: prediction for name, (prediction,) in answers.items()}
        new, old, base = predictions["student"], predictions["old"], predictions.get("base")
        r = optimality(rollout.advantages, args.advantage_clip)
        denoise = partial(_denoise, step)
        contrast = nft(new, old, denoise, x_0, r, args.nft_beta).mean()
        # As the loss of advantages, not of their share of the clip range: `beta` weighs against that
        loss = args.advantage_clip * contrast
        self.record("loss/contrast", contrast)
        self.record("old_distance", velocity(new.detach(), old).mean())
        if base is not None:
            distance = velocity(new, base).mean()
            self.record("kl", distance)
            loss = loss + args.beta * distance
        if "teacher" in predictions:
            loss = loss + self._distilled(rollout.task, velocity(new, predictions["teacher"]).mean())
        return loss

    def after_optimizer_step(self) -> None:
        """The old policy follows the trained one."""
        super().after_optimizer_step()
        rollout, rest = divmod(self.state.global_step, self.steps_per_rollout)
        if rest == 0:
            decay = self.old_decay(rollout)
            self.record("old_decay", decay)
            self._follow(decay)

    def old_decay(self, rollout: int) -> float:
        """`d` after the optimizer steps of the `rollout`-th rollout, counted from 1."""
        args = self.args
        return min(args.old_decay_rate * max(rollout - args.old_decay_start, 0), args.old_decay_max)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._follow(0.0)  # also after `load_weights`
        if resume_from_checkpoint is not None:
            state = self.load_shards(Path(resume_from_checkpoint), OLD_NAME)
            for index, old in enumerate(self._old_weights):
                old.copy_(state[str(index)])
            self._follow(1.0)
        return prepared

    @property
    def _old_parameters(self) -> list[nn.Parameter]:
        """The old policy's, in the order of the trained ones."""
        reshard(self.old.denoiser)
        if self.trains_lora:
            pairs = zip(self.student.adapter(STUDENT_ADAPTER), self.student.adapter(OLD_ADAPTER), strict=True)
        else:
            pairs = zip(self.model.parameters(), self.old.denoiser.parameters(), strict=True)
        return [old for new, old in pairs if new.requires_grad]

    @torch.no_grad()
    def _follow(self, decay: float) -> None:
        parameters = self._old_parameters
        asked = local_shards(parameters)
        if not self._old_weights:  # where an engine keeps the policy that is asked in less than float32, a copy
            self._old_weights = [shard.detach().float() for shard in asked]
        with self.trained_shards() as shards:
            for old, shard in zip(self._old_weights, shards, strict=True):
                old.lerp_(shard.to(old), 1 - decay)
        for shard, old in zip(asked, self._old_weights, strict=True):
            shard.copy_(old)
        shards_changed(parameters)

    def _save_state(self, folder: Path) -> None:
        super()._save_state(folder)
        self.save_shards({str(index): old for index, old in enumerate(self._old_weights)}, folder, OLD_NAME)


def _denoise(step: Step, prediction: Tensor) -> Tensor:
    return denoised(step.sample, prediction, step.schedule, step.index)
