"""Writes the training prompts of seed 0 as files, for `opd.yaml`.

    python -m examples.toy_world.prompt_files       # writes examples/toy_world/prompts

A text file of a prompt a line for each task that draws; for editing a JSON Lines file whose rows name their source
pictures as they are found from the checkout's folder.
"""

import json
from pathlib import Path

from examples.toy_world.rewards import training_prompts
from examples.toy_world.world import TASKS

FOLDER = Path("examples/toy_world/prompts")

if __name__ == "__main__":
    for task in TASKS:
        rows = training_prompts(task, seed=0)
        if "image" not in rows.column_names:
            (FOLDER / f"{task}.txt").write_text("".join(f"{prompt}\n" for prompt in rows["prompt"]))
            continue
        (FOLDER / task).mkdir(exist_ok=True)
        lines = []
        for i, row in enumerate(rows):
            path = FOLDER / task / f"{i:03}.png"
            row["image"].save(path)
            lines.append(json.dumps({"prompt": row["prompt"], "image": path.as_posix()}))
        (FOLDER / f"{task}.jsonl").write_text("\n".join(lines) + "\n")
