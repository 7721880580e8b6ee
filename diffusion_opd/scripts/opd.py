"""
On-policy distillation from YAML or flags: one student learns, on its own trajectories, from many specialists.

Without more it is the released recipe of DiffusionOPD (arXiv 2605.15055), whose settings are those of
`examples/configs/sd35/opd.yaml`. Its prompts are in https://github.com/yifan123/flow_grpo under `dataset/`.

8 GPUs, as in the paper:

    diffusion-opd opd --config examples/configs/sd35/opd.yaml --accelerate_config multi_gpu --num_processes 8

1 GPU, the same 72 samples an optimizer step (3 x 3 tasks x 8 cycles):

    diffusion-opd opd --config examples/configs/sd35/opd.yaml --gradient_accumulation_steps 24

The whole transformer instead of a LoRA, its optimizer sharded by DeepSpeed; the student goes to the Hub:

    diffusion-opd opd --config examples/configs/sd35/opd.yaml --accelerate_config zero2 --num_processes 8 \
        --no_use_peft --learning_rate 1e-5 --push_to_hub

One specialist of your own, for any pipeline that diffusers has:

    diffusion-opd opd --model_name_or_path black-forest-labs/FLUX.1-dev --output_dir flux-opd --guidance_scale 3.5 \
        --teachers style=me/style-lora --lora_target_modules to_q to_k to_v to_out.0 --train_files prompts.txt
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer
from diffusion_opd.errors import one_sentence
from diffusion_opd.evaluation.prompts import FORMATS, read_file
from diffusion_opd.scripts.arguments import (
    TrainingScriptArguments,
    as_teacher,
    load_data,
    load_teachers,
    student_arguments,
    train,
)
from diffusion_opd.scripts.parser import Parser

# The paper's specialists, as YAML names them
PUBLISHED: list[Any] = [
    {"path": "quanhaol/DiffusionOPD", "subfolder": f"{folder}/lora", "id": name, "guidance_scale": scale}
    for name, folder, scale in (
        ("aesthetic", "AesTeacher", 4.5),
        ("ocr", "OCRTeacher", 4.5),
        ("geneval", "GenEvalTeacher", 1.0),
    )
]


@dataclass
class OPDScriptArguments(TrainingScriptArguments):
    """
    Whom to learn from. Extends [`TrainingScriptArguments`], whose tasks are the ids of the teachers.

    Args:
        teachers (`list[str]`, *optional*, defaults to the three of `quanhaol/DiffusionOPD`):
            In the order in which they are visited: Hub ids or folders, with a name as `id=path`; in YAML also dicts of
            the fields of [`Teacher`].
        eval_reward_funcs (`list[str]`, *optional*):
            Rewards that score pictures at each evaluation, in YAML by teacher id.
        anchor_teacher (`str`, *optional*):
            A frozen reference that no task has, as one of `teachers` (`anchor: base` is the student before training).
        anchor_dataset (`str`, *optional*):
            Real pictures with their prompts: a file (`.json`, `.jsonl`, `.csv`) whose column `image` or `target_image`
            holds paths, or a dataset of the Hub, of which `train` is read.
    """

    teachers: list[str] = field(
        default_factory=lambda: list(PUBLISHED),
        metadata={"help": "Hub ids or folders, or id=path, in the order of their visits. Default: the paper's."},
    )
    eval_reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "Rewards that score pictures at each evaluation."}
    )
    anchor_teacher: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a frozen reference that no task has."}
    )
    anchor_dataset: str | None = field(
        default=None, metadata={"help": "Real pictures with prompts: a file, or a dataset of the Hub."}
    )


def make_trainer(script_args: OPDScriptArguments, training_args: DiffusionOPDConfig) -> DiffusionOPDTrainer:
    teachers = load_teachers(script_args.teachers)
    return DiffusionOPDTrainer(
        teachers=teachers,
        args=training_args,
        **student_arguments(script_args),
        **load_data(script_args, training_args.eval_strategy != "no", list(teachers)),
        eval_reward_funcs=script_args.eval_reward_funcs,
        anchor=None if script_args.anchor_teacher is None else as_teacher(script_args.anchor_teacher),
        anchor_dataset=_pictures(script_args.anchor_dataset),
    )


def _pictures(source: str | None) -> Dataset | None:
    if source is None:
        return None
    if Path(source).suffix in FORMATS and not Path(source).is_dir():
        return read_file(source)
    with one_sentence(f"the `anchor_dataset` {source!r} cannot be loaded"):
        dataset = load_dataset(source, split="train")
    return dataset


def main(script_args: OPDScriptArguments, training_args: DiffusionOPDConfig) -> None:
    train(make_trainer(script_args, training_args), script_args.dataset_name)


def make_parser(prog: str | None = None) -> Parser:
    return Parser((OPDScriptArguments, DiffusionOPDConfig), prog=prog, description=__doc__.strip().partition("\n\n")[0])


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
