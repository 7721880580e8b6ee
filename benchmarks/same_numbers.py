"""
Whether a change of the code moved a number: every tiny family is trained for three optimizer steps, with every
transition that it takes and in every way that it is trained, and all that comes out is written down exactly.

    python benchmarks/same_numbers.py record before.json              # at one commit
    python benchmarks/same_numbers.py record after.json               # at another
    python benchmarks/same_numbers.py compare before.json after.json  # fails if a number differs

`--only sdxl` takes the cases with this in their names.

It knows the library by its public names, so it runs against other code than that it stands beside:
`PYTHONPATH=<another checkout> python benchmarks/same_numbers.py record ...`. Both records must be of one machine and
one number of threads (`OMP_NUM_THREADS=1`).

Of code in which one generator of a sample draws both its first noise and the noise of its steps, `--own-noise` gives
the steps a generator of their own, as later code does.
"""

import argparse
import hashlib
import json
import logging
import os
import sys
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}

import diffusers
import numpy as np
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model

import diffusion_opd
from diffusion_opd import (
    DiffusionGRPOConfig,
    DiffusionGRPOTrainer,
    DiffusionNFTConfig,
    DiffusionNFTTrainer,
    DiffusionOPDConfig,
    DiffusionOPDTrainer,
    Teacher,
)
from diffusion_opd.sampling import seed_of
from tests.tiny_pipelines import BUILDERS, CALL, LORA_TARGETS, VP, denoiser, frozen

CLASSES = {
    "opd": (DiffusionOPDTrainer, DiffusionOPDConfig),
    "nft": (DiffusionNFTTrainer, DiffusionNFTConfig),
    "grpo": (DiffusionGRPOTrainer, DiffusionGRPOConfig),
}
NO_LORA = ("pixart_sigma",)  # plain diffusers could not load one, so the student is trained in full
ALL_WAYS = ("sd3", "sdxl", "zimage", "wan")
DATA = Dataset.from_dict({"prompt": [f"prompt number {i}" for i in range(12)], "teacher_id": ["a", "b"] * 6})
PROMPTS = DATA.select_columns(["prompt"])


def cases() -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Name, family, trainer, and the settings that are not everybody's."""
    for family in BUILDERS:
        kernels = ["ode", "ddim"] if family in VP else ["ode", "flow_sde", "dance_sde", "cps"]
        for kernel in kernels:
            yield f"{family} {kernel}", family, "opd", {"transition": kernel}
        noisy = {"transition": kernels[1]} | ({"noise_level": 0.7} if family in VP else {})
        if family in VP:
            yield f"{family} ddim noisy", family, "opd", noisy
        if family in ALL_WAYS:
            yield f"{family} full", family, "opd", {"full": True}
            yield f"{family} bf16", family, "opd", {"bf16": True}
            yield f"{family} velocity", family, "opd", noisy | {"objective": "velocity"}
            yield f"{family} policy_gradient", family, "opd", noisy | {"objective": "policy_gradient"}
            yield f"{family} evaluated", family, "opd", noisy | {"eval_dataset": DATA}
            yield f"{family} nft", family, "nft", {}
            yield f"{family} grpo", family, "grpo", {"beta": 0.01, "eval_dataset": PROMPTS}


def redness(images: list[Any], **kwargs: Any) -> list[float]:
    """A reward; of a video its first frame's."""
    pictures = [np.asarray(image[0] if isinstance(image, list) else image, dtype=float) for image in images]
    return [float((picture[..., 0] - picture[..., 2]).mean() / 255) for picture in pictures]


def trainer_of(family: str, kind: str, full: bool, folder: str, eval_dataset: Any, **settings: Any) -> Any:
    cls, config = CLASSES[kind]
    defaults = dict(
        output_dir=f"{folder}/run",
        per_device_train_batch_size=2 if kind == "opd" else 4,
        max_steps=3,
        num_inference_steps=4,
        call_kwargs=dict(CALL[family]),
        learning_rate=1e-2,
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        image_steps=0,
        disable_tqdm=True,
    )
    if kind == "opd":
        guidance = {"guidance_scale": 2.0} if "guidance_scale" in CALL[family] else {}
        paths: list[Any] = [BUILDERS[family](seed) for seed in (1, 2)]
        if not full:
            adapter = LoraConfig(r=4, lora_alpha=8, target_modules=LORA_TARGETS, init_lora_weights=False)
            paths = [f"{folder}/{name}" for name in "ab"]
            for seed, path in enumerate(paths, 1):
                frozen(seed, get_peft_model, denoiser(BUILDERS[family](0)), adapter).save_pretrained(path)
        judges: Any = {"a": Teacher(paths[0], **guidance), "b": paths[1]}
    else:
        # As a field, or that of NFT, which has a default, would be a second one
        defaults["guidance_scale"] = defaults["call_kwargs"].pop("guidance_scale", None)
        defaults["num_generations"], judges = 4, redness
    student = LoraConfig(r=4, lora_alpha=16, target_modules=LORA_TARGETS, init_lora_weights="gaussian")
    return cls(
        BUILDERS[family](0),
        judges,
        config(**(defaults | settings)),
        train_dataset=DATA if kind == "opd" else PROMPTS,
        eval_dataset=eval_dataset,
        peft_config=None if full or family in NO_LORA else student,
    )


def numbers(family: str, kind: str, full: bool = False, eval_dataset: Any = None, **settings: Any) -> dict[str, Any]:
    """What comes out of a training."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(family, kind, full, folder, eval_dataset, **settings)
        losses, step = [], trainer.training_step

        def training_step(*args: Any, **kwargs: Any) -> Any:
            losses.append(step(*args, **kwargs))
            return losses[-1]

        trainer.training_step = training_step  # one loss a micro-batch; Trainer logs their sum
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        if eval_dataset is not None:
            trainer.evaluate()
    metrics = {}
    for number, entry in enumerate(trainer.state.log_history):
        for key, value in entry.items():
            if not any(word in key for word in ("time", "per_second", "flos")):
                metrics[f"{number}/{key}"] = value
    weights = [p.detach().contiguous() for p in trainer.model.parameters() if p.requires_grad]
    data = b"".join(weight.view(torch.uint8).numpy().tobytes() for weight in weights)
    metrics["weights' norm"] = sum(weight.double().square().sum().item() for weight in weights) ** 0.5
    return {
        "losses": [loss.item() for loss in losses],
        "metrics": metrics,
        "weights": hashlib.sha256(data).hexdigest(),
    }


def own_noise() -> None:
    """From here on steps draw from a twin of each sample's generator, for as long as that lives."""
    twins: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def randn_tensor(shape: Any, generators: list[torch.Generator], *args: Any) -> torch.Tensor:
        for one in generators:
            if one not in twins:
                twins[one] = torch.Generator().manual_seed(seed_of(one.initial_seed(), 1))
        return diffusers.utils.torch_utils.randn_tensor(shape, [twins[one] for one in generators], *args)

    for module in ("diffusion_opd.trainer", "diffusion_opd.rl.grpo_trainer"):
        patch(f"{module}.randn_tensor", randn_tensor).start()


def record(file: Path, only: str, with_own_noise: bool) -> None:
    logging.disable(logging.WARNING)
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    print(f"numbers of {diffusion_opd.__file__}, tiny pipelines of {sys.modules['tests.tiny_pipelines'].__file__}")
    if with_own_noise:
        own_noise()
    found = {}
    for name, family, kind, settings in cases():
        if only in name:
            found[name] = numbers(family, kind, **settings)
            file.write_text(json.dumps(found, indent=1) + "\n")
            print(f"{name}: {found[name]['losses'][-1]!r}", flush=True)


def difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    """What differs between two records of a case, in words; empty if nothing does."""
    pairs = [{**dict(enumerate(one["losses"])), **one["metrics"]} for one in (before, after)]
    if odd := sorted(map(str, pairs[0].keys() ^ pairs[1].keys())):
        return f"only one of them has {odd}"
    gaps = {key: abs(a - b) / max(abs(a), abs(b)) for key, a in pairs[0].items() if (b := pairs[1][key]) != a}
    if gaps:
        worst = max(gaps, key=gaps.__getitem__)
        return f"{len(gaps)} of {len(pairs[0])} numbers differ, at most by {gaps[worst]:.1e} of themselves ({worst})"
    return "" if before["weights"] == after["weights"] else "the weights differ, in nothing that is logged"


def compare(before: Path, after: Path, only: str) -> int:
    records = [
        {name: case for name, case in json.loads(file.read_text()).items() if only in name} for file in (before, after)
    ]
    different = records[0].keys() ^ records[1].keys()
    for name in sorted(different):
        print(f"{name}: in one record only")
    for name in (name for name in records[0] if name in records[1]):
        words = difference(records[0][name], records[1][name])
        print(f"{name}: {words or 'equal'}")
        different |= {name} if words else set()
    return 1 if different else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recorder = commands.add_parser("record")
    recorder.add_argument("file", type=Path)
    recorder.add_argument("--own-noise", action="store_true")
    comparer = commands.add_parser("compare")
    comparer.add_argument("before", type=Path)
    comparer.add_argument("after", type=Path)
    for command in (recorder, comparer):
        command.add_argument("--only", default="", help="the cases with this in their names")
    options = parser.parse_args()
    if options.command == "compare":
        sys.exit(compare(options.before, options.after, options.only))
    record(options.file, options.only, options.own_noise)
