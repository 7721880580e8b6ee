"""The toy world: prompts and the 64 x 64 pictures that belong to them, all drawn by rule and from seeds.

Three tasks mirror those of the DiffusionOPD paper (GenEval, OCR, aesthetics), the fourth is editing, as in DanceOPD:

- `compose`: coloured shapes in GenEval's six kinds (one object, two, counting, colours, position, attribute binding);
- `text`: the quoted string of one to three letters;
- `style`: shapes in a mood ("at dusk"), wanted in a rich look: two-tone sky, shading, shadows, dark corners;
- `edit`: a source picture and an instruction ("make the circle blue"), wanted with that change and no other.

Three more, `MORE_TASKS`, are for merging more teachers than the paper does: coloured shapes in other words ("the red
circle", "a sign of a red circle", "one red circle"), wanted on warm paper, on dark paper, or large. Pretraining has
seen neither their words nor their looks, so there is no picture to draw for them; the judges say what is wanted.

Things stand in the order of the words, from the left, where the words do not say otherwise: what chance would decide,
six steps of a small model cannot. `draw` makes the picture that a prompt deserves, `draw_badly` one that its task does
not want: other things than the caption says, another string, a plain look, another change. Pretraining sees both beside
the same captions, so the base model knows every skill and uses none of them reliably, as a real base model does.

This module knows nothing of models and of judges.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

Task = Literal["compose", "text", "style", "edit", "warm", "dark", "large"]
TASKS: tuple[Task, ...] = ("compose", "text", "style", "edit")
MORE_TASKS: tuple[Task, ...] = ("warm", "dark", "large")
SIZE = 64

COLOURS = {
    "red": (218, 40, 40),
    "green": (40, 168, 60),
    "blue": (45, 85, 225),
    "yellow": (238, 210, 45),
}
SHAPES = ("circle", "square", "triangle", "cross")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three", 4: "four"}
MOODS = {  # the two tones of the sky, top and bottom
    "dawn": ((255, 150, 170), (110, 170, 235)),
    "dusk": ((95, 40, 150), (255, 140, 60)),
    "night": ((15, 20, 80), (20, 130, 140)),
    "noon": ((40, 110, 200), (120, 200, 70)),
}
PAPERS = ((242, 242, 242), (228, 233, 243), (246, 238, 226))
INKS = ((25, 25, 35), (30, 30, 95), (80, 25, 25))

# 5 x 7 bitmaps. Every letter fills its box and has ink in every column, so that it can be cut out and read.
LETTERS = {
    "A": (".###.", "#...#", "#...#", "#####", "#...#", "#...#", "#...#"),
    "C": (".####", "#....", "#....", "#....", "#....", "#....", ".####"),
    "E": ("#####", "#....", "#....", "####.", "#....", "#....", "#####"),
    "H": ("#...#", "#...#", "#...#", "#####", "#...#", "#...#", "#...#"),
    "L": ("#....", "#....", "#....", "#....", "#....", "#....", "#####"),
    "O": (".###.", "#...#", "#...#", "#...#", "#...#", "#...#", ".###."),
    "T": ("#####", "..#..", "..#..", "..#..", "..#..", "..#..", "..#.."),
    "X": ("#...#", "#...#", ".#.#.", "..#..", ".#.#.", "#...#", "#...#"),
}
DOT = 3  # pixels a bitmap dot: letters are 15 x 21 pixels
GAP = 3  # pixels between letters

# Every word a prompt can hold; the tokenizers are made from it.
WORDS = (
    *"a an and at one of picture saying sign text the".split(),
    *(*NUMBERS.values(), *COLOURS, *MOODS, *SHAPES),
    *(f"{s}es" if s == "cross" else f"{s}s" for s in SHAPES),
    *"left right above below".split(),
    *"make turn into remove".split(),
)


@dataclass(frozen=True)
class Thing:
    """A shape in a colour; None is free."""

    shape: str | None = None
    colour: str | None = None

    @property
    def words(self) -> str:
        return " ".join(word for word in (self.colour, self.shape) if word)


def _one(words: str) -> str:
    return f"{'an' if words[0] == 'o' else 'a'} {words}"


@dataclass(frozen=True)
class Prompt:
    """A caption and what it asks for, in a form that `draw` and the judges read. An instruction names one thing, and
    what it wants of it: `becomes` another shape or colour, or, where that is None, is gone."""

    text: str
    task: Task
    kind: str
    things: tuple[Thing, ...] = ()
    relation: str | None = None
    string: str | None = None
    mood: str | None = None
    becomes: Thing | None = None


@dataclass(frozen=True)
class Scene:
    """Things in their places: centres and radius in pixels, paper as RGB."""

    things: tuple[Thing, ...]
    centres: tuple[tuple[int, int], ...]
    radius: float
    paper: tuple[int, int, int]


def _compose_prompts() -> list[Prompt]:
    def add(kind: str, text: str, *things: Thing, relation: str | None = None) -> None:
        prompts.append(Prompt(text, "compose", kind, things, relation))

    prompts: list[Prompt] = []
    pairs = list(permutations(SHAPES, 2))
    for shape in SHAPES:
        for form in ("a {}", "one {}", "a picture of a {}", "a picture of one {}"):
            add("one object", form.format(shape), Thing(shape))
    for one, other in pairs:
        for form in ("a {} and a {}", "a picture of a {} and a {}"):
            add("two objects", form.format(one, other), Thing(one), Thing(other))
    for (n, number), shape, colour in product(NUMBERS.items(), SHAPES, COLOURS):
        plural = shape + ("es" if shape == "cross" else "s")
        add("counting", f"{number} {colour} {plural}", *(Thing(shape, colour),) * n)
    for shape, colour in product(SHAPES, COLOURS):
        thing = Thing(shape, colour)
        for form in ("{}", "a picture of {}"):
            add("colours", form.format(_one(thing.words)), thing)
    for (one, other), relation in product(pairs, RELATIONS):
        for form in ("a {} {} a {}", "a picture of a {} {} a {}"):
            add("position", form.format(one, relation, other), Thing(one), Thing(other), relation=relation)
    for (one, other), (c1, c2) in product(pairs, permutations(COLOURS, 2)):
        things = (Thing(one, c1), Thing(other, c2))
        add("attribute binding", " and ".join(_one(t.words) for t in things), *things)
    return prompts


def _text_prompts() -> list[Prompt]:
    return [
        Prompt(form.format("".join(string)), "text", f"{length} letters", string="".join(string))
        for length in (1, 2, 3)
        for string in product(LETTERS, repeat=length)
        for form in ('the text "{}"', 'a sign saying "{}"')
    ]


def _style_prompts() -> list[Prompt]:
    prompts: list[Prompt] = []
    for mood, shape, colour in product(MOODS, SHAPES, COLOURS):
        thing = Thing(shape, colour)
        prompts.append(Prompt(f"{_one(thing.words)} at {mood}", "style", "one thing", (thing,), mood=mood))
    for mood, (one, other), (c1, c2) in product(MOODS, permutations(SHAPES, 2), permutations(COLOURS, 2)):
        things = (Thing(one, c1), Thing(other, c2))
        text = " and ".join(_one(t.words) for t in things) + f" at {mood}"
        prompts.append(Prompt(text, "style", "two things", things, mood=mood))
    return prompts


def _edit_prompts() -> list[Prompt]:
    prompts: list[Prompt] = []
    for shape, colour in product(SHAPES, (None, *COLOURS)):
        thing = Thing(shape, colour)
        for new in COLOURS:
            if new != colour:
                text = f"make the {thing.words} {new}"
                prompts.append(Prompt(text, "edit", "colour", (thing,), becomes=Thing(colour=new)))
        for new in SHAPES:
            if new != shape:
                text = f"turn the {thing.words} into {_one(new)}"
                prompts.append(Prompt(text, "edit", "shape", (thing,), becomes=Thing(new)))
        prompts.append(Prompt(f"remove the {thing.words}", "edit", "removal", (thing,)))
    return prompts


def _look_prompts(task: Task, form: str, more: str) -> list[Prompt]:
    prompts: list[Prompt] = []
    things = [Thing(shape, colour) for shape, colour in product(SHAPES, COLOURS)]
    prompts += [Prompt(form.format(thing.words), task, "one thing", (thing,)) for thing in things]
    for pair in product(things, things):
        if pair[0].shape != pair[1].shape and pair[0].colour != pair[1].colour:
            text = " and ".join((form.format(pair[0].words), more.format(pair[1].words)))
            prompts.append(Prompt(text, task, "two things", pair))
    return prompts


_ALL: dict[Task, list[Prompt]] = {
    "compose": _compose_prompts(),
    "text": _text_prompts(),
    "style": _style_prompts(),
    "edit": _edit_prompts(),
    "warm": _look_prompts("warm", "the {}", "the {}"),
    "dark": _look_prompts("dark", "a sign of a {}", "a {}"),
    "large": _look_prompts("large", "one {}", "one {}"),
}


def _split(heldout: bool) -> dict[Task, dict[str, list[Prompt]]]:
    """One side of the fixed split, task -> kind -> prompts: a quarter of every kind is held out, strings as a whole."""
    split: dict[Task, dict[str, list[Prompt]]] = {}
    for task, prompts in _ALL.items():
        split[task] = {}
        for kind in dict.fromkeys(p.kind for p in prompts):
            members = [p for p in prompts if p.kind == kind]
            keys = list(dict.fromkeys(p.string or p.text for p in members))
            order = np.random.default_rng(0).permutation(len(keys))
            chosen = {keys[i] for i in order[: len(keys) // 4]}
            split[task][kind] = [p for p in members if ((p.string or p.text) in chosen) == heldout]
    return split


_TRAINING, _HELDOUT = _split(heldout=False), _split(heldout=True)


def prompts_of(task: Task, heldout: bool = False) -> list[Prompt]:
    """All training prompts of a task, or all held-out ones."""
    return [p for prompts in (_HELDOUT if heldout else _TRAINING)[task].values() for p in prompts]


def sample_prompts(task: Task, n: int, seed: int, heldout: bool = False) -> list[Prompt]:
    """`n` prompts whose kinds take turns, drawn with replacement."""
    rng = np.random.default_rng(seed)
    kinds = list((_HELDOUT if heldout else _TRAINING)[task].values())
    return [kinds[i % len(kinds)][rng.integers(len(kinds[i % len(kinds)]))] for i in range(n)]


# How much oftener than the others of its task pretraining sees a kind that is hard to learn
HARD = {"position": 3.0, "attribute binding": 2.0, "counting": 2.0, "colour": 2.0, "shape": 1.5}
_OPPOSITE = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))


def reworded(prompt: Prompt) -> Prompt:
    """The same wish in an order of words that no prompt of the world has (of `TASKS`)."""
    if prompt.task == "text":
        return replace(prompt, text=f'a picture of the text "{prompt.string}"')
    if prompt.task == "edit":
        (named,), new = prompt.things, prompt.becomes
        wish = f"turn the {named.words} {new.colour}" if new and new.colour else f"remove the one {named.words}"
        return replace(prompt, text=f"make the {named.words} {_one(new.shape)}" if new and new.shape else wish)
    if prompt.kind == "counting":
        return replace(prompt, text=f"one picture of {prompt.text}")
    things = f" {_OPPOSITE.get(prompt.relation, 'and')} ".join(_one(thing.words) for thing in prompt.things[::-1])
    return replace(prompt, text=f"at {prompt.mood} {things}" if prompt.mood else f"one picture of {things}")


def any_prompt(task: Task, rng: np.random.Generator) -> Prompt:
    """A prompt from both sides of the split, for pretraining, which has seen the whole world (badly captioned)."""
    heldout = rng.random() < 0.25
    kinds = (_HELDOUT if heldout else _TRAINING)[task]
    weights = np.array([HARD.get(kind, 1.0) for kind in kinds])
    kind = kinds[rng.choice(list(kinds), p=weights / weights.sum())]
    return kind[rng.integers(len(kind))]


def _pick(rng: np.random.Generator, choices: Iterable[str]) -> str:
    return list(choices)[rng.integers(len(choices))]


def _place(relation: str | None, n: int) -> tuple[list[tuple[int, int]], float]:
    """Centres of `n` things in pixels, and the radius that fits them."""
    if n == 1:
        return [(32, 32)], 14
    if n == 2:
        centres = [(32, 16), (32, 48)] if relation in ("above", "below") else [(16, 32), (48, 32)]
        return centres[::-1] if relation in ("right of", "below") else centres, 11
    return ([(32, 18)] if n == 3 else [(18, 18), (46, 18)]) + [(18, 46), (46, 46)], 10


def shape_mask(shape: str, x: float, y: float, r: float, scale: int = 4) -> np.ndarray:
    """How much of every pixel, in [0, 1], is covered by a shape of radius `r` around (x, y); `scale`: supersampling."""
    image = Image.new("L", (SIZE * scale, SIZE * scale))
    pen = ImageDraw.Draw(image)
    x, y, r = x * scale, y * scale, r * scale
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
    elif shape == "square":
        pen.rectangle((x - r, y - r, x + r, y + r), fill=255)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=255)
    else:
        arm = 0.36 * r
        pen.rectangle((x - arm, y - r, x + arm, y + r), fill=255)
        pen.rectangle((x - r, y - arm, x + r, y + arm), fill=255)
    return np.asarray(image.reduce(scale), dtype=np.float32) / 255


def _paint(scene: Scene, mood: str | None = None, richness: float = 0.0) -> Image.Image:
    """Shapes on paper; `richness` fades from the plain look (0) to the look that the style task wants (1)."""
    picture = np.broadcast_to(np.array(scene.paper, dtype=np.float32), (SIZE, SIZE, 3)).copy()
    rows, columns = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) / (SIZE - 1)
    if richness:
        top, bottom = (np.array(tone, dtype=np.float32) for tone in MOODS[mood])
        sky = top + (bottom - top) * rows[..., None]
        picture += richness * (sky - picture)
    r = scene.radius
    for thing, (x, y) in zip(scene.things, scene.centres, strict=True):
        colour = np.array(COLOURS[thing.colour], dtype=np.float32)
        mask = shape_mask(thing.shape, x, y, r)[..., None]
        if richness:
            shadow = shape_mask(thing.shape, x + 2.5, y + 3, r)[..., None]
            picture *= 1 - 0.5 * richness * shadow
            light = ((columns * (SIZE - 1) - x) + (rows * (SIZE - 1) - y)) / (2 * r)  # -1 upper left, 1 lower right
            colour = colour * (1 - 0.35 * richness * light[..., None])
        picture += mask * (colour - picture)
    if richness:
        distance = (2 * rows - 1) ** 2 + (2 * columns - 1) ** 2
        picture *= 1 - 0.42 * richness * distance[..., None]
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def _arrange(things: Sequence[Thing], relation: str | None, rng: np.random.Generator) -> Scene:
    paper = PAPERS[rng.integers(len(PAPERS))]
    centres, radius = _place(relation, len(things))
    return Scene(tuple(things), tuple(centres), radius, paper)


def letter_mask(letter: str) -> np.ndarray:
    """The 21 x 15 pixels of a letter as booleans."""
    dots = np.array([[dot == "#" for dot in row] for row in LETTERS[letter]])
    return dots.repeat(DOT, 0).repeat(DOT, 1)


def _draw_string(string: str, rng: np.random.Generator) -> Image.Image:
    picture = np.empty((SIZE, SIZE, 3), dtype=np.uint8)
    picture[:] = PAPERS[rng.integers(len(PAPERS))]
    width = len(string) * (5 * DOT + GAP) - GAP
    left, top = (SIZE - width) // 2, 21
    ink = INKS[rng.integers(len(INKS))]
    for letter in string:
        picture[top : top + 7 * DOT, left : left + 5 * DOT][letter_mask(letter)] = ink
        left += 5 * DOT + GAP
    return Image.fromarray(picture)


def _settle(things: tuple[Thing, ...], rng: np.random.Generator) -> list[Thing]:
    """Fill in what the prompt leaves free."""
    return [Thing(t.shape or _pick(rng, SHAPES), t.colour or _pick(rng, COLOURS)) for t in things]


def _other_things(prompt: Prompt, rng: np.random.Generator) -> list[Thing]:
    """Things that have nothing or little to do with the caption."""
    if prompt.kind == "counting":
        thing = prompt.things[0] if rng.random() < 0.4 else Thing(_pick(rng, SHAPES), _pick(rng, COLOURS))
        return [thing] * int(rng.integers(1, 5))
    n = len(prompt.things) if rng.random() < 0.6 else int(rng.integers(1, 4))
    return [Thing(_pick(rng, SHAPES), _pick(rng, COLOURS)) for _ in range(n)]


def source_scene(prompt: Prompt, rng: np.random.Generator) -> Scene:
    """A scene for an instruction: the thing that it names, and mostly another one of another shape."""
    (named,) = prompt.things
    # What becomes blue is not blue yet
    unlike = [c for c in COLOURS if prompt.becomes is None or c != prompt.becomes.colour]
    things = [Thing(named.shape, named.colour or _pick(rng, unlike))]
    if rng.random() < 0.75:
        things.append(Thing(_pick(rng, [s for s in SHAPES if s != named.shape]), _pick(rng, COLOURS)))
    return _arrange(things, _pick(rng, RELATIONS), rng)


def changed(scene: Scene, prompt: Prompt) -> Scene:
    """The scene after the change that an instruction asks for; its thing is the first one."""
    if prompt.becomes is None:
        return replace(scene, things=scene.things[1:], centres=scene.centres[1:])
    thing = Thing(prompt.becomes.shape or scene.things[0].shape, prompt.becomes.colour or scene.things[0].colour)
    return replace(scene, things=(thing, *scene.things[1:]))


def _changed_badly(scene: Scene, prompt: Prompt, rng: np.random.Generator) -> Scene:
    """No change, any other change of any thing, or another scene."""
    chance = rng.random()
    if chance < 0.4:
        return scene
    if chance < 0.6:
        return _arrange(_other_things(prompt, rng), _pick(rng, RELATIONS), rng)
    things, which = list(scene.things), int(rng.integers(len(scene.things)))
    things[which] = Thing(_pick(rng, SHAPES), _pick(rng, COLOURS))
    return replace(scene, things=tuple(things))


def draw_edit(prompt: Prompt, rng: np.random.Generator, well: bool = True) -> tuple[Image.Image, Image.Image]:
    """A source picture, and what becomes of it: what the instruction asks for, or something that it does not."""
    scene = source_scene(prompt, rng)
    after = changed(scene, prompt) if well else _changed_badly(scene, prompt, rng)
    return _paint(scene), _paint(after)


def edits(prompts: Sequence[Prompt], seed: int) -> list[tuple[Image.Image, Image.Image]]:
    """Source and wanted picture of each instruction; the i-th pair depends on `seed` and i only."""
    return [draw_edit(prompt, np.random.default_rng((seed, i))) for i, prompt in enumerate(prompts)]


def sources(prompts: Sequence[Prompt], seed: int) -> list[Image.Image] | None:
    """The pictures that instructions are about, those of `edits`; None for prompts of another task."""
    return [before for before, _ in edits(prompts, seed)] if prompts[0].task == "edit" else None


def draw(prompt: Prompt, rng: np.random.Generator) -> Image.Image:
    """The picture that the prompt's own task wants (of `TASKS`); what the prompt leaves open, chance decides."""
    if prompt.task == "text":
        return _draw_string(prompt.string, rng)
    if prompt.task == "edit":
        return draw_edit(prompt, rng)[1]
    richness = rng.uniform(0.9, 1.0) if prompt.task == "style" else 0.0
    return _paint(_arrange(_settle(prompt.things, rng), prompt.relation, rng), prompt.mood, richness)


def draw_badly(prompt: Prompt, rng: np.random.Generator) -> Image.Image:
    """A picture that pretraining finds beside this caption and that its task does not want."""
    if prompt.task == "text":
        return _draw_string("".join(rng.choice(list(LETTERS), rng.integers(1, 4))), rng)
    if prompt.task == "edit":
        return draw_edit(prompt, rng, well=False)[1]
    if prompt.task == "compose":
        return _paint(_arrange(_other_things(prompt, rng), _pick(rng, RELATIONS), rng))
    richness = rng.uniform(0.0, 0.5) if rng.random() < 0.3 else 0.0
    return _paint(_arrange(prompt.things, prompt.relation, rng), prompt.mood, richness)
