"""
The released recipe of DiffusionOPD (arXiv 2605.15055): one LoRA of Stable Diffusion 3.5 Medium learns, on its own
trajectories, from three specialists at once (aesthetics, text rendering, composition).

The settings are those of `configs/opd_sd35.yaml`, which says where each comes from; each can be given, or changed, as a
flag. Prompts are text files with one prompt a line, or JSON lines with a field `prompt`, one file a teacher; the
recipe's own are in https://github.com/yifan123/flow_grpo under `dataset/`. The teachers are for research only.

8 GPUs, as in the paper:

    accelerate launch --config_file diffusion_opd/accelerate_configs/multi_gpu.yaml --num_processes 8 \
        examples/opd_sd35.py --config examples/configs/opd_sd35.yaml \
        --train_files dataset/pickscore/train.txt dataset/ocr/train.txt dataset/geneval/train_metadata.jsonl

1 GPU, the same 72 samples an optimizer step (3 x 3 tasks x 8 cycles):

    accelerate launch --config_file diffusion_opd/accelerate_configs/single_gpu.yaml \
        examples/opd_sd35.py --config examples/configs/opd_sd35.yaml --gradient_accumulation_steps 24 \
        --train_files dataset/pickscore/train.txt dataset/ocr/train.txt dataset/geneval/train_metadata.jsonl

The whole transformer instead of a LoRA, its optimizer sharded by DeepSpeed; prompts from a dataset with the columns
`prompt` and `teacher_id`; the student goes to the Hub:

    accelerate launch --config_file diffusion_opd/accelerate_configs/zero2.yaml --num_processes 8 \
        examples/opd_sd35.py --config examples/configs/opd_sd35.yaml --no_use_peft --learning_rate 1e-5 \
        --dataset_name me/opd-prompts --push_to_hub

One specialist of your own, for any pipeline that diffusers has:

    python examples/opd_sd35.py --model_name_or_path black-forest-labs/FLUX.1-dev --output_dir flux-opd \
        --guidance_scale 3.5 --teacher_ids style --teacher_paths me/style-lora --teacher_subfolders . \
        --teacher_guidance_scales 3.5 --lora_target_modules to_q to_k to_v to_out.0 --train_files prompts.txt
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from peft import LoraConfig
from trl import ScriptArguments, TrlParser

from diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer, Teacher


@dataclass
class OPDScriptArguments(ScriptArguments):
    """
    What to train, from whom and on which prompts. Extends TRL's script arguments (`dataset_name`, ...).

    The `teacher_*` lists go in the order of `teacher_ids`; a list of one holds for all teachers.

    Args:
        model_name_or_path (`str`, *optional*, defaults to `"stabilityai/stable-diffusion-3.5-medium"`):
            The student's pipeline.
        teacher_ids (`list[str]`, *optional*, defaults to `["aesthetic", "ocr", "geneval"]`):
            What the `teacher_id` column of the dataset calls the teachers, in the order in which they are visited.
        teacher_paths (`list[str]`, *optional*, defaults to `["quanhaol/DiffusionOPD"]`):
            Hub ids or folders.
        teacher_subfolders (`list[str]`, *optional*, defaults to the three of `quanhaol/DiffusionOPD`):
            Where in those; `.` is the top.
        teacher_guidance_scales (`list[float]`, *optional*, defaults to `[4.5, 4.5, 1.0]`):
            Each teacher's own guidance.
        train_files, eval_files (`list[str]`, *optional*):
            Instead of `dataset_name`: one file of prompts a teacher (`.txt`, `.json`, `.jsonl`).
        use_peft (`bool`, *optional*, defaults to `True`):
            Trains a LoRA; `--no_use_peft` trains the whole denoiser.
        lora_r (`int`), lora_alpha (`int`), lora_target_modules (`list[str]`):
            The student's LoRA. Default to those of the recipe.
    """

    model_name_or_path: str = field(
        default="stabilityai/stable-diffusion-3.5-medium", metadata={"help": "The student's pipeline."}
    )
    teacher_ids: list[str] = field(
        default_factory=lambda: ["aesthetic", "ocr", "geneval"],
        metadata={"help": "Names of the teachers, in the order in which they are visited."},
    )
    teacher_paths: list[str] = field(
        default_factory=lambda: ["quanhaol/DiffusionOPD"], metadata={"help": "Hub ids or folders of the teachers."}
    )
    teacher_subfolders: list[str] = field(
        default_factory=lambda: ["AesTeacher/lora", "OCRTeacher/lora", "GenEvalTeacher/lora"],
        metadata={"help": "Where in those; . is the top."},
    )
    teacher_guidance_scales: list[float] = field(
        default_factory=lambda: [4.5, 4.5, 1.0], metadata={"help": "Guidance scales of the teachers."}
    )
    train_files: list[str] | None = field(
        default=None, metadata={"help": "Instead of --dataset_name: one file of prompts a teacher."}
    )
    eval_files: list[str] | None = field(default=None, metadata={"help": "The same for evaluation."})
    use_peft: bool = field(default=True, metadata={"help": "Train a LoRA; --no_use_peft: the whole denoiser."})
    lora_r: int = field(default=32, metadata={"help": "Rank of the student's LoRA."})
    lora_alpha: int = field(default=64, metadata={"help": "Alpha of the student's LoRA."})
    lora_target_modules: list[str] = field(
        # `attn` alone: the second attention of SD3.5's first blocks is `attn2`
        default_factory=lambda: (
            "attn.to_q attn.to_k attn.to_v attn.to_out.0 "
            "attn.add_q_proj attn.add_k_proj attn.add_v_proj attn.to_add_out"
        ).split(),
        metadata={"help": "Modules that the student's LoRA adapts."},
    )


def one_each(values: list[Any], script_args: OPDScriptArguments, name: str) -> list[Any]:
    """One value a teacher: as given, or the one that holds for all."""
    ids = script_args.teacher_ids
    if len(values) not in (1, len(ids)):
        raise ValueError(f"--{name} needs one value for each of the teachers {ids}, or one for all; got {values}.")
    return values if len(values) == len(ids) else values * len(ids)


def load_teachers(script_args: OPDScriptArguments) -> list[Teacher]:
    paths = one_each(script_args.teacher_paths, script_args, "teacher_paths")
    subfolders = one_each(script_args.teacher_subfolders, script_args, "teacher_subfolders")
    scales = one_each(script_args.teacher_guidance_scales, script_args, "teacher_guidance_scales")
    return [
        Teacher(path, id=key, subfolder=None if subfolder == "." else subfolder, guidance_scale=scale)
        for key, path, subfolder, scale in zip(script_args.teacher_ids, paths, subfolders, scales, strict=True)
    ]


def load_prompts(file: str) -> Dataset:
    if Path(file).suffix == ".txt":
        return load_dataset("text", data_files=file, split="train").rename_column("text", "prompt")
    return load_dataset("json", data_files=file, split="train").select_columns("prompt")


def load_prompt_files(files: list[str], script_args: OPDScriptArguments, name: str) -> dict[str, Dataset]:
    if len(files) != len(script_args.teacher_ids):
        raise ValueError(f"--{name} needs one file for each of the teachers {script_args.teacher_ids}; got {files}.")
    return {key: load_prompts(file) for key, file in zip(script_args.teacher_ids, files, strict=True)}


def main(script_args: OPDScriptArguments, training_args: DiffusionOPDConfig) -> None:
    if (script_args.train_files is None) == (script_args.dataset_name is None):
        raise ValueError("give the prompts either as --train_files or as --dataset_name.")
    evaluates = training_args.eval_strategy != "no"
    train_dataset = eval_dataset = None
    if script_args.train_files is not None:
        train_dataset = load_prompt_files(script_args.train_files, script_args, "train_files")
    if script_args.eval_files is not None:
        eval_dataset = load_prompt_files(script_args.eval_files, script_args, "eval_files")
    if script_args.dataset_name is not None:
        dataset = load_dataset(
            script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming
        )
        train_dataset = dataset[script_args.dataset_train_split]
        if evaluates and eval_dataset is None:
            eval_dataset = dataset[script_args.dataset_test_split]

    peft_config = None
    if script_args.use_peft:
        peft_config = LoraConfig(
            r=script_args.lora_r,
            lora_alpha=script_args.lora_alpha,
            init_lora_weights="gaussian",
            target_modules=script_args.lora_target_modules,
        )
    trainer = DiffusionOPDTrainer(
        model=script_args.model_name_or_path,
        teachers=load_teachers(script_args),
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset if evaluates else None,
        peft_config=peft_config,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Student saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"Student pushed to https://huggingface.co/{trainer.hub_model_id}.")
    trainer.end()


def make_parser() -> TrlParser:
    return TrlParser((OPDScriptArguments, DiffusionOPDConfig))


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
