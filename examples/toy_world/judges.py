"""The judges of the toy world. They look at pictures and at what the prompt asks for, and at nothing else; the judge of
editing looks at the source picture besides.

Scores lie in [0, 1] and give partial credit, as the rewards of the DiffusionOPD paper do: `compose` is the fraction of
the prompt's conditions that a detector finds met (GenEval), `text` is 1 - edit distance / length (OCR), `style` is a
smooth statistic that does not read the prompt (an aesthetic score), `edit` the asked change, made (1), half made or not
(0), times how much of the rest is kept. `warm`, `dark` and `large` are statistics as `style` is.

The judges know the world's colours, shapes and letters. They do not know how a picture was made.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from examples.toy_world.world import COLOURS, DOT, GAP, LETTERS, SHAPES, SIZE, Prompt, Thing, letter_mask, shape_mask


@dataclass(frozen=True)
class Found:
    """A shape that the detector found, with its centre in pixels."""

    shape: str
    colour: str
    x: float
    y: float


def components(mask: np.ndarray) -> list[np.ndarray]:
    """The 4-connected parts of a boolean picture."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:  # every pixel takes the largest label around it until nothing changes
        padded = np.pad(labels, 1)
        neighbours = [padded[1:-1, :-2], padded[1:-1, 2:], padded[:-2, 1:-1], padded[2:, 1:-1], labels]
        spread = np.where(mask, np.max(neighbours, axis=0), 0)
        if np.array_equal(spread, labels):
            return [labels == label for label in np.unique(labels) if label]
        labels = spread


def _normalised(mask: np.ndarray) -> np.ndarray:
    """What the bounding box of a mask holds, as 16 x 16 booleans."""
    rows, columns = np.nonzero(mask)
    box = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    return np.asarray(Image.fromarray(box.astype(np.uint8) * 255).resize((16, 16), Image.Resampling.BOX)) > 127


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / max((a | b).sum(), 1)


@cache
def _shape_templates() -> dict[str, np.ndarray]:
    return {shape: _normalised(shape_mask(shape, 32, 32, 12) > 0.5) for shape in SHAPES}


def detect(picture: Image.Image) -> list[Found]:
    """Segment by the nearest colour, split into connected parts, name each part by the shape it overlaps most."""
    rgb = np.asarray(picture.convert("RGB"), dtype=np.float32)
    palette = np.array(list(COLOURS.values()), dtype=np.float32)
    distance = np.linalg.norm(rgb[:, :, None] - palette, axis=-1)
    nearest = np.where(distance.min(-1) < 70, distance.argmin(-1), -1)
    found = []
    for index, colour in enumerate(COLOURS):
        if (nearest == index).sum() < 60:
            continue
        for part in components(nearest == index):
            if part.sum() < 60:  # the smallest shape of the world, a cross of radius 8, has about 150 pixels
                continue
            rows, columns = np.nonzero(part)
            height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
            overlaps = {shape: _overlap(_normalised(part), mask) for shape, mask in _shape_templates().items()}
            shape = max(overlaps, key=overlaps.get)
            if overlaps[shape] > 0.65 and max(height, width) < 1.35 * min(height, width):
                found.append(Found(shape, colour, (columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2))
    return found


def _holds(relation: str, a: Found, b: Found) -> bool:
    """GenEval's rule for positions, with a margin of a few pixels."""
    margin = 6
    return {
        "left of": a.x < b.x - margin,
        "right of": a.x > b.x + margin,
        "above": a.y < b.y - margin,
        "below": a.y > b.y + margin,
    }[relation]


def judge_compose(picture: Image.Image, prompt: Prompt) -> float:
    """The fraction of the prompt's conditions that are met."""
    found = detect(picture)

    def like(thing: Thing) -> list[Found]:
        return [f for f in found if f.shape == thing.shape and thing.colour in (None, f.colour)]

    things = prompt.things
    if prompt.kind == "counting":
        return max(0.0, 1 - abs(len(like(things[0])) - len(things)) / len(things))
    conditions = []
    for thing in things:
        conditions.append(bool(like(Thing(thing.shape))))
        if thing.colour:
            conditions.append(bool(like(thing)))
    if prompt.relation:
        conditions.append(any(_holds(prompt.relation, a, b) for a in like(things[0]) for b in like(things[1])))
    if len(things) == 1:
        conditions.append(len(found) == 1)
    return float(np.mean(conditions)) if found else 0.0


@cache
def _letter_templates() -> dict[str, np.ndarray]:
    return {letter: letter_mask(letter) for letter in LETTERS}


def read(picture: Image.Image) -> str:
    """The string in a picture, "?" for ink that is no letter: cut at columns without ink, compare with every letter."""
    grey = np.asarray(picture.convert("L"), dtype=np.float32)
    paper, darkest = np.median(grey), grey.min()
    if paper - darkest < 60:
        return ""
    ink = grey < (paper + darkest) / 2
    width, string = 5 * DOT, ""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], ink.any(0), [0]])))
    for left, right in edges.reshape(-1, 2):
        # Letters that touch are cut at the pitch of the type; a few pixels of ink are a speck.
        count = max(1, round((right - left + GAP) / (width + GAP)))
        for part in np.array_split(ink[:, left:right], count, axis=1):
            if part.sum() < 20:
                continue
            rows, columns = np.nonzero(part)
            box = part[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].astype(np.uint8) * 255
            sized = np.asarray(Image.fromarray(box).resize((width, 7 * DOT), Image.Resampling.BOX)) > 127
            overlaps = {letter: _overlap(sized, mask) for letter, mask in _letter_templates().items()}
            letter = max(overlaps, key=overlaps.get)
            near_size = abs(box.shape[0] - 7 * DOT) <= 5 and abs(box.shape[1] - width) <= 5
            string += letter if overlaps[letter] > 0.6 and near_size else "?"
    return string


def edit_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def judge_text(picture: Image.Image, prompt: Prompt) -> float:
    """1 - edit distance / length, not below 0."""
    return max(0.0, 1 - edit_distance(read(picture), prompt.string) / len(prompt.string))


def _saturating(value: float, low: float, high: float) -> float:
    return float(np.clip((value - low) / (high - low), 0, 1))


def judge_style(picture: Image.Image, prompt: Prompt | None = None) -> float:
    """The mean of soft shading, a colourful sky and dark corners, each in [0, 1]; a noisy picture has none of them."""
    rgb = np.asarray(picture.convert("RGB"), dtype=np.float32)
    small = rgb.reshape(16, SIZE // 16, 16, SIZE // 16, 3).mean((1, 3))
    grey = small.mean(-1)

    steps = np.concatenate([np.abs(np.diff(grey, axis=0)).ravel(), np.abs(np.diff(grey, axis=1)).ravel()])
    shading = _saturating(float(((steps > 2) & (steps < 25)).mean()), 0.1, 0.7)

    border = np.concatenate([small[0], small[-1], small[:, 0], small[:, -1]])  # the sky, not the things
    colourful = _saturating(float((border.max(-1) - border.min(-1)).mean()), 20, 70)

    rows, columns = np.mgrid[0:16, 0:16]
    distance = np.hypot(rows - 7.5, columns - 7.5)
    middle, corner = grey[(distance > 4) & (distance < 7)].mean(), grey[distance > 9].mean()
    vignette = _saturating(1 - corner / max(middle, 1.0), 0.02, 0.27)

    grain = np.median(np.abs(np.diff(rgb, axis=1)))
    return (shading + colourful + vignette) / 3 * (1 - _saturating(float(grain), 6, 20))


def judge_edit(picture: Image.Image, prompt: Prompt, source: Image.Image) -> float:
    """The asked change times what is kept of the rest, each in [0, 1]: who leaves the source as it is gets nothing, and
    who draws what was asked for on other paper little."""
    before, after = detect(source), detect(picture)
    (asked,) = prompt.things
    named = next(f for f in before if f.shape == asked.shape and asked.colour in (None, f.colour))

    def at(place: Found) -> list[Found]:
        return [f for f in after if np.hypot(f.x - place.x, f.y - place.y) < 6]

    # Where the named thing was: its box and a margin for its soft edges
    rows, columns = np.mgrid[0:SIZE, 0:SIZE]
    radius = 14 if len(before) == 1 else 11
    place = np.maximum(np.abs(rows - named.y), np.abs(columns - named.x)) <= radius + 3
    before_rgb, after_rgb = (np.asarray(p.convert("RGB"), dtype=np.float32) for p in (source, picture))
    if prompt.becomes is None:
        as_paper = np.linalg.norm(after_rgb - _paper(source), axis=-1)[place] < 40
        change = 0.0 if at(named) else _saturating(float(as_paper.mean()), 0.7, 0.98)
    else:
        wanted = Thing(prompt.becomes.shape or named.shape, prompt.becomes.colour or named.colour)
        met = [((f.shape == wanted.shape) + (f.colour == wanted.colour)) / 2 for f in at(named)]
        unchanged = any(f.shape == named.shape and f.colour == named.colour for f in at(named))
        change = 0.0 if unchanged or not met else max(met)
    same = np.linalg.norm(after_rgb - before_rgb, axis=-1)[~place] < 40
    others = [any(f.shape == o.shape and f.colour == o.colour for f in at(o)) for o in before if o is not named]
    kept = _saturating(float(same.mean()), 0.8, 0.98) * (float(np.mean(others)) if others else 1.0)
    return change * kept


def _paper(picture: Image.Image) -> np.ndarray:
    """The mean colour of the outermost four pixels, where nothing is drawn."""
    rgb = np.asarray(picture.convert("RGB"), dtype=np.float32)
    edge = np.ones((SIZE, SIZE), dtype=bool)
    edge[4:-4, 4:-4] = False
    return rgb[edge].mean(0)


def judge_warm(picture: Image.Image, prompt: Prompt | None = None) -> float:
    """How much redder than blue the paper is."""
    red, _, blue = _paper(picture)
    return _saturating(red - blue, -40, 120)


def judge_dark(picture: Image.Image, prompt: Prompt | None = None) -> float:
    """How dark the paper is."""
    return 1 - _saturating(_paper(picture).mean(), 60, 255)


def judge_large(picture: Image.Image, prompt: Prompt | None = None) -> float:
    """How much of the picture is not paper."""
    rgb = np.asarray(picture.convert("RGB"), dtype=np.float32)
    covered = (np.linalg.norm(rgb - _paper(picture), axis=-1) > 60).mean()
    return _saturating(float(covered), 0.0, 0.6)


JUDGES = {
    "compose": judge_compose,
    "text": judge_text,
    "style": judge_style,
    "edit": judge_edit,
    "warm": judge_warm,
    "dark": judge_dark,
    "large": judge_large,
}


def score(picture: Image.Image, prompt: Prompt, source: Image.Image | None = None) -> float:
    """What the judge of the prompt's task says; `source`: the picture that an instruction is about."""
    return JUDGES[prompt.task](picture, prompt) if source is None else judge_edit(picture, prompt, source)


def scores(
    pictures: Sequence[Image.Image], prompts: Sequence[Prompt], sources: Sequence[Image.Image | None] | None = None
) -> list[float]:
    return [score(*row) for row in zip(pictures, prompts, sources or [None] * len(prompts), strict=True)]
