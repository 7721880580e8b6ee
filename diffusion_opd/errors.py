"""What is wrong, in one sentence: for the errors of libraries, and for values that are shown in a message."""

import contextlib
import logging
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import diffusers
import transformers.utils.logging
from diffusers import DiffusionPipeline
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

MISSING_SAFETENSORS = re.compile(r"(file named|necessary) \S*safetensors")  # in the words of diffusers and transformers


def brief(value: Any) -> str:
    """The type and the beginning of a value."""
    return f"{type(value).__name__}: {textwrap.shorten(repr(value), 80)}"


def first_few(names: Iterable[str], most: int = 3) -> str:
    """The first names in order, and whether there are more."""
    names = sorted(str(name) for name in names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def listed(words: Sequence[str], last: str) -> str:
    """`'a', 'b' or 'c'`, with `last` before the last of them."""
    *others, end = map(repr, words)
    return f"{', '.join(others)} {last} {end}" if others else end


def why_not(error: Exception, revision: str | None) -> str:
    """Why a repository, or the index of a pipeline in it, could not be had, in words."""
    if isinstance(error, HFValidationError):
        return "is neither a folder nor the id of a repository on the Hub"
    if isinstance(error, RevisionNotFoundError):
        return f"has no revision {revision!r}"
    if isinstance(error, RemoteEntryNotFoundError):
        return f"holds no pipeline ({DiffusionPipeline.config_name})"
    if isinstance(error, GatedRepoError):
        return "is gated; ask for access on its page, then log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "is neither a folder nor a repository on the Hub that you may read (if it is private: `hf auth login`)"
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return "may not be read with your token; log in anew with `hf auth login`"
    at = f" at revision {revision!r}" if revision else ""
    return f"is no folder, is not in the local cache{at}, and the Hub cannot be asked (is this offline?)"


def reason(error: Exception, most: int = 400) -> str:
    """What an error of a library says, in one line; of a long text its beginning and its end."""
    text = " ".join(str(error).split())
    if len(text) > most:
        text = f"{text[: most - 100]} ... {text[-100:]}"
    is_plain = text and not isinstance(error, (AttributeError, KeyError))
    return text if is_plain else f"{type(error).__name__}: {text}".removesuffix(": ")


@contextlib.contextmanager
def one_sentence(what: str, without_safetensors: str = "") -> Iterator[None]:
    """What libraries raise about files or settings that they cannot use, as a `ValueError` that begins with `what`, and
    with what to do if it is safetensors files that are missing."""
    try:
        yield
    except Exception as error:
        if MISSING_SAFETENSORS.search(str(error)):
            what += without_safetensors
        raise ValueError(f"{what}: {reason(error)}") from error


@contextlib.contextmanager
def without_reports() -> Iterator[None]:
    """Without what diffusers and transformers tell about a loading, which is looked at here, and without their bars."""
    loggings = diffusers.logging, transformers.utils.logging
    before = [each.get_verbosity() for each in loggings]
    bars = transformers.utils.logging.is_progress_bar_enabled()
    for each in loggings:
        each.set_verbosity(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        for each, verbosity in zip(loggings, before, strict=True):
            each.set_verbosity(verbosity)
        if bars:
            transformers.utils.logging.enable_progress_bar()
