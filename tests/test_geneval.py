"""GenEval's rules on made-up boxes, on drawn pictures, and on what random weights find."""

import json
import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from datasets import load_dataset
from PIL import Image, ImageDraw
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    SwinConfig,
)

from diffusion_opd.rewards import Rewards
from diffusion_opd.rewards.geneval import COLOURS, OBJECTS, RELATIONS, Found, GenEval, judge, relations
from tests.tiny_pipelines import clip_tokenizer, frozen

# Made-up boxes


def at(x: float, y: float, size: float = 10) -> Found:
    half = size / 2
    return Found((x - half, y - half, x + half, y + half), 0.95, np.ones((1, 1), bool))


def scored(row: dict, found: dict[str, list[Found]], colours: dict[str, list[str]] | None = None) -> tuple:
    """In training and in the table; `colours` are those of the objects of a class, in their order."""

    def colours_of(name, objects):
        return [colours[name][found[name].index(one)] for one in objects]

    exclude = row.get("exclude", [])
    return tuple(judge(row["include"], exclude, found, colours_of, scale) for scale in ("training", "table"))


def spread(count: int) -> list[Found]:
    return [at(50 * i, 50) for i in range(count)]


@pytest.mark.parametrize(("cats", "training", "table"), [(0, 0, 0), (1, 1, 1), (2, 0, 1), (3, 0, 1)])
def test_single_object(cats, training, table):
    row = {"include": [{"class": "cat", "count": 1}]}
    assert scored(row, {"cat": spread(cats), "dog": spread(2)}) == (training, table)


@pytest.mark.parametrize(
    ("cats", "dogs", "training", "table"), [(1, 1, 1, 1), (1, 0, 0.5, 0), (0, 0, 0, 0), (1, 2, 0.5, 1), (2, 0, 0, 0)]
)
def test_two_object(cats, dogs, training, table):
    row = {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1}]}
    assert scored(row, {"cat": spread(cats), "dog": spread(dogs)}) == (training, table)


@pytest.mark.parametrize("wanted", [2, 3, 4])
def test_counting(wanted):
    row = {"include": [{"class": "clock", "count": wanted}], "exclude": [{"class": "clock", "count": wanted + 1}]}
    for count in range(10):
        training, table = scored(row, {"clock": spread(count)} if count else {})
        assert training == pytest.approx(float(max(Fraction(0), 1 - Fraction(abs(count - wanted), wanted))))
        assert table == (count == wanted)


@pytest.mark.parametrize(
    ("colours", "training", "table"),
    [
        (["pink"], 1, 1),
        (["red"], 0.5, 0),
        ([], 0, 0),
        (["pink", "red"], 0, 1),  # the surest is pink; two are no one
        (["red", "pink"], 0, 0),
    ],
)
def test_colors(colours, training, table):
    row = {"include": [{"class": "car", "count": 1, "color": "pink"}]}
    assert scored(row, {"car": spread(len(colours))}, {"car": colours}) == (training, table)


def test_colours_of_several():
    row = {"include": [{"class": "car", "count": 4, "color": "pink"}]}
    mixed = ["pink", "red", "pink", "pink"]
    assert scored(row, {"car": spread(4)}, {"car": mixed}) == ((1 + 3 / 4) / 2, 0)


@pytest.mark.parametrize(
    ("place", "right"), [((80, 50), "right of"), ((20, 50), "left of"), ((50, 20), "above"), ((50, 80), "below")]
)
@pytest.mark.parametrize("wanted", RELATIONS)
def test_position(place, right, wanted):
    row = {
        "include": [
            {"class": "bear", "count": 1, "color": None, "position": None},
            {"class": "dog", "count": 1, "position": [wanted, 0]},
        ]
    }
    met = wanted == right
    dog = at(*place)
    assert scored(row, {"bear": [at(50, 50)], "dog": [dog]}) == (pytest.approx((1 + 1 + met) / 3), met)
    assert scored(row, {"dog": [dog]}) == (pytest.approx((0 + 1 + 0) / 3), 0)  # nothing to be placed to
    assert scored(row, {"bear": [at(50, 50)]}) == (pytest.approx((1 + 0 + 0) / 3), 0)
    two = [dog, at(50, 50)]  # the second is nowhere
    assert scored(row, {"bear": [at(50, 50)], "dog": two}) == (pytest.approx((1 + 0 + 0) / 3), met)


@pytest.mark.parametrize(
    ("glass", "apple", "training", "table"),
    [
        (["purple"], ["black"], 1, 1),
        (["black"], ["purple"], 0.5, 0),
        (["purple"], ["red"], 0.75, 0),
        (["purple"], [], 0.5, 0),
        (["purple", "red"], ["black"], 0.5, 1),
    ],
)
def test_color_attr(glass, apple, training, table):
    row = {
        "include": [
            {"class": "wine glass", "count": 1, "color": "purple"},
            {"class": "apple", "count": 1, "color": "black"},
        ]
    }
    found = {"wine glass": spread(len(glass)), "apple": spread(len(apple))}
    assert scored(row, found, {"wine glass": glass, "apple": apple}) == (training, table)


def test_relations_count_what_is_left_of_the_way_between_the_centres():
    generator = random.Random(0)
    seen = set()
    for _ in range(500):
        (ax, ay, aw, ah), (bx, by, bw, bh) = ([generator.uniform(1, 40) for _ in range(4)] for _ in range(2))
        way = math.dist((ax, ay), (bx, by))
        along = max(0, abs(ax - bx) - (aw + bw) / 10) / way > 0.5
        across = max(0, abs(ay - by) - (ah + bh) / 10) / way > 0.5
        expected = ["right of" if ax > bx else "left of"] * along + ["below" if ay > by else "above"] * across
        boxes = [(x - w / 2, y - h / 2, x + w / 2, y + h / 2) for x, y, w, h in ((ax, ay, aw, ah), (bx, by, bw, bh))]
        assert relations(*boxes) == set(expected)
        seen.add(tuple(sorted(expected)))
    assert len(seen) == 9  # nowhere, four sides, four corners
    assert relations((0, 0, 10, 10), (0, 0, 10, 10)) == set()


# Drawn pictures

PAINTS = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 128, 0)}
SHADES = {"cat": 0, "dog": 40, "clock": 80}  # a class is told by how much is added to the two other channels


class DrawnFinder(nn.Module):
    """Finds rectangles by their exact paint; what has a dot in its corner is less sure."""

    def find(self, image):
        pixels, found = np.asarray(image).astype(int), {}
        for name, paint in [(name, _paint(name, colour)) for name in SHADES for colour in PAINTS]:
            rows, columns = np.nonzero((pixels == paint).all(-1))
            for left in sorted({x - x % 32 for x in columns}):  # at most one a column of 32 pixels
                own = columns // 32 == left // 32
                box = (columns[own].min(), rows[own].min(), columns[own].max() + 1, rows[own].max() + 1)
                mask = np.zeros(pixels.shape[:2], bool)
                mask[rows[own], columns[own]] = True
                score = 0.95 if mask[box[1], box[0]] else 0.6
                found.setdefault(name, []).append(Found(box, score, mask))
        return found

    def colours(self, image, name, objects):
        means = [np.asarray(image)[one.mask].mean(0) for one in objects]
        return [min(PAINTS, key=lambda colour: abs(mean - _paint(name, colour)).sum()) for mean in means]


def _paint(name: str, colour: str) -> tuple[int, ...]:
    return tuple(max(part, SHADES[name]) for part in PAINTS[colour])


class DrawnGenEval(GenEval):
    def load(self):
        return DrawnFinder()


def drawn(*things: tuple[str, str, int, int], unsure: bool = False) -> Image.Image:
    """`(class, colour, column, row)` of squares on a field of 8 x 8."""
    picture = Image.new("RGB", (256, 256), "white")
    for name, colour, x, y in things:
        left, upper = 32 * x + 4, 32 * y + 4
        ImageDraw.Draw(picture).rectangle((left, upper, left + 23, upper + 23), fill=_paint(name, colour))
        if unsure:
            picture.putpixel((left, upper), (1, 2, 3))
    return picture


ROWS = [
    ("single_object", [{"class": "cat", "count": 1}], []),
    ("two_object", [{"class": "cat", "count": 1}, {"class": "dog", "count": 1}], []),
    ("counting", [{"class": "clock", "count": 3}], [{"class": "clock", "count": 4}]),
    ("colors", [{"class": "cat", "count": 1, "color": "blue"}], []),
    ("position", [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}], []),
    (
        "color_attr",
        [{"class": "cat", "count": 1, "color": "blue"}, {"class": "dog", "count": 1, "color": "red"}],
        [],
    ),
]
CAT, DOG = ("cat", "blue", 5, 4), ("dog", "red", 1, 4)
CLOCKS = [("clock", "red", x, 2) for x in range(4)]


def rows(as_json: bool = False) -> dict[str, list]:
    tags, includes, excludes = map(list, zip(*ROWS, strict=True))
    if as_json:
        includes, excludes = [json.dumps(one) for one in includes], [json.dumps(one) for one in excludes]
    return {"tag": tags, "include": includes, "exclude": excludes}


@pytest.mark.parametrize("as_json", [False, True])
def test_drawn_pictures(as_json):
    columns, prompts = rows(as_json), [""] * 6
    right = [drawn(CAT), drawn(CAT, DOG), drawn(*CLOCKS[:3]), drawn(CAT), drawn(CAT, DOG), drawn(CAT, DOG)]
    for scale in ("training", "table"):
        assert DrawnGenEval(scale=scale, batch_size=4)(prompts, right, **columns) == [1] * 6
    swapped = drawn(("cat", "red", 1, 4), ("dog", "blue", 5, 4))
    wrong = [drawn(DOG), drawn(DOG), drawn(*CLOCKS), swapped, swapped, swapped]
    assert DrawnGenEval(scale="table")(prompts, wrong, **columns) == [0] * 6
    credits = [0, 1 / 2, 2 / 3, 1 / 2, 2 / 3, 1 / 2]
    assert DrawnGenEval()(prompts, wrong, **columns) == pytest.approx(credits)


def test_a_file_as_geneval_has_it_is_a_dataset(tmp_path):
    lines = [{"tag": tag, "include": include, "prompt": f"{tag}?"} for tag, include, _ in ROWS]
    lines[2]["exclude"] = ROWS[2][2]
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    examples = list(load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache")))
    rewards = Rewards(DrawnGenEval(scale="table"))
    rewards.check_columns(list(examples[0]))
    assert rewards("a", examples, [drawn(CAT, DOG, *CLOCKS[:3])] * 6).tolist() == [[1]] * 6
    assert rewards("a", examples, [drawn(CAT, DOG, *CLOCKS)] * 6)[2] == 0


def test_counting_takes_sure_objects_only():
    columns = {key: [values[0], values[2]] for key, values in rows().items()}
    pictures = [drawn(CAT, unsure=True), drawn(*CLOCKS[:3], unsure=True)]
    assert DrawnGenEval(scale="table")([""] * 2, pictures, **columns) == [1, 0]


def test_at_most_sixteen_objects_of_a_class_count():
    class Crowd(GenEval):
        def load(self):
            finder = DrawnFinder()
            finder.find = lambda image: {"cat": spread(20)}
            return finder

    row = {"tag": ["counting"], "include": [[{"class": "cat", "count": 16}]]}
    assert Crowd()([""], [drawn()], **row) == [1]


def test_rows_without_objects_have_no_score_and_frames_count_alike():
    columns = {"tag": ["single_object", None], "include": [ROWS[0][1], None]}
    assert DrawnGenEval(num_frames=2)([""] * 2, [[drawn(CAT), drawn()], [drawn()]], **columns) == [0.5, None]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"class": "mouse", "count": 1}, "^GenEval has no class 'mouse'; it has person, bicycle, "),
        ({"class": "cat", "count": 1, "color": "grey"}, "^GenEval has no colour 'grey'; it has red, "),
        ({"class": "cat", "count": 1, "position": ["near", 0]}, "^GenEval has no position 'near'; it has left of, "),
    ],
)
def test_what_geneval_does_not_know_is_refused(wanted, message):
    with pytest.raises(ValueError, match=message):
        DrawnGenEval()([""], [drawn(CAT)], tag=["single_object"], include=[[wanted]])


def test_a_dataset_without_its_columns_is_refused_before_anything_is_drawn():
    rewards = Rewards(DrawnGenEval())
    with pytest.raises(ValueError, match=r"^the reward function 'geneval' needs \['include', 'tag'\], but"):
        rewards.check_columns(["prompt", "task"])
    rewards.check_columns(["prompt", "task", "tag", "include"])
    examples = [{"prompt": "", "tag": "single_object", "include": ROWS[0][1]}]
    assert rewards("a", examples, [drawn(CAT)]).tolist() == [[1]]


# Random weights, saved as the published ones are


def save_detector(folder, classes: int = 80) -> Mask2FormerForUniversalSegmentation:
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(
            embed_dim=8,
            depths=[1] * 4,
            num_heads=[1] * 4,
            window_size=4,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        num_labels=classes,
        num_queries=6,
        hidden_dim=32,
        feature_size=32,
        mask_feature_size=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
    )
    model = frozen(0, Mask2FormerForUniversalSegmentation, config)
    with torch.no_grad():
        model.class_predictor.weight *= 60  # sure of something
    model.save_pretrained(folder)
    # As the published file has it; pictures are given in another size all the same
    Mask2FormerImageProcessorPil(size={"height": 384, "width": 384}).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    detector = save_detector(folder / "detector")
    tokenizer = clip_tokenizer()
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config={**layers, **special, "vocab_size": len(tokenizer)},
        vision_config={**layers, "image_size": 224, "patch_size": 32},
        projection_dim=16,
    )
    clip = frozen(1, CLIPModel, config)
    clip.save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    CLIPImageProcessorPil().save_pretrained(folder / "clip")
    return folder, detector, clip, tokenizer


@pytest.fixture(scope="module")
def geneval(weights):
    folder = weights[0]
    return GenEval(str(folder / "detector"), str(folder / "clip"))


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)).resize((96, 64))


def test_objects_are_what_the_detector_says(weights, geneval):
    """Against all masks at once, in a batch of two."""
    geneval.model = geneval.load().eval()
    for image in (PICTURE, PICTURE.resize((128, 32))):
        size = {"shortest_edge": 800, "longest_edge": 1333}
        pixels = Mask2FormerImageProcessorPil(size=size)([image] * 2, return_tensors="pt")
        with torch.no_grad():
            objects, outputs = geneval.model.find(image), weights[1](**pixels)
        assert objects
        chances = outputs.class_queries_logits[1].softmax(-1)
        masks = outputs.masks_queries_logits[1:]
        for shape in (pixels["pixel_values"].shape[2:], (image.height, image.width)):
            masks = nn.functional.interpolate(masks, shape, mode="bilinear")
        expected = []
        for query, label in torch.cartesian_prod(torch.arange(6), torch.arange(80)).tolist():
            mask = masks[0, query].sigmoid()
            score = chances[query, label] * (mask * (mask > 0.5)).sum() / ((mask > 0.5).sum() + 1e-6)
            if score > 0.3:
                where = np.argwhere(mask.numpy() > 0.5)
                box = (*where.min(0)[::-1], *(where.max(0)[::-1] + 1))
                expected.append((OBJECTS[label], tuple(map(int, box)), round(float(score), 3)))
        got = [(name, one.box, round(one.score, 3)) for name, ones in objects.items() for one in ones]
        assert sorted(got) == sorted(expected)
        for ones in objects.values():
            assert [one.score for one in ones] == sorted((one.score for one in ones), reverse=True)
            assert all(one.mask.shape == (image.height, image.width) for one in ones)


def test_colours_are_what_clip_says(weights, geneval):
    """Of the box, with grey around the object."""
    _, _, clip, tokenizer = weights
    mask = np.zeros((64, 96), bool)
    mask[10:40, 20:50] = True
    mask[10:20, 20:30] = False
    objects = [Found((20, 10, 50, 40), 0.9, mask), Found((0, 0, 96, 64), 0.5, np.ones_like(mask))]
    geneval.model = geneval.load().eval()
    with torch.no_grad():
        got = geneval.model.colours(PICTURE, "fire hydrant", objects)
        crop = np.array(PICTURE)[10:40, 20:50]
        crop[:10, :10] = 0x99
        scores = []
        for colour in COLOURS:
            words = [f"{colour} fire hydrant", f"{colour}-colored fire hydrant", f"{colour} object"]
            texts = [f"a photo of a {one}" for one in words]
            inputs = tokenizer(texts, padding="max_length", return_tensors="pt")
            pixels = CLIPImageProcessorPil()([Image.fromarray(crop), PICTURE], return_tensors="pt")
            outputs = clip(**inputs, **pixels)
            text = outputs.text_embeds.mean(0)  # `text_embeds` and `image_embeds` have length 1
            scores.append(outputs.image_embeds @ text / text.norm())
    best = torch.stack(scores).argmax(0).tolist()
    assert got == [COLOURS[index] for index in best]


def test_it_loads_and_scores_with_published_files(weights):
    folder = weights[0]
    for scale in ("training", "table"):
        scorer = GenEval(str(folder / "detector"), str(folder / "clip"), scale=scale, batch_size=3)
        scores = scorer(["a photo"] * 6, [PICTURE] * 6, **rows())
        assert len(scores) == 6 and all(0 <= score <= 1 for score in scores)


def test_a_detector_of_other_classes_is_refused(weights, tmp_path):
    save_detector(tmp_path, classes=3)
    with pytest.raises(ValueError, match=r"^GenEval's detector must know the 80 classes of COCO, but .* knows 3\.$"):
        GenEval(str(tmp_path), str(weights[0] / "clip"))([""], [PICTURE], tag=["colors"], include=[ROWS[0][1]])


def test_nan_is_no_empty_picture(weights):
    scorer = GenEval(str(weights[0] / "detector"), str(weights[0] / "clip"))
    scorer.model = scorer.load().eval()
    scorer.model.detector.class_predictor.bias.data.fill_(math.nan)
    with pytest.raises(ValueError, match=r"^GenEval's detector gives NaN with `dtype=torch\.float32`; give it float32"):
        scorer([""], [PICTURE], tag=["colors"], include=[ROWS[0][1]])
