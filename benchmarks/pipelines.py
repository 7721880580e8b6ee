"""
Which pipeline classes of diffusers train: writes docs/pipelines.md.

    python benchmarks/pipelines.py                     # all that tests/zoo has, about ten minutes on one core
    python benchmarks/pipelines.py --only Flux Wan     # those with these in their names, and writes nothing

Each class is made of tiny parts (tests/zoo) and asked in a process of its own (tests/zoo/check.py): a LoRA and the
whole denoiser are trained against a teacher of other weights and, where the class has guidance, of other guidance. The
gradient of the first step is compared with that of two passes of the plain pipeline under its own scheduler, one sample
a call; what is saved is loaded in plain diffusers.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import transformers

from tests.zoo import ZOO

PAGE = Path(__file__).parents[1] / "docs" / "pipelines.md"
SECONDS = 180

HEAD = """# Pipelines

Which pipeline classes of diffusers train, found out by running them: `python benchmarks/pipelines.py` makes this page
(diffusers {diffusers}, transformers {transformers}; float32 on a CPU, tiny parts with random weights). There is no line
of code for any of them, so a class that is not here may train too: the check at the start of a run says.

A class **trains** if the gradient of a training step equals that of two passes of the plain pipeline under its own
scheduler, one sample a call, each with its own inputs (the largest difference, relative to the largest gradient, is in
the table); if a teacher of the same weights has nothing to teach (loss below 1e-9), and one of other weights, and of
other guidance where the class has it, has; and if what is saved predicts in plain diffusers what the student predicts.

- **columns**: what samples are made of besides their prompts, each from its own column.
- **LoRA file**: how a LoRA is saved. In PEFT's format where diffusers loads none into the class; the card has the lines
  that load it.
- **samples**: 1 where a call takes one sample, or samples of one call would see each other; a batch is several calls
  then.
- **one backward**: what the first denoising step computes is used in later ones, so that each walk has one backward
  pass, and holds the graphs of all learnt steps.

{count} classes train, as a LoRA and in full.
"""

TAIL = """
## Refused

With the sentence that says why.

| class | |
|---|---|
{refused}

## Not run here

- `AnyFlowFARPipeline` and `Kandinsky6SRPipeline` need a gradient of FlexAttention, which is there on GPUs only.
- `EasyAnimateControlPipeline` and `ChromaInpaintPipeline` fail in their own `__call__` in diffusers {diffusers},
  `QwenImageLayeredPipeline` where its latents are asked for; `PRXPipeline` and `ZImageOmniPipeline` do not load what
  they save.
"""


def ask(name: str) -> list[dict[str, Any]]:
    """The reports of a class, as a LoRA and in full."""
    command = [sys.executable, "-m", "tests.zoo.check", name]
    root = Path(__file__).parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    try:
        run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return [
            {"class": name, "way": way, "ok": False, "error": f"longer than {SECONDS} s"} for way in ("lora", "full")
        ]
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


def row(reports: Sequence[dict[str, Any]]) -> str:
    first = reports[0]
    columns = ", ".join(f"`{name}`" for name in ZOO[first["class"]].inputs)
    gap = max(report["gradient gap"] for report in reports)
    guidance = f"`{first['guidance']}`" if first["guidance"] else ""
    one = "yes" if first["one backward a walk"] else ""
    cells = [
        f"`{first['class']}`",
        columns,
        guidance,
        first["LoRA file"],
        str(first["samples of a call"] if first["samples of a call"] == 1 else "any"),
        one,
        f"{gap:.0e}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[])
    options = parser.parse_args()
    names = [name for name in sorted(ZOO) if not options.only or any(part in name for part in options.only)]
    trained: dict[str, list[str]] = {"Pipelines": [], "Modular pipelines": []}
    refused = []
    for name in names:
        reports = ask(name)
        if all(report["ok"] for report in reports):
            kind = "Modular pipelines" if "Modular" in name else "Pipelines"
            trained[kind].append(row(reports))
        else:
            error = next(report.get("error", "wrong numbers") for report in reports if not report["ok"])
            refused.append(f"| `{name}` | {error.removeprefix('ValueError: ')} |")
        print((refused if not all(report["ok"] for report in reports) else trained[kind])[-1], flush=True)
    if options.only:
        return
    versions = {"diffusers": diffusers.__version__, "transformers": transformers.__version__}
    parts = [HEAD.format(count=sum(map(len, trained.values())), **versions)]
    for kind, rows in trained.items():
        parts.append(
            f"\n## {kind}\n\n| class | columns | guidance | LoRA file | samples | one backward | gap |\n"
            "|---|---|---|---|---|---|---|\n" + "\n".join(rows) + "\n"
        )
    parts.append(TAIL.format(refused="\n".join(refused), **versions))
    PAGE.write_text("".join(parts))


if __name__ == "__main__":
    main()
