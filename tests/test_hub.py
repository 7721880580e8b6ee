"""From the Hub and back: everything by id, pushed while it trains, loaded by plain diffusers in a fresh process.

The Hub is tests/hub_server.py on a local port. Clients are processes of their own, as huggingface_hub reads its
endpoint when it is imported.
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load

from tests.adapters import save_diffusers, save_peft
from tests.card_rules import check_card
from tests.hub_server import TOKEN, HubServer, client
from tests.tiny_pipelines import BUILDERS, CALL

ROOT = Path(__file__).parents[1]
PROMPTS = {"aesthetic": ["a red fox", "a lake"], "ocr": ['a sign that says "hi"', "a label"]}
PROMPTS |= {"bare": ["two dogs", "a cat and a dog"], "geneval": ["three green cups", "a bus below a tree"]}
PROMPTS |= {"editor": ["the same at night", "the same in winter"]}


# The server itself


def test_the_server_is_a_hub_to_huggingface_hub(tmp_path):
    with HubServer() as hub:
        result = client(hub, tmp_path, HUB_CLIENT)
        assert result["me"] == "me"
        assert result["errors"] == [
            "HfHubHTTPError: 409",
            "RepositoryNotFoundError: 404",
            "RevisionNotFoundError: 404",
            "RemoteEntryNotFoundError: 404",
            "HfHubHTTPError: 401",
        ]
        assert result["main"] == [".gitattributes", "sub/w.safetensors"]
        assert result["v1"] == result["snapshot"] == [".gitattributes", "a.txt", "one.txt", "sub/w.safetensors"]
        assert result["unchanged"], "an upload of what is there already makes no commit"
        repository = hub.repositories["models/acme/x"]
        assert repository.at("main").files["sub/w.safetensors"].data == b"0" * 50_000
        assert repository.at("main").files["sub/w.safetensors"].is_lfs
        assert not repository.at("v1").files["a.txt"].is_lfs and repository.private


HUB_CLIENT = """
from pathlib import Path
from huggingface_hub import CommitOperationDelete, HfApi, hf_hub_download, snapshot_download

api = HfApi()
folder = Path("folder/sub")
folder.mkdir(parents=True)
Path("folder/a.txt").write_text("hi")
Path("folder/sub/w.safetensors").write_bytes(b"0" * 50_000)
api.create_repo("acme/x", private=True)
api.create_repo("acme/x", exist_ok=True)
commits = [api.upload_folder(repo_id="acme/x", folder_path="folder").oid for _ in range(2)]
api.create_branch("acme/x", branch="v1")
api.upload_file(repo_id="acme/x", path_or_fileobj=b"1", path_in_repo="one.txt", revision="v1")
api.create_commit("acme/x", operations=[CommitOperationDelete("a.txt")], commit_message="less")
snapshot = Path(snapshot_download("acme/x", revision="v1"))
errors = []
for wrong in (
    lambda: api.create_repo("acme/x"),
    lambda: hf_hub_download("acme/none", "a.txt"),
    lambda: hf_hub_download("acme/x", "a.txt", revision="v9"),
    lambda: hf_hub_download("acme/x", "a.txt"),
    lambda: HfApi(token="bad").create_repo("acme/y"),
):
    try:
        wrong()
    except Exception as error:
        errors.append(f"{type(error).__name__}: {error.response.status_code}")
result = {
    "me": api.whoami()["name"],
    "main": api.list_repo_files("acme/x"),
    "v1": api.list_repo_files("acme/x", revision="v1"),
    "snapshot": sorted(str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file()),
    "unchanged": commits[0] == commits[1],
    "errors": errors,
}
"""


CARD = {
    "library_name": "diffusers",
    "base_model": "acme/base",
    "base_model_relation": "adapter",
    "pipeline_tag": "text-to-image",
    "tags": ["lora"],
    "widget": [{"text": "a cat", "output": {"url": "images/00.png"}}],
}
SPOILT = {
    '"base_model" with value "./my models/base" is not valid': {"base_model": "./my models/base"},
    '"base_model" with value "a/b/c" is not valid': {"base_model": ["acme/base", "a/b/c"]},
    '"base_model_relation" must be one of': {"base_model_relation": "student"},
    '"tags" must be an array': {"tags": "lora"},
    '"tags" must be a string': {"tags": ["lora", 3]},
    '"pipeline_tag" must be a string': {"pipeline_tag": ["text-to-image"]},
    '"widget" must be an array': {"widget": {"text": "a cat"}},
    '"widget[0].text" must be a string': {"widget": [{"output": {"url": "a.png"}}]},
    '"widget[0].output.url" must be a string': {"widget": [{"text": "a cat"}]},
    '"datasets" with value "my prompts" is not valid': {"datasets": ["me/prompts", "my prompts"]},
    '"license" must be one of the published ones, not "free"': {"license": "free"},
}
DOUBTFUL = {
    'the pipeline tag "text-2-image" is not in the official list': {"pipeline_tag": "text-2-image"},
    '"license_name" is missing beside "other"': {"license": "other"},
}

VALIDATE = """
import warnings
from huggingface_hub import CardData, HfApi, RepoCard  # a `ModelCard` would mend some of it

def said(check):
    with warnings.catch_warnings(record=True) as told:
        try:
            check()
        except ValueError as error:
            return True, str(error)
    return False, "".join(str(warning.message) for warning in told)

result = []
for metadata in cards:
    card = RepoCard(f"---\\n{CardData(**metadata).to_yaml()}\\n---\\n# A card")
    before_a_commit = lambda: HfApi()._validate_yaml(card.content)
    result.append([said(card.validate), said(before_a_commit)])
"""


def test_the_server_refuses_a_spoilt_card(tmp_path):
    changes = {"": {}, **SPOILT, **DOUBTFUL}
    with HubServer() as hub:
        answers = client(hub, tmp_path, f"cards = {[CARD | change for change in changes.values()]!r}\n{VALIDATE}")
    assert answers.pop(0) == [[False, ""], [False, ""]]
    for words, ((is_refused, of_card), (is_stopped, of_commit)) in zip([*SPOILT, *DOUBTFUL], answers, strict=True):
        assert words in of_commit and is_refused == is_stopped == (words in SPOILT)
        assert (words in json.loads(of_card)["error"]) if is_refused else (of_card == "")


# A world of repositories


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[HubServer]:
    """The student's base, teachers of all kinds and their prompts, published."""
    folder = tmp_path_factory.mktemp("published")
    with HubServer() as server:
        BUILDERS["sd3"](0).save_pretrained(folder / "base")
        save_peft(folder / "teachers" / "AesTeacher" / "lora", seed=1)
        server.publish("acme/teachers", folder / "teachers")
        # The branch v1 has a teacher that main lacks
        save_diffusers(folder / "teachers" / "OCRTeacher" / "lora", seed=2, r=2, lora_alpha=8)
        server.publish("acme/teachers", folder / "teachers", branch="v1")
        BUILDERS["sd3"](3).transformer.save_pretrained(folder / "bare")
        BUILDERS["sd3"](4).save_pretrained(folder / "pipeline")
        for name in ("base", "bare", "pipeline"):
            server.publish(f"acme/{name}", folder / name)
        BUILDERS["sd3"](5).save_pretrained(folder / "zoo" / "pipelines" / "editor")
        server.publish("acme/zoo", folder / "zoo")
        save_diffusers(folder / "styles" / "ink", seed=6)
        (folder / "styles" / "ink" / "pytorch_lora_weights.safetensors").rename(folder / "styles/ink/ink.safetensors")
        for name in ("oil", "chalk"):
            shutil.copy(folder / "styles/ink/ink.safetensors", folder / "styles" / f"{name}.safetensors")
        server.publish("acme/ink", folder / "styles" / "ink")
        server.publish("acme/styles", folder / "styles")
        rows = [{"prompt": prompt, "teacher_id": task} for task, prompts in PROMPTS.items() for prompt in prompts]
        (folder / "prompts").mkdir()
        Dataset.from_list(rows).to_parquet(folder / "prompts" / "train.parquet")
        server.publish("acme/prompts", folder / "prompts", kind="datasets")
        yield server


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


COMMON = f"""
import torch
from datasets import load_dataset
from diffusers import DiffusionPipeline
from peft import LoraConfig
from diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer, Teacher

call = {CALL["sd3"] | {"guidance_scale": 4.5}!r}

def draw(pipe):
    pipe.transformer.requires_grad_(False)  # matmul rounds differently beside a weight that asks for gradients
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    return pipe(["a cat", "two dogs"], num_inference_steps=3, generator=generators, output_type="latent", **call)[0]

teachers = [
    Teacher("acme/teachers", subfolder="AesTeacher/lora", id="aesthetic"),
    Teacher("acme/teachers", subfolder="OCRTeacher/lora", id="ocr", revision="v1"),
    Teacher("acme/bare"),
    Teacher("acme/pipeline", id="geneval", guidance_scale=1.0),
    Teacher("acme/zoo", subfolder="pipelines/editor/"),
]
"""

TRAIN = """
def train(output_dir, **how):
    trainer = DiffusionOPDTrainer(
        model="acme/base",
        teachers=teachers,
        args=DiffusionOPDConfig(
            output_dir,
            push_to_hub=True,
            max_steps=2,
            save_steps=1,
            hub_always_push=True,
            num_inference_steps=2,
            per_device_train_batch_size=1,
            learning_rate=1e-2,
            guidance_scale=call.pop("guidance_scale"),
            call_kwargs=call,
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=load_dataset("acme/prompts", split="train"),
        **how,
    )
    parameters = trainer.trainable_parameters
    before = draw(trainer.pipeline)
    for parameter in parameters:
        parameter.requires_grad_(True)
    trainer.train()
    trainer.push_to_hub()
    call["guidance_scale"] = 4.5
    after = draw(trainer.pipeline)
    assert not torch.allclose(before, after, rtol=1e-2)
    torch.save(after, f"{output_dir}.pt")

train("student-lora", peft_config=LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v"]))
# Another pipeline lies there already, in shards
other = DiffusionPipeline.from_pretrained("acme/base")
for part in (other.transformer, other.text_encoder):
    for parameter in part.parameters():
        parameter.data.zero_()
other.save_pretrained("student-full", max_shard_size="50KB")
train("student-full")
result = {}
"""


@pytest.fixture(scope="module")
def trained(hub: HubServer, home: Path) -> Path:
    """Two students have been trained and pushed; the folder they were trained in."""
    client(hub, home, COMMON + TRAIN)
    return home


LOAD = """
import re
from huggingface_hub import ModelCard, ModelCardData

lora = DiffusionPipeline.from_pretrained("acme/base")
lora.load_lora_weights("me/student-lora")
full = DiffusionPipeline.from_pretrained("me/student-full")
torch.save(draw(lora), "student-lora.pt")
torch.save(draw(full), "student-full.pt")

result = {}
for name in ("student-lora", "student-full"):
    card = ModelCard.load(f"me/{name}")
    card.validate()
    assert ModelCardData(**card.data.to_dict()).to_dict() == card.data.to_dict()
    scope = {}
    exec(re.search("```python\\n(.*?)```", card.text, re.DOTALL)[1], scope)  # as it says there
    result[name] = {"data": card.data.to_dict(), "text": card.text, "size": scope["image"].size}
    result[name]["content"] = card.content
"""


@pytest.fixture(scope="module")
def loaded(hub: HubServer, trained: Path, tmp_path_factory) -> tuple[Path, dict]:
    """A fresh process with an empty cache has loaded the students, and run the code on their cards."""
    fresh = tmp_path_factory.mktemp("fresh")
    without_us = COMMON.replace("from diffusion_opd import", "# from diffusion_opd import").split("teachers = ")[0]
    return fresh, client(hub, fresh, without_us + LOAD)


STUDENTS = pytest.mark.parametrize("student", ["student-lora", "student-full"])


@pytest.mark.slow
@STUDENTS
def test_plain_diffusers_draws_what_the_trainer_drew(student: str, trained: Path, loaded: tuple[Path, dict]):
    assert torch.equal(torch.load(loaded[0] / f"{student}.pt"), torch.load(trained / f"{student}.pt"))


@pytest.mark.slow
@STUDENTS
def test_cards_say_where_a_student_comes_from(student: str, hub: HubServer, loaded: tuple[Path, dict]):
    card = loaded[1][student]
    data = card["data"]
    assert (data["library_name"], data["base_model"], data["pipeline_tag"]) == (
        "diffusers",
        "acme/base",
        "text-to-image",
    )
    assert data["base_model_relation"] == ("adapter" if student == "student-lora" else "finetune")
    assert check_card(card["content"]) == ([], [])
    assert {"trl", "diffusion-opd"} <= set(data["tags"]) and ("lora" in data["tags"]) == (student == "student-lora")
    files = hub.repositories[f"models/me/{student}"].at("main").files
    assert len(data["widget"]) == 5  # one picture a teacher
    for picture in data["widget"]:
        assert files[picture["output"]["url"]].data.startswith(b"\x89PNG")
        assert any(picture["text"] in prompts for prompts in PROMPTS.values())
    commits = {name: hub.repositories[f"models/acme/{name}"] for name in ("teachers", "bare", "pipeline", "zoo")}
    for source, commit in [
        ("acme/teachers/AesTeacher/lora", commits["teachers"].at("main")),
        ("acme/teachers/OCRTeacher/lora", commits["teachers"].at("v1")),
        ("acme/bare", commits["bare"].at("main")),
        ("acme/pipeline", commits["pipeline"].at("main")),
        ("acme/zoo/pipelines/editor", commits["zoo"].at("main")),
    ]:
        assert any(source in line and commit.id in line for line in card["text"].splitlines()), source
    assert "arXiv:2605.15055" in card["text"]
    assert card["size"] == [16, 16]


@pytest.mark.slow
@STUDENTS
def test_every_checkpoint_was_pushed_whole(student: str, hub: HubServer, trained: Path):
    commits = {commit.title: commit.files for commit in hub.repositories[f"models/me/{student}"].commits}
    assert {"Training in progress, step 1", "Training in progress, step 2", "End of training"} <= commits.keys()
    weights = {
        "student-lora": "pytorch_lora_weights.safetensors",
        "student-full": "transformer/diffusion_pytorch_model.safetensors",
    }[student]
    pushed = [commits[f"Training in progress, step {step}"] for step in (1, 2)]
    for files in pushed:
        assert {weights, "README.md", "teacher_manifest.json"} <= files.keys()
        assert ("model_index.json" in files) == (student == "student-full")
        assert not any(path.startswith("checkpoint-") for path in files)
        if student == "student-full":  # nothing of the pipeline that lay there
            assert not [path for path in files if path.endswith(".index.json")]
            encoder, base = "text_encoder/model.safetensors", hub.repositories["models/acme/base"].at("main").files
            base_encoder = load(base[encoder].data)
            assert all(torch.equal(tensor, base_encoder[key]) for key, tensor in load(files[encoder].data).items())
    for step in (1, 2):  # what was pushed is what was saved
        assert (trained / student / f"checkpoint-{step}" / weights).read_bytes() == pushed[step - 1][weights].data
    first, second, last = (load(files[weights].data) for files in (*pushed, commits["End of training"]))
    assert first.keys() == second.keys() == last.keys()
    assert all(torch.equal(second[key], last[key]) for key in last)
    assert not all(torch.equal(first[key], second[key]) for key in last)


@pytest.mark.slow
@STUDENTS
def test_the_manifest_holds_the_commits(student: str, hub: HubServer, trained: Path):
    text = (trained / student / "checkpoint-2" / "teacher_manifest.json").read_text()
    assert hub.repositories[f"models/me/{student}"].at("main").files["teacher_manifest.json"].data.decode() == text
    entries = {entry["id"]: entry for entry in json.loads(text)["teachers"]}
    where = {"aesthetic": ("teachers", None), "ocr": ("teachers", "v1"), "bare": ("bare", None)}
    where |= {"geneval": ("pipeline", None), "editor": ("zoo", None)}
    assert entries.keys() == where.keys()
    for key, (name, revision) in where.items():
        commit = hub.repositories[f"models/acme/{name}"].at(revision or "main").id
        assert (entries[key]["revision"], entries[key]["commit"]) == (revision, commit)
        assert entries[key]["source"].startswith(f"acme/{name}")


BUILD = """
trainer = DiffusionOPDTrainer(
    model="acme/base",
    teachers=teachers,
    args=DiffusionOPDConfig("offline", num_inference_steps=2, call_kwargs=call, report_to="none", use_cpu=True),
    train_dataset=load_dataset("acme/prompts", split="train"),
    peft_config=LoraConfig(r=2, target_modules=["to_q"]),
)
from diffusion_opd.teachers import manifest_of
result = manifest_of(trainer.teachers.loaded.values())
"""


@pytest.mark.slow
def test_what_was_used_once_works_offline(hub: HubServer, trained: Path):
    asked = len(hub.requests)
    offline = client(hub, trained, COMMON + BUILD, HF_HUB_OFFLINE="1")
    assert len(hub.requests) == asked
    assert offline == json.loads((trained / "student-lora" / "checkpoint-2" / "teacher_manifest.json").read_text())


DOWNLOADED = """
from huggingface_hub import snapshot_download
for name in ("base", "bare", "pipeline", "zoo"):
    snapshot_download(f"acme/{name}")
snapshot_download("acme/teachers", revision="v1", allow_patterns="OCRTeacher/*")
snapshot_download("acme/teachers")
load_dataset("acme/prompts", split="train")
result = {}
"""


@pytest.mark.slow
def test_what_was_downloaded_works_offline(hub: HubServer, tmp_path, trained: Path):
    """As `hf download` before a job on a node without a network: no teacher has been loaded from this cache."""
    home = tmp_path / "home"
    client(hub, home, COMMON + DOWNLOADED)
    offline = client(hub, home, COMMON + BUILD, HF_HUB_OFFLINE="1")
    assert offline == json.loads((trained / "student-lora" / "checkpoint-2" / "teacher_manifest.json").read_text())


SOLE = """
teachers = [Teacher("acme/ink"), Teacher("acme/styles", subfolder="ink", id="inside")]
teachers.append(Teacher("acme/styles", weight_name="oil.safetensors", id="oil"))
from diffusion_opd.teachers import load_teachers, manifest_of, name_teachers
student = DiffusionPipeline.from_pretrained("acme/base")
result = manifest_of(load_teachers(name_teachers(teachers), student, True, torch.float32))["teachers"]
try:
    load_teachers(name_teachers("acme/styles"), student, True, torch.float32)
except ValueError as error:
    result.append(str(error))
"""


@pytest.mark.slow
def test_the_only_file_of_a_repository_is_the_lora(hub: HubServer, tmp_path):
    *entries, refusal = client(hub, tmp_path, COMMON + SOLE)
    assert len({entry["sha256"] for entry in entries}) == 1 and all(entry["commit"] for entry in entries)
    assert "'acme/styles' holds 2 safetensors files (chalk.safetensors, oil.safetensors); name the LoRA" in refusal
    assert not any(re.match("GET .*chalk", request) for request in hub.requests)
    *offline, _ = client(hub, tmp_path, COMMON + SOLE, HF_HUB_OFFLINE="1")
    assert offline[:3] == entries


REFUSALS = """
result = {}
for key, teacher in {
    "repository": Teacher("acme/gone", id="x"),
    "revision": Teacher("acme/teachers", subfolder="AesTeacher/lora", revision="v9", id="x"),
    "subfolder": Teacher("acme/teachers", subfolder="GenEvalTeacher/lora", id="x"),
    "other revision": Teacher("acme/teachers", subfolder="OCRTeacher/lora", id="x"),
    "weights": Teacher("acme/teachers", subfolder="AesTeacher", weight_name="w.safetensors", id="x"),
    "kind": Teacher("acme/prompts", id="x"),
}.items():
    try:
        DiffusionOPDTrainer("acme/base", teacher, DiffusionOPDConfig("out", use_cpu=True))
    except ValueError as error:
        result[key] = str(error)
"""


@pytest.mark.slow
def test_what_is_not_on_the_hub_is_refused_in_a_sentence(hub: HubServer, home: Path):
    sentences = client(hub, home, COMMON + REFUSALS)
    words = {
        "repository": ["'acme/gone'", "neither a folder nor a repository on the Hub"],
        "revision": ["'acme/teachers'", "has no revision 'v9'"],
        "subfolder": ["'acme/teachers/GenEvalTeacher/lora'", "no LoRA", "`subfolder`"],
        "other revision": ["'acme/teachers/OCRTeacher/lora'", "no LoRA"],
        "weights": ["'acme/teachers/AesTeacher'", "w.safetensors", "`weight_name`"],
        "kind": ["'acme/prompts'", "neither a folder nor a repository on the Hub"],
    }
    assert sentences.keys() == words.keys()
    for key, sentence in sentences.items():
        assert "\n" not in sentence and sentence.startswith("teacher 'x'"), sentence
        assert all(word in sentence for word in words[key]), sentence


@pytest.mark.slow
def test_an_unknown_teacher_offline_is_refused_in_a_sentence(hub: HubServer, home: Path):
    sentences = client(hub, home, COMMON + REFUSALS, HF_HUB_OFFLINE="1")
    assert "is not in the local cache" in sentences["repository"] and "offline" in sentences["repository"]


def test_a_token_is_not_needed_to_read(hub: HubServer, tmp_path):
    code = "from huggingface_hub import list_repo_files\nresult = list_repo_files('acme/bare')"
    assert client(hub, tmp_path, code, HF_TOKEN="") == sorted(hub.repositories["models/acme/bare"].at("main").files)
    assert TOKEN  # and a wrong one may not write: see the first test


# Ways to push


MAKE = """
import logging
from datasets import Dataset
from diffusion_opd import DiffusionGRPOConfig, DiffusionGRPOTrainer

logging.basicConfig(filename="warnings.txt", level=logging.WARNING)
prompts = Dataset.from_dict({"prompt": ["a red fox", "a lake"]})
lora = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v"])
settings = dict(push_to_hub=True, hub_always_push=True, max_steps=2, save_steps=1, num_inference_steps=4)
settings |= dict(learning_rate=1e-2, call_kwargs=call, per_device_train_batch_size=2, report_to="none", use_cpu=True)

def make(output_dir, model="acme/base", teachers=Teacher("acme/bare"), eval_dataset=None, **more):
    args = DiffusionOPDConfig(output_dir, **(settings | more))
    return DiffusionOPDTrainer(model, teachers, args, prompts, eval_dataset, peft_config=lora)
"""

PICTURE = """
def picture(pipe):
    pipe.transformer.requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    (image,) = pipe("a cat", num_inference_steps=3, generator=generator, **call).images
    return list(image.tobytes())
"""

PUSH = """
result = {}
for strategy in ("end", "every_save", "checkpoint", "all_checkpoints"):
    trainer = make(f"by-{strategy}", hub_strategy=strategy, hub_private_repo=strategy == "end")
    trainer.train()
    if strategy == "end":
        trainer.save_model()
    result[f"by-{strategy}"] = picture(trainer.pipeline)

def dark(prompts, images, **columns):
    return [-sum(image.convert("L").tobytes()) / 1000 for image in images]

args = DiffusionGRPOConfig("by-rewards", **(settings | dict(num_generations=2)))
trainer = DiffusionGRPOTrainer("acme/base", dark, args, prompts, peft_config=lora)
trainer.train()
trainer.push_to_hub()
result["by-rewards"] = picture(trainer.pipeline)
"""

PULL = """
from huggingface_hub import ModelCard, ModelCardData

names = ["by-end", "by-every_save", "by-checkpoint", "by-all_checkpoints", "by-rewards"]
result = {"base": picture(DiffusionPipeline.from_pretrained("acme/base"))}
for name in names:
    pipe = DiffusionPipeline.from_pretrained("acme/base")
    pipe.load_lora_weights(f"me/{name}")
    result[name] = picture(pipe)
card = ModelCard.load("me/by-rewards")
card.validate()
assert ModelCardData(**card.data.to_dict()).to_dict() == card.data.to_dict()
result["card"] = card.content
"""


@pytest.fixture(scope="module")
def pushed(hub: HubServer, home: Path) -> dict:
    """Runs that pushed in each way that transformers knows, and what their students drew."""
    hub.seconds_an_upload = 1.0  # longer than a step: an upload must not see the files of the next one
    try:
        return client(hub, home, COMMON + MAKE + PICTURE + PUSH)
    finally:
        hub.seconds_an_upload = 0.0


@pytest.mark.slow
def test_what_lies_on_the_hub_after_each_strategy(hub: HubServer, pushed: dict):
    student = {"pytorch_lora_weights.safetensors", "README.md", "teacher_manifest.json", "metrics.json"}
    state = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "checkpoint_files.json", "run.json"}
    checkpoint = {"pytorch_lora_weights.safetensors", "teacher_manifest.json", "training_args.bin"} | state
    folders = {"end": [], "every_save": [], "checkpoint": ["last-checkpoint"]}
    folders |= {"all_checkpoints": ["checkpoint-1", "checkpoint-2"]}
    for strategy, expected in folders.items():
        repository = hub.repositories[f"models/me/by-{strategy}"]
        files = repository.at("main").files.keys() - {".gitattributes"}
        in_folders = {f"{folder}/{name}" for folder in expected for name in checkpoint}
        others = {path for path in files if not path.startswith("images/")}
        assert others == student | in_folders, strategy
        assert repository.private == (strategy == "end")
        titles = [commit.title for commit in repository.commits][1:]
        in_progress = [f"Training in progress, step {step}" for step in (1, 2)]
        if strategy == "end":
            assert titles == ["Model save"]
        else:
            assert [title for title in titles if "checkpoint" not in title] == in_progress
            assert len(titles) == (2 if strategy == "every_save" else 4)
    for commit in hub.repositories["models/me/by-all_checkpoints"].commits:
        if match := re.fullmatch(r"Training in progress, step (\d), checkpoint", commit.title):
            pushed_step, name = match[1], "pytorch_lora_weights.safetensors"
            assert commit.files[name].data == commit.files[f"checkpoint-{pushed_step}/{name}"].data
    last = json.loads(
        hub.repositories["models/me/by-checkpoint"].at("main").files["last-checkpoint/trainer_state.json"].data
    )
    assert last["global_step"] == 2
    assert {"reward_manifest.json", "README.md"} <= hub.repositories["models/me/by-rewards"].at("main").files.keys()


@pytest.mark.slow
def test_the_picture_is_the_trainers(hub: HubServer, pushed: dict, tmp_path):
    without_us = COMMON.replace("from diffusion_opd import", "# from diffusion_opd import").split("teachers = ")[0]
    pulled = client(hub, tmp_path, without_us + PICTURE + PULL)
    for name, picture in pushed.items():
        assert pulled[name] == picture != pulled["base"], name
    assert "library_name: diffusers" in pulled["card"] and "`dark`" in pulled["card"]
    assert check_card(pulled["card"]) == ([], [])


RESUME = """
from huggingface_hub import snapshot_download

folder = snapshot_download("me/by-all_checkpoints", allow_patterns="checkpoint-1/*")
resumed = make("resumed", push_to_hub=False)
resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-1")
other = make("other", push_to_hub=False, model_init_kwargs={"revision": "v2"})
result = {"picture": picture(resumed.pipeline), "v2": other.pipeline.transformer.proj_out.bias.tolist()}
"""

BROKEN = """
trainer = make("broken-off", seed=1)
trainer.train()
result = open("warnings.txt").read()
trainer.push_to_hub()
"""


@pytest.mark.slow
def test_a_checkpoint_and_a_revision_from_the_hub(hub: HubServer, pushed: dict, tmp_path):
    other = BUILDERS["sd3"](7)
    other.save_pretrained(tmp_path / "v2")
    hub.publish("acme/base", tmp_path / "v2", branch="v2")
    result = client(hub, tmp_path / "home", COMMON + MAKE + PICTURE + RESUME)
    assert result == {
        "picture": pushed["by-all_checkpoints"],
        "v2": other.transformer.proj_out.bias.tolist(),
    }


@pytest.mark.slow
def test_an_upload_that_breaks_off_is_told_of_and_finished_by_the_next(hub: HubServer, home: Path):
    asked = len(hub.requests)
    hub.breaks_off_after = 1
    warnings = client(hub, home, COMMON + MAKE + BROKEN)
    assert hub.breaks_off_after is None
    assert warnings.count("An upload to me/broken-off failed (") == 1
    files = hub.repositories["models/me/broken-off"].at("main").files
    for name in ("pytorch_lora_weights.safetensors", "README.md", "teacher_manifest.json"):
        assert files[name].data == (home / "broken-off" / name).read_bytes()
    uploads = [request for request in hub.requests[asked:] if request.startswith("PUT")]
    assert [request for request in uploads if request.endswith("400")]
    done = [request for request in uploads if request.endswith("200")]
    assert len(done) == len(set(done)), "nothing goes up twice"


ROTATED = """
rotated = dict(hub_always_push=False, hub_strategy="all_checkpoints", save_total_limit=1)
make("rotated", **rotated).train()
# Nothing is learnt, so the first checkpoint stays the best, and the last one goes at the end
best = dict(eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, learning_rate=0.0)
make("best", eval_dataset=prompts, **rotated, **best).train()
result = open("warnings.txt").read()
"""


@pytest.mark.slow
def test_a_checkpoint_is_deleted_after_its_upload(hub: HubServer, tmp_path):
    hub.seconds_an_upload = 0.5  # longer than a step
    try:
        warnings = client(hub, tmp_path, COMMON + MAKE + ROTATED)
    finally:
        hub.seconds_an_upload = 0.0
    assert "An upload" not in warnings
    for name, kept in (("rotated", "checkpoint-2"), ("best", "checkpoint-1")):
        assert [folder.name for folder in (tmp_path / name).glob("checkpoint-*")] == [kept]
        files = hub.repositories[f"models/me/{name}"].at("main").files
        of_one = {path.relative_to(tmp_path / name / kept).as_posix() for path in (tmp_path / name / kept).rglob("*")}
        for checkpoint in ("checkpoint-1", "checkpoint-2"):
            assert {f"{checkpoint}/{file}" for file in of_one} <= files.keys(), checkpoint


BRANCHES = """
trainer = make("branchy", hub_revision="study/1")
trainer.train()
trainer.push_to_hub()
trainer.push_to_hub(revision="study-2")
make("branchy", hub_revision="study/1")
make("branchy", hub_revision="main")
result = {}
"""

NO_BRANCH = """
try:
    make("branchless", hub_revision="study")
except ValueError as error:
    result = str(error)
"""


@pytest.mark.slow
def test_a_branch_that_is_not_there_is_made_at_the_start(hub: HubServer, tmp_path):
    client(hub, tmp_path, COMMON + MAKE + BRANCHES)
    repository = hub.repositories["models/me/branchy"]
    assert repository.branches.keys() == {"main", "study/1", "study-2"}
    assert [path for path in repository.at("main").files] == [".gitattributes"]
    for branch in ("study/1", "study-2"):
        assert "pytorch_lora_weights.safetensors" in repository.at(branch).files
    hub.makes_branches = False
    try:
        sentence = client(hub, tmp_path, COMMON + MAKE + NO_BRANCH)
    finally:
        hub.makes_branches = True
    assert sentence.startswith("the repository 'me/branchless' has no branch 'study', and it cannot be made (")
    assert "\n" not in sentence


STUDENTS_AND_TOKENS = """
result = {}
for key, more in {
    "gone": dict(model="acme/gone"),
    "revision": dict(model_init_kwargs={"revision": "v9"}),
    "no pipeline": dict(model="acme/bare"),
    "private": dict(teachers="me/by-end"),
    "push": dict(push_to_hub=True),
}.items():
    try:
        make("nobody", **({"push_to_hub": False} | more))
    except ValueError as error:
        result[key] = str(error)
"""


@pytest.mark.slow
def test_students_and_tokens(hub: HubServer, pushed: dict, tmp_path):
    for token, words in {
        "": {
            "gone": "the student 'acme/gone' is neither a folder nor a repository on the Hub that you may read",
            "revision": "the student 'acme/base' has no revision 'v9'.",
            "no pipeline": "the student 'acme/bare' holds no pipeline (model_index.json).",
            "private": "teacher 'by-end': 'me/by-end' is neither a folder nor a repository on the Hub that",
            "push": "the repository 'nobody' cannot be had to push to (`hf auth login`, or a `hub_token` that may",
        },
        "wrong": {"push": "the student 'acme/base' may not be read with your token; log in anew with `hf auth login`."},
    }.items():
        sentences = client(hub, tmp_path / f"token {token}", COMMON + MAKE + STUDENTS_AND_TOKENS, HF_TOKEN=token)
        for key, sentence in words.items():
            assert sentences[key].startswith(sentence) and "\n" not in sentences[key], sentences[key]
    assert "models/me/nobody" not in hub.repositories
