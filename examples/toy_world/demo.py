"""Merges four specialists into one student, on a laptop: the real trainer on the toy world.

    make demo
    python -m examples.toy_world.demo --seed 1 --output-dir runs/demo-1

Ends with a table (base, each teacher, student: scores on held-out prompts), a picture grid, a plot of KL and scores
over the steps, and the folder of a LoRA that plain diffusers loads, with a command that draws with it. Nothing here
trains by itself: this is how a user of the library would write it.
"""

import argparse
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from diffusers import FluxKontextPipeline
from PIL import Image, ImageDraw
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerControl, TrainerState

from diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer, Teacher
from examples.toy_world.evaluate import evaluate, generate
from examples.toy_world.extra import Console, Table, plt
from examples.toy_world.pipeline import BASE, TEACHERS, load_base, quiet
from examples.toy_world.rewards import lora_config, sampling_kwargs, training_prompts
from examples.toy_world.world import TASKS, Task, sample_prompts, sources

MAX_STEPS, BATCH_SIZE, LEARNING_RATE = 110, 8, 4e-3
# Of each walk two random steps: at equal cost more walks teach more than all steps of fewer (docs/results.md)
RECIPE = {"query": "random", "num_queries": 2}
SHOWN, SHOWN_SEED = 3, 77  # pictures of each task


class Progress(TrainerCallback):
    """One bar with the loss (in a terminal) and now and then a line, where transformers prints all metrics of each
    step."""

    every = 20

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar = tqdm(total=state.max_steps, unit="step", dynamic_ncols=True, disable=None)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if "loss" not in logs:  # the summary at the end
            return
        self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
        self.bar.update()
        if state.global_step % self.every == 0:
            means = {key: fmean(entry[key] for entry in state.log_history[-self.every :]) for key in ("loss", "kl")}
            self.bar.write(f"step {state.global_step:3d}  loss {means['loss']:.4f}  KL {means['kl']:.5f}")
            sys.stdout.flush()  # into a file too

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.close()


class Scores(TrainerCallback):
    """The student's scores on a few held-out prompts while it trains, for the plot."""

    def __init__(self, pipeline: FluxKontextPipeline, every: int, n: int):
        self.pipeline, self.every, self.n = pipeline, every, n
        self.history: list[tuple[int, dict[str, float]]] = []
        self.seconds = 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.score(0)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.score(state.global_step)

    def score(self, step: int) -> None:
        started = time.perf_counter()
        self.history.append((step, evaluate(self.pipeline, self.n)))
        self.seconds += time.perf_counter() - started


def specialist(task: str) -> FluxKontextPipeline:
    pipeline = load_base()
    pipeline.load_lora_weights(TEACHERS / task, weight_name="pytorch_lora_weights.safetensors")
    return pipeline


def distil(
    output_dir: Path,
    seed: int,
    max_steps: int,
    tasks: Sequence[Task] = TASKS,
    trainer_class: type[DiffusionOPDTrainer] = DiffusionOPDTrainer,
    num_scored: int = 20,
    specialists: Mapping[Task, str | Teacher] | None = None,
    words: Mapping[Task, str] | None = None,
    **settings: Any,
) -> tuple[DiffusionOPDTrainer, Scores, float]:
    """One student from the specialists of `tasks` (the shipped ones where `specialists` names none): the trainer, the
    scores on the way, and the seconds of training alone. `words`: of tasks that tell the student which one is meant."""
    args = DiffusionOPDConfig(
        str(output_dir),
        **sampling_kwargs()
        | dict(
            max_steps=max_steps,
            per_device_train_batch_size=BATCH_SIZE,
            # The KL of the ODE puts half of its weight on one late step; what a picture shows is decided early
            objective="velocity",
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=seed,
        )
        | settings,
    )
    trainer = trainer_class(
        model=str(BASE),
        teachers={task: str(TEACHERS / task) for task in tasks} | dict(specialists or {}),
        args=args,
        train_dataset={task: training_prompts(task, seed, (words or {}).get(task)) for task in tasks},
        peft_config=lora_config(rank=32),
    )
    trainer.pipeline.set_progress_bar_config(disable=True)
    for printer in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(printer)
    trainer.add_callback(Progress())
    scores = Scores(trainer.pipeline, every=max(1, max_steps // 4), n=num_scored)
    if num_scored:
        trainer.add_callback(scores)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started - scores.seconds
    trainer.save_model()
    return trainer, scores, seconds


def picture_grid(rows: list[tuple[str, list[Image.Image | None]]], captions: list[str], path: Path) -> None:
    """Prompts from left to right; sources of edits, base, the prompt's own teacher, and the student from top to
    bottom."""
    tile, label, header = 128, 70, 34
    grid = Image.new("RGB", (label + tile * len(captions), header + tile * len(rows)), "white")
    canvas = ImageDraw.Draw(grid)
    for column, caption in enumerate(captions):
        words, lines = caption.split(), [""]
        for word in words:
            lines = [*lines, word] if len(lines[-1]) + len(word) > 20 else [*lines[:-1], f"{lines[-1]} {word}".strip()]
        canvas.multiline_text((label + column * tile + 4, 3), "\n".join(lines), fill="black", spacing=1, font_size=11)
    for row, (name, pictures) in enumerate(rows):
        canvas.text((6, header + row * tile + tile // 2 - 6), name, fill="black", font_size=13)
        for column, picture in enumerate(pictures):
            if picture is None:
                continue
            grid.paste(picture.resize((tile - 4,) * 2, Image.NEAREST), (label + column * tile, header + row * tile))
    grid.save(path)


def plot(trainer: DiffusionOPDTrainer, scores: Scores, table: dict[str, dict[str, float]], path: Path) -> None:
    """KL to each teacher and the student's scores over the steps, with the levels of base and teachers."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    for task in TASKS:
        line = left.plot([e["step"] for e in history], [e[f"kl/{task}"] for e in history], label=task)[0]
        colour = line.get_color()
        right.plot([s for s, _ in scores.history], [v[task] for _, v in scores.history], "o-", c=colour, label=task)
        right.axhline(table[f"{task} teacher"][task], color=colour, linestyle="--", linewidth=1)
        right.axhline(table["base"][task], color=colour, linestyle=":", linewidth=1)
    left.set(xlabel="optimizer step", ylabel="KL to the task's teacher", yscale="log")
    right.set(xlabel="optimizer step", ylabel=f"score ({scores.n} held-out prompts)", ylim=(0, 1.05))
    right.set_title("dashed: the task's teacher, dotted: base (on all prompts)", fontsize=10)
    left.legend()
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def shown_path(path: Path) -> str:
    """As short as it can be typed from here."""
    path = Path(os.path.abspath(path))
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))


def main(output_dir: Path, seed: int, max_steps: int, n: int) -> dict[str, dict[str, float]]:
    console = Console(highlight=False)
    output_dir.mkdir(parents=True, exist_ok=True)
    shown = {task: sample_prompts(task, SHOWN, SHOWN_SEED, heldout=True) for task in TASKS}
    pictures: dict[str, list[Image.Image]] = {}

    def draw_shown(pipeline: FluxKontextPipeline) -> list[Image.Image]:
        return [picture for prompts in shown.values() for picture in generate(pipeline, prompts, SHOWN_SEED)]

    table: dict[str, dict[str, float]] = {}
    console.print(f"Scoring the base model and its {len(TASKS)} specialists")
    for name, pipeline in [("base", load_base()), *((f"{task} teacher", specialist(task)) for task in TASKS)]:
        started = time.perf_counter()
        table[name] = evaluate(pipeline, n)
        table[name]["seconds"] = time.perf_counter() - started
        pictures[name] = draw_shown(pipeline)

    console.print(f"Distilling them into one student, {max_steps} steps; lines are means of {Progress.every}")
    trainer, scores, seconds = distil(output_dir, seed, max_steps, **RECIPE)
    table["student"] = {**evaluate(trainer.pipeline, n), "seconds": seconds}
    pictures["student"] = draw_shown(trainer.pipeline)

    rendered = Table(title=f"Scores on {n} held-out prompts of each task")
    rendered.add_column("model")
    for column in (*TASKS, "mean", "seconds"):
        rendered.add_column(column, justify="right")
    for name, row in table.items():
        row["mean"] = sum(row[task] for task in TASKS) / len(TASKS)
        rendered.add_row(name, *(f"{row[task]:.3f}" for task in (*TASKS, "mean")), f"{row['seconds']:.0f}")
    console.print(rendered)
    console.print("seconds: scoring (base, teachers), distillation (student)")
    gaps = {task: (table["base"][task], table[f"{task} teacher"][task]) for task in TASKS}
    closed = {  # of few prompts a teacher may score what the base does
        task: (table["student"][task] - base) / (teacher - base) if teacher != base else math.nan
        for task, (base, teacher) in gaps.items()
    }
    shares = ", ".join(f"{task} {share:.0%}" for task, share in closed.items())
    console.print(f"of the way from the base to the teacher: {shares}")
    own = [pictures[f"{task} teacher"][i * SHOWN + j] for i, task in enumerate(TASKS) for j in range(SHOWN)]
    beside = [image for prompts in shown.values() for image in sources(prompts, SHOWN_SEED) or [None] * SHOWN]
    rows = [("source", beside), ("base", pictures["base"]), ("its teacher", own), ("student", pictures["student"])]
    picture_grid(rows, [prompt.text for prompts in shown.values() for prompt in prompts], output_dir / "grid.png")
    plot(trainer, scores, table, output_dir / "training.png")
    result = {"seed": seed, "max_steps": max_steps, "n": n, "table": table, "closed": closed}
    (output_dir / "scores.json").write_text(json.dumps(result, indent=2))
    folder, python = (shown_path(Path(path)) for path in (output_dir, sys.executable))
    # Not by rich, which breaks lines: the last one is to be copied
    print(f"\npictures  {folder}/grid.png\nplot      {folder}/training.png\nstudent   {folder} (a LoRA)\n")
    print(f'Draw with it:\n{python} -m examples.toy_world.draw {folder} "a red circle"')
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Merge the toy world's specialists into one student.")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-steps", type=int, default=MAX_STEPS)
    parser.add_argument("-n", type=int, default=60, help="held-out prompts of each task")
    options = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    quiet()
    main(options.output_dir, options.seed, options.max_steps, options.n)
