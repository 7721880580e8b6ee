"""Calls that begin ahead: the same numbers as when each begins as it is asked, whatever the pipeline, and no encoder on
the device meanwhile."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn
from transformers import TrainerCallback

from diffusion_opd import (
    DiffusionGRPOTrainer,
    DiffusionNFTTrainer,
    DiffusionOPDConfig,
    DiffusionOPDTrainer,
    DiffusionROPDConfig,
    DiffusionROPDTrainer,
    Teacher,
)
from tests.editing_pipelines import EDITING, EDITING_CALL, EDITING_INPUTS
from tests.own_pipelines import Plain, of
from tests.poisoned import Poisoned
from tests.rl_training import TASKS, redness
from tests.rl_training import trainer_of as rl_trainer_of
from tests.streaming_pipelines import STREAMING, STREAMING_CALL
from tests.tiny_pipelines import BUILDERS, CALL
from tests.training import DATA, FAMILIES, config, history, lora, trained, trainer_of
from tests.two_denoisers import TWO, TWO_CALL


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    monkeypatch.setattr("diffusion_opd.ahead.Parts", Poisoned)


def compare(make: Callable[..., Any], count: int = 2, **kwargs: Any) -> Any:
    """The trainer that began ahead, after it has come to the same numbers as one that did not."""
    trainers = [make(**kwargs), make(encode_ahead=count, **kwargs)]
    for trainer in trainers:
        trainer.train()
    plain, ahead = trainers
    assert torch.equal(trained(plain), trained(ahead))
    for key in ("loss", "grad_norm", "reward", "eval_loss", "eval_kl", "eval_reward"):
        assert history(plain, key) == history(ahead, key)
    assert len(history(plain, "loss")) == plain.state.max_steps
    return ahead


def maker(tmp_path: Any, build: Callable[[int], DiffusionPipeline], call: dict[str, Any], data: Dataset = DATA):
    """Makes a small run of a pipeline's."""

    def make(teachers: Any = None, **kwargs: Any) -> DiffusionOPDTrainer:
        settings = dict(max_steps=3, num_inference_steps=3, call_kwargs=call) | kwargs
        return DiffusionOPDTrainer(
            build(0),
            teachers or {"a": build(1), "b": build(2)},
            config(tmp_path, **settings),
            train_dataset=data,
            peft_config=lora(),
        )

    return make


@FAMILIES
def test_every_family_comes_to_the_same_numbers(tmp_path, family, full):
    compare(lambda **kwargs: trainer_of(tmp_path, family, full=full, max_steps=3, num_inference_steps=3, **kwargs))


@pytest.mark.parametrize("family", ["ltx2", "skyreels", "helios"])
def test_streams_and_chunks(tmp_path, family):
    compare(maker(tmp_path, STREAMING[family], dict(STREAMING_CALL[family])), max_steps=2, num_inference_steps=2)


@pytest.mark.parametrize("family", ["flux_kontext", "flux_fill", pytest.param("wan_i2v", marks=pytest.mark.nightly)])
def test_pictures(tmp_path, family):
    inputs = EDITING_INPUTS[family]
    data = Dataset.from_dict({"prompt": [f"edit {n}" for n in range(4)], "teacher_id": ["a", "b"] * 2, **inputs})
    compare(maker(tmp_path, EDITING[family], dict(EDITING_CALL[family]), data), max_steps=2)


def test_two_denoisers(tmp_path):
    compare(maker(tmp_path, TWO["wan22"], dict(TWO_CALL["wan22"])), max_steps=2)


PICTURE = Image.effect_noise((32, 32), 50).convert("RGB")


@pytest.mark.parametrize(
    "choices",
    [
        dict(query="beta", num_queries=1, transition="flow_sde"),
        dict(guidance_split=1.0, anchor="base"),
        dict(target_extrapolation=1.25, teachers=[Teacher("base", id="a"), Teacher("LORA", id="b")]),
        dict(task_sampling="random", gradient_accumulation_steps=2),
    ],
    ids=lambda choices: next(iter(choices)),
)
def test_what_is_learnt_and_where(tmp_path, choices):
    teachers = choices.pop("teachers", None)
    if teachers is not None:
        source = BUILDERS["sd3"](0)
        source.transformer.add_adapter(lora(init_lora_weights=False))
        source.save_lora_weights(tmp_path / "b", source.transformer.state_dict())
    call = dict(CALL["sd3"])
    choices["guidance_scale"] = call.pop("guidance_scale")
    compare(maker(tmp_path, BUILDERS["sd3"], call), **choices)


def test_real_pictures(tmp_path):
    """Their latents are encoded ahead too."""
    pictures = Dataset.from_dict({"prompt": ["a", "b", "c"], "image": [PICTURE, PICTURE.rotate(90), PICTURE]})

    def make(**kwargs: Any) -> DiffusionOPDTrainer:
        return DiffusionOPDTrainer(
            BUILDERS["sd3"](0),
            {"a": BUILDERS["sd3"](1), "b": BUILDERS["sd3"](2)},
            config(tmp_path, max_steps=3, objective="velocity", **kwargs),
            train_dataset=DATA,
            peft_config=lora(),
            anchor_dataset=pictures,
        )

    compare(make)


@pytest.mark.parametrize("cls", [DiffusionNFTTrainer, DiffusionGRPOTrainer])
def test_learning_from_rewards(tmp_path, cls):
    """Each rollout is learnt from in four optimizer steps; what is asked in three of them begins together."""
    settings: dict[str, Any] = dict(max_steps=5, num_iterations=2, gradient_accumulation_steps=2, data=TASKS)
    settings |= dict(steps_per_generation=4, beta=0.1)
    ahead = compare(lambda **kwargs: rl_trainer_of(cls, tmp_path, **settings, **kwargs), count=3)
    assert not ahead.ahead.parts.are_away


def test_a_verdict_on_experts(tmp_path):
    def make(**kwargs: Any) -> DiffusionROPDTrainer:
        call = dict(CALL["sd3"])
        settings = dict(max_steps=2, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, image_steps=0)
        settings |= dict(per_device_train_batch_size=4, num_generations=4, num_inference_steps=3, learning_rate=1e-2)
        return DiffusionROPDTrainer(
            BUILDERS["sd3"](0),
            lambda images, **kwargs: [0.5 + 0.5 * value for value in redness(images)],
            DiffusionROPDConfig(str(tmp_path), call_kwargs=call, **settings, **kwargs),
            train_dataset=TASKS.remove_columns("task"),
            peft_config=lora(),
            teachers=BUILDERS["sd3"](1),
        )

    compare(make)


def test_one_sample_a_call(tmp_path):
    """Where each micro-batch is several calls of the pipeline, all of them begin."""
    data = Dataset.from_dict(
        {"prompt": [f"edit {n}" for n in range(4)], "teacher_id": ["a", "b"] * 2, **EDITING_INPUTS["qwen_edit"]}
    )
    ahead = compare(maker(tmp_path, EDITING["qwen_edit"], dict(EDITING_CALL["qwen_edit"]), data), max_steps=1, count=1)
    assert ahead.together == 1


# Where everything is meanwhile


class Look(TrainerCallback):
    """What of a pipeline is sane when its denoiser is called: on a CPU, not away."""

    def __init__(self, trainer: DiffusionOPDTrainer):
        self.seen: list[bool] = []
        parts = [part for name, part in trainer.pipeline.components.items() if isinstance(part, nn.Module)]
        others = [part for part in parts if part is not trainer.model]
        weights = [p for part in others for p in (*part.parameters(), *part.buffers()) if p.is_floating_point()]
        assert len(others) >= 4 and weights  # three encoders and a VAE

        def look(*args: Any) -> None:
            self.seen.append(any(bool(p.isfinite().all()) for p in weights if p.numel()))

        trainer.model.register_forward_pre_hook(look)


def test_no_encoder_is_on_the_device_while_denoising(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=4, encode_ahead=2)
    look = Look(trainer)
    trainer.train()
    assert len(look.seen) == 4 * 2 * 3  # steps, tasks, visits: not one of them while calls begin
    assert not any(look.seen)
    assert not trainer.ahead.parts.are_away and not len(trainer.ahead) and not trainer.ahead.num_bytes


def test_what_waits_is_in_cpu_memory(tmp_path):
    """Each call that waits holds its embeddings, and nothing of them on the device."""
    trainer = trainer_of(tmp_path, max_steps=2, encode_ahead=2, gradient_accumulation_steps=2)
    waiting: list[int] = []
    taken = trainer.ahead.take

    def take() -> Any:
        waiting.append(trainer.ahead.num_bytes)
        return taken()

    trainer.ahead.take = take
    trainer.train()
    assert waiting[0] > waiting[1] > waiting[2] > waiting[3] > 0
    # Student and teacher share what a micro-batch was encoded to: prompts and negative prompts in both branches
    (rows, length, width) = 2, 32, BUILDERS["sd3"](0).transformer.config.joint_attention_dim
    assert waiting[3] > 2 * rows * length * width * 4
    assert waiting[0] == pytest.approx(4 * waiting[3], rel=0.2)


def test_pictures_and_evaluation_between(tmp_path):
    """They end what has begun, find all parts on the device, and change nothing that is learnt."""

    class Draw(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                with trainer.whole_pipeline():
                    pipeline = trainer.pipeline
                    drawn.append(pipeline("a cat", num_inference_steps=1, output_type="np", **CALL["sd3"])[0])

    def make(**kwargs: Any) -> DiffusionOPDTrainer:
        nonlocal trainer
        settings = dict(eval_dataset=DATA.select(range(4)), eval_strategy="steps", eval_steps=1, image_steps=2)
        trainer = trainer_of(tmp_path / str(len(kwargs)), max_steps=4, callbacks=[Draw()], **settings, **kwargs)
        return trainer

    trainer: Any = None
    drawn: list[Any] = []
    plain = make()
    plain.train()
    ahead = make(encode_ahead=3)
    ahead.train()
    assert torch.equal(trained(plain), trained(ahead))
    for key in ("loss", "eval_loss", "eval_kl/a"):
        assert history(plain, key) == history(ahead, key)
    assert (drawn[0] == drawn[1]).all()
    first, second = (sorted((tmp_path / str(n)).glob("images/*/*.png")) for n in (0, 1))
    assert len(first) == len(second) == 8
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_goes_on_from_a_checkpoint_between(tmp_path):
    """A run that is resumed where others wait begins these anew, with another number of steps ahead too."""
    whole = trainer_of(tmp_path / "whole", max_steps=5)
    whole.train()
    cut = trainer_of(
        tmp_path / "cut", max_steps=5, encode_ahead=4, save_strategy="steps", save_steps=2, save_total_limit=1
    )

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    cut.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    assert not len(cut.ahead) and not cut.ahead.parts.are_away  # whoever interrupts finds a whole pipeline
    on = trainer_of(tmp_path / "cut", max_steps=5, encode_ahead=2, save_strategy="steps", save_steps=2)
    on.train(resume_from_checkpoint=True)
    assert torch.equal(trained(whole), trained(on))


def test_the_end_of_an_epoch(tmp_path):
    """Twelve rows make three optimizer steps of an epoch: fewer than would begin together."""
    compare(lambda **kwargs: trainer_of(tmp_path, max_steps=-1, num_train_epochs=2, **kwargs), count=5)


# What a pipeline does on its way


ONE = DATA.remove_columns("teacher_id")


class Asks(Plain):
    """It reads weights of its VAE at each step."""

    def advance(self, x: Any, t: Any, **embeds: Any) -> Any:
        weight = next(self.vae.parameters())
        return super().advance(x + 0 * weight.sum(), t, **embeds)


class Reads(Plain):
    """It reads what is trained before its first step."""

    def embed(self, prompt: list[str]) -> Any:
        embeds, pooled = super().embed(prompt)
        weight = self.transformer.pos_embed.proj.weight
        return embeds + 0 * weight.sum(), pooled


def test_what_is_read_at_each_step_stays(tmp_path):
    ahead = compare(maker(tmp_path, lambda seed: of(Asks), {}))
    vae = ahead.pipeline.vae
    leaving = {id(tensor) for tensor in ahead.ahead.parts.tensors}
    stays = [name for name, p in vae.named_parameters() if id(p) not in leaving]
    assert stays == [next(name for name, _ in vae.named_parameters())]


def test_trained_weights_are_not_read_ahead(tmp_path):
    with pytest.raises(ValueError, match="Reads reads weights that are trained before its first denoising step"):
        DiffusionOPDTrainer(of(Reads), of(Plain), config(tmp_path, encode_ahead=2, call_kwargs={}), train_dataset=ONE)
    DiffusionOPDTrainer(of(Reads), of(Plain), config(tmp_path, call_kwargs={}), train_dataset=ONE)


class Keeps(Plain):
    """What it has made once it uses in all its calls."""

    kept: dict[str, Any] = {}

    def embed(self, prompt: list[str]) -> Any:
        embeds, pooled = super().embed(prompt)
        if len(self.kept) < 3:  # made in several calls that wait, read in others
            self.kept[str(len(self.kept))] = torch.randn(embeds.shape[-1]) * 0.1
        return embeds + sum(self.kept.values()), pooled


def test_what_a_pipeline_keeps_between_calls(tmp_path):
    def run(**kwargs: Any) -> Any:
        Keeps.kept.clear()
        trainer = maker(tmp_path, lambda seed: of(Keeps), {})(max_steps=6, **kwargs)
        Keeps.kept.clear()  # the check has made some
        trainer.train()
        return trained(trainer)

    assert torch.equal(run(), run(encode_ahead=6))


def test_a_teacher_begins_where_it_waits(tmp_path):
    """What begins needs no denoiser, so a teacher stays in CPU memory until its visits."""
    moved: list[str] = []
    trainer = trainer_of(tmp_path, max_steps=2, encode_ahead=2, teacher_placement="cpu")
    inner = type(trainer.teachers).on_device

    def on_device(self: Any, key: str) -> Any:
        moved.append(key)
        return inner(self, key)

    begin = trainer.ahead.begin

    def begun(questions: Any) -> None:
        before = len(moved)
        begin(questions)
        assert len(moved) == before

    trainer.ahead.begin = begun
    type(trainer.teachers).on_device = on_device
    try:
        trainer.train()
    finally:
        type(trainer.teachers).on_device = inner
    assert moved == ["a", "b"] * 2


# What does not fit


def test_refusals(tmp_path):
    for wrong, sentence in [
        (dict(encode_ahead=0), "`encode_ahead` must be at least 1, got 0"),
        (dict(encoder_placement="disk"), "`encoder_placement` must be one of"),
        (dict(encoder_placement="cpu"), "say by `encode_ahead` for how many optimizer steps"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            DiffusionOPDConfig(str(tmp_path), **wrong)


def test_encoders_that_stay(tmp_path):
    ahead = compare(lambda **kwargs: trainer_of(tmp_path, max_steps=3, **kwargs), encoder_placement=None)
    assert ahead.ahead.parts.tensors
    stays = trainer_of(tmp_path, max_steps=3, encode_ahead=2, encoder_placement="device")
    assert not stays.ahead.parts.tensors
    stays.train()
    assert torch.equal(trained(stays), trained(ahead))
