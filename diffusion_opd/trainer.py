"""DiffusionOPDTrainer: one student learns on its own trajectories from many specialists (DiffusionOPD, arXiv
2605.15055).

Reads as the paper's Algorithm 1: each optimizer step visits every task; the student denoises its prompts; at every
state it visits, the task's teacher says what it would have done there; the closed-form divergence of the two steps is
backpropagated at once. Rollout and gradient are one pass, inside the pipeline's own `__call__` (see policy.py).
"""

import contextlib
import copy
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from peft import LoraConfig
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, set_seed

from . import objectives
from .base_trainer import CHECK_PROMPTS, DiffusionTrainer, load_student, no_zero_init
from .config import DiffusionOPDConfig, check_call_kwargs
from .policy import Policy, Step, is_flow
from .sampling import PROMPT, TEACHER, TaskCycleSampler, TaskCycleStream, is_prompt, routed_dataset, seed_of
from .teachers import (
    MANIFEST_NAME,
    STUDENT_ADAPTER,
    check_manifest,
    load_teachers,
    manifest,
    name_teachers,
    same_weights,
)
from .transitions import TRANSITIONS

logger = get_logger(__name__)

_TRAIN, _EVAL = 0, 1  # seed domains


class DiffusionOPDTrainer(DiffusionTrainer):
    """
    Trainer for on-policy distillation of diffusion models.

    Example:

    ```python
    from datasets import Dataset
    from peft import LoraConfig
    from diffusion_opd import DiffusionOPDTrainer, Teacher

    trainer = DiffusionOPDTrainer(
        model="stabilityai/stable-diffusion-3.5-medium",
        teachers=[Teacher("quanhaol/DiffusionOPD", subfolder="OCRTeacher/lora", id="ocr"), ...],
        train_dataset=Dataset.from_dict({"prompt": [...], "teacher_id": [...]}),
        peft_config=LoraConfig(r=32, lora_alpha=64, target_modules=["to_q", "to_k", "to_v"]),
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~diffusers.DiffusionPipeline`]):
            The student: Hub id or folder of a pipeline, or a loaded pipeline.
        teachers (`str`, [`Teacher`], [`~diffusers.DiffusionPipeline`], or a sequence or `{id: teacher}` dict of them):
            The specialists. Paths are Hub ids or folders of a LoRA (PEFT or diffusers format), a denoiser or a
            pipeline.
        args ([`DiffusionOPDConfig`], *optional*):
            The configuration. Defaults to one with `output_dir` `"<model>-DiffusionOPD"`.
        train_dataset (`Dataset`, `IterableDataset` or `{teacher id: dataset}`):
            Columns `prompt` and, with several teachers, `teacher_id`.
        eval_dataset (the same, *optional*):
            Evaluated as `eval_loss`, `eval_kl` and `eval_kl/<teacher id>`, with the same noise each time.
        callbacks (`list[TrainerCallback]`, *optional*), optimizers (`tuple`, *optional*):
            As for [`~transformers.Trainer`].
        peft_config ([`~peft.LoraConfig`], *optional*):
            Trains a LoRA; `None` trains the whole denoiser (whose learning rate is usually far below the default).

    With `ema_decay`, `trainer.pipeline` carries the trained weights until `train` returns, and their average from then
    on; `with trainer.ema_weights():` puts the average in place before that.

    Raises:
        ValueError, TypeError: at once, if anything does not fit together: the sentence names what was given and what to
            do.
    """

    _name = "DiffusionOPD"
    _columns = [PROMPT, TEACHER]
    _paper = {
        "title": "DiffusionOPD: A Unified Perspective of On-Policy Distillation in Diffusion Models",
        "id": "2605.15055",
        "citation": """@article{li2026diffusionopd,
  title   = {{DiffusionOPD}: A Unified Perspective of On-Policy Distillation in Diffusion Models},
  author  = {Li, Quanhao and Yu, Junqiu and Jiang, Kaixun and Wei, Yujie and Xing, Zhen and Li, Pandeng and
             Chu, Ruihang and Zhang, Shiwei and Liu, Yu and Wu, Zuxuan},
  journal = {arXiv preprint arXiv:2605.15055},
  year    = {2026}
}""",
    }

    def __init__(
        self,
        model: str | os.PathLike | DiffusionPipeline,
        teachers: Any,
        args: DiffusionOPDConfig | None = None,
        train_dataset: Dataset | IterableDataset | Mapping[str, Any] | None = None,
        eval_dataset: Dataset | IterableDataset | Mapping[str, Any] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        peft_config: LoraConfig | None = None,
    ):
        if args is None:
            name = model.config.get("_name_or_path") if isinstance(model, DiffusionPipeline) else str(model)
            args = DiffusionOPDConfig(f"{Path(name or type(model).__name__).name}-DiffusionOPD")
        specs = name_teachers(teachers)
        for spec in specs:
            check_call_kwargs(spec.call_kwargs, {"guidance_scale": spec.guidance_scale}, f"teacher {spec.id!r}")
        ids = [spec.id for spec in specs]
        if train_dataset is not None:
            train_dataset = routed_dataset(train_dataset, ids, "train_dataset")
        if eval_dataset is not None:
            eval_dataset = routed_dataset(eval_dataset, ids, "eval_dataset", need_all=False)
        args = copy.copy(args)  # what a run sets in them must not reach the next one
        _set_accumulation(args, ids)

        set_seed(args.seed)
        pipeline = load_student(model, args, peft_config)
        with no_zero_init():
            loaded = load_teachers(specs, pipeline, peft_config is not None, args.mixed_dtype)
        super().__init__(
            pipeline,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        for teacher in loaded:
            for part in teacher.pipeline.components.values():
                if isinstance(part, nn.Module):
                    part.to(self.accelerator.device)
        self.loaded_teachers = {teacher.id: teacher for teacher in loaded}
        self.teachers = {
            teacher.id: Policy(
                teacher.pipeline,
                args.num_inference_steps,
                {**args.pipeline_kwargs, **teacher.spec.overrides},
                self.memo,
                teacher.adapter,
            )
            for teacher in loaded
        }
        self._micro_step = 0
        self._check_parties()

    def _check_parties(self) -> None:
        """Asks everybody once: refuses what does not fit, warns about a teacher with nothing to teach."""
        args, scheduler = self.args, self.pipeline.scheduler
        name = args.transition
        if not is_flow(scheduler):
            if name not in ("ode", "ddim"):
                raise ValueError(
                    f"`transition={name!r}` is for flow matching, but {type(self.pipeline).__name__} is a VP model "
                    f"({type(scheduler).__name__}); use 'ddim' (noise by `noise_level`)."
                )
            name = "ddim"
        elif name == "ddim":
            raise ValueError(
                f"`transition='ddim'` is for VP models, but {type(self.pipeline).__name__} is a flow-matching model "
                f"({type(scheduler).__name__}); use 'ode', 'flow_sde', 'dance_sde' or 'cps'."
            )
        self.kernel = partial(TRANSITIONS[name], noise_level=args.noise_level)

        step = self._first_step
        still = [
            j
            for j in range(args.num_learnt_steps)
            if self.kernel(step.sample, step.prediction, step.schedule, j).std == 0
        ]
        if args.noise_level > 0 and args.objective != "velocity" and still:
            raise ValueError(
                f"step {still[0] + 1} of {args.num_inference_steps} has zero std under {name!r}, so its "
                f"{args.objective!r} is not defined; lower `timestep_fraction` (now {args.timestep_fraction})."
            )
        for key, teacher in self.teachers.items():
            with self.autocast(teacher.denoiser):
                source = self.loaded_teachers[key].spec.source
                try:
                    teacher.self_check(CHECK_PROMPTS, args.num_learnt_steps)
                    with torch.no_grad():
                        prediction = teacher.predict(step.sample, step.timestep, CHECK_PROMPTS)
                except (RuntimeError, ValueError) as error:
                    raise ValueError(
                        f"teacher {key!r} ({source}) cannot be asked at the student's states of shape "
                        f"{tuple(step.sample.shape)}: {error}"
                    ) from error
                if prediction.shape != step.prediction.shape:
                    raise ValueError(
                        f"teacher {key!r} ({source}) predicts {tuple(prediction.shape)} at the student's states, the "
                        f"student predicts {tuple(step.prediction.shape)}."
                    )
                unchanged = torch.equal(prediction, step.prediction)
                if self.loaded_teachers[key].adapter is None:  # in another dtype it predicts other numbers
                    unchanged |= same_weights(
                        getattr(self.loaded_teachers[key].pipeline, self.denoiser_name), self.model
                    )
                if unchanged:
                    logger.warning(
                        f"Teacher {key!r} ({source}) predicts exactly what the untrained student predicts: there is "
                        "nothing to learn from it."
                    )
        self.memo.clear()
        del self._first_step

    # Algorithm 1

    def training_step(self, model: nn.Module, inputs: list[dict[str, Any]], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch: the student's rollout on one task's prompts, with the backward pass of each step inside
        it."""
        model.eval()  # the rollout is a sample of the policy that is trained: no dropout
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        prompts, task = [example[PROMPT] for example in inputs], inputs[0][TEACHER]
        generators = self._generators(len(inputs), _TRAIN, self.state.global_step, *self._place_in_step(task))
        scale = 1 / (self.args.num_learnt_steps * self.current_gradient_accumulation_steps)
        losses = []

        with self._held_gradient_sync(model) as release_sync:

            def learn(step: Step) -> Tensor:
                loss, kl, next_state = self._compare(step, prompts, task, generators)
                with self.stopwatch.section("student"):
                    self._backward(loss.mean() * scale)
                losses.append(loss.mean().detach())
                self.record("kl", kl.mean())
                self.record(f"kl/{task}", kl.mean())
                self.record(f"kl_step/{step.index}", kl.mean())
                if self.args.objective != "kl":
                    self.record(f"loss/{task}", loss.mean())
                    self.record(f"loss_step/{step.index}", loss.mean())
                if step.index == self.args.num_learnt_steps - 2:
                    release_sync()
                return next_state

            with self.stopwatch.section("student"):
                self.student.rollout(prompts, generators, learn, self.args.num_learnt_steps, denoiser=model)
        self.memo.clear()
        self._micro_step += 1
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        return torch.stack(losses).mean() / self.current_gradient_accumulation_steps

    def _compare(
        self, step: Step, prompts: Sequence[str], task: str, generators: list[torch.Generator]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Student and teacher at one visited state: the objective and the KL of each sample, and the student's next
        state."""
        # A loaded pipeline keeps its dtype; the student's states may have another
        field = self.teachers[task]
        with torch.no_grad(), self.stopwatch.section("teacher"), self.autocast(field.denoiser):
            target = field.predict(step.sample, step.timestep, prompts)
        student = self.kernel(step.sample, step.prediction, step.schedule, step.index)
        teacher = self.kernel(step.sample, target, step.schedule, step.index)
        next_state = student.mean.detach()
        if student.std > 0:
            noise = randn_tensor(next_state.shape, generators, next_state.device, torch.float32)
            next_state = student.sample(noise).detach()

        kl = objectives.kl(student, teacher)
        if self.args.objective == "velocity":
            loss = objectives.velocity(step.prediction, target)
        elif self.args.objective == "policy_gradient":
            loss = objectives.policy_gradient(kl, student, next_state)
        else:
            loss = kl
        return loss, kl, next_state

    def _backward(self, loss: Tensor) -> None:
        # DeepSpeed would divide by the accumulation steps again
        self.accelerator.backward(loss, **({"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}))

    @contextlib.contextmanager
    def _held_gradient_sync(self, model: nn.Module) -> Iterator[Any]:
        """Gradients are synchronised by the backward pass of the LAST learnt step of an optimizer step alone.

        DDP decides at the forward pass, so the release must come before the forward passes of that step; accelerate's
        DeepSpeed wrapper calls `engine.step()` in every backward pass while `sync_gradients` is set.
        """
        state = self.accelerator.gradient_state
        stack = contextlib.ExitStack()
        if state.sync_gradients and self.args.num_learnt_steps > 1:
            state._set_sync_gradients(False)
            stack.callback(state._set_sync_gradients, True)
            stack.enter_context(self.accelerator.no_sync(model))
        with stack:
            yield stack.close

    def _place_in_step(self, task: str) -> tuple[int, int]:
        """Which task, and which of its micro-batches of this optimizer step."""
        micro_step = self._micro_step % self.args.gradient_accumulation_steps
        return list(self.teachers).index(task), micro_step // len(self.teachers)

    def _generators(self, count: int, domain: int, step: int, task: int, cycle: int) -> list[torch.Generator]:
        """One generator a sample, by its place among its task's samples of the step: the same however a step's samples
        are split over processes and micro-batches, and after a resume."""
        first = (cycle * self.accelerator.num_processes + self.accelerator.process_index) * count
        return [
            torch.Generator().manual_seed(seed_of(self.args.seed, domain, step, task, first + index))
            for index in range(count)
        ]

    # Evaluation: the same rollouts and divergences, without learning

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        if eval_dataset is not None:
            eval_dataset = routed_dataset(eval_dataset, list(self.teachers), "eval_dataset", need_all=False)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self.model.eval()
        ids = list(self.teachers)
        rows = []
        self.callback_handler.eval_dataloader = dataloader
        if callable(getattr(self.optimizer, "eval", None)):  # schedule-free optimizers
            self.optimizer.eval()
        for number, batch in enumerate(dataloader):
            for example in batch:  # of a stream, which nobody has looked at yet
                if example.get(TEACHER) not in ids or not is_prompt(example.get(PROMPT)):
                    raise ValueError(f"eval_dataset: {example} is no prompt for one of the teachers {ids}.")
            # A batch of an eval dataset may hold several tasks; a rollout holds one
            generators = self._generators(len(batch), _EVAL, number, 0, 0)
            results = torch.zeros(len(batch), 3, device=self.accelerator.device)
            for task in sorted({example[TEACHER] for example in batch}):
                chosen = [index for index, example in enumerate(batch) if example[TEACHER] == task]
                loss, kl = self._evaluate_task(
                    [batch[index][PROMPT] for index in chosen], task, [generators[index] for index in chosen]
                )
                results[chosen] = torch.stack([torch.full_like(loss, ids.index(task)), loss, kl], dim=1)
            rows.append(self.accelerator.gather_for_metrics(results))
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        table = torch.cat(rows)
        metrics = {"loss": table[:, 1].mean().item(), "kl": table[:, 2].mean().item()}
        for index, key in enumerate(ids):
            if (mask := table[:, 0] == index).any():
                metrics[f"kl/{key}"] = table[mask, 2].mean().item()
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(table))

    @torch.no_grad()
    def _evaluate_task(
        self, prompts: Sequence[str], task: str, generators: list[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        losses, kls = [], []

        def watch(step: Step) -> Tensor:
            loss, kl, next_state = self._compare(step, prompts, task, generators)
            losses.append(loss)
            kls.append(kl)
            return next_state

        with self.autocast(self.model):  # before the first `train()` the denoiser is not wrapped in it
            self.student.rollout(prompts, generators, watch, self.args.num_learnt_steps)
        self.memo.clear()
        return torch.stack(losses).mean(0), torch.stack(kls).mean(0)

    # Data: one task a micro-batch, tasks in turn

    def get_train_dataloader(self) -> Any:
        if self.train_dataset is None or isinstance(self.train_dataset, Dataset):
            return super().get_train_dataloader()
        stream = TaskCycleStream(self.train_dataset, list(self.teachers), self._global_batch_size)
        return self._get_dataloader(stream, "Training", self._train_batch_size, is_training=True)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> TaskCycleSampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        self._train_sampler = TaskCycleSampler(
            dataset[TEACHER],
            list(self.teachers),
            self._global_batch_size,
            cycles=self.args.gradient_accumulation_steps // len(self.teachers),
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )
        return self._train_sampler

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:
        # In several processes accelerate does not reach the sampler of an epoch that is resumed in its middle
        if isinstance(self.train_dataset, Dataset):
            self._train_sampler.set_epoch(epoch)
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    @property
    def _global_batch_size(self) -> int:
        return self._train_batch_size * self.accelerator.num_processes

    # What a checkpoint and a card say about the teachers

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            content = json.dumps(manifest(self.loaded_teachers.values()), indent=2)
            Path(output_dir or self.args.output_dir, MANIFEST_NAME).write_text(content + "\n")

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if resume_from_checkpoint is not None:
            check_manifest(resume_from_checkpoint, self.loaded_teachers.values())
        self._micro_step = 0
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    @property
    def _published_names(self) -> set[str]:
        return super()._published_names | {MANIFEST_NAME}

    @property
    def image_prompts(self) -> list[str]:
        if self.args.image_prompts is not None or not isinstance(self.train_dataset, Dataset):
            return super().image_prompts
        per_task = -(-4 // len(self.teachers))
        rows = {key: [] for key in self.teachers}
        for row, task in enumerate(self.train_dataset[TEACHER]):
            if len(rows[task]) < per_task:
                rows[task].append(row)
            elif all(len(chosen) == per_task for chosen in rows.values()):
                break
        return self.train_dataset[[row for chosen in rows.values() for row in chosen]][PROMPT]

    def _card_fields(self) -> dict[str, Any]:
        teachers = [
            {
                "id": key,
                "source": teacher.spec.source,
                "revision": teacher.commit or teacher.spec.revision,
                "guidance_scale": self.teachers[key].call_kwargs.get("guidance_scale", "the pipeline's own"),
            }
            for key, teacher in self.loaded_teachers.items()
        ]
        names = (
            "transition noise_level objective num_inference_steps timestep_fraction guidance_scale learning_rate "
            "per_device_train_batch_size gradient_accumulation_steps max_grad_norm ema_decay seed"
        ).split()
        settings = {name: getattr(self.args, name) for name in names} | {"transition": self.kernel.func.__name__}
        settings |= {"optimizer steps": self.state.global_step, "processes": self.accelerator.num_processes}
        if self.trains_lora:
            lora = self.model.peft_config[STUDENT_ADAPTER]
            settings |= {"LoRA rank": lora.r, "LoRA alpha": lora.lora_alpha}
        return {"teachers": teachers, "settings": settings}


def _set_accumulation(args: DiffusionOPDConfig, ids: Sequence[str]) -> None:
    """An optimizer step sees whole cycles: `gradient_accumulation_steps` becomes, or must be, a multiple of the
    tasks."""
    steps = args.gradient_accumulation_steps
    if steps == 1 and len(ids) > 1:
        args.gradient_accumulation_steps = len(ids)
        logger.info(f"An optimizer step sees every task: `gradient_accumulation_steps` is set to {len(ids)}.")
    elif steps % len(ids):
        raise ValueError(
            f"`gradient_accumulation_steps={steps}` is not a multiple of the {len(ids)} teachers {list(ids)}: an "
            f"optimizer step must see every task equally often; leave it out, or use "
            f"{len(ids) * max(1, round(steps / len(ids)))}."
        )
