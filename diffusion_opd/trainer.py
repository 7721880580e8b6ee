"""DiffusionOPDTrainer: one student learns on its own trajectories from many specialists (DiffusionOPD, arXiv
2605.15055).

Reads as the paper's Algorithm 1: each optimizer step visits every task; the student denoises its prompts; at every
state it visits, the task's teacher says what it would have done there; the closed-form divergence of the two steps is
backpropagated at once. Rollout and gradient are one pass through the pipeline's own `__call__` (see policy.py).
"""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from peft import LoraConfig
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import set_seed

from . import objectives
from .base_trainer import DiffusionTrainer
from .checks import own_arguments, whole_cycles
from .config import DiffusionOPDConfig, check_call_kwargs
from .data import Data
from .engines import held_gradient_sync
from .errors import one_sentence
from .inputs import Inputs, inputs_of, sample_arguments, signature
from .policy import Move, Visit
from .rewards.functions import Rewards
from .rewards.judge import Judge
from .rewards.registry import load_rewards
from .runs import plain
from .sampling import SEED_TRAIN, TEACHER, noise_generators
from .scheduler_proxy import Step
from .startup import check_teacher
from .student import Student, load_student, whole_modules
from .teachers import MANIFEST_NAME, LoadedTeacher, Teachers, load_teachers, name_teachers

logger = get_logger(__name__)


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
        teachers=[
            Teacher("quanhaol/DiffusionOPD", subfolder="OCRTeacher/lora", id="ocr"),
            ...,
        ],
        train_dataset=Dataset.from_dict({"prompt": [...], "teacher_id": [...]}),
        peft_config=LoraConfig(
            r=32, lora_alpha=64, target_modules=["to_q", "to_k", "to_v"]
        ),
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
            Columns `prompt`, with several teachers `teacher_id`, and what else the pipeline takes for each sample
            (`image`, `negative_prompt`, ...; see `input_columns`).
        eval_dataset (the same, *optional*):
            Evaluated as `eval_loss`, `eval_kl` and `eval_kl/<teacher id>`, with the same noise each time.
        callbacks (`list[TrainerCallback]`, *optional*), optimizers (`tuple`, *optional*):
            As for [`~transformers.Trainer`].
        peft_config ([`~peft.LoraConfig`], or a dict of them by denoiser, *optional*):
            Trains a LoRA, of two denoisers (Wan 2.2) one each, or of those that are named (`{"transformer_2": ...}`);
            `None` trains the whole denoiser (whose learning rate is usually far below the default).
        student_lora (`str` or [`Lora`], *optional*):
            Hub id or folder of a LoRA of the student, in any format that teachers have: its training goes on, with its
            own rank and alpha, in the place of a new one.
        eval_reward_funcs (`Callable`, `str`, `dict`, a list of them, or `{teacher id: the same}`, *optional*):
            Reward functions as [`Rewards`] calls them, or what [`load_reward`] makes them of (`"pickscore"`). At each
            evaluation they score pictures of `eval_dataset`, drawn as the sample pictures are (the pipeline's own
            scheduler, `image_num_inference_steps`), as `eval_reward`, `eval_rewards/<name>/mean` and
            `eval_rewards/<name>/<teacher id>`; nothing is learnt from them.

    With `ema_decay`, `trainer.pipeline` carries the trained weights until `train` returns, and their average from then
    on; `with trainer.ema_weights():` puts the average in place before that.

    Raises:
        ValueError, TypeError: at once, if anything does not fit together: the sentence names what was given and what to
            do.
    """

    args: DiffusionOPDConfig

    _name = "DiffusionOPD"
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
        peft_config: LoraConfig | Mapping[str, LoraConfig] | None = None,
        student_lora: Any = None,
        eval_reward_funcs: Any = None,
    ):
        args = own_arguments(model, args, DiffusionOPDConfig, self._name)
        specs = name_teachers(teachers)
        for key, spec in specs.items():
            check_call_kwargs(spec.call_kwargs, {"guidance_scale": spec.guidance_scale}, f"teacher {key!r}")
        ids = list(specs)
        if eval_reward_funcs is not None:
            rewards = Rewards(load_rewards(eval_reward_funcs), name="eval_reward_funcs")
            if unknown := sorted(set(rewards.tasks or ()) - set(ids)):
                raise ValueError(f"`eval_reward_funcs` names {unknown}, but the teachers are {ids}.")
            self.judge = Judge(rewards, ids, TEACHER)
        data = Data(train_dataset, eval_dataset, ids, TEACHER, args.input_columns)
        if (evaluation := data.evaluation) is not None:
            evaluated = evaluation.unique(TEACHER) if isinstance(evaluation, Dataset) else ids
            metrics = ["loss", "kl", *(f"kl/{key}" for key in ids if key in evaluated)]
            metrics += self.judge.metric_names(evaluated) if self.judge is not None else []
            self._check_best_metric(args, metrics, callbacks)
            if self.judge is not None and isinstance(evaluation, Dataset):
                self.judge.rewards.check_columns(evaluation.column_names)
        whole_cycles(args, ids)
        self._hides_columns = args.remove_unused_columns
        if self.judge is not None:  # they are given all columns
            args.remove_unused_columns = False

        set_seed(args.seed)
        own_columns = {key: spec.columns for key, spec in specs.items()}
        fit = partial(data.fit, call_kwargs=args.pipeline_kwargs, others=own_columns)
        pipeline = load_student(model, args, peft_config, fit, student_lora)
        with whole_modules():
            loaded = load_teachers(specs, pipeline, Student(pipeline).trains_lora, args.mixed_dtype)
        self.columns = {teacher.id: _columns_of(teacher, data, args.pipeline_kwargs) for teacher in loaded}
        super().__init__(
            pipeline,
            args,
            data,
            named=peft_config if isinstance(peft_config, Mapping) else (),
            start=student_lora,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.teachers = Teachers(
            loaded,
            self.policy_of,
            student=self.model,
            device=self.accelerator.device,
            placement=args.teacher_placement,
            shard=self.shard if self.shards_parameters else None,
            engine=self.accelerator.distributed_type.value,
            timing=partial(self.stopwatch.section, "placement"),
        )
        self.loaded_teachers = self.teachers.loaded
        self._micro_step = 0
        self._check_parties(self.teachers.copies)
        for denoiser in {self.model, *(teacher.denoiser for teacher in self.teachers.values())}:
            self._compile(denoiser)

    def _check_parties(self, copies: set[str]) -> None:
        """Asks everybody once: refuses what does not fit, warns about a teacher with nothing to teach: the `copies` of
        the student, and what predicts as it does."""
        args = self.args
        noise_level: Any = args.noise_level  # a number since `__post_init__`
        needs_noise = noise_level > 0 and objectives.OBJECTIVES[args.objective].divides_by_std
        self.kernel = self.choose_kernel(args.transition, noise_level, needs_noise)
        self.student.policy.timing = partial(self.stopwatch.section, "student")
        for key, teacher in self.teachers.items():
            teacher.timing = partial(self.stopwatch.section, "teacher")
            with self.teachers.on_device(key):
                source, dtype = self.loaded_teachers[key].spec.source, next(teacher.denoiser.parameters()).dtype
                own = self.columns[key]
                rows, checked = self.check_task(key, anew=own != self.data.columns)
                step = checked.visits[0].steps[0]
                with one_sentence(
                    f"teacher {key!r} ({source}) of {dtype} cannot be asked at the student's states of shape "
                    f"{tuple(step.sample.shape)} and {step.sample.dtype}"
                ):
                    same = check_teacher(teacher, checked, inputs_of(rows, own))
                if key in copies or same:
                    logger.warning(
                        f"Teacher {key!r} ({source}) predicts exactly what the untrained student predicts: there is "
                        "nothing to learn from it."
                    )
        self._report_check()

    # Algorithm 1

    def training_step(  # type: ignore[override]  # Trainer says a dict of tensors; `identity` collates rows
        self, model: nn.Module, inputs: list[dict[str, Any]], num_items_in_batch: Any = None
    ) -> Tensor:
        """One micro-batch: the student walks, the task's teacher follows, and each visit has its backward pass."""
        self._begin_micro_batch(model)
        task, losses = inputs[0][TEACHER], []
        calls = self.calls(inputs)  # one, but of a pipeline that takes one sample a call
        generators = self._generators(len(inputs), SEED_TRAIN, self.state.global_step, *self._place_in_step(task))
        scale = 1 / (len(calls) * len(self.learnt) * self.current_gradient_accumulation_steps)
        passes = len(calls) * (1 if self.crosses else len(self.learnt))
        with (
            self.teachers.on_device(task) as teacher,
            held_gradient_sync(self.accelerator, model, passes) as release_sync,
        ):
            for call in calls:
                own = [generators[row] for row in call]
                student, teachers = self._inputs(task, [inputs[row] for row in call])
                with (
                    self.student.policy.walk(student, own, self._move(own), denoiser=model) as walk,
                    teacher.follow(walk, teachers) as follow,
                ):
                    whole: list[Tensor] = []
                    for visit in walk.visits(self.learnt, release_sync if call is calls[-1] else None):
                        with torch.no_grad():
                            targets = follow(visit)  # what the specialist does at these very states
                        loss, kl = self._divergence(visit, targets)  # Eq. 10-12
                        if self.crosses:
                            whole.append(loss.mean() * scale)
                        else:
                            self._backward(loss.mean() * scale)  # Eq. 15; the graph of one visit lives at a time
                        losses.append(loss.mean().detach())
                        self._note(task, visit, targets, loss, kl)
                    if self.crosses:
                        self._backward(torch.stack(whole).sum())
        self._end_micro_batch()
        self._micro_step += 1
        return torch.stack(losses).mean() / self.current_gradient_accumulation_steps

    def _inputs(self, task: str, rows: Sequence[dict[str, Any]]) -> tuple[Inputs, Inputs | None]:
        """Of the student, and of a task's teacher if they are others."""
        own = self.columns[task]
        return inputs_of(rows, self.data.columns), None if own == self.data.columns else inputs_of(rows, own)

    def _move(self, generators: list[torch.Generator]) -> Move:
        """Where a walk goes: the policy is the student's own."""
        noise = noise_generators(generators)

        def move(step: Step) -> Tensor:
            transition = self.kernel(step.sample, step.prediction, step.schedule, step.index)
            if transition.std == 0:
                return transition.mean
            return transition.sample(randn_tensor(transition.mean.shape, noise, transition.mean.device, torch.float32))

        return move

    def _divergence(self, visit: Visit, targets: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The objective and the KL of each sample at a visit: the mean over its streams."""
        losses, kls = [], []
        for step, target in zip(visit.steps, targets, strict=True):
            student = self.kernel(step.sample, step.prediction, step.schedule, step.index)
            teacher = self.kernel(step.sample, target, step.schedule, step.index)
            next_sample: Any = step.next_sample  # a walk has moved
            comparison = objectives.Comparison(student, teacher, step.prediction, target, next_sample)
            losses.append(objectives.OBJECTIVES[self.args.objective].loss(comparison))
            with torch.no_grad():
                kls.append(objectives.kl(student, teacher))
        return torch.stack(losses).mean(0), torch.stack(kls).mean(0)

    def _note(self, task: str, visit: Visit, targets: Sequence[Tensor], loss: Tensor, kl: Tensor) -> None:
        """Metrics of a visit, and the watch for NaN."""
        self._watch_visit(task, visit, targets, loss)
        for name in ("kl", f"kl/{task}", f"kl_step/{visit.index}"):
            self.record(name, kl.mean())
        if self.args.objective != "kl":
            self.record(f"loss/{task}", loss.mean())
            self.record(f"loss_step/{visit.index}", loss.mean())

    def _watch_visit(self, task: str, visit: Visit, targets: Sequence[Tensor], loss: Tensor) -> None:
        for step, target in zip(visit.steps, targets, strict=True):
            self.watch("student", task, step.prediction)
            self.watch("teacher", task, target)
        self.watch("loss", task, loss)

    def _place_in_step(self, task: str) -> tuple[int, int]:
        """Which task, and which of its micro-batches of this optimizer step."""
        micro_step = self._micro_step % self.args.gradient_accumulation_steps
        return self.tasks.index(task), micro_step // len(self.tasks)

    # Evaluation: the same rollouts and divergences, without learning, and rewards of whole pictures

    def _evaluation_generators(self, batch: Sequence[Mapping[str, Any]], *args: Any) -> list[torch.Generator]:
        if self._hides_columns:  # those that reward functions read are no reason for other noise
            batch = [{name: row[name] for name in self.data.names if name in row} for row in batch]
        return super()._evaluation_generators(batch, *args)

    def _evaluate_batch(self, batch: Sequence[dict[str, Any]], generators: list[torch.Generator]) -> Tensor:
        """Task, loss and KL of each sample, and its rewards. A batch of an eval dataset may hold several tasks; a walk
        holds one."""
        results = torch.zeros(len(batch), 3, device=self.accelerator.device)
        calls: dict[str, list[list[int]]] = {task: [] for task in self.tasks}
        for call in self.calls(batch, by_task=True):
            calls[batch[call[0]][TEACHER]].append(call)
        # Each forward pass of a sharded denoiser is one of all processes: who has fewer calls of a task than others
        # repeats one of theirs
        firsts = {task: [batch[call[0]] for call in own] for task, own in calls.items()}
        others = gather_object([firsts]) if self.shards_parameters else []
        for task, own in calls.items():
            for call in own:
                loss, kl = self._evaluate_rows(task, [batch[row] for row in call], [generators[row] for row in call])
                results[call] = torch.stack([torch.full_like(loss, self.tasks.index(task)), loss, kl], dim=1)
            for row in max((of[task] for of in others), key=len, default=list[dict[str, Any]]())[len(own) :]:
                self._evaluate_rows(task, [row], [torch.Generator().manual_seed(0)])
        if self.judge is None:
            return results
        return torch.cat([results, self._judged(self.judge, batch, generators).to(results)], dim=1)

    def _judged(self, judge: Judge, batch: Sequence[dict[str, Any]], generators: Sequence[torch.Generator]) -> Tensor:
        """Rewards of each sample's picture, as the student's users draw it: from the same noise, to the end."""
        # Each forward pass of a sharded denoiser is one of all processes: pictures that nobody judges are drawn too
        chosen = [row for row, own in enumerate(batch) if self.shards_parameters or judge.judges(own[TEACHER])]
        images: list[Any] = [None] * len(batch)
        seeded = [torch.Generator().manual_seed(generators[row].initial_seed()) for row in chosen]
        rows = [batch[row] for row in chosen]
        drawn = self.pictures.call(rows, seeded, lambda row, x: self.watch("picture", row[TEACHER], x), checker=False)
        for row, image in zip(chosen, drawn, strict=True):
            images[row] = image
        if self.nan_policy.has_found("picture"):  # what is in place of numbers is no result
            return torch.zeros(len(batch), 1 + len(judge.rewards.all_names))
        return judge.table(batch, images, self.state)

    def _evaluation_metrics(self, table: Tensor) -> dict[str, Tensor]:
        metrics = {"loss": table[:, 1].mean(), "kl": table[:, 2].mean()}
        for index, key in enumerate(self.tasks):
            if (mask := table[:, 0] == index).any():
                metrics[f"kl/{key}"] = table[mask, 2].mean()
        return metrics if self.judge is None else metrics | self.judge.metrics(table[:, 0], table[:, 3:])

    @torch.no_grad()
    def _evaluate_rows(
        self, task: str, rows: Sequence[dict[str, Any]], generators: list[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        losses, kls = [], []
        student, teachers = self._inputs(task, rows)
        with (
            self.teachers.on_device(task) as teacher,
            self.student.policy.walk(student, generators, self._move(generators)) as walk,
            teacher.follow(walk, teachers) as follow,
        ):
            for visit in walk.visits(self.learnt):
                targets = follow(visit)
                loss, kl = self._divergence(visit, targets)
                self._watch_visit(task, visit, targets, loss)
                losses.append(loss)
                kls.append(kl)
        self.cache.clear()
        return torch.stack(losses).mean(0), torch.stack(kls).mean(0)

    # What a checkpoint and a card say about the teachers

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.teachers.write_manifest(output_dir or self.args.output_dir)

    def _made_of(self) -> dict[str, Any]:
        teachers = {
            key: {"call_kwargs": t.spec.overrides, "columns": t.spec.columns, "scale": t.spec.scale}
            for key, t in self.loaded_teachers.items()
        }
        return super()._made_of() | plain({"teachers": teachers})

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if resume_from_checkpoint is not None:
            self.teachers.check_manifest(resume_from_checkpoint)
        self._micro_step = 0
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    @property
    def _published_names(self) -> set[str]:
        return super()._published_names | {MANIFEST_NAME}

    def _card_fields(self) -> dict[str, Any]:
        names = (
            "transition noise_level objective num_inference_steps timestep_fraction guidance_scale learning_rate "
            "per_device_train_batch_size gradient_accumulation_steps max_grad_norm ema_decay seed"
        ).split()
        settings = {name: getattr(self.args, name) for name in names} | {"transition": self.kernel.func.name}
        return {"teachers": self.teachers.card_rows(), "settings": settings | self._run_settings()}


def _columns_of(teacher: LoadedTeacher, data: Data, call_kwargs: Mapping[str, Any]) -> dict[str, str]:
    """The column of each argument of a teacher's `__call__`: the student's, if that takes them, or its own.

    Raises:
        ValueError: if it names an argument that is not there.
    """
    spec = teacher.spec
    cls: Any = type(teacher.pipeline)
    taken = signature(cls.__call__).parameters
    if unknown := sorted(spec.columns.keys() - taken.keys()):
        raise ValueError(
            f"teacher {teacher.id!r}: `columns` names {unknown}, which {cls.__name__} does not take; it takes "
            f"{sorted(sample_arguments(cls))}."
        )
    if lacking := sorted({*data.columns, *call_kwargs} - taken.keys()):
        logger.warning(f"Teacher {teacher.id!r} is asked without {lacking}, which {cls.__name__} does not take.")
    return data.columns_of_party(cls, spec.columns, spec.overrides)
