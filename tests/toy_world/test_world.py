"""The world draws what its prompts say, reproducibly, and its two sets of prompts do not overlap."""

import numpy as np
import pytest
import torch
from transformers import T5EncoderModel

from examples.toy_world.pipeline import MAX_TOKENS, clip_tokenizer, t5_encoder, t5_tokenizer
from examples.toy_world.world import (
    MORE_TASKS,
    SIZE,
    TASKS,
    any_prompt,
    draw,
    draw_badly,
    edits,
    prompts_of,
    reworded,
    sample_prompts,
    sources,
)


@pytest.mark.parametrize("task", TASKS + MORE_TASKS)
def test_training_and_heldout_prompts_are_disjoint(task):
    training, heldout = prompts_of(task), prompts_of(task, heldout=True)
    assert not {p.text for p in training} & {p.text for p in heldout}
    assert {p.kind for p in training} == {p.kind for p in heldout}
    if task == "text":
        assert not {p.string for p in training} & {p.string for p in heldout}


def test_no_prompt_belongs_to_two_tasks():
    texts = [{p.text for p in prompts_of(task) + prompts_of(task, heldout=True)} for task in TASKS + MORE_TASKS]
    assert len(set().union(*texts)) == sum(map(len, texts))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("make", [draw, draw_badly])
def test_pictures_come_from_the_seed(task, make):
    for prompt in sample_prompts(task, 12, seed=3):
        one, again, *others = (np.asarray(make(prompt, np.random.default_rng(s))) for s in (0, 0, 1, 2, 3))
        assert one.shape == (SIZE, SIZE, 3) and one.dtype == np.uint8
        assert np.array_equal(one, again)
        assert not all(np.array_equal(one, other) for other in others)


def test_an_edit_changes_one_place_of_its_source():
    prompts = sample_prompts("edit", 60, seed=3)
    pairs, again = edits(prompts, 5), sources(prompts, 5)
    for prompt, (before, after), source in zip(prompts, pairs, again, strict=True):
        changed = (np.asarray(before) != np.asarray(after)).any(-1)
        rows, columns = np.nonzero(changed)
        assert source.tobytes() == before.tobytes()
        # Within the box of one thing, whose radius is 14 where it is alone and 11 beside another
        assert 20 < changed.sum() and max(np.ptp(rows), np.ptp(columns)) < 30, prompt.text


def test_in_other_words_a_prompt_asks_for_the_same():
    texts = {p.text for task in TASKS for heldout in (True, False) for p in prompts_of(task, heldout)}
    tokenizers = clip_tokenizer(), t5_tokenizer()
    for task in TASKS:
        for prompt in prompts_of(task, heldout=True):
            other = reworded(prompt)
            assert other.text not in texts
            assert (other.things, other.string, other.becomes) == (prompt.things, prompt.string, prompt.becomes)
            for tokenizer in tokenizers:
                ids = tokenizer(other.text).input_ids
                assert len(ids) <= MAX_TOKENS and tokenizer.unk_token_id not in ids[1:-1]
    (left,) = (p for p in prompts_of("compose") + prompts_of("compose", True) if p.text == "a circle left of a cross")
    assert reworded(left).text == "one picture of a cross right of a circle"


def test_a_string_stands_where_it_always_stands():
    (prompt,) = sample_prompts("text", 1, seed=0)
    pictures = [draw(prompt, np.random.default_rng(seed)).convert("L") for seed in range(5)]
    ink = [np.asarray(picture) < 128 for picture in pictures]
    assert all(np.array_equal(ink[0], other) for other in ink)


def test_sampled_prompts_come_from_the_seed_and_take_the_kinds_in_turn():
    prompts = sample_prompts("compose", 60, seed=5)
    assert prompts == sample_prompts("compose", 60, seed=5) != sample_prompts("compose", 60, seed=6)
    assert [p.kind for p in prompts[:6]] == [p.kind for p in prompts[6:12]]
    assert len({p.kind for p in prompts}) == 6


def test_pretraining_sees_every_kind_of_both_sides():
    rng = np.random.default_rng(0)
    seen = {any_prompt("compose", rng).text for _ in range(400)}
    for heldout in (False, True):
        assert seen & {p.text for p in prompts_of("compose", heldout)}


def test_a_new_text_encoder_hears_the_order_of_words():
    """As one of transformers' own initialization hardly does, which trains on pictures without ever learning it."""
    torch.manual_seed(0)
    tokenizer = t5_tokenizer()
    ours = t5_encoder(tokenizer)
    torch.manual_seed(0)
    plain = T5EncoderModel(ours.config)

    def heard(encoder: T5EncoderModel) -> float:
        """How far "circle" is from itself where two words have changed places, of its length."""
        ids = [
            tokenizer(text, return_tensors="pt").input_ids
            for text in ("a circle left of a square", "a square left of a circle")
        ]
        circle = tokenizer.convert_tokens_to_ids("▁circle")
        with torch.no_grad():
            one, other = (encoder(i)[0][0][(i[0] == circle).nonzero().item()] for i in ids)
        return ((one - other).norm() / one.norm()).item()

    assert heard(ours) > 0.5 > 5 * heard(plain)


@pytest.mark.parametrize("tokenizer", [clip_tokenizer(), t5_tokenizer()], ids=["clip", "t5"])
def test_tokenizers_know_every_word_and_no_prompt_is_cut(tokenizer):
    for task in TASKS + MORE_TASKS:
        for prompt in prompts_of(task) + prompts_of(task, heldout=True):
            ids = tokenizer(prompt.text).input_ids
            assert len(ids) <= MAX_TOKENS
            assert tokenizer.unk_token_id not in ids[1:-1]
