"""DiffusionNFTTrainer: online reinforcement learning on the forward process (DiffusionNFT, arXiv 2509.16117).

No likelihoods and no stochastic sampler: the old policy draws samples, the rewards say how good each was, and the
trained policy is contrasted with the old one at noised versions of these samples.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled

from ..objectives import velocity
from ..policy import Step
from ..teachers import STUDENT_ADAPTER
from ..transitions import Schedule, denoised, noised
from .config import DiffusionNFTConfig
from .objectives import nft, optimality
from .trainer import _NOISE, DiffusionRLTrainer, Rollout, _move

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
        return [sum(image.convert("L").resize((1, 1)).getdata()) / 255 for image in images]

    trainer = DiffusionNFTTrainer(
        model="stabilityai/stable-diffusion-3.5-medium",
        reward_funcs=brightness,
        train_dataset=Dataset.from_dict({"prompt": ["a fox in the snow", ...]}),
        peft_config=LoraConfig(r=32, lora_alpha=64, target_modules=["to_q", "to_k", "to_v"]),
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
        peft_config ([`~peft.LoraConfig`], *optional*):
            Trains a LoRA; `None` trains the whole denoiser.

    Raises:
        ValueError, TypeError: at once, if anything does not fit together: the sentence names what was given and what to
            do.
    """

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
        if is_deepspeed_zero3_enabled() or self.is_fsdp_enabled:
            raise ValueError(
                "DiffusionNFT's old policy follows the trained parameters one by one, which does not work where they "
                "are sharded (ZeRO-3, FSDP); use ZeRO-2 or DDP."
            )
        self.old = self._frozen_policy(OLD_ADAPTER, torch.float32)
        if self.trains_lora:
            trained = {id(parameter) for parameter in self.trainable_parameters}
            pairs = zip(self._adapter(STUDENT_ADAPTER), self._adapter(OLD_ADAPTER), strict=True)
            self._old_pairs = [(new, old) for new, old in pairs if id(new) in trained]
        else:
            twins = dict(self.old.denoiser.named_parameters())
            self._old_pairs = [(p, twins[key]) for key, p in self.model.named_parameters() if p.requires_grad]

    def _roll_out(
        self, task: str, prompts: list[str], generators: list[torch.Generator]
    ) -> tuple[Schedule, dict[str, Tensor], list[Any]]:
        timesteps, last = [], {}

        def visit(step: Step) -> Tensor:
            self.watch("rollout", task, step.prediction)
            last.update(schedule=step.schedule, x_0=_move(self._ode, step))
            timesteps.append(step.timestep)
            return last["x_0"]

        images = self._run(self.old, prompts, generators, visit)
        return last["schedule"], {"timesteps": torch.stack(timesteps), "x_0": last["x_0"]}, images

    def _loss(self, model: nn.Module, rollout: Rollout, index: int) -> Tensor:
        args, x_0, schedule = self.args, rollout.tensors["x_0"], rollout.schedule
        key = self.tasks.index(rollout.task) * args.num_inference_steps + index
        generators = self._generators(len(x_0), _NOISE, self.state.global_step, key, rollout.place)
        noise = randn_tensor(x_0.shape, generators, x_0.device, torch.float32)
        # In the dtype that the denoiser is given in a rollout
        x = noised(x_0, noise, schedule, index).to(self._state_dtype)

        old = self._predict(self.old, x, rollout, index)
        base = None if self.base is None else self._predict(self.base, x, rollout, index)
        new = self._predict(self.student, x, rollout, index, model)
        r = optimality(rollout.advantages, args.advantage_clip)
        contrast = nft(new, old, lambda v: denoised(x, v, schedule, index), x_0, r, args.nft_beta).mean()
        # As the loss of advantages, not of their share of the clip range: `beta` weighs against that
        loss = args.advantage_clip * contrast
        self.record("loss/contrast", contrast)
        self.record("old_distance", velocity(new.detach(), old).mean())
        if base is not None:
            distance = velocity(new, base).mean()
            self.record("kl", distance)
            loss = loss + args.beta * distance
        return loss

    def after_optimizer_step(self) -> None:
        """The old policy follows the trained one."""
        super().after_optimizer_step()
        rollout, rest = divmod(self.state.global_step, self.args.num_iterations)
        if rest == 0:
            decay = self.old_decay(rollout)
            self.record("old_decay", decay)
            self._follow(decay)

    def old_decay(self, rollout: int) -> float:
        """`d` after the optimizer steps of the `rollout`-th rollout, counted from 1."""
        args = self.args
        return min(args.old_decay_rate * max(rollout - args.old_decay_start, 0), args.old_decay_max)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        self._follow(0.0)  # also after `load_weights`
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    @torch.no_grad()
    def _follow(self, decay: float) -> None:
        for new, old in self._old_pairs:
            old.lerp_(new.to(old.dtype), 1 - decay)

    def _save_state(self, folder: Path) -> None:
        super()._save_state(folder)
        if self.args.should_save:
            save_file({str(i): old.contiguous() for i, (_, old) in enumerate(self._old_pairs)}, folder / OLD_NAME)

    def _load_state(self, folder: Path) -> None:
        super()._load_state(folder)
        state = load_file(folder / OLD_NAME)
        with torch.no_grad():
            for index, (_, old) in enumerate(self._old_pairs):
                old.copy_(state[str(index)])
