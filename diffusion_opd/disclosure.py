"""What leaves this machine with a run, in trackers and on the Hub: nothing of it names a secret or a place here.

This file knows values and the JSON that libraries save, and no trainer.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

_SECRET = re.compile(
    r"(^|_)(token|password|passwd|secret|(api|access|private|secret)_?key|credentials?|proxies|headers|auth)$", re.I
)
_PASSWORD = re.compile(r"(?<=://)[^/@\s]+@")  # in a URL


def disclosed(value: Any, name: str = "") -> Any:
    """A setting as others may read it: secrets, told by their names, are `"<HUB_TOKEN>"`, absolute paths their last
    part; in dicts and lists too."""
    if _SECRET.search(name) and value and isinstance(value, (str, Mapping)):
        return f"<{name.upper()}>"
    if isinstance(value, Mapping):
        return {key: disclosed(one, str(key)) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(disclosed, value))
    if isinstance(value, (str, os.PathLike)) and os.path.isabs(value):
        return Path(value).name
    if isinstance(value, str) and _PASSWORD.search(value):
        return _PASSWORD.sub("<PASSWORD>@", value)
    return value


def is_repository(source: Any) -> bool:
    """Whether something is called as a repository on the Hub is, and no folder here."""
    try:
        validate_repo_id(str(source))
    except HFValidationError:
        return False
    return not os.path.exists(source)


def origin(source: str | os.PathLike, subfolder: str | None = None) -> str:
    """Where something comes from, as others may read it: a repository, or what is the last part of a path here."""
    if is_repository(source):
        return "/".join(filter(None, (str(source), subfolder)))
    return "/".join(filter(None, (Path(source).absolute().name, subfolder))) + " (local)"


def forget_places(files: Iterable[Path]) -> None:
    """Takes out of saved configs where their parts were read, if that was here: diffusers and PEFT write it down."""

    def shorter(entries: dict[str, Any]) -> dict[str, Any]:
        return {key: disclosed(one) if key.endswith("name_or_path") else one for key, one in entries.items()}

    for file in files:
        if file.is_file() and 'name_or_path"' in (text := file.read_text()):
            file.write_text(json.dumps(json.loads(text, object_hook=shorter), indent=2) + "\n")
