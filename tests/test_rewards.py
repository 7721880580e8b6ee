"""Reward functions as users write them: any form, sync or async, and a clear word where one goes wrong."""

import asyncio
import functools
import inspect
import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TrainerState

from diffusion_opd.rewards.functions import Rewards
from diffusion_opd.rewards.statistics import combine, nanstd

IMAGES = [Image.new("RGB", (4, 4), (shade, shade, shade)) for shade in (0, 51, 255)]
EXAMPLES = [{"prompt": f"prompt {i}", "task": "a", "target": f"target {i}"} for i in range(3)]


def brightness(prompts, images, **kwargs):
    return [image.getpixel((0, 0))[0] / 255 for image in images]


def length(prompts, **kwargs):
    return [len(prompt) for prompt in prompts]


def constant(value):
    def reward(images):
        return [value] * len(images)

    return reward


def scores(reward_funcs, task: str = "a", **kwargs) -> list[list[float]]:
    return Rewards(reward_funcs)(task, EXAMPLES, IMAGES, **kwargs).tolist()


# Forms


def test_a_function_a_list_and_a_dict_by_task():
    assert scores(brightness) == [[0.0], [pytest.approx(0.2)], [1.0]]
    assert scores([brightness, length]) == [[0.0, 8.0], [pytest.approx(0.2), 8.0], [1.0, 8.0]]
    by_task = {"a": length, "b": [constant(1.0), constant(2.0)]}
    assert scores(by_task, "a") == [[8.0]] * 3
    assert scores(by_task, "b") == [[1.0, 2.0]] * 3
    assert Rewards(by_task).tasks == ["a", "b"] and Rewards(length).tasks is None
    assert Rewards(by_task)("a", EXAMPLES, IMAGES).dtype == torch.float32


@pytest.mark.parametrize(
    ("funcs", "weights", "expected"),
    [
        (length, None, {"a": [1.0], "b": [1.0]}),
        (length, 0.5, {"a": [0.5]}),
        (length, [0.5], {"a": [0.5], "b": [0.5]}),
        ([brightness, length], [0.5, 2], {"a": [0.5, 2]}),
        ({"a": brightness, "b": [brightness, length]}, None, {"a": [1.0], "b": [1.0, 1.0]}),
        ({"a": brightness, "b": [brightness, length]}, {"a": 0.5, "b": [1, 2]}, {"a": [0.5], "b": [1, 2]}),
        ({"a": brightness, "b": [brightness, length]}, {"b": [1, 2]}, {"a": [1.0], "b": [1, 2]}),
    ],
)
def test_weights_have_the_form_of_the_functions(funcs, weights, expected):
    rewards = Rewards(funcs, weights)
    assert {task: rewards.weights(task) for task in expected} == expected


@pytest.mark.parametrize(
    ("funcs", "weights", "sentence"),
    [
        ([brightness, length], [1.0], r"^`reward_weights` holds 1 numbers for 2 reward functions; give one each\.$"),
        ({"a": [brightness, length]}, {"a": 2}, r"^`reward_weights` of task 'a' holds 1 numbers for 2 reward"),
        ({"a": brightness}, [1.0], r"^`reward_weights` must have the form of `reward_funcs`, a dict by task; got \[1"),
        (brightness, {"a": 1.0}, r"^`reward_weights` must have the form of `reward_funcs`, a list; got \{'a': 1\.0\}"),
        ({"a": brightness}, {"b": 1.0}, r"^`reward_weights` names \['b'\], but the tasks .* are \['a'\]\.$"),
        ([brightness], ["much"], r"^`reward_weights` must hold finite numbers, got \['much'\]\.$"),
        ([brightness], [math.nan], r"^`reward_weights` must hold finite numbers, got \[nan\]\.$"),
        ([brightness], "much", r"^`reward_weights` must hold finite numbers, got 'much'\.$"),
        ([], None, "^`reward_funcs` is empty"),
        ({}, None, "^`reward_funcs` is empty"),
        ({"a": []}, None, r"^`reward_funcs\['a'\]` is empty"),
    ],
)
def test_weights_and_functions_that_do_not_fit_are_refused(funcs, weights, sentence):
    with pytest.raises(ValueError, match=sentence):
        Rewards(funcs, weights)


@pytest.mark.parametrize(
    ("funcs", "sentence"),
    [
        ("pickscore", r"^`reward_funcs`: a reward function is called with .* got str: 'pickscore'\.$"),
        ([brightness, None], r"^`reward_funcs`: .* got NoneType: None\.$"),
        ({"a": {"b": brightness}}, r"^`reward_funcs\['a'\]`: .* got dict: "),
    ],
)
def test_what_cannot_be_called_is_refused(funcs, sentence):
    with pytest.raises(TypeError, match=sentence):
        Rewards(funcs)


# Sync and async


def meeting(count: int):
    """Async functions each of which waits for all of them to have begun, and so finish only at the same time."""
    arrived = []

    async def wait(images):
        arrived.append(None)
        async with asyncio.timeout(10):
            while len(arrived) < count:
                await asyncio.sleep(0)
        return [float(count)] * len(images)

    return [functools.partial(wait) for _ in range(count)]


def test_async_functions_run_at_the_same_time():
    assert scores(meeting(3)) == [[3.0] * 3] * 3


def test_sync_and_async_functions_mix_and_keep_their_order():
    async def later(images):
        await asyncio.sleep(0)
        return [5.0] * len(images)

    class Judge:
        async def __call__(self, images):
            return [6.0] * len(images)

    assert scores([constant(1.0), later, constant(2.0), Judge()]) == [[1.0, 5.0, 2.0, 6.0]] * 3


def test_a_running_loop_does_not_matter():
    """As in a notebook."""

    async def cell():
        return scores([*meeting(2), length])

    assert asyncio.run(cell()) == [[2.0, 2.0, 8.0]] * 3


# What comes back


@pytest.mark.parametrize(
    "result",
    [
        [1, None, 0.5],
        (1.0, math.nan, 0.5),
        np.array([1.0, np.nan, 0.5], dtype=np.float16),
        torch.tensor([1.0, math.nan, 0.5], dtype=torch.bfloat16),
        [np.float32(1), None, np.float64(0.5)],
        [True, None, torch.tensor(0.5)],
        np.array([1, None, 0.5], dtype=object),
    ],
    ids=lambda result: type(result).__name__,
)
def test_lists_arrays_and_tensors_come_back(result):
    (first, second, third) = (row[0] for row in scores(lambda images: result))
    assert (first, third) == (1.0, 0.5) and math.isnan(second)


@pytest.mark.parametrize(
    ("result", "sentence"),
    [
        ([1.0, 2.0], r"'judge' must return a list of 3 rewards, got 2 values\.$"),
        (np.ones((2, 3)), r"'judge' must return a list of 3 rewards, got 2 values\.$"),
        (1.0, r"'judge' must return a list of 3 rewards, got float: 1\.0\.$"),
        (torch.tensor(1.0), r"'judge' must return a list of 3 rewards, got Tensor: "),
        (None, r"'judge' must return a list of 3 rewards, got NoneType: None\.$"),
        ("abc", r"'judge' must return a list of 3 rewards, got str: 'abc'\.$"),
        ({"score": [1, 2, 3]}, r"'judge' must return a list of 3 rewards, got dict"),
        ([1.0, math.inf, 2.0], r"'judge' must return finite numbers, or `None` .* got inf\.$"),
        ([1.0, "good", 2.0], r"'judge' must return finite numbers, or `None` .* got 'good'\.$"),
        (np.ones((3, 1)), r"'judge' must return finite numbers, or `None` .* got \[1\.0\]\.$"),
    ],
)
@pytest.mark.parametrize("is_async", [False, True])
def test_another_result_is_refused_with_the_functions_name(result, sentence, is_async):
    def judge(images):
        return result

    async def later(images):
        return result

    later.__name__ = "judge"
    with pytest.raises(ValueError, match=f"^the reward function {sentence}"):
        scores([constant(0.0), later if is_async else judge])


@pytest.mark.parametrize(
    ("result", "weight"),
    [
        (1e38, 1.0),
        (-1e300, 1.0),
        pytest.param(10**400, 1.0, id="10**400"),
        (np.float32(1e16), 0.5),
        (1.0, 1e20),
        (2e14, -10),
    ],
)
def test_numbers_whose_std_overflows_are_refused(result, weight):
    """Silently, a group whose std is infinite would have no advantages."""
    assert not nanstd(torch.tensor([1e20, 0.0])).isfinite()
    rewards = Rewards([constant(0.0), lambda images: [None, result, 0.5]], [1.0, weight])
    with pytest.raises(
        ValueError, match=r"^the reward function 'lambda' must return numbers of at most 1e[-+]\d+ with"
    ):
        rewards("a", EXAMPLES, IMAGES)


@pytest.mark.parametrize(("largest", "weight"), [(1e15, 0.5), (1e14, 10.0), (-1e12, 1e3)])
def test_the_largest_rewards_have_a_finite_std(largest, weight):
    table = Rewards(lambda images: [largest, -largest, None], weight)("a", EXAMPLES, IMAGES)
    total = combine(table, torch.tensor([weight])).repeat(10_000)
    assert nanstd(total).item() == pytest.approx(1e15 * (1 if weight > 1 else 0.5), rel=1e-3)


@pytest.mark.parametrize("is_async", [False, True])
def test_an_error_of_the_function_is_the_users_to_see(is_async):
    def broken(images):
        raise ZeroDivisionError("of the user's")

    async def broken_later(images):
        broken(images)

    with pytest.raises(ZeroDivisionError, match="of the user's"):
        scores([broken_later if is_async else broken, *([constant(1.0)])])


# What goes in


def test_a_function_is_given_what_it_takes():
    given = {}

    def everything(prompts, images, **columns):
        given.update(columns, prompts=prompts, images=images)
        return [0.0] * len(images)

    def target_alone(target, *, missing="default"):
        assert missing == "default"
        return [float(text[-1]) for text in target]

    state = TrainerState(global_step=7)

    def schedule(images, trainer_state):
        return [trainer_state.global_step] * len(images)

    table = scores([everything, target_alone, schedule], trainer_state=state)
    assert table == [[0.0, float(i), 7.0] for i in range(3)]
    assert given == {
        "prompts": [f"prompt {i}" for i in range(3)],
        "images": IMAGES,
        "task": ["a"] * 3,
        "target": [f"target {i}" for i in range(3)],
        "trainer_state": state,
    }


@pytest.mark.parametrize("is_async", [False, True])
def test_what_a_function_writes_into_is_its_own(is_async):
    """Pictures, videos, arrays and whatever a column holds: the next function and the caller have them as they were."""

    def spoil(prompts, images, source, video, waveform, boxes):
        for picture in (*images, *source, *video[0]):
            picture.paste(0, (0, 0, 4, 4))
        for array in waveform:
            array[:] = 0
        boxes[0]["corners"].append(9)
        for values in (prompts, images, source, video, waveform, boxes):
            values.clear()
        return [0.0] * 3

    async def spoil_later(prompts, images, source, video, waveform, boxes):
        return spoil(prompts, images, source, video, waveform, boxes)

    def made():
        return [
            {
                "prompt": f"prompt {index}",
                "source": Image.new("RGB", (4, 4), (200, 0, index)),
                "video": [Image.new("RGB", (4, 4), (0, 200, frame)) for frame in range(2)],
                "waveform": [np.ones(3), torch.ones(3)][index % 2],
                "boxes": {"corners": [index, 1]},
            }
            for index in range(3)
        ]

    def as_they_were(prompts, images, source, video, waveform, boxes):
        expected = made()
        assert images == IMAGES and prompts == [row["prompt"] for row in expected]
        assert source == [row["source"] for row in expected] and video == [row["video"] for row in expected]
        assert all(array.sum() == 3 for array in waveform) and boxes == [row["boxes"] for row in expected]
        return [1.0] * 3

    rows, images = made(), [image.copy() for image in IMAGES]
    rewards = Rewards([spoil_later if is_async else spoil, as_they_were])
    assert rewards("a", rows, images).tolist() == [[0.0, 1.0]] * 3
    as_they_were(
        images=images,
        prompts=[row["prompt"] for row in rows],
        **{name: [row[name] for row in rows] for name in ("source", "video", "waveform", "boxes")},
    )


def test_a_column_that_is_missing_is_named():
    def judge(images, answer, score, target):
        return [0.0] * len(images)

    sentence = r"^the reward function 'judge' needs \['answer', 'score'\], but .* here \['target', 'task'\]\.$"
    with pytest.raises(ValueError, match=sentence):
        scores(judge)


def test_a_builtin_without_a_signature_is_given_everything():
    class Judge:
        """As some extension modules' callables."""

        @property
        def __signature__(self):
            raise ValueError("no signature found")

        def __call__(self, **kwargs):
            assert {"prompts", "images", "task", "target", "trainer_state"} == kwargs.keys()
            return [1.0] * len(kwargs["images"])

    with pytest.raises(ValueError):
        inspect.signature(Judge())
    assert scores(Judge()) == [[1.0]] * 3


# Names


def test_names():
    class Judge:
        def __call__(self, images):
            return [1.0] * len(images)

        def method(self, images):
            return [1.0] * len(images)

    first, second = constant(1.0), constant(2.0)  # both named "reward"
    funcs = [brightness, functools.partial(length), Judge(), Judge().method, first, second, lambda images: [0.0] * 3]
    names = ["brightness", "length", "Judge", "method", "reward", "reward_2", "lambda"]
    assert Rewards(funcs).names("any") == Rewards(funcs).all_names == names


def test_a_function_of_two_tasks_has_one_name_and_a_lambda_that_of_its_task():
    rewards = Rewards({"a": [length, constant(1.0)], "b": [constant(1.0), length], "ocr": lambda images: [0.0] * 3})
    assert (rewards.names("a"), rewards.names("b")) == (["length", "reward"], ["reward_2", "length"])
    assert rewards.names("ocr") == ["ocr"]
    assert rewards.all_names == ["length", "reward", "reward_2", "ocr"]


class Judge(torch.nn.Module):
    """As people have them: a module, whose `__call__` passes on whatever it is given."""

    def __init__(self, by: float):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(by))

    def forward(self, images, size, bonus: float = 0.0):
        return self.scale * torch.tensor([float(image) for image in images]) * torch.tensor(size) + bonus


def test_a_module_is_given_what_its_forward_takes():
    rewards = Rewards([Judge(2.0), functools.partial(Judge(3.0), bonus=1.0)])
    assert rewards.names("all") == ["Judge", "Judge_2"]
    rewards.check_columns(["prompt", "size", "other"])
    examples = [{"prompt": "a", "size": 1.0, "other": 0}, {"prompt": "b", "size": 2.0, "other": 0}]
    assert rewards("all", examples, [5, 7], trainer_state=object()).tolist() == [[10.0, 16.0], [28.0, 43.0]]
    with pytest.raises(ValueError, match=r"'Judge' needs \['size'\]"):
        rewards.check_columns(["prompt"])


def test_functions_by_position_are_refused():
    """Where their values would be missed; those with a default are left at it."""
    Rewards(lambda own=1, /, *, images: [own] * len(images)).check_columns(["prompt"])
    for func in (lambda prompts, images, /: [], lambda prompts, /, images: [], lambda *given: []):
        with pytest.raises(ValueError, match="'lambda' takes .* by position only, but is called with keywords"):
            Rewards(func).check_columns(["prompt"])
