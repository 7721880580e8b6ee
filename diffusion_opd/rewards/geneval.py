"""Do a picture's objects, their number, colours and places fit a prompt of GenEval?

The first half of this file knows boxes and no model; the second half finds them, with Mask2Former and CLIP.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPModel,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
)

from .clip import load_pretrained
from .scorer import Scorer

# The classes of COCO in its order, by GenEval's names
OBJECTS = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,"
    "snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,"
    "fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,"
    "oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
).split(",")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
COLOUR_PROMPTS = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # a score above it makes an object
MOST = 16  # objects of a class
APART = 0.1  # times the sum of two widths (heights), that much of the way between two centres does not count


@dataclass(frozen=True)
class Found:
    """An object in a picture: left, upper, right and lower edge in pixels, a score, and `[height, width]` booleans."""

    box: tuple[float, float, float, float]
    score: float
    mask: np.ndarray


Colours = Callable[[str, Sequence[Found]], Sequence[str]]  # of objects of a class


def judge(
    include: Sequence[Mapping[str, Any]],
    exclude: Sequence[Mapping[str, Any]],
    found: Mapping[str, Sequence[Found]],
    colours: Colours,
    scale: str,
) -> float:
    """The score of [`GenEval`] of the objects in a picture.

    Args:
        include (`Sequence[dict]`): What must be there: `class`, `count`, and maybe `color` and `position`, a relation
            and which of `include` it is to.
        exclude (`Sequence[dict]`): `class` and `count` of what must not.
        found (`Mapping[str, Sequence[Found]]`): The objects of each class, the surest first.
        colours (`Callable`): The names of the colours of objects of a class.
        scale (`str`): `"training"` or `"table"`.
    """
    credits: list[float] = []
    groups: list[Sequence[Found] | None] = []  # of each `include` that is met, its objects
    for wanted in include:
        count = wanted["count"]
        objects = found.get(wanted["class"], [])[: count if scale == "table" else None]
        credits.append(max(0.0, 1 - abs(len(objects) - count) / count))
        is_met = len(objects) == count
        if colour := wanted.get("color"):
            credits.append(list(colours(wanted["class"], objects)).count(colour) / count if is_met else 0.0)
            is_met = credits[-1] == 1
        if position := wanted.get("position"):
            relation, others = position[0], groups[int(position[1])]
            is_met = (
                is_met
                and others is not None
                and all(relation in relations(one.box, other.box) for one in objects for other in others)
            )
            credits.append(float(is_met))
        groups.append(objects if is_met else None)
    if scale == "training":
        return sum(credits) / len(credits)
    too_many = any(len(found.get(unwanted["class"], [])) >= unwanted["count"] for unwanted in exclude)
    return float(min(credits) == 1 and not too_many)


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """Where a box lies, seen from another: none, one or two of `RELATIONS`.

    Of the way between the centres, `APART` times the sum of both sizes does not count; a relation holds where what is
    left along one axis is more than half of the whole way.
    """
    a, b = np.reshape([box, other], (2, 2, 2))  # each `[corner, axis]`
    offset = a.mean(0) - b.mean(0)
    far = np.maximum(abs(offset) - APART * (abs(a[1] - a[0]) + abs(b[1] - b[0])), 0) * np.sign(offset)
    if (abs(far) < 1e-3).all():
        return set()
    x, y = far / np.linalg.norm(offset)
    return {name for name, holds in zip(RELATIONS, (x < -0.5, x > 0.5, y < -0.5, y > 0.5), strict=True) if holds}


class GenEval(Scorer):
    """
    How far the objects in a picture, their number, colours and places are those that a prompt of GenEval asks for, from
    0 to 1 (Ghosh et al. 2023, https://arxiv.org/abs/2310.11513).

    The dataset's rows are GenEval's, as `load_dataset("json", ...)` reads its `evaluation_metadata.jsonl`: `tag`,
    `include` and maybe `exclude`, lists of `{"class", "count", "color", "position"}`, or these as JSON text. A row
    without `include` has no score (`None`).

    - `scale="table"`: 1 or 0, as GenEval counts. Of each class in `include` there are at least `count` objects, and the
      surest `count` of them have the colour, and the position to all of those that they are placed to; of a class in
      `exclude` there are fewer than its `count`.
    - `scale="training"`: the mean of credits, after Flow-GRPO's server. Each of `include` gives one for its number,
      `1 - |found - count| / count`; one for its colour, the share of the `count` that has it; and one for its position,
      1 or 0. The latter two are 0 unless the number is right. A number's credit is never below 0, and a wrong position
      gives 0 alone; that server's falls below 0 for more than twice the number, and adds a 1 to that 0.

    Objects are found by Mask2Former with a Swin-S, on pictures whose short side is 800 pixels (the long one at most
    1333): score above .3, above .9 where `tag` is `"counting"`, the surest 16 of a class. A colour is the one of ten
    that CLIP ViT-L/14 finds closest to the object's box, grey (#999) beyond its mask, by the mean of three prompts.
    Position is taken from the boxes, see [`relations`].

    **Published numbers use mmdet's Mask2Former; this one is transformers', with other weights: its numbers differ.**

    Args:
        detector (`str`, *optional*, defaults to `"facebook/mask2former-swin-small-coco-instance"`):
            A Mask2Former for the 80 classes of COCO, in the order of COCO.
        clip (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            Tells the colours.
        kwargs: As of [`Scorer`]. Pictures go through the detector one at a time, whatever `batch_size` is.

    Raises:
        ValueError: at the first call, if the detector knows other than 80 classes; when it gives NaN; for a row that
            names a class, a colour or a relation that GenEval does not have.
    """

    __name__ = "geneval"

    def __init__(
        self,
        detector: str = "facebook/mask2former-swin-small-coco-instance",
        clip: str = "openai/clip-vit-large-patch14",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.detector, self.clip = detector, clip

    def load(self) -> nn.Module:
        return ObjectFinder(self.detector, self.clip)

    # Names the columns that it needs, so that a dataset without them is refused before anything is drawn
    def __call__(  # type: ignore[override]
        self, prompts: Sequence[str], images: Sequence[Any], include: Sequence[Any], tag: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        return super().__call__(prompts, images, include=include, tag=tag, **columns)

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image], **columns: Any) -> list[float | None]:
        includes = [_read(given) for given in columns["include"]]
        excludes = [_read(given) for given in columns.get("exclude", [None] * len(images))]
        scores: list[float | None] = []
        finder: Any = self.model
        for image, include, exclude, tag in zip(images, includes, excludes, columns["tag"], strict=True):
            if not include:
                scores.append(None)
                continue
            least = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
            found = finder.find(image)
            kept = {name: [one for one in objects if one.score > least][:MOST] for name, objects in found.items()}
            colours = functools.partial(finder.colours, image)
            scores.append(judge(include, exclude, kept, colours, self.scale))
        return scores


def _read(given: Any) -> list[dict[str, Any]]:
    """`include` or `exclude` of a row, checked."""
    wanted: list[dict[str, Any]] = json.loads(given) if isinstance(given, str) else list(given or ())
    for one in wanted:
        relation = (one.get("position") or [None])[0]
        for kind, value, known in (
            ("class", one["class"], OBJECTS),
            ("colour", one.get("color"), COLOURS),
            ("position", relation, RELATIONS),
        ):
            if value is not None and value not in known:
                raise ValueError(f"GenEval has no {kind} {value!r}; it has {', '.join(known)}.")
    return wanted


class ObjectFinder(nn.Module):
    """
    Finds objects in pictures, and their colours.

    Args:
        detector (`str`): A Mask2Former, as of [`GenEval`].
        clip (`str`): A CLIP.

    Raises:
        ValueError: if the detector knows other than 80 classes.
    """

    def __init__(self, detector: str, clip: str):
        super().__init__()
        self.detector = load_pretrained(Mask2FormerForUniversalSegmentation, detector, GenEval.__name__)
        if self.detector.config.num_labels != len(OBJECTS):
            raise ValueError(
                f"GenEval's detector must know the {len(OBJECTS)} classes of COCO, but {detector} knows "
                f"{self.detector.config.num_labels}."
            )
        size = {"shortest_edge": 800, "longest_edge": 1333}  # as the detector was tested; its config says 384 by 384
        self._pictures = Mask2FormerImageProcessorPil.from_pretrained(detector, size=size)
        self.clip = load_pretrained(CLIPModel, clip, GenEval.__name__)
        self._crops, self._tokenizer = CLIPImageProcessorPil.from_pretrained(clip), AutoTokenizer.from_pretrained(clip)
        self._anchors: dict[str, Tensor] = {}

    def find(self, image: Image.Image) -> dict[str, list[Found]]:
        """The objects in a picture with a score above `THRESHOLD`, by class, the surest first.

        A score is the class's probability times the mask's mean probability within it, as mmdet has it.
        """
        # Not in a batch: a smaller picture would be filled up, and its objects then depend on the others
        inputs = self._pictures(image, return_tensors="pt").to(self.detector.device)
        pixels = inputs["pixel_values"].to(self.detector.dtype)
        outputs = self.detector(pixel_values=pixels)
        masks = interpolate(outputs.masks_queries_logits.float(), pixels.shape[-2:], mode="bilinear")[0]
        chances = outputs.class_queries_logits[0].float().softmax(-1)[:, :-1]  # the last is "nothing"
        if not chances.isfinite().all():  # seen in half precision on the CPU, where torch's `grid_sample` overflows
            raise ValueError(f"GenEval's detector gives NaN with `dtype={self.detector.dtype}`; give it float32.")
        found: dict[str, list[Found]] = {}
        for query, label in (chances > THRESHOLD).nonzero().tolist():
            mask = interpolate(masks[query][None, None], image.size[::-1], mode="bilinear")[0, 0]
            inside = mask > 0
            score = (chances[query, label] * mask[inside].sigmoid().mean()).item()
            if score > THRESHOLD:  # never so if the mask is empty: its mean is NaN
                found.setdefault(OBJECTS[label], []).append(Found(_box(inside), score, inside.cpu().numpy()))
        return {name: sorted(objects, key=lambda one: -one.score) for name, objects in found.items()}

    def colours(self, image: Image.Image, name: str, objects: Sequence[Found]) -> list[str]:
        """The colours of objects of a class in a picture."""
        grey = Image.new("RGB", image.size, "#999")
        crops = [Image.composite(image, grey, Image.fromarray(one.mask)).crop(one.box) for one in objects]
        pixels = self._crops(crops, return_tensors="pt")["pixel_values"].to(self.clip.device, self.clip.dtype)
        closeness = self.clip.get_image_features(pixels).pooler_output @ self._anchor(name).to(pixels.device).T
        return [COLOURS[index] for index in closeness.argmax(1).tolist()]

    def _anchor(self, name: str) -> Tensor:
        """One direction for each of the colours of a class: `[colours, channels]`."""
        if name not in self._anchors:
            texts = [prompt.format(colour, name) for colour in COLOURS for prompt in COLOUR_PROMPTS]
            tokens = self._tokenizer(texts, padding=True, return_tensors="pt").to(self.clip.device)
            features = normalize(self.clip.get_text_features(**tokens).pooler_output, dim=-1)
            self._anchors[name] = normalize(features.unflatten(0, (len(COLOURS), -1)).mean(1), dim=-1)
        return self._anchors[name]


def _box(inside: Tensor) -> tuple[float, float, float, float]:
    rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
    left, upper, right, lower = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    return left.item(), upper.item(), right.item(), lower.item()
