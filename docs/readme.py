"""Lets a page hold sections of the README, so that each is written once: `<!-- README: Try it -->`, or for what stands
before the first section `<!-- README -->`. Links are followed from this folder."""

import re
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"
MARK = re.compile(r"^<!-- README(?:: (.+))? -->$", re.MULTILINE)


def section(mark: re.Match[str]) -> str:
    start, *sections = re.split(r"^(?=## )", README.read_text(), flags=re.MULTILINE)
    title = mark[1]
    text = next(one for one in sections if one.startswith(f"## {title}\n")) if title else start.partition("\n")[2]
    return text.replace("](docs/", "](").strip()


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    return MARK.sub(section, markdown)
