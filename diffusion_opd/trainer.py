"""DiffusionOPDTrainer: one student learns on its own trajectories from many specialists (DiffusionOPD, arXiv
2605.15055).

Reads as the paper's Algorithm 1: each optimizer step visits every task; the student denoises its prompts; at every
state it visits, the task's teacher says what it would have done there; the closed-form divergence of the two steps is
backpropagated at once. Rollout and gradient are one pass through the pipeline's own `__call__` (see policy.py).

Which states these are (queries.py), what the right answer would have been (targets.py) and how far it is
(objectives.py) are choices; so is an anchor, at the same states or on real pictures.
"""

import contextlib
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from operator import itemgetter
from types import TracebackType
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import set_seed

from . import objectives
from .anchor_data import AnchorData, Noised
from .checks import own_arguments, turns_of_a_micro_batch, whole_cycles, whole_parts
from .config import DiffusionOPDConfig, check_call_kwargs
from .data import Data
from .engines import held_gradient_sync
from .guidance import at_scale, rows_asked, scale_argument, unguided_scale
from .inputs import PROMPT, inputs_of
from .losses import DistillationLoss, Terms
from .parties import Answers, Call, Group, Parties, Rows, named
from .policy import Follower, Move, Policy, Visit, Walk
from .queries import QUERIES
from .rewards.functions import Rewards
from .rewards.judge import Judge
from .rewards.registry import load_rewards
from .runs import hash_data
from .sampling import (
    SEED_ANCHOR,
    SEED_QUERY,
    SEED_TRAIN,
    TEACHER,
    MicroBatch,
    Turns,
    micro_batches,
    noise_generators,
    normal,
    seed_of,
)
from .scheduler_proxy import Step
from .startup import can_jump, require_independence, walked_through
from .student import load_student
from .taught import TaughtTrainer
from .transitions import velocity_gap

logger = get_logger(__name__)


@dataclass
class Asked:
    """What a micro-batch asks: the calls of the pipeline, and the student at real pictures."""

    calls: list[Call]
    real: list[tuple[Noised, Follower]]

    def start(self) -> None:
        """Runs all of it up to the first forward pass of a denoiser."""
        for call in self.calls:
            call.start()
        for noised, follow in self.real:
            follow.start(noised.visit)

    def close(self, failed: bool = False) -> None:
        """Ends what has begun."""
        with contextlib.ExitStack() as stack:  # each, whatever another one raises
            for call in self.calls:
                stack.callback(call.close, failed)
            for _, follow in self.real:
                stack.callback(follow.close, failed)

    def __enter__(self) -> "Asked":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close(failed=error is not None)


class DiffusionOPDTrainer(TaughtTrainer):
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
        anchor (the same as one of `teachers`, *optional*):
            A frozen reference that no task has: the loss holds `anchor_beta` times the student's distance to it, at all
            states of all tasks (Flow-OPD's aesthetic teacher). `"base"`, here or as `args.anchor`: the student before
            training.
        anchor_dataset (`Dataset`, *optional*):
            Real pictures, columns `prompt` and `target_image` (or `image`, if that is nothing that the pipeline takes):
            each micro-batch adds `anchor_data_beta` times the flow-matching loss, without guidance, at as many of them,
            noised to one of the run's noise levels (LIFT).

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
        anchor: Any = None,
        anchor_dataset: Dataset | None = None,
    ):
        args = own_arguments(model, args, DiffusionOPDConfig, self._name)
        specs, ids = named(teachers, anchor, args)
        if anchor_dataset is None and args.anchor_data_beta is not None:
            raise ValueError(
                "`anchor_data_beta` is for an `anchor_dataset`, and there is none; give one, or leave it out."
            )
        if anchor_dataset is not None and args.anchor_data_beta is None and args.objective != "velocity":
            raise ValueError(
                f"give `anchor_data_beta` beside `objective={args.objective!r}`: LIFT's 0.1 weighs against a distance "
                "of velocities, of which the KL of an ODE step is a thousandth; or choose `objective='velocity'`."
            )
        for key, spec in specs.items():
            check_call_kwargs(spec.call_kwargs, {"guidance_scale": spec.guidance_scale}, f"teacher {key!r}")
        if eval_reward_funcs is not None:
            rewards = Rewards(load_rewards(eval_reward_funcs), name="eval_reward_funcs")
            if unknown := sorted(set(rewards.tasks or ()) - set(ids)):
                raise ValueError(f"`eval_reward_funcs` names {unknown}, but the teachers are {ids}.")
            self.judge = Judge(rewards, ids, TEACHER)
        weigh = [] if args.teacher_weight_column is None else [args.teacher_weight_column]
        data = Data(train_dataset, eval_dataset, ids, TEACHER, args.input_columns, weigh)
        if weigh and isinstance(data.train, Dataset) and weigh[0] in data.train.column_names:
            for row, weight in enumerate(data.train.with_format(None)[weigh[0]]):
                _check_weight(weight, weigh[0], f"row {row} of train_dataset")
        if (evaluation := data.evaluation) is not None:
            evaluated = evaluation.unique(TEACHER) if isinstance(evaluation, Dataset) else ids
            metrics = ["loss", "kl", *(f"kl/{key}" for key in ids if key in evaluated)]
            metrics += self.judge.metric_names(evaluated) if self.judge is not None else []
            self._check_best_metric(args, metrics, callbacks)
            if self.judge is not None and isinstance(evaluation, Dataset):
                self.judge.rewards.check_columns(evaluation.column_names)
        if args.task_sampling == "cycle":
            whole_cycles(args, ids, args.weights_by_task)
        whole_parts(args, turns_of_a_micro_batch(args, ids))
        self._hides_columns = args.remove_unused_columns
        if self.judge is not None:  # they are given all columns
            args.remove_unused_columns = False

        set_seed(args.seed)
        own_columns = {key: spec.columns for key, spec in specs.items()}
        fit = partial(data.fit, call_kwargs=args.pipeline_kwargs, others=own_columns)
        pipeline = load_student(model, args, peft_config, fit, student_lora)
        self.load_teachers(specs, pipeline, args, data, goes_on=student_lora is not None)
        self.anchor_data: AnchorData | None = None
        if anchor_dataset is not None:
            self.anchor_data = AnchorData(anchor_dataset, pipeline, args.input_columns, args.seed)
        super().__init__(
            pipeline,
            args,
            data,
            named=peft_config if isinstance(peft_config, Mapping) else (),
            start=student_lora,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.place_teachers()
        self._read = deque[list[MicroBatch]]()  # of the optimizer steps that come
        self._step: list[MicroBatch] = []  # of this one
        self.parties = Parties(
            args,
            self.teachers,
            self.teacher_columns,
            self.pipeline,
            data,
            self.policy_of,
            self.untrained,
            self.stopwatch.section,
        )
        self._check_parties()
        for denoiser in {self.model, *self.parties.denoisers}:
            self._compile(denoiser)

    def _check_parties(self) -> None:
        """Asks everybody once: refuses what does not fit, warns about a teacher with nothing to teach."""
        args = self.args
        noise_level: Any = args.noise_level  # a number since `__post_init__`
        needs_noise = noise_level > 0 and objectives.OBJECTIVES[args.objective].divides_by_std
        self.kernel = self.choose_kernel(args.transition, noise_level, needs_noise)
        if self.checked.crosses and args.query != "first":
            raise ValueError(
                f"`query={args.query!r}` leaves steps out, and the gradient of {type(self.pipeline).__name__} crosses "
                "its denoising steps: what its first step computes is used in later ones; leave it out."
            )
        self.loss = DistillationLoss(args, self.kernel, self.parties.reach)
        self.student.policy.timing = partial(self.stopwatch.section, "student")
        for task in self.tasks:
            self.parties.check(task, *self.check_task(task, anew=self.parties.differ(task)))
        if self.anchor_data is not None:
            self._check_anchor_data(self.anchor_data)
        self._settle_plan()
        self._begin_ahead(map(self._example, self.tasks))
        self._report_check()

    def _example(self, task: str) -> Asked:
        """What a micro-batch of the first rows of a task asks."""
        rows = [{**row, TEACHER: task} for row in self.check_task(task)[0]]
        return self._ask(self.model, MicroBatch(rows, 0, 0, [0]))

    def _check_anchor_data(self, data: AnchorData) -> None:
        require_independence(self.student.policy, self.checked, "an `anchor_dataset`")
        name, given = scale_argument(type(self.pipeline)), self.args.pipeline_kwargs

        def policy_at(scale: float) -> Policy:
            return self.policy_of(self.pipeline, None, at_scale(given, scale, name))

        off = None if name is None else unguided_scale(policy_at, self.checked)
        self._unguided = self.policy_of(self.pipeline) if off is None else policy_at(off)
        self._unguided.timing = partial(self.stopwatch.section, "student")
        rows, checked = self.check_task(None)
        count = rows_asked(self._unguided, checked) / len(rows)
        if count > 1:
            logger.warning(
                f"{type(self.pipeline).__name__} is asked for {count:g} branches a sample where real pictures are "
                "learnt from, so under a guidance that is no `guidance_scale`; turn that off in `call_kwargs`, or in "
                "its guider."
            )
        path = walked_through(checked, inputs_of(rows, self.data.columns))
        if not can_jump(self._unguided, path):
            raise ValueError(
                f"{type(self.pipeline).__name__} cannot be asked at a noised picture: its prediction depends on the "
                "steps before it; leave the `anchor_dataset` out."
            )
        data.noised(self._unguided, [0], self.checked.learnt[0])

    # Algorithm 1

    def _query(self) -> list[int]:
        """The visits at which the walks of this optimizer step learn: of the seed and the step alone, and so the same
        on all processes."""
        query, candidates = QUERIES[self.args.query], self.learnt
        rng = np.random.default_rng(seed_of(self.args.seed, SEED_QUERY, self.state.global_step))
        chunks, count = [self.plan[place].chunk for place in candidates], self.args.num_queries or 1
        chosen = query.choose(chunks, min(count, len(candidates)), rng, self.args.query_shape)
        return [candidates[number] for number in chosen]

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[dict[str, Any]]], num_batches: int, device: torch.device
    ) -> tuple[list[MicroBatch], None]:
        """The micro-batches of an optimizer step, read together with those of the steps whose walks begin together."""
        if not self._read:
            first = self.state.global_step
            for step in range(first, min(first + (self.args.encode_ahead or 1), self.state.max_steps)):
                batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
                if not batches:  # the end of an epoch
                    break
                self._read.append(micro_batches(batches, step, self._parts, itemgetter(TEACHER)))
        self._step = self._read.popleft() if self._read else []
        return self._step, None

    def training_step(  # type: ignore[override]  # Trainer says a dict of tensors; `get_batch_samples` gives these
        self, model: nn.Module, inputs: MicroBatch, num_items_in_batch: Any = None
    ) -> Tensor:
        """One micro-batch: the student walks, the task's teacher follows, and each visit has its backward pass."""
        self._begin_micro_batch(model)
        places, losses = self._query(), []
        tasks = dict.fromkeys(row[TEACHER] for row in inputs)  # one, if they are not mixed
        with self._asked(model, inputs) as asked:
            calls = asked.calls  # one, but of a pipeline that takes one sample a call
            scale = 1 / (len(calls) * len(places) * self.current_gradient_accumulation_steps)
            passes = len(calls) * (1 if self.crosses else len(places))
            with (
                self.parties.of_tasks_on_device(*tasks),
                held_gradient_sync(self.accelerator, model, passes + len(asked.real)) as release_sync,
            ):
                self.parties.fetch(*self._next_tasks(inputs))
                held = [self._flow_matching(inputs[0][TEACHER], *real, len(asked.real)) for real in asked.real]  # LIFT
                for call in calls:
                    with call:
                        whole = list[Tensor]()
                        for visit in call.walk.visits(places, release_sync if call is calls[-1] else None, call.passed):
                            loss = torch.cat([self._compared(group, visit) for group in call.groups]).mean()
                            losses.append(loss.detach())
                            if self.crosses:
                                whole.append(loss * scale)
                            else:
                                self._backward(loss * scale)  # Eq. 15; one graph lives at a time
                            del loss
                        if self.crosses:
                            self._backward(torch.stack(whole).sum())
        self._end_micro_batch()
        return (torch.stack(losses).mean() + sum(held)) / self.current_gradient_accumulation_steps

    def _next_tasks(self, batch: MicroBatch) -> list[str]:
        """Of the micro-batch that comes next; none in the first optimizer step, whose memory nobody knows yet."""
        coming = next(iter(chain(self._step[batch.number + 1 :], *self._read)), None)
        if coming is None or self.state.global_step == self._initial_global_step:
            return []
        return [coming[part.start][TEACHER] for part in coming.parts]

    def _compared(self, group: Group, visit: Visit) -> Tensor:
        """The loss of each sample of a task at a visit."""
        own = group.of(visit)
        answers = group.follow(visit)  # what the specialist does at these very states
        terms = self.loss(group.task, own, answers, group.weights)  # Eq. 10-12
        self._note(group.task, own, answers, terms)
        return terms.loss

    def _asked(self, model: nn.Module, batch: MicroBatch) -> Asked:
        """What a micro-batch asks, begun ahead if the configuration wants it."""
        if self.ahead is None:
            return self._ask(model, batch)
        if not self.ahead:
            coming = chain(self._step[batch.number :], *self._read)
            self.ahead.begin(partial(self._ask, model, one) for one in coming)
        return self.ahead.take()

    def _ask(self, model: nn.Module, batch: MicroBatch) -> Asked:
        generators: list[torch.Generator] = []
        for part, turn in zip(batch.parts, batch.turns, strict=True):
            task = self.tasks.index(batch[part.start][TEACHER])
            generators += self._generators(len(part), SEED_TRAIN, batch.step, task, turn)
        asked = Asked([], [])
        for call in self.calls(batch):
            rows = [batch[row] for row in call]
            walk = self._walk(rows, [generators[row] for row in call], model)
            asked.calls.append(Call(walk, list(self._groups(walk, rows, model))))
        for real in [] if self.anchor_data is None else self._real_pictures(self.anchor_data, batch):
            follow = self._unguided.follow(inputs=real.inputs, generators=real.generators, denoiser=model)
            asked.real.append((real, follow))
        return asked

    def _groups(self, walk: Walk, rows: Rows, model: nn.Module) -> Iterator[Group]:
        first = 0
        for task, own in groupby(rows, itemgetter(TEACHER)):
            its = list(own)
            place = None if len(its) == len(rows) else range(first, first + len(its))
            yield Group(task, place, self.parties.follow(task, walk, its, model, place), self._teacher_weights(its))
            first += len(its)

    def _walk(self, rows: Sequence[dict[str, Any]], generators: list[torch.Generator], model: Any = None) -> Walk:
        inputs = inputs_of(rows, self.data.columns)
        return self.student.policy.walk(inputs, generators, self._move(generators), denoiser=model)

    def _move(self, generators: list[torch.Generator]) -> Move:
        """Where a walk goes: the policy is the student's own."""
        noise = noise_generators(generators)

        def move(step: Step) -> Tensor:
            transition = self.kernel(step.sample, step.prediction, step.schedule, step.index)
            if transition.std == 0:
                return transition.mean
            return transition.sample(normal(transition.mean.shape, noise, transition.mean.device))

        return move

    # An anchor on real pictures

    def _real_pictures(self, data: AnchorData, batch: MicroBatch) -> list[Noised]:
        """Those of a micro-batch, by calls of the pipeline, all at the noise level of one of the states that are learnt
        from."""
        args, count = self.args, self.args.per_device_train_batch_size
        done = batch.step * args.gradient_accumulation_steps + batch.number
        rng = np.random.default_rng(seed_of(args.seed, SEED_ANCHOR, done, 0))
        visit = self.learnt[int(rng.integers(len(self.learnt)))]
        first = (done * self.accelerator.num_processes + self.accelerator.process_index) * count
        calls = data.calls(range(first, first + count), self.together)
        return [data.noised(self._unguided, places, visit) for places in calls]

    def _flow_matching(self, task: str, at: Noised, follow: Follower, num_calls: int) -> Tensor:
        """What a call of real pictures adds to the loss, after its backward pass."""
        (step,) = at.visit.steps
        with follow:
            (prediction,) = follow(at.visit)
            gap = velocity_gap(step.sample, prediction, at.x_0, at.noise, step.schedule, step.index)
            loss = objectives.mean_per_sample(gap**2).mean()
            self.record("anchor_data", loss)
            self.watch("loss", task, loss)
            beta = 0.1 if self.args.anchor_data_beta is None else self.args.anchor_data_beta
            loss = beta * loss / num_calls
            self._backward(loss / self.current_gradient_accumulation_steps)
        return loss.detach()

    def _teacher_weights(self, rows: Sequence[Mapping[str, Any]]) -> Tensor | None:
        if (column := self.args.teacher_weight_column) is None:
            return None
        weights = [row.get(column) for row in rows]
        for weight, row in zip(weights, rows, strict=True):
            _check_weight(weight, column, f"the row with the prompt {row.get(PROMPT)!r}")
        return torch.tensor(weights, dtype=torch.float32, device=self.accelerator.device)

    def _note(self, task: str, visit: Visit, answers: Answers, terms: Terms) -> None:
        """Metrics of a visit, and the watch for NaN."""
        self._watch_visit(task, visit, answers, terms.loss)
        for name in ("kl", f"kl/{task}", f"kl_step/{visit.index}"):
            self.record(name, terms.kl.mean())
        if not self.loss.is_kl:
            self.record(f"loss/{task}", terms.distilled.mean())
            self.record(f"loss_step/{visit.index}", terms.distilled.mean())
        for name, term in terms.logged.items():
            self.record(name, term.mean())
            if len(self.tasks) > 1:
                self.record(f"{name}/{task}", term.mean())

    def _watch_visit(self, task: str, visit: Visit, answers: Answers, loss: Tensor) -> None:
        for step in visit.steps:
            self.watch("student", task, step.prediction)
        for name, predictions in answers.items():
            party = {"student": "student", "teacher": "teacher", "conditional": "teacher"}.get(name, "reference")
            for prediction in predictions:
                self.watch(party, task, prediction)
        self.watch("loss", task, loss)

    @property
    def _turns(self) -> Turns:
        args, weights = self.args, [self.args.weights_by_task.get(task, 1) for task in self.tasks]
        if args.task_sampling == "random":
            return Turns(len(self.tasks), args.gradient_accumulation_steps, weights, at_random=True)
        if args.task_sampling == "mixed":
            processes = self.accelerator.num_processes
            return Turns(len(self.tasks), args.gradient_accumulation_steps, weights, shared_by=processes)
        return Turns(len(self.tasks), args.gradient_accumulation_steps // int(sum(weights)), weights)

    @property
    def _parts(self) -> int:
        return turns_of_a_micro_batch(self.args, self.tasks)

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
        with (
            self.parties.of_tasks_on_device(task),
            self._walk(rows, generators) as walk,
            self.parties.follow(task, walk, rows) as follow,
        ):
            for visit in walk.visits(self.learnt, passed=follow.passed):
                answers = follow(visit)
                terms = self.loss(task, visit, answers)
                self._watch_visit(task, visit, answers, terms.loss)
                losses.append(terms.loss)
                kls.append(terms.kl)
        self.cache.clear()
        return torch.stack(losses).mean(0), torch.stack(kls).mean(0)

    # What a checkpoint and a card say about the run

    def _made_of(self) -> dict[str, Any]:
        own = super()._made_of()
        if self.anchor_data is not None:
            data = self.anchor_data
            own["anchor_dataset"] = hash_data(data.dataset, [data.picture, *data.columns.values()])
        return own

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        self._read.clear()
        return super()._prepare_for_training(*args, **kwargs)

    def _card_fields(self) -> dict[str, Any]:
        names = (
            "transition noise_level objective num_inference_steps timestep_fraction guidance_scale learning_rate "
            "per_device_train_batch_size gradient_accumulation_steps max_grad_norm ema_decay seed"
        ).split()
        settings = {name: getattr(self.args, name) for name in names} | {"transition": self.kernel.func.name}
        plainest = DiffusionOPDConfig.__dataclass_fields__
        settings |= {name: value for name in _CHOICES if (value := getattr(self.args, name)) != plainest[name].default}
        if self.anchor_data is not None:
            settings["anchor_dataset"] = f"{len(self.anchor_data.dataset)} pictures"
        return super()._card_fields() | {"settings": settings | self._run_settings()}


# Of the configuration, what makes the run another method; a card names those that are not as they are by default
_CHOICES = (
    "query num_queries query_beta target_extrapolation target_ref guidance_split teacher_weight_column anchor "
    "anchor_beta anchor_objective anchor_data_beta task_weights task_sampling"
).split()


def _check_weight(weight: Any, column: str, where: str) -> None:
    if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not 0 <= weight <= 1:
        raise ValueError(f"the `{column}` of {where} must be a number in [0, 1], got {weight!r}.")
