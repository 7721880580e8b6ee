"""What the weights in RapidOCR's wheel read in pictures, against the text that was asked for; and the size as JPEG."""

import io
import itertools
import random

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from diffusion_opd.rewards import Rewards, load_reward
from diffusion_opd.rewards.ocr import OCR, closeness, edit_distance, quoted

PROMPT = 'a sign that says "Hello World"'


def drawn(*lines: str) -> Image.Image:
    picture = Image.new("RGB", (256, 192), "white")
    for index, line in enumerate(lines):
        ImageDraw.Draw(picture).text((12, 20 + 56 * index), line, fill="black", font=ImageFont.load_default(36))
    return picture


@pytest.fixture(scope="module")
def ocr() -> OCR:
    return OCR()


def test_drawn_text_is_read(ocr, capfd):
    pictures = [drawn("Hello World"), drawn("Hello", "World"), drawn("Hello Warld"), drawn("SALE"), drawn()]
    right, on_two_lines, one_off, another, blank = ocr([PROMPT] * 5, pictures)
    assert right == on_two_lines == 1
    assert one_off == pytest.approx(1 - 1 / 10)  # of the ten letters of "helloworld"
    assert another == pytest.approx(1 - 9 / 10)  # its l is in its place
    assert blank == 0
    assert ocr([PROMPT], [drawn("Oh", "HELLO world", "OK")]) == [1]  # text around it and its case do not count
    out = capfd.readouterr()
    assert out.out == out.err == ""


def test_the_text_is_a_column_or_stands_in_quotes(ocr):
    pictures = [drawn("Hello World")] * 4
    prompts = [PROMPT, "a sign", 'a "SALE" sign', "“Hello World” in chalk"]
    assert ocr(prompts, pictures) == [1, None, 0, 1]
    assert ocr(prompts, pictures, target=[None, "Hello World", "hello world", ""]) == [1, 1, 1, 1]
    assert OCR(column="text")(prompts[1:2], pictures[:1], text=["Hello World"]) == [1]
    examples = [{"prompt": "a sign", "target": "Hello World"}, {"prompt": "a sign", "target": None}]
    scores = Rewards(ocr)("a", examples, pictures[:2])
    assert scores[0].tolist() == [1] and scores[1].isnan().all()


def test_frames_of_a_video_count_alike():
    frames = [drawn("Hello World"), *[drawn()] * 8, drawn()]
    assert OCR(num_frames=2)([PROMPT], [frames]) == [0.5]


def test_it_has_a_name(ocr):
    assert isinstance(load_reward("ocr"), OCR) and Rewards(ocr).names("a") == ["ocr"]


@pytest.mark.parametrize(
    ("prompt", "text"),
    [('"a" and "b"', "a"), ("a sign", None), ('an inch is 1"', None), ('"" and "b"', " and "), ("“tea” “pot”", "tea")],
)
def test_the_first_quotes_count(prompt, text):
    assert quoted(prompt) == text


def test_closeness():
    assert closeness("", "ab") == 0
    assert closeness("a lot of other words", "xyz") == 0  # never below
    assert closeness("It reads: N E W S !", "news") == 1
    assert closeness("new", "news") == 0.75
    assert closeness("new", "  ") is None


def reached(text: str, steps: int, letters: str) -> set[str]:
    """All texts that so many insertions, deletions and replacements make of one."""
    texts = {text}
    for _ in range(steps):
        for one in list(texts):
            for i, letter in itertools.product(range(len(one) + 1), letters):
                texts |= {one[:i] + letter + one[i:], one[:i] + letter + one[i + 1 :], one[:i] + one[i + 1 :]}
    return texts


def test_the_edit_distance_is_the_least_number_of_edits():
    generator = random.Random(0)
    texts = ["".join(generator.choices("ab", k=generator.randrange(5))) for _ in range(12)]
    for a, b in itertools.product(texts, repeat=2):
        distance = edit_distance(a, b)
        assert b in reached(a, distance, "ab") and (distance == 0 or b not in reached(a, distance - 1, "ab"))


# JPEG


def test_plain_pictures_compress_best():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    plain = Image.new("RGB", (64, 64), "red")
    reward = load_reward("jpeg_compressibility")
    file = io.BytesIO()
    noise.save(file, format="JPEG", quality=95)
    assert reward([""] * 2, [noise, plain])[0] == -len(file.getvalue()) / 1000
    best, worst = reward([""] * 2, [plain, noise])
    assert worst < best < 0
    assert reward([""], [[plain, noise]]) == [pytest.approx((best + worst) / 2)]
    assert reward([""], [noise.convert("RGBA")]) == [worst]
    assert Rewards(reward).names("a") == ["jpeg_compressibility"]
