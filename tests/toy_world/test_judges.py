"""Every judge gives right pictures a high score, blank and noisy ones a low one, half-right ones one between."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from examples.toy_world.judges import (
    JUDGES,
    components,
    detect,
    edit_distance,
    judge_compose,
    judge_edit,
    judge_text,
    read,
    score,
)
from examples.toy_world.world import (
    TASKS,
    Prompt,
    Thing,
    draw,
    draw_badly,
    draw_edit,
    edits,
    prompts_of,
    sample_prompts,
    sources,
)


def things(kind: str, *wanted: Thing, relation: str | None = None) -> Prompt:
    return Prompt("", "compose", kind, wanted, relation)


def drawn(prompt: Prompt, seed: int = 0) -> Image.Image:
    return draw(prompt, np.random.default_rng(seed))


def blurred(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """As a decoder blurs: a little softness and a little noise."""
    array = np.asarray(picture.filter(ImageFilter.GaussianBlur(0.6)), dtype=np.float32)
    return Image.fromarray((array + rng.normal(0, 4, array.shape)).clip(0, 255).astype(np.uint8))


RED_CIRCLE, BLUE_SQUARE = Thing("circle", "red"), Thing("square", "blue")
DRAWN = tuple(task for task in TASKS if task != "edit")
KINDS = {task: sorted({p.kind for p in prompts_of(task)}) for task in TASKS}


@pytest.mark.parametrize("task, kind", [(task, kind) for task in DRAWN for kind in KINDS[task]])
def test_right_pictures_score_high_and_bad_ones_low(task, kind):
    rng = np.random.default_rng(0)
    prompts = [p for p in sample_prompts(task, 240, seed=1) if p.kind == kind][:30]
    judge = JUDGES[task]
    right = [judge(blurred(draw(p, rng), rng), p) for p in prompts]
    bad = [judge(draw_badly(p, rng), p) for p in prompts]
    assert min(right) > (0.7 if task == "style" else 0.99)
    assert np.mean(bad) < 0.65


@pytest.mark.parametrize("task", TASKS)
def test_blank_and_noise_score_nothing(task):
    rng = np.random.default_rng(0)
    blank = Image.new("RGB", (64, 64), (242, 242, 242))
    noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    prompts = sample_prompts(task, 12, seed=1)
    for prompt, source in zip(prompts, sources(prompts, 1) or [None] * 12, strict=True):
        # What is alone in its picture is gone from a blank one on its own paper
        emptied = prompt.kind == "removal" and len(detect(source)) == 1
        assert score(blank, prompt, source) <= (1 if emptied else 0)
        assert score(noise, prompt, source) < 0.1


@pytest.mark.parametrize("task", TASKS)
def test_pictures_of_other_tasks_score_low(task):
    rng = np.random.default_rng(0)
    others = [p for other in TASKS if other != task for p in sample_prompts(other, 30, seed=1)]
    wanted = sample_prompts(task, len(others), seed=2)
    rows = zip(others, wanted, sources(wanted, 2) or [None] * len(others), strict=True)
    assert np.mean([score(draw(other, rng), prompt, source) for other, prompt, source in rows]) < 0.2


@pytest.mark.parametrize("kind", KINDS["edit"])
def test_an_edit_is_the_asked_change_and_no_other(kind):
    rng = np.random.default_rng(0)
    prompts = [p for p in sample_prompts("edit", 240, seed=1) if p.kind == kind][:30]
    pairs = edits(prompts, 1)
    right = [judge_edit(blurred(after, rng), p, before) for p, (before, after) in zip(prompts, pairs, strict=True)]
    untouched = [judge_edit(before, p, before) for p, (before, _) in zip(prompts, pairs, strict=True)]
    other_sources = [before for before, _ in edits(prompts, 2)]
    elsewhere = [judge_edit(a, p, s) for p, (_, a), s in zip(prompts, pairs, other_sources, strict=True)]
    badly = [draw_edit(p, rng, well=False) for p in prompts]
    wrong = [judge_edit(after, p, before) for p, (before, after) in zip(prompts, badly, strict=True)]
    assert min(right) > 0.9 and max(untouched) == 0
    assert np.mean(wrong) < 0.3 and np.mean(elsewhere) < 0.5


def test_an_edit_gives_credit_for_half_a_change_and_for_what_is_kept():
    def picture(*wanted: Thing) -> Image.Image:
        return drawn(things("position", *wanted, relation="left of"))

    make_blue = Prompt("", "edit", "colour", (Thing("circle"),), becomes=Thing(colour="blue"))
    green = Thing("triangle", "green")
    source = picture(RED_CIRCLE, green)
    assert judge_edit(picture(Thing("circle", "blue"), green), make_blue, source) == 1
    assert judge_edit(picture(BLUE_SQUARE, green), make_blue, source) == 0.5  # another shape
    assert judge_edit(picture(Thing("circle", "blue"), BLUE_SQUARE), make_blue, source) == 0  # the other one lost
    assert judge_edit(picture(Thing("circle", "green"), green), make_blue, source) == 0.5  # another colour
    gone = Prompt("", "edit", "removal", (Thing("circle"),))
    assert judge_edit(source, gone, source) == 0


@pytest.mark.parametrize("n, score", [(1, 1 / 3), (2, 2 / 3), (3, 1.0), (4, 2 / 3)])
def test_counting_gives_credit_by_distance(n, score):
    picture = drawn(things("counting", *[RED_CIRCLE] * n))
    assert judge_compose(picture, things("counting", *[RED_CIRCLE] * 3)) == pytest.approx(score)
    assert judge_compose(picture, things("counting", *[BLUE_SQUARE] * 3)) == 0


def test_compose_gives_credit_by_conditions():
    both = things("attribute binding", RED_CIRCLE, BLUE_SQUARE)
    swapped = things("attribute binding", Thing("circle", "blue"), Thing("square", "red"))
    one = things("colours", RED_CIRCLE)
    assert judge_compose(drawn(both), both) == 1
    assert judge_compose(drawn(swapped), both) == 0.5  # both shapes, no colour
    assert judge_compose(drawn(one), both) == 0.5
    assert judge_compose(drawn(both), one) == pytest.approx(2 / 3)  # not alone
    assert judge_compose(drawn(things("colours", Thing("circle", "green"))), one) == pytest.approx(2 / 3)


@pytest.mark.parametrize("relation, opposite", [("left of", "right of"), ("above", "below")])
def test_positions(relation, opposite):
    prompt, contrary = (things("position", RED_CIRCLE, BLUE_SQUARE, relation=r) for r in (relation, opposite))
    assert judge_compose(drawn(prompt), prompt) == 1
    assert judge_compose(drawn(contrary), prompt) == pytest.approx(4 / 5)


def test_things_stand_in_the_order_of_the_words_from_the_left_and_two_anywhere_in_a_source():
    for prompt in [p for p in prompts_of("compose") if p.kind == "attribute binding"][:20]:
        found = sorted(detect(drawn(prompt, seed=3)), key=lambda f: f.x)
        assert [(f.shape, f.colour) for f in found] == [(thing.shape, thing.colour) for thing in prompt.things]
    pairs = [found for source in sources(sample_prompts("edit", 40, seed=0), 0) if len(found := detect(source)) == 2]
    assert {bool(abs(a.x - b.x) > abs(a.y - b.y)) for a, b in pairs} == {True, False}


def test_detector_names_shapes_colours_and_places():
    left, right = detect(drawn(things("position", Thing("cross", "yellow"), BLUE_SQUARE, relation="right of")))[::-1]
    assert {(left.shape, left.colour), (right.shape, right.colour)} == {("cross", "yellow"), ("square", "blue")}


def test_components_are_connected_parts():
    mask = np.array([[1, 1, 0, 0], [0, 1, 0, 1], [1, 0, 0, 1]], dtype=bool)
    assert sorted(part.sum() for part in components(mask)) == [1, 2, 3]


@pytest.mark.parametrize(
    "shown, wanted, score",
    [("CAT", "CAT", 1), ("CAX", "CAT", 2 / 3), ("CA", "CAT", 2 / 3), ("TOL", "X", 0), ("A", "H", 0)],
)
def test_text_gives_credit_by_edit_distance(shown, wanted, score):
    picture = drawn(Prompt("", "text", "", string=shown))
    assert read(picture) == shown
    assert judge_text(picture, Prompt("", "text", "", string=wanted)) == pytest.approx(score)


@pytest.mark.parametrize("a, b, distance", [("", "", 0), ("A", "", 1), ("CAT", "CUT", 1), ("AB", "BA", 2)])
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_style_grows_with_the_look():
    prompt = sample_prompts("style", 1, seed=0)[0]
    rich = np.asarray(drawn(prompt), dtype=np.float32)
    faded = [Image.fromarray((w * rich + (1 - w) * 242).astype(np.uint8)) for w in (0, 0.3, 0.6, 1)]
    scores = [JUDGES["style"](picture, prompt) for picture in faded]
    assert scores == sorted(scores) and scores[0] == 0 and 0.1 < scores[1] < 0.9 * scores[3]


def scene(paper: tuple[int, int, int], size: int) -> Image.Image:
    """A red square of so many pixels in the middle."""
    picture = np.full((64, 64, 3), paper, dtype=np.uint8)
    edge = 32 - size // 2
    picture[edge : edge + size, edge : edge + size] = (218, 40, 40)
    return Image.fromarray(picture)


@pytest.mark.parametrize(
    ("task", "pictures"),
    [
        ("warm", [scene((180, 200, 220), 20), scene((220, 220, 220), 20), scene((250, 200, 130), 20)]),
        ("dark", [scene((240, 240, 240), 20), scene((150, 160, 150), 20), scene((60, 70, 60), 20)]),
        ("large", [scene((240, 240, 240), size) for size in (0, 20, 40)]),
    ],
)
def test_more_judges_grow_with_their_looks(task, pictures):
    scores = [JUDGES[task](picture, None) for picture in pictures]
    assert 0 <= scores[0] < scores[1] - 0.1 < scores[2] - 0.3 <= 0.7


def test_large_is_the_share_of_the_picture_that_is_covered():
    assert JUDGES["large"](scene((240, 240, 240), 40), None) == pytest.approx(40**2 / 64**2 / 0.6)
