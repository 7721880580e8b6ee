"""Lets mkdocstrings read docstrings in Hugging Face's style, which is Google's with Markdown where Google's has types.

steps (`int`, *optional*, defaults to `10`):    becomes    steps (int, optional):
[`~transformers.TrainingArguments`]             becomes    `TrainingArguments`
"""

import re
from typing import Any

import griffe

ENTRY = re.compile(r"^(\s+[*\w][\w*, ]*) \(([^()]*(?:\([^()]*\)[^()]*)*)\):", re.MULTILINE)
REFERENCE = re.compile(r"\[`~?(?:[\w.]+\.)?(\w+)`\](?![(\[])")


def plain_type(entry: re.Match[str]) -> str:
    kind = entry[2].partition(", defaults to")[0].replace("`", "").replace("*optional*", "optional")
    return f"{entry[1]}:" if kind == "optional" else f"{entry[1]} ({kind}):"


class HuggingFaceStyle(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = REFERENCE.sub(r"`\1`", ENTRY.sub(plain_type, obj.docstring.value))
