"""Sample pictures of a run: what they show, how they are drawn, and who is shown them."""

import copy
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset
from diffusers.utils import make_image_grid
from PIL import Image
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback

from ..sampling import PROMPT, seed_of

logger = get_logger(__name__)

IMAGES_DIR = "images"


class Pictures(TrainerCallback):
    """
    Draws the sample pictures of an optimizer step when all that follows it is done: at the beginning of the next one,
    or at the end of training.

    Args:
        trainer ([`DiffusionTrainer`]): Whose `pipeline` draws, inside its `ema_weights`; whose `image_captions` may be
            a subclass's own.
        task_column (`str`): Of its dataset.
    """

    def __init__(self, trainer: Any, task_column: str):
        self.trainer, self.task_column = trainer, task_column

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Those of the step before; also when a run is resumed here, which may have been killed before it drew them
        if args.image_steps and state.global_step and state.global_step % args.image_steps == 0:
            self.trainer.log_images()

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.image_steps != 0 and not self.trainer.was_told_to_stop:
            self.trainer.log_images()

    @property
    def examples(self) -> list[dict[str, Any]]:
        """What they show: `args.image_prompts`, or the first rows of each task, four or more in all."""
        args, tasks, dataset = self.trainer.args, self.trainer.tasks, self.trainer.train_dataset
        if args.image_prompts is not None:
            return [{PROMPT: prompt} for prompt in args.image_prompts]
        if not isinstance(dataset, Dataset):
            return []
        per_task = -(-4 // len(tasks))
        rows: dict[str, list[int]] = {key: [] for key in tasks}
        for row, task in enumerate(dataset[self.task_column]):
            if len(rows[task]) < per_task:
                rows[task].append(row)
            elif all(len(chosen) == per_task for chosen in rows.values()):
                break
        return [dataset[row] for chosen in rows.values() for row in chosen]

    @torch.no_grad()
    def draw(self, prompts: Sequence[str]) -> list[Any]:
        """An image, or a list of frames, for each prompt, with fixed seeds, on every process. What the pipeline raises
        on one process is raised on all (where each call of the denoiser gathers sharded weights: once these calls are
        done)."""
        args, accelerator = self.trainer.args, self.trainer.accelerator
        world, rank = accelerator.num_processes, accelerator.process_index
        per_process = -(-len(prompts) // world)
        # Every process draws equally many: sharded weights are gathered by all
        mine = [min(index, len(prompts) - 1) for index in range(rank * per_process, (rank + 1) * per_process)]
        if not mine:
            return []
        pipeline = copy.copy(self.trainer.pipeline)
        pipeline.set_progress_bar_config(disable=True)
        self.trainer.model.eval()
        drawn, error = [], None
        try:
            with self.trainer.ema_weights():
                output = pipeline(
                    prompt=[prompts[index] for index in mine],
                    num_inference_steps=args.image_num_inference_steps or args.num_inference_steps,
                    generator=[torch.Generator().manual_seed(seed_of(args.seed, index)) for index in mine],
                    output_type="pil",
                    **args.pipeline_kwargs,
                )
            drawn = list(output.images if hasattr(output, "images") else output.frames)
        except Exception as own:
            error = own
        if world > 1:  # or those that could draw would wait for the one that could not
            errors = gather_object([None if error is None else f"{type(error).__name__}: {error}"])
            drawn = gather_object(drawn)
            if error is None and any(errors):
                error = RuntimeError(f"another process could not draw: {next(filter(None, errors))}")
        try:
            if error is not None:
                raise error
        finally:
            del error  # its traceback holds this frame, and all that the call left on the device
        return drawn[: len(prompts)]

    def log(self) -> None:
        """Draws them and hands them to `output_dir/images/step_...` and the trackers in use. What fails on the way is a
        warning: a picture is not worth a run."""
        try:
            drawn = self.draw(self.trainer.image_prompts)
            if drawn and self.trainer.is_world_process_zero():
                self._show(drawn)
                self.trainer.renew_model_card()
        except Exception as error:
            logger.warning(
                f"The sample pictures of optimizer step {self.trainer.state.global_step} could not be drawn or shown "
                f"({type(error).__name__}: {textwrap.shorten(str(error), 200)}); the run goes on."
            )

    def _show(self, drawn: list[Any]) -> None:
        images = [middle_frame(one) for one in drawn]
        args, step = self.trainer.args, self.trainer.state.global_step
        folder = Path(args.output_dir, IMAGES_DIR, f"step_{step:06d}")
        folder.mkdir(parents=True, exist_ok=True)
        for index, image in enumerate(images):
            image.save(folder / f"{index:02d}.png")
        captions = self.trainer.image_captions(drawn)
        (folder / "captions.json").write_text(json.dumps(captions, indent=2) + "\n")
        grid = make_image_grid(images, rows=1, cols=len(images))
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                pixels = torch.frombuffer(bytearray(grid.convert("RGB").tobytes()), dtype=torch.uint8)
                callback.tb_writer.add_image(
                    "samples", pixels.view(grid.height, grid.width, 3), step, dataformats="HWC"
                )
        if "wandb" in args.report_to:
            import wandb

            if wandb.run is not None:
                wandb.log({"samples": [wandb.Image(i, caption=c) for i, c in zip(images, captions, strict=True)]})
        if "trackio" in args.report_to:
            import trackio

            trackio.log({"samples": trackio.Image(grid, caption=" | ".join(captions))})


def middle_frame(drawn: Image.Image | list[Image.Image]) -> Image.Image:
    """What is shown of a video."""
    return drawn[len(drawn) // 2] if isinstance(drawn, list) else drawn
