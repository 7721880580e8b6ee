"""Means, a table and a grid of pictures.

This file knows numbers and pictures, and no model.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

Results = Mapping[str, Mapping[str, Mapping[str, Any]]]  # by model and metric: `mean`, ...


def summary(
    scores: Sequence[float | None], prompts: Sequence[str], groups: Sequence[Any] | None = None
) -> dict[str, Any]:
    """Of the scores of a model's pictures: `mean`, `standard_error`, `scored`, and `without_score` of how many there
    was none. With `groups` (one a picture) the mean is that of the groups' means, which stand under `groups`.

    The standard error takes prompts as what is sampled: several pictures of one are no independent samples.
    """
    known = [score for score in scores if score is not None]
    result: dict[str, Any] = {"mean": None, "standard_error": None}
    by_group: dict[str, dict[str, list[float]]] = {}
    for score, prompt, group in zip(scores, prompts, groups or [None] * len(scores), strict=True):
        if score is not None:
            by_group.setdefault(str(group), {}).setdefault(prompt, []).append(score)
    if known:
        means = {group: fmean(score for scores in own.values() for score in scores) for group, own in by_group.items()}
        errors = [_standard_error([*own.values()], means[group]) for group, own in by_group.items()]
        result["mean"] = fmean(means.values())
        if None not in errors:
            result["standard_error"] = math.hypot(*errors) / len(errors)  # type: ignore[arg-type]
    result |= {"scored": len(known), "without_score": len(scores) - len(known)}
    if groups is not None and known:
        result["groups"] = dict(sorted(means.items()))
    return result


def _standard_error(clusters: Sequence[Sequence[float]], mean: float) -> float | None:
    """Of the mean of samples in clusters, each of which is drawn as a whole; of single samples the usual one."""
    if len(clusters) < 2:
        return None
    square = sum(sum(value - mean for value in cluster) ** 2 for cluster in clusters)
    return math.sqrt(square * len(clusters) / (len(clusters) - 1)) / sum(map(len, clusters))


def normalised_means(results: Results) -> dict[str, float | None]:
    """Of each model the mean over metrics of `(score - lowest) / (highest - lowest)`, where lowest and highest are
    those of the models in `results`, and metrics in which all are equal are left out; `None` for fewer than two models,
    or without a score of each metric.

    The paper's Table 1 has such a column, whose formula it does not print: neither this one nor another that scales
    each metric by itself gives its numbers from its own table. So it ranks the models of one table, and is to be
    compared with no other.
    """
    metrics = list(dict.fromkeys(metric for own in results.values() for metric in own))
    means = {name: [own.get(metric, {}).get("mean") for metric in metrics] for name, own in results.items()}
    if len(means) < 2 or any(value is None for own in means.values() for value in own):
        return dict.fromkeys(means)
    ends = [(min(column), max(column)) for column in zip(*means.values(), strict=True)]
    scaled = {
        name: [(value - low) / (high - low) for value, (low, high) in zip(own, ends, strict=True) if high > low]
        for name, own in means.items()
    }
    return {name: fmean(own) if own else None for name, own in scaled.items()}


def table(results: Results) -> str:
    """Markdown: rows are models, columns metrics (plus and minus the standard error) and the normalised mean."""
    metrics = list(dict.fromkeys(metric for own in results.values() for metric in own))
    lines = ["| model | " + " | ".join(metrics) + " | normalised mean |", "|---" * (len(metrics) + 2) + "|"]
    means = normalised_means(results)
    for name, own in results.items():
        cells = [_cell(own.get(metric, {})) for metric in metrics]
        mean = means[name]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {'' if mean is None else f'{mean:.3f}'} |")
    absent = {m: sum(own.get(m, {}).get("without_score", 0) for own in results.values()) for m in metrics}
    notes = [f"{count} pictures have no score of `{metric}`." for metric, count in absent.items() if count]
    formula = (
        "Normalised mean: mean over metrics of (score - lowest) / (highest - lowest) among these models, "
        "without metrics in which all are equal; it ranks them, and is to be compared with no other table."
    )
    return "\n".join(lines) + "\n\n" + "\n".join([*notes, formula]) + "\n"


def _cell(own: Mapping[str, Any]) -> str:
    if own.get("mean") is None:
        return ""
    error = own.get("standard_error")
    return f"{own['mean']:.4g}" + (f" ± {error:.2g}" if error else "")


def grid(columns: Mapping[str, Sequence[Any]], prompts: Sequence[str], size: int = 256) -> Image.Image:
    """Models beside each other, a prompt a row; of videos the middle frame."""
    font: Any = ImageFont.load_default(size / 16)
    head = round(size / 9)
    canvas = Image.new("RGB", (len(columns) * size, head + len(prompts) * (size + head)), "white")
    pen = ImageDraw.Draw(canvas)
    for column, (name, images) in enumerate(columns.items()):
        pen.text((column * size + 4, 4), _fitting(name, pen, font, size - 8), "black", font)
        for row, image in enumerate(images):
            image = image[len(image) // 2] if isinstance(image, list) else image
            shown = ImageOps.contain(image.convert("RGB"), (size, size))
            canvas.paste(shown, (column * size, head + row * (size + head) + head))
    for row, prompt in enumerate(prompts):
        place = (4, head + row * (size + head) + 4)
        pen.text(place, _fitting(" ".join(prompt.split()), pen, font, canvas.width - 8), "black", font)
    return canvas


def _fitting(text: str, pen: Any, font: Any, width: int) -> str:
    if pen.textlength(text, font) <= width:
        return text
    while text and pen.textlength(f"{text}…", font) > width:
        text = text[:-1]
    return f"{text}…"
