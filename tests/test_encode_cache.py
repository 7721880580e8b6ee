"""The cache of encoded prompts: what it keeps apart, and that every party gets what the pipeline itself encodes."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusion3Pipeline
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModelWithProjection

from diffusion_opd.encode_cache import EncodeCache
from diffusion_opd.policy import Policy
from tests.own_runs import (
    INPUTS,
    PROMPTS,
    STEPS,
    along,
    asked,
    assert_same,
    built,
    counted,
    encoders_of,
    euler,
    families,
    generators,
    on_euler,
    own_run,
    reference,
    run,
    sharing,
    walked,
)
from tests.tiny_pipelines import BUILDERS, CALL, clip

SD3_ENCODE = {
    "prompt": PROMPTS,
    "prompt_2": PROMPTS,
    "prompt_3": PROMPTS,
    "do_classifier_free_guidance": True,
    "max_sequence_length": 32,
}


@families
@torch.no_grad()
def test_prompts_are_encoded_once_for_all(family: str):
    """Student and teacher of one guidance, asked at every state, cost the encoder calls of a single run; a second batch
    costs the same again after `clear`, and nothing without."""
    with counted(*encoders_of(built(family))) as calls:
        run(built(family), **CALL[family])
        once = len(calls)
    assert once > 0

    cache = EncodeCache()
    student, teacher = (Policy(pipe, STEPS, CALL[family], cache) for pipe in (built(family), sharing(family, seed=1)))

    def batch() -> int:
        with counted(*encoders_of(built(family))) as calls:
            with student.walk(INPUTS, generators(), on_euler) as walk, teacher.follow(walk) as follow:
                for visit in walk:
                    follow(visit)
            asked(student, visit)
        return len(calls)

    assert batch() == once
    assert batch() == 0
    cache.clear()
    assert batch() == once


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": ["a red fox", "two blue bird"]},
        {"prompt_3": ["a red fox", ""]},
        {"negative_prompt": ["blurry", "blurry"]},
        {"max_sequence_length": 16},
        {"do_classifier_free_guidance": False},
        {"num_images_per_prompt": 2},
        {"clip_skip": 1},
        {"device": torch.device("cpu")},
    ],
    ids=lambda change: next(iter(change)),
)
@torch.no_grad()
def test_cache_keys_on_every_argument(change: dict[str, Any]):
    pipe, cache = built("sd3"), EncodeCache()
    for arguments in (SD3_ENCODE, {**SD3_ENCODE, **change}, SD3_ENCODE):
        expected, found = pipe.encode_prompt(**arguments), cache.encode(pipe, "encoders", **arguments)
        assert len(found) == len(expected)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert cache.num_encodings == 2


@torch.no_grad()
def test_cache_knows_an_argument_however_it_is_given():
    pipe, cache = built("sd3"), EncodeCache()
    cache.encode(pipe, "encoders", PROMPTS, PROMPTS, PROMPTS, max_sequence_length=32)
    cache.encode(pipe, "encoders", PROMPTS, PROMPTS, prompt_3=PROMPTS, max_sequence_length=32, negative_prompt=None)
    cache.encode(pipe, "encoders", list(PROMPTS), PROMPTS, PROMPTS, None, max_sequence_length=32)
    assert cache.num_encodings == 1
    cache.encode(pipe, "other encoders", PROMPTS, PROMPTS, PROMPTS, max_sequence_length=32)
    assert cache.num_encodings == 2


class Showing(StableDiffusion3Pipeline):
    """Encodes whatever it is shown."""

    def encode_prompt(self, shown: Any) -> Tensor:
        if isinstance(shown, (list, tuple)):
            return sum(self.encode_prompt(item) for item in shown)
        return (shown if isinstance(shown, Tensor) else torch.tensor(np.array(shown))).double().sum()


def picture(value: int) -> Image.Image:
    return Image.new("RGB", (4, 2), (value, 0, 0))


@pytest.mark.parametrize(
    ("value", "equal", "others"),
    [
        (torch.ones(2, 3), torch.ones(2, 3), [torch.ones(3, 2), torch.ones(2, 3).double(), torch.zeros(2, 3)]),
        (torch.arange(6.0).view(2, 3).T, torch.tensor([[0.0, 3], [1, 4], [2, 5]]), [torch.arange(6.0).view(3, 2)]),
        (torch.tensor(1.5), torch.tensor(1.5), [torch.tensor(2.5)]),
        (torch.ones(2).bfloat16(), torch.ones(2).bfloat16(), [torch.ones(2)]),
        (np.ones(3), np.ones(3), [np.ones(4), np.ones(3, np.float32), np.zeros(3)]),
        (picture(1), picture(1), [picture(2), picture(1).rotate(90, expand=True)]),
        ([1, 2], [1, 2], [[2, 1], (1, 2)]),
        (1, 1, [1.0, True]),
    ],
    ids=["tensor", "transposed", "scalar", "bfloat16", "array", "picture", "list", "number"],
)
def test_cache_compares_by_content(value: Any, equal: Any, others: list[Any]):
    pipe, cache = Showing(**built("sd3").components), EncodeCache()

    def encodings(shown: Any) -> int:
        before = cache.num_encodings
        for given in (shown, [shown]):  # nested too
            assert torch.equal(cache.encode(pipe, (), given), pipe.encode_prompt(given))
        return cache.num_encodings - before

    assert encodings(value) == 2
    assert encodings(equal) == 0
    for other in others:
        assert encodings(other) == 2
    assert encodings(equal) == 0


def test_cache_sees_a_tensor_change():
    pipe, cache = Showing(**built("sd3").components), EncodeCache()
    shown = torch.ones(3)
    assert cache.encode(pipe, (), shown) == 3
    shown[0] = 5
    assert cache.encode(pipe, (), shown) == 7


def test_cache_does_not_confuse_objects_that_come_and_go():
    """An object without content to compare is itself alone, and a later one in its place in cachery is another."""

    class Box:
        __hash__ = None

        def __init__(self, value: int):
            self.value = value

        def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
            return np.array(self.value)

    pipe, cache = Showing(**built("sd3").components), EncodeCache()
    for value in range(50):
        assert cache.encode(pipe, (), Box(value)) == value


def test_cache_has_no_gradient():
    pipe = BUILDERS["sd3"](0)
    for encoder in encoders_of(pipe):
        encoder.requires_grad_(True)
    assert pipe.encode_prompt(**SD3_ENCODE)[0].requires_grad
    assert not any(part.requires_grad for part in EncodeCache().encode(pipe, (), **SD3_ENCODE))


@torch.no_grad()
def test_cache_encodes_in_the_encoders_own_precision():
    """Whoever asks first: a party in mixed precision leaves nothing coarser behind for one without."""
    cache, expected = EncodeCache(), built("sd3").encode_prompt(**SD3_ENCODE)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(built("sd3").encode_prompt(**SD3_ENCODE)[0].float(), expected[0])
        first = cache.encode(built("sd3"), (), **SD3_ENCODE)
    for found in (first, cache.encode(built("sd3"), (), **SD3_ENCODE)):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@torch.no_grad()
def test_cache_hands_out_fresh_lists():
    """Z-Image extends the list of embeddings that it gets by those of the negative prompts."""
    cache = EncodeCache()

    def encode() -> list[Tensor]:
        return cache.encode(built("zimage"), (), prompt=list(PROMPTS), max_sequence_length=64)[0]

    first, second = encode(), encode()
    assert cache.num_encodings == 1 and isinstance(first, list)
    first.clear()
    assert len(second) == len(encode()) == len(PROMPTS)

    policy = Policy(built("zimage"), STEPS, CALL["zimage"], cache)
    for _ in range(2):
        assert_same(walked(policy)[0], own_run("zimage")[0])


@torch.no_grad()
def test_arguments_of_the_user_are_not_edited():
    """Z-Image writes its chat template into the list of negative prompts: a second call would write it twice."""
    negative = ["blurry", "a person"]
    seen, _ = run(reference("zimage"), euler, **CALL["zimage"], negative_prompt=list(negative))
    policy = Policy(built("zimage"), STEPS, {**CALL["zimage"], "negative_prompt": negative})
    for _ in range(2):
        assert_same(walked(policy)[0], seen)
        policy.cache.clear()
    assert negative == ["blurry", "a person"]


@torch.no_grad()
def test_other_encoders_are_not_shared():
    """A teacher whose first text encoder is another than the student's reads the prompt with its own."""
    text_encoder, tokenizer = clip(CLIPTextModelWithProjection, seed=11)
    other = sharing("sd3", seed=1, text_encoder=text_encoder, tokenizer=tokenizer)
    cache = EncodeCache()
    student, teacher = (Policy(pipe, STEPS, CALL["sd3"], cache) for pipe in (built("sd3"), other))
    visit = walked(student)[0][0]
    expected = run(other, along([visit.steps[0].sample]), **CALL["sd3"])[0][0]
    assert torch.equal(expected.sample, visit.steps[0].sample)
    assert torch.equal(*asked(teacher, visit), expected.prediction)
    without = Policy(sharing("sd3", seed=1), STEPS, CALL["sd3"], cache)
    assert not torch.equal(*asked(without, visit), expected.prediction)


@torch.no_grad()
def test_settings_of_a_pipeline_are_not_shared():
    """SDXL reads in its own config whether an absent negative prompt is encoded or zero."""
    zeros = built("sdxl")
    encoded = sharing("sdxl", seed=0, force_zeros_for_empty_prompt=False)
    encoded.scheduler = DDIMScheduler.from_config(encoded.scheduler.config)
    cache = EncodeCache()
    student, teacher = (Policy(pipe, STEPS, CALL["sdxl"], cache) for pipe in (zeros, encoded))
    visit = walked(student)[0][0]
    expected = run(encoded, along([visit.steps[0].sample]), **CALL["sdxl"])[0][0]
    assert torch.equal(*asked(teacher, visit), expected.prediction)
    assert not torch.equal(expected.prediction, visit.steps[0].prediction)
