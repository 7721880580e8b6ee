"""Models side by side: pictures of the same prompts, scores, a table."""

from .evaluate import evaluate
from .prompts import PRESETS, load_prompts
from .report import normalised_means

__all__ = ["PRESETS", "evaluate", "load_prompts", "normalised_means"]
