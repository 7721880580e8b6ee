"""LoRAs as other trainers and hubs spell them: a teacher is what `load_lora_weights` of plain diffusers makes of its
file, at the strength that it gives it, or is refused."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from datasets import Dataset
from diffusers import FluxTransformer2DModel
from peft import get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor

from diffusion_opd import DiffusionOPDTrainer, Teacher
from diffusion_opd.policy import Policy
from diffusion_opd.teachers import hash_tensors
from diffusion_opd.teachers.plain import read_plainly
from tests.adapters import (
    LORA_FILE,
    assert_teaches,
    base_latents,
    by_diffusers,
    draw,
    load,
    lora,
    save_diffusers,
    student_with_lora,
)
from tests.tiny_pipelines import BUILDERS, CALL, LORA_TARGETS, denoiser, frozen
from tests.training import config

Updates = dict[str, tuple[Tensor, Tensor]]  # down and up, by module

ALPHA = 3.0  # of rank 4


def updates(family: str, wanted: str = "", rank: int = 4, seed: int = 1) -> Updates:
    """A LoRA of the attention layers (of the linear layers whose names match)."""
    generator = torch.Generator().manual_seed(seed)
    pattern = re.compile(wanted) if wanted else re.compile(rf".*\.({'|'.join(map(re.escape, LORA_TARGETS))})")
    modules = {
        name: module
        for name, module in denoiser(BUILDERS[family](0)).named_modules()
        if isinstance(module, torch.nn.Linear) and pattern.fullmatch(name)
    }
    return {
        name: (
            0.3 * torch.randn(rank, module.in_features, generator=generator),
            0.3 * torch.randn(module.out_features, rank, generator=generator),
        )
        for name, module in modules.items()
    }


def save(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, folder / LORA_FILE)
    return folder


def prefix(family: str) -> str:
    return "unet." if family in ("sd15", "sdxl") else "transformer."


def spelt(update: Updates, name: Callable[[str], str], down: str, up: str, alpha: float | None = None) -> dict:
    tensors = {}
    for module, (a, b) in update.items():
        tensors |= {f"{name(module)}.{down}": a, f"{name(module)}.{up}": b}
        if alpha is not None:
            tensors[f"{name(module)}.alpha"] = torch.tensor(alpha)
    return tensors


def in_diffusers(family: str, update: Updates) -> dict:
    return spelt(update, lambda module: prefix(family) + module, "lora_A.weight", "lora_B.weight")


# What plain diffusers reads

KOHYA = "lora_down.weight", "lora_up.weight"
AB = "lora_A.weight", "lora_B.weight"


def flat(head: str) -> Callable[[str], str]:
    return lambda module: head + module.replace(".", "_")


def dotted(head: str) -> Callable[[str], str]:
    return lambda module: head + module


def wan_name(module: str) -> str:
    for ours, theirs in {
        "attn1": "self_attn",
        "attn2": "cross_attn",
        "to_out.0": "o",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "ffn.net.0.proj": "ffn.0",
        "ffn.net.2": "ffn.2",
    }.items():
        module = module.replace(ours, theirs)
    return module


def of_original_blocks(family: str, keys: tuple[str, str], name: Callable[[str], str], alpha: float | None) -> dict:
    """FLUX's double blocks as their authors have them: one layer for q, k and v."""
    down, up = keys
    generator = torch.Generator().manual_seed(1)

    def draw_like(*shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=generator)

    tensors = {}
    for module, rows in (("img_attn.qkv", 96), ("txt_attn.qkv", 96), ("img_attn.proj", 32), ("txt_attn.proj", 32)):
        full = name(f"double_blocks.0.{module}")
        tensors |= {f"{full}.{down}": draw_like(4, 32), f"{full}.{up}": draw_like(rows, 4)}
        if alpha is not None:
            tensors[f"{full}.alpha"] = torch.tensor(alpha)
    return tensors


def xlabs() -> dict:
    tensors = {}
    generator = torch.Generator().manual_seed(1)
    for part, rows in (("qkv_lora1", 96), ("qkv_lora2", 96), ("proj_lora1", 32), ("proj_lora2", 32)):
        key = f"double_blocks.0.processor.{part}"
        tensors |= {
            f"{key}.down.weight": 0.3 * torch.randn(4, 32, generator=generator),
            f"{key}.up.weight": 0.3 * torch.randn(rows, 4, generator=generator),
        }
    return tensors


def with_biases(family: str, tensors: dict, of: Callable[[str], str]) -> dict:
    generator = torch.Generator().manual_seed(7)
    ups = [key for key in tensors if key.endswith((".lora_B.weight", ".lora_up.weight"))]
    return tensors | {of(key): 0.3 * torch.randn(len(tensors[key]), generator=generator) for key in ups}


def with_magnitudes(family: str, tensors: dict) -> dict:
    """DoRA: a magnitude for each row of a layer."""
    weights = dict(denoiser(BUILDERS[family](0)).named_parameters())
    ups = [key for key in tensors if key.endswith(".lora_B.weight")]
    modules = [key.removesuffix(".lora_B.weight") for key in ups]
    norms = {m: weights[m.removeprefix(prefix(family)) + ".weight"].norm(dim=1) for m in modules}
    return tensors | {f"{m}.lora_magnitude_vector": 1.3 * norm for m, norm in norms.items()}


def lokr(module_name: Callable[[str], str], family: str = "flux2_klein") -> dict:
    tensors = {}
    generator = torch.Generator().manual_seed(1)
    for module, (a, b) in updates(family, r"transformer_blocks\.0\.attn\.to_[qkv]").items():
        tensors |= {
            f"{module_name(module)}.lokr_w1": 0.3 * torch.randn(4, 4, generator=generator),
            f"{module_name(module)}.lokr_w2": 0.3 * torch.randn(len(b) // 4, a.shape[1] // 4, generator=generator),
            f"{module_name(module)}.alpha": torch.tensor(1.0),
        }
    return tensors


READ: dict[str, Callable[[], dict]] = {
    **{
        f"{family}: kohya": partial(lambda f: spelt(updates(f), flat("lora_unet_"), *KOHYA, alpha=ALPHA), family)
        for family in ("sd15", "sdxl", "qwenimage", "zimage")
    },
    "flux: kohya": lambda: of_original_blocks("flux", KOHYA, flat("lora_unet_"), ALPHA),
    "flux: xlabs": xlabs,
    "flux: OneTrainer": lambda: spelt(updates("flux"), flat("lora_transformer_"), *KOHYA, alpha=ALPHA),
    "flux: alphas": lambda: spelt(updates("flux"), dotted("transformer."), *AB, alpha=ALPHA),
    "flux2_klein: ai-toolkit": lambda: of_original_blocks("flux2_klein", AB, dotted("diffusion_model."), None),
    "flux2_klein: LoKr": lambda: lokr(lambda module: module),
    "qwenimage: Lightning": lambda: spelt(updates("qwenimage"), dotted(""), *KOHYA, alpha=ALPHA),
    "qwenimage: ComfyUI": lambda: spelt(updates("qwenimage"), dotted("diffusion_model."), *KOHYA, alpha=ALPHA),
    "zimage: ComfyUI": lambda: spelt(updates("zimage"), dotted("diffusion_model."), *KOHYA, alpha=ALPHA),
    "ltx: ComfyUI": lambda: spelt(updates("ltx"), dotted("diffusion_model."), *AB),
    "wan: ComfyUI": lambda: spelt(updates("wan"), lambda m: "diffusion_model." + wan_name(m), *KOHYA, alpha=ALPHA),
    "wan: of few steps": lambda: with_biases(
        "wan",
        spelt(updates("wan"), lambda m: "diffusion_model." + wan_name(m), *KOHYA),
        lambda key: key.replace(".lora_up.weight", ".diff_b"),
    ),
    "wan: norms of zeros": lambda: (
        spelt(updates("wan"), lambda m: "diffusion_model." + wan_name(m), *KOHYA)
        | {"diffusion_model.blocks.0.self_attn.norm_q.diff": torch.zeros(24)}
    ),
    "wan: musubi": lambda: spelt(
        updates("wan", r"blocks\..*(to_[qkv]|to_out\.0|proj|net\.2)"),
        lambda m: flat("lora_unet_")(wan_name(m)),
        *KOHYA,
        alpha=ALPHA,
    ),
    **{
        f"{family}: DoRA": partial(lambda f: with_magnitudes(f, in_diffusers(f, updates(f))), family)
        for family in ("sd15", "sdxl", "sd3", "flux", "qwenimage", "zimage", "wan", "ltx", "flux2_klein")
    },
    **{
        f"{family}: biases": partial(
            lambda f: with_biases(f, in_diffusers(f, updates(f)), lambda key: key.replace("weight", "bias")), family
        )
        for family in ("sd15", "sdxl", "sd3", "flux", "wan")
    },
}


@pytest.mark.parametrize("spelling", READ)
def test_a_spelling_that_plain_diffusers_reads(spelling: str, tmp_path):
    family = spelling.partition(":")[0]
    folder = save(tmp_path, READ[spelling]())
    assert_teaches(folder, family, by_diffusers(folder, family))


@pytest.mark.parametrize("family", ["sd3", "sdxl", "flux", "zimage"])
def test_rank_stabilised(family: str, tmp_path):
    folder = save_diffusers(tmp_path, family, use_rslora=True)
    assert_teaches(folder, family, by_diffusers(folder, family))


# Names that wrappers and other programs have left in it: the same LoRA as in diffusers' own spelling

LEFT = {
    "PEFT": lambda key: f"base_model.model.{key}",
    "PEFT twice": lambda key: f"base_model.model.base_model.model.{key}".replace(".weight", ".default.weight"),
    "an adapter's name": lambda key: f"transformer.{key}".replace(".weight", ".my_style.weight"),
    "DDP": lambda key: f"module.{key}",
    "torch.compile": lambda key: f"transformer._orig_mod.{key}",
    "compiled blocks": lambda key: f"transformer.{key}".replace(".0.", ".0._orig_mod.", 1),
    "all of these": lambda key: f"module._orig_mod.base_model.model.{key}".replace(".weight", ".default.weight"),
    "ComfyUI": lambda key: f"diffusion_model.{key}",
    "no prefix": lambda key: key,
}


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux", "flux2_klein", "qwenimage", "zimage", "wan", "ltx"])
def test_names_of_wrappers(family: str, tmp_path):
    update = updates(family)
    plain = save(tmp_path / "plain", in_diffusers(family, update))
    expected = by_diffusers(plain, family)
    bare = spelt(update, dotted(""), *AB)
    for number, (name, key_of) in enumerate(LEFT.items()):
        keys = {key: key_of(key).replace("transformer.", prefix(family), key_of(key).startswith("t")) for key in bare}
        folder = save(tmp_path / str(number), {keys[key]: value for key, value in bare.items()})
        (loaded,) = load(folder, student_with_lora(family))
        assert torch.equal(draw(loaded.pipeline, family, loaded.adapter), expected), name
    assert not torch.allclose(expected, base_latents(family), rtol=1e-2)


def test_alphas_that_are_whole_numbers(tmp_path):
    """diffusers itself asks for floats."""
    tensors = spelt(updates("flux"), dotted("transformer."), *AB, alpha=2.0)
    expected = by_diffusers(save(tmp_path / "floats", tensors), "flux")
    whole = {key: value.long() if key.endswith("alpha") else value for key, value in tensors.items()}
    assert_teaches(save(tmp_path / "whole", whole), "flux", expected)


# Strength


@pytest.mark.parametrize("family", ["sd3", "sdxl", "wan"])
@pytest.mark.parametrize("metadata", [True, False])
def test_a_scale_is_that_of_set_adapters(family: str, metadata: bool, tmp_path):
    folder = save_diffusers(tmp_path, family, metadata=metadata, use_rslora=metadata)
    pipe = BUILDERS[family](0)
    pipe.load_lora_weights(folder, adapter_name="style")
    pipe.set_adapters("style", 0.4)
    expected = draw(pipe, family)
    assert not torch.allclose(expected, by_diffusers(folder, family), rtol=1e-2)
    (loaded,) = load(Teacher(folder, scale=0.4), student_with_lora(family))
    torch.testing.assert_close(draw(loaded.pipeline, family, loaded.adapter), expected)
    (other,) = load(Teacher(folder, scale=0.5), student_with_lora(family))
    assert loaded.sha256 != other.sha256


def test_a_scale_of_what_is_no_lora_is_refused(tmp_path):
    BUILDERS["sd3"](1).transformer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is no LoRA, and has no `scale`"):
        load(Teacher(tmp_path, scale=0.5), BUILDERS["sd3"](0))
    with pytest.raises(ValueError, match="a loaded pipeline has no `scale`"):
        load(Teacher(BUILDERS["sd3"](1), scale=0.5), BUILDERS["sd3"](0))
    with pytest.raises(TypeError, match="`scale` must be a number or a dict of numbers or None, got '0.5'"):
        load(Teacher(tmp_path, scale="0.5"), BUILDERS["sd3"](0))


def test_a_scale_of_a_part_that_is_not_adapted_is_refused(tmp_path):
    folder = save_diffusers(tmp_path, "sd15")
    with pytest.raises(
        ValueError, match=r"`scale` names \['text_encoder', 'unte'\], and the LoRA .* adapts \['unet'\]"
    ):
        load(Teacher(folder, scale={"unte": 0.5, "text_encoder": 1.0}), BUILDERS["sd15"](0))


def test_variants(tmp_path):
    BUILDERS["sd3"](1).save_pretrained(tmp_path / "fp16", variant="fp16")
    BUILDERS["sd3"](1).transformer.save_pretrained(tmp_path / "both")
    BUILDERS["sd3"](2).transformer.save_pretrained(tmp_path / "both", variant="ema")
    expected = [draw(BUILDERS["sd3"](seed)) for seed in (1, 2)]
    for teacher, wanted in (
        (Teacher(tmp_path / "fp16"), expected[0]),
        (Teacher(tmp_path / "fp16", variant="fp16"), expected[0]),
        (Teacher(tmp_path / "fp16", subfolder="transformer"), expected[0]),
        (Teacher(tmp_path / "both"), expected[0]),
        (Teacher(tmp_path / "both", variant="ema"), expected[1]),
    ):
        (loaded,) = load(teacher, BUILDERS["sd3"](0))
        assert torch.equal(draw(loaded.pipeline), wanted)
    for folder in (tmp_path / "fp16", tmp_path / "both"):
        with pytest.raises(ValueError, match="cannot be loaded as a SD3Transformer2DModel.*bf16"):
            load(Teacher(folder, variant="bf16"), BUILDERS["sd3"](0))
    with pytest.raises(ValueError, match="is a LoRA, and has no `variant`"):
        load(Teacher(save_diffusers(tmp_path / "lora"), variant="fp16"), BUILDERS["sd3"](0))


# Encoders


def save_with_encoders(folder: Path, family: str, encoders: list[str], seed: int = 3) -> Path:
    pipe = BUILDERS[family](0)
    frozen(seed, lambda: denoiser(pipe).add_adapter(lora()) or denoiser(pipe))
    for name in encoders:
        # PEFT's own way: that of transformers refuses the newest PEFT there is while it waits for the next
        frozen(seed, lambda name=name: inject_adapter_in_model(lora(target_modules=["q_proj"]), getattr(pipe, name)))
    layers = {f"{name}_lora_layers": get_peft_model_state_dict(getattr(pipe, name)) for name in encoders}
    layers[f"{prefix(family)[:-1]}_lora_layers"] = get_peft_model_state_dict(denoiser(pipe))
    pipe.save_lora_weights(folder, **layers)
    return folder


ENCODERS = [
    ("sd15", ["text_encoder"]),
    ("sdxl", ["text_encoder", "text_encoder_2"]),
    ("sd3", ["text_encoder", "text_encoder_2"]),
    ("flux", ["text_encoder"]),
]


@pytest.mark.parametrize("trains_lora", [True, False])
@pytest.mark.parametrize(("family", "encoders"), ENCODERS)
def test_a_lora_of_the_encoders_too(family: str, encoders: list[str], trains_lora: bool, tmp_path):
    folder = save_with_encoders(tmp_path / "both", family, encoders)
    alone = save_with_encoders(tmp_path / "alone", family, [])
    student = student_with_lora(family) if trains_lora else BUILDERS[family](0)
    before = draw(student, family)
    both, without = load({"both": folder, "alone": alone}, student, trains_lora)
    expected = by_diffusers(folder, family)
    for _ in range(2):
        assert torch.equal(draw(both.pipeline, family, both.adapter), expected)
        assert torch.equal(draw(without.pipeline, family, without.adapter), by_diffusers(alone, family))
        assert torch.equal(draw(student, family), before)  # whose encoder is theirs
    assert not torch.allclose(expected, by_diffusers(alone, family), rtol=1e-2)
    shared = [getattr(both.pipeline, name) is getattr(student, name) for name in encoders]
    assert all(shared) if trains_lora else not any(shared)  # those of a full student are saved with it


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_lora_of_the_encoders_in_half_precision(dtype: torch.dtype, tmp_path):
    folder = save_with_encoders(tmp_path, "sdxl", ["text_encoder", "text_encoder_2"])
    plain, student = BUILDERS["sdxl"](0).to(dtype), BUILDERS["sdxl"](0).to(dtype)
    plain.load_lora_weights(folder)
    (loaded,) = load(folder, student)
    assert torch.equal(draw(loaded.pipeline, "sdxl", loaded.adapter), draw(plain, "sdxl"))


def test_scales_of_parts(tmp_path):
    folder = save_with_encoders(tmp_path, "sd15", ["text_encoder"])
    pipe = BUILDERS["sd15"](0)
    pipe.load_lora_weights(folder, adapter_name="style")
    scale = {"unet": 0.5, "text_encoder": 2.0}
    pipe.set_adapters("style", dict(scale))
    (loaded,) = load(Teacher(folder, scale=scale), student_with_lora("sd15"))
    torch.testing.assert_close(draw(loaded.pipeline, "sd15", loaded.adapter), draw(pipe, "sd15"))


@pytest.mark.parametrize(
    ("family", "encoders"),
    [("sd15", {"te": "text_encoder"}), ("sdxl", {"te1": "text_encoder", "te2": "text_encoder_2"})],
)
def test_kohyas_names_of_the_encoders(family: str, encoders: dict[str, str], tmp_path):
    unet = spelt(updates(family), flat("lora_unet_"), *KOHYA, alpha=ALPHA)
    generator = torch.Generator().manual_seed(2)
    both = dict(unet)
    for short, name in encoders.items():
        width = getattr(BUILDERS[family](0), name).config.hidden_size
        for layer, part in [(0, "q"), (0, "out"), (1, "q"), (1, "out")]:  # diffusers knows the format by `out`
            key = f"lora_{short}_text_model_encoder_layers_{layer}_self_attn_{part}_proj"
            both |= {
                f"{key}.lora_down.weight": torch.randn(4, width, generator=generator),
                f"{key}.lora_up.weight": torch.randn(width, 4, generator=generator),
                f"{key}.alpha": torch.tensor(2.0),
            }
    folder = save(tmp_path / "both", both)
    alone = by_diffusers(save(tmp_path / "unet", unet), family)
    assert not torch.allclose(by_diffusers(folder, family), alone, rtol=1e-2)
    assert_teaches(folder, family, by_diffusers(folder, family))


def test_prompts_are_encoded_with_the_teachers_own_encoders(tmp_path):
    """In a trainer, whose parties share what they have encoded: one step of plain diffusers, at the same state."""
    folder = save_with_encoders(tmp_path / "both", "sd3", ["text_encoder", "text_encoder_2"])
    alone = save_with_encoders(tmp_path / "alone", "sd3", [], seed=4)
    trainer = DiffusionOPDTrainer(
        BUILDERS["sd3"](0),
        {"both": folder, "alone": alone},
        config(tmp_path / "out", max_steps=2, num_inference_steps=1, save_strategy="no"),
        Dataset.from_dict({"prompt": ["a cat", "a dog"] * 2, "teacher_id": ["both", "both", "alone", "alone"]}),
        peft_config=lora(),
    )
    trainer.train()
    prompts, generators = ["a cat", "two dogs"], [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    walk = trainer.student.policy.walk({"prompt": prompts}, generators, lambda step: step.sample)
    with torch.no_grad(), walk:
        visit = next(walk)
        (step,) = visit.steps
        width = step.schedule.levels[1] - step.schedule.levels[0]
        for key, path in (("both", folder), ("alone", alone), ("both", folder)):
            with trainer.teachers[key].follow(walk) as follow:
                (answer,) = follow(visit)
            latents = by_diffusers_in_one_step(path, step.sample, prompts)
            torch.testing.assert_close(step.sample + width * answer, latents)


def by_diffusers_in_one_step(folder: Path, latents: Tensor, prompts: list[str]) -> Tensor:
    pipe = BUILDERS["sd3"](0)
    pipe.load_lora_weights(folder)
    return pipe(prompts, num_inference_steps=1, latents=latents, output_type="latent", **CALL["sd3"])[0]


def test_a_students_lora_adapts_denoisers_only(tmp_path):
    folder = save_with_encoders(tmp_path, "sd15", ["text_encoder"])
    with pytest.raises(ValueError, match="`student_lora`: .* adapts the text_encoder too"):
        DiffusionOPDTrainer(
            BUILDERS["sd15"](0),
            {"t": folder},
            config(tmp_path / "out", "sd15"),
            Dataset.from_dict({"prompt": ["a cat"] * 2, "teacher_id": ["t"] * 2}),
            student_lora=str(folder),
        )


# What does more than adding a LoRA has a denoiser of its own


def test_a_lokr_leaves_the_student_alone(tmp_path):
    folder = save(tmp_path, lokr(lambda module: module))
    student = student_with_lora("flux2_klein")
    before, parameters = draw(student, "flux2_klein"), [id(p) for p in student.transformer.parameters()]
    (loaded,) = load(folder, student)
    assert torch.equal(draw(loaded.pipeline, "flux2_klein", loaded.adapter), by_diffusers(folder, "flux2_klein"))
    assert torch.equal(draw(student, "flux2_klein"), before)
    assert [id(p) for p in student.transformer.parameters()] == parameters
    assert not any(p.requires_grad for p in loaded.pipeline.transformer.parameters())


def test_norms_that_a_control_lora_replaces(tmp_path):
    """As BFL's: beside a LoRA it holds norms, which are put in the place of the base's."""
    norms = {
        f"transformer.transformer_blocks.0.attn.norm_{part}.weight": torch.full((16,), value)
        for part, value in (("q", 2.0), ("k", 0.5))
    }
    folder = save(tmp_path, in_diffusers("flux", updates("flux")) | norms)
    without = save(tmp_path / "without", in_diffusers("flux", updates("flux")))
    student = student_with_lora("flux")
    before = draw(student, "flux")
    (loaded,) = load(folder, student)
    assert torch.equal(draw(loaded.pipeline, "flux", loaded.adapter), by_diffusers(folder, "flux"))
    assert not torch.allclose(by_diffusers(folder, "flux"), by_diffusers(without, "flux"), rtol=1e-2)
    other = save(tmp_path / "other", in_diffusers("flux", updates("flux")) | {k: 2 * v for k, v in norms.items()})
    assert load(other, BUILDERS["flux"](0))[0].sha256 != loaded.sha256
    assert torch.equal(draw(student, "flux"), before)


def bfls_control_lora(rank: int = 2) -> dict[str, Tensor]:
    """FLUX.1's as its authors publish it, for all 19 and 38 blocks: its picture is half of what goes in."""
    width = 3072
    layers = {
        "img_in": (width, 128),
        "txt_in": (width, 4096),
        "final_layer.linear": (64, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    for name, columns in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        layers |= {f"{name}.in_layer": (width, columns), f"{name}.out_layer": (width, width)}
    norms = []
    for index in range(19):
        for side in ("img", "txt"):
            block = f"double_blocks.{index}.{side}"
            layers |= {
                f"{block}_mod.lin": (6 * width, width),
                f"{block}_attn.qkv": (3 * width, width),
                f"{block}_attn.proj": (width, width),
                f"{block}_mlp.0": (4 * width, width),
                f"{block}_mlp.2": (width, 4 * width),
            }
            norms += [f"{block}_attn.norm.{kind}_norm.scale" for kind in ("query", "key")]
    for index in range(38):
        block = f"single_blocks.{index}"
        layers |= {
            f"{block}.modulation.lin": (3 * width, width),
            f"{block}.linear1": (7 * width, width),
            f"{block}.linear2": (width, 5 * width),
        }
        norms += [f"{block}.norm.{kind}_norm.scale" for kind in ("query", "key")]
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.rand(128, generator=generator) for name in norms}
    for name, (rows, columns) in layers.items():
        tensors |= {
            f"{name}.lora_A.weight": torch.rand(rank, columns, generator=generator),
            f"{name}.lora_B.weight": torch.rand(rows, rank, generator=generator),
            f"{name}.lora_B.bias": torch.rand(rows, generator=generator),
        }
    return tensors


def test_the_control_lora_of_bfl_is_read_whole():
    """Its converter knows one size alone: FLUX.1 in its full size, without weights."""
    pipe, file = BUILDERS["flux"](0), bfls_control_lora()
    with init_empty_weights():
        pipe.transformer = FluxTransformer2DModel(guidance_embeds=True)
    plain = read_plainly(pipe, "transformer", file, None, {})
    assert plain.changes_base and not plain.unread and not plain.missing
    tensors = plain.adapters["transformer"].tensors
    assert tensors["x_embedder.lora_A.weight"].shape == (2, 128)
    qkv = file["double_blocks.18.txt_attn.qkv.lora_B.weight"].chunk(3)
    for part, expected in zip("qkv", qkv, strict=True):
        assert torch.equal(tensors[f"transformer_blocks.18.attn.add_{part}_proj.lora_B.weight"], expected)


# What is left out is refused by name


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("wan", {"diffusion_model.blocks.0.self_attn.norm_q.diff": torch.ones(24)}),
        ("sd3", {"transformer.transformer_blocks.0.attn.to_q.alpha": torch.tensor(1.0)}),
        ("sdxl", {"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.alpha": torch.tensor(1.0)}),
        ("sd15", {"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.dora_scale": torch.ones(32)}),
        ("sd3", {"text_encoder_3.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight": torch.ones(4, 32)}),
        ("sdxl", {"text_encoder_7.layers.0.q_proj.lora_A.weight": torch.ones(4, 32)}),
        ("qwenimage", {"anything": torch.ones(3)}),
        ("zimage", {"context": torch.ones(3)}),
        ("ltx", {"transformer.transformer_blocks.0.attn1.norm_q.diff": torch.ones(32)}),
        ("flux2_klein", {"transformer.transformer_blocks.0.attn.norm_q.diff_b": torch.ones(32)}),
    ],
)
def test_a_tensor_that_reaches_nothing_is_named(family: str, more: dict, tmp_path):
    name = (lambda m: "diffusion_model." + wan_name(m)) if family == "wan" else dotted(prefix(family))
    folder = save(tmp_path, spelt(updates(family), name, *AB) | more)
    with pytest.raises(ValueError) as refused:
        load(Teacher(folder, id="t"), BUILDERS[family](0))
    sentence = str(refused.value)
    assert sentence.startswith("teacher 't': ") and "\n" not in sentence and len(sentence) < 700
    assert next(iter(more)) in sentence, sentence


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
@pytest.mark.parametrize("kind", ["hada_w1_a", "lokr_w1"])
def test_adapters_of_other_kinds_are_refused(family: str, kind: str, tmp_path):
    name = flat("lora_unet_") if family == "sdxl" else dotted("transformer.")
    folder = save(tmp_path, {f"{name(module)}.{kind}": a for module, (a, _) in updates(family).items()})
    with pytest.raises(ValueError, match=r"^teacher 't': the LoRA .* does not read, with keys as") as refused:
        load(Teacher(folder, id="t"), BUILDERS[family](0))
    assert "\n" not in str(refused.value) and kind in str(refused.value)


def test_reading_leaves_the_student_as_it_was(tmp_path):
    student = student_with_lora("sdxl")
    before = {
        key: hash_tensors(part.state_dict()) for key, part in student.components.items() if hasattr(part, "state_dict")
    }
    config_before, keys = dict(student.config), set(vars(student))
    load(save_with_encoders(tmp_path / "a", "sdxl", []), student)
    with pytest.raises(ValueError):
        load(save(tmp_path / "b", in_diffusers("sdxl", updates("sdxl")) | {"x": torch.ones(1)}), student)
    for key, part in student.components.items():
        if key in before and key != "unet":
            assert hash_tensors(part.state_dict()) == before[key], key
    assert dict(student.config) == config_before and set(vars(student)) == keys
    assert Policy(student, 2).name == "StableDiffusionXLPipeline"
