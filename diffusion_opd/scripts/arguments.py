"""What the training scripts share: whose weights, which prompts and which rewards, from flags or YAML to objects.

This file knows files, names and dicts as users write them, and no trainer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from datasets import Dataset, load_dataset
from peft import LoraConfig
from trl import DatasetMixtureConfig, ScriptArguments, get_dataset

from ..data import stream_columns
from ..errors import one_sentence
from ..evaluation.prompts import read_file
from ..rewards import registry
from ..teachers import Lora, Teacher, name_teachers


@dataclass
class TrainingScriptArguments(DatasetMixtureConfig, ScriptArguments):
    """
    What to train and on which prompts. Extends TRL's script arguments (`dataset_name`, ...) and its mixture of datasets
    (`datasets`, `streaming`, `test_split_size`); the prompts are given in one of the three ways.

    Args:
        model_name_or_path (`str`, *optional*, defaults to `"stabilityai/stable-diffusion-3.5-medium"`):
            The pipeline to train.
        student_lora (`str`, *optional*):
            Hub id or folder of a LoRA whose training goes on; in YAML also a dict of the fields of [`Lora`].
        use_peft (`bool`, *optional*, defaults to `True`):
            Trains a LoRA; `--no_use_peft` trains the whole denoiser.
        lora_r (`int`), lora_alpha (`int`), lora_init (`str`), lora_target_modules (`list[str]`):
            A new LoRA. Default to those of the paper's recipe for SD3.5; `lora_init` is PEFT's `init_lora_weights`.
        train_files, eval_files (`list[str]`, *optional*):
            Files of prompts, one a task in the order of the tasks, in YAML also `{task: file}`: `.txt` with one prompt
            a line; `.json`, `.jsonl` and `.csv` with a column `prompt`, whose other columns reach reward functions.
        rename_columns (`list[str]`, *optional*):
            Columns of the data that are to have other names, as `old=new`, in YAML also `{old: new}`: pictures are read
            from those that are named like arguments of the pipeline (`source_image=image`).
    """

    model_name_or_path: str = field(
        default="stabilityai/stable-diffusion-3.5-medium", metadata={"help": "The pipeline to train."}
    )
    student_lora: str | None = field(default=None, metadata={"help": "A LoRA whose training goes on."})
    use_peft: bool = field(default=True, metadata={"help": "Train a LoRA; --no_use_peft: the whole denoiser."})
    lora_r: int = field(default=32, metadata={"help": "Rank of the LoRA."})
    lora_alpha: int = field(default=64, metadata={"help": "Alpha of the LoRA."})
    lora_init: str = field(default="gaussian", metadata={"help": "How PEFT begins it; true: PEFT's default."})
    lora_target_modules: list[str] = field(
        # `attn` alone: the second attention of SD3.5's first blocks is `attn2`
        default_factory=lambda: (
            "attn.to_q attn.to_k attn.to_v attn.to_out.0 "
            "attn.add_q_proj attn.add_k_proj attn.add_v_proj attn.to_add_out"
        ).split(),
        metadata={"help": "Modules that the LoRA adapts. Default: the attention of SD3.5, without attn2."},
    )
    train_files: list[str] | None = field(
        default=None, metadata={"help": "Files of prompts, one a task (.txt, .json, .jsonl, .csv)."}
    )
    eval_files: list[str] | None = field(default=None, metadata={"help": "The same for evaluation."})
    rename_columns: list[str] | None = field(
        default=None, metadata={"help": "Columns of the data that are to have other names, as old=new."}
    )


@dataclass
class RLScriptArguments(TrainingScriptArguments):
    """
    What to reward. Extends [`TrainingScriptArguments`], whose tasks are the keys of `reward_funcs`, if it has any.

    Args:
        reward_funcs (`list[str]`):
            Names of [`REWARDS`] or dotted paths of functions; in YAML also dicts with `name`, arguments and `weight`,
            and all of it by task (`{task: [...]}`).
        teachers (`list[str]`, *optional*):
            Specialists that are learnt from besides, by task: Hub ids or folders as `task=path`; in YAML also dicts of
            the fields of [`Teacher`], and all of it by task.
    """

    reward_funcs: list[str] = field(
        default_factory=list, metadata={"help": "Names of rewards, or dotted paths of functions."}
    )
    teachers: list[str] | None = field(
        default=None, metadata={"help": "Specialists that are learnt from besides, as task=path."}
    )


def student_arguments(script_args: TrainingScriptArguments) -> dict[str, Any]:
    """What every trainer is told of the model and its LoRA."""
    start: Any = script_args.student_lora
    init: Any = script_args.lora_init
    if isinstance(start, Mapping):
        start = filled(Lora, start, "`student_lora`")
    peft_config = None
    if script_args.use_peft and start is None:
        peft_config = LoraConfig(
            r=script_args.lora_r,
            lora_alpha=script_args.lora_alpha,
            init_lora_weights=True if str(init).lower() == "true" else init,
            target_modules=script_args.lora_target_modules,
        )
    return {"model": script_args.model_name_or_path, "peft_config": peft_config, "student_lora": start}


def load_teachers(teachers: Any) -> dict[str, Teacher]:
    """By id, from what flags or YAML say."""
    if isinstance(teachers, Mapping):
        return name_teachers({key: as_teacher(value) for key, value in teachers.items()})
    return name_teachers([as_teacher(value) for value in ([teachers] if isinstance(teachers, str) else teachers)])


def as_teacher(value: Any) -> Any:
    """A teacher from what YAML or a flag says of it."""
    if isinstance(value, Mapping):
        teacher = filled(Teacher, value, "a teacher")
        if isinstance(teacher.base_lora, Mapping):
            teacher.base_lora = filled(Lora, teacher.base_lora, "`base_lora`")
        return teacher
    key, named, path = str(value).partition("=")
    return Teacher(path, id=key) if named else value


def filled(cls: Any, values: Mapping[str, Any], who: str) -> Any:
    """A dataclass from a dict of YAML.

    Raises:
        ValueError: if it has no such field, or `path` is missing.
    """
    names = [entry.name for entry in fields(cls)]
    if unknown := sorted(values.keys() - names):
        raise ValueError(f"{who} has no {unknown}; a {cls.__name__} has {names}.")
    if "path" not in values:
        raise ValueError(f"{who} needs a `path`, got {dict(values)}.")
    return cls(**values)


def load_data(script_args: TrainingScriptArguments, evaluates: bool, tasks: Sequence[str] | None) -> dict[str, Any]:
    """The datasets that a trainer is given.

    Args:
        script_args ([`TrainingScriptArguments`]): Where they are.
        evaluates (`bool`): Whether one for evaluation is needed.
        tasks (`Sequence[str]`, *optional*): In the order of the files. `None`: one file is for all.

    Raises:
        ValueError: if the prompts are given in no way or in several, or a file or dataset cannot be read.
    """
    ways = {name: getattr(script_args, name) for name in ("train_files", "dataset_name", "datasets")}
    if len(given := [name for name, value in ways.items() if value]) != 1:
        raise ValueError(f"give the prompts in one of the ways {list(ways)}; got {given or 'none'}.")
    if script_args.train_files:
        found: Any = {"train": load_files(script_args.train_files, tasks, "train_files")}
    elif script_args.dataset_name:
        name = script_args.dataset_name
        with one_sentence(f"the dataset {name!r} cannot be loaded"):
            found = load_dataset(name, name=script_args.dataset_config, streaming=script_args.dataset_streaming)
    else:
        with one_sentence("the mixture `datasets` cannot be loaded"):
            found = get_dataset(script_args)
    splits = {"train_dataset": script_args.dataset_train_split if script_args.dataset_name else "train"}
    if evaluates and script_args.eval_files:
        found["eval"] = load_files(script_args.eval_files, tasks, "eval_files")
        splits["eval_dataset"] = "eval"
    elif evaluates and not script_args.train_files:
        splits["eval_dataset"] = script_args.dataset_test_split
    if missing := [split for split in splits.values() if split not in found]:
        raise ValueError(f"the dataset has no split {missing[0]!r}, only {list(found)}.")
    names = _renamed(script_args.rename_columns)
    return {argument: rename(found[split], names) for argument, split in splits.items()}


def _renamed(given: Any) -> dict[str, str]:
    if isinstance(given, Mapping):
        given = [f"{old}={new}" for old, new in given.items()]
    pairs = [str(one).partition("=") for one in ([given] if isinstance(given, str) else given or [])]
    if wrong := [old for old, told, new in pairs if not (old and told and new)]:
        raise ValueError(f"`rename_columns` are pairs as old=new, got {wrong[0]!r}.")
    names = {old: new for old, _, new in pairs}
    if len(set(names.values())) < len(names):
        raise ValueError(f"`rename_columns` gives two columns one name, got {names}.")
    return names


def rename(data: Any, names: Mapping[str, str]) -> Any:
    """A dataset, or datasets by task, whose columns have other names.

    Raises:
        ValueError: if none of them has such a column, or one has the new name already.
    """
    parts = data if isinstance(data, Mapping) else {None: data}
    held = {key: stream_columns(part) for key, part in parts.items()} if names else {}
    for old, new in names.items():
        if not any(old in columns for columns in held.values()):
            raise ValueError(f"`rename_columns` names {old!r}, and the data has {next(iter(held.values()))}.")
        for key, columns in held.items():
            if old in columns and new in columns:
                raise ValueError(f"`rename_columns` would make a second {new!r} of {old!r}; the data has {columns}.")
            if old in columns:
                parts = {**parts, key: parts[key].rename_column(old, new)}
    return parts if isinstance(data, Mapping) else parts[None]


def load_files(files: Any, tasks: Sequence[str] | None, name: str) -> Dataset | dict[str, Dataset]:
    """Files of prompts, by task where there are tasks."""
    files = [files] if isinstance(files, str) else files
    if not isinstance(files, Mapping):
        if len(files) != len(tasks or [None]):
            wanted = f"one file for each of {list(tasks)}" if tasks else "one file"
            raise ValueError(f"`{name}` needs {wanted}; got {files}.")
        if not tasks:
            return read_file(files[0])
        files = dict(zip(tasks, files, strict=True))
    return {task: read_file(file) for task, file in files.items()}


def load_rewards(reward_funcs: Any) -> tuple[Any, Any]:
    """Reward functions as YAML and flags name them.

    Args:
        reward_funcs (`str`, `dict` or a list of them, or `{task: the same}`):
            Names and dotted paths as [`load_reward`] takes them, a dict with a `weight` too. The same entry of two
            tasks is one function.

    Returns:
        What trainers take as `reward_funcs` and `reward_weights`; the latter `None` if nobody has a weight.
    """

    def parted(entries: Any) -> tuple[list[Any], list[Any]]:
        entries = entries if isinstance(entries, (list, tuple)) else [entries]
        rewards = [dict(one) if isinstance(one, Mapping) else one for one in entries]
        return rewards, [one.pop("weight", None) if isinstance(one, dict) else None for one in rewards]

    is_by_task = isinstance(reward_funcs, Mapping) and "name" not in reward_funcs
    by_task = {task: parted(own) for task, own in (reward_funcs if is_by_task else {None: reward_funcs}).items()}
    funcs = registry.load_rewards({task: own for task, (own, _) in by_task.items()})
    weights = {task: [1.0 if one is None else one for one in own] for task, (_, own) in by_task.items()}
    is_weighted = any(one is not None for _, own in by_task.values() for one in own)
    if is_by_task:
        return funcs, weights if is_weighted else None
    return funcs[None], weights[None] if is_weighted else None


def make_rl_trainer(trainer_class: Any, script_args: RLScriptArguments, training_args: Any) -> Any:
    """A trainer that learns from rewards."""
    reward_funcs, weights = load_rewards(script_args.reward_funcs)
    if weights is not None and training_args.reward_weights is not None:
        raise ValueError("give weights either in `reward_funcs` or as `reward_weights`.")
    training_args.reward_weights = training_args.reward_weights or weights
    tasks = list(reward_funcs) if isinstance(reward_funcs, Mapping) else None
    teachers = None if script_args.teachers is None else load_teachers(script_args.teachers)
    return trainer_class(
        reward_funcs=reward_funcs,
        teachers=teachers,
        args=training_args,
        **student_arguments(script_args),
        **load_data(script_args, training_args.eval_strategy != "no", tasks),
    )


def train(trainer: Any, dataset_name: str | None) -> None:
    """From the first step, or where the run stopped, to the saved and published student."""
    args = trainer.args
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    trainer.accelerator.print(f"Student saved to {args.output_dir}.")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
        trainer.accelerator.print(f"Student pushed to https://huggingface.co/{trainer.hub_model_id}.")
    trainer.end()
