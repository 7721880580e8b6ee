"""What a user may set, from Python, flags and YAML; what has no meaning is refused before anything is loaded."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from trl import TrlParser

from diffusion_opd import DiffusionGRPOConfig, DiffusionNFTConfig, DiffusionOPDConfig
from diffusion_opd.config import computes_in_bf16
from diffusion_opd.objectives import OBJECTIVES, Objective
from diffusion_opd.transitions import TRANSITIONS, Kernel


def config(**kwargs) -> DiffusionOPDConfig:
    return DiffusionOPDConfig("out", **kwargs)


def parse(*flags: str) -> DiffusionOPDConfig:
    return TrlParser(DiffusionOPDConfig).parse_args_and_config(["--output_dir", "out", *flags])[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without an accelerator")
def test_bare_defaults_work_on_a_laptop():
    bare = config()
    assert (bare.bf16, bare.fp16, bare.mixed_dtype) == (False, False, torch.float32)
    assert bare.device.type in ("cpu", "mps")
    assert parse().bf16 is False
    assert config(bf16=False).bf16 is False and config(use_cpu=True).bf16 is False


def test_defaults_are_the_released_recipe():
    bare = config()
    assert (bare.transition, bare.noise_level, bare.objective) == ("ode", 0.0, "kl")
    assert (bare.num_inference_steps, bare.num_learnt_steps) == (10, 9)  # loss on the first 9 of 10 Euler steps
    assert bare.learning_rate == 3e-4
    assert bare.ema_decay is None and not bare.gradient_checkpointing and not bare.logging_nan_inf_filter
    assert bare.pipeline_kwargs == {}  # the pipeline's own defaults rule


def test_mixed_precision_is_what_frozen_modules_load_in():
    half = config(bf16=True, use_cpu=True)
    assert half.mixed_dtype == torch.bfloat16
    half.bf16, half.fp16 = False, True  # which the config itself refuses here
    assert half.mixed_dtype == torch.float16


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_fp16_without_a_gpu_is_refused_with_advice_that_works():
    with pytest.raises(ValueError, match="`fp16=True` needs a GPU; on a CPU give ") as refused:
        config(fp16=True)
    float32, bfloat16 = (words for words in str(refused.value).split("`") if words.startswith("fp16=False"))
    assert eval(f"config({float32})").mixed_dtype == torch.float32
    assert eval(f"config({bfloat16})").mixed_dtype == torch.bfloat16
    flags = [word for setting in bfloat16.split(", ") for word in f"--{setting}".split("=")]
    assert parse("--fp16", "true", *flags).mixed_dtype == torch.bfloat16


@pytest.mark.parametrize(("major", "default"), [(7, False), (8, True)])
def test_a_gpu_that_emulates_bf16_trains_in_float32(monkeypatch, major, default):
    """A T4 or V100 counts as supporting bfloat16 in torch and transformers, and is slower in it than in float32."""
    properties = SimpleNamespace(major=major)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert computes_in_bf16() is default


def test_a_mac_trains_in_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert not computes_in_bf16()


@pytest.mark.parametrize(
    ("steps", "fraction", "learnt"),
    [
        (10, 0.99, 9),
        (10, 1.0, 10),
        (10, 0.5, 5),
        (10, 0.55, 5),
        (10, 0.01, 1),
        (1, 0.99, 1),
        (4, 0.99, 3),
        (40, 0.3, 12),
    ],
)
def test_learnt_steps(steps: int, fraction: float, learnt: int):
    assert config(num_inference_steps=steps, timestep_fraction=fraction).num_learnt_steps == learnt


@pytest.mark.parametrize(
    ("transition", "noise"), [("ode", 0.0), ("ddim", 0.0), ("flow_sde", 0.7), ("dance_sde", 0.7), ("cps", 0.7)]
)
def test_noise_follows_the_transition(transition: str, noise: float):
    assert config(transition=transition).noise_level == noise


def test_a_stochastic_kernel_may_be_run_without_noise():
    for transition in ("flow_sde", "dance_sde", "cps", "ddim"):
        quiet = config(transition=transition, noise_level=0.0, timestep_fraction=1.0)
        assert (quiet.noise_level, quiet.num_learnt_steps) == (0.0, 10)


def test_a_kernel_says_everything_about_itself_in_its_entry(monkeypatch):
    def step(x, velocity, schedule, index, noise_level):
        raise AssertionError("a config takes no step")

    for own in (
        Kernel("wild", step, is_flow=True, default_noise_level=2.0, is_exact_at_the_end=True),
        Kernel("calm", step, is_flow=False, max_noise_level=0.5),
        Kernel("still", step, is_flow=False, max_noise_level=0.0),
    ):
        monkeypatch.setitem(TRANSITIONS, own.name, own)
    assert [config(transition=name).noise_level for name in ("wild", "calm", "still")] == [2.0, 0.0, 0.0]
    assert config(transition="wild", noise_level=30.0).noise_level == 30.0
    assert config(transition="calm", noise_level=0.5).noise_level == 0.5
    with pytest.raises(ValueError, match=r"the last step of 'wild' has zero std, so its 'kl' is not defined"):
        config(transition="wild", timestep_fraction=1.0)
    with pytest.raises(ValueError, match=r"at most 1 for 'cps' and 'ddim', 0.5 for 'calm'; got 0.6"):
        config(transition="calm", noise_level=0.6)
    with pytest.raises(ValueError, match=r"`transition='still'` has no noise.*choose 'ddim' or 'calm', or leave"):
        config(transition="still", noise_level=0.1)
    assert DiffusionGRPOConfig("out", transition="wild").transition == "wild"
    with pytest.raises(ValueError, match=r"needs a stochastic transition; got `transition='still'`"):
        DiffusionGRPOConfig("out", transition="still")


def test_an_objective_says_everything_about_itself_in_its_entry(monkeypatch):
    def loss(comparison):
        raise AssertionError("a config compares nothing")

    for own in (Objective("loose", loss), Objective("strict", loss, divides_by_std=True, needs_noise=True)):
        monkeypatch.setitem(OBJECTIVES, own.name, own)
    assert config(objective="loose", transition="cps", timestep_fraction=1.0).objective == "loose"
    assert config(objective="strict", transition="cps").objective == "strict"
    with pytest.raises(ValueError, match="`objective='strict'` needs a stochastic transition"):
        config(objective="strict")
    with pytest.raises(ValueError, match="the last step of 'cps' has zero std, so its 'strict' is not defined"):
        config(objective="strict", transition="cps", timestep_fraction=1.0)


def test_what_goes_to_the_pipeline():
    call = config(guidance_scale=4.5, height=512, call_kwargs={"max_sequence_length": 128}).pipeline_kwargs
    assert call == {"guidance_scale": 4.5, "height": 512, "max_sequence_length": 128}
    assert config(guidance_scale=0.0).pipeline_kwargs == {"guidance_scale": 0.0}  # zero is a value


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"transition": "euler"}, ["`transition`", "'euler'", "'flow_sde'"]),
        ({"objective": "ppo"}, ["`objective`", "'ppo'", "'policy_gradient'"]),
        ({"timestep_fraction": 0.0}, ["`timestep_fraction`", "(0, 1]", "0.0"]),
        ({"timestep_fraction": 1.5}, ["`timestep_fraction`", "(0, 1]", "1.5"]),
        ({"timestep_fraction": float("nan")}, ["`timestep_fraction`", "nan"]),
        ({"noise_level": 0.7}, ["'ode'", "has no noise", "0.7", "'flow_sde'"]),
        ({"transition": "flow_sde", "noise_level": -0.1}, ["`noise_level`", "at least 0", "-0.1"]),
        ({"transition": "flow_sde", "noise_level": float("nan")}, ["`noise_level`", "nan"]),
        ({"transition": "cps", "noise_level": 1.2}, ["`noise_level`", "at most 1", "1.2", "'cps'"]),
        ({"transition": "ddim", "noise_level": 1.2}, ["`noise_level`", "at most 1", "1.2", "'ddim'"]),
        ({"objective": "policy_gradient"}, ["'policy_gradient'", "stochastic", "'ode'"]),
        ({"objective": "policy_gradient", "transition": "ddim"}, ["'policy_gradient'", "stochastic", "'ddim'"]),
        (
            {"objective": "policy_gradient", "transition": "flow_sde", "noise_level": 0.0},
            ["'policy_gradient'", "stochastic", "'flow_sde'", "`noise_level=0`"],
        ),
        ({"transition": "cps", "timestep_fraction": 1.0}, ["'cps'", "zero std", "`timestep_fraction`", "10 steps"]),
        ({"transition": "cps", "num_inference_steps": 1}, ["'cps'", "zero std", "1 steps"]),
        ({"num_inference_steps": 0}, ["`num_inference_steps`", "at least 1", "0"]),
        ({"height": 0}, ["`height`", "at least 1"]),
        ({"width": -64}, ["`width`", "-64"]),
        ({"ema_decay": 1.0}, ["`ema_decay`", "[0, 1)", "1.0"]),
        ({"ema_decay": -0.5}, ["`ema_decay`", "-0.5"]),
        ({"ema_update_every": 0}, ["`ema_update_every`", "at least 1"]),
        ({"image_steps": -1}, ["`image_steps`", "-1"]),
        ({"image_num_inference_steps": 0}, ["`image_num_inference_steps`", "at least 1"]),
        ({"call_kwargs": {"latents": None, "prompt": "a"}}, ["['latents', 'prompt']", "the trainer sets them"]),
        (
            {"guidance_scale": 4.5, "call_kwargs": {"guidance_scale": 1.0}},
            ["['guidance_scale']", "give it once", "4.5", "1.0"],
        ),
        ({"width": 64, "call_kwargs": {"width": 32}}, ["['width']", "give it once", "64", "32"]),
        ({"accelerator_config": {"split_batches": True}}, ["'split_batches'", "`per_device_train_batch_size`"]),
    ],
)
def test_what_has_no_meaning_is_refused(kwargs: dict, words: list[str]):
    with pytest.raises(ValueError) as refusal:
        config(**kwargs)
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_velocity_has_a_meaning_where_the_std_is_zero():
    assert config(transition="cps", objective="velocity", timestep_fraction=1.0).num_learnt_steps == 10


# Command line and YAML

FLAGS = [
    *["--transition", "flow_sde", "--noise_level", "0.3", "--objective", "velocity"],
    *["--timestep_fraction", "0.5", "--num_inference_steps", "8", "--guidance_scale", "4.5", "--height", "512"],
    *["--call_kwargs", '{"max_sequence_length": 128, "negative_prompt": "blurry", "skip_guidance_layers": [7, 8]}'],
    *["--model_init_kwargs", '{"text_encoder_3": null, "revision": "main"}'],
    *["--ema_decay", "0.9", "--ema_update_every", "4", "--image_steps", "50", "--image_prompts", "a cat", "a dog"],
    *["--learning_rate", "1e-4", "--bf16", "False"],
]
YAML = """
output_dir: out
transition: flow_sde
noise_level: 0.3
objective: velocity
timestep_fraction: 0.5
num_inference_steps: 8
guidance_scale: 4.5
height: 512
call_kwargs:
  max_sequence_length: 128
  negative_prompt: blurry
  skip_guidance_layers: [7, 8]
model_init_kwargs:
  text_encoder_3: null
  revision: main
ema_decay: 0.9
ema_update_every: 4
image_steps: 50
image_prompts: [a cat, a dog]
learning_rate: 1e-4
bf16: false
"""


def written() -> DiffusionOPDConfig:
    return config(
        transition="flow_sde",
        noise_level=0.3,
        objective="velocity",
        timestep_fraction=0.5,
        num_inference_steps=8,
        guidance_scale=4.5,
        height=512,
        call_kwargs={"max_sequence_length": 128, "negative_prompt": "blurry", "skip_guidance_layers": [7, 8]},
        model_init_kwargs={"text_encoder_3": None, "revision": "main"},
        ema_decay=0.9,
        ema_update_every=4,
        image_steps=50,
        image_prompts=["a cat", "a dog"],
        learning_rate=1e-4,
        bf16=False,
    )


def test_flags_say_what_python_says():
    assert parse(*FLAGS).to_dict() == written().to_dict()


def test_yaml_says_what_python_says_and_flags_override_it(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    parser = TrlParser(DiffusionOPDConfig)
    assert parser.parse_args_and_config(["--config", str(path)])[0].to_dict() == written().to_dict()
    (changed,) = parser.parse_args_and_config(["--config", str(path), "--guidance_scale", "1.0"])
    assert changed.pipeline_kwargs == written().pipeline_kwargs | {"guidance_scale": 1.0}


def test_a_dict_may_be_json():
    assert config(call_kwargs='{"max_sequence_length": 128}').call_kwargs == {"max_sequence_length": 128}


def test_unknown_choices_end_the_command_line(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--objective", "ppo")
    assert end.value.code == 2
    assert "'ppo'" in capsys.readouterr().err


def test_help_names_our_fields(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--help")
    assert end.value.code == 0
    text = capsys.readouterr().out
    for name in (
        "--transition {ode,flow_sde,dance_sde,cps,ddim}",
        "--timestep_fraction",
        "--ema_decay",
        "--call_kwargs",
    ):
        assert name in text


@pytest.mark.parametrize("metric", ["kl", "eval_kl", "kl/ocr", "eval_loss"])
def test_the_best_model_is_the_closest_one(tmp_path, metric):
    """transformers takes the greatest of any metric whose name does not end in "loss"."""
    assert DiffusionOPDConfig(str(tmp_path), metric_for_best_model=metric).greater_is_better is False


# Learning from rewards


def nft(**kwargs) -> DiffusionNFTConfig:
    return DiffusionNFTConfig("out", **kwargs)


def grpo(**kwargs) -> DiffusionGRPOConfig:
    return DiffusionGRPOConfig("out", **kwargs)


def test_defaults_of_learning_from_rewards():
    for make in (nft, grpo):
        bare = make()
        assert (bare.num_generations, bare.num_iterations, bare.scale_rewards) == (8, 1, "group")
        assert bare.per_device_train_batch_size % bare.num_generations == 0  # bare defaults fit together
        assert (bare.advantage_clip, bare.learning_rate, bare.remove_unused_columns) == (5.0, 3e-4, False)
        assert (bare.num_inference_steps, bare.num_learnt_steps) == (10, 9)
        best = make(load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps", eval_steps=500)
        assert (best.metric_for_best_model, best.greater_is_better) == ("reward", True)
    assert (nft().nft_beta, nft().beta, nft().pipeline_kwargs) == (1.0, 1e-4, {"guidance_scale": 1.0})
    assert (nft().old_decay_start, nft().old_decay_rate, nft().old_decay_max) == (0, 0.001, 0.5)
    assert (grpo().loss_type, grpo().noise_level, grpo().beta) == ("grpo", 0.7, 0.0)
    assert grpo().pipeline_kwargs == {} and grpo().transition is None


@pytest.mark.parametrize(
    ("kwargs", "bounds"),
    [
        ({}, (1e-4, 1e-4)),
        ({"loss_type": "grpo_guard"}, (2e-6, 2e-6)),
        ({"loss_type": "grpo_guard", "epsilon": 0.1}, (0.1, 0.1)),
        ({"epsilon": 0.1, "epsilon_high": 0.3}, (0.1, 0.3)),
        ({"epsilon_high": 0.3}, (1e-4, 0.3)),
    ],
)
def test_clip_range_follows_the_loss(kwargs: dict, bounds: tuple):
    assert grpo(**kwargs).clip_range == bounds


@pytest.mark.parametrize(("given", "scale"), [(True, "group"), (False, "none"), ("batch", "batch"), ("none", "none")])
def test_scale_of_rewards_is_trls(given, scale):
    assert nft(scale_rewards=given).scale_rewards == grpo(scale_rewards=given).scale_rewards == scale


SHARED = [
    ({"num_generations": 1}, ["`num_generations`", "at least 2", "1", "the others of its prompt"]),
    ({"num_iterations": 0}, ["`num_iterations`", "at least 1", "0"]),
    ({"steps_per_generation": 0}, ["`steps_per_generation`", "at least 1", "0"]),
    ({"scale_rewards": "task"}, ["`scale_rewards`", "'task'", "'group'", "'batch'", "'none'"]),
    ({"advantage_clip": 0.0}, ["`advantage_clip`", "above 0"]),
    ({"advantage_clip": float("nan")}, ["`advantage_clip`", "nan"]),
    ({"beta": -0.1}, ["`beta`", "at least 0", "-0.1"]),
    ({"beta": float("nan")}, ["`beta`", "nan"]),
    ({"timestep_fraction": 0.0}, ["`timestep_fraction`"]),  # what every config refuses
    ({"call_kwargs": {"generator": None}}, ["['generator']", "the trainer sets them"]),
]


@pytest.mark.parametrize(
    ("make", "kwargs", "words"),
    [
        *((make, *case) for case in SHARED for make in (nft, grpo)),
        (nft, {"nft_beta": 0.0}, ["`nft_beta`", "above 0", "0.0"]),
        (nft, {"old_decay_max": 1.0}, ["`old_decay_max`", "[0, 1)", "1.0"]),
        (nft, {"old_decay_rate": -0.1}, ["`old_decay_rate`", "at least 0", "-0.1"]),
        (nft, {"old_decay_start": -1}, ["`old_decay_start`", "-1"]),
        (nft, {"guidance_scale": 2.0, "call_kwargs": {"guidance_scale": 1.0}}, ["['guidance_scale']", "give it once"]),
        (grpo, {"transition": "euler"}, ["`transition`", "'euler'", "'flow_sde'"]),
        (grpo, {"transition": "ode"}, ["'ode'", "stochastic"]),
        (grpo, {"transition": "ode", "noise_level": 0.0}, ["'ode'", "stochastic", "`DiffusionNFTTrainer`"]),
        (grpo, {"noise_level": 0.0}, ["stochastic", "`noise_level=0.0`"]),
        (grpo, {"noise_level": -0.1}, ["`noise_level`", "-0.1"]),
        (grpo, {"transition": "cps", "noise_level": 1.5}, ["`noise_level`", "at most 1", "1.5", "'cps'"]),
        (grpo, {"loss_type": "dapo"}, ["`loss_type`", "'grpo'", "'grpo_guard'", "'dapo'"]),
        (grpo, {"epsilon": 0.0}, ["`epsilon`", "above 0"]),
        (grpo, {"epsilon_high": -1.0}, ["`epsilon_high`", "above 0", "-1.0"]),
        (grpo, {"sde_window_range": [0, 4]}, ["`sde_window_range`", "needs `sde_window_size`"]),
        (grpo, {"sde_window_size": 10}, ["window of 10 steps", "0 and 9", "9 of 10", "`timestep_fraction`"]),
        (grpo, {"sde_window_size": 0}, ["window of 0 steps"]),
        (grpo, {"sde_window_size": -2}, ["window of -2 steps"]),
        (grpo, {"sde_window_size": 3, "sde_window_range": [4, 6]}, ["window of 3 steps", "4 and 6"]),
        (grpo, {"sde_window_size": 1, "sde_window_range": [4, 4]}, ["4 and 4"]),
        (grpo, {"sde_window_size": 1, "sde_window_range": [-1, 4]}, ["-1 and 4"]),
        (grpo, {"sde_window_size": 1, "sde_window_range": [4, 10]}, ["4 and 10", "9 of 10"]),
        (grpo, {"sde_window_size": 1, "sde_window_range": [4]}, ["`sde_window_range`", "two numbers", "[4]"]),
    ],
)
def test_what_has_no_meaning_for_rewards_is_refused(make, kwargs: dict, words: list[str]):
    with pytest.raises(ValueError) as refusal:
        make(**kwargs)
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.parametrize(
    ("kwargs", "windows"),
    [
        ({}, {(0, 9)}),
        ({"timestep_fraction": 0.5}, {(0, 5)}),
        ({"sde_window_size": 7}, {(0, 7), (1, 8), (2, 9)}),
        ({"sde_window_size": 2, "sde_window_range": [3, 6]}, {(3, 5), (4, 6)}),
        ({"sde_window_size": 3, "sde_window_range": [3, 6]}, {(3, 6)}),
        ({"sde_window_size": 9, "timestep_fraction": 1.0}, {(0, 9), (1, 10)}),
    ],
)
def test_every_place_of_a_window_is_drawn(kwargs: dict, windows: set):
    draw = np.random.default_rng(0).integers
    drawn = [grpo(**kwargs).sde_window(draw) for _ in range(40)]
    assert {(window.start, window.stop) for window in drawn} == windows


@pytest.mark.parametrize(
    ("flag", "weights"),
    [("[1, 0.5]", [1, 0.5]), ('{"a": 1, "b": [1, 2]}', {"a": 1, "b": [1, 2]}), (None, None)],
)
def test_reward_weights_from_a_flag_and_from_yaml(tmp_path, flag, weights):
    flags = ["--output_dir", "out", *(["--reward_weights", flag] if flag else [])]
    path = tmp_path / "run.yaml"
    path.write_text(f"output_dir: out\nreward_weights: {flag or 'null'}\n")
    for arguments in (flags, ["--config", str(path)]):
        (parsed,) = TrlParser(DiffusionGRPOConfig).parse_args_and_config(arguments)
        assert parsed.reward_weights == weights


def test_flags_of_learning_from_rewards():
    flags = ["--num_generations", "4", "--scale_rewards", "batch", "--sde_window_size", "2"]
    flags += ["--sde_window_range", "1", "4", "--loss_type", "grpo_guard", "--epsilon_high", "2e-4"]
    (parsed,) = TrlParser(DiffusionGRPOConfig).parse_args_and_config(["--output_dir", "out", *flags])
    written = grpo(
        num_generations=4,
        scale_rewards="batch",
        sde_window_size=2,
        sde_window_range=[1, 4],
        loss_type="grpo_guard",
        epsilon_high=2e-4,
    )
    assert parsed.to_dict() == written.to_dict()
