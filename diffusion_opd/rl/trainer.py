"""What learning from rewards shares: groups of samples, their rewards and advantages, and the policies to compare with.

One rollout: all of its micro-batches are drawn and judged (a group may lie in several of them, and in several
processes), then learnt from, a window of them in each optimizer step. `get_batch_samples` of transformers' Trainer
hands out a whole window, so that is where rollouts happen.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import dropwhile
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import set_seed

from ..checkpoints import give_ordinary_mode, is_checkpoint
from ..checks import own_arguments, whole_cycles
from ..config import check_call_kwargs
from ..data import Data, check_no_splits, stream_columns, tasks_in
from ..decoding import CHECKER, has_checker, takes_no_checker
from ..engines import held_gradient_sync
from ..errors import one_sentence
from ..files import read_json
from ..inputs import PROMPT, Inputs, inputs_of, packed, unpacked
from ..parties import Call, Following, Group
from ..policy import Follower, Move, Policy, Visit, Walk
from ..rewards.functions import Rewards
from ..rewards.judge import Judge
from ..rewards.statistics import combine, nanstd
from ..runs import plain
from ..sampling import SEED_TRAIN, TASK
from ..scheduler_proxy import Step, Times
from ..startup import Checked, can_jump, check_teacher, require_independence, walked_through
from ..student import load_student
from ..taught import TaughtTrainer
from ..teachers import Teacher, name_teachers
from ..transitions import BoundKernel, Schedule
from .config import DiffusionRLConfig
from .objectives import group_advantages

logger = get_logger(__name__)

Answers = dict[str, tuple[Tensor, ...]]  # by policy, one prediction a stream of a visit

MANIFEST_NAME = "reward_manifest.json"


@dataclass
class Rollout:
    """Samples of one call of the pipeline: a micro-batch, or one of it.

    Attributes:
        task (`str`): Of all samples.
        inputs (`Inputs`): What they were made of.
        teacher_inputs (`Inputs`, *optional*): What the teacher is told of them, if that is something else.
        place (`int`): Which of its task's micro-batches of the rollout.
        rows (`list[int]`): Which samples of that micro-batch.
        schedule (`Schedule`): The noise levels.
        tensors (`dict[str, Tensor]`): What the trainer keeps of the samples.
        advantages (`Tensor`): `[samples]`.
    """

    task: str
    inputs: Inputs
    place: int
    rows: list[int]
    schedule: Schedule
    tensors: dict[str, Tensor]
    advantages: Tensor
    teacher_inputs: Inputs | None = None


@dataclass
class Compared:
    """Policies that are asked at visits of a rollout: the trained one, and those that it is compared with."""

    rollout: Rollout
    visits: list[Visit]
    trained: Follower
    frozen: dict[str, Follower]


@dataclass
class Asked:
    """What a micro-batch asks."""

    compared: list[Compared]

    def start(self) -> None:
        """Runs all of it up to the first forward pass of a denoiser."""
        for one in self.compared:
            if one.visits:
                with torch.no_grad():
                    for follow in one.frozen.values():
                        follow.start(one.visits[0])
                one.trained.start(one.visits[0])

    def close(self, failed: bool = False) -> None:
        """Ends what has begun."""
        with contextlib.ExitStack() as stack:  # each, whatever another one raises
            for one in self.compared:
                for follow in (one.trained, *one.frozen.values()):
                    stack.callback(follow.close, failed)

    def __enter__(self) -> "Asked":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close(failed=error is not None)


class DiffusionRLTrainer(TaughtTrainer):
    """
    Base of the trainers that learn from rewards.

    Everything that its user sees is described at [`DiffusionNFTTrainer`] and [`DiffusionGRPOTrainer`].
    """

    args: DiffusionRLConfig
    judge: Judge

    _config_class = DiffusionRLConfig
    _section = "policy"
    _asks_anywhere = True  # at states of its own choice, and not where the policy has been, step by step

    def __init__(
        self,
        model: str | os.PathLike | DiffusionPipeline,
        reward_funcs: Any,
        args: DiffusionRLConfig | None = None,
        train_dataset: Dataset | IterableDataset | Mapping[str, Any] | None = None,
        eval_dataset: Dataset | IterableDataset | Mapping[str, Any] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        peft_config: LoraConfig | Mapping[str, LoraConfig] | None = None,
        student_lora: Any = None,
        teachers: Any = None,
    ):
        args = own_arguments(model, args, self._config_class, self._name)
        specs = {} if teachers is None else name_teachers(teachers)
        for key, spec in specs.items():
            check_call_kwargs(spec.call_kwargs, {"guidance_scale": spec.guidance_scale}, f"teacher {key!r}")
        self.rewards = Rewards(reward_funcs, args.reward_weights)
        tasks = self.rewards.tasks
        if tasks is None:
            given = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
            tasks = _tasks_of(*next((item for item in given.items() if item[1] is not None), ("", None)))
        specs = self._taught(args, specs, tasks)
        data = Data(train_dataset, eval_dataset, tasks, TASK, args.input_columns)
        self.judge = Judge(self.rewards, tasks, TASK)
        if (evaluation := data.evaluation) is not None:
            evaluated = evaluation.unique(TASK) if isinstance(evaluation, Dataset) else tasks
            self._check_best_metric(args, self.judge.metric_names(evaluated), callbacks)
        for dataset in (data.train, data.evaluation):
            if isinstance(dataset, Dataset):
                self.rewards.check_columns([PROMPT, TASK] if args.remove_unused_columns else dataset.column_names)
        whole_cycles(args, tasks)
        args.steps_per_generation = args.steps_per_generation or args.gradient_accumulation_steps
        _check_groups(args, len(tasks))
        self._repetition = {"repeats": args.num_generations, "iterations": args.num_iterations}

        set_seed(args.seed)
        own_columns = {key: spec.columns for key, spec in specs.items()}
        fit = partial(data.fit, call_kwargs=args.pipeline_kwargs, others=own_columns)
        pipeline = load_student(model, args, peft_config, fit, student_lora)
        self.load_teachers(specs, pipeline, args, data, goes_on=student_lora is not None)
        super().__init__(
            pipeline,
            args,
            data,
            named=peft_config if isinstance(peft_config, Mapping) else (),
            start=student_lora,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._rollouts: list[list[Rollout]] = []  # by micro-batch
        self._read_ahead = 0  # optimizer steps whose rows have been read
        self._require_fitting()
        self._warn_of_checker()
        self._state_dtype = self.checked.visits[0].steps[0].sample.dtype
        self._ode = self.choose_kernel("ode", 0.0, needs_noise=False)
        self.place_teachers()
        self.base = self.untrained() if args.beta > 0 else None
        self._prepare()
        self._check_teachers()
        self._settle_plan()
        self._begin_ahead(map(self._example, self.tasks))
        self._report_check()
        frozen = [policy for task in self.tasks for policy in self._compared(task).values()]
        for denoiser in {self.model, *(policy.denoiser for policy in frozen)}:
            self._compile(denoiser)

    def _taught(self, args: Any, specs: Mapping[str, Teacher], tasks: Sequence[str]) -> dict[str, Teacher]:
        """The teachers by task: a single one of a single task whatever its id.

        Raises:
            ValueError: if one has no task, or the configuration does not fit.
        """
        if not specs:
            if args.distill_beta is not None:
                raise ValueError(
                    f"`distill_beta={args.distill_beta}` weighs the distance to the `teachers`, and there are none; "
                    "give some, or leave it out."
                )
            return {}
        if len(specs) == len(tasks) == 1:
            (spec,) = specs.values()
            return {tasks[0]: replace(spec, id=tasks[0])}
        if unknown := sorted(specs.keys() - set(tasks)):
            raise ValueError(f"the teachers {unknown} have no task; the tasks are {list(tasks)}.")
        return dict(specs)

    def _require_fitting(self) -> None:
        """Refuses a pipeline that this trainer cannot learn with."""
        require_independence(self.student.policy, self.checked)
        self._require_jumping(self.student.policy, self.check_task(None)[0], self.data.columns, self.checked)

    def _require_jumping(
        self, policy: Policy, rows: Sequence[dict[str, Any]], columns: Mapping[str, str], checked: Checked
    ) -> None:
        path = walked_through(checked, inputs_of(rows, self.data.columns))
        if not can_jump(policy, path, inputs_of(rows, columns)):
            raise ValueError(
                f"{policy.name} cannot be asked at a given state: its prediction depends on the steps before it."
            )

    def _check_teachers(self) -> None:
        """Asks each teacher once."""
        for task, teacher in self.teachers.items():
            rows, checked = self.check_task(task, anew=self.teacher_columns[task] != self.data.columns)
            inputs, source = inputs_of(rows, self.teacher_columns[task]), self.loaded_teachers[task].spec.source
            with self.teachers.on_device(task), one_sentence(f"teacher {task!r} ({source})"):
                check_teacher(teacher, checked, inputs)
                if self._asks_anywhere:
                    self._require_jumping(teacher, rows, self.teacher_columns[task], checked)

    def _example(self, task: str) -> Call:
        """A walk of the first rows of a task, and all policies that are asked at rollouts of it."""
        rows, _ = self.check_task(task)
        generators = self._generators(len(rows), SEED_TRAIN, 0, 0, 0)
        walk = self.student.policy.walk(inputs_of(rows, self.data.columns), generators, partial(_move, self._ode))
        told = {"teacher": self._teacher_inputs(task, rows)}
        compared = self._compared(task).items()
        followers = {name: policy.follow(walk, told.get(name)) for name, policy in compared}
        return Call(walk, [Group(task, None, Following(followers, {}, []))])

    def _warn_of_checker(self) -> None:
        if not has_checker(self.pipeline):
            return
        judged = "they are judged as it leaves them"
        if takes_no_checker(self.pipeline):
            judged = "in rollouts and evaluation it has no part, in sample pictures and the saved pipeline it has"
        logger.warning(f"The {CHECKER} of {type(self.pipeline).__name__} changes pictures: {judged}.")

    def _prepare(self) -> None:
        """What a trainer adds at the end of `__init__`."""

    # Rollouts

    @property
    def _windows(self) -> int:
        """Optimizer steps on one rollout until each of its samples was learnt from once."""
        steps: Any = self.args.steps_per_generation  # a number since `__init__`
        return steps // self.args.gradient_accumulation_steps

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps on one rollout."""
        return self._windows * self.args.num_iterations

    @property
    def _cycles(self) -> int:
        return super()._cycles * self._windows  # the rows of a rollout come together, and then again

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[dict[str, Any]]], num_batches: int, device: torch.device
    ) -> tuple[list[list[Rollout]], None]:
        window = self.state.global_step % self.steps_per_rollout
        if window == 0:
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches * self._windows, device)
            if not batches:
                return [], None
            with self.whole_pipeline(), self.rewards.at_work():
                self._rollouts, self._read_ahead = self._generate(batches), self._windows - 1
        elif self._read_ahead:
            self._read_ahead -= 1
        else:  # the rows of a rollout that there is: of a later iteration, or of a run that was resumed
            super().get_batch_samples(epoch_iterator, num_batches, device)
        first = window % self._windows * num_batches
        return self._rollouts[first : first + num_batches], None

    @torch.no_grad()
    def _generate(self, batches: Sequence[list[dict[str, Any]]]) -> list[list[Rollout]]:
        """Samples for the batches of one rollout, with their advantages."""
        self.model.eval()
        drawn, is_broken = [], False
        rewards: dict[str, list[Tensor]] = {task: [] for task in self.tasks}
        for index, batch in enumerate(batches):
            task, place = batch[0][TASK], index // len(self.tasks)
            generators = self._generators(len(batch), SEED_TRAIN, self.state.global_step, self.tasks.index(task), place)
            images: list[Any] = [None] * len(batch)
            for rows in self.calls(batch):
                inputs = inputs_of([batch[row] for row in rows], self.data.columns)
                with self.stopwatch.section("rollout"):
                    schedule, tensors, made = self._roll_out(task, inputs, [generators[row] for row in rows])
                for row, image in zip(rows, made, strict=True):
                    images[row] = image
                told = self._teacher_inputs(task, [batch[row] for row in rows])
                drawn.append((index, task, inputs, place, rows, schedule, tensors, told))
            self.cache.clear()
            with self.stopwatch.section("reward"):
                if self.nan_policy.has_found("picture"):  # nobody is asked for what is not learnt from
                    rewards[task].append(torch.zeros(len(batch), len(self.rewards.names(task))))
                    is_broken = True
                else:
                    rewards[task].append(self.rewards(task, batch, images, self.state))
        advantages = {task: self._advantages(task, torch.stack(rewards[task])) for task in self.tasks}
        rollouts: list[list[Rollout]] = [[] for _ in batches]
        for index, task, inputs, place, rows, schedule, tensors, told in drawn:
            own = advantages[task][place][rows]
            if is_broken:  # no window of it is learnt from: its groups may lie in several
                own = torch.full_like(own, torch.nan)
            rollouts[index].append(Rollout(task, inputs, place, rows, schedule, tensors, own, told))
        return rollouts

    def _teacher_inputs(self, task: str, rows: Sequence[Mapping[str, Any]]) -> Inputs | None:
        columns = self.teacher_columns.get(task, self.data.columns)
        return None if columns == self.data.columns else inputs_of(rows, columns)

    def _drawing(
        self, policy: Policy, task: str, inputs: Inputs, generators: list[torch.Generator], move: Move
    ) -> Walk:
        """A walk to pictures that are judged, which says whether there was NaN or Inf before they were pixels."""
        watch = partial(self.watch, "picture", task)
        return policy.walk(inputs, generators, move, output_type="pil", decoded=watch)

    def _roll_out(
        self, task: str, inputs: Inputs, generators: list[torch.Generator]
    ) -> tuple[Schedule, dict[str, Tensor], Any]:
        """Samples of the policy that a trainer rolls out: the schedule, what it keeps, and the images."""
        raise NotImplementedError

    def _advantages(self, task: str, rewards: Tensor) -> Tensor:
        """Advantages of this process's samples from `rewards`, `[micro-batches, batch, functions]`."""
        count, batch, _ = rewards.shape
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        # In the order of the sampler, in which a group's samples come in succession
        rewards = self.accelerator.gather(rewards.to(self.accelerator.device).contiguous())
        rewards = rewards.view(world, count, batch, -1).transpose(0, 1).flatten(0, 2)
        weights = torch.tensor(self.rewards.weights(task), device=rewards.device)
        total = combine(rewards, weights)
        advantages, group_std = group_advantages(total, self.args.num_generations, self.args.scale_rewards)
        if total.isnan().all():
            logger.warning_once(
                f"No reward function applies to any sample of task {task!r}: nothing is learnt from them."
            )
        else:
            self.record("reward", total.nanmean())
            self.record("reward_std", nanstd(total))
            self.record("group_reward_std", group_std.nanmean())
            self.record("frac_reward_zero_std", (group_std.nan_to_num(0.0) < 1e-8).float().mean())
            if len(self.tasks) > 1:
                self.record(f"reward/{task}", total.nanmean())
        for name, column in zip(self.rewards.names(task), rewards.T, strict=True):
            if not column.isnan().all():
                self.record(f"rewards/{name}/mean", column.nanmean())
                self.record(f"rewards/{name}/std", nanstd(column))
        return self._learnt_as(task, total, advantages).view(count, world, batch)[:, rank]

    def _learnt_as(self, task: str, rewards: Tensor, advantages: Tensor) -> Tensor:
        """What a sample is learnt by, of the rewards and advantages of all samples of a task in a rollout."""
        return advantages.clamp(-self.args.advantage_clip, self.args.advantage_clip)

    # Learning

    def training_step(  # type: ignore[override]  # Trainer says a dict of tensors; `get_batch_samples` gives these
        self, model: nn.Module, inputs: list[Rollout], num_items_in_batch: Any = None
    ) -> Tensor:
        """One micro-batch of samples: the trained policy, and those it is compared with, follow where the rollout went,
        or to noised versions of what it made; each visit has its backward pass."""
        self._begin_micro_batch(model)
        with self._asked(model, inputs) as asked:
            num_backwards = sum(visit.index in self.learnt for one in asked.compared for visit in one.visits)
            if not num_backwards:  # a window over steps of which nothing is trained
                return torch.zeros((), device=self.accelerator.device)
            scale = 1 / (num_backwards * self.current_gradient_accumulation_steps)
            losses: list[Tensor] = []
            with held_gradient_sync(self.accelerator, model, num_backwards) as release_sync:
                for one in asked.compared:
                    self.watch(
                        "picture", one.rollout.task, one.rollout.advantages
                    )  # also in a later step on one rollout
                    with self._following(one) as ask:
                        for number, visit in enumerate(one.visits):
                            if visit.index not in self.learnt:
                                if not self._asks_anywhere:
                                    with torch.no_grad():
                                        ask(visit)
                                continue
                            if len(losses) == num_backwards - 1:
                                release_sync()
                            loss = self._loss(one.rollout, number, visit, ask(visit))
                            self._backward(loss * scale)
                            self.watch("loss", one.rollout.task, loss)
                            losses.append(loss.detach())
        self._end_micro_batch()
        return torch.stack(losses).mean() / self.current_gradient_accumulation_steps

    # Trainer's estimate looks for token ids
    def floating_point_ops(self, inputs: Any) -> int:
        return 0

    def _visits(self, rollout: Rollout, step: int) -> list[Visit]:
        """Where the policies are asked in an optimizer step."""
        raise NotImplementedError

    def _loss(self, rollout: Rollout, number: int, visit: Visit, answers: Answers) -> Tensor:
        """Mean loss of the samples at the `number`-th visit, with its graph; the answers are by policy."""
        raise NotImplementedError

    def _distilled(self, task: str, distance: Tensor) -> Tensor:
        """What the distance to a task's teacher adds to the loss."""
        self.record("distill", distance)
        if len(self.tasks) > 1:
            self.record(f"distill/{task}", distance)
        return (1.0 if self.args.distill_beta is None else self.args.distill_beta) * distance

    def _compared(self, task: str) -> dict[str, Policy]:
        """The frozen policies that the trained one is compared with."""
        compared = {} if self.base is None else {"base": self.base}
        return compared | ({"teacher": self.teachers[task]} if task in self.teachers else {})

    def _asked(self, model: nn.Module, batch: list[Rollout]) -> Asked:
        """What a micro-batch asks, begun ahead if the configuration wants it."""
        if self.ahead is None:
            return self._ask(model, batch, self.state.global_step)
        if not self.ahead:
            self.ahead.begin(partial(self._ask, model, *one) for one in self._coming(batch))
        return self.ahead.take()

    def _coming(self, batch: list[Rollout]) -> Iterator[tuple[list[Rollout], int]]:
        """A micro-batch and those that come after it, with their optimizer steps: of as many steps as begin together,
        on the rollout that there is."""
        now, count = self.state.global_step, len(self._rollouts) // self._windows
        ahead: Any = self.args.encode_ahead
        last = min(now + ahead, now - now % self.steps_per_rollout + self.steps_per_rollout, self.state.max_steps)
        steps = ((step, step % self._windows * count) for step in range(now, last))
        coming = ((one, step) for step, first in steps for one in self._rollouts[first : first + count])
        return dropwhile(lambda one: one[0] is not batch, coming)

    def _ask(self, model: nn.Module, batch: list[Rollout], step: int) -> Asked:
        return Asked([self._compare(model, rollout, step) for rollout in batch])

    def _compare(self, model: nn.Module, rollout: Rollout, step: int) -> Compared:
        began = step - step % self.steps_per_rollout
        place = began, self.tasks.index(rollout.task), rollout.place

        def given() -> dict[str, Any]:
            return {"inputs": rollout.inputs, "generators": self._own_generators(rollout, SEED_TRAIN, *place)}

        trained, frozen = self.student.policy.follow(**given(), denoiser=model), {}
        for name, policy in self._compared(rollout.task).items():
            own = given()
            if policy.pipeline.scheduler is not self.pipeline.scheduler:  # whose timesteps may be others
                own["times"] = self._times(**given())
            if name == "teacher" and rollout.teacher_inputs is not None:
                own["inputs"] = rollout.teacher_inputs
            frozen[name] = policy.follow(**own)
        return Compared(rollout, self._visits(rollout, step), trained, frozen)

    @contextlib.contextmanager
    def _following(self, compared: Compared) -> Iterator[Callable[[Visit], Answers]]:
        """Asks all policies at visits of a rollout: the trained one, with gradient through the engine's wrapper, and
        the frozen ones."""
        task = compared.rollout.task

        def ask(visit: Visit) -> Answers:
            answers = {}
            for name, follow in compared.frozen.items():
                teaches = name == "teacher"
                with torch.no_grad(), self.stopwatch.section(name if teaches else "reference"):
                    answers[name] = follow(visit)
                for prediction in answers[name]:
                    self.watch(name if teaches else "reference", task, prediction)
            with self.stopwatch.section("policy"):
                answers["student"] = compared.trained(visit)
            for prediction in answers["student"]:
                self.watch("student", task, prediction)
            return answers

        with contextlib.ExitStack() as stack:
            if task in self.teachers:
                stack.enter_context(self.teachers.on_device(task))
            for follow in (compared.trained, *compared.frozen.values()):
                stack.enter_context(follow)
            yield ask

    def _times(self, inputs: Inputs, generators: list[torch.Generator]) -> dict[tuple[int, int], Times]:
        """The timesteps of a walk from these."""
        with torch.no_grad(), self.student.policy.walk(inputs, generators, lambda step: step.sample) as dry:
            dry.plan()
        return dry.all_times

    def _own_generators(self, rollout: Rollout, *place: int) -> list[torch.Generator]:
        """Those of a rollout's samples among those of their micro-batch (see `_generators`)."""
        generators = self._generators(self._train_batch_size, *place)
        return [generators[row] for row in rollout.rows]

    def _chain(self, rollout: Rollout, places: Sequence[int], states: Sequence[Tensor]) -> list[Visit]:
        """Visits at these places of a rollout, one after the other."""
        nothing: Any = None
        visits = []
        for number, (place, state) in enumerate(zip(places, states, strict=True)):
            ((_, index),) = self.plan[place].levels
            next_state = states[number + 1] if place + 1 in places else None
            visits.append(Visit(place, (Step(0, 0, index, nothing, state, nothing, rollout.schedule, next_state),)))
        return visits

    # Evaluation by rewards, with the sampler that users have

    def _evaluate_batch(self, batch: Sequence[dict[str, Any]], generators: list[torch.Generator]) -> Tensor:
        """Task, reward, and each function's own, of each sample."""
        images = [None] * len(batch)
        for call in self.calls(batch):
            inputs = inputs_of([batch[row] for row in call], self.data.columns)
            own = [generators[row] for row in call]
            task = batch[call[0]][TASK]
            with self._drawing(self.student.policy, task, inputs, own, partial(_move, self._ode)) as walk:
                for visit in walk:
                    self.watch("rollout", task, visit.steps[0].prediction)
            for row, image in zip(call, walk.output, strict=True):
                images[row] = image
        self.cache.clear()
        results = torch.zeros(len(batch), 2 + len(self.rewards.all_names), device=self.accelerator.device)
        results[:, 0] = torch.tensor([self.tasks.index(row[TASK]) for row in batch])
        if not self.nan_policy.has_found("picture"):  # what is in place of numbers is no result
            results[:, 1:] = self.judge.table(batch, images, self.state)
        return results

    def _evaluation_metrics(self, table: Tensor) -> dict[str, Tensor]:
        return self.judge.metrics(table[:, 0], table[:, 1:])

    # What a checkpoint must hold besides: samples that are learnt from again

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the policy so that plain diffusers loads it, as a teacher is saved: see
        [`DiffusionTrainer`]`.save_model`; and the names of its rewards."""
        super().save_model(output_dir, _internal_call)
        folder = output_dir or self.args.output_dir
        if is_checkpoint(folder):
            self._save_state(Path(folder))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            content = json.dumps(self._manifest(), indent=2)
            Path(output_dir or self.args.output_dir, MANIFEST_NAME).write_text(content + "\n")

    def _manifest(self) -> dict[str, Any]:
        return {"version": 1, "trainer": self._name, "rewards": {task: self.rewards.names(task) for task in self.tasks}}

    def _check_manifest(self, checkpoint: Path) -> None:
        path = checkpoint / MANIFEST_NAME
        if not path.is_file():
            raise ValueError(f"{checkpoint} has no {MANIFEST_NAME}, so it is not a checkpoint of this trainer.")
        with one_sentence(f"{path} is no manifest of rewards"):
            before, now = {key: read_json(path)[key] for key in ("trainer", "rewards")}, self._manifest()
        if before["trainer"] != now["trainer"]:
            raise ValueError(
                f"{checkpoint} was saved by {before['trainer']}, this run is {now['trainer']}; resume it with that."
            )
        if before["rewards"] != now["rewards"]:
            raise ValueError(
                f"{checkpoint} learnt from the rewards {before['rewards']}, this run has {now['rewards']}; use the "
                "same."
            )

    def _made_of(self) -> dict[str, Any]:
        rewards = {task: self.rewards.written(task) for task in self.tasks}
        return super()._made_of() | plain({"reward_funcs": rewards})

    def _save_state(self, folder: Path) -> None:
        if self.state.global_step % self.steps_per_rollout == 0:
            return
        folder.mkdir(parents=True, exist_ok=True)  # the first process may not have come that far
        tensors: dict[str, Tensor] = {}
        meta = packed([[vars(rollout) for rollout in rollouts] for rollouts in self._rollouts], "rollouts", tensors)
        folder.mkdir(parents=True, exist_ok=True)  # another process than the one that saves the weights
        # How they lie in memory too, or other kernels may read them, which round otherwise
        strides = {name: torch.empty_like(tensor, device="meta").stride() for name, tensor in tensors.items()}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        metadata = {"rollouts": json.dumps(meta), "strides": json.dumps(strides)}
        save_file(tensors, folder / self._rollouts_name, metadata=metadata)
        give_ordinary_mode(folder / self._rollouts_name)

    def _load_state(self, folder: Path) -> None:
        self._read_ahead = 0
        if self.state.global_step % self.steps_per_rollout == 0:
            return
        path = folder / self._rollouts_name
        if not path.is_file():
            raise ValueError(
                f"{folder} lies between two optimizer steps on one rollout and has no {path.name}; resume with the "
                "`num_iterations`, `steps_per_generation` and number of processes that it was saved with."
            )
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key).to(self.accelerator.device) for key in file.keys()}
            meta, strides = (json.loads(file.metadata().get(name, "{}")) for name in ("rollouts", "strides"))
        for key, stride in strides.items():
            tensors[key] = torch.empty_strided(
                tensors[key].shape, stride, dtype=tensors[key].dtype, device=tensors[key].device
            ).copy_(tensors[key])
        self._rollouts = [[_rollout(**fields) for fields in rollouts] for rollouts in unpacked(meta, tensors)]
        if len(self._rollouts) != (wanted := self.args.steps_per_generation):
            raise ValueError(
                f"{path} holds a rollout of {len(self._rollouts)} micro-batches, and this run has rollouts of "
                f"{wanted}; resume with the `steps_per_generation` that it was saved with."
            )

    @property
    def _rollouts_name(self) -> str:
        return f"rollouts_{self.accelerator.process_index}.safetensors"

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if resume_from_checkpoint is not None:
            self._check_manifest(Path(resume_from_checkpoint))
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if resume_from_checkpoint is not None:
            self._load_state(Path(resume_from_checkpoint))
        return prepared

    @property
    def _published_names(self) -> set[str]:
        return super()._published_names | {MANIFEST_NAME}

    def _card_fields(self) -> dict[str, Any]:
        rewards = [
            {"task": task, "name": name, "weight": weight}
            for task in (self.tasks if self.rewards.tasks else self.tasks[:1])
            for name, weight in zip(self.rewards.names(task), self.rewards.weights(task), strict=True)
        ]
        names = (
            f"{self._card_settings} num_generations num_iterations steps_per_generation scale_rewards "
            "advantage_clip beta num_inference_steps timestep_fraction guidance_scale learning_rate "
            "per_device_train_batch_size gradient_accumulation_steps max_grad_norm ema_decay seed"
        ).split()
        names += ["distill_beta"] if self.args.distill_beta is not None else []
        settings = {name: getattr(self.args, name) for name in names} | self._run_settings()
        return super()._card_fields() | {"rewards": rewards, "settings": settings}

    _card_settings = ""


def _check_groups(args: DiffusionRLConfig, num_tasks: int) -> None:
    batch, world, accumulated = args.per_device_train_batch_size, args.world_size, args.gradient_accumulation_steps
    steps: Any = args.steps_per_generation
    if steps % accumulated:
        raise ValueError(
            f"`steps_per_generation={steps}` is not a multiple of `gradient_accumulation_steps={accumulated}`: a "
            "rollout must be whole optimizer steps."
        )
    samples = batch * world * steps // num_tasks
    if samples % args.num_generations:
        name = "gradient_accumulation_steps" if steps == accumulated else "steps_per_generation"
        raise ValueError(
            f"a rollout has {samples} samples of each task (per_device_train_batch_size {batch} * {world} processes * "
            f"{name} {steps} / {num_tasks} tasks), which is no multiple of `num_generations={args.num_generations}`; a "
            "group must be whole."
        )


def _rollout(schedule: Any, **fields: Any) -> Rollout:
    levels, prediction_type, *coordinates = schedule  # lists in JSON; older checkpoints have no coordinates
    scales, velocities = coordinates or ((), ())
    pairs = tuple((float(of_x), float(of_prediction)) for of_x, of_prediction in velocities)
    return Rollout(schedule=Schedule(tuple(levels), prediction_type, tuple(scales), pairs), **fields)


def _move(kernel: BoundKernel, step: Step) -> Tensor:
    return kernel(step.sample, step.prediction, step.schedule, step.index).mean


def _tasks_of(name: str, dataset: Any) -> list[str]:
    """The tasks of a dataset whose reward functions are for all of them."""
    check_no_splits(dataset, name)
    if isinstance(dataset, Mapping):
        return list(dataset)
    if isinstance(dataset, Dataset) and TASK in dataset.column_names:
        tasks = sorted(tasks_in(dataset, TASK, name))
        if len(tasks) > 1:
            logger.warning(
                f"The column {TASK!r} of {name} makes {len(tasks)} tasks, e.g. {tasks[:3]}: every optimizer step "
                "visits each of them. Rename the column if it means something else."
            )
        return tasks
    if isinstance(dataset, IterableDataset) and TASK in stream_columns(dataset):
        raise ValueError(
            f"the dataset is a stream with a column {TASK!r}, whose tasks are not known before it is read; give "
            "`reward_funcs` (or the dataset) as a dict by task."
        )
    return ["all"]
