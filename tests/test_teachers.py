"""Teachers predict what plain diffusers and PEFT make of their files, side by side; what does not fit is refused."""

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from peft import (
    LoHaConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file

from diffusion_opd import Teacher
from diffusion_opd.adapters import STUDENT_ADAPTER, frozen_copy
from diffusion_opd.denoisers import denoisers_of
from diffusion_opd.policy import tuner_layers
from diffusion_opd.teachers import check_manifest, manifest, manifest_of, name_teachers
from tests.adapters import (
    LORA_FILE,
    assert_teaches,
    by_diffusers,
    by_peft,
    draw,
    load,
    lora,
    save_diffusers,
    save_peft,
    student_with_lora,
    with_lora,
)
from tests.launched import held_port
from tests.tiny_pipelines import BUILDERS, LORA_TARGETS, clip, clip_tokenizer, denoiser, frozen

PEFT_FILES = "adapter_config.json", "adapter_model.safetensors"


def refusal(teacher: Any, student: DiffusionPipeline | None = None, trains_lora: bool = True) -> str:
    """The sentence with which a teacher is refused."""
    with pytest.raises(ValueError) as error:
        load(teacher, student or BUILDERS["sd3"](0), trains_lora)
    sentence = str(error.value)
    assert "\n" not in sentence
    return sentence


def assert_words(sentence: str, *words: str) -> None:
    assert all(word in sentence for word in words), sentence


# Names


@pytest.mark.parametrize(
    ("teachers", "ids"),
    [
        ("me/aesthetic", ["aesthetic"]),
        (Path("/models/ocr"), ["ocr"]),
        (Teacher("quanhaol/DiffusionOPD", subfolder="AesTeacher/lora"), ["AesTeacher"]),
        (Teacher("me/aesthetic", subfolder="transformer"), ["aesthetic"]),
        ([Teacher("me/a/lora"), Teacher("me/a", id="b"), "me/c"], ["a", "b", "c"]),
        (("me/a", "me/b"), ["a", "b"]),
        ({"x": "me/a", "y": Teacher("me/a"), "z": Teacher("me/a", id="z")}, ["x", "y", "z"]),
        ("lora", ["teacher"]),
    ],
)
def test_ids(teachers: Any, ids: list[str]):
    named = name_teachers(teachers)
    assert list(named) == [teacher.id for teacher in named.values()] == ids


def test_loaded_pipelines_have_the_ids_they_are_given():
    pipe = BUILDERS["sd3"](1)
    assert list(name_teachers(pipe)) == ["teacher"]
    assert list(name_teachers({"a": pipe, "b": pipe})) == ["a", "b"]
    with pytest.raises(ValueError, match="set `Teacher"):
        name_teachers([pipe, pipe])


def test_naming_leaves_the_users_objects_alone():
    teacher = Teacher("me/a")
    name_teachers({"x": teacher})
    assert teacher.id is None


@pytest.mark.parametrize(
    ("teachers", "error", "words"),
    [
        ([], ValueError, ["empty"]),
        ({}, ValueError, ["empty"]),
        (["me/a", "you/a"], ValueError, ["unique", "['a']", "id="]),
        ({"x": Teacher("me/a", id="y")}, ValueError, ["'x'", "'y'"]),
        ([1], TypeError, ["int", "1", "`Teacher`"]),
        (None, TypeError, ["NoneType"]),
        (["me/a", None], TypeError, ["NoneType"]),
    ],
)
def test_refused_names(teachers: Any, error: type, words: list[str]):
    with pytest.raises(error) as refused:
        name_teachers(teachers)
    assert_words(str(refused.value), *words)


def test_own_arguments_go_over_the_students():
    teacher = Teacher("me/a", guidance_scale=1.0, call_kwargs={"negative_prompt": "blurry"})
    assert teacher.overrides == {"guidance_scale": 1.0, "negative_prompt": "blurry"}
    assert Teacher("me/a").overrides == {}


# LoRAs


@pytest.mark.parametrize("family", ["sd3", "flux", "wan", "sdxl", "sd15", "pixart_sigma"])
def test_lora_in_peft_format(family: str, tmp_path):
    folder = save_peft(tmp_path / "lora", family, use_rslora=True)
    assert_teaches(str(folder), family, by_peft(folder, family))


def test_lora_laid_out_as_the_published_ones(tmp_path):
    for seed, name in enumerate(("AesTeacher", "OCRTeacher"), start=1):
        save_peft(tmp_path / name / "lora", seed=seed)
        assert set(PEFT_FILES) <= {file.name for file in (tmp_path / name / "lora").iterdir()}
    teachers = [Teacher(tmp_path, subfolder=f"{name}/lora") for name in ("AesTeacher", "OCRTeacher")]
    loaded = load(teachers, student_with_lora())
    assert [teacher.id for teacher in loaded] == ["AesTeacher", "OCRTeacher"]
    for teacher in loaded:
        expected = by_peft(tmp_path / teacher.id / "lora", "sd3")
        assert torch.equal(draw(teacher.pipeline, adapter=teacher.adapter), expected)


@pytest.mark.parametrize("metadata", [True, False])
@pytest.mark.parametrize("family", ["sd3", "flux", "wan", "sdxl", "sd15"])
def test_lora_in_diffusers_format(family: str, metadata: bool, tmp_path):
    patterns = {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k": 3}}
    folder = save_diffusers(tmp_path / "lora", family, metadata=metadata, **patterns)
    assert_teaches(folder, family, by_diffusers(folder, family))


def test_without_metadata_alpha_is_the_rank(tmp_path):
    known = save_diffusers(tmp_path / "known", r=3, lora_alpha=3)
    unknown = save_diffusers(tmp_path / "unknown", metadata=False, r=3, lora_alpha=17)
    assert load_file(known / LORA_FILE).keys() == load_file(unknown / LORA_FILE).keys()
    assert_teaches(unknown, "sd3", by_diffusers(known, "sd3"))


def test_a_module_whose_name_ends_anothers(tmp_path):
    """FLUX's last `proj_out` alone is adapted, and `single_transformer_blocks.0.proj_out` is not taken for it."""
    folder = save_diffusers(tmp_path, "flux", metadata=False, target_modules="proj_out")
    assert len(load_file(folder / LORA_FILE)) == 2
    assert_teaches(folder, "flux", by_diffusers(folder, "flux"))


def test_lora_file_of_another_name(tmp_path):
    folder = save_diffusers(tmp_path)
    (folder / LORA_FILE).rename(folder / "style.safetensors")
    expected = by_diffusers(folder, "sd3", "style.safetensors")
    assert_teaches(Teacher(folder, weight_name="style.safetensors"), "sd3", expected)


def test_the_only_file_of_a_folder_is_the_lora(tmp_path):
    folder = save_diffusers(tmp_path / "me" / "lora")
    (folder / LORA_FILE).rename(folder / "my_style.safetensors")
    (folder / "README.md").touch()
    expected = by_diffusers(folder, "sd3", "my_style.safetensors")
    assert_teaches(str(folder), "sd3", expected)
    assert_teaches(Teacher(tmp_path / "me", subfolder="lora"), "sd3", expected)
    shutil.copy(folder / "my_style.safetensors", folder / "its_ema.safetensors")
    assert refusal(Teacher(folder, id="style")) == (
        f"teacher 'style': '{folder}' holds 2 safetensors files (its_ema.safetensors, my_style.safetensors); name the "
        "LoRA among them by `weight_name`."
    )
    assert_teaches(Teacher(folder, weight_name="my_style.safetensors"), "sd3", expected)


def kohya(module: str) -> str:
    return "lora_unet_" + module.replace(".", "_")


def save_kohya(folder: Path, family: str, alphas: Callable[[int], float], rank: int = 4) -> Path:
    """As kohya-ss saves it: flattened names, down and up, an alpha for each module."""
    raw = get_peft_model_state_dict(with_lora(family, 1, lora(r=rank, lora_alpha=rank)))
    tensors = {}
    for number, key in enumerate(sorted(key for key in raw if key.endswith("lora_A.weight"))):
        name = kohya(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        tensors |= {
            f"{name}.lora_down.weight": raw[key],
            f"{name}.lora_up.weight": raw[key.replace("lora_A", "lora_B")].contiguous(),
            f"{name}.alpha": torch.tensor(alphas(number)),
        }
    folder.mkdir()
    save_file(tensors, folder / LORA_FILE)
    return folder


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_lora_of_kohya(family: str, tmp_path):
    folder = save_kohya(tmp_path / "lora", family, alphas=lambda number: 1.0)
    assert_teaches(folder, family, by_diffusers(folder, family))


def test_lora_of_kohya_with_several_alphas(tmp_path):
    """diffusers takes the commonest alpha for all attention layers, and the teacher is what diffusers makes of it."""
    folder = save_kohya(tmp_path / "lora", "sd15", alphas=lambda number: [2.0, 8.0, 8.0][number % 3])
    assert_teaches(folder, "sd15", by_diffusers(folder, "sd15"))


def test_adapters_of_all_kinds_share_one_backbone(tmp_path):
    student = student_with_lora()
    parameters = dict(student.transformer.named_parameters())
    trains = {name: parameter.requires_grad for name, parameter in parameters.items()}
    weights = {name: parameter.clone() for name, parameter in parameters.items()}
    before = draw(student)
    expected = {}
    for number, (rank, alpha) in enumerate([(2, 2), (4, 16), (8, 1), (3, 5)]):
        folder = tmp_path / f"t{number}"
        save, alone = [(save_peft, by_peft), (save_diffusers, by_diffusers)][number % 2]
        targets = LORA_TARGETS if number else ["ff.net.2", "norm_out.linear"]  # layers that the student does not adapt
        save(folder, seed=number + 1, r=rank, lora_alpha=alpha, target_modules=targets)
        expected[folder.name] = alone(folder, "sd3")

    loaded = load([tmp_path / name for name in expected], student)
    assert all(teacher.pipeline is student for teacher in loaded)
    for _ in range(2):  # in any order
        for teacher in reversed(loaded):
            assert torch.equal(draw(teacher.pipeline, adapter=teacher.adapter), expected[teacher.id]), teacher.id
        assert torch.equal(draw(student), before)
    assert student.transformer.active_adapters() == [STUDENT_ADAPTER]
    # The same parameters, in value and in whether they train; and no others that train
    now = {id(parameter): parameter for parameter in student.transformer.parameters()}
    for name, parameter in parameters.items():
        assert now.pop(id(parameter)).requires_grad == trains[name] and torch.equal(parameter, weights[name]), name
    assert any(trains.values()) and now and not any(parameter.requires_grad for parameter in now.values())


def test_lora_of_a_full_student_lives_on_a_frozen_copy(tmp_path):
    student = BUILDERS["sd3"](0)
    student.transformer.requires_grad_(True)
    folders = [save_peft(tmp_path / "a"), save_diffusers(tmp_path / "b", seed=2)]
    expected = [by_peft(folders[0], "sd3"), by_diffusers(folders[1], "sd3")]
    loaded = load(folders, student, trains_lora=False)
    assert loaded[0].pipeline.transformer is loaded[1].pipeline.transformer is not student.transformer
    assert not tuner_layers(student.transformer)
    assert all(parameter.requires_grad for parameter in student.transformer.parameters())
    assert not any(parameter.requires_grad for parameter in loaded[0].pipeline.transformer.parameters())
    assert loaded[0].pipeline.vae is student.vae and loaded[0].pipeline.text_encoder is student.text_encoder
    with torch.no_grad():  # a student that learns
        for parameter in student.transformer.parameters():
            parameter.add_(0.1)
    for teacher, latents in zip(loaded, expected, strict=True):
        assert torch.equal(draw(teacher.pipeline, adapter=teacher.adapter), latents)


def test_a_transformer_without_add_adapter_gets_several(tmp_path):
    student = BUILDERS["pixart_sigma"](0)
    assert not hasattr(student.transformer, "add_adapter")
    folders = [save_peft(tmp_path / name, "pixart_sigma", seed) for seed, name in enumerate("ab", start=1)]
    before = draw(student, "pixart_sigma")
    loaded = load(folders, student)
    for teacher, folder in zip(loaded, folders, strict=True):
        latents = draw(teacher.pipeline, "pixart_sigma", teacher.adapter)
        assert torch.equal(latents, by_peft(folder, "pixart_sigma"))
    assert torch.equal(draw(student, "pixart_sigma"), before)


# LoRAs that are refused


def edit(folder: Path, change: Callable[[dict], dict], file: str = LORA_FILE, metadata: bool = False) -> Path:
    """Rewrites the tensors of a file; with `metadata` it keeps what diffusers wrote about them."""
    from safetensors import safe_open

    with safe_open(folder / file, "pt") as opened:
        facts = opened.metadata() if metadata else None
    save_file(change(load_file(folder / file)), folder / file, metadata=facts)
    return folder


def first(tensors: dict, ending: str = "lora_B.weight") -> str:
    return next(key for key in sorted(tensors) if key.endswith(ending))


CHANGES = {
    "missing": lambda t: {key: value for key, value in t.items() if key != first(t)},
    "unexpected": lambda t: t | {first(t).replace("lora_B.weight", "lora_B.bias"): torch.zeros(32)},
    "renamed": lambda t: {key.replace(first(t), first(t).replace("to_", "from_")): v for key, v in t.items()},
    "wrongly shaped": lambda t: t | {first(t): torch.zeros(7, 4)},
}


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")  # PEFT's, of what is renamed
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["peft", "diffusers", "diffusers without metadata"])
def test_a_lora_with_other_tensors_is_refused(kind: str, change: str, tmp_path):
    if kind == "peft":
        folder = edit(save_peft(tmp_path), CHANGES[change], PEFT_FILES[1])
    else:
        folder = save_diffusers(tmp_path, metadata=kind == "diffusers")
        edit(folder, CHANGES[change], metadata=kind == "diffusers")
    sentence = refusal(Teacher(folder, id="ocr"))
    assert_words(sentence, "'ocr'", str(folder), "transformer_blocks.0")
    words = {
        "missing": ["1 missing LoRA tensors"] if kind == "peft" else ["lacks 1 tensors of its layers"],
        # Without metadata one bias means that all layers have one
        "unexpected": {
            "peft": ["1 unexpected LoRA tensors"],
            "diffusers": ["holds 1 tensors", "leaves out"],
            "diffusers without metadata": ["lacks 11 tensors of its layers", "lora_B.bias"],
        }[kind],
        "renamed": ["another model", "adapts", "from_"],
        "wrongly shaped": ["another model", "(7, 4) where (32, 4)"],
    }
    assert_words(sentence, *words[change])


def test_a_lora_of_another_rank_than_its_config_is_refused(tmp_path):
    folder = save_peft(tmp_path, r=8)
    path = folder / PEFT_FILES[0]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 4}))
    assert_words(refusal(folder), "wrongly shaped", "(8, 32) for (4, 32)")


def test_a_lora_of_another_family_is_refused(tmp_path):
    folder = save_peft(tmp_path / "peft", "flux", target_modules=["proj_mlp"])
    assert_words(refusal(folder), "peft", "another model than the student's SD3Transformer2DModel", ".0.proj_mlp")
    folder = save_diffusers(tmp_path / "unet", "sdxl")
    assert_words(refusal(folder), "another model than the student's SD3Transformer2DModel", "it adapts unet.")
    folder = save_diffusers(tmp_path / "larger", "wan", metadata=False)
    assert_words(refusal(folder), "larger", "SD3Transformer2DModel")


SIZES = {
    "wider": (
        {"num_attention_heads": 8, "caption_projection_dim": 64},
        "its transformer_blocks.0.attn.to_k.lora_A.weight is of shape (4, 64) where (4, 32) is needed.",
    ),
    "deeper": ({"num_layers": 3}, "it adapts transformer_blocks.2.attn.to_k, which is not there by that name."),
    "shallower": ({"num_layers": 1}, "it lacks transformer_blocks.1.attn.to_k, which its config names."),
    "without dual attention": (
        {"dual_attention_layers": ()},
        "it lacks transformer_blocks.0.attn2.to_k, which its config names.",
    ),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("save", [save_peft, save_diffusers])
def test_a_lora_of_another_size_of_the_model_is_refused(save: Callable, size: str, tmp_path):
    """As a LoRA of SD3.5-Large for SD3.5-Medium."""
    changes, difference = SIZES[size]
    pipe = BUILDERS["sd3"](0)
    pipe.transformer = frozen(5, SD3Transformer2DModel.from_config, dict(pipe.transformer.config) | changes)
    save(tmp_path, pipe)
    assert refusal(Teacher(tmp_path, id="large")) == (
        f"teacher 'large': the LoRA '{tmp_path}' was made for another model than the student's SD3Transformer2DModel: "
        f"{difference}"
    )


def flattened(key: str) -> str:
    module, part = key.split(".", 1)[1].rsplit(".lora_", 1)
    return f"{kohya(module)}.{'lora_down' if part.startswith('A') else 'lora_up'}.weight"


SPELLINGS = {
    "kohya": flattened,
    "LoKr": lambda key: key.replace("lora_A.weight", "lokr_w1").replace("lora_B.weight", "lokr_w2"),
}


def respelt(folder: Path, family: str, spelling: str) -> Path:
    save_diffusers(folder, family, metadata=False)
    return edit(folder, lambda tensors: {SPELLINGS[spelling](key): value for key, value in tensors.items()})


@pytest.mark.parametrize(
    ("family", "spelling"),
    [*((family, spelling) for family in ("sd3", "flux") for spelling in SPELLINGS), ("flux2_klein", "kohya")],
)
def test_a_lora_in_a_format_that_diffusers_does_not_read_is_refused(family: str, spelling: str, tmp_path):
    folder = respelt(tmp_path, family, spelling)
    student = BUILDERS[family](0)
    words = f"in a format that the `load_lora_weights` of {type(student).__name__} does not read, "
    sentence = refusal(folder, student)
    assert_words(sentence, str(folder), words, min(load_file(folder / LORA_FILE)))
    assert len(sentence.replace(str(folder), "")) < 500


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"modules_to_save": ["proj_out"]}, "proj_out"),
        ({"init_lora_weights": "pissa"}, "'pissa'"),
        ({"init_lora_weights": "olora"}, "'olora'"),
    ],
)
def test_a_lora_that_changes_the_shared_backbone_is_refused(config: dict, word: str, tmp_path):
    student = student_with_lora()
    before = draw(student)
    folder = save_peft(tmp_path, **config)
    assert_words(refusal(folder, student), str(folder), "changes the transformer itself", word)
    assert torch.equal(draw(student), before)


def test_an_adapter_that_is_no_lora_is_refused(tmp_path):
    config = LoHaConfig(r=4, target_modules=["to_q"])
    get_peft_model(BUILDERS["sd3"](0).transformer, config).save_pretrained(str(tmp_path))
    assert_words(refusal(tmp_path), "PEFT's type 'LOHA', not a LoRA")


def test_a_dora_that_diffusers_would_read_as_a_lora_is_refused(tmp_path):
    folder = save_kohya(tmp_path / "lora", "sd15", alphas=lambda number: 4.0)
    edit(folder, lambda t: t | {first(t, ".alpha").replace("alpha", "dora_scale"): torch.ones(1)})
    assert_words(refusal(folder, BUILDERS["sd15"](0)), "DoRA", "dora_scale")


def test_a_lora_in_diffusers_format_for_a_pipeline_without_loras_is_refused(tmp_path):
    save_file({"transformer.x.lora_A.weight": torch.zeros(1)}, tmp_path / LORA_FILE)
    assert_words(refusal(tmp_path, BUILDERS["pixart_sigma"](0)), "PixArtSigmaPipeline", "PEFT format")


# Places that hold no teacher


def test_places_without_a_teacher_are_refused(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    kinds = ["model_index.json", "config.json", "adapter_config.json", LORA_FILE]
    assert_words(refusal(Teacher(empty, id="ocr")), "'ocr'", str(empty), *kinds)
    assert_words(refusal(Teacher(tmp_path, subfolder="lora", id="ocr")), "'ocr'", f"{tmp_path}/lora", "`subfolder`")
    gone = tmp_path / "gone"
    assert_words(refusal(gone), str(gone), "neither a folder nor the id of a repository")
    assert_words(refusal("./gone/too/far"), "./gone/too/far", "neither a folder nor the id of a repository")
    # Offline, as all tests are: what could be a Hub id cannot be looked up
    assert_words(
        refusal(Teacher("me/gone", revision="v2")), "'me/gone' is no folder", "cache at revision 'v2'", "offline"
    )


def test_a_wrong_weight_name_is_refused(tmp_path):
    folder = save_diffusers(tmp_path)
    assert_words(refusal(Teacher(folder, weight_name="x.safetensors")), "x.safetensors", "`weight_name`")


def test_a_peft_folder_without_weights_is_refused(tmp_path):
    folder = save_peft(tmp_path)
    (folder / PEFT_FILES[1]).unlink()
    assert_words(refusal(folder), str(folder), *PEFT_FILES)


@pytest.mark.parametrize("save", [save_peft, save_diffusers])
def test_a_git_lfs_pointer_is_refused(save: Callable, tmp_path):
    (weights,) = save(tmp_path).glob("*.safetensors")
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert_words(refusal(tmp_path), weights.name, str(tmp_path), "no safetensors file", "git-lfs pointer")


# Denoisers and pipelines


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A whole SD3 pipeline, the denoiser of seed 1."""
    folder = tmp_path_factory.mktemp("saved")
    BUILDERS["sd3"](1).save_pretrained(folder)
    return folder


@cache
def latents_of_seed_1() -> torch.Tensor:
    return draw(BUILDERS["sd3"](1))


@pytest.mark.parametrize("trains_lora", [True, False])
@pytest.mark.parametrize("kind", ["denoiser", "pipeline", "pipeline in a subfolder", "loaded pipeline"])
def test_whole_teachers(kind: str, trains_lora: bool, saved):
    teacher = {
        "denoiser": Teacher(saved, subfolder="transformer"),
        "pipeline": Teacher(str(saved)),
        "pipeline in a subfolder": Teacher(saved.parent, subfolder=saved.name),
        "loaded pipeline": BUILDERS["sd3"](1),
    }[kind]
    student = student_with_lora()
    before = draw(student)
    (loaded,) = load(teacher, student, trains_lora)
    assert loaded.adapter is None and not any(p.requires_grad for p in loaded.pipeline.transformer.parameters())
    assert torch.equal(draw(loaded.pipeline), latents_of_seed_1())
    assert torch.equal(draw(student), before)
    for name in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3", "vae"):
        assert getattr(loaded.pipeline, name) is getattr(student, name), name


@pytest.mark.parametrize("family", ["sdxl", "wan"])
def test_whole_teachers_of_other_families(family: str, tmp_path):
    pipe = BUILDERS[family](1)
    pipe.save_pretrained(tmp_path)
    name = next(iter(denoisers_of(pipe)))
    student = student_with_lora(family)
    teachers = load({"pipeline": tmp_path, "denoiser": Teacher(tmp_path, subfolder=name), "loaded": pipe}, student)
    for teacher in teachers:
        assert torch.equal(draw(teacher.pipeline, family), draw(pipe, family)), teacher.id
        assert teacher.pipeline.vae is student.vae and teacher.pipeline.text_encoder is student.text_encoder


def test_a_pipeline_without_its_third_encoder(tmp_path):
    parts = BUILDERS["sd3"](1).components | {"text_encoder_3": None, "tokenizer_3": None}
    teacher = StableDiffusion3Pipeline(**parts)
    teacher.set_progress_bar_config(disable=True)
    teacher.save_pretrained(tmp_path)
    student = BUILDERS["sd3"](0)
    (loaded,) = load(tmp_path, student)
    assert loaded.pipeline.text_encoder_3 is None and student.text_encoder_3 is not None
    assert loaded.pipeline.text_encoder is student.text_encoder
    assert torch.equal(draw(loaded.pipeline), draw(teacher))


def test_frozen_modules_load_in_the_dtype_asked_for(saved):
    student = BUILDERS["sd3"](0)
    teachers = {"whole": saved, "bare": Teacher(saved, subfolder="transformer")}
    whole, bare = load(teachers, student, dtype=torch.bfloat16)
    assert whole.pipeline.transformer.dtype == bare.pipeline.transformer.dtype == torch.bfloat16
    # Equal up to the precision of the coarser: the student's own, in its own dtype, serve both
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3", "vae"):
        assert getattr(whole.pipeline, name) is getattr(student, name), name
        assert getattr(student, name).dtype == torch.float32


def other_clip() -> dict:
    return {"text_encoder": clip(type(BUILDERS["sd3"](1).text_encoder), seed=9)[0]}


def other_config() -> dict:
    pipe = BUILDERS["sd3"](1)
    pipe.text_encoder.config.hidden_act = "gelu"
    return {"text_encoder": pipe.text_encoder}


def other_pad_token() -> dict:
    tokenizer = clip_tokenizer()
    tokenizer.pad_token = "!"
    return {"tokenizer": tokenizer}


def other_length() -> dict:
    tokenizer = clip_tokenizer()
    tokenizer.model_max_length = 32
    return {"tokenizer": tokenizer}


def other_decoder() -> dict:
    pipe = BUILDERS["sd3"](1)
    with torch.no_grad():
        pipe.vae.decoder.conv_out.weight.add_(0.1)
    return {"vae": pipe.vae}


@pytest.mark.parametrize("change", [other_clip, other_config, other_pad_token, other_length, other_decoder])
def test_parts_that_differ_are_not_shared(change: Callable[[], dict]):
    """The teacher keeps its own, and the rest is shared."""
    parts = change()
    teacher = StableDiffusion3Pipeline(**BUILDERS["sd3"](1).components | parts)
    student = BUILDERS["sd3"](0)
    (loaded,) = load(teacher, student)
    for name in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3", "vae"):
        expected = teacher if name in parts else student
        assert getattr(loaded.pipeline, name) is getattr(expected, name), name


def test_the_pipeline_that_was_handed_over_keeps_its_parts():
    given, student = BUILDERS["sd3"](1), BUILDERS["sd3"](0)
    text_encoder, config = given.text_encoder, dict(given.config)
    (loaded,) = load(given, student)
    assert given.text_encoder is text_encoder and loaded.pipeline.text_encoder is not text_encoder
    assert dict(given.config) == config


def test_a_larger_teacher_of_the_same_latent_space(tmp_path):
    student = BUILDERS["sd3"](0)
    config = dict(student.transformer.config) | {"num_layers": 3}
    larger = frozen(5, SD3Transformer2DModel.from_config, config)
    larger.save_pretrained(tmp_path)
    (loaded,) = load(tmp_path, student)
    expected = BUILDERS["sd3"](0)
    expected.transformer = larger
    assert torch.equal(draw(loaded.pipeline), draw(expected))


def changed_copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "teacher"))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("change", ["missing", "unexpected", "renamed", "wrongly shaped"])
def test_a_denoiser_with_other_tensors_is_refused(change: str, whole: bool, saved, tmp_path):
    folder = changed_copy(saved, tmp_path)
    key = "proj_out.weight"
    edit(
        folder / "transformer",
        {
            "missing": lambda t: {k: v for k, v in t.items() if k != key},
            "unexpected": lambda t: t | {"extra.weight": torch.zeros(2)},
            "renamed": lambda t: {("out.weight" if k == key else k): v for k, v in t.items()},
            "wrongly shaped": lambda t: t | {key: torch.zeros(3, 32)},
        }[change],
        "diffusion_pytorch_model.safetensors",
    )
    sentence = refusal(Teacher(folder, subfolder=None if whole else "transformer", id="aes"))
    assert_words(
        sentence, "'aes'", str(folder), "SD3Transformer2DModel", "extra.weight" if change == "unexpected" else key
    )
    words = {"missing": "1 missing keys", "unexpected": "1 unexpected keys", "renamed": "1 missing keys"}
    assert_words(sentence, words.get(change, "3, 32"))


@pytest.mark.parametrize(
    ("part", "file"), [("text_encoder", "model.safetensors"), ("vae", "diffusion_pytorch_model.safetensors")]
)
def test_an_encoder_that_lacks_a_tensor_is_refused(part: str, file: str, saved, tmp_path):
    folder = changed_copy(saved, tmp_path)
    lost = sorted(load_file(folder / part / file))[0]
    edit(folder / part, lambda t: {key: value for key, value in t.items() if key != lost}, file)
    assert_words(refusal(Teacher(folder, id="aes")), "'aes'", "1 missing keys", str(folder), lost.split(".")[-2])


def test_a_denoiser_without_weights_is_refused(saved, tmp_path):
    folder = changed_copy(saved, tmp_path)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    for teacher in (folder, Teacher(folder, subfolder="transformer")):
        assert_words(refusal(teacher), str(folder), "SD3Transformer2DModel", "diffusion_pytorch_model")


def test_a_denoiser_of_another_class_is_refused(tmp_path):
    BUILDERS["flux"](0).transformer.save_pretrained(tmp_path)
    assert_words(refusal(tmp_path), "FluxTransformer2DModel", "StableDiffusion3Pipeline", "SD3Transformer2DModel")


def test_a_folder_of_some_other_model_is_refused(tmp_path):
    BUILDERS["sd3"](0).text_encoder.save_pretrained(tmp_path)
    assert_words(refusal(tmp_path), str(tmp_path), "SD3Transformer2DModel")


def test_a_pipeline_without_a_denoiser_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "X", "vae": ["diffusers", "AutoencoderKL"]}))
    assert_words(refusal(tmp_path), str(tmp_path), "neither a transformer nor a unet")


def test_the_student_is_not_its_own_teacher():
    student = student_with_lora()
    assert_words(refusal(student, student), "'teacher' is the student itself", "transformer")


# Other latent spaces, other times


def teacher_with(family: str, **parts) -> DiffusionPipeline:
    pipe = BUILDERS[family](1)
    for name, part in parts.items():
        setattr(pipe, name, part)
    return pipe


def with_vae_config(family: str = "sd3", **config) -> DiffusionPipeline:
    pipe = BUILDERS[family](1)
    pipe.vae.register_to_config(**config)
    return pipe


def with_vae_tensor(family: str, key: str) -> DiffusionPipeline:
    pipe = BUILDERS[family](1)
    pipe.vae.state_dict()[key].add_(0.1)
    return pipe


def with_scheduler(family: str, cls: type, **config) -> DiffusionPipeline:
    pipe = BUILDERS[family](1)
    pipe.scheduler = cls.from_config(pipe.scheduler.config, **config)
    return pipe


def sd3_of_channels(channels: int) -> DiffusionPipeline:
    config = dict(BUILDERS["sd3"](0).transformer.config) | {"in_channels": channels}
    return teacher_with("sd3", transformer=frozen(1, SD3Transformer2DModel.from_config, config))


def v_prediction() -> DiffusionPipeline:
    return with_scheduler("sd15", DDIMScheduler, prediction_type="v_prediction")


def linear_betas() -> DiffusionPipeline:
    return with_scheduler("sd15", DDIMScheduler, beta_schedule="linear", beta_start=0.0001, beta_end=0.02)


@pytest.mark.parametrize(
    ("family", "make", "words"),
    [
        ("sd3", lambda: with_vae_config(scaling_factor=0.5), ["VAE of scaling_factor 0.5", "1.5305"]),
        ("sd3", lambda: with_vae_config(shift_factor=None), ["VAE of shift_factor None", "0.0609"]),
        ("wan", lambda: with_vae_config("wan", latents_mean=[0.5] * 16), ["VAE of latents_mean", "0.5"]),
        *(
            (family, partial(with_vae_tensor, family, key), ["VAE that encodes with other weights", "alone"])
            for family, key in (
                ("sd3", "encoder.conv_in.weight"),
                ("sd15", "quant_conv.weight"),
                ("flux2_klein", "bn.running_mean"),
                ("ltx", "latents_mean"),
            )
        ),
        ("sd3", lambda: BUILDERS["wan"](1), ["in_channels 16", "4"]),
        ("sd3", lambda: sd3_of_channels(8), ["in_channels 8", "4"]),
        ("sd3", lambda: BUILDERS["pixart_sigma"](1), ["VAE of scaling_factor 0.13025", "1.5305"]),
        (
            "pixart_sigma",
            lambda: teacher_with("pixart_sigma", scheduler=FlowMatchEulerDiscreteScheduler()),
            ["flow", "VP"],
        ),
        ("sd3", lambda: teacher_with("sd3", scheduler=DDIMScheduler()), ["VP diffusion", "flow matching"]),
        (
            "sd3",
            lambda: with_scheduler("sd3", FlowMatchEulerDiscreteScheduler, num_train_timesteps=500),
            ["num_train_timesteps 500", "1000"],
        ),
        ("sd15", v_prediction, ["prediction_type v_prediction", "epsilon"]),
        ("sd15", linear_betas, ["betas linear", "scaled_linear"]),
    ],
)
def test_other_latent_spaces_and_times_are_refused(family: str, make: Callable, words: list[str]):
    student = BUILDERS[family](0)
    sentence = refusal(Teacher(make(), id="aes"), student)
    assert_words(sentence, "'aes'", "the student", *words)


def test_another_shift_of_the_same_time_is_fine():
    """A teacher is asked at the student's states and times; how it would have stepped itself does not matter."""
    teacher = with_scheduler("sd3", FlowMatchEulerDiscreteScheduler, shift=1.0)
    assert load(teacher, BUILDERS["sd3"](0))
    solver = with_scheduler("sd15", DDIMScheduler)  # the student's own is PNDM
    assert load(solver, BUILDERS["sd15"](0))


def test_another_vae_is_fine_for_a_denoiser_alone(tmp_path):
    pipe = with_vae_tensor("sd3", "encoder.conv_in.weight")
    pipe.save_pretrained(tmp_path)
    student = BUILDERS["sd3"](0)
    (loaded,) = load(Teacher(tmp_path, subfolder="transformer"), student)
    assert loaded.pipeline.vae is student.vae


# The manifest


def test_manifest_content(saved, tmp_path):
    save_peft(tmp_path / "AesTeacher" / "lora")
    teachers = [Teacher(tmp_path, subfolder="AesTeacher/lora"), Teacher(saved, id="ocr")]
    content = manifest_of(load([*teachers, Teacher(BUILDERS["sd3"](2), id="own")], student_with_lora()))
    json.dumps(content)
    assert content["version"] == 1
    entries = content["teachers"]
    assert [entry["id"] for entry in entries] == ["AesTeacher", "ocr", "own"]
    sources = [f"{tmp_path.name}/AesTeacher/lora (local)", f"{saved.name} (local)", "a loaded StableDiffusion3Pipeline"]
    assert [entry["source"] for entry in entries] == sources
    assert [entry["revision"] for entry in entries] == [None, None, None]
    assert [entry["commit"] for entry in entries] == [None, None, None]  # of the Hub
    hashes = [entry["sha256"] for entry in entries]
    assert len(set(hashes)) == 3 and all(len(value) == 64 for value in hashes)


def hash_of(teacher: Any) -> str:
    return manifest_of(load(teacher, student_with_lora()))["teachers"][0]["sha256"]


def test_equal_teachers_have_equal_hashes(saved, tmp_path):
    whole, bare = hash_of(str(saved)), hash_of(Teacher(saved, subfolder="transformer"))
    assert whole == bare == hash_of(BUILDERS["sd3"](1)) != hash_of(BUILDERS["sd3"](2))
    # A LoRA is what it adds, not its file
    assert hash_of(save_peft(tmp_path / "a")) == hash_of(save_diffusers(tmp_path / "b"))
    # and its alpha is part of that, though not of its tensors
    assert hash_of(tmp_path / "a") != hash_of(save_peft(tmp_path / "c", lora_alpha=9))
    assert hash_of(tmp_path / "a") != hash_of(save_peft(tmp_path / "d", seed=2))


def test_resuming_with_other_teachers_is_refused(tmp_path):
    folders = {"aes": save_peft(tmp_path / "1"), "ocr": save_peft(tmp_path / "2", seed=2)}
    checkpoint = tmp_path / "checkpoint-5"
    checkpoint.mkdir()

    def resume(teachers: dict) -> None:
        check_manifest(checkpoint, load(teachers, student_with_lora()))

    with pytest.raises(ValueError, match="no teacher_manifest.json"):
        resume(folders)
    (checkpoint / "teacher_manifest.json").write_text(json.dumps(manifest_of(load(folders, student_with_lora()))))
    resume(folders)
    moved = folders["ocr"].rename(tmp_path / "moved")
    resume(folders | {"ocr": moved})
    for other in (
        {"aes": folders["aes"]},
        {"ocr": moved, "aes": folders["aes"]},
        {"aes": folders["aes"], "text": moved},
    ):
        with pytest.raises(ValueError) as refused:
            resume(other)
        assert_words(str(refused.value), str(checkpoint), "['aes', 'ocr']", str(list(other)))
    with pytest.raises(ValueError) as refused:
        resume({"aes": folders["aes"], "ocr": folders["aes"]})
    assert_words(str(refused.value), "'ocr' has other weights", str(folders["aes"]), "2 (local)")


@pytest.mark.parametrize("family", ["wan", "sd3"])
def test_a_frozen_copy_is_what_diffusers_loads_in_half_precision(tmp_path, family: str):
    """Of Wan norms and the time embedding stay in float32."""
    module = denoiser(BUILDERS[family](0))
    module.save_pretrained(tmp_path)
    loaded = type(module).from_pretrained(tmp_path, dtype=torch.bfloat16)
    twin = frozen_copy(module, torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == (
        {torch.float32, torch.bfloat16} if family == "wan" else {torch.bfloat16}
    )
    for (name, mine), (_, theirs) in zip(twin.named_parameters(), loaded.named_parameters(), strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs) and not mine.requires_grad, name
    assert next(module.parameters()).dtype == torch.float32


def hash_in(rank: int, port: int, answers: Any) -> None:
    """One of two processes, forked from this one."""
    environment = {"WORLD_SIZE": "2", "RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
    os.environ.update(environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"})
    PartialState._reset_state()
    assert PartialState(cpu=True).num_processes == 2
    read, hash_tensors = list[int](), manifest.hash_tensors

    def watched(tensors: dict[str, torch.Tensor]) -> str:
        read.append(sum(tensor.numel() for tensor in tensors.values()))
        return hash_tensors(tensors)

    manifest.hash_tensors = watched
    student, said = BUILDERS["sd3"](0), list[Any]()
    for seeds in ([1, 2], [1, 2 + rank]):
        read.clear()
        teachers = {key: BUILDERS["sd3"](seed) for key, seed in zip("ab", seeds, strict=True)}
        try:
            said.append([teacher.sha256 for teacher in load(teachers, student)])
        except ValueError as error:
            said.append(str(error))
        said.append(sum(read) / sum(p.numel() for p in teachers["a"].transformer.parameters()))
    answers.put(said)
    PartialState().destroy_process_group()


def test_each_process_hashes_some_of_the_teachers():
    alone = load({"a": BUILDERS["sd3"](1), "b": BUILDERS["sd3"](2)}, BUILDERS["sd3"](0))
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    with held_port() as port:
        processes = [fork.Process(target=hash_in, args=(rank, port, answers)) for rank in range(2)]
        for process in processes:
            process.start()
        said = [answers.get(timeout=120) for _ in processes]
        for process in processes:
            process.join()
    for digests, read, refused, _ in said:
        assert digests == [teacher.sha256 for teacher in alone]
        assert 1 <= read < 1.5  # and samples of both
        assert "teacher 'b' has other weights on process 1 than on the first" in refused
