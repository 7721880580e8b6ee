"""Where a run's checkpoints lie, what they say of it, and how it goes on from one.

transformers' Trainer takes any folder that is named like a checkpoint for its own, whole or not, deletes others'
without a word, trains a finished run a step further, and does not say that what it resumes was another run.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from .checkpoints import (
    begin,
    checkpoints_in,
    end,
    last_checkpoint,
    of_others,
    remove_half_written,
    rotate,
    run_of,
    seal,
    what_is_torn,
)
from .errors import first_few
from .files import name_or_path
from .publishing import Publishing
from .quantization import quantisations
from .runs import alone, differences, hash_data, hash_values, new_run, plain

logger = get_logger(__name__)

# Of what this package adds to Trainer's arguments: what changes nothing that is learnt
_OF_A_START = set(
    "model_init_kwargs quantization_config attention_backend resume_from_checkpoint nan_policy teacher_placement "
    "encode_ahead encoder_placement "
    "gradient_checkpointing logging_nan_inf_filter remove_unused_columns image_steps image_prompts "
    "image_num_inference_steps".split()
)
# Of Trainer's own: what changes it
_OF_TRAINER = (
    "seed data_seed learning_rate lr_scheduler_type warmup_steps weight_decay adam_beta1 adam_beta2 adam_epsilon "
    "max_grad_norm optim bf16 fp16"
).split()


class Resuming(Publishing):
    """What [`DiffusionTrainer`] does about its checkpoints; its subclasses add to `_made_of`."""

    _run: dict[str, Any] = {}  # what `run.json` of its checkpoints holds
    _runs: set[Any]  # its ids

    # The card is among what it pushes, what it overwrites is no checkpoint from here on, and what it deletes might be
    # another's; `on_save` comes after
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.write_model_card()
        run_dir, args = self._get_output_dir(trial), self.args
        folder = Path(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        run = self._run | {"loss": self._losses(self._tr_loss.item())}
        self._agreed(lambda: begin(folder, run, self._runs))
        self._keeps = args.save_total_limit
        try:
            with _hidden(args, "save_total_limit") as limit:
                super()._save_checkpoint(model, trial)
        except Exception as error:
            last = next((path for path in reversed(checkpoints_in(run_dir)) if what_is_torn(path) is None), None)
            error.add_note(f"This was while {folder} was saved; the last whole checkpoint is {last}.")
            raise
        self._seal(str(folder))
        if args.should_save:
            end(folder)
        if args.should_save and limit is not None and limit > 0:
            rotate(run_dir, self._runs, limit, self.state.best_model_checkpoint)

    # The last that every process writes: then Trainer adds trainer_state.json and publishes
    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self._seal(output_dir)

    def _seal(self, checkpoint: str) -> None:
        self.accelerator.wait_for_everyone()
        if self.args.should_save and not self.args.save_only_model:  # nothing can be resumed from weights alone
            seal(Path(checkpoint))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._seal(checkpoint_folder)
        if self.args.should_save:
            end(Path(checkpoint_folder))
        super()._push_from_checkpoint(checkpoint_folder)

    # With `save_total_limit=1` Trainer deletes whatever is named like a checkpoint, and is not the best
    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        with _hidden(self.args, "save_total_limit") as limit:
            output = super()._finalize_training(*args, **kwargs)
        best = self.state.best_model_checkpoint
        if self.args.should_save and best is not None and limit == 1:
            rotate(self.args.output_dir, self._runs, 1, best, latest=False)
        return output._replace(training_loss=output.metrics["train_loss"])

    # Resuming: Trainer takes the checkpoint with the highest number, also one that a killed run was writing

    def train(self, resume_from_checkpoint: str | os.PathLike | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; `resume_from_checkpoint=True` takes the last whole checkpoint. By default it is that of the
        arguments. A run that is finished is not trained further.

        Raises:
            ValueError: if there is no whole checkpoint, the one that is named is torn, another run trains in
                `output_dir` or has left checkpoints there, or the run was made of what does not go on.
        """
        wanted = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        if isinstance(wanted, str) and wanted.lower() in ("true", "false"):  # from YAML or a flag
            wanted = wanted.lower() == "true"
        with contextlib.ExitStack() as stack:
            checkpoint, self._run, self._runs = self._agreed(lambda: self._begin_run(wanted, stack))
            return super().train(checkpoint, *args, **kwargs)

    def _begin_run(
        self, wanted: str | os.PathLike | bool | None, stack: contextlib.ExitStack
    ) -> tuple[str | None, dict[str, Any], set[Any]]:
        """The checkpoint that a run goes on from, what it is, and its ids: of one that was begun by an older version,
        which gave none, `None` too. Asked on the first process."""
        output_dir = self.args.output_dir
        stack.enter_context(alone(output_dir))
        checkpoint: Any = last_checkpoint(output_dir) if wanted is True else wanted or None
        if wanted is True and checkpoint is None:
            raise ValueError(f"{output_dir} holds no whole checkpoint; start anew, without `resume_from_checkpoint`.")
        if wanted not in (True, False, None) and (torn := what_is_torn(checkpoint)):
            raise ValueError(
                f"{checkpoint} is no whole checkpoint: {torn}; `resume_from_checkpoint=True` takes the last whole one."
            )
        before = self._run if checkpoint is None else run_of(checkpoint)
        run = new_run() | ({"id": before["id"]} if "id" in before else {}) | {"made_of": self._made_of()}
        runs = {run["id"], *([] if checkpoint is None else [before.get("id")])}
        if self.args.save_strategy != SaveStrategy.NO and (theirs := of_others(output_dir, runs, self.args.max_steps)):
            raise ValueError(
                f"{output_dir} holds checkpoints of another run ({first_few(theirs)}), which this one would overwrite "
                "or leave behind; go on with them by `resume_from_checkpoint`, or give another `output_dir`."
            )
        if checkpoint is None:
            return None, run, runs
        for path in remove_half_written(output_dir, runs):
            logger.warning(f"{path} was not written to its end, and is removed.")
        self.student.check_base(checkpoint)
        self._compare_runs(str(checkpoint), before.get("made_of", {}), run["made_of"])
        return str(checkpoint), run | {"loss": before.get("loss", [0.0, 0])}, runs

    def _agreed(self, decide: Callable[[], Any]) -> Any:
        """What the first process decides, or its error, on all."""
        decided: list[Any] = [None, None]
        if self.is_world_process_zero():
            try:
                decided = [decide(), None]
            except Exception as error:
                decided = [None, error]
        result, failure = broadcast_object_list(decided)
        if failure is not None:
            raise failure
        return result

    def _made_of(self) -> dict[str, Any]:
        """What a run is made of: what is not in the checkpoint, and changes what is learnt."""
        ours = [cls for cls in type(self.args).__mro__ if cls.__module__.startswith(f"{__package__}.")]
        own = {entry.name for entry in dataclasses.fields(self.args) if any(entry.name in vars(cls) for cls in ours)}
        made_of = {name: getattr(self.args, name) for name in (*sorted(own - _OF_A_START), *_OF_TRAINER)}
        samples = self._train_batch_size * self.accelerator.num_processes * self.args.gradient_accumulation_steps
        made_of |= {
            "samples of a step": samples,
            "scheduler": {k: v for k, v in self.student.pipeline.scheduler.config.items() if not k.startswith("_")},
            "model": name_or_path(self.student.pipeline) or type(self.student.pipeline).__name__,
        }
        if quantised := quantisations(self.student.pipeline):
            made_of["quantization"] = quantised
        if isinstance(self.train_dataset, Dataset):
            made_of["train_dataset"] = hash_data(self.train_dataset, self.data.names)
        if self.student.trains_lora:
            made_of |= {"student_lora": self._start, "peft_config": self.student.lora_settings}
        else:
            made_of["first weights"] = hash_values(self.student.fingerprints)
        return plain(made_of)

    def _compare_runs(self, checkpoint: str, before: dict[str, Any], now: dict[str, Any]) -> None:
        """Refuses what makes another function of the same weights, and says what else differs."""
        loras: Any = [made_of.get("peft_config", {}) for made_of in (before, now)]
        for part in loras[0].keys() & loras[1].keys():
            if different := differences(loras[0][part], loras[1][part]):
                raise ValueError(
                    f"{checkpoint} was trained with another `peft_config` of the {part} ({'; '.join(different)}); "
                    "resume it with that."
                )
        if before and (different := differences(before, now)):
            logger.warning(f"{checkpoint} was made otherwise than this run goes on: {'; '.join(different)}.")

    def _losses(self, unlogged: float = 0.0) -> list[float]:
        """The sum of the losses of all steps so far, those before a resumption too, and how many they are."""
        before, steps = self._run.get("loss", [0.0, 0])
        total = before + self._total_loss_scalar + unlogged
        return [total, steps + self.state.global_step - self._initial_global_step]

    # A finished run that lies within an epoch would be trained a step further, before anyone asks whether it ends
    def _init_training_state(self, max_steps: int, steps_per_epoch: int, num_train_epochs: int, *args: Any) -> Any:
        state = super()._init_training_state(max_steps, steps_per_epoch, num_train_epochs, *args)
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else state

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs:  # of the whole run
            total, steps = self._losses()
            logs["train_loss"] = total / max(steps, 0.001)
        super().log(logs, start_time)


@contextlib.contextmanager
def _hidden(args: Any, name: str) -> Iterator[Any]:
    """An argument that Trainer is not to see for the duration."""
    value = getattr(args, name)
    setattr(args, name, None)
    try:
        yield value
    finally:
        setattr(args, name, value)
