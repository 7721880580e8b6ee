"""What of a run is published: the files that are pushed to the Hub, and the model card.

transformers' Trainer uploads its own file names, i.e. no weights of a denoiser, and TRL's card names transformers as
its library and shows a chat.
"""

import json
import re
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from diffusers import ModularPipeline
from huggingface_hub import CommitInfo, CommitOperationAdd, ModelCard, ModelCardData
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import PushInProgress, hf_api
from trl.trainer.base_trainer import _BaseTrainer

from .adapters import STUDENT_ADAPTER
from .callbacks.pictures import BESIDE, IMAGES_DIR
from .callbacks.sounds import makes_sound
from .config import DiffusionConfig
from .data import Data
from .disclosure import disclosed, is_repository
from .errors import brief, one_sentence
from .files import INDEX_NAME, LORA_NAME, MODULAR_INDEX_NAME, name_or_path
from .inputs import PROMPT, sample_arguments
from .modular import GUIDANCE, guiders_of, has_guiders, save_pipeline
from .student import Student, forget_old_shards

logger = get_logger(__name__)


class Publishing(_BaseTrainer):
    """What [`DiffusionTrainer`] publishes: its `student`, its sample pictures, and what its subclasses add to
    `_published_names` and `_card_fields`."""

    args: DiffusionConfig
    student: Student
    data: Data
    hub_model_id: Any  # what Trainer sets
    push_in_progress: Any

    _tag_names = ["trl", "diffusion-opd"]
    _has_card = False  # of this run
    _has_pipeline = False  # whose frozen parts lie in `output_dir`
    _keeps: int | None = None  # checkpoints, which may be deleted in a moment
    _start: str | None = None  # of a LoRA that the student began with

    @property
    def image_prompts(self) -> list[str]:
        """The prompts of the sample images."""
        raise NotImplementedError

    # The Hub

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        with one_sentence(
            f"the repository {name!r} cannot be had to push to (`hf auth login`, or a `hub_token` that may write, or "
            "`push_to_hub=False`)"
        ):
            super().init_hf_repo(token=token, private=private)
        self.student.repo_id = self.hub_model_id
        self._make_branch(self.args.hub_revision, token)

    # An upload to a branch that is not there fails, after the training
    def _make_branch(self, revision: str | None, token: str | None) -> None:
        if revision is None or revision.startswith("refs/") or not self.is_world_process_zero():
            return
        with one_sentence(
            f"the repository {self.hub_model_id!r} has no branch {revision!r}, and it cannot be made (a `hub_token` "
            "that may, or another `hub_revision`)"
        ):
            hf_api().create_branch(
                self.hub_model_id, branch=revision, token=token or self.args.hub_token, exist_ok=True
            )

    # With `save_total_limit=1` it may delete the last checkpoint, and `on_train_end` comes after that
    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._finish_current_push()
        return super()._finalize_training(*args, **kwargs)

    # Uploads run in the background, where nobody sees them fail; `on_push_begin` is asked before there is one
    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._warn_of_failed_pushes()

    def _warn_of_failed_pushes(self) -> None:
        job: Any = getattr(self, "push_in_progress", None)
        for upload in [] if job is None else job.jobs:
            if upload.done() and (error := upload.exception()) is not None:
                logger.warning(
                    f"An upload to {self.hub_model_id} failed ({brief(error)}); what is missing goes up with the next "
                    "one, or with `trainer.push_to_hub()`."
                )
                job.jobs = [other for other in job.jobs if other is not upload]

    # transformers' own uploads whatever lies in `output_dir`
    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Saves the student and uploads it, with its manifest, pictures, card and metrics, and nothing else of
        `output_dir`.

        Args:
            commit_message, blocking, token, revision, private: As for [`~transformers.Trainer`].
            kwargs: For [`create_model_card`].
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self._make_branch(revision or self.args.hub_revision, token)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**({"model_name": self._card_name} | kwargs))
        self._finish_current_push()
        upload = partial(self._upload, self._published(), commit_message, token, revision)
        return upload() if blocking else hf_api().run_as_future(upload)

    # Likewise; and the weights that it copies from the checkpoint are a language model's
    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == "end":
            return
        # An upload that still runs reads these very files: the next one waits for it, or is left out as Trainer does,
        # unless the files may be deleted in a moment
        with_checkpoint = self.args.hub_strategy in ("checkpoint", "all_checkpoints")
        if self.args.hub_always_push or (with_checkpoint and self._keeps):
            self._finish_current_push()
        else:
            self._warn_of_failed_pushes()
        if self.push_in_progress is not None and not self.push_in_progress.is_done():
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        output_dir = Path(self.args.output_dir)
        if not self.student.trains_lora and not self._has_pipeline:
            # Its denoiser, which may be sharded, is copied from the checkpoint
            for part in self.student.trained.values():
                part.save_pretrained = lambda *args, **kwargs: None
            try:
                save_pipeline(self.student.pipeline, output_dir, self.student.repo_id)
            finally:
                for part in self.student.trained.values():
                    del part.save_pretrained
            self._has_pipeline = True
        for source in Path(checkpoint_folder).iterdir():
            if source.name in self._published_names:
                if source.is_dir():
                    shutil.copytree(source, output_dir / source.name, dirs_exist_ok=True)
                else:
                    shutil.copy(source, output_dir / source.name)
        for name in () if self.student.trains_lora else self.student.pipeline.components:
            forget_old_shards(output_dir / name)
        by_steps, epoch = self.args.save_strategy == "steps", int(self.state.epoch or 0)
        message = f"Training in progress, {f'step {self.state.global_step}' if by_steps else f'epoch {epoch}'}"
        jobs = [hf_api().run_as_future(self._upload, self._published(), message)]
        if with_checkpoint:
            place = "last-checkpoint" if self.args.hub_strategy == "checkpoint" else Path(checkpoint_folder).name
            files = _with_state(Path(checkpoint_folder), place)
            jobs.append(hf_api().run_as_future(self._upload, files, f"{message}, checkpoint"))
        self.push_in_progress = PushInProgress(jobs)  # type: ignore[arg-type]  # it holds a list

    def _published(self) -> dict[str, Path | bytes]:
        """What goes up, by its place in the repository: of `output_dir` what the run has made, and its metrics."""
        output_dir, names = Path(self.args.output_dir), {"README.md", *self._published_names}
        if not self.student.trains_lora:
            names |= {INDEX_NAME, MODULAR_INDEX_NAME, *self.student.pipeline.components}
        made = [path for name in names for path in _files(output_dir / name)]
        for kind in ("*.png", "*.wav", "captions.json"):
            made += output_dir.glob(f"{IMAGES_DIR}/step_*/{kind}")
        metrics = json.dumps(self.state.log_history, indent=2) + "\n"
        return {path.relative_to(output_dir).as_posix(): path for path in made} | {"metrics.json": metrics.encode()}

    def _upload(
        self, files: Mapping[str, Path | bytes], message: str | None, token: str | None = None, revision: Any = None
    ) -> CommitInfo:
        return hf_api().create_commit(
            self.hub_model_id,
            [CommitOperationAdd(place, content) for place, content in files.items()],
            commit_message=message or "",
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
        )

    @property
    def _published_names(self) -> set[str]:
        return self.student.file_names

    # The card

    def write_model_card(self) -> None:
        """Writes the card of a run that saves a checkpoint."""
        self.create_model_card(model_name=self._card_name)
        self._has_card = True

    def renew_model_card(self) -> None:
        """Writes it anew, with what has come since, if there is one of this run."""
        if self._has_card:
            self.create_model_card(model_name=self._card_name)

    def create_model_card(  # type: ignore[override]  # TRL's signature, which is not Trainer's
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Writes `README.md`: metadata, gallery, how to load the student, settings, citation."""
        if not self.is_world_process_zero():
            return
        pipeline, trains_lora = self.student.pipeline, self.student.trains_lora
        source = name_or_path(pipeline)
        base = source if source and is_repository(source) else None
        output_dir = Path(self.args.output_dir)
        gallery = sorted(output_dir.glob(f"{IMAGES_DIR}/step_*"))[-1:]
        pictures = sorted([*gallery[0].glob("*.png"), *gallery[0].glob("*.wav")]) if gallery else []
        # Those with what they were made from, if it was pictures
        pictures = [path for path in pictures if path.stem.endswith(BESIDE)] or pictures
        name = model_name or output_dir.name
        makes = "audio" if makes_sound(pipeline) else "video" if hasattr(pipeline, "video_processor") else "image"
        sources, arguments = self._call_in_words()
        guiders = dict.fromkeys(guiders_of(pipeline), arguments.get(GUIDANCE)) if has_guiders(pipeline) else {}
        if guiders:
            arguments.pop(GUIDANCE, None)
        data = ModelCardData(
            library_name="diffusers",
            base_model=base,
            # A tag of the Hub's, which else guesses from the files
            base_model_relation=None if base is None else "adapter" if trains_lora else "finetune",
            model_name=name,
            datasets=dataset_name if dataset_name and is_repository(dataset_name) else None,
            pipeline_tag=f"{min(sources, default='text')}-to-{makes}",
            tags=[
                *self._tag_names,
                *(["lora"] if trains_lora else []),
                *([tags] if isinstance(tags, str) else tags or []),
            ],
            widget=[
                {"text": prompt, "output": {"url": picture.relative_to(output_dir).as_posix()}}
                for prompt, picture in zip(self.image_prompts, pictures, strict=False)
            ]
            or None,
        )
        card = ModelCard.from_template(
            data,
            template_path=str(Path(__file__).with_name("model_card.md")),
            plain=plain,
            code=code,
            quoted=json.dumps,
            name=name,
            repo_id=self.hub_model_id or self.args.hub_model_id or disclosed(str(output_dir)),
            base_model=base,
            base_folder=disclosed(source) if source else "folder of the base model",
            pipeline_class=type(pipeline).__name__,
            dtype=None if self.args.mixed_dtype == torch.float32 else str(self.args.mixed_dtype),
            trains_lora=trains_lora,
            start=self._start,
            loras=self.student.lora_files,
            is_peft=trains_lora and not self.student.has_lora_loader,
            default_name=LORA_NAME,
            makes=makes,
            loader="ModularPipeline" if isinstance(pipeline, ModularPipeline) else "DiffusionPipeline",
            is_modular=isinstance(pipeline, ModularPipeline),
            guiders=guiders,
            has_gallery=bool(pictures),
            loaders=[f"load_{source}" for source in sorted(sources - {"audio"})],
            arguments=arguments,
            trainer_name=self._name,
            paper=self._paper,
            **self._card_fields(),
        )
        output_dir.mkdir(parents=True, exist_ok=True)
        card.save(output_dir / "README.md")

    def _call_in_words(self) -> tuple[set[str], dict[str, str]]:
        """What the pipeline makes its samples from besides text (`"image"`, `"video"`, `"audio"`), and its arguments
        besides the prompt."""
        cls: Any = type(self.student.pipeline)
        kinds, given = sample_arguments(cls), self.args.pipeline_kwargs
        names = [name for name in (*self.data.columns, *given) if name != PROMPT]
        sources = {
            name: next((kind for kind in ("video", "audio") if kind in name), "image")
            for name in names
            if not kinds.get(name, True)
        }
        words = {  # diffusers loads no audio
            name: f'load_{sources[name]}("...")'
            if sources.get(name) in ("image", "video")
            else repr(disclosed(given.get(name, "...")))
            for name in names
        }
        return set(sources.values()), words

    @property
    def _card_name(self) -> str:
        return Path(self.args.hub_model_id or self.args.output_dir).name

    def _card_fields(self) -> dict[str, Any]:
        """What a trainer's own part of the card shows: `teachers` or `rewards` (rows), and `settings`."""
        return {"settings": self._run_settings()}

    def _run_settings(self) -> dict[str, Any]:
        settings = {"optimizer steps": self.state.global_step, "processes": self.accelerator.num_processes}
        if self.student.trains_lora:
            lora: Any = self.student.denoiser.peft_config[STUDENT_ADAPTER]
            settings |= {"LoRA rank": lora.r, "LoRA alpha": lora.lora_alpha}
        if self._start is not None:
            settings["student_lora"] = self._start
        return settings


# What users call their teachers, rewards and folders may hold anything


def plain(value: Any) -> str:
    """Text in one line of Markdown that shows it as it is."""
    special = r"[\\`*{}\[\]<>#|&~$!]|(?<![^\W_])_|_(?![^\W_])"  # within a word `_` means nothing
    return re.sub(special, lambda found: f"&#{ord(found[0])};", " ".join(str(value).split()))


def code(value: Any) -> str:
    """The same as code, in a cell of a table."""
    text = " ".join(str(value).split()).replace("|", r"\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in (text[:1], text[-1:]) else ""
    return f"{fence}{space}{text}{space}{fence}"


def _files(path: Path) -> list[Path]:
    """A file, or those in a folder but for hidden ones."""
    if not path.is_dir():
        return [path] if path.is_file() else []
    return [file for inside in path.iterdir() if not inside.name.startswith(".") for file in _files(inside)]


def _with_state(checkpoint: Path, place: str) -> dict[str, Path | bytes]:
    """The files of a checkpoint by their place in the repository; its state without where the best one lies."""
    files: dict[str, Path | bytes] = {f"{place}/{f.relative_to(checkpoint).as_posix()}": f for f in _files(checkpoint)}
    state = disclosed(json.loads((checkpoint / TRAINER_STATE_NAME).read_text()))
    return files | {f"{place}/{TRAINER_STATE_NAME}": (json.dumps(state, indent=2) + "\n").encode()}
