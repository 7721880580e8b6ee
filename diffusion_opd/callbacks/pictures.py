"""Sample pictures of a run, or sounds: what they show, how they are drawn, and who is shown them."""

import copy
import importlib
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid
from PIL import Image
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback

from ..decoding import CHECKER, takes_no_checker, watched_decoders
from ..inputs import PROMPT, as_arguments, inputs_of, signature
from ..sampling import seed_of
from .sounds import Sound, as_sound, makes_sound, sampling_rate

logger = get_logger(__name__)

IMAGES_DIR = "images"
BESIDE = "_beside"  # in the names of files that show what a picture was made from on its left


class Pictures(TrainerCallback):
    """
    Draws the sample pictures of an optimizer step when all that follows it is done: at the beginning of the next one,
    or at the end of training.

    Args:
        trainer ([`DiffusionTrainer`]): Whose `pipeline` draws, inside its `ema_weights`; whose `image_captions` may be
            a subclass's own.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Those of the step before; also when a run is resumed here, which may have been killed before it drew them
        if args.image_steps and state.global_step and state.global_step % args.image_steps == 0:
            self.trainer.log_images()

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.image_steps == 0 or self.trainer.was_told_to_stop:
            return
        try:
            self.trainer.log_images()
        except BaseException as error:  # with nothing saved, an interrupted drawing would cost a run that is done
            logger.warning(f"The last sample pictures are left out ({type(error).__name__}); the run is done.")

    @property
    def examples(self) -> list[dict[str, Any]]:
        """What they show: the first rows of each task, four or more in all; or `args.image_prompts`, with the pictures
        of these."""
        args, tasks, data = self.trainer.args, self.trainer.tasks, self.trainer.data
        rows = []
        if isinstance(data.train, Dataset) and (args.image_prompts is None or data.pictures):
            rows = [row for task in tasks for row in data.examples(task, -(-4 // len(tasks)))]
        if args.image_prompts is None:
            return rows
        given = [{name: row[name] for name in data.pictures if name in row} for row in rows] or [{}]
        return [{**given[number % len(given)], PROMPT: prompt} for number, prompt in enumerate(args.image_prompts)]

    @torch.no_grad()
    def draw(self, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
        """An image, a list of frames or a [`Sound`] for each row, with fixed seeds, on every process. What the pipeline
        raises on one process is raised on all (where each call of the denoiser gathers sharded weights: once these
        calls are done)."""
        args, accelerator = self.trainer.args, self.trainer.accelerator
        world, rank = accelerator.num_processes, accelerator.process_index
        per_process = -(-len(rows) // world)
        # Every process draws equally many: sharded weights are gathered by all
        mine = [min(index, len(rows) - 1) for index in range(rank * per_process, (rank + 1) * per_process)]
        if not mine:
            return []
        finite: list[torch.Tensor] = []
        drawn: list[Any] = []
        error = None
        try:
            with self.trainer.whole_pipeline(), self.trainer.ema_weights():
                drawn = self.call(
                    [rows[index] for index in mine],
                    [torch.Generator().manual_seed(seed_of(args.seed, index)) for index in mine],
                    lambda row, decoded: finite.append(decoded.isfinite().all()),
                )
        except Exception as own_error:
            error = own_error
        if world > 1:  # or those that could draw would wait for the one that could not
            errors = gather_object([None if error is None else f"{type(error).__name__}: {error}"])
            drawn, finite = gather_object(drawn), gather_object([one.cpu() for one in finite])
            if error is None and any(errors):
                error = RuntimeError(f"another process could not draw: {next(filter(None, errors))}")
        try:
            if error is not None:
                raise error
        finally:
            del error  # its traceback holds this frame, and all that the call left on the device
        if not all(finite):
            logger.warning(
                f"The sample pictures of optimizer step {self.trainer.state.global_step} show NaN or Inf as black or "
                f"white: the VAE of {type(self.trainer.pipeline).__name__} decodes to such numbers."
            )
        return drawn[: len(rows)]

    @torch.no_grad()
    def call(
        self,
        rows: Sequence[Mapping[str, Any]],
        generators: Sequence[torch.Generator],
        decoded: Callable[[Mapping[str, Any], torch.Tensor], None],
        checker: bool = True,
    ) -> list[Any]:
        """What the pipeline makes of each row with the weights as they are: an image, a list of frames or a [`Sound`].

        Args:
            rows (`Sequence[Mapping]`): Equally many on every process where weights are sharded.
            generators (`Sequence[torch.Generator]`): One a row.
            decoded (`Callable`): Called with the first row of a call of the pipeline and its decoder's output,
                before that is pixels.
            checker (`bool`, *optional*, defaults to `True`): Whether a safety checker has its part.
        """
        args, data, drawn = self.trainer.args, self.trainer.data, [None] * len(rows)
        pipeline = copy.copy(self.trainer.pipeline)
        pipeline.set_progress_bar_config(disable=True)
        # Past `DiffusionPipeline.__setattr__`, which writes into the config
        own = vars(pipeline)
        if not checker and takes_no_checker(pipeline):
            own[CHECKER] = None
        takes_steps = "num_inference_steps" in signature(type(pipeline).__call__).parameters
        count = args.image_num_inference_steps or args.num_inference_steps
        steps = {"num_inference_steps": count} if takes_steps else {}
        bare = self.trainer.student.policy.takes_it_bare
        device = self.trainer.accelerator.device
        devices = [device] if device.type == "cuda" else []
        self.trainer.model.eval()
        for call in self.trainer.calls(rows):
            inputs, seeded = inputs_of([rows[row] for row in call], data.columns), [generators[row] for row in call]
            own.update(watched_decoders(self.trainer.pipeline, partial(decoded, rows[call[0]])))
            with torch.random.fork_rng(devices):  # some classes draw from the global generator
                torch.manual_seed(seeded[0].initial_seed())
                output = pipeline(
                    **as_arguments(type(pipeline), inputs, bare),
                    **steps,
                    generator=seeded[0] if bare else seeded,
                    output_type="np" if makes_sound(pipeline) else "pil",
                    **args.pipeline_kwargs,
                )
            for row, one in zip(call, _made(output, pipeline), strict=True):
                drawn[row] = one
        return drawn

    def log(self) -> None:
        """Draws them and hands them to `output_dir/images/step_...` and the trackers in use. What fails on the way is a
        warning: a picture is not worth a run."""
        try:
            rows = self.examples
            drawn = self.draw(rows)
            if drawn and self.trainer.is_world_process_zero():
                self._show(rows, drawn)
                self.trainer.renew_model_card()
        except Exception as error:
            logger.warning(
                f"The sample pictures of optimizer step {self.trainer.state.global_step} could not be drawn or shown "
                f"({type(error).__name__}: {textwrap.shorten(str(error), 200)}); the run goes on."
            )

    def _show(self, rows: Sequence[Mapping[str, Any]], drawn: list[Any]) -> None:
        folder = Path(self.trainer.args.output_dir, IMAGES_DIR, f"step_{self.trainer.state.global_step:06d}")
        folder.mkdir(parents=True, exist_ok=True)
        paths = [
            folder / f"{index:02d}.{'wav' if isinstance(one, Sound) else 'png'}" for index, one in enumerate(drawn)
        ]
        images = [middle_frame(one) for one in drawn]
        for path, image in zip(paths, images, strict=True):
            image.save(path)
        sources = [self._sources(row) for row in rows]
        if any(sources) and not isinstance(drawn[0], Sound):
            images = [beside(own, image) for own, image in zip(sources, images, strict=True)]
            for index, image in enumerate(images):
                image.save(folder / f"{index:02d}{BESIDE}.png")
        captions = self.trainer.image_captions(drawn)
        (folder / "captions.json").write_text(json.dumps(captions, indent=2) + "\n")
        if isinstance(drawn[0], Sound):
            self._play(paths, drawn, captions)
        else:
            self._hang(images, captions)

    def _play(self, paths: Sequence[Path], sounds: Sequence[Sound], captions: Sequence[str]) -> None:
        args, step = self.trainer.args, self.trainer.state.global_step
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                for index, sound in enumerate(sounds):
                    mono = torch.from_numpy(sound.samples.mean(0, keepdims=True))
                    callback.tb_writer.add_audio(f"samples/{index:02d}", mono, step, sample_rate=sound.rate)
        for name in {"wandb", "trackio"}.intersection(args.report_to):
            tracker = importlib.import_module(name)
            if name == "trackio" or tracker.run is not None:
                shown = [tracker.Audio(str(path), caption=text) for path, text in zip(paths, captions, strict=True)]
                # Of trackio each has a name of its own: it takes no list
                tracker.log(
                    {"samples": shown}
                    if name == "wandb"
                    else {f"samples/{index:02d}": one for index, one in enumerate(shown)}
                )

    def _hang(self, images: Sequence[Image.Image], captions: Sequence[str]) -> None:
        args, step = self.trainer.args, self.trainer.state.global_step
        size = max(image.width for image in images), max(image.height for image in images)
        grid = make_image_grid([beside([], image, size) for image in images], rows=1, cols=len(images))
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

    def _sources(self, row: Mapping[str, Any]) -> list[Image.Image]:
        """The pictures that a row was made from; of a video its middle frame, of several pictures all."""
        columns, sources = self.trainer.data.columns, []
        for name, column in columns.items():
            value = row.get(column) if column in self.trainer.data.pictures else None
            several = value if isinstance(value, list) and "video" not in name else [value]
            sources += [middle_frame(one) for one in several if isinstance(one, (Image.Image, list))]
        return sources


def beside(sources: Sequence[Image.Image], result: Image.Image, size: tuple[int, int] | None = None) -> Image.Image:
    """What a picture was made from, in its height, and on the right the picture itself; or in a frame of a size."""
    height = result.height
    shown = [one.resize((max(1, round(one.width * height / one.height)), height)) for one in sources] + [result]
    width = sum(one.width for one in shown)
    sheet = Image.new("RGB", size or (width, height), "white")
    left = 0
    for one in shown:
        sheet.paste(one, (left, 0))
        left += one.width
    return sheet


def _made(output: Any, pipeline: DiffusionPipeline) -> list[Any]:
    """What a pipeline's output holds for each sample: pictures, videos or, where it has neither, sounds."""
    for name in ("images", "frames", "videos"):  # the last of modular pipelines
        if getattr(output, name, None) is not None:
            return list(getattr(output, name))
    audios = next(iter(output.values())) if isinstance(output, Mapping) else output.audios
    return [as_sound(audio, sampling_rate(pipeline)) for audio in audios]


def middle_frame(drawn: Any) -> Any:
    """What is shown of a video; pictures and sounds as they are."""
    return drawn[len(drawn) // 2] if isinstance(drawn, list) else drawn
