"""What a sample is made of: arguments of a pipeline's `__call__` with one value a sample, told by its signature, read
from the columns of a dataset that bear their names.

This file knows signatures and pictures, and no dataset, policy or trainer.
"""

import contextlib
import datetime
import functools
import hashlib
import inspect
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .errors import reason

Inputs = Mapping[str, Sequence[Any]]  # arguments of `__call__`, one value a sample

PROMPT = "prompt"
# Pictures of an IP adapter are one for each adapter, masks of a prompt belong to its embeddings
PICTURE = re.compile(r"^(?!.*(ip_adapter|prompt|attention))(\w+_)?(images?|videos?|masks?|audio)$")

_PLAIN = (str, bytes, int, float, datetime.date, datetime.time, datetime.timedelta, type(None))
_SURROGATE = re.compile("[\ud800-\udfff]")
_ORIENTATION = 0x0112  # in EXIF; from 5 on, width and height change places


signature = functools.cache(inspect.signature)


def is_prompt(value: Any) -> bool:
    """Whether it is text that is not blank. Halves of a character (lone surrogates) no tokenizer and no file takes."""
    return isinstance(value, str) and bool(value.strip()) and not _SURROGATE.search(value)


@functools.cache
def sample_arguments(pipeline_class: Any) -> dict[str, bool]:
    """The arguments of a pipeline's `__call__` that say what a sample is made of, its prompt included, and whether each
    is a text, else pictures, video or audio. Told by their annotations and names."""
    found = {}
    for name, parameter in signature(pipeline_class.__call__).parameters.items():
        annotation = str(parameter.annotation)
        if name == PROMPT or (re.search(r"[Ll]ist\[str\]", annotation) and not re.search("callback|embeds", name)):
            found[name] = True
        elif PICTURE.search(name) and not re.search(r"\b(int|float|bool|dict)\b", annotation):
            found[name] = False
    return found


def columns_read(pipeline_class: Any, columns: Iterable[str], asked: Sequence[str] | None = None) -> dict[str, str]:
    """The column that each argument of a pipeline's `__call__` is read from: of the same name.

    Args:
        pipeline_class (`type`): Of the pipeline.
        columns (`Iterable[str]`): Of the dataset.
        asked (`Sequence[str]`, *optional*): Which of them are read, the prompt besides. `None`: those that are named
            like [`sample_arguments`].
    """
    if asked is None:
        taken = set(sample_arguments(pipeline_class))
    else:
        taken = {PROMPT, *asked} & signature(pipeline_class.__call__).parameters.keys()
    return {name: name for name in sorted(columns) if name in taken}


def inputs_of(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> dict[str, list[Any]]:
    """The inputs of rows; an argument whose column holds nothing in them is not given."""
    inputs = {name: [row.get(column) for row in rows] for name, column in columns.items()}
    return {name: values for name, values in inputs.items() if any(value is not None for value in values)}


def as_arguments(pipeline_class: Any, inputs: Inputs, bare: bool = False) -> dict[str, Any]:
    """Inputs as `__call__` takes them: a list of one value a sample, but of a single sample its picture, or its list of
    pictures, itself. Not every pipeline takes a list of one, and some take any list as several pictures of a sample.
    With `bare` the texts of a single sample are themselves too: Wan VACE takes no list."""
    texts = sample_arguments(pipeline_class)

    def given(name: str, values: Sequence[Any]) -> Any:
        is_text = texts.get(name, isinstance(values[0], str))
        return values[0] if len(values) == 1 and (bare or not is_text) else list(values)

    return {name: given(name, values) for name, values in inputs.items()}


def content_key(row: Mapping[str, Any]) -> int:
    """A number of 64 bits that rows of the same content share, in any process and whatever else is beside them. A
    column without a value is as one that is not there; of objects of other kinds than datasets hold their class alone
    counts."""
    digest = hashlib.blake2b(digest_size=8)
    _add(digest, {name: value for name, value in row.items() if value is not None})
    return int.from_bytes(digest.digest())


def _add(digest: Any, value: Any) -> None:
    def say(*words: Any) -> None:
        digest.update(repr(words).encode("utf-8", "surrogatepass"))

    if isinstance(value, Mapping):
        say("dict", len(value))
        for name in sorted(value, key=str):
            say(name)
            _add(digest, value[name])
    elif isinstance(value, (list, tuple)):
        say("list", len(value))
        for one in value:
            _add(digest, one)
    elif isinstance(value, Image.Image):
        say("picture", value.mode, value.size)
        digest.update(value.tobytes())
    elif isinstance(value, (np.ndarray, np.generic, Tensor)):
        array = np.ascontiguousarray(value.cpu() if isinstance(value, Tensor) else value)
        say("array", array.dtype.str, array.shape)
        digest.update(array.tobytes())
    else:
        say(value if isinstance(value, _PLAIN) else type(value).__name__)


# Pictures: as `datasets.Image` has them undecoded (bytes or a path), PIL, paths; in lists, for videos, and for several
# pictures of a sample


def read_picture(value: Any, is_mask: bool = False) -> Any:
    """A picture as pipelines take it: a PIL image, upright, in RGB; of a list each. What is no picture stays as it is;
    an array, which a dataset holds as lists of numbers (a waveform), is a tensor.

    Args:
        value (`Any`): A path, a PIL image, what `datasets.Image(decode=False)` gives, or a list of them.
        is_mask (`bool`, *optional*, defaults to `False`): Whether one in grey stays so.

    Raises:
        ValueError: if there is no picture, or it cannot be read.
    """
    if _is_array(value):
        return torch.tensor(value)
    if _is_list(value):
        return [read_picture(one, is_mask) for one in value]
    with _opened(value) as image:
        if image is None:
            return value
        if _orientation(image) > 1:
            image = ImageOps.exif_transpose(image)
        return image.convert("L" if is_mask and image.mode in ("1", "L") else "RGB")


def size_of(value: Any) -> Any:
    """Width and height of a picture in pixels, read from its header; of a list those of each; of anything else its
    shape. Equal for what can be in one batch.

    Raises:
        ValueError: if there is no picture, or it cannot be read.
    """
    if _is_array(value):
        return np.shape(value)
    if _is_list(value):
        return tuple(size_of(one) for one in value)
    with _opened(value) as image:
        if image is None:
            return np.shape(value)
        return image.size[::-1] if _orientation(image) > 4 else image.size


def _is_list(value: Any) -> bool:
    if isinstance(value, (list, tuple)) and not value:
        raise ValueError("is an empty list")
    return isinstance(value, (list, tuple))


def _is_array(value: Any) -> bool:
    """Whether it is a list of numbers, or of such lists."""
    if not isinstance(value, (list, tuple)):
        return False
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return isinstance(value, (int, float))


@contextlib.contextmanager
def _opened(value: Any) -> Iterator[Image.Image | None]:
    """A picture whose pixels need not have been read yet; `None` for what is none."""
    if isinstance(value, Mapping) and value.keys() == {"bytes", "path"}:
        value = value["path"] if value["bytes"] is None else value["bytes"]
    if value is None or (isinstance(value, (str, bytes)) and not value):
        raise ValueError("is missing")
    if not isinstance(value, (str, bytes, os.PathLike)):
        yield value if isinstance(value, Image.Image) else None
        return
    what = f"{os.fspath(value)!r} " if not isinstance(value, bytes) else ""
    try:
        with Image.open(io.BytesIO(value) if isinstance(value, bytes) else value) as image:
            yield image
    except Exception as error:
        raise ValueError(f"{what}cannot be read ({reason(error)})") from error


def _orientation(image: Image.Image) -> int:
    # Of a PNG without it in its header PIL would read all pixels to look for one behind them
    is_known = image.format != "PNG" or "exif" in image.info
    return image.getexif().get(_ORIENTATION, 1) if is_known else 1


# Kept with the samples that were made of them


def packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A value, or a list or dict of them, as JSON can hold it; pictures and arrays go to `tensors`, under names that
    begin with `name`."""
    if isinstance(value, Mapping):
        return {key: packed(one, f"{name}.{key}", tensors) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [packed(one, f"{name}.{index}", tensors) for index, one in enumerate(value)]
    if not isinstance(value, (Image.Image, np.ndarray, Tensor)):
        return value
    tensors[name] = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    return {"tensor": name, "kind": "picture" if isinstance(value, Image.Image) else type(value).__name__}


def unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What was [`packed`]."""
    if isinstance(value, Mapping) and value.keys() == {"tensor", "kind"}:
        tensor, kind = tensors[value["tensor"]], value["kind"]
        if kind == "Tensor":
            return tensor
        return Image.fromarray(tensor.cpu().numpy()) if kind == "picture" else tensor.cpu().numpy()
    if isinstance(value, Mapping):
        return {key: unpacked(one, tensors) for key, one in value.items()}
    return [unpacked(one, tensors) for one in value] if isinstance(value, list) else value
