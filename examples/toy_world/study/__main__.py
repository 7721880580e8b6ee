"""Runs rows of the study and prints their tables.

    python -m examples.toy_world.study opd kl_noise_0 --seeds 0 1 2
    python -m examples.toy_world.study --report

A row with a result is not run again; a reinforcement run that was killed goes on from its last checkpoint.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from examples.toy_world.evaluate import evaluate
from examples.toy_world.study.report import report
from examples.toy_world.study.rows import ROWS
from examples.toy_world.study.states import gaps
from examples.toy_world.world import TASKS

PROMPTS = 120  # held out, of each task


def run(name: str, seed: int, output_dir: Path) -> None:
    """Trains, scores and measures one row with one seed, and writes `result.json`."""
    folder = output_dir / name / f"seed-{seed}"
    if (folder / "result.json").is_file():
        return
    row = ROWS[name]
    started = time.perf_counter()
    pipeline = row.train(folder, seed)
    pipeline.set_progress_bar_config(disable=True)
    seconds = time.perf_counter() - started
    result = {
        "row": name,
        "seed": seed,
        "evaluations": row.evaluations,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "settings": {key: str(value) for key, value in row.settings.items()},
        "scores": evaluate(
            pipeline, PROMPTS, tasks=tuple(dict.fromkeys((*TASKS, *row.tasks))), words=row.words, **row.sampling
        ),
        "gaps": gaps(pipeline),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result, indent=2))
    print(
        name, seed, {task: round(score, 3) for task, score in result["scores"].items()}, f"{seconds:.0f} s", flush=True
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run rows of the study.")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/study"))
    parser.add_argument("--report", action="store_true", help="print the tables of what has run, draw the plots")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.rows if name not in ROWS]:
        parser.error(f"no row is called {unknown[0]!r}; choose from {', '.join(ROWS)}")
    return options


if __name__ == "__main__":
    options = parse()
    for seed in options.seeds:
        for name in options.rows:
            run(name, seed, options.output_dir)
    if options.report:
        report(options.output_dir)
