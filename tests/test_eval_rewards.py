"""Reward functions that score pictures while a student is distilled, on a tiny SD3 (and a video)."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset

from diffusion_opd.inputs import content_key
from diffusion_opd.sampling import SEED_EVAL, seed_of
from tests import rl_training
from tests.rl_training import redness
from tests.tiny_pipelines import BUILDERS, CALL
from tests.training import history, lora, trained, trainer_of

PROMPTS = [f"prompt number {i}" for i in range(12)]
DATA = Dataset.from_dict({"prompt": PROMPTS, "teacher_id": ["a", "b"] * 6})
SHADED = DATA.add_column("shade", [i / 12 for i in range(12)])
EVERY_STEP = dict(eval_strategy="steps", eval_steps=1)


def brightness(images, **kwargs):
    return [float(np.asarray(image, dtype=float).mean() / 255) for image in images]


def shaded(prompts, images, shade):
    """How near a picture's brightness is to the one of its row."""
    return [-abs(own - wanted) for own, wanted in zip(brightness(images), shade, strict=True)]


def numbers(entry: dict, *names: str) -> dict[str, float]:
    """The metrics of evaluation that are called so."""
    return {key: value for key, value in entry.items() if key.startswith(tuple(f"eval_{name}" for name in names))}


# What is scored


def test_scores_are_those_of_what_the_plain_pipeline_draws(tmp_path):
    """By its own scheduler, in as many steps as the sample pictures have, from noise that is the row's own."""
    rows = SHADED.select(range(5))
    trainer = trainer_of(
        tmp_path,
        eval_dataset=rows,
        eval_reward_funcs={"a": [shaded, redness], "b": redness},
        peft_config=lora(init_lora_weights=False),
        **dict(per_device_eval_batch_size=3, image_num_inference_steps=6),
    )
    before = trained(trainer).clone()
    first, second = trainer.evaluate(), trainer.evaluate()
    assert numbers(first, "reward", "kl") == numbers(second, "reward", "kl")
    assert torch.equal(trained(trainer), before) and all(p.grad is None for p in trainer.model.parameters())

    plain = BUILDERS["sd3"](0)
    plain.transformer.add_adapter(lora())
    plain.transformer.load_state_dict(trainer.model.state_dict())
    scores: dict[str, list[float]] = {"shaded": [], "a": [], "b": []}
    for row in rows:
        key = content_key({name: row[name] for name in ("prompt", "teacher_id")})
        generator = torch.Generator().manual_seed(seed_of(trainer.args.seed, SEED_EVAL, key, 0))
        image = plain(row["prompt"], num_inference_steps=6, generator=generator, **CALL["sd3"]).images
        scores[row["teacher_id"]] += redness(image)
        if row["teacher_id"] == "a":
            scores["shaded"] += shaded([row["prompt"]], image, [row["shade"]])
    both = torch.tensor([*scores["a"], *scores["b"]])
    sums = torch.tensor([*(a + b for a, b in zip(scores["a"], scores["shaded"], strict=True)), *scores["b"]])
    assert numbers(first, "reward") == pytest.approx(
        {
            "eval_reward": sums.mean().item(),
            "eval_reward_std": sums.std().item(),
            "eval_reward/a": sums[:3].mean().item(),
            "eval_reward/b": sums[3:].mean().item(),
            "eval_rewards/redness/mean": both.mean().item(),
            "eval_rewards/redness/std": both.std().item(),
            "eval_rewards/redness/a": both[:3].mean().item(),
            "eval_rewards/redness/b": both[3:].mean().item(),
            "eval_rewards/shaded/mean": sum(scores["shaded"]) / 3,
            "eval_rewards/shaded/std": torch.tensor(scores["shaded"]).std().item(),
            "eval_rewards/shaded/a": sum(scores["shaded"]) / 3,
        },
        abs=1e-4,
    )


def test_scores_do_not_depend_on_how_rows_are_cut(tmp_path):
    """And rows that are equal have noise of their own."""
    data, seen = SHADED.select([0, 1, 1, 2, 3]), []

    def judge(images):
        scores = redness(images)
        seen.extend(scores)
        return scores

    trainer = trainer_of(tmp_path, eval_dataset=data, eval_reward_funcs=[shaded, judge])
    results = []
    for batch, form in [(1, data), (5, data), (3, data.select([4, 2, 0, 1, 3])), (2, data.to_iterable_dataset())]:
        trainer.args.per_device_eval_batch_size = batch
        results.append(numbers(trainer.evaluate(form), "reward", "kl"))
    for result in results:
        assert result == pytest.approx(results[0], abs=5e-5)
    assert len(set(seen[:5])) == 5


def test_what_is_drawn_from_the_global_generator_is_the_same_each_time(tmp_path):
    trainer = trainer_of(tmp_path, eval_dataset=DATA.select(range(2)), eval_reward_funcs=redness)
    decode = trainer.pipeline.vae.decode
    trainer.pipeline.vae.decode = lambda z, **kwargs: decode(z + torch.randn_like(z), **kwargs)
    first = trainer.evaluate()
    torch.randn(3)
    assert numbers(trainer.evaluate(), "reward") == numbers(first, "reward")


def test_rewards_of_one_task_leave_the_others_rows_alone(tmp_path):
    asked = []

    def judge(prompts, images, teacher_id):
        asked.extend(teacher_id)
        return redness(images)

    trainer = trainer_of(tmp_path, eval_dataset=DATA.select(range(4)), eval_reward_funcs={"b": judge})
    metrics = trainer.evaluate()
    assert asked == ["b", "b"]
    assert metrics["eval_reward"] == metrics["eval_reward/b"] == metrics["eval_rewards/judge/b"]
    assert "eval_reward/a" not in metrics and "eval_kl/a" in metrics


def test_videos_are_scored_by_their_frames(tmp_path):
    def judge(images):
        assert all(isinstance(frames, list) and len(frames) == CALL["wan"]["num_frames"] for frames in images)
        return redness(images)

    trainer = trainer_of(tmp_path, "wan", eval_dataset=DATA.select(range(2)), eval_reward_funcs=judge)
    assert "eval_rewards/judge/mean" in trainer.evaluate()


class Brighter:
    """By how much the brightness is above a number."""

    def __init__(self, than: float = 0.0):
        self.than, self.__name__ = than, "brighter"

    def __call__(self, images, **kwargs):
        return [own - self.than for own in brightness(images)]


def test_functions_may_be_named(tmp_path):
    """With arguments; and what two tasks name alike is one function, with one name in the metrics."""
    path = f"{__name__}.Brighter"
    trainer = trainer_of(
        tmp_path,
        eval_dataset=DATA.select(range(4)),
        eval_reward_funcs={"a": path, "b": [{"name": path, "than": 0.25}, path, brightness]},
    )
    metrics = trainer.evaluate()
    names = {key.split("/")[1] for key in numbers(metrics, "rewards")}
    assert names == {"brighter", "brighter_2", "brightness"}
    assert metrics["eval_rewards/brighter/b"] == metrics["eval_rewards/brightness/b"]
    assert metrics["eval_rewards/brighter_2/b"] == pytest.approx(metrics["eval_rewards/brightness/b"] - 0.25)
    assert "eval_rewards/brighter/a" in metrics and "eval_rewards/brighter_2/a" not in metrics


# What it changes: nothing that is learnt


def test_nothing_is_learnt_from_them(tmp_path):
    """With and without, and with other columns beside: the same digits."""
    settings = dict(data=SHADED, eval_dataset=SHADED.select(range(4)), max_steps=3, **EVERY_STEP)
    settings |= dict(ema_decay=0.8, ema_update_every=1)
    runs = [
        trainer_of(tmp_path / "a", **settings),
        trainer_of(tmp_path / "b", eval_reward_funcs=[shaded, redness], **settings),
    ]
    for trainer in runs:
        trainer.train()
    for name in ("loss", "kl", "grad_norm", "eval_loss", "eval_kl", "eval_kl/a"):
        assert history(runs[0], name) == history(runs[1], name) and len(history(runs[0], name)) == 3, name
    assert torch.equal(trained(runs[0]), trained(runs[1]))
    assert len(history(runs[1], "eval_rewards/shaded/mean")) == 3
    assert not history(runs[0], "eval_reward") and not history(runs[1], "reward")


def test_the_best_model_may_be_chosen_by_them(tmp_path):
    """The average is what is scored, kept and loaded."""
    trainer = trainer_of(
        tmp_path,
        eval_dataset=DATA.select(range(3)),
        eval_reward_funcs={"a": redness},
        **dict(ema_decay=0.5, ema_update_every=1, max_steps=4, learning_rate=0.1, **EVERY_STEP),
        **dict(save_strategy="steps", save_steps=1, load_best_model_at_end=True),
        metric_for_best_model="rewards/redness/a",
    )
    trainer.train()
    values = history(trainer, "eval_rewards/redness/a")
    best = values.index(max(values)) + 1
    assert len(set(values)) == 4 and trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert trainer.evaluate()["eval_rewards/redness/a"] == pytest.approx(max(values), abs=1e-6)


def test_a_run_goes_on_with_others(tmp_path, caplog):
    settings = dict(save_strategy="steps", save_steps=1, eval_dataset=DATA.select(range(2)), **EVERY_STEP)
    trainer_of(tmp_path, eval_reward_funcs=redness, max_steps=1, **settings).train()
    caplog.clear()
    resumed = trainer_of(tmp_path, eval_reward_funcs=brightness, max_steps=2, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert "reward" not in caplog.text
    assert len(history(resumed, "eval_rewards/redness/mean")) == len(history(resumed, "eval_rewards/brightness/mean"))


def test_pictures_of_nan_are_not_scored(tmp_path):
    trainer = trainer_of(tmp_path, eval_dataset=DATA.select(range(2)), eval_reward_funcs=redness)
    next(trainer.pipeline.vae.decoder.parameters()).data.fill_(torch.nan)
    with pytest.raises(
        FloatingPointError, match="evaluation after optimizer step 0: NaN or Inf in what the VAE decoded"
    ):
        trainer.evaluate()


# Captions


def test_captions_say_the_scores(tmp_path):
    trainer = trainer_of(tmp_path, data=SHADED, eval_reward_funcs={"a": [redness, shaded]})
    images = trainer.sample_images(trainer.image_examples)
    expected = [row["prompt"] for row in trainer.image_examples]
    assert [row["teacher_id"] for row in trainer.image_examples] == ["a", "a", "b", "b"]
    for index, row in enumerate(trainer.image_examples[:2]):
        image = [images[index]]
        expected[index] += f", redness {redness(image)[0]:.3f}, shaded {shaded([], image, [row['shade']])[0]:.3f}"
    trainer.log_images()
    assert json.loads((tmp_path / "images" / "step_000000" / "captions.json").read_text()) == expected


@pytest.mark.parametrize("prompts", [None, ["a fox"]])
def test_rows_that_lack_what_a_function_needs_have_plain_captions(tmp_path, prompts):
    trainer = trainer_of(tmp_path, eval_dataset=SHADED, eval_reward_funcs=shaded, image_prompts=prompts)
    trainer.log_images()
    written = json.loads((tmp_path / "images" / "step_000000" / "captions.json").read_text())
    assert written == trainer.image_prompts == (prompts or [PROMPTS[0], PROMPTS[2], PROMPTS[1], PROMPTS[3]])


def test_captions_of_a_policy_say_rewards_that_read_columns(tmp_path):
    trainer = rl_training.trainer_of(rl_training.NFT, tmp_path, rewards=shaded)
    images = trainer.sample_images(trainer.image_examples)
    scores = shaded([], images, rl_training.DATA["shade"][:4])
    captions = [f"{prompt}, shaded {score:.3f}" for prompt, score in zip(PROMPTS, scores, strict=False)]
    assert trainer.image_captions(images) == captions


# What is refused


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        ({"c": redness}, ValueError, r"`eval_reward_funcs` names \['c'\], but the teachers are \['a', 'b'\]"),
        ([], ValueError, "`eval_reward_funcs` is empty"),
        ({"a": [brightness, type]}, TypeError, r"`eval_reward_funcs\['a'\]`: a reward function is called with"),
        ("pick", ValueError, "no reward is called 'pick'"),
        (shaded, ValueError, r"the reward function 'shaded' needs \['shade'\]"),
    ],
)
def test_what_cannot_be_asked_is_refused_at_the_start(tmp_path, given, error, sentence):
    with pytest.raises(error, match=sentence):
        trainer_of(tmp_path, eval_dataset=DATA, eval_reward_funcs=given)


def test_a_metric_of_nobody_is_refused(tmp_path):
    settings = dict(eval_dataset=DATA, eval_reward_funcs={"a": redness}, **EVERY_STEP)
    with pytest.raises(
        ValueError, match=r"one of .*'kl/b', 'reward', 'reward_std', 'reward/a', 'rewards/redness/mean'"
    ):
        trainer_of(tmp_path, metric_for_best_model="rewards/redness/b", **settings)
