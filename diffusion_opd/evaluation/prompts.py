"""Sets of prompts: files, datasets of the Hub, and those of the paper's Table 1 by name.

This file knows files and datasets, and no model.
"""

from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, load_dataset

from ..errors import first_few, one_sentence
from ..inputs import PROMPT

# How `datasets` calls what a file holds
FORMATS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv"}
_COLUMNS = (PROMPT, "Prompt", "Prompts", "prompts", "text", "caption")


class Preset(NamedTuple):
    """Prompts with a name.

    Attributes:
        dataset (`str`, *optional*): On the Hub.
        url (`str`, *optional*): Where the file is, if it is not on the Hub.
        metrics (`str`): What the paper's Table 1 scores on them.
    """

    dataset: str | None
    url: str | None = None
    metrics: str = ""


# Flow-GRPO's repository holds the files that it, DiffusionNFT and DiffusionOPD use
_FLOW_GRPO = "https://github.com/yifan123/flow_grpo/tree/main/dataset"
PRESETS = {
    # 553 prompts, 4 pictures each
    "geneval": Preset(
        None,
        url="https://github.com/djghosh13/geneval/blob/main/prompts/evaluation_metadata.jsonl",
        metrics="geneval",
    ),
    "ocr": Preset(None, url=f"{_FLOW_GRPO}/ocr (test.txt, 1,018 prompts)", metrics="ocr"),
    "drawbench": Preset(
        "sayakpaul/drawbench",
        metrics="pickscore clipscore hpsv2 aesthetic imagereward unified_reward",
    ),
    "pickscore": Preset(None, url=f"{_FLOW_GRPO}/pickscore (test.txt, 2,048 prompts)"),
    "parti": Preset("nateraw/parti-prompts"),
}


def read_file(file: str) -> Dataset:
    """A file of rows, one of `FORMATS`; of text each line that is not blank is a `prompt`.

    Raises:
        ValueError: if it is not there, or cannot be read.
    """
    path = Path(file)
    if path.suffix not in FORMATS:
        raise ValueError(f"a file of prompts ends in one of {list(FORMATS)}, got {file!r}.")
    if not path.is_file():
        raise ValueError(f"there is no file of prompts {file!r}.")
    is_text = path.suffix == ".txt"
    with one_sentence(f"the prompts {file!r} cannot be read"):
        # Editors put a mark of byte order in front of text
        how: dict[str, Any] = {"encoding": "utf-8-sig"} if is_text else {}
        dataset = load_dataset(FORMATS[path.suffix], data_files=file, split="train", **how)
    if not is_text:
        return dataset
    kept = [index for index, line in enumerate(dataset["text"]) if line.strip()]
    dataset = dataset if len(kept) == len(dataset) else dataset.select(kept)
    return dataset.rename_column("text", PROMPT)


def load_prompts(source: str, prompt_column: str | None = None) -> list[dict[str, Any]]:
    """Reads a set of prompts.

    Args:
        source (`str`):
            A file (`.txt` with one prompt a line; `.json`, `.jsonl` or `.csv`), a name of [`PRESETS`], or the Hub id or
            folder of a dataset, of which `test` is read, or its only split.
        prompt_column (`str`, *optional*): Where the prompts are. `None`: `prompt`, or another usual name.

    Returns:
        `list[dict]`: rows with `prompt` and what else is there for scorers; lines without a prompt are left out.

    Raises:
        ValueError: if it cannot be read, or holds no prompts.
    """
    path = Path(source)
    if path.suffix in FORMATS and not path.is_dir():
        dataset = read_file(source)
    else:
        preset = PRESETS.get(source, Preset(source))
        if preset.dataset is None:
            raise ValueError(f"the prompts {source!r} are not on the Hub; get {preset.url} and give the file.")
        with one_sentence(f"the prompts {source!r} cannot be loaded"):
            splits = load_dataset(preset.dataset)
        if "test" not in splits and len(splits) > 1:
            raise ValueError(f"the prompts {source!r} have no split 'test', only {list(splits)}; give a file of one.")
        dataset = splits.get("test", next(iter(splits.values())))
    rows = _with_prompt(dataset, source, prompt_column)
    if not rows:
        raise ValueError(f"{source!r} holds no prompts.")
    return rows


def _with_prompt(dataset: Dataset, source: str, prompt_column: str | None) -> list[dict[str, Any]]:
    names = [prompt_column] if prompt_column else [name for name in _COLUMNS if name in dataset.column_names]
    if not names or names[0] not in dataset.column_names:
        wanted = f"no column {prompt_column!r}" if prompt_column else "no column `prompt`"
        raise ValueError(f"{source!r} has {wanted}, only {dataset.column_names}; name it as `prompt_column`.")
    held = {type(value).__name__ for value in dataset[names[0]]} - {"str", "NoneType"}
    if held:
        raise ValueError(f"the column {names[0]!r} of {source!r} holds {first_few(held)}, and a prompt is text.")
    rows = [{PROMPT: row[names[0]], **{k: v for k, v in row.items() if k not in (PROMPT, names[0])}} for row in dataset]
    return [row for row in rows if row[PROMPT] and row[PROMPT].strip()]
