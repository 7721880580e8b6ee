"""What every diffusion trainer here overrides of transformers' Trainer.

TRL's and transformers' trainers assume a language model in many places, several of them silently (no weights in the
checkpoint that is pushed, last weights kept as best). Each override says what would go wrong without it, and each of an
underscored method why no public one, and no event of a callback, serves. What follows a run has files of its own in
callbacks/, what is published is publishing.py's, and the weights are the student's own.
"""

import contextlib
import copy
import json
import math
import os
import textwrap
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import EvalLoopOutput
from trl.models.utils import prepare_deepspeed, prepare_fsdp

from .ahead import Ahead
from .callbacks import Metrics, MovingAverage, NaNPolicy, Pictures, SaveAndStop
from .callbacks.pictures import middle_frame
from .checkpoints import (
    is_checkpoint,
)
from .checks import check_helpers
from .config import DiffusionConfig, computes_in_bf16
from .data import Data, column_of, long_prompts
from .denoisers import Denoisers, denoiser_of
from .disclosure import disclosed
from .encode_cache import EncodeCache
from .engines import all_touched, check_quantised, compile_blocks, settle_arguments, settle_fsdp, take_compilation
from .errors import listed, reason
from .guidance import at_scale, scale_argument, unguided_scale
from .inputs import PROMPT, content_key, inputs_of, is_prompt, signature
from .policy import Policy
from .resuming import Resuming
from .rewards.judge import Judge
from .sampling import ROW, SEED_EVAL, NumberedStream, TaskCycleSampler, TaskCycleStream, Turns, seed_of
from .scheduler_proxy import is_flow
from .shards import ShardFiles
from .startup import Checked, check_student, sees_the_end, tokenized, tokenizers_of
from .stopwatch import Stopwatch
from .student import Student
from .teachers import as_lora
from .transitions import TRANSITIONS, BoundKernel

logger = get_logger(__name__)

CHECK_PROMPTS = ["a cat", "a dog"]  # a batch, and short enough for any tokenizer


class _Config(FrozenDict):
    """A denoiser's config as transformers' tracker callbacks read it, and tell others."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "_Config":
        # Of several denoisers
        parts = {key: dict(cls.of(one)) for key, one in config.items() if isinstance(one, Mapping)}
        read_from = {key: disclosed(one) for key, one in config.items() if key == "_name_or_path"}
        return cls({**config, **parts, **read_from})

    def to_json_string(self) -> str:
        return json.dumps(self, indent=2, default=str)


class _EveryStep(TrainerCallback):
    """What the trainer does itself at events of transformers' loop."""

    def __init__(self, trainer: "DiffusionTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.enter_epoch(kwargs["train_dataloader"])

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.before_optimizer_step()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.after_optimizer_step()

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is None:
            logger.warning(
                f"No evaluation has given a number for `{args.metric_for_best_model}`, so no checkpoint is best: the "
                "weights are those of the last step."
            )


class DiffusionTrainer(Resuming):
    """
    Base of the trainers here.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]): As `load_student` of student.py returns it; its denoiser is the
            model.
        args ([`DiffusionConfig`]): The configuration, which [`whole_cycles`] has seen.
        data ([`Data`]): That has seen the pipeline.
        named (`Collection[str]`): Denoisers that the user asks to be trained by their names.
        start (`str` or [`Lora`], *optional*): That the student begins with.
        kwargs: For [`~transformers.Trainer`].
    """

    # What Trainer says less of
    args: DiffusionConfig
    model: ModelMixin
    optimizer: Any  # some have `train` and `eval`
    train_dataset: Any  # as `Data` has it
    eval_dataset: Any
    _signature_columns: Any

    # A training step backpropagates a mean over its micro-batch; Trainer would guess from the denoiser's `**kwargs`
    loss_is_scaled_for_ga: Any = False
    judge: Judge | None = None  # of pictures, by rewards
    ahead: Ahead[Any] | None = None  # what has begun of coming micro-batches
    _section = "student"  # of the stopwatch: where the student's time goes

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        args: DiffusionConfig,
        data: Data,
        named: Collection[str] = (),
        start: Any = None,
        **kwargs: Any,
    ):
        self._named, self._start = named, None if start is None else as_lora(start).origin
        self.student, self.data, self.tasks = Student(pipeline), data, data.tasks
        self.pipeline = pipeline
        self.trains_lora, model = self.student.trains_lora, self.student.denoiser
        if isinstance(model, Denoisers):
            model.config = _Config.of(model.config)
        else:
            model._internal_dict = _Config.of(model._internal_dict)
        settle_arguments(args, model)
        check_helpers(**{key: value for key, value in kwargs.items() if key in ("callbacks", "optimizers")})
        kwargs |= {"train_dataset": data.train, "eval_dataset": data.evaluation, "data_collator": data.read}
        super().__init__(model=model, args=args, **kwargs)
        # Whether the engine leaves each process a part of the trained denoiser only
        self.shards_parameters = self.is_fsdp_enabled or hf_deepspeed.is_deepspeed_zero3_enabled()
        if self.is_fsdp_enabled:
            settle_fsdp(self.accelerator.state.fsdp_plugin)
        check_quantised(model, self.is_fsdp_enabled, self.is_deepspeed_enabled)
        self._compile_kwargs = take_compilation(self.accelerator.state.dynamo_plugin, args)
        device = self.accelerator.device
        if device.type == "cuda" and args.mixed_dtype == torch.float32 and not computes_in_bf16():
            logger.warning(
                f"{torch.cuda.get_device_name(device)} does not compute in bfloat16, so this run is in float32; "
                "`fp16=True` takes half the memory and is faster."
            )
        for part in pipeline.components.values():  # under DeepSpeed the denoiser too: Trainer leaves it where it is
            if isinstance(part, nn.Module):
                part.to(device)
        self.stopwatch = Stopwatch(device)
        self.cache = EncodeCache(partial(self.stopwatch.section, "encode"))
        self.student.policy = self.policy_of(pipeline)
        self._check_began = time.perf_counter()
        count = args.per_device_train_batch_size
        logger.warning(f"Checking that this run fits together, on a batch of {count}.")
        self._checks: dict[Any, tuple[list[dict[str, Any]], Checked]] = {}  # by what the rows hold
        self.together: int | None = None  # samples of one call of the pipeline; `None`: any number
        rows, self.checked = self.check_task(None)
        self._freeze_unused()
        self._warn_of_cut_prompts(len(rows))
        given = {id(p) for group in getattr(self.optimizer, "param_groups", ()) for p in group["params"]}
        if given and not given & {id(parameter) for parameter in self.trainable_parameters}:
            raise ValueError(
                f"the optimizer in `optimizers` holds {len(given)} parameters, none of which the student trains (a "
                "LoRA is added here, after it was built); name it in `optim` instead."
            )
        self.metrics = Metrics(self.accelerator, self.stopwatch)
        self.nan_policy = NaNPolicy(args.nan_policy, self.tasks, self.accelerator)
        self.shard_files = ShardFiles(self.accelerator, self.shards_parameters, args.should_save)
        self.average = MovingAverage(
            args.ema_decay,
            args.ema_update_every,
            self.trained_shards,
            self.shard_files,
            lambda: self.nan_policy.leaves_out,
        )
        self.pictures = Pictures(self)
        # Each follows the one before: a step's metrics are whole when `after_optimizer_step` has recorded its own, and
        # the last pictures are of the average
        first = [self.average, _EveryStep(self), self.metrics, self.nan_policy, self.pictures]
        self.callback_handler.callbacks[:0] = first
        self.save_and_stop = SaveAndStop(self.pop_callback(JITCheckpointCallback))
        self.add_callback(self.save_and_stop)

    def _check_best_metric(self, args: DiffusionConfig, names: Sequence[str], callbacks: Any) -> None:
        """Refuses a `metric_for_best_model` that is none of the metrics of evaluation; Trainer would do so after the
        first one. A callback, or a subclass, may add its own to them."""
        metric, adds = args.metric_for_best_model, callbacks or type(self).__module__.partition(".")[0] != __package__
        if metric is not None and args.eval_strategy != "no" and metric.removeprefix("eval_") not in names and not adds:
            raise ValueError(f"`metric_for_best_model` must be one of {list(names)}, got {metric!r}.")

    @property
    def was_told_to_stop(self) -> bool:
        """Whether the run ends early because it was told to save and stop (`enable_jit_checkpoint`)."""
        return self.save_and_stop.agreed

    @property
    def trainable_parameters(self) -> list[nn.Parameter]:
        """As they are now: FSDP puts others in their place."""
        return self.student.trainable_parameters

    def trained_shards(self) -> contextlib.AbstractContextManager[list[nn.Parameter]]:
        """What this process holds of the trained parameters, to be read and written. Entered on every process."""
        return self.student.trained_shards()

    def shard(self, denoiser: nn.Module) -> None:
        """Shards a frozen denoiser as the engine does the trained one, if it has not yet."""
        check_quantised(denoiser, self.is_fsdp_enabled, self.is_deepspeed_enabled)
        if self.is_fsdp_enabled:
            prepare_fsdp(denoiser, self.accelerator)
        elif not hasattr(next(denoiser.parameters()), "ds_id"):
            prepare_deepspeed(denoiser, self.accelerator)

    def policy_of(
        self,
        pipeline: DiffusionPipeline,
        adapter: str | tuple[str, ...] | None = None,
        call_kwargs: dict[str, Any] | None = None,
    ) -> Policy:
        """A party of this run: a pipeline that is called as the student's is (of another class with what that takes of
        the arguments), under the run's mixed precision, with `call_kwargs` of its own over the student's."""
        cls: Any = type(pipeline)
        given, taken = self.args.pipeline_kwargs, signature(cls.__call__).parameters
        if cls is not type(self.pipeline):
            given = {name: value for name, value in given.items() if name in taken}
        return Policy(
            pipeline,
            self.args.num_inference_steps,
            {**given, **(call_kwargs or {})},
            self.cache,
            adapter,
            partial(self._autocast, denoiser_of(pipeline)),
            device=self.accelerator.device,
        )

    def _autocast(self, module: nn.Module) -> contextlib.AbstractContextManager:
        # accelerate's own context does nothing under DeepSpeed, whose engine casts what it trains and nothing else
        dtype = self.args.mixed_dtype
        if self.is_deepspeed_enabled and dtype not in (torch.float32, next(module.parameters()).dtype):
            return torch.autocast(self.accelerator.device.type, dtype)
        return self.accelerator.autocast()

    def _compile(self, denoiser: nn.Module) -> None:
        """To be called when all checks are done: their batches have another size, i.e. other graphs."""
        if self._compile_kwargs is not None:
            compile_blocks(denoiser, len(self.tasks) + 1, **self._compile_kwargs)

    def check_task(self, task: str | None, anew: bool = False) -> tuple[list[dict[str, Any]], Checked]:
        """The student's check at a batch of the first rows of a task, and these rows; once for all tasks whose rows
        hold the same arguments, or `anew`."""
        count = self.args.per_device_train_batch_size
        rows = self.data.examples(task, count) or self.data.examples(None, count)
        rows = rows or [{PROMPT: prompt} for prompt in CHECK_PROMPTS]  # a stream is refused as it runs
        alike = [rows[row] for row in self.data.calls(rows, len(rows))[0]]
        rows = [alike[index % len(alike)] for index in range(count)]
        kind = task if anew else frozenset(inputs_of(rows, self.data.columns))
        if kind not in self._checks:
            self._checks[kind] = self._checked(rows)
        return self._checks[kind]

    def _checked(self, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Checked]:
        inputs, policy, fraction = inputs_of(rows, self.data.columns), self.student.policy, self.args.timestep_fraction
        if self.data.pictures and len(rows) == 1:
            self.together = 1  # nobody has seen that more may go together
        if self.together == 1:
            inputs = {name: values[:1] for name, values in inputs.items()}
        try:
            return rows[: self.together], check_student(policy, inputs, fraction)
        except ValueError as error:
            if len(rows) == 1 or self.together == 1 or isinstance(error.__cause__, torch.OutOfMemoryError):
                raise
            self.model.zero_grad(set_to_none=True)
            checked = check_student(policy, {name: values[:1] for name, values in inputs.items()}, fraction)
            self.together = 1
            logger.warning(
                f"{policy.name} takes one sample a call, so each batch of {len(rows)} is {len(rows)} calls; together: "
                f"{reason(error)}"
            )
            return rows[:1], checked

    def calls(self, rows: Sequence[Mapping[str, Any]], by_task: bool = False) -> list[list[int]]:
        """Which rows go through the pipeline together; called on every process, for equally many rows."""
        calls = self.data.calls(rows, self.together or len(rows), by_task)
        # Each forward pass of a sharded denoiser is one of all processes
        if self.shards_parameters and len(set(gather_object([len(calls)]))) > 1:
            calls = [[index] for index in range(len(rows))]
        return calls

    def _settle_plan(self) -> None:
        """Says what a walk will be, and at which of its visits something is learnt."""
        self.plan, self.crosses = self.checked.plan, self.checked.crosses
        if self.crosses:
            logger.warning(
                f"What the first denoising step of {type(self.pipeline).__name__} computes is used in later ones, so a "
                f"walk has one backward pass, which holds the graphs of all {len(self.checked.learnt)} steps that are "
                "learnt."
            )
        # Where nothing is trained there is nothing to learn
        self.learnt = [
            place for place in self.checked.learnt if self.plan[place].denoisers & self.student.trained.keys()
        ]

    def _report_check(self) -> None:
        """Ends the start-up check."""
        self._warn_of_guidance()
        logger.warning(f"Everything fits together ({time.perf_counter() - self._check_began:.1f} s).")
        self.cache.clear()
        del self.checked, self._checks, self._check_began

    def _warn_of_guidance(self) -> None:
        """Who counts guidance from its conditional branch (Z-Image) is guided at 1, where others are without."""
        name, given = scale_argument(type(self.pipeline)), self.args.pipeline_kwargs
        if name is None or given.get(name) != 1.0:
            return

        def policy_at(scale: float) -> Policy:
            return self.policy_of(self.pipeline, None, at_scale(given, scale, name))

        if unguided_scale(policy_at, self.checked) == 0.0:
            logger.warning(
                f"{type(self.pipeline).__name__} is guided at `{name}=1.0`, since it counts from its conditional "
                "branch; 0.0 is without guidance."
            )

    def _freeze_unused(self) -> None:
        """Freezes parameters that no gradient has reached in the check (Qwen-Image's last block has six): DDP would
        wait for them."""
        for name in self.student.trained.keys() - self.checked.denoisers:
            if name in self._named:
                raise ValueError(
                    f"`peft_config` names {name!r}, which is called at none of the steps that are learnt "
                    f"({len(self.checked.learnt)} of {len(self.checked.plan)}); raise `timestep_fraction`, or leave it "
                    "out."
                )
            logger.warning(
                f"The {name} is called at none of the steps that are learnt ({len(self.checked.learnt)} of "
                f"{len(self.checked.plan)}, see `timestep_fraction`), and stays as it is."
            )
        unused = [name for name, p in self.model.named_parameters() if p.requires_grad and p.grad is None]
        for name in unused:
            self.model.get_parameter(name).requires_grad_(False)
        if unused:
            logger.warning(f"No gradient reaches {len(unused)} parameters, e.g. {unused[0]}; they stay as they are.")
        self.model.zero_grad(set_to_none=True)

    def _warn_of_cut_prompts(self, count: int) -> None:
        """Of twelve families five cut a prompt that is too long for their encoders without a word."""
        encoders = [name for name, part in self.pipeline.components.items() if isinstance(part, nn.Module)]
        # Without encoders a pipeline looks prompts up, and knows those of the data alone
        if not isinstance(self.train_dataset, Dataset) or set(encoders) <= {*self.student.policy.denoisers, "vae"}:
            return
        prompts, tokenizers = column_of(self.train_dataset, PROMPT), tokenizers_of(self.pipeline)
        texts = {row: prompts[row].as_py().rstrip() for row in long_prompts(prompts)}
        lengths = [map(len, tokenized(one, list(texts.values()))) for one in tokenizers] or [map(len, texts.values())]
        tables = [dict(zip(texts, own, strict=True)) for own in lengths]
        for place in dict.fromkeys(max(table, key=lambda row: table[row]) for table in tables):
            longest = texts[place]
            (row,) = self.data.read([self.train_dataset.select_columns(self.data.names)[place]])
            inputs = inputs_of([{**row, PROMPT: longest}] * count, self.data.columns)
            if not sees_the_end(self.student.policy, inputs):
                logger.warning(
                    f"The longest prompt of train_dataset, {textwrap.shorten(longest, 60)!r} of {len(longest)} "
                    f"characters, is cut: {type(self.pipeline).__name__} does not see its end. Raise "
                    "`max_sequence_length` in `call_kwargs` if it takes that, or shorten it."
                )
                return

    def choose_kernel(self, transition: str, noise_level: float, needs_noise: bool) -> BoundKernel:
        """The kernel of a rollout, with its noise level.

        Args:
            transition (`str`): A key of `TRANSITIONS`; on VP models its `on_vp`, if it has one.
            noise_level (`float`): For the kernel.
            needs_noise (`bool`): Whether every learnt step must have a std above 0.

        Raises:
            ValueError: if the kernel is not for this pipeline, or a learnt step lacks the noise that it needs.
        """
        scheduler, name = self.pipeline.scheduler, type(self.pipeline).__name__
        if not is_flow(scheduler):
            transition = TRANSITIONS[transition].on_vp or transition
        if TRANSITIONS[transition].is_flow != is_flow(scheduler):
            fitting = listed([key for key, kernel in TRANSITIONS.items() if kernel.is_flow == is_flow(scheduler)], "or")
            if is_flow(scheduler):
                raise ValueError(
                    f"`transition={transition!r}` is for VP models, but {name} is a flow-matching model "
                    f"({type(scheduler).__name__}); use {fitting}."
                )
            raise ValueError(
                f"`transition={transition!r}` is for flow matching, but {name} is a VP model "
                f"({type(scheduler).__name__}); use {fitting} (noise by `noise_level`)."
            )
        kernel, nothing = BoundKernel(TRANSITIONS[transition], noise_level), torch.zeros(1)
        for place in self.checked.learnt if needs_noise else ():
            if any(kernel(nothing, nothing, *level).std == 0 for level in self.checked.plan[place].levels):
                raise ValueError(
                    f"step {place + 1} of {len(self.checked.plan)} has zero std under {transition!r}, so its "
                    f"probability is not defined; lower `timestep_fraction` (now {self.args.timestep_fraction})."
                )
        return kernel

    # What every training step shares: a micro-batch has several backward passes, one for each learnt step

    def _backward(self, loss: Tensor) -> None:
        with self.stopwatch.section(self._section), all_touched(self.model_wrapped, loss) as loss:
            # DeepSpeed would divide by the accumulation steps again
            self.accelerator.backward(loss, **({"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}))

    # NaN and Inf

    def watch(self, what: str, task: str, tensor: Tensor) -> None:
        """Remembers, on the device, whether a tensor holds NaN or Inf. `what` is a key of `NONFINITE`."""
        self.nan_policy.watch(what, task, tensor)

    # `on_pre_optimizer_step` comes next, is not told the norm, and has no say in what the log shows of it
    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm)
        # In fp16 Inf in a gradient is the loss scaler's business
        norm = None if self.args.fp16 else grad_norm
        found, self.save_and_stop.agreed = self.nan_policy.agree(norm, self.save_and_stop.is_told)
        if found is None:
            return grad_norm
        self.nan_policy.raise_or_skip(found, self.state.global_step + 1)
        # As if the step had not been, for all that the next `log` shows
        self._tr_loss.copy_(self._loss_before)
        self._globalstep_last_logged += 1
        self.metrics.undo()
        model.zero_grad(set_to_none=True)  # an optimizer passes over a parameter without gradient
        return None

    def before_optimizer_step(self) -> None:
        """Keeps the logged loss: what is added to it from here on may be left out."""
        self._loss_before = self._tr_loss.clone()

    def after_optimizer_step(self) -> None:
        """Updates what follows the trained weights, besides their average."""

    def _generators(self, count: int, domain: int, step: int, task: int, cycle: int) -> list[torch.Generator]:
        """One generator a sample, by its place among its task's samples of the step: the same however a step's samples
        are split over processes and micro-batches, and after a resume."""
        first = (cycle * self.accelerator.num_processes + self.accelerator.process_index) * count
        return [
            torch.Generator().manual_seed(seed_of(self.args.seed, domain, step, task, first + index))
            for index in range(count)
        ]

    def _begin_micro_batch(self, model: nn.Module) -> None:
        if model.training:  # a walk is a sample of the policy that is trained: no dropout
            model.eval()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()

    def _end_micro_batch(self) -> None:
        self.cache.clear()
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()

    # TRL's reads `config.model_type`, which a denoiser's config lacks, and is called in `__init__`
    def _send_telemetry(self) -> None:
        pass

    # The columns that reach a batch; Trainer would take them from the denoiser's forward and drop the prompts. As in
    # TRL's own trainers: `remove_unused_columns` is the user's, and says what reward functions are given
    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*self.data.names, ROW]

    # Data: one task a micro-batch, tasks in turn

    _repetition: dict[str, int] = {}  # of rows, for the two samplers

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        return super().get_eval_dataloader(
            NumberedStream(dataset) if isinstance(dataset, IterableDataset) else eval_dataset
        )

    def get_train_dataloader(self) -> Any:
        if self.train_dataset is None or isinstance(self.train_dataset, Dataset):
            return super().get_train_dataloader()
        stream = TaskCycleStream(
            self.train_dataset,
            self.tasks,
            self._global_batch_size // self._parts,
            self._turns,
            **self._repetition,
            seed=self._order_seed,
            column=self.data.task_column,
            size_of=self.data.size_of,
            alike=self._alike,
        )
        return self._get_dataloader(stream, "Training", self._train_batch_size, is_training=True)

    # `get_train_dataloader` would have to build and prepare a loader as Trainer does, for another order of rows
    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> TaskCycleSampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        self._train_sampler = TaskCycleSampler(
            column_of(dataset, self.data.task_column).to_pylist(),
            self.tasks,
            self._global_batch_size // self._parts,
            self._turns,
            seed=self._order_seed,
            **self._repetition,
            sizes=self.data.sizes,
            alike=self._alike,
        )
        return self._train_sampler

    @property
    def _alike(self) -> int:
        """How many samples of a task in succession have pictures of one size: those of a process, or of all that gather
        weights for each forward pass."""
        return (self._global_batch_size if self.shards_parameters else self._train_batch_size) // self._parts

    @property
    def _parts(self) -> int:
        """Of how many turns a micro-batch is."""
        return 1

    def enter_epoch(self, train_dataloader: Any) -> None:
        """Tells the sampler which epoch a run begins in: in several processes accelerate does not reach the sampler of
        one that is resumed in its middle."""
        if isinstance(self.train_dataset, Dataset):
            steps_per_epoch = len(train_dataloader) // self.args.gradient_accumulation_steps
            self._train_sampler.set_epoch(self.state.global_step // steps_per_epoch)

    @property
    def _global_batch_size(self) -> int:
        return self._train_batch_size * self.accelerator.num_processes

    @property
    def _order_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    @property
    def _turns(self) -> Turns:
        """The tasks of the micro-batches that are drawn together: an optimizer step's, or a rollout's."""
        return Turns(len(self.tasks), self._cycles)

    @property
    def _cycles(self) -> int:
        return self.args.gradient_accumulation_steps // len(self.tasks)

    # The moving average

    @property
    def ema(self) -> EMAModel | None:
        """The moving average, of this process's shards, from the start of `train` on."""
        return self.average.ema

    def ema_weights(self) -> contextlib.AbstractContextManager[None]:
        """The averaged weights in place of the trained ones, if there are any."""
        return self.average.in_place()

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self.model.eval()
        self.callback_handler.eval_dataloader = dataloader
        if callable(getattr(self.optimizer, "eval", None)):  # schedule-free optimizers
            self.optimizer.eval()
        rows, seen, numbers = [], Counter[int](), set[int]()
        for batch in dataloader:
            own = [example.pop(ROW, None) for example in batch]
            for example in batch:  # of a stream, which nobody has looked at yet
                if example.get(self.data.task_column) not in self.tasks or not is_prompt(example.get(PROMPT)):
                    whose = self.data.task_column.removesuffix("_id")
                    raise ValueError(f"eval_dataset: {example} is no prompt for one of the {whose}s {self.tasks}.")
            evaluated = self._evaluate_batch(batch, self._evaluation_generators(batch, seen))
            evaluated = self.accelerator.gather_for_metrics(evaluated)
            if None not in own:
                places: dict[int, int] = {}
                for place, number in enumerate(gather_object(own)):
                    places.setdefault(number, place)
                evaluated = evaluated[[place for number, place in places.items() if number not in numbers]]
                numbers |= places.keys()
            rows.append(evaluated)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        if not rows:
            raise ValueError("eval_dataset is empty.")
        table = torch.cat(rows)
        metrics = {
            f"{metric_key_prefix}_{name}": value.item() for name, value in self._evaluation_metrics(table).items()
        }
        if (found := self.nan_policy.agree()[0]) is not None:
            self.nan_policy.raise_or_warn(found, self.state.global_step)
            metrics = dict.fromkeys(metrics, math.nan)
        nothing: Any = None  # as Trainer's own loop has it without predictions, whatever the annotation says
        return EvalLoopOutput(predictions=nothing, label_ids=None, metrics=metrics, num_samples=len(table))

    def _evaluation_generators(self, batch: Sequence[Mapping[str, Any]], seen: Counter[int]) -> list[torch.Generator]:
        """One generator a row, by its content and, among equal rows, by how many of them were `seen` before: the same
        in whatever order, batches and processes the rows come."""
        keys = gather_object([[content_key(row) for row in batch]])
        seeds: list[list[int]] = []
        for own in keys:
            seeds.append([])
            for key in own:
                seeds[-1].append(seed_of(self.args.seed, SEED_EVAL, key, seen[key]))
                seen[key] += 1
        return [torch.Generator().manual_seed(seed) for seed in seeds[self.accelerator.process_index]]

    def _evaluate_batch(self, batch: Sequence[dict[str, Any]], generators: list[torch.Generator]) -> Tensor:
        """A row of numbers for each sample of a batch, the first of them its task's index."""
        raise NotImplementedError

    def _evaluation_metrics(self, table: Tensor) -> dict[str, Tensor]:
        """The metrics of all rows."""
        raise NotImplementedError

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The metrics of `eval_dataset`, by default the trainer's, with the averaged weights where there is
        `ema_decay`. Takes the forms that the trainer takes, with the same tasks, and logs the metrics."""
        if eval_dataset is not None:
            eval_dataset = self.data.routed(eval_dataset)
        before = len(self.state.log_history)
        scorers = contextlib.nullcontext() if self.judge is None else self.judge.rewards.at_work()
        with self.whole_pipeline(), self.ema_weights(), self.stopwatch.paused(), scorers:
            metrics = super().evaluate(eval_dataset, *args, **kwargs)
        # Trainer logs before it asks `on_evaluate`, where callbacks may add theirs
        logged = {key for entry in self.state.log_history[before:] for key in entry}
        if added := {key: value for key, value in metrics.items() if key not in logged}:
            super().log(added)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("`predict` has no meaning for a diffusion model; use `evaluate` or `sample_images`.")

    def whole_pipeline(self) -> contextlib.AbstractContextManager[None]:
        """For the duration all of `trainer.pipeline` is on the device: for a callback that calls it, where
        `encode_ahead` has its encoders wait in CPU memory."""
        return contextlib.nullcontext() if self.ahead is None else self.ahead.aside()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, see [`Resuming.train`]."""
        with contextlib.nullcontext() if self.ahead is None else self.ahead:
            return super().train(*args, **kwargs)

    # Metrics

    def record(self, name: str, value: Tensor | float) -> None:
        """Adds to the mean that the next `log` shows. A tensor stays on its device until then."""
        self.metrics.record(name, value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and not self.metrics.is_empty:
            batch_size = self._global_batch_size * self.args.gradient_accumulation_steps
            logs.update(self.metrics.take(self.state.global_step, batch_size))
            logs.update(self.nan_policy.take())
        super().log(logs, start_time)

    # Images

    @property
    def image_examples(self) -> list[dict[str, Any]]:
        """What the sample images show: `args.image_prompts`, or the first rows of each task, four or more in all."""
        return self.pictures.examples

    @property
    def image_prompts(self) -> list[str]:
        """The prompts of the sample images."""
        return [example[PROMPT] for example in self.image_examples]

    @torch.no_grad()
    def image_captions(self, drawn: list[Any]) -> list[str]:
        """What the trackers show under each sample image, or list of frames: its prompt, and what reward functions say
        of it, if its row has all that they need; of `args.image_prompts` the prompt alone. Called on the first process
        alone."""
        rows = self.image_examples
        if self.args.remove_unused_columns:
            rows = [{name: row[name] for name in self.data.names if name in row} for row in rows]
        if self.judge is None or self.args.image_prompts is not None or not self.judge.fits(rows[0]):
            return self.image_prompts
        return self.judge.captions(rows, drawn, self.state)

    def sample_images(self, examples: Sequence[str | Mapping[str, Any]]) -> list[Any]:
        """One image (`PIL.Image`) a prompt, or row of the data (a dict of its columns), drawn by the student with fixed
        seeds, on every process; of a video its middle frame, of a pipeline that makes audio a [`Sound`]."""
        rows = [{PROMPT: example} if isinstance(example, str) else dict(example) for example in examples]
        return [middle_frame(drawn) for drawn in self.pictures.draw(self.data.read(rows))]

    def log_images(self) -> None:
        """Draws the sample images and hands them to `output_dir/images/step_...` and the trackers in use. What fails on
        the way is a warning: a picture is not worth a run."""
        self.pictures.log()

    # Saving: Trainer would write a bare model.safetensors without a config

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the student so that plain diffusers loads it: a LoRA as `pytorch_lora_weights.safetensors`, a full
        student as a pipeline folder (checkpoints: the denoiser's folder alone). With `ema_decay` these are the averaged
        weights."""
        output_dir = output_dir or self.args.output_dir
        with self.ema_weights():
            self._save(output_dir, self.student.gathered_state(self.is_fsdp_enabled, self.deepspeed))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        if is_checkpoint(output_dir):
            self.average.save(output_dir)

    def save_shards(self, tensors: dict[str, Tensor], folder: Path, name: str) -> None:
        """Saves what follows the trained parameters: where these are sharded, a file for each process."""
        self.shard_files.save(tensors, folder, name)

    def load_shards(self, folder: Path, name: str) -> dict[str, Tensor]:
        """What [`save_shards`] saved.

        Raises:
            ValueError: if the trained parameters were sharded in another way.
        """
        return self.shard_files.load(folder, name)

    # What `save_model` calls, and where subclasses add files: at `on_save` a checkpoint is sealed and pushed already
    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        output_dir = output_dir or self.args.output_dir
        self.student.save(output_dir, state_dict)
        settings = copy.copy(self.args)  # as others may read them: a checkpoint may be pushed
        settings.__dict__ = {name: disclosed(getattr(settings, name), name) for name in settings.__dataclass_fields__}
        torch.save(settings, os.path.join(output_dir, TRAINING_ARGS_NAME))

    # Loading: Trainer looks for transformers' file names, and on a miss only warns, i.e. keeps the weights it has

    def load_weights(self, folder: str | os.PathLike) -> None:
        """Loads what `save_model` wrote into the model.

        Raises:
            ValueError: if a file cannot be read, or a tensor is missing, unexpected or of another shape.
        """
        self.student.load(folder)

    # Trainer calls it for whatever is resumed, and no argument leaves it out
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif self.args.ema_decay is None:
            self.load_weights(resume_from_checkpoint)

    # The average begins when the engine has its shards, and before subclasses follow the weights; `on_train_begin` is
    # not told what is resumed
    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if resume_from_checkpoint is not None:
            self.average.check(resume_from_checkpoint)
        own_forward = vars(self.model).get("forward")
        self.model.eval()  # all of it: the dropout of an adapter is in training mode where the model is not
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        # Under mixed precision accelerate has made the denoiser itself answer in float32, which a half-precision VAE
        # cannot take. `Policy` does so for those who train, and the pipeline stays one that plain diffusers runs.
        # `unwrap_model(keep_fp32_wrapper=False)` takes diffusers' own decorators off too, see
        # https://github.com/huggingface/accelerate/pull/4255
        if vars(self.model).pop("_original_forward", None) is not None:
            del self.model.forward
            if own_forward is not None:
                self.model.forward = own_forward
        if self.is_fsdp_enabled and isinstance(self.model, Denoisers):
            self.model()  # FSDP takes what is called first for a root: the pipeline, as it draws, calls each denoiser
        self.average.begin()
        if resume_from_checkpoint is not None:
            self.average.load(resume_from_checkpoint, self.state.global_step)
        return prepared

    # Trainer calls it with `load_best_model_at_end`; `on_train_end` comes after
    def _load_best_model(self) -> None:
        best: Any = self.state.best_model_checkpoint  # there is one, or Trainer would not ask
        if self.ema is not None:
            self.average.load(best, self.state.global_step)  # `on_train_end` puts the average in place
        elif self.shards_parameters:
            super()._load_best_model()
        else:
            self.load_weights(best)
