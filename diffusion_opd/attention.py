"""Which attention kernel a denoiser uses: diffusers' own switch, of one model and no other.

This file knows modules, and no pipeline or trainer.
"""

from typing import Any

from diffusers import ModelMixin
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend

from .errors import one_sentence, without_reports

NAMES = [backend.value for backend in AttentionBackendName]


def check_attention_backend(name: str, trains: bool = True) -> None:
    """Refuses a backend that diffusers does not know, or that has no gradient where something is trained.

    Raises:
        ValueError: naming those that it knows.
    """
    if name not in NAMES:
        raise ValueError(f"`attention_backend` must be one of {NAMES}, got {name!r}.")
    if trains and name.strip("_").startswith("sage"):
        raise ValueError(
            f"`attention_backend={name!r}` has no backward pass, so nothing before it would be trained; choose another."
        )


def require_attention_backend(name: str) -> None:
    """Fetches a kernel that is on the Hub.

    Raises:
        ValueError: if the backend is not installed.
    """
    with one_sentence(f"`attention_backend={name!r}` cannot be used"), attention_backend(name):
        pass


def set_attention_backend(denoiser: Any, name: str, who: str) -> None:
    """`denoiser.set_attention_backend(name)`, which also makes it the default of all models of the process; here that
    stays as it was.

    Args:
        denoiser ([`~diffusers.ModelMixin`]): Whose attention layers carry it from here on, copies of it too.
        name (`str`): A value of diffusers' `AttentionBackendName`.
        who (`str`): What a sentence calls the denoiser.

    Raises:
        ValueError: if its layers take no backend.
    """
    processors = [getattr(module, "processor", None) for module in denoiser.modules()]
    if not isinstance(denoiser, ModelMixin) or not any(hasattr(one, "_attention_backend") for one in processors):
        raise ValueError(
            f"`attention_backend={name!r}` is for attention layers that take diffusers' backends, and {who}, a "
            f"{type(denoiser).__name__}, has none; leave it out."
        )
    with attention_backend(name), without_reports():
        denoiser.set_attention_backend(name)
