"""The trainer as its users meet it, on a tiny SD3 (and others where a family matters). What transformers' and TRL's
trainers would get silently wrong for a diffusers model has a test each."""

import copy
import json
import logging
import math
import os
import re
import time
from pathlib import Path

import pytest
import torch
from accelerate.utils import TorchDynamoPlugin
from datasets import Dataset, IterableDataset
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback
from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

from diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer, Teacher
from diffusion_opd.callbacks.moving_average import EMA_NAME
from diffusion_opd.engines import take_compilation
from diffusion_opd.objectives import OBJECTIVES, Objective, kl
from diffusion_opd.sampling import noise_generators, seed_of
from diffusion_opd.student import whole_modules
from diffusion_opd.transitions import TRANSITIONS, Kernel, ode
from tests.adapters import save_peft
from tests.card_rules import check_card
from tests.own_pipelines import Detached, Momentum, Plain, Restless, of
from tests.own_runs import own_steps
from tests.poisoned import Poisoned
from tests.tiny_pipelines import BUILDERS, CALL, denoiser
from tests.training import DATA, FAMILIES, PROMPTS, config, guided_by_hand, history, latents, lora, trained, trainer_of

# What is learnt


@pytest.mark.parametrize(("transition", "noise_level"), [("ode", 0.0), ("flow_sde", 0.7)])
def test_first_loss_and_gradient_are_the_papers(tmp_path, transition, noise_level):
    """Eq. 12 written down again: the plain pipeline rolls out, the teacher's plain pipeline is asked at each visited
    state under its own guidance, and the loss is a mean over samples, learnt steps and tasks."""
    seeds, batches, gradients = [], [], {}

    class Spy(DiffusionOPDTrainer):
        def _generators(self, *args):
            generators = super()._generators(*args)
            seeds.append([g.initial_seed() for g in generators])
            return generators

        def training_step(self, model, inputs, num_items_in_batch=None):
            batches.append(inputs)
            return super().training_step(model, inputs, num_items_in_batch)

    class Catch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            gradients.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    teachers = {"a": (BUILDERS["sd3"](1), 1.0), "b": (BUILDERS["sd3"](2), CALL["sd3"]["guidance_scale"])}
    trainer = Spy(
        BUILDERS["sd3"](0),
        {"a": Teacher(teachers["a"][0], guidance_scale=1.0), "b": teachers["b"][0]},
        config(tmp_path, max_steps=1, max_grad_norm=0, transition=transition),
        train_dataset=DATA,
        peft_config=lora(init_lora_weights=False),
        callbacks=[Catch()],
    )
    student = BUILDERS["sd3"](0)
    student.transformer.add_adapter(lora())
    student.transformer.load_state_dict(trainer.model.state_dict())
    trainer.train()

    losses = []
    for batch, batch_seeds in zip(batches, seeds, strict=True):
        teacher, guidance = teachers[batch[0]["teacher_id"]]
        prompts = [example["prompt"] for example in batch]
        losses += losses_by_hand(student, teacher, guidance, prompts, batch_seeds, noise_level)[:3]
    loss = torch.stack(losses).mean()
    loss.backward()
    assert history(trainer, "loss")[0] == pytest.approx(loss.item(), rel=1e-5)
    expected = {name: p.grad for name, p in student.transformer.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() < 1e-4 * gradient.norm(), name


def losses_by_hand(student, teacher, guidance, prompts, seeds, noise_level):
    """What each step of SD3's own rollout costs: `|mu_S - mu_T|^2 / (2 std^2)`, `|dt (v_S - v_T)|^2 / 2` without
    noise."""
    generators, losses = [torch.Generator().manual_seed(seed) for seed in seeds], []
    noisy = noise_generators(generators)

    def step(velocity, timestep, x, **kwargs):
        sigma, following = student.scheduler.sigmas[len(losses) : len(losses) + 2].tolist()
        dt, largest = following - sigma, student.scheduler.sigmas[1].item()  # where 1 - sigma is 0, the next is taken
        g = noise_level * math.sqrt(sigma / (1 - min(sigma, largest)))
        std = g * math.sqrt(-dt)

        def mean(v):
            return x + dt * (v + g**2 / (2 * sigma) * (x + (1 - sigma) * v))

        with torch.no_grad():
            target = mean(guided_by_hand(teacher, x, timestep, prompts, guidance))
        losses.append((mean(velocity) - target).square().mean() / (2 * std**2 if std else 2))
        noise = torch.cat([torch.randn(1, *x.shape[1:], generator=generator) for generator in noisy])
        return ((mean(velocity) + std * noise).detach(),)

    student.scheduler.step = step
    StableDiffusion3Pipeline.__call__.__wrapped__(
        student, prompt=prompts, num_inference_steps=4, output_type="latent", generator=generators, **CALL["sd3"]
    )
    return losses


def test_student_comes_closer_to_every_teacher(tmp_path):
    trainer = trainer_of(
        tmp_path, full=True, max_steps=12, learning_rate=3e-3, eval_dataset=DATA, num_inference_steps=3
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for key in ("eval_kl/a", "eval_kl/b"):
        assert after[key] < 0.7 * before[key]


NOISY = [(name, objective) for name in ("flow_sde", "dance_sde", "cps") for objective in OBJECTIVES]


@pytest.mark.parametrize(("transition", "objective"), [("ode", "kl"), ("ode", "velocity"), *NOISY])
def test_every_combination_trains(tmp_path, transition, objective):
    assert_trains(trainer_of(tmp_path, transition=transition, objective=objective, num_inference_steps=3))


@pytest.mark.parametrize(
    ("noise_level", "objective"), [(0.0, "kl"), (0.0, "velocity"), *((0.6, objective) for objective in OBJECTIVES)]
)
def test_vp_models_train_under_ddim(tmp_path, noise_level, objective):
    settings = dict(transition="ddim", noise_level=noise_level, objective=objective, num_inference_steps=3)
    assert_trains(trainer_of(tmp_path, "sd15", **settings))


def test_v_prediction_trains(tmp_path):
    runs = []
    for prediction_type in ("epsilon", "v_prediction"):
        pipes = [BUILDERS["sd15"](seed) for seed in (0, 1)]
        for pipe in pipes:
            pipe.scheduler = DDIMScheduler.from_config(
                pipe.scheduler.config, prediction_type=prediction_type, clip_sample=False
            )
        trainer = DiffusionOPDTrainer(
            pipes[0], pipes[1], config(tmp_path, "sd15"), DATA.remove_columns("teacher_id"), peft_config=lora()
        )
        assert_trains(trainer)
        runs.append(history(trainer, "loss"))
    assert runs[0] != runs[1]


def test_a_kernel_and_an_objective_of_ones_own_are_one_entry_each(tmp_path, monkeypatch):
    def strides(x, velocity, schedule, index, noise_level):
        return ode(x, velocity, schedule, index)._replace(std=noise_level)

    own = Kernel("strides", strides, is_flow=True, max_noise_level=0.5, default_noise_level=0.25)
    monkeypatch.setitem(TRANSITIONS, "strides", own)
    thrice = Objective("thrice", lambda at: 3 * kl(at.student, at.teacher), divides_by_std=True)
    monkeypatch.setitem(OBJECTIVES, "thrice", thrice)
    trainer = trainer_of(tmp_path, transition="strides", objective="thrice", max_steps=1)
    assert_trains(trainer)
    assert history(trainer, "loss/a")[0] == pytest.approx(3 * history(trainer, "kl/a")[0])
    # Like the ODE's on this first state, but for the std
    plain = trainer_of(tmp_path, max_steps=1)
    plain.train()
    ratio = history(trainer, "kl_step/0")[0] / history(plain, "kl_step/0")[0]
    assert ratio == pytest.approx(1 / 0.25**2, rel=1e-4)
    with pytest.raises(ValueError, match="'strides'.*VP model.*use 'ddim'"):
        trainer_of(tmp_path, "sd15", transition="strides")


def assert_trains(trainer: DiffusionOPDTrainer) -> None:
    before = trained(trainer).clone()
    trainer.train()
    assert all(math.isfinite(loss) and loss > 0 for loss in history(trainer, "loss"))
    assert not torch.equal(trained(trainer), before)


def test_objective_that_does_not_fit_the_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'flow_sde'.*VP model"):
        trainer_of(tmp_path, "sd15", transition="flow_sde")
    with pytest.raises(ValueError, match="'ddim'.*flow-matching"):
        trainer_of(tmp_path, transition="ddim")
    pipe = BUILDERS["sd15"](0)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True, clip_sample=False)
    with pytest.raises(ValueError, match="step 4 of 4 has zero std.*timestep_fraction"):
        DiffusionOPDTrainer(
            pipe,
            BUILDERS["sd15"](1),
            config(tmp_path, "sd15", transition="ddim", noise_level=0.5, timestep_fraction=1.0),
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            peft_config=lora(),
        )


class OneChannel(Plain):
    """Its prediction fits the state, but is not of its shape."""

    def predict(self, x, t, **embeds):
        return super().predict(x, t, **embeds)[:, :1]


@pytest.mark.parametrize(
    ("student", "teacher", "sentence"),
    [
        (Restless, Plain, "^Restless cannot be followed"),
        (
            Plain,
            Restless,
            r"^teacher 'teacher' .* of shape \(2, 4, 8, 8\) and torch.float32: asked twice at visit 0, it",
        ),
        (Plain, OneChannel, r"^teacher 'teacher' .* predicts \(2, 1, 8, 8\) .* student predicts \(2, 4, 8, 8\)"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_party_that_cannot_be_asked_is_refused(tmp_path, student, teacher, sentence):
    with pytest.raises(ValueError, match=sentence):
        DiffusionOPDTrainer(
            of(student),
            of(teacher),
            config(tmp_path, call_kwargs={}),
            DATA.remove_columns("teacher_id"),
            peft_config=lora(),
        )


def test_a_gradient_that_crosses_steps_is_that_of_the_whole_walk(tmp_path, caplog):
    """One backward pass a walk: that of the mean over all learnt steps, with what goes from one to the next."""
    gradients: list[list[torch.Tensor]] = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])

    teacher = of(Plain)
    with torch.no_grad():
        for parameter in teacher.transformer.parameters():
            parameter.mul_(1.1)
    args = config(tmp_path, call_kwargs={}, objective="velocity", max_steps=1, max_grad_norm=0.0)
    data = Dataset.from_dict({"prompt": PROMPTS[:2]})
    student = of(Momentum)
    before = copy.deepcopy(student.transformer.state_dict())
    with caplog.at_level(logging.WARNING):
        trainer = DiffusionOPDTrainer(student, teacher, args, data, callbacks=[Watch()])
    assert "a walk has one backward pass, which holds the graphs of all 3 steps that are learnt" in caplog.text
    trainer.train()

    plain = of(Momentum)
    plain.transformer.load_state_dict(before)
    plain.transformer.requires_grad_(True)
    order = [data[row]["prompt"] for row in trainer._get_train_sampler()][:2]
    runs = []
    for pipe, gradient in ((plain, False), (teacher, False), (plain, True)):
        states = runs[0] if runs else None
        seeds = [torch.Generator().manual_seed(seed_of(42, 0, 0, 0, row)) for row in range(2)]
        runs.append(own_steps(pipe, order, seeds, states, gradient))
    loss = sum((mine - target).square().mean() for (_, mine), (_, target) in zip(runs[2][:3], runs[1][:3], strict=True))
    expected = torch.autograd.grad(loss / 3, list(plain.transformer.parameters()), allow_unused=True)
    found = iter(gradients[0])
    for theirs in expected:
        if theirs is not None:
            torch.testing.assert_close(next(found), theirs, rtol=1e-3, atol=1e-7)


def test_teacher_that_is_asked_at_another_size_is_refused(tmp_path):
    """FLUX's position ids come from the teacher's own size, the state from the student's."""
    teacher = Teacher(BUILDERS["flux"](1), call_kwargs={"height": 32, "width": 32})
    with pytest.raises(ValueError, match=r"teacher 'teacher' .* at the student's states of shape \(2, \d+, 4\)"):
        trainer_of(tmp_path, "flux", teachers=teacher, data=DATA.remove_columns("teacher_id"))


def test_teacher_equal_to_the_base_is_warned_about_and_teaches_nothing(tmp_path, caplog):
    data = Dataset.from_dict({"prompt": PROMPTS})
    logging.getLogger("diffusion_opd").propagate = True
    with caplog.at_level(logging.WARNING):
        trainer = trainer_of(tmp_path, teachers=BUILDERS["sd3"](0), data=data)
    assert "nothing to learn" in caplog.text
    trainer.train()
    assert history(trainer, "loss") == [0.0, 0.0]


def test_dropout_is_warned_about(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer_of(tmp_path, peft_config=lora(lora_dropout=0.1))
    assert "lora_dropout=0.1 has no effect" in caplog.text


def test_dropout_has_no_effect(tmp_path):
    """What is trained is the policy that rolled out: in training too, the denoiser is in eval mode."""
    assert_same_runs([trainer_of(tmp_path, peft_config=lora(lora_dropout=dropout)) for dropout in (0.0, 0.5)])


def assert_same_runs(trainers: list[DiffusionOPDTrainer]) -> None:
    for trainer in trainers:
        trainer.train()
    for trainer in trainers[1:]:
        assert history(trainer, "loss") == history(trainers[0], "loss")
        assert torch.equal(trained(trainer), trained(trainers[0]))


# What an optimizer step sees


def test_split_of_a_step_does_not_matter(tmp_path):
    """Two micro-batches a task of two samples are one micro-batch of four."""
    runs = []
    for batch, accumulation in ((4, 2), (2, 4)):
        trainer = trainer_of(
            tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, transition="flow_sde"
        )
        trainer.train()
        runs.append((history(trainer, "loss"), history(trainer, "grad_norm"), trained(trainer)))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-4)
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-4)
    assert torch.allclose(runs[0][2], runs[1][2], atol=1e-4)


def test_every_step_sees_every_task(tmp_path):
    seen = []

    class Spy(DiffusionOPDTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            seen.append((self.state.global_step, {example["teacher_id"] for example in inputs}, list(inputs[0])))
            return super().training_step(model, inputs, num_items_in_batch)

    trainer = Spy(
        BUILDERS["sd3"](0),
        {"a": BUILDERS["sd3"](1), "b": BUILDERS["sd3"](2)},
        config(tmp_path, max_steps=-1, num_train_epochs=1, num_inference_steps=1),
        train_dataset=DATA,
        peft_config=lora(),
    )
    assert trainer.args.gradient_accumulation_steps == 2
    trainer.train()
    assert [(step, tasks) for step, tasks, _ in seen] == [(i // 2, {"ab"[i % 2]}) for i in range(6)]
    assert seen[0][2] == ["prompt", "teacher_id"]  # Trainer would have dropped the prompt
    assert trainer.state.global_step == 3 and trainer.state.epoch == 1


def test_prompts_are_forgotten_after_their_batch(tmp_path):
    left = []

    class Watch(TrainerCallback):
        def look(self, args, state, control, **kwargs):
            left.append((len(trainer.cache._store), trainer.cache.num_encodings))

        on_substep_end = on_step_end = on_prediction_step = on_evaluate = look

    trainer = trainer_of(
        tmp_path, eval_dataset=DATA.select(range(4)), eval_strategy="steps", eval_steps=2, callbacks=[Watch()]
    )
    assert not trainer.cache._store
    trainer.train()
    trainer.evaluate()
    encodings = [count for _, count in left]
    assert len(left) > 6 and encodings == sorted(encodings) and encodings[-1] > encodings[0] > 0
    assert all(entries == 0 for entries, _ in left)


def test_accumulation_that_splits_a_cycle_is_refused(tmp_path):
    with pytest.raises(ValueError, match="gradient_accumulation_steps=3.*2 tasks.*use 4"):
        trainer_of(tmp_path, gradient_accumulation_steps=3)


def test_gradient_is_clipped_and_callbacks_and_optimizers_are_used(tmp_path):
    steps = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
            steps.append(torch.stack(norms).norm().item())

    pipe = BUILDERS["sd3"](0)
    args = config(tmp_path, max_grad_norm=1e-3, learning_rate=0.5)
    trainer = DiffusionOPDTrainer(
        pipe,
        {"a": BUILDERS["sd3"](1), "b": BUILDERS["sd3"](2)},
        args,
        train_dataset=DATA,
        callbacks=[Watch()],
        peft_config=lora(),
    )
    trainer.optimizer = torch.optim.SGD(trainer.trainable_parameters, lr=0.5)
    before = trained(trainer).clone()
    trainer.train()
    assert steps == pytest.approx([1e-3, 1e-3], rel=1e-3)
    assert (trained(trainer) - before).norm() <= 0.5 * 2e-3


def test_given_optimizer_and_schedule_are_used(tmp_path):
    pipe = BUILDERS["sd3"](0)
    optimizer = torch.optim.SGD(pipe.transformer.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    trainer = DiffusionOPDTrainer(
        pipe,
        {"a": BUILDERS["sd3"](1), "b": BUILDERS["sd3"](2)},
        config(tmp_path, max_grad_norm=1e-3),
        train_dataset=DATA,
        optimizers=(optimizer, schedule),
    )
    before = trained(trainer).clone()
    trainer.train()
    assert trainer.optimizer.optimizer is optimizer
    assert optimizer.param_groups[0]["lr"] == 0.5 * 0.5**2
    assert 0 < (trained(trainer) - before).norm() <= 1.001e-3 * (0.5 + 0.25)


def test_another_seed_is_another_run(tmp_path):
    losses = []
    for seed in (0, 1):
        trainer = trainer_of(tmp_path, seed=seed, data_seed=0, max_steps=1)
        trainer.train()
        losses += history(trainer, "loss")
    assert losses[0] != losses[1]


# Precision and memory


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_checkpointing_changes_nothing(tmp_path, name):
    trainers = [trainer_of(tmp_path, **{name: value}) for value in (False, True)]
    assert_same_runs(trainers)
    assert [trainer.model.is_gradient_checkpointing for trainer in trainers] == [False, True]


def test_cache_is_emptied_as_transformers_does(tmp_path, monkeypatch):
    """In every micro-batch of every other optimizer step."""
    steps = []
    monkeypatch.setattr(
        "diffusion_opd.base_trainer.clear_device_cache", lambda: steps.append(trainer.state.global_step)
    )
    trainer = trainer_of(tmp_path, torch_empty_cache_steps=2, max_steps=4, num_inference_steps=1)
    trainer.train()
    assert steps == [0, 0, 2, 2]


def test_pipelines_are_loaded_whole_under_zero3():
    pytest.importorskip("deepspeed")
    live = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    assert is_deepspeed_zero3_enabled()
    with whole_modules():
        assert not is_deepspeed_zero3_enabled()
    assert is_deepspeed_zero3_enabled()
    with pytest.raises(KeyError), whole_modules():
        raise KeyError
    assert is_deepspeed_zero3_enabled() and live.is_zero3()


def test_checkpointing_with_lora_teachers_recomputes_under_the_student(tmp_path):
    """The recomputation runs after the teacher's adapter was active: it must run under the student's."""
    base = BUILDERS["sd3"](0)
    for name, seed in (("a", 1), ("b", 2)):
        pipe = BUILDERS["sd3"](0)
        torch.manual_seed(seed)
        pipe.transformer.add_adapter(lora(r=2 + seed, init_lora_weights=False))
        save_lora(pipe, tmp_path / name)
    base.save_pretrained(tmp_path / "base")
    runs = []
    for checkpointing in (False, True):
        trainer = DiffusionOPDTrainer(
            str(tmp_path / "base"),
            {"a": str(tmp_path / "a"), "b": str(tmp_path / "b")},
            config(tmp_path / "out", activation_checkpointing=checkpointing),
            train_dataset=DATA,
            peft_config=lora(),
        )
        trainer.train()
        runs.append(trained(trainer))
    assert torch.equal(runs[0], runs[1])


def save_lora(pipe: DiffusionPipeline, folder: Path) -> None:
    pipe.transformer.save_lora_adapter(folder, weight_name="pytorch_lora_weights.safetensors")
    path = folder / "pytorch_lora_weights.safetensors"
    from peft import get_peft_model_state_dict

    path.unlink()
    type(pipe).save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(pipe.transformer),
        transformer_lora_adapter_metadata=pipe.transformer.peft_config["default"].to_dict(),
    )


@pytest.mark.parametrize("full", [False, True])
def test_bf16(tmp_path, full):
    """Frozen modules in bf16, trainable ones in float32, a loss near that of float32, and a pipeline that is ready to
    use."""
    BUILDERS["sd3"](0).save_pretrained(tmp_path / "base")
    BUILDERS["sd3"](1).save_pretrained(tmp_path / "teacher")
    exact, trainer = (
        DiffusionOPDTrainer(
            str(tmp_path / "base"),
            str(tmp_path / "teacher"),
            config(tmp_path / "out", bf16=bf16),
            train_dataset=DATA.remove_columns("teacher_id"),
            peft_config=None if full else lora(),
        )
        for bf16 in (False, True)
    )
    exact.train()
    trainer.train()
    assert {p.dtype for p in trainer.trainable_parameters} == {torch.float32}
    frozen = {p.dtype for p in trainer.pipeline.transformer.parameters() if not p.requires_grad}
    assert frozen <= {torch.bfloat16} and trainer.pipeline.text_encoder.dtype == torch.bfloat16
    assert all(p.dtype == torch.bfloat16 for p in denoiser(trainer.loaded_teachers["teacher"].pipeline).parameters())
    assert history(trainer, "loss") == pytest.approx(history(exact, "loss"), rel=3e-2)
    assert history(trainer, "loss") != history(exact, "loss")
    assert torch.isfinite(latents(trainer.pipeline)).all()


@pytest.mark.parametrize("family", ["sd3", "sdxl", "wan"])
def test_an_equal_teacher_has_nothing_to_teach_in_half_precision_either(tmp_path, family):
    """The student is asked through the engine's wrapper, a teacher with a denoiser of its own is not: guidance is
    float32 for both."""
    BUILDERS[family](0).save_pretrained(tmp_path / "base")
    trainer = DiffusionOPDTrainer(
        str(tmp_path / "base"),
        str(tmp_path / "base"),
        config(tmp_path / "out", family, bf16=True),
        train_dataset=DATA.remove_columns("teacher_id"),
        peft_config=lora(),
    )
    trainer.train()
    assert history(trainer, "loss") == [0.0, 0.0]


# Saving and loading


@pytest.mark.parametrize("full", [False, True])
def test_saved_student_is_the_student_in_plain_diffusers(tmp_path, full):
    trainer = trainer_of(tmp_path, full=full, learning_rate=5e-2)
    trainer.train()
    trainer.save_model()
    if full:
        fresh = DiffusionPipeline.from_pretrained(tmp_path)
    else:
        fresh = BUILDERS["sd3"](0)
        fresh.load_lora_weights(str(tmp_path), weight_name="pytorch_lora_weights.safetensors")  # alpha is not rank here
    student, untrained = latents(trainer.pipeline), latents(BUILDERS["sd3"](0))
    assert torch.equal(latents(fresh), student)
    assert not torch.allclose(student, untrained, atol=1e-3)
    assert not (tmp_path / "model.safetensors").exists()


@FAMILIES
def test_every_family_is_saved_loaded_and_resumed(tmp_path, family, full):
    settings = dict(full=full, num_inference_steps=3, save_strategy="steps", save_steps=1)
    trainer = trainer_of(tmp_path / "a", family, **settings)
    assert_trains(trainer)
    trainer.save_model()
    if full:
        fresh = DiffusionPipeline.from_pretrained(tmp_path / "a")
    else:
        fresh = BUILDERS[family](0)
        fresh.load_lora_weights(str(tmp_path / "a"), weight_name="pytorch_lora_weights.safetensors")
    resumed = trainer_of(tmp_path / "b", family, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    assert torch.equal(trained(resumed), trained(trainer))
    for pipe in (trainer.pipeline, fresh):  # matmul rounds differently beside a weight that asks for gradients
        denoiser(pipe).requires_grad_(False)
    student = latents(trainer.pipeline, family)
    assert torch.equal(latents(fresh, family), student)
    assert not torch.equal(latents(BUILDERS[family](0), family), student)


@FAMILIES
def test_teacher_equal_to_the_base_leaves_no_loss_in_any_family(tmp_path, family, full):
    data = Dataset.from_dict({"prompt": PROMPTS})
    trainer = trainer_of(
        tmp_path, family, full=full, teachers=BUILDERS[family](0), data=data, max_steps=1, num_inference_steps=3
    )
    trainer.train()
    assert history(trainer, "loss") == [0.0]


@pytest.mark.parametrize(("full", "ema"), [(False, None), (True, None), (False, 0.8), (True, 0.8)])
def test_resume_is_exact(tmp_path, full, ema):
    settings = dict(full=full, ema_decay=ema, ema_update_every=2, max_steps=4, save_strategy="steps", save_steps=3)
    undisturbed = trainer_of(tmp_path / "a", transition="flow_sde", **settings)
    undisturbed.train()
    resumed = trainer_of(tmp_path / "b", transition="flow_sde", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert torch.equal(trained(undisturbed), trained(resumed))
    assert history(undisturbed, "loss")[-1] == history(resumed, "loss")[-1]
    if ema:
        assert all(
            torch.equal(a, b) for a, b in zip(undisturbed.ema.shadow_params, resumed.ema.shadow_params, strict=True)
        )


def test_resume_with_other_teachers_is_refused(tmp_path):
    trainer_of(tmp_path, save_strategy="steps", save_steps=1).train()
    manifest = json.loads((tmp_path / "checkpoint-1" / "teacher_manifest.json").read_text())
    assert [entry["id"] for entry in manifest["teachers"]] == ["a", "b"]
    other = trainer_of(tmp_path, teachers={"a": BUILDERS["sd3"](1), "b": BUILDERS["sd3"](5)})
    with pytest.raises(ValueError, match="teacher 'b' has other weights"):
        other.train(resume_from_checkpoint=True)
    swapped = trainer_of(tmp_path, teachers={"b": BUILDERS["sd3"](2), "a": BUILDERS["sd3"](1)})
    with pytest.raises(ValueError, match="learnt from the teachers \\['a', 'b'\\]"):
        swapped.train(resume_from_checkpoint=True)


def test_checkpoint_of_another_student_is_refused(tmp_path):
    trainer_of(tmp_path, save_strategy="steps", save_steps=1).train()
    with pytest.raises(ValueError, match=r"was trained with another `peft_config` of the transformer \(r: 4 -> 8"):
        trainer_of(tmp_path, peft_config=lora(r=8)).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(("full", "ema"), [(False, None), (False, 0.5), (True, None)])
@pytest.mark.parametrize("greater_is_better", [True, False])
def test_best_model_is_loaded(tmp_path, greater_is_better, full, ema):
    """Trainer only warns and keeps the last weights."""
    trainer = trainer_of(
        tmp_path,
        full=full,
        eval_dataset=DATA.select(range(4)),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="kl",
        greater_is_better=greater_is_better,
        learning_rate=3e-2,
        ema_decay=ema,
        ema_update_every=1,
    )
    trainer.train()
    values = history(trainer, "eval_kl")
    best = values.index(max(values) if greater_is_better else min(values)) + 1
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    name = "transformer/diffusion_pytorch_model.safetensors" if full else "pytorch_lora_weights.safetensors"
    saved = load_file(tmp_path / f"checkpoint-{best}" / name)
    trainer.save_model()
    now = load_file(tmp_path / name)
    assert saved.keys() == now.keys() and all(torch.equal(saved[key], now[key]) for key in saved)
    assert trainer.evaluate()["eval_kl"] == pytest.approx(values[best - 1], rel=1e-5)


@pytest.mark.parametrize("full", [False, True])
def test_given_state_dict_is_what_is_saved(tmp_path, full):
    """A sharded engine hands over the weights that it gathered."""
    trainer = trainer_of(tmp_path, full=full)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    gathered = {key: value + 1 for key, value in before.items()}
    trainer._save(str(tmp_path), gathered)
    if full:
        saved, expected = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"), gathered
    else:
        saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
        expected = {f"transformer.{k.replace('.default', '')}": v for k, v in gathered.items() if "lora_" in k}
    assert saved.keys() == expected.keys() and all(torch.equal(saved[key], expected[key]) for key in expected)
    after = trainer.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def test_full_checkpoint_holds_the_denoiser_alone(tmp_path):
    trainer = trainer_of(tmp_path, full=True, save_strategy="steps", save_steps=2)
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    assert not (folder / "vae").exists() and not (folder / "model.safetensors").exists()
    saved = SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer").state_dict()
    assert all(torch.equal(saved[key], value) for key, value in trainer.model.state_dict().items())


# The moving average


def test_ema(tmp_path):
    """`save_model`, `trainer.pipeline` and evaluation carry the average; a checkpoint holds both."""
    weights = []

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            weights.append(trained(trainer).clone())

    trainer = trainer_of(
        tmp_path,
        ema_decay=0.9,
        ema_update_every=2,
        max_steps=6,
        save_strategy="steps",
        save_steps=6,
        callbacks=[Record()],
    )
    average = trained(trainer).clone()
    trainer.train()
    for n, current in enumerate(weights[1::2], start=1):
        decay = 0.0 if n == 1 else min(0.9, n / (9 + n))  # diffusers' warm-up, (1 + m) / (10 + m) with m = n - 1
        average = decay * average + (1 - decay) * current
    assert torch.allclose(trained(trainer), average, atol=1e-6)
    state = load_file(tmp_path / "checkpoint-6" / EMA_NAME)
    raw = torch.cat([state[f"raw.{i}"].flatten() for i in range(len(trainer.trainable_parameters))])
    assert torch.equal(raw, weights[-1]) and not torch.equal(raw, trained(trainer))
    checkpoint = load_file(tmp_path / "checkpoint-6" / "pytorch_lora_weights.safetensors")
    trainer.save_model()
    final = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(checkpoint[key], final[key]) for key in final)


# Evaluation, metrics, images, card


def test_evaluation_is_repeatable_and_leaves_no_trace(tmp_path):
    trainer = trainer_of(
        tmp_path, eval_dataset=DATA.select(range(5)), per_device_eval_batch_size=3, transition="flow_sde"
    )
    before = trained(trainer).clone()
    first, second = trainer.evaluate(), trainer.evaluate()
    for key in ("eval_loss", "eval_kl", "eval_kl/a", "eval_kl/b"):
        assert first[key] == second[key] > 0
    mean = (3 * first["eval_kl/a"] + 2 * first["eval_kl/b"]) / 5
    assert first["eval_kl"] == pytest.approx(mean, rel=1e-5)
    assert torch.equal(trained(trainer), before)
    assert all(p.grad is None for p in trainer.model.parameters())


def test_evaluation_does_not_depend_on_how_it_is_cut(tmp_path):
    """Nor on the order of its rows: rows that are equal have noise of their own, whichever is which."""
    data = DATA.select([0, 1, 0, 2, 5])
    trainer = trainer_of(tmp_path, eval_dataset=data, transition="flow_sde")
    forms = [data, data.select([4, 2, 0, 1, 3]), data.to_iterable_dataset()]
    results = []
    for batch, form in [(1, 0), (2, 0), (5, 0), (3, 1), (2, 2)]:
        trainer.args.per_device_eval_batch_size = batch
        results.append(trainer.evaluate(forms[form]))
    for name in ("eval_loss", "eval_kl", "eval_kl/a", "eval_kl/b"):
        values = [result[name] for result in results]
        assert values == pytest.approx([values[0]] * len(values), rel=1e-5), name
    once, twice = (trainer.evaluate(data.select(rows))["eval_kl"] for rows in ([0], [0, 0]))
    assert once != pytest.approx(twice, rel=1e-4)


def test_another_evaluation_dataset_is_routed_as_the_first(tmp_path):
    own = {key: DATA.select(range(i, 6, 2)).select_columns("prompt") for i, key in enumerate("ab")}
    trainer = trainer_of(tmp_path, eval_dataset=own)
    first, again = trainer.evaluate(), trainer.evaluate(own)
    assert all(first[key] == again[key] for key in ("eval_loss", "eval_kl", "eval_kl/a", "eval_kl/b"))
    with pytest.raises(ValueError, match="eval_dataset has no column"):
        trainer.evaluate(own["a"])


def test_a_student_saved_without_its_third_encoder(tmp_path):
    parts = BUILDERS["sd3"](0).components | {"text_encoder_3": None, "tokenizer_3": None}
    StableDiffusion3Pipeline(**parts).save_pretrained(tmp_path / "student")
    trainer = DiffusionOPDTrainer(
        str(tmp_path / "student"),
        BUILDERS["sd3"](1),
        config(tmp_path),
        DATA.remove_columns("teacher_id"),
        peft_config=lora(),
    )
    assert trainer.pipeline.text_encoder_3 is None
    trainer.train()


def test_metrics(tmp_path):
    trainer = trainer_of(tmp_path, transition="flow_sde", objective="velocity")
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    expected = {"loss", "kl", "grad_norm", "learning_rate", "steps_per_second", "samples_per_second"}
    expected |= {f"kl/{t}" for t in "ab"} | {f"loss/{t}" for t in "ab"}
    expected |= {f"kl_step/{j}" for j in range(3)} | {f"loss_step/{j}" for j in range(3)}
    expected |= {"time/teacher", "time/student", "time/encode"}
    assert expected <= entry.keys()
    assert entry["loss"] == pytest.approx((entry["loss/a"] + entry["loss/b"]) / 2, rel=1e-5)
    assert entry["kl"] == pytest.approx(sum(entry[f"kl_step/{j}"] for j in range(3)) / 3, rel=1e-5)
    times = [value for key, value in entry.items() if key.startswith("time/")]
    assert min(times) > 0 and sum(times) <= 1.05 / entry["steps_per_second"]
    assert entry["samples_per_second"] == pytest.approx(4 * entry["steps_per_second"])  # two samples of two tasks


def test_a_log_is_the_mean_of_its_steps(tmp_path):
    runs = [trainer_of(tmp_path, logging_steps=steps) for steps in (1, 2)]
    for trainer in runs:
        trainer.train()
    for key in ("loss", "kl", "kl/a", "kl/b", "kl_step/0", "kl_step/2"):
        each, (both,) = (history(trainer, key) for trainer in runs)
        assert len(each) == 2 and each[0] != each[1]
        assert both == pytest.approx(sum(each) / 2, rel=1e-5)


def test_rates_after_a_resume_count_its_own_steps(tmp_path):
    times = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            times.append(time.perf_counter())

        on_step_end = on_train_begin

    trainer_of(tmp_path, max_steps=8, save_strategy="steps", save_steps=8).train()
    resumed = trainer_of(tmp_path, max_steps=9, callbacks=[Clock()])
    resumed.train(resume_from_checkpoint=True)
    assert len(times) == 2 and history(resumed, "steps_per_second")[-1] < 1 / (times[1] - times[0])


def test_images_and_trackers(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer = trainer_of(
        tmp_path, image_steps=2, max_steps=4, report_to="tensorboard", image_prompts=["a fox", "two birds"]
    )
    trainer.train()
    folders = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert folders == ["step_000002", "step_000004"]
    last = Image.open(tmp_path / "images" / "step_000004" / "01.png")
    assert last.size == (CALL["sd3"]["width"], CALL["sd3"]["height"])
    again = trainer.sample_images(["a fox", "two birds"])
    assert again[1].tobytes() == last.tobytes()
    logs = EventAccumulator(str(next((tmp_path / "logs").rglob("events*")).parent))
    logs.Reload()
    assert [event.step for event in logs.Images("samples")] == [2, 4]
    assert "train/kl/a" in logs.Tags()["scalars"]


def test_video_images(tmp_path):
    trainer = trainer_of(tmp_path, "wan", full=True, max_steps=1, image_steps=None)
    trainer.train()
    assert len(list((tmp_path / "images" / "step_000001").glob("*.png"))) == 4


def test_card(tmp_path):
    trainer = trainer_of(tmp_path, image_steps=None, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.create_model_card(dataset_name="me/prompts", tags="mine")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "diffusers" and card.data.datasets == "me/prompts"
    assert check_card(card.content) == ([], [])
    assert {"diffusion-opd", "trl", "lora", "mine"} <= set(card.data.tags)
    assert [item["text"] for item in card.data.widget] == trainer.image_prompts
    assert all((tmp_path / item["output"]["url"]).is_file() for item in card.data.widget)
    for text in (
        "<Gallery />",
        "load_lora_weights",
        "2605.15055",
        "| `a` |",
        "`transition` | ode",
        "max_sequence_length",
    ):
        assert text in card.text


# Data


def stream(task: str) -> IterableDataset:
    return Dataset.from_dict({"prompt": [f"{task} {i}" for i in range(5)]}).to_iterable_dataset()


def test_streaming_trains_and_resumes(tmp_path):
    settings = dict(max_steps=4, save_strategy="steps", save_steps=2)
    data = {"a": stream("a"), "b": stream("b")}
    undisturbed = trainer_of(tmp_path / "a", data=data, **settings)
    undisturbed.train()
    resumed = trainer_of(tmp_path / "b", data=data, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert torch.equal(trained(undisturbed), trained(resumed))


def test_bare_defaults_run_on_a_laptop(tmp_path, monkeypatch):
    """No `use_cpu=True, bf16=False` to know about; prompts and one teacher are enough."""
    monkeypatch.chdir(tmp_path)
    trainer = DiffusionOPDTrainer(
        BUILDERS["sd3"](0),
        Teacher(BUILDERS["sd3"](1), call_kwargs={"guidance_scale": 1.0}),
        DiffusionOPDConfig("out", max_steps=1, num_inference_steps=2, call_kwargs=CALL["sd3"], report_to="none"),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        peft_config=lora(),
    )
    trainer.train()
    assert math.isfinite(history(trainer, "train_loss")[0]) and history(trainer, "train_loss")[0] > 0
    assert trainer.teachers["teacher"].call_kwargs["guidance_scale"] == 1.0


# What a run must not lose, and what it must refuse


def test_a_run_shorter_than_the_averages_interval_is_not_lost(tmp_path):
    trainer = trainer_of(tmp_path, ema_decay=0.9, ema_update_every=8)
    before = trained(trainer).clone()
    trainer.train()
    raw, averaged = trainer.ema.temp_stored_params, torch.cat([p.flatten() for p in trainer.ema.shadow_params])
    assert raw is None and torch.equal(trained(trainer), averaged) and not torch.equal(averaged, before)


def test_an_averaged_checkpoint_is_not_resumed_without_the_average(tmp_path):
    settings = dict(save_strategy="steps", save_steps=1, max_steps=1)
    trainer_of(tmp_path, ema_decay=0.9, **settings).train()
    with pytest.raises(ValueError, match="saved with `ema_decay`; resume it with"):
        trainer_of(tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_folder_named_checkpoints_gets_the_whole_pipeline(tmp_path):
    trainer = trainer_of(tmp_path / "checkpoints", full=True)
    trainer.save_model()
    DiffusionPipeline.from_pretrained(tmp_path / "checkpoints")


def test_the_last_pictures_reach_the_tracker(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer_of(tmp_path, image_steps=None, report_to="tensorboard", image_prompts=["a fox"]).train()
    logs = EventAccumulator(str(next((tmp_path / "logs").rglob("events*")).parent))
    logs.Reload()
    assert [event.step for event in logs.Images("samples")] == [2]


def test_arguments_serve_two_runs(tmp_path):
    args = config(tmp_path, gradient_checkpointing=True)
    three = {key: BUILDERS["sd3"](seed) for key, seed in (("a", 1), ("b", 2), ("c", 3))}
    data = Dataset.from_dict({"prompt": PROMPTS[:6], "teacher_id": ["a", "b", "c"] * 2})
    first = DiffusionOPDTrainer(BUILDERS["sd3"](0), three, args, data, peft_config=lora())
    second = DiffusionOPDTrainer(BUILDERS["sd3"](0), {key: three[key] for key in "ab"}, args, DATA, peft_config=lora())
    assert [t.args.gradient_accumulation_steps for t in (first, second)] == [3, 2]
    assert all(t.model.is_gradient_checkpointing for t in (first, second))


@pytest.mark.parametrize(
    "change", [{"bias": "lora_only"}, {"init_lora_weights": "pissa"}, {"modules_to_save": ["proj_out"]}]
)
def test_a_student_that_changes_the_shared_backbone_is_refused(tmp_path, change):
    with pytest.raises(ValueError, match="`peft_config` changes the transformer itself"):
        trainer_of(tmp_path, peft_config=lora(**change))


@pytest.mark.parametrize("setting", [{"bf16_full_eval": True}, {"train_sampling_strategy": "sequential"}])
def test_what_trainers_own_loops_would_read_is_refused(tmp_path, setting):
    with pytest.raises(ValueError, match=f"`{next(iter(setting))}="):
        config(tmp_path, **setting)


def test_predict_is_refused(tmp_path):
    with pytest.raises(NotImplementedError, match="use `evaluate` or `sample_images`"):
        trainer_of(tmp_path).predict(DATA)


# The start


def test_the_start_up_check_is_told_of_and_asks_no_larger_batch_than_training(tmp_path, caplog):
    pipe, sizes = BUILDERS["sd3"](0), []

    def look(module, args, kwargs):
        sizes.append(len(kwargs["hidden_states"]))

    pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)
    args = config(tmp_path, per_device_train_batch_size=1)
    with caplog.at_level(logging.WARNING):
        trainer = DiffusionOPDTrainer(pipe, {"a": BUILDERS["sd3"](1), "b": BUILDERS["sd3"](2)}, args, DATA)
    before, after = [record.getMessage() for record in caplog.records]
    assert "on a batch of 1" in before and re.search(r"\(\d+\.\d s\)", after)
    asked = max(sizes)
    sizes.clear()
    trainer.train()
    assert asked == max(sizes) == 2  # with and without the prompt


class LooksUp(StableDiffusion3Pipeline):
    """Prompts were encoded once and for all, and the encoders are not loaded: one of a kind that users of large text
    encoders write."""

    known: dict[str, tuple] = {}

    def encode_prompt(self, prompt, *args, negative_prompt=None, **kwargs):
        texts = [[text or "" for text in (given if isinstance(given, list) else [given])] for given in (prompt, "")]
        texts[1] *= len(texts[0])
        (embeds, pooled), (negative, negative_pooled) = (
            [torch.cat(parts) for parts in zip(*[self.known[text] for text in own], strict=True)] for own in texts
        )
        return embeds, negative, pooled, negative_pooled


def looks_up(seed: int, prompts: list[str]) -> LooksUp:
    whole = BUILDERS["sd3"](seed)
    call = dict(prompt_2=None, prompt_3=None, do_classifier_free_guidance=False, max_sequence_length=32)
    for prompt in (*prompts, ""):
        embeds, _, pooled, _ = whole.encode_prompt(prompt, **call)
        LooksUp.known[prompt] = (embeds, pooled)
    parts = {name: part for name, part in whole.components.items() if "text_encoder" not in name}
    parts = {name: None if "tokenizer" in name else part for name, part in parts.items()}
    pipe = LooksUp(**parts, text_encoder=None, text_encoder_2=None, text_encoder_3=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("kind", ["dataset", "stream"])
def test_a_pipeline_that_looks_up_its_prompts_trains_as_one_that_encodes_them(tmp_path, caplog, kind):
    """It knows the data's own prompts and no other: neither the check nor a warning may ask for "a cat"."""
    LooksUp.known.clear()
    data, images = DATA, dict(image_steps=1, image_prompts=None)
    if kind == "stream":
        data = {key: DATA.filter(lambda row, key=key: row["teacher_id"] == key) for key in ("a", "b")}
        data = {key: part.remove_columns("teacher_id").to_iterable_dataset() for key, part in data.items()}
    losses = []
    for pipes in ([looks_up(seed, PROMPTS) for seed in range(3)], [BUILDERS["sd3"](seed) for seed in range(3)]):
        student, *teachers = pipes
        out = tmp_path / str(len(losses))
        trainer = DiffusionOPDTrainer(
            student, dict(zip("ab", teachers, strict=True)), config(out, **images), data, peft_config=lora()
        )
        with caplog.at_level(logging.WARNING):
            trainer.train()
        losses.append(history(trainer, "loss"))
        trainer.save_model()
        assert len(list((out / "images").rglob("*.png"))) == (8 if kind == "dataset" else 0)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # each prompt was encoded alone
    assert "could not be drawn" not in caplog.text


def test_columns_that_only_another_pipeline_could_use_are_left_alone(tmp_path):
    DiffusionOPDTrainer(
        BUILDERS["sd3"](0),
        BUILDERS["sd3"](1),
        config(tmp_path),
        Dataset.from_dict({"prompt": PROMPTS, "image": PROMPTS, "source": PROMPTS}),
    )


def test_a_metric_that_a_callback_adds_in_evaluation_is_logged(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))

    class Adds(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_mine"] = 10.0 * state.global_step

    trainer = trainer_of(
        tmp_path,
        callbacks=[Adds()],
        eval_dataset=DATA.select(range(4)),
        eval_strategy="steps",
        eval_steps=1,
        report_to="tensorboard",
    )
    trainer.train()
    assert history(trainer, "eval_mine") == [10.0, 20.0] and len(history(trainer, "eval_kl")) == 2
    logs = EventAccumulator(str(next((tmp_path / "logs").rglob("events*")).parent))
    logs.Reload()
    assert [(event.step, event.value) for event in logs.Scalars("eval/mine")] == [(1, 10.0), (2, 20.0)]


@pytest.mark.parametrize("full", [False, True])
def test_files_have_ordinary_modes(tmp_path, full):
    """safetensors writes for this user alone, so that a colleague, or a server of another user, reads nothing."""
    umask = os.umask(0o027)
    try:
        trainer = trainer_of(tmp_path / "run", full=full, save_strategy="steps", save_steps=1, ema_decay=0.9)
        trainer.train()
        trainer.save_model()
    finally:
        os.umask(umask)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} > {".safetensors", ".json", ".pt"}
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o640"}


def test_a_dtype_in_words(tmp_path):
    BUILDERS["sd3"](0).save_pretrained(tmp_path / "model")
    args = config(tmp_path, model_init_kwargs={"dtype": "bfloat16"}, bf16=True)
    trainer = DiffusionOPDTrainer(
        str(tmp_path / "model"), BUILDERS["sd3"](1), args, DATA.remove_columns("teacher_id"), peft_config=lora()
    )
    assert trainer.pipeline.text_encoder.dtype == torch.bfloat16


def test_another_precision_is_not_another_teacher(tmp_path):
    settings = dict(max_steps=1, save_strategy="steps", save_steps=1)
    trainer_of(tmp_path, **settings).train()
    with pytest.raises(ValueError, match="'a' is loaded in torch.bfloat16, .* resume in the same precision"):
        teachers = {key: BUILDERS["sd3"](seed).to(torch.bfloat16) for key, seed in (("a", 1), ("b", 2))}
        trainer_of(tmp_path, teachers=teachers, bf16=True, **settings).train(resume_from_checkpoint=True)


def test_a_full_students_own_weights_in_another_dtype_have_nothing_to_teach(tmp_path, caplog):
    teachers = {"a": BUILDERS["sd3"](0).to(torch.bfloat16), "b": BUILDERS["sd3"](2)}
    with caplog.at_level(logging.WARNING):
        trainer_of(tmp_path, teachers=teachers, full=True, bf16=True)
    assert "Teacher 'a'" in caplog.text and "nothing to learn" in caplog.text and "Teacher 'b'" not in caplog.text


def test_the_card_of_a_video_student(tmp_path):
    trainer = trainer_of(tmp_path, "wan", full=True)
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "text-to-video" and ".frames[0]" in card.text
    assert check_card(card.content) == ([], [])


def test_evaluation_is_not_charged_to_training(tmp_path):
    settings = dict(max_steps=2, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=6)
    trainer = trainer_of(tmp_path, eval_dataset=DATA, **settings)
    trainer.train()
    last = [entry for entry in trainer.state.log_history if "time/teacher" in entry][-1]
    assert last["time/teacher"] < last["time/student"] and trainer.stopwatch.read() == {}


@pytest.mark.parametrize("row", [{"prompt": "a fox", "teacher_id": "c"}, {"prompt": None, "teacher_id": "a"}])
def test_a_stream_to_evaluate_is_looked_at(tmp_path, row):
    rows = Dataset.from_list([row]).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"eval_dataset: .* is no prompt for one of the teachers \['a', 'b'\]"):
        trainer_of(tmp_path, eval_dataset=rows).evaluate()


def test_the_start_up_check_is_small_and_at_the_runs_own_batch(tmp_path):
    """The recipe: ten steps, three LoRA teachers."""
    student, batches = BUILDERS["sd3"](0), []
    hook = student.transformer.register_forward_hook(lambda module, args, output: batches.append(len(output[0])))
    teachers = {name: str(save_peft(tmp_path / name, seed=seed)) for seed, name in enumerate("abc")}
    rows = Dataset.from_dict({"prompt": PROMPTS, "teacher_id": list("abc") * 4})
    args = config(tmp_path, num_inference_steps=10, per_device_train_batch_size=3)
    DiffusionOPDTrainer(student, teachers, args, rows, peft_config=lora())
    hook.remove()
    assert len(batches) <= 20
    per_sample = CALL["sd3"].get("guidance_scale", 7.0) > 1
    assert set(batches) == {3 * (1 + per_sample), 1 + per_sample}  # and one sample alone


def test_guidance_that_depends_on_the_step_is_the_steps_own(tmp_path):
    """An equal teacher leaves no loss at any step, though guidance ends with the third."""
    kwargs = CALL["lumina2"] | {"cfg_trunc_ratio": 0.3}
    settings = dict(num_inference_steps=10, call_kwargs=kwargs, data=DATA.remove_columns("teacher_id"))
    trainer = trainer_of(tmp_path, "lumina2", teachers=BUILDERS["lumina2"](0), **settings)
    trainer.train()
    assert history(trainer, "loss") == [0.0, 0.0]


def test_a_teacher_may_remember_its_steps(tmp_path):
    """It goes with the student from the first step on."""
    data = DATA.remove_columns("teacher_id")
    args = config(tmp_path, call_kwargs={}, num_inference_steps=3)
    trainer = DiffusionOPDTrainer(of(Plain), of(Momentum), args, data, peft_config=lora())
    trainer.train()
    first, *later = (history(trainer, f"kl_step/{step}")[0] for step in range(2))
    assert first == 0.0 and min(later) > 0.0  # of equal weights: the memory begins with the second step


def test_a_student_may_remember_its_steps_where_no_gradient_crosses_them(tmp_path):
    """A teacher of equal weights and an equal memory has nothing to teach it."""
    data = DATA.remove_columns("teacher_id")
    args = config(tmp_path, call_kwargs={}, num_inference_steps=3)
    trainer = DiffusionOPDTrainer(of(Detached), of(Momentum), args, data, peft_config=lora())
    trainer.train()
    assert history(trainer, "loss")[0] == 0.0
    trainer = DiffusionOPDTrainer(of(Detached), of(Plain), args, data, peft_config=lora())
    assert_trains(trainer)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "bf16", "checkpointing"), [("inductor", False, True), ("aot_eager", True, False)])
def test_compiled_blocks_learn_the_same_with_one_graph_a_party(tmp_path, backend, bf16, checkpointing):
    """Two LoRA teachers are adapters of the student's blocks, the third has blocks of its own; activations are
    recomputed after a teacher's adapter was active."""
    teachers = {name: str(save_peft(tmp_path / name, seed=seed)) for seed, name in enumerate("ab", start=1)}
    teachers["c"] = BUILDERS["sd3"](3)
    rows = Dataset.from_dict({"prompt": [f"{i}" for i in range(12)], "teacher_id": ["a", "b", "c"] * 4})
    trainers = []
    compiles = {"torch_compile": True, "torch_compile_backend": backend, "activation_checkpointing": checkpointing}
    for name, settings in {"plain": {}, "compiled": compiles}.items():
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        args = config(tmp_path / name, per_device_train_batch_size=4, transition="flow_sde", bf16=bf16, **settings)
        trainers.append(DiffusionOPDTrainer(BUILDERS["sd3"](0), teachers, args, rows, peft_config=lora()))
        trainers[-1].train()
        trainers[-1].save_model()
    kinds = 2  # the last block of SD3 is of another shape
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4 * kinds
    assert not torch._dynamo.utils.counters["graph_break"]
    plain, compiled = trainers
    assert compiled.model.is_gradient_checkpointing == checkpointing
    assert history(compiled, "loss") == pytest.approx(history(plain, "loss"), rel=1e-5)
    saved = [load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("plain", "compiled")]
    assert saved[0].keys() == saved[1].keys()
    # Adam divides by the gradient's own size, so float32 noise of a tiny gradient is not tiny in the weights
    a, b = (torch.cat([weights[key].flatten() for key in saved[0]]) for weights in saved)
    assert (a - b).norm() / a.norm() < 1e-4


def test_compiling_under_zero3_is_refused(tmp_path):
    pytest.importorskip("deepspeed")
    live = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    assert live.is_zero3()
    for plugin, settings in [("no", {"torch_compile": True}), ("inductor", {})]:
        with pytest.raises(ValueError, match="`torch_compile` does not work with ZeRO-3"):
            take_compilation(TorchDynamoPlugin(backend=plugin), config(tmp_path, **settings))
    assert take_compilation(TorchDynamoPlugin(backend="no"), config(tmp_path)) is None


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_compiling_to_cuda_graphs_is_refused(tmp_path, mode):
    """Which would write a teacher's answer where the student's prediction waits for its gradient."""
    for settings, plugin in [
        ({"torch_compile": True, "torch_compile_mode": mode}, TorchDynamoPlugin(backend="no")),
        ({}, TorchDynamoPlugin(backend="inductor", mode=mode)),
    ]:
        with pytest.raises(ValueError, match=f"`torch_compile_mode='{mode}'` records CUDA graphs"):
            take_compilation(plugin, config(tmp_path, **settings))


def in_fp16(trainer: DiffusionOPDTrainer, scale: float) -> DiffusionOPDTrainer:
    """What accelerate does on a GPU. Only accelerate refuses a CPU; torch's autocast and loss scaler are there too."""
    trainer.args.fp16, accelerator = True, trainer.accelerator
    accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return trainer


def test_fp16_learns_what_fp32_does_and_resumes(tmp_path):
    """The gradients of all learnt steps add up under one scale; a LoRA teacher's adapter is active between a forward
    pass and its recomputation."""
    teachers = {"a": str(save_peft(tmp_path / "a", seed=1)), "b": BUILDERS["sd3"](2)}
    settings = dict(teachers=teachers, max_steps=3, learning_rate=1e-3)
    plain = trainer_of(tmp_path / "plain", **settings)
    plain.train()
    saved = dict(save_strategy="steps", save_steps=2, activation_checkpointing=True)
    half = in_fp16(trainer_of(tmp_path / "half", **settings, **saved), 2.0**10)
    half.train()
    for key, tolerance in (("loss", 2e-3), ("kl/a", 1e-2), ("kl/b", 1e-2), ("grad_norm", 1e-2)):
        assert history(half, key) == pytest.approx(history(plain, key), rel=tolerance), key
        assert history(half, key) != history(plain, key)
    assert (trained(half) - trained(plain)).norm() < 1e-3 * trained(plain).norm()
    resumed = in_fp16(trainer_of(tmp_path / "resumed", **settings, **saved), 2.0**5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    assert torch.equal(trained(resumed), trained(half)) and resumed.accelerator.scaler.get_scale() == 2.0**10


def test_the_loss_scaler_leaves_out_a_step_that_overflows(tmp_path):
    trainer = in_fp16(trainer_of(tmp_path, max_steps=3, learning_rate=1e-3), 2.0**40)
    before = trained(trainer).clone()
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() == 2.0**37 and torch.equal(trained(trainer), before)


def test_a_dtype_that_torch_does_not_have_is_refused(tmp_path):
    BUILDERS["sd3"](0).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="dtype 'bf17' is none of torch's"):
        DiffusionOPDTrainer(
            str(tmp_path / "model"),
            BUILDERS["sd3"](1),
            config(tmp_path, model_init_kwargs={"dtype": "bf17"}),
            DATA.remove_columns("teacher_id"),
            peft_config=lora(),
        )


def test_teachers_wait_in_cpu_memory_and_come_for_their_turn(tmp_path, monkeypatch):
    """Those that wait are not there: where their weights would be there is NaN. The student learns as if all were."""
    teachers = {"a": BUILDERS["sd3"](1), "b": BUILDERS["sd3"](2)}
    there: list[str] = []

    def look(*args):
        own = {key: denoiser(pipeline) for key, pipeline in teachers.items()}
        there.append("".join(key for key, one in own.items() if next(one.parameters()).isfinite().all()))

    settings = dict(max_steps=2, eval_dataset=DATA.select(range(4)), eval_strategy="steps", eval_steps=1)
    monkeypatch.setattr("diffusion_opd.teachers.teachers.Parts", Poisoned)
    trainer = trainer_of(tmp_path / "cpu", teachers=teachers, teacher_placement="cpu", **settings)
    look()
    assert there == [""]
    trainer.model.register_forward_pre_hook(look)
    trainer.train()
    look()
    assert there[1:5] == ["a"] * 3 + ["b"] and set(there[1:-1]) == {"a", "b"} and there[-1] == ""
    plain = trainer_of(tmp_path / "device", **settings)
    plain.train()
    for key in ("loss", "eval_loss", "eval_kl/b"):
        assert history(trainer, key) == history(plain, key)


def test_sharding_teachers_needs_an_engine_that_shards(tmp_path):
    with pytest.raises(ValueError, match="'sharded'` needs an engine that shards parameters"):
        trainer_of(tmp_path, teacher_placement="sharded")
