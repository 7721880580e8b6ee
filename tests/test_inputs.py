"""What a sample is made of: which columns reach a pipeline, how pictures are read, and what is refused."""

import copy
import cProfile
import datetime
import io
import json
import pstats
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset, List
from datasets import Image as ImageFeature
from diffusers import (
    Flux2KleinPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxKontextPipeline,
    LTXConditionPipeline,
    StableDiffusion3Pipeline,
    WanImageToVideoPipeline,
    WanVACEPipeline,
)
from PIL import Image, ImageOps
from safetensors.torch import load, save

from diffusion_opd import DiffusionOPDTrainer, Teacher
from diffusion_opd.data import Data, column_of, long_prompts
from diffusion_opd.inputs import as_arguments, content_key, packed, read_picture, sample_arguments, size_of, unpacked
from tests.editing_pipelines import EDITING, EDITING_CALL
from tests.streaming_pipelines import picture
from tests.tiny_pipelines import BUILDERS, clip_tokenizer, qwen_tokenizer, t5_tokenizer
from tests.training import config, lora

KONTEXT = EDITING["flux_kontext"](0)


@pytest.mark.parametrize(
    ("cls", "texts", "pictures"),
    [
        (StableDiffusion3Pipeline, 6, set()),
        (FluxKontextPipeline, 4, {"image"}),
        (FluxFillPipeline, 2, {"image", "mask_image"}),
        (FluxControlPipeline, 2, {"control_image"}),
        (Flux2KleinPipeline, 1, {"image"}),
        (WanImageToVideoPipeline, 2, {"image", "last_image"}),
        (WanVACEPipeline, 2, {"video", "mask", "reference_images"}),
        (LTXConditionPipeline, 2, {"image", "video"}),
    ],
)
def test_what_a_pipeline_takes_for_each_sample(cls, texts: int, pictures: set[str]):
    found = sample_arguments(cls)
    assert {name for name, is_text in found.items() if not is_text} == pictures
    assert sum(found.values()) == texts and found["prompt"]


# Pictures


def encoded(image: Image.Image, kind: str, **kwargs: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **kwargs)
    return file.getvalue()


def turned(kind: str) -> bytes:
    """As a phone saves one that is held upright: on its side, and how to turn it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(32).crop((0, 0, 32, 16)), kind, exif=exif)


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "1", "CMYK", "RGB"])
def test_pictures_come_in_rgb(mode: str, tmp_path: Path):
    image = picture(8).convert(mode)
    image.save(path := tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"))
    read = [read_picture(given) for given in (image, str(path), path, {"bytes": path.read_bytes(), "path": None})]
    assert all(one.mode == "RGB" and one.size == (8, 8) for one in read)
    if mode != "CMYK":  # a JPEG has lost some
        assert all(np.array_equal(np.asarray(one), np.asarray(image.convert("RGB"))) for one in read)


def test_masks_stay_grey():
    grey = picture(8).convert("L")
    assert np.array_equal(np.asarray(read_picture(grey, is_mask=True)), np.asarray(grey))
    assert read_picture(grey.convert("1"), is_mask=True).mode == "L"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pictures_are_upright(kind: str):
    given = {"bytes": turned(kind), "path": None}
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(given["bytes"]))).convert("RGB")
    read = read_picture(given)
    assert read.size == size_of(given) == upright.size == (16, 32)
    assert np.array_equal(np.asarray(read), np.asarray(upright))


def test_sizes_are_those_that_are_read(tmp_path: Path):
    picture(8).save(tmp_path / "a.png")
    assert size_of(str(tmp_path / "a.png")) == (8, 8)
    assert size_of([picture(8), picture(16)]) == ((8, 8), (16, 16))
    assert size_of(np.zeros((3, 4))) == (3, 4)
    assert [one.size for one in read_picture([picture(8), str(tmp_path / "a.png")])] == [(8, 8), (8, 8)]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("", "is missing"),
        ({"bytes": None, "path": None}, "is missing"),
        ([], "is an empty list"),
        ([picture(8), None], "is missing"),
        ("nowhere.png", "'nowhere.png' cannot be read"),
        ({"bytes": b"no picture", "path": None}, "cannot be read"),
    ],
)
def test_what_is_no_picture(value: Any, words: str):
    for ask in (size_of, read_picture):
        with pytest.raises(ValueError, match=f"^{words}"):
            ask(value)


def test_a_torn_picture_is_told_of_when_it_is_read(tmp_path: Path):
    (tmp_path / "torn.png").write_bytes(encoded(picture(64), "PNG")[:2000])
    assert size_of(str(tmp_path / "torn.png")) == (64, 64)
    with pytest.raises(ValueError, match=r"torn\.png' cannot be read"):
        read_picture(str(tmp_path / "torn.png"))


def test_arguments_of_one_sample_and_of_several():
    """A list is one value a sample; of a single sample a picture is itself, and so is its list of pictures."""
    a, b = picture(8, 1), picture(8, 2)
    cls = FluxKontextPipeline
    assert as_arguments(cls, {"prompt": ["x", "y"], "image": [a, b]}) == {"prompt": ["x", "y"], "image": [a, b]}
    assert as_arguments(cls, {"prompt": ["x"], "image": [a]}) == {"prompt": ["x"], "image": a}
    assert as_arguments(cls, {"prompt": ["x"], "image": [[a, b]]}) == {"prompt": ["x"], "image": [a, b]}
    assert as_arguments(cls, {"negative_prompt": ["x"]}) == {"negative_prompt": ["x"]}


def test_the_key_of_a_row_is_its_contents():
    """In another process, too, which salts the hashes of texts anew."""
    rows = [
        {"prompt": "a"},
        {"prompt": "a", "target": "a"},
        {"prompt": "a", "target": ["a"]},
        {"prompt": "a", "target": ["a", "a"]},
        {"prompt": "a", "target": {"a": "a"}},
        {"prompt": "a", "target": 1},
        {"prompt": "a", "target": "1"},
        {"prompt": "a", "target": np.ones(2)},
        {"prompt": "a", "target": np.ones(2, np.float32)},
        {"prompt": "a", "target": torch.ones(2, 1)},
        {"prompt": "a", "target": Image.new("RGB", (2, 3))},
        {"prompt": "a", "target": Image.new("RGB", (3, 2))},
        {"prompt": "a", "target": Image.new("L", (2, 3))},
        {"prompt": "a", "target": Image.new("RGB", (2, 3), "red")},
        {"prompt": "a", "target": datetime.date(2026, 1, 2)},
    ]
    keys = [content_key(row) for row in rows]
    assert len(set(keys)) == len(rows) and keys == [content_key(copy.deepcopy(row)) for row in rows]
    assert content_key({"target": "a", "nothing": None, "prompt": "a"}) == keys[1] == 851843771976445503
    assert content_key({"prompt": "a", "target": object()}) == content_key({"prompt": "a", "target": object()})


def test_inputs_are_kept_as_json_and_tensors():
    inputs = {
        "prompt": ["x", "y"],
        "image": [[picture(8, 1), picture(16, 2)], [picture(8, 3)]],
        "mask_image": [picture(8).convert("L"), None],
        "depth": [np.arange(3.0), torch.arange(4)],
    }
    tensors: dict[str, torch.Tensor] = {}
    kept = json.dumps(packed(inputs, "inputs", tensors))
    back = unpacked(json.loads(kept), load(save(tensors)))
    assert back["prompt"] == inputs["prompt"] and back["mask_image"][1] is None
    for ours, theirs in zip(
        [*back["image"][0], *back["image"][1], back["mask_image"][0], *back["depth"]],
        [*inputs["image"][0], *inputs["image"][1], inputs["mask_image"][0], *inputs["depth"]],
        strict=True,
    ):
        assert type(ours) is type(theirs) or ours.mode == theirs.mode
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))


# Columns

IMAGES = [picture(16, number) for number in range(4)]
WORDS = [f"number {number}" for number in range(4)]


def fitted(data: Any, asked: Any = None, evaluation: Any = None, call_kwargs: Any = (), others: Any = None) -> Data:
    PartialState()  # as a configuration does; what is logged asks for it
    data, tasks = (Dataset.from_dict(data), ["a"]) if "prompt" in data else (data, list(data))
    own = Data(data, evaluation, tasks, "teacher_id", asked)
    own.fit(KONTEXT, dict(call_kwargs), others)
    return own


def test_columns_are_read_by_their_names(caplog):
    data = fitted({"prompt": WORDS, "image": IMAGES, "negative_prompt": WORDS, "width": [8] * 4, "score": [1.0] * 4})
    assert set(data.columns) == {"prompt", "image", "negative_prompt"}
    assert set(data.names) == {"prompt", "image", "negative_prompt", "teacher_id"}
    assert "takes ['width'] once for all samples" in caplog.text and "score" not in caplog.text


def test_columns_that_are_asked_for():
    data = {"prompt": WORDS, "image": IMAGES, "negative_prompt": WORDS}
    assert set(fitted(data, ["image"]).columns) == {"prompt", "image"}
    assert set(fitted(data, []).columns) == {"prompt"}


def test_a_picture_in_a_column_of_another_name_is_told_of(caplog):
    fitted({"prompt": WORDS, "source": IMAGES})
    assert "['source'], which do not reach FluxKontextPipeline" in caplog.text
    assert "dataset.rename_column('source', 'image')" in caplog.text


def test_a_misspelt_column_of_paths_is_told_of(caplog):
    fitted({"prompt": WORDS, "images": ["a.png"] * 4})
    assert "['images'], which do not reach FluxKontextPipeline" in caplog.text


def test_sizes_of_rows_are_known_where_they_differ():
    assert fitted({"prompt": WORDS, "image": IMAGES}).sizes is None
    sizes = fitted({"prompt": WORDS[:2], "image": [picture(16), picture(8)]}).sizes
    assert sizes is not None and sizes[0] != sizes[1]


def test_lists_of_pictures():
    data = fitted({"prompt": WORDS[:2], "image": [[IMAGES[0], IMAGES[1]], [IMAGES[2]]]})
    assert isinstance(data.train.features["image"], List)
    assert [len(row["image"]) for row in data.read(list(data.train))] == [2, 1]
    assert data.sizes is not None


def by_task(**columns: Any) -> dict[str, Dataset]:
    return {"a": Dataset.from_dict({"prompt": WORDS}), "b": Dataset.from_dict({"prompt": WORDS, **columns})}


def with_hole() -> list[Any]:
    return [IMAGES[0], None, *IMAGES[2:]]


REFUSED: dict[str, tuple[Any, str]] = {
    "no argument": (
        lambda: fitted({"prompt": WORDS}, ["picture"]),
        "`input_columns` names 'picture', which FluxKontextPipeline does not take",
    ),
    "no column": (
        lambda: fitted({"prompt": WORDS}, ["image"]),
        "`input_columns` names 'image', and the data has only the columns ['prompt', 'teacher_id']",
    ),
    "two ways": (
        lambda: fitted({"prompt": WORDS, "image": IMAGES}, call_kwargs={"image": IMAGES[0]}),
        "['image'] are columns of the data and in `call_kwargs` too",
    ),
    "a hole": (
        lambda: fitted({"prompt": WORDS, "image": with_hole()}),
        "train_dataset: the `image` of row 1 is missing, and other rows of its task have one",
    ),
    "a hole at the start": (
        lambda: fitted({"prompt": WORDS, "image": [None, *IMAGES[1:]]}),
        "train_dataset: the `image` of row 0 is missing",
    ),
    "a hole in a task": (
        lambda: fitted(by_task(image=with_hole())),
        "train_dataset['b']: the `image` of row 1 is missing",
    ),
    "a text with holes": (
        lambda: fitted({"prompt": WORDS, "negative_prompt": ["x", "y", None, "z"]}),
        "train_dataset: the `negative_prompt` of row 2 is missing",
    ),
    "no file": (
        lambda: fitted({"prompt": WORDS, "image": ["nowhere.png"] * 4}),
        "train_dataset: the `image` of row 0 'nowhere.png' cannot be read",
    ),
    "no name": (
        lambda: fitted({"prompt": WORDS, "image": [""] * 4}),
        "train_dataset: the `image` of row 0 is missing.",
    ),
    "no picture": (
        lambda: fitted(by_task(image=[{"bytes": b"text", "path": None}] * 4)),
        "train_dataset['b']: the `image` of row 0 cannot be read",
    ),
    "no pictures in one list": (
        lambda: fitted({"prompt": WORDS[:2], "image": [[IMAGES[0]], []]}),
        "train_dataset: the `image` of row 1 is an empty list",
    ),
    "other columns for evaluation": (
        lambda: fitted({"prompt": WORDS, "image": IMAGES}, evaluation=Dataset.from_dict({"prompt": WORDS})),
        "eval_dataset: the rows of 'a' have the columns [] for the pipeline, and those of train_dataset ['image']",
    ),
    "further columns in a later evaluation": (
        lambda: fitted({"prompt": WORDS}).routed(Dataset.from_dict({"prompt": WORDS, "image": IMAGES})),
        "eval_dataset has the columns ['image'] for the pipeline",
    ),
    "a teacher's column": (
        lambda: fitted({"prompt": WORDS}, others={"t": {"prompt": "rich"}}),
        "teacher 't': `columns` names 'rich' for 'prompt', and the data has only the columns ['prompt', 'teacher_id']",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str):
    make, words = REFUSED[case]
    with pytest.raises(ValueError) as refusal:
        make()
    assert str(refusal.value).startswith(words.split(" ... ")[0]), refusal.value
    assert "\n" not in str(refusal.value)


def test_a_task_without_pictures_is_not_given_any():
    data = fitted(by_task(image=IMAGES))
    rows = data.read(list(data.train))
    calls = data.calls(rows, 8)
    assert sorted(map(tuple, calls)) == [(0, 1, 2, 3), (4, 5, 6, 7)]


def test_an_argument_that_a_teacher_does_not_take(tmp_path):
    data = Dataset.from_dict({"prompt": WORDS, "image": IMAGES})
    with pytest.raises(ValueError, match=r"teacher 't': `columns` names \['picture'\], which FluxKontextPipeline does"):
        DiffusionOPDTrainer(
            EDITING["flux_kontext"](0),
            Teacher(EDITING["flux_kontext"](1), id="t", columns={"picture": "image"}),
            config(tmp_path, "flux", call_kwargs=dict(EDITING_CALL["flux_kontext"])),
            data,
            peft_config=lora(),
        )


# Streams: told of when the row is read


TEXTS = {"words": "a fox runs in the snow ", "digits": "1 23 456,", "marks": "!?-#", "cjk": "狐雪山", "emoji": "🦊🎨"}


@pytest.mark.parametrize("tokenizer", [clip_tokenizer, t5_tokenizer, qwen_tokenizer])
@pytest.mark.parametrize("longest", TEXTS)
def test_the_prompt_of_most_tokens_is_found(longest: str, tokenizer):
    """Or one of hardly fewer, among those that have more characters, or more tokens a character."""
    count = tokenizer()
    order = random.Random(0)
    prompts = ["".join(order.choices(TEXTS["words"], k=order.randint(20, 60))) for _ in range(3000)]
    for text in TEXTS.values():
        prompts += ["".join(order.choices(text, k=order.randint(2, 10))) for _ in range(300)]
    prompts.append(TEXTS[longest] * 30)
    order.shuffle(prompts)
    lengths = [len(ids) for ids in count(prompts)["input_ids"]]
    dataset = Dataset.from_dict({"prompt": prompts})
    shuffled = Dataset.from_dict({"prompt": ["b", *prompts]}).shuffle(seed=0).filter(lambda row: row["prompt"] != "b")
    for data in (dataset, shuffled):
        column = column_of(data, "prompt")
        assert column.to_pylist() == list(data["prompt"])
        found = long_prompts(column)
        assert len(found) <= 64
        assert max(lengths[prompts.index(column[row].as_py())] for row in found) > 0.9 * max(lengths)


@pytest.mark.parametrize("form", ["dataset", "shuffled", "dict"])
def test_a_prompt_more_costs_next_to_nothing(form: str, tmp_path):
    """A `Dataset` that is read row by row costs some hundred calls for each."""

    def calls(count: int) -> int:
        data = Dataset.from_dict({"prompt": [f"prompt {index}" for index in range(count)]})
        data = {"dataset": data, "shuffled": data.shuffle(seed=0), "dict": {"a": data, "b": data.shuffle(seed=0)}}[form]
        ids = "ab" if form == "dict" else "a"
        parties = BUILDERS["sd3"](0), {key: BUILDERS["sd3"](1) for key in ids}
        with cProfile.Profile() as profile:
            DiffusionOPDTrainer(*parties, config(tmp_path), data, peft_config=lora()).get_train_dataloader()
        return pstats.Stats(profile).total_calls

    calls(10)  # what is only done once
    assert calls(2010) - calls(10) < 2000 * (20 if form == "dict" else 10)


def stream_of(*images: Any) -> IterableDataset:
    return IterableDataset.from_generator(
        lambda: ({"prompt": word, "image": image} for word, image in zip(WORDS, images, strict=False))
    )


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (["nowhere.png"] * 4, "the `image` of the row with the prompt 'number 0' 'nowhere.png' cannot be read"),
        ([""] * 4, "the `image` of the row with the prompt 'number 0' is missing"),
    ],
)
def test_a_stream_names_the_row_that_cannot_be_read(tmp_path, images: list[Any], words: str):
    with pytest.raises(ValueError, match=words):
        DiffusionOPDTrainer(
            EDITING["flux_kontext"](0),
            EDITING["flux_kontext"](1),
            config(tmp_path, "flux", call_kwargs=dict(EDITING_CALL["flux_kontext"])),
            stream_of(*images),
            peft_config=lora(),
        )


def test_a_file_that_is_torn_is_named_with_its_row(tmp_path):
    paths = []
    for number, image in enumerate(IMAGES):
        image.save(path := tmp_path / f"{number}.png")
        paths.append(str(path))
    data = fitted({"prompt": WORDS, "image": paths})
    content = Path(paths[2]).read_bytes()
    Path(paths[2]).write_bytes(content[: len(content) // 2])
    with pytest.raises(
        ValueError, match=r"the `image` of the row with the prompt 'number 2' '.*2\.png' cannot be read"
    ):
        data.read(list(data.train))


def test_decoding_is_left_until_a_row_is_read():
    data = fitted({"prompt": WORDS, "image": IMAGES})
    assert data.train.features["image"] == ImageFeature(decode=False)
