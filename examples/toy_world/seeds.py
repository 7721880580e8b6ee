"""The demo over several seeds, as the table of docs/results.md.

    python -m examples.toy_world.seeds --seeds 0 1 2

A seed draws the training prompts, the initial LoRA and all noise of the training; the base, the specialists and
the held-out prompts are the same for all. A seed that has run already is read from its folder.
"""

import argparse
import json
import statistics
from pathlib import Path

from examples.toy_world.demo import MAX_STEPS, main
from examples.toy_world.world import TASKS


def spread(values: list[float], digits: int = 3) -> str:
    mean = statistics.mean(values)
    return (
        f"{mean:.{digits}f}" if len(set(values)) == 1 else f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Run the demo over several seeds and print one table.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--max-steps", type=int, default=MAX_STEPS)
    parser.add_argument("-n", type=int, default=120, help="held-out prompts of each task")
    options = parser.parse_args()

    runs = []
    for seed in options.seeds:
        folder = options.output_dir / f"seed-{seed}"
        if not (folder / "scores.json").is_file():
            main(folder, seed, options.max_steps, options.n)
        runs.append(json.loads((folder / "scores.json").read_text()))

    print("| model | " + " | ".join(TASKS) + " | mean | seconds |\n|---|" + "---|" * (len(TASKS) + 2))
    for name in runs[0]["table"]:
        rows = [run["table"][name] for run in runs]
        cells = [spread([row[key] for row in rows]) for key in (*TASKS, "mean")]
        print(f"| {name} | " + " | ".join(cells) + f" | {spread([row['seconds'] for row in rows], 0)} |")
    print("\n| of the way from base to teacher | " + " | ".join(TASKS) + " |\n|---|" + "---|" * len(TASKS))
    for run in runs:
        print(f"| seed {run['seed']} | " + " | ".join(f"{run['closed'][task]:.0%}" for task in TASKS) + " |")
