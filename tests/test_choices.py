"""The choices besides the paper's: at which states the student learns, what the right answer would have been, what
holds it back, and which task has its turn.

What is expected is computed a second time, by hand: the plain pipeline rolls out with its own loop, everybody's plain
pipeline is asked at each visited state, and the formula is written down again.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusion3Pipeline
from PIL import Image
from torch import Tensor
from transformers import TrainerCallback

from diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer, Teacher
from diffusion_opd.anchor_data import AnchorData
from diffusion_opd.guidance import at_scale, branches, unguided_scale
from diffusion_opd.policy import Policy
from diffusion_opd.queries import QUERIES
from diffusion_opd.startup import check_student
from diffusion_opd.targets import direction, extrapolated, mixed
from tests.editing_pipelines import EDITING, EDITING_CALL
from tests.own_pipelines import Detached, Guided, Late, Momentum, Plain, Unmindful, of
from tests.poisoned import Poisoned
from tests.streaming_pipelines import PICTURES, STREAMING, STREAMING_CALL
from tests.tiny_pipelines import BUILDERS, CALL, denoiser
from tests.training import DATA, PROMPTS, config, guided_by_hand, history, lora, trained, trainer_of
from tests.two_denoisers import TWO, TWO_CALL

GUIDANCE = CALL["sd3"]["guidance_scale"]
STEPS = 4
FLUX = "scheduler vae text_encoder tokenizer text_encoder_2 tokenizer_2 transformer".split()


class Watched(DiffusionOPDTrainer):
    """What a step was made of."""

    def __init__(self, *args, **kwargs):
        self.seeds, self.batches, self.gradients, self.places = [], [], {}, []
        super().__init__(*args, **kwargs)
        trainer = self

        class Catch(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
                found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
                trainer.gradients = trainer.gradients or found

        self.add_callback(Catch())

    def _generators(self, *args):
        generators = super()._generators(*args)
        self.seeds.append([generator.initial_seed() for generator in generators])
        return generators

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.batches.append(inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    def _query(self):
        self.places.append(super()._query())
        return self.places[-1]


def run(out, teachers=None, data=DATA, anchor=None, peft_config=None, **kwargs) -> tuple[Watched, DiffusionPipeline]:
    """One optimizer step, and the student as it was before it."""
    settings: dict[str, Any] = dict(max_steps=1, max_grad_norm=0, num_inference_steps=STEPS, timestep_fraction=1.0)
    trainer = Watched(
        BUILDERS["sd3"](0),
        teachers or {"a": BUILDERS["sd3"](1), "b": BUILDERS["sd3"](2)},
        config(out, **settings | kwargs),
        train_dataset=data,
        peft_config=peft_config or lora(init_lora_weights=False),
        anchor=anchor,
    )
    student = BUILDERS["sd3"](0)
    student.transformer.add_adapter(lora())
    student.transformer.load_state_dict(trainer.model.state_dict(), strict=False)
    trainer.train()
    return trainer, student


class At:
    """A visited state, and everybody's velocity there."""

    def __init__(self, x: Tensor, t: Tensor, prompts: list[str], velocity: Tensor, dt: float):
        self.x, self.t, self.prompts, self.velocity, self.dt = x, t, prompts, velocity, dt

    def of(self, pipeline: DiffusionPipeline, guidance: float = GUIDANCE, prompts: list[str] | None = None) -> Tensor:
        return guided_by_hand(pipeline, self.x, self.t, prompts or self.prompts, guidance)

    def asked(self, *args, **kwargs) -> Tensor:
        with torch.no_grad():
            return self.of(*args, **kwargs)


def by_hand(trainer: Watched, student: DiffusionPipeline, loss_at: Callable[[At, list[dict]], Tensor]) -> Tensor:
    """The mean of `loss_at` over the samples, the learnt states and the micro-batches of the first optimizer step."""
    losses = []
    for batch, seeds, places in zip(trainer.batches, trainer.seeds, trainer.places, strict=True):
        visited: list[At] = []

        def step(velocity, timestep, x, batch=batch, visited=visited, **kwargs):
            dt = (student.scheduler.sigmas[len(visited) + 1] - student.scheduler.sigmas[len(visited)]).item()
            visited.append(At(x, timestep, [row["prompt"] for row in batch], velocity, dt))
            return ((x + dt * velocity).detach(),)

        student.scheduler.step = step
        StableDiffusion3Pipeline.__call__.__wrapped__(
            student,
            prompt=[row["prompt"] for row in batch],
            num_inference_steps=STEPS,
            output_type="latent",
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            **CALL["sd3"],
        )
        losses += [loss_at(visited[place], batch).mean() for place in places]
    return torch.stack(losses).mean()


def mse(x: Tensor) -> Tensor:
    return x.square().flatten(1).mean(1)


def check(trainer: Watched, student: DiffusionPipeline, loss: Tensor) -> None:
    """The first loss and its gradient are these."""
    loss.backward()
    assert history(trainer, "loss")[0] == pytest.approx(loss.item(), rel=1e-4)
    expected = {name: p.grad for name, p in student.transformer.named_parameters() if p.grad is not None}
    assert expected.keys() <= trainer.gradients.keys() and expected
    for name, gradient in expected.items():
        assert (trainer.gradients[name] - gradient).norm() < 1e-4 * gradient.norm() + 1e-9, name


# At which states


@pytest.mark.parametrize(
    ("query", "settings"),
    [
        ("random", dict(num_queries=2)),
        ("beta", dict()),
        ("beta", dict(num_queries=3, query_beta=[0.5, 0.5])),
        ("window", dict(num_queries=2)),
    ],
)
def test_a_query_learns_at_its_states_and_nowhere_else(tmp_path, query, settings):
    trainer, student = run(tmp_path, query=query, objective="velocity", seed=5, **settings)
    places = trainer.places[0]
    assert trainer.places == [places] * 2 and len(places) == settings.get("num_queries", 1)
    if query == "window":
        assert places == list(range(places[0], places[0] + 2))
    teachers = {"a": BUILDERS["sd3"](1), "b": BUILDERS["sd3"](2)}
    check(
        trainer,
        student,
        by_hand(trainer, student, lambda at, rows: mse(at.velocity - at.asked(teachers[rows[0]["teacher_id"]]))),
    )
    assert {key for key in trainer.state.log_history[0] if key.startswith("kl_step")} == {
        f"kl_step/{place}" for place in places
    }


def test_a_query_costs_what_it_learns_from(tmp_path):
    """Nothing is computed after the last state, a teacher is asked where it is needed alone, and there alone the
    student has a gradient."""
    calls = Counter[str]()
    teacher = BUILDERS["sd3"](1)

    def count(who):
        def hook(module, args, kwargs):
            calls[who, torch.is_grad_enabled()] += 1

        return hook

    trainer = Watched(
        BUILDERS["sd3"](0),
        {"a": teacher},
        config(tmp_path, query="random", num_queries=2, max_steps=3, num_inference_steps=8, seed=1),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        peft_config=lora(),
    )
    trainer.model.register_forward_pre_hook(count("student"), with_kwargs=True)
    teacher.transformer.register_forward_pre_hook(count("teacher"), with_kwargs=True)
    trainer.train()
    walked = sum(places[-1] + 1 for places in trainer.places)
    # One pass more for the empty denoiser, to see what a real one answers to its own arguments
    assert calls["student", True] == 6 and calls["student", False] == walked - 6
    assert calls["teacher", False] == 6 and calls["teacher", True] == 0
    assert len({tuple(places) for places in trainer.places}) > 1  # drawn anew


@pytest.mark.parametrize(
    ("goes", "remembers", "student_settings", "teacher_settings"),
    [
        (Plain, Detached, {}, {}),
        (Plain, Late, {}, {}),  # not from its second step on
        (Unmindful, Unmindful, {"guidance_scale": 1.0}, {"guidance_scale": 3.0}),  # under guidance alone
    ],
)
def test_a_teacher_that_remembers_its_steps_takes_every_one(
    tmp_path, goes, remembers, student_settings, teacher_settings
):
    """Its answer at a drawn state is the one that it gives where all states are learnt from."""
    data, said = Dataset.from_dict({"prompt": PROMPTS}), []

    class Told(DiffusionOPDTrainer):
        def _note(self, task, visit, answers, terms):
            said.append((visit.index, answers["teacher"][0].clone()))
            super()._note(task, visit, answers, terms)

    for name, settings in (("all", {}), ("one", dict(query="random", num_queries=1))):
        args = config(
            tmp_path / name, call_kwargs={}, num_inference_steps=6, max_steps=1, seed=2, **settings | student_settings
        )
        teachers = Teacher(of(remembers), **teacher_settings)
        Told(of(goes), teachers, args, data, peft_config=lora()).train()
    *every, (place, answer) = said
    assert place > 2 and torch.equal(dict(every)[place], answer)


def test_a_student_whose_steps_are_one_graph_learns_at_all_of_them(tmp_path):
    args = config(tmp_path, call_kwargs={}, query="random", num_queries=1)
    data = Dataset.from_dict({"prompt": PROMPTS})
    with pytest.raises(ValueError, match="`query='random'` leaves steps out, and the gradient of Momentum crosses"):
        DiffusionOPDTrainer(of(Momentum), of(Plain), args, data, peft_config=lora())


def test_draws_are_the_distributions():
    rng = np.random.default_rng(0)
    chunks = [0] * 16
    counted = Counter(QUERIES["beta"].choose(chunks, 1, rng, (5.0, 2.0))[0] for _ in range(20_000))
    u = np.random.default_rng(1).beta(5.0, 2.0, 200_000)
    for index in range(16):
        share = np.mean((u >= index / 16) & (u < (index + 1) / 16))
        assert counted[index] / 20_000 == pytest.approx(share, abs=0.012)
    assert counted.most_common(1)[0][0] in (12, 13)
    several = [QUERIES["random"].choose(chunks, 4, rng, (1, 1)) for _ in range(4000)]
    assert all(sorted(set(places)) == places and len(places) == 4 for places in several)
    each = Counter(place for places in several for place in places)
    assert all(n / 4000 == pytest.approx(0.25, abs=0.04) for n in each.values()) and len(each) == 16
    starts = Counter(QUERIES["window"].choose(chunks, 5, rng, (1, 1))[0] for _ in range(6000))
    assert set(starts) == set(range(12)) and max(starts.values()) / 6000 < 0.11
    of_chunks = Counter(QUERIES["beta"].choose([0, 0, 1, 1], 1, rng, (50.0, 1.0))[0] for _ in range(4000))
    assert of_chunks[1] + of_chunks[3] > 3800 and 0.45 < of_chunks[1] / 4000 < 0.55
    assert len(QUERIES["beta"].choose(chunks, 16, rng, (5.0, 2.0))) == 16


@pytest.mark.parametrize("family", ["helios", "ltx2", "skyreels_ar"])
def test_streams_and_chunks_are_queried(tmp_path, family):
    """A state of a later chunk, or of some streams: its teacher has come there as the plain pipeline does."""
    prompts = ["a red fox", "two blue birds"]
    data = {"prompt": prompts} | ({"image": PICTURES[family]} if family in PICTURES else {})
    call = dict(STREAMING_CALL[family])
    runs = []
    for seed in (1, 0):
        trainer = Watched(
            STREAMING[family](0),
            {"a": STREAMING[family](seed)},
            config(tmp_path / f"{seed}", query="random", num_queries=1, call_kwargs=call, learning_rate=1e-4, seed=3),
            train_dataset=Dataset.from_dict(data),
            peft_config=lora(),
        )
        trainer.train()
        runs.append(history(trainer, "kl"))
    assert all(0 < kl < math.inf for kl in runs[0])
    # An equal teacher at the first step, after which the student has moved
    assert runs[1][0] < 1e-9


# What the right answer would have been


@pytest.mark.parametrize("objective", ["kl", "velocity"])
def test_extrapolation_from_the_base(tmp_path, objective):
    """The base is asked as the teacher is: under its guidance."""
    teachers = {"a": Teacher(BUILDERS["sd3"](1), guidance_scale=1.0), "b": BUILDERS["sd3"](2)}
    trainer, student = run(tmp_path, teachers, target_extrapolation=1.25, objective=objective)
    base, plain = BUILDERS["sd3"](0), {"a": BUILDERS["sd3"](1), "b": BUILDERS["sd3"](2)}

    def loss(at, rows):
        guidance = {"a": 1.0, "b": GUIDANCE}[key := rows[0]["teacher_id"]]
        teacher, ref = at.asked(plain[key], guidance), at.asked(base, guidance)
        gap = at.velocity - (ref + 1.25 * (teacher - ref))
        return mse(gap) if objective == "velocity" else mse(at.dt * gap) / 2

    check(trainer, student, by_hand(trainer, student, loss))


def test_extrapolation_from_a_named_teacher_and_of_a_full_student(tmp_path):
    trainer, student = run(tmp_path, target_extrapolation=1.5, target_ref="b", objective="velocity")
    plain = {"a": BUILDERS["sd3"](1), "b": BUILDERS["sd3"](2)}

    def loss(at, rows):
        teacher, ref = at.asked(plain[rows[0]["teacher_id"]]), at.asked(plain["b"])
        return mse(at.velocity - (ref + 1.5 * (teacher - ref)))

    check(trainer, student, by_hand(trainer, student, loss))
    settings = dict(target_extrapolation=1.25, anchor="base", max_steps=2, learning_rate=1e-3)
    full = trainer_of(tmp_path / "full", full=True, **settings)
    full.train()
    # At the first step it is the base itself; then it has moved, and the base has not
    assert history(full, "anchor")[0] == 0 and history(full, "anchor")[1] > 0


def test_both_branches_are_matched_apart(tmp_path):
    trainer, student = run(
        tmp_path, guidance_split=0.5, guidance_scale=GUIDANCE, objective="velocity", call_kwargs=no_scale()
    )
    plain = {"a": BUILDERS["sd3"](1), "b": BUILDERS["sd3"](2)}
    parts = []

    def loss(at, rows):
        teacher, k = plain[rows[0]["teacher_id"]], GUIDANCE - 1
        mine, theirs = at.of(student, 1.0), at.asked(teacher, 1.0)
        my_way, their_way = (at.velocity - mine) / k, (at.asked(teacher) - theirs) / k
        parts.append((mse(mine - theirs).mean().item(), mse(my_way - their_way).mean().item()))
        return mse(mine - theirs) + 0.5 * mse(my_way - their_way)

    check(trainer, student, by_hand(trainer, student, loss))
    conditional, guidance = np.mean(parts, 0)
    assert history(trainer, "conditional")[0] == pytest.approx(conditional, rel=1e-4)
    assert history(trainer, "guidance")[0] == pytest.approx(guidance, rel=1e-4)


def no_scale(family: str = "sd3") -> dict[str, Any]:
    return {name: value for name, value in CALL[family].items() if name != "guidance_scale"}


def test_the_kl_of_split_branches_is_that_of_their_steps(tmp_path):
    trainer, student = run(tmp_path, guidance_split=2.0, guidance_scale=GUIDANCE, call_kwargs=no_scale())
    plain = {"a": BUILDERS["sd3"](1), "b": BUILDERS["sd3"](2)}

    def loss(at, rows):
        teacher, k = plain[rows[0]["teacher_id"]], GUIDANCE - 1
        mine, theirs = at.of(student, 1.0), at.asked(teacher, 1.0)
        ways = (at.velocity - mine) / k, (at.asked(teacher) - theirs) / k
        return mse(at.dt * (mine - theirs)) / 2 + 2.0 * mse(at.dt * (ways[0] - ways[1])) / 2

    check(trainer, student, by_hand(trainer, student, loss))


def test_guidance_that_is_no_sum_of_branches_is_refused(tmp_path):
    settings = dict(guidance_split=1.0, guidance_scale=3.5)
    with pytest.raises(ValueError, match="^teacher 'a' .*: FluxPipeline evaluates no second branch"):
        trainer_of(tmp_path, "flux", **settings, call_kwargs=no_scale("flux"))
    rescaled = no_scale("sd15") | {"guidance_rescale": 0.7}
    with pytest.raises(ValueError, match="^teacher 'a' .* StableDiffusionPipeline is not linear in its scale"):
        trainer_of(tmp_path, "sd15", **settings, call_kwargs=rescaled)


@pytest.mark.parametrize(("family", "off"), [("sd3", 1.0), ("zimage", 0.0), ("wan", 1.0), ("flux", None)])
def test_where_guidance_is_off(family, off, tmp_path, caplog):
    """Told by what the denoiser is given, and the branches by hand: Z-Image counts from the conditional one."""
    pipeline, call = BUILDERS[family](0), dict(CALL[family])

    def policy_at(scale: float) -> Policy:
        return Policy(pipeline, STEPS, at_scale(call, scale))

    checked = check_student(policy_at(4.0), {"prompt": ["a fox", "a cat"]}, 1.0)
    assert unguided_scale(policy_at, checked) == off
    if off is None:
        return
    assert branches(policy_at, 4.0, checked) == (off, 4.0 - off)
    rows = []
    hook = denoiser(pipeline).register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len((*args, *kwargs.values())[0])), with_kwargs=True
    )
    with torch.no_grad(), policy_at(off).follow(checked.walk) as follow:
        follow(checked.visits[0])
    hook.remove()
    assert sum(rows) == 2  # one branch of two samples
    trainer_of(tmp_path, family, guidance_scale=1.0, call_kwargs=no_scale(family))
    assert ("is guided at `guidance_scale=1.0`" in caplog.text) == (family == "zimage")


def test_split_branches_of_a_student_that_remembers_its_steps(tmp_path):
    """The student without guidance takes every step too: a drawn state's loss is the one that it has where all are
    learnt from."""
    seen = []

    class Told(DiffusionOPDTrainer):
        def _note(self, task, visit, answers, terms):
            seen.append((visit.index, terms.logged["conditional"].detach()))
            super()._note(task, visit, answers, terms)

    for name, settings in (("all", {}), ("one", dict(query="random", num_queries=1))):
        args = config(
            tmp_path / name,
            **dict(call_kwargs={}, num_inference_steps=6, max_steps=1, seed=2),
            **dict(guidance_split=1.0, guidance_scale=4.0),
            **settings,
        )
        data = Dataset.from_dict({"prompt": PROMPTS})
        Told(of(Guided), of(Guided), args, data, peft_config=lora(init_lora_weights=False)).train()
    *every, (place, answer) = seen
    assert place > 0 and torch.equal(dict(every)[place], answer) and answer.min() > 1e-6


def test_weights_of_samples(tmp_path):
    """The gradient of a sample is its weight times the plain one's."""
    weights = [0.0, 0.25, 1.0, 0.5] * 3
    data = DATA.add_column("trust", weights)
    trainer, student = run(tmp_path, data=data, teacher_weight_column="trust", objective="velocity")
    plain = {"a": BUILDERS["sd3"](1), "b": BUILDERS["sd3"](2)}
    logged = []

    def loss(at, rows):
        gap = at.velocity - at.asked(plain[rows[0]["teacher_id"]])
        trust = torch.tensor([row["trust"] for row in rows])
        logged.append((trust**2 * mse(gap.detach())).mean().item())
        return trust * mse(gap)  # its gradient alone

    expected = by_hand(trainer, student, loss)
    expected.backward()
    assert history(trainer, "loss")[0] == pytest.approx(np.mean(logged), rel=1e-4)
    for name, p in student.transformer.named_parameters():
        if p.grad is not None:
            assert (trainer.gradients[name] - p.grad).norm() < 1e-4 * p.grad.norm() + 1e-9, name
    with pytest.raises(ValueError, match="the data has no column 'confidence', only"):
        run(tmp_path / "b", teacher_weight_column="confidence")
    with pytest.raises(
        ValueError, match=r"the `trust` of row 0 of train_dataset must be a number in \[0, 1\], got 1.5"
    ):
        run(tmp_path / "c", data=DATA.add_column("trust", [1.5] * 12), teacher_weight_column="trust")


def test_targets_are_their_formulas():
    torch.manual_seed(0)
    teacher, ref, own = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    assert torch.allclose(extrapolated(teacher, ref, 1.25), teacher + 0.25 * (teacher - ref), atol=1e-6)
    weight = torch.tensor([0.0, 0.5, 1.0])
    rows = mixed(own, teacher, weight)
    assert torch.equal(rows[0], own[0]) and torch.allclose(rows[2], teacher[2], atol=1e-6)
    assert torch.allclose(rows[1], (own[1] + teacher[1]) / 2, atol=1e-6)
    uncond = torch.randn(3, 2, 4, 4)
    guided = uncond + 4.5 * (ref - uncond)
    assert torch.allclose(direction(guided, ref, 3.5), ref - uncond, atol=1e-5)
    half = extrapolated(teacher.bfloat16(), ref.bfloat16(), 1.25)
    assert half.dtype == torch.float32


@pytest.mark.parametrize("full", [False, True])
def test_the_student_before_training_teaches_guidance(tmp_path, full, monkeypatch):
    """Guidance folding: the base, guided, is what the student without guidance learns. It is not loaded again, and does
    not move with the student."""
    settings = dict(objective="velocity", guidance_scale=1.0, call_kwargs=no_scale(), learning_rate=1e-3, max_steps=2)
    teachers = {"a": Teacher("base", guidance_scale=GUIDANCE), "b": Teacher("base", guidance_scale=2.0)}
    trainer = trainer_of(tmp_path, full=full, teachers=teachers, timestep_fraction=1.0, **settings)
    count = sum(p.numel() for p in trainer.model.parameters())
    trainer.train()
    base = BUILDERS["sd3"](0)
    first = trainer_of(
        tmp_path / "loaded",
        full=full,
        teachers={"a": Teacher(base, guidance_scale=GUIDANCE), "b": Teacher(BUILDERS["sd3"](0), guidance_scale=2.0)},
        timestep_fraction=1.0,
        **settings,
    )
    first.train()
    for key in ("loss", "kl/a", "kl/b"):
        assert history(trainer, key) == pytest.approx(history(first, key), rel=1e-4)
    if not full:
        assert sum(p.numel() for p in trainer.model.parameters()) == count
        assert trainer.teachers["a"].denoiser is trainer.model
    else:  # others are brought in for their tasks; whom several ask stays
        others = {"a": Teacher("base", guidance_scale=GUIDANCE), "b": BUILDERS["sd3"](2)}
        monkeypatch.setattr("diffusion_opd.teachers.teachers.Parts", Poisoned)
        waiting = trainer_of(
            tmp_path / "cpu", full=True, teachers=others, teacher_placement="cpu", anchor="base", **settings
        )
        there = [bool(waiting.teachers[key].denoiser.proj_out.weight.isfinite().all()) for key in others]
        assert there == [True, False]
        waiting.train()
        assert history(waiting, "anchor")[1] > 0
    trainer.save_model(tmp_path / "out")
    assert '"source": "base"' in (tmp_path / "out" / "teacher_manifest.json").read_text()
    with pytest.raises(ValueError, match="the student before training .* has no `scale`, got 0.5"):
        trainer_of(tmp_path, teachers=Teacher("base", scale=0.5), data=DATA.remove_columns("teacher_id"))


def test_a_teacher_reads_trigger_words(tmp_path):
    """CollectionLoRA: what each LoRA is triggered by stands in a column of its teacher's alone."""
    data = DATA.map(lambda row: {"triggered": f"{row['prompt']} in the style of {row['teacher_id']}"})
    teachers = {
        key: Teacher(BUILDERS["sd3"](seed), columns={"prompt": "triggered"}) for key, seed in (("a", 1), ("b", 2))
    }
    trainer, student = run(tmp_path, teachers, data=data, objective="velocity", target_extrapolation=1.5)
    plain, base = {"a": BUILDERS["sd3"](1), "b": BUILDERS["sd3"](2)}, BUILDERS["sd3"](0)

    def loss(at, rows):
        told = [row["triggered"] for row in rows]
        teacher, ref = at.asked(plain[rows[0]["teacher_id"]], prompts=told), at.asked(base, prompts=told)
        return mse(at.velocity - (ref + 1.5 * (teacher - ref)))

    check(trainer, student, by_hand(trainer, student, loss))


def test_a_teacher_sees_a_picture_besides(tmp_path):
    """D-OPSD: the teacher has the student's own weights, and is shown what the student is only told."""
    data = {"prompt": PROMPTS[:4], "reference": pictures(4, 24)}
    call = EDITING_CALL["flux_kontext"]
    given = {name: call[name] for name in ("height", "width", "guidance_scale", "max_sequence_length")}
    teacher = EDITING["flux_kontext"](0)
    student = FluxPipeline(
        **{name: part for name, part in EDITING["flux_kontext"](0).components.items() if name in FLUX}
    )
    own = {key: value for key, value in call.items() if key not in given}
    trainer = DiffusionOPDTrainer(
        student,
        Teacher(teacher, columns={"image": "reference"}, call_kwargs=own),
        config(tmp_path, call_kwargs=given, learning_rate=1e-3, objective="velocity", max_steps=3),
        train_dataset=Dataset.from_dict(data),
        peft_config=lora(),
    )
    trainer.train()
    assert history(trainer, "loss")[0] > 1e-4  # of equal weights, by the picture alone


def test_a_teacher_whose_samples_meet_is_refused(tmp_path):
    """FLUX.2-klein takes a list of two pictures as two for every sample; the student, which is told no pictures, does
    not show that."""
    data = Dataset.from_dict({"prompt": PROMPTS[:4], "reference": pictures(4, 64)})
    call = CALL["flux2_klein"]
    parties = BUILDERS["flux2_klein"](0), Teacher(BUILDERS["flux2_klein"](1), id="a", columns={"image": "reference"})
    with pytest.raises(ValueError, match="^teacher 'a' .* samples of a batch are not independent in Flux2Klein"):
        DiffusionOPDTrainer(*parties, config(tmp_path, call_kwargs=call), data, peft_config=lora())
    alone = config(tmp_path, call_kwargs=call, per_device_train_batch_size=1)
    DiffusionOPDTrainer(BUILDERS["flux2_klein"](0), parties[1], alone, data, peft_config=lora())


# What holds it back


@pytest.mark.parametrize("anchor_objective", ["kl", "velocity"])
def test_an_anchor_to_the_base(tmp_path, anchor_objective):
    settings = dict(anchor="base", anchor_beta=0.5, anchor_objective=anchor_objective)
    trainer, student = run(tmp_path, objective="velocity", **settings)
    plain, base = {"a": BUILDERS["sd3"](1), "b": BUILDERS["sd3"](2)}, BUILDERS["sd3"](0)
    anchors = []

    def loss(at, rows):
        gap = at.velocity - at.asked(base)
        anchor = mse(gap) if anchor_objective == "velocity" else mse(at.dt * gap) / 2
        anchors.append(anchor.mean().item())
        return mse(at.velocity - at.asked(plain[rows[0]["teacher_id"]])) + 0.5 * anchor

    check(trainer, student, by_hand(trainer, student, loss))
    assert history(trainer, "anchor")[0] == pytest.approx(np.mean(anchors), rel=1e-4)
    assert {"anchor/a", "anchor/b", "loss/a", "loss/b"} <= trainer.state.log_history[0].keys()


def test_an_anchor_of_its_own(tmp_path):
    """Flow-OPD's: a teacher that no task has, under its own guidance; it is in the manifest and the card."""
    anchor = Teacher(BUILDERS["sd3"](3), guidance_scale=2.0)
    trainer, student = run(tmp_path, anchor=anchor)
    plain, third = {"a": BUILDERS["sd3"](1), "b": BUILDERS["sd3"](2)}, BUILDERS["sd3"](3)

    def loss(at, rows):
        teacher, held = at.asked(plain[rows[0]["teacher_id"]]), at.asked(third, 2.0)
        return mse(at.dt * (at.velocity - teacher)) / 2 + 0.04 * mse(at.dt * (at.velocity - held)) / 2

    check(trainer, student, by_hand(trainer, student, loss))
    trainer.save_model(tmp_path / "out")
    assert '"anchor"' in (tmp_path / "out" / "teacher_manifest.json").read_text()
    assert trainer.tasks == ["a", "b"]


def test_an_anchor_of_a_student_that_goes_on(tmp_path):
    """The base of a student that started from a LoRA holds that LoRA."""
    first = trainer_of(tmp_path / "first", max_steps=3)
    first.train()
    first.save_model(tmp_path / "lora")
    trainer = DiffusionOPDTrainer(
        BUILDERS["sd3"](0),
        {"a": BUILDERS["sd3"](1), "b": BUILDERS["sd3"](2)},
        config(tmp_path / "second", anchor="base"),
        train_dataset=DATA,
        student_lora=tmp_path / "lora",
    )
    trainer.train()
    assert history(trainer, "anchor")[0] < 1e-12 < history(trainer, "anchor")[1]


def pictures(count: int, size: int = 20) -> list[Image.Image]:
    rng = np.random.default_rng(3)
    return [Image.fromarray(rng.integers(0, 255, (size, size + 4, 3), dtype=np.uint8)) for _ in range(count)]


def test_an_anchor_on_real_pictures(tmp_path):
    """LIFT's flow-matching loss, without guidance: latents by SD3's own formula, and the velocity that carries them to
    the noise."""
    seen = []

    class Spied(Watched):
        def _real_pictures(self, data, batch):
            rows = [data.row(2 * len(seen) + number) for number in range(2)]
            seen.append((rows, super()._real_pictures(data, batch)))
            return seen[-1][1]

    real = Dataset.from_dict({"prompt": [f"real {n}" for n in range(5)], "image": pictures(5)})
    trainer = Spied(
        BUILDERS["sd3"](0),
        {"a": BUILDERS["sd3"](1), "b": BUILDERS["sd3"](2)},
        config(
            tmp_path, max_steps=1, max_grad_norm=0, anchor_data_beta=0.5, timestep_fraction=1.0, objective="velocity"
        ),
        train_dataset=DATA,
        peft_config=lora(init_lora_weights=False),
        anchor_dataset=real,
    )
    student = BUILDERS["sd3"](0)
    student.transformer.add_adapter(lora())
    student.transformer.load_state_dict(trainer.model.state_dict())
    trainer.train()
    plain = {"a": BUILDERS["sd3"](1), "b": BUILDERS["sd3"](2)}
    expected = by_hand(trainer, student, lambda at, rows: mse(at.velocity - at.asked(plain[rows[0]["teacher_id"]])))

    vae, processor, losses = student.vae, student.image_processor, []
    student.scheduler.set_timesteps(STEPS)
    assert [len(calls) for _, calls in seen] == [1, 1]
    for rows, (call,) in seen:
        with torch.no_grad():
            # Cropped to a square, and scaled
            pixels = processor.preprocess([row["image"] for row in rows], 16, 16, resize_mode="crop")
            x_0 = (vae.encode(pixels).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
        assert (call.x_0 - x_0).abs().max() < 1e-4
        sigma, time = student.scheduler.sigmas[call.visit.index], student.scheduler.timesteps[call.visit.index]
        state = (1 - sigma) * x_0 + sigma * call.noise
        velocity = guided_by_hand(student, state, time, [row["prompt"] for row in rows], 1.0)
        losses.append(mse(velocity - (call.noise - x_0)).mean())
    real_loss = torch.stack(losses).mean()
    assert history(trainer, "anchor_data")[0] == pytest.approx(real_loss.item(), rel=1e-4)
    check(trainer, student, expected + 0.5 * real_loss)


def test_every_real_picture_comes_once_before_it_comes_again(tmp_path):
    real = Dataset.from_dict({"prompt": [f"real {n}" for n in range(5)], "image": pictures(5)})
    data = AnchorData(real, BUILDERS["sd3"](0), None, seed=7)
    prompts = [data.row(place)["prompt"] for place in range(10)]
    assert sorted(prompts[:5]) == sorted(prompts[5:]) == [f"real {n}" for n in range(5)] and prompts[:5] != prompts[5:]
    again = AnchorData(real, BUILDERS["sd3"](0), None, seed=7)
    assert again.row(7)["prompt"] == prompts[7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_editing_student_has_an_anchor_on_pictures(tmp_path, dtype):
    """Rows with a source and a target picture; in bfloat16 as from a folder."""
    size = 24
    real = Dataset.from_dict({"prompt": PROMPTS[:4], "image": pictures(4, size), "target_image": pictures(4, size)})
    parties = [EDITING["flux_kontext"](seed).to(dtype=dtype) for seed in (0, 1)]
    trainer = DiffusionOPDTrainer(
        parties[0],
        {"a": parties[1]},
        config(
            tmp_path,
            **dict(call_kwargs=EDITING_CALL["flux_kontext"], learning_rate=1e-4, bf16=dtype == torch.bfloat16),
            anchor_data_beta=0.001,
        ),
        train_dataset=real.remove_columns("target_image"),
        peft_config=lora(),
        anchor_dataset=real,
    )
    trainer.train()
    assert all(0 < loss < 10 for loss in history(trainer, "anchor_data")) and len(history(trainer, "anchor_data")) == 2


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"prompt": ["a"], "picture": pictures(1)}, r"`anchor_dataset` has no column \['image'\], only"),
        ({"prompt": [" "], "image": pictures(1)}, "`anchor_dataset`: the prompt of row 0 must be text"),
        ({"prompt": ["a"], "image": ["nowhere.png"]}, "`anchor_dataset`: the `image` of row 0 .*nowhere.png"),
    ],
)
def test_real_pictures_that_are_none_are_refused(tmp_path, columns, sentence):
    with pytest.raises(ValueError, match=sentence):
        _with_pictures(tmp_path, "sd3", Dataset.from_dict(columns))


def test_where_real_pictures_do_not_fit(tmp_path):
    real = Dataset.from_dict({"prompt": ["a"], "image": pictures(1)})
    with pytest.raises(ValueError, match="WanPipeline makes 5 frame.*, picture 0 has 1"):
        _with_pictures(tmp_path, "wan", real)
    with pytest.raises(TypeError, match="`anchor_dataset` must be a `Dataset`, got list"):
        _with_pictures(tmp_path, "sd3", [1])
    with pytest.raises(ValueError, match="`anchor_data_beta` is for an `anchor_dataset`, and there is none"):
        trainer_of(tmp_path, anchor_data_beta=0.1)
    with pytest.raises(ValueError, match="give `anchor_data_beta` beside `objective='kl'`"):
        DiffusionOPDTrainer(BUILDERS["sd3"](0), BUILDERS["sd3"](1), config(tmp_path), DATA, anchor_dataset=real)


def _with_pictures(out, family, real):
    return DiffusionOPDTrainer(
        BUILDERS[family](0),
        {"a": BUILDERS[family](1)},
        config(out, family, objective="velocity"),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        peft_config=lora(),
        anchor_dataset=real,
    )


@pytest.mark.parametrize("full", [False, True])
def test_two_denoisers_and_one_state(tmp_path, full):
    """A drawn state calls one of them: that one moves, under weight decay too, and the other stays until its turn."""
    trainer = Watched(
        TWO["wan22"](0),
        {"a": TWO["wan22"](1)},
        config(
            tmp_path,
            **dict(call_kwargs=TWO_CALL["wan22"], query="random", num_queries=1, max_steps=6, seed=1),
            anchor=None if full else "base",
        ),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        peft_config=None if full else lora(),
    )
    moved = []

    class Weigh(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.before = {name: _weights(part) for name, part in trainer.student.trained.items()}

        def on_step_end(self, args, state, control, **kwargs):
            now = {name: _weights(part) for name, part in trainer.student.trained.items()}
            moved.append({name for name in now if not torch.equal(now[name], self.before[name])})

    trainer.add_callback(Weigh())
    trainer.train()
    called = [trainer.plan[place].denoisers for (place,) in trainer.places]
    assert moved == called and {frozenset(own) for own in called} == {
        frozenset({"transformer"}),
        frozenset({"transformer_2"}),
    }
    assert at_scale(TWO_CALL["wan22"], 1.0)["guidance_scale_2"] == 1.0


def _weights(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad])


# Whose turn it is


def test_task_weights_are_turns_of_a_cycle(tmp_path):
    trainer, _ = run(tmp_path, task_weights={"b": 3}, max_steps=2)
    assert trainer.args.gradient_accumulation_steps == 4
    tasks = [batch[0]["teacher_id"] for batch in trainer.batches]
    assert [Counter(tasks[:4]), Counter(tasks[4:])] == [Counter(a=1, b=3)] * 2
    seeds = [tuple(own) for own in trainer.seeds]
    assert len(set(seeds)) == 8  # no noise comes twice


def test_one_route_a_step(tmp_path):
    trainer, _ = run(
        tmp_path, task_weights={"b": 3.5}, task_sampling="random", max_steps=12, gradient_accumulation_steps=2
    )
    tasks = [batch[0]["teacher_id"] for batch in trainer.batches]
    pairs = list(zip(tasks[::2], tasks[1::2], strict=True))
    assert all(one == other for one, other in pairs) and {"a", "b"} == set(tasks)
    assert Counter(tasks)["b"] > Counter(tasks)["a"]
    assert len({tuple(own) for own in trainer.seeds}) == 24


MIXED: dict[str, Any] = {
    "plain": {},
    "weighted": dict(task_weights={"b": 2}, per_device_train_batch_size=6),
    "split": dict(guidance_split=0.5, anchor="base"),
    "noisy": dict(transition="flow_sde", query="beta", num_queries=2, timestep_fraction=0.99),
    "ahead": dict(encode_ahead=2, target_extrapolation=1.25),
}


@pytest.mark.parametrize("name", MIXED)
def test_tasks_that_share_a_walk_learn_as_those_that_have_one_each(tmp_path, name):
    """The same samples with the same noise, in batches of another size, which round otherwise."""
    settings = dict(max_steps=3, num_inference_steps=STEPS, timestep_fraction=1.0) | MIXED[name]
    call = dict(CALL["sd3"])
    settings |= dict(guidance_scale=call.pop("guidance_scale"), call_kwargs=call)
    calls: list[list[int]] = [[], []]
    runs = []
    for number, sampling in enumerate(("cycle", "mixed")):
        own = dict(per_device_train_batch_size=4) | settings | dict(task_sampling=sampling)
        if sampling == "cycle":
            own["per_device_train_batch_size"] = 2
        trainer = trainer_of(tmp_path / sampling, **own)
        count = calls[number].append
        trainer.model.register_forward_pre_hook(lambda module, args, kwargs, count=count: count(1), with_kwargs=True)
        trainer.train()
        runs.append(trainer)
    cycle, mixed = runs
    assert mixed.args.gradient_accumulation_steps == 1
    if name == "plain":  # else its denoiser may be that of the base too, which is asked for each task
        assert len(calls[0]) == 2 * len(calls[1])
    for key in ("loss", "kl/a", "kl/b", "grad_norm"):
        assert history(mixed, key) == pytest.approx(history(cycle, key), rel=1e-4)
    assert torch.allclose(trained(mixed), trained(cycle), rtol=0, atol=2e-5 if name == "plain" else 1e-3)


def test_mixed_rows_of_two_kinds_and_of_streams(tmp_path):
    def rows(task):
        yield from ({"prompt": f"{task} {number}"} for number in range(5))

    data = {key: IterableDataset.from_generator(rows, gen_kwargs={"task": key}) for key in ("a", "b")}
    trainer, _ = run(tmp_path, data=data, task_sampling="mixed", per_device_train_batch_size=4, max_steps=2)
    assert [[row["teacher_id"] for row in batch] for batch in trainer.batches] == [["a", "a", "b", "b"]] * 2
    seeds = [seed for own in trainer.seeds for seed in own]
    assert len(seeds) == len(set(seeds)) == 8


def test_what_cannot_be_mixed(tmp_path):
    with pytest.raises(ValueError, match="`per_device_train_batch_size=3` is no multiple of that; use 4"):
        trainer_of(tmp_path, task_sampling="mixed", per_device_train_batch_size=3)
    with pytest.raises(ValueError, match="asks all teachers at once"):
        trainer_of(tmp_path, task_sampling="mixed", teacher_placement="cpu")


def test_a_resumed_run_has_the_same_turns_and_states(tmp_path):
    settings = dict(
        task_weights={"b": 2.0},
        task_sampling="random",
        query="random",
        num_queries=2,
        target_extrapolation=1.25,
        anchor="base",
        max_steps=6,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=3,
    )
    whole = trainer_of(tmp_path / "whole", **settings)
    whole.train()
    again = trainer_of(tmp_path / "whole", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert torch.equal(trained(whole), trained(again))
    assert history(whole, "kl")[3:] == history(again, "kl")[-3:]


def test_weighted_streams(tmp_path):
    def rows(task):
        yield from ({"prompt": f"{task} {number}"} for number in range(5))

    data = {key: IterableDataset.from_generator(rows, gen_kwargs={"task": key}) for key in ("a", "b")}
    trainer, _ = run(tmp_path, data=data, task_weights={"a": 2}, max_steps=2)
    tasks = [batch[0]["teacher_id"] for batch in trainer.batches]
    assert Counter(tasks) == Counter(a=4, b=2)
    drawn = [
        [
            batch[0]["teacher_id"]
            for batch in run(tmp_path / f"{n}", data=data, task_sampling="random", max_steps=8)[0].batches
        ]
        for n in range(2)
    ]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 2


# What does not fit


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(query="last"), "`query` must be one of"),
        (
            dict(num_queries=2),
            "`query='first'` learns at all of the first 9 states .* choose 'random', 'beta' or 'window'",
        ),
        (dict(query="random", num_queries=10), "`num_queries` must be from 1 to 9"),
        (dict(query="random", query_beta=[1.0, 2.0]), "`query_beta` is for `query='beta'`"),
        (dict(query="beta", query_beta=[1.0]), "`query_beta` must hold two numbers above 0"),
        (dict(query="beta", query_beta=[1.0, 0.0]), "`query_beta` must hold two numbers above 0"),
        (dict(target_extrapolation=0.0), "`target_extrapolation` must be above 0"),
        (dict(target_ref="base"), "`target_ref='base'` is what `target_extrapolation` begins at"),
        (dict(guidance_split=-1.0, guidance_scale=4.5), "`guidance_split` must be at least 0"),
        (dict(guidance_split=1.0), "needs a `guidance_scale` above 1 .* got None"),
        (dict(guidance_split=1.0, guidance_scale=1.0), "needs a `guidance_scale` above 1 .* got 1.0"),
        (
            dict(guidance_split=1.0, guidance_scale=4.5, objective="policy_gradient", transition="flow_sde"),
            "`guidance_split` is a sum of two distances",
        ),
        (dict(guidance_split=1.0, guidance_scale=4.5, target_extrapolation=1.25), "leave one out"),
        (
            dict(guidance_split=1.0, guidance_scale=4.5, call_kwargs={"guidance_scale_2": 3.0}),
            "by one scale, and 'guidance_scale_2' is another",
        ),
        (dict(anchor="aesthetic"), "`anchor` must be 'base' or None, .* `anchor=Teacher"),
        (dict(anchor="base", anchor_beta=0.0), "`anchor_beta` must be above 0"),
        (dict(anchor="base", anchor_objective="mse"), "`anchor_objective` must be one of"),
        (dict(task_sampling="shuffled"), "`task_sampling` must be one of"),
        (dict(task_weights={"a": 1.5}), "must be whole numbers, got 1.5 for 'a'"),
        (dict(task_weights={"a": -1}), "must be finite and above 0, got -1 for 'a'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        DiffusionOPDConfig(str(tmp_path), use_cpu=True, **settings)


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        (dict(task_weights={"c": 2}), r"`task_weights` names \['c'\], but the teachers are \['a', 'b'\]"),
        (dict(target_extrapolation=1.5, target_ref="c"), "`target_ref` must be 'base' or one of"),
        (dict(anchor_beta=0.1), "`anchor_beta=0.1` is for an anchor, and there is none"),
        (dict(task_weights={"a": 2}, gradient_accumulation_steps=4), "no? ?.*multiple of the 3 turns of"),
        (dict(guidance_split=1.0, guidance_scale=4.5), "teacher 'a' has `guidance_scale=1.0`, and `guidance_split`"),
    ],
)
def test_what_is_not_there_is_refused(tmp_path, kwargs, sentence):
    teachers = {"a": Teacher(BUILDERS["sd3"](1), guidance_scale=1.0), "b": BUILDERS["sd3"](2)}
    with pytest.raises(ValueError, match=sentence):
        trainer_of(tmp_path, teachers=teachers, **{"call_kwargs": no_scale()} | kwargs)


def test_anchors_that_clash_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`anchor` is given twice"):
        _anchored(tmp_path, "base")
    with pytest.raises(ValueError, match="a teacher has the id 'anchor'"):
        run(tmp_path, {"anchor": BUILDERS["sd3"](1), "b": BUILDERS["sd3"](2)}, anchor=BUILDERS["sd3"](3))


def _anchored(tmp_path, anchor):
    return DiffusionOPDTrainer(
        BUILDERS["sd3"](0),
        {"a": BUILDERS["sd3"](1), "b": BUILDERS["sd3"](2)},
        config(tmp_path, anchor=anchor),
        train_dataset=DATA,
        peft_config=lora(),
        anchor=BUILDERS["sd3"](3),
    )


def test_a_card_names_what_is_not_as_the_paper_has_it(tmp_path):
    trainer, _ = run(tmp_path, query="beta", anchor=Teacher(BUILDERS["sd3"](3)), task_weights={"b": 2})
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "query" in card and "beta" in card and "task_weights" in card and "anchor" in card
    assert "target_extrapolation" not in card
