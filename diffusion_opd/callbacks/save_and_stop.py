"""Pre-emption: a run that is told to end saves a checkpoint first (`enable_jit_checkpoint`)."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState


class SaveAndStop(TrainerCallback):
    """
    In the place of transformers' callback of `enable_jit_checkpoint`, which saves whenever its own process has been
    told: several processes would do so at different steps, and wait for each other for ever.

    Args:
        listener ([`~transformers.trainer_jit_checkpoint.JITCheckpointCallback`], *optional*): That callback, which
            hears the signal; `None`: nobody tells this run anything.

    Attributes:
        agreed (`bool`): Whether any process had been told in this optimizer step; whoever asks them all sets it.
    """

    def __init__(self, listener: Any):
        self.listener = listener
        self.agreed = False

    @property
    def is_told(self) -> bool:
        """Whether this process has been told."""
        return self.listener is not None and self.listener.jit_manager.is_checkpoint_requested

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.agreed:
            self.listener.jit_manager.is_checkpoint_requested = False
            control.should_save, control.should_evaluate, control.should_training_stop = True, False, True

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.listener is not None:
            self.listener.on_train_end(args, state, control, **kwargs)
