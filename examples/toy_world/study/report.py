"""The study's tables and plots, from the results that are there."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.toy_world.evaluate import evaluate
from examples.toy_world.extra import plt
from examples.toy_world.pipeline import TEACHERS, load_base
from examples.toy_world.seeds import spread
from examples.toy_world.specialists import LORA_NAME
from examples.toy_world.study.rows import ROWS
from examples.toy_world.study.states import gaps
from examples.toy_world.world import MORE_TASKS, TASKS

TABLES = {
    "One model for all tasks": ["opd", "grpo_guard_all", "nft_all", "nft_cascade"],
    "Closed form and PPO-style": ["kl_noise_0.7", "ppo_noise_0.7"],
    "Noise level": ["kl_noise_0", "kl_noise_0.3", "kl_noise_0.7", "kl_noise_1.0"],
    "On-policy, off-policy, samples": ["opd_short", "off_policy_short", "sft_short"],
    "One teacher at a time": ["opd_short", *(f"only_{task}" for task in TASKS)],
    "One to seven teachers": [
        *("teachers_1", "teachers_2", "teachers_3", "opd_short", "teachers_5", "teachers_6", "teachers_7"),
        *("teachers_7_words", "teachers_7_weighted", "opd", "teachers_7_long"),
    ],
    "Recipes": [
        *("opd_short", "kl_noise_0", "compose_twice", "danceopd", "folded", "guided", "split", "ropd", "nft_taught"),
        *(name for name in ROWS if name.startswith(("beyond", "anchor", "random", "beta"))),
    ],
}
PROMPTS = 120


def levels(output_dir: Path) -> dict[str, dict[str, Any]]:
    """Scores and gaps of the base and of the teachers that there are, each measured once."""
    path = output_dir / "levels.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    loras = {"base": None} | {task: TEACHERS / task for task in TASKS}
    loras |= {task: output_dir / "specialists" / task for task in MORE_TASKS}
    for name, lora in loras.items():
        if name in found or (lora and not (lora / LORA_NAME).is_file()):
            continue
        pipeline = load_base()
        if lora:
            pipeline.load_lora_weights(lora, weight_name=LORA_NAME)
        found[name] = {"scores": evaluate(pipeline, PROMPTS, tasks=(*TASKS, *MORE_TASKS)), "gaps": gaps(pipeline)}
        output_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=2))
    return found


def way(scores: dict[str, float], reference: dict[str, dict[str, Any]], tasks: Sequence[str] = TASKS) -> float:
    """Mean over `tasks` of how far from the base (0) to the task's own teacher (1) a model went."""
    ways = []
    for task in tasks:
        base, teacher = reference["base"]["scores"][task], reference[task]["scores"][task]
        ways.append((scores[task] - base) / (teacher - base) if teacher != base else math.nan)
    return statistics.mean(ways)


def table(names: list[str], results: dict[str, list[dict[str, Any]]], reference: dict[str, Any]) -> list[str]:
    """`"way"` is over the tasks that a row has learnt."""
    tasks = tuple(dict.fromkeys(task for name in names for task in (*TASKS, *ROWS[name].tasks) if task in reference))
    head = ["row", "seeds", *tasks, "way", "gap: teacher states", "real states", "own states", "evaluations", "seconds"]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---|" * (len(head) - 1)]
    known = [(name, [reference[name]]) for name in ("base", *tasks)]
    for name, runs in known + [(name, results.get(name, [])) for name in names]:
        if not runs:
            continue
        cells = [spread([run["scores"][task] for run in runs]) if task in runs[0]["scores"] else "" for task in tasks]
        learnt = ROWS[name].tasks if name in ROWS else TASKS
        cells.append(spread([way(run["scores"], reference, learnt) for run in runs], 2))
        for origin in ("teacher", "real", "own"):
            cells.append(spread([statistics.mean(run["gaps"][origin].values()) for run in runs], 4))
        seeds = " ".join(str(run["seed"]) for run in runs) if "seed" in runs[0] else ""
        cost = (
            [f"{runs[0]['evaluations'] / 1000:.0f} k", spread([run["seconds"] for run in runs], 0)]
            if seeds
            else ["", ""]
        )
        label = name if seeds else name if name == "base" else f"{name} teacher"
        lines.append(f"| {label} | {seeds} | {' | '.join(cells + cost)} |")
    return lines


def plot(results: dict[str, list[dict[str, Any]]], reference: dict[str, Any], path: Path) -> None:
    """How far each row went, one dot a seed."""
    names = [name for rows in TABLES.values() for name in rows if name in results]
    names = list(dict.fromkeys(names))
    figure, axis = plt.subplots(figsize=(8, 0.4 * len(names) + 1.2))
    for height, name in enumerate(reversed(names)):
        ways = [way(run["scores"], reference, ROWS[name].tasks) for run in results[name]]
        axis.plot(ways, [height] * len(ways), "o", color="tab:blue", alpha=0.7)
        axis.plot(statistics.mean(ways), height, "|", color="black", markersize=14)
    axis.axvline(1, linestyle="--", color="grey", linewidth=1)
    axis.axvline(0, linestyle=":", color="grey", linewidth=1)
    axis.set_yticks(range(len(names)), list(reversed(names)))
    axis.set_xlabel("of the way from the base (0) to each task's teacher (1), mean of its tasks")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def report(output_dir: Path) -> None:
    """Prints every table and draws `study.png`."""
    reference = levels(output_dir)
    results: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(output_dir.glob("*/seed-*/result.json")):
        result = json.loads(path.read_text())
        results.setdefault(result["row"], []).append(result)
    for title, names in TABLES.items():
        print(f"\n## {title}\n")
        print("\n".join(table(names, results, reference)))
    spent = sum(run["seconds"] for runs in results.values() for run in runs)
    print(f"\n{sum(len(runs) for runs in results.values())} runs, {spent / 3600:.1f} hours of one thread each.")
    if results:
        plot(results, reference, output_dir / "study.png")
