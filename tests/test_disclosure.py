"""What leaves the machine: every byte that reached a Hub (tests/hub_server.py) is searched for the secrets and the
places of the run that sent it."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from diffusion_opd.disclosure import disclosed
from tests.adapters import save_diffusers
from tests.card_rules import check_card
from tests.hub_server import TOKEN, HubServer, client
from tests.tiny_pipelines import BUILDERS, CALL
from tests.training import trainer_of
from tests.zoo import ZOO

OTHER_TOKEN = "hf_anotherSecretToken"
ENV = "PASSWORD=correct horse battery staple"

MODULAR = "FluxModularPipeline"
HOST = "the-host-of-a-laboratory"

RUN = f"""
import platform, socket
socket.gethostname = platform.node = lambda: {HOST!r}  # the real one may be two letters, which lie in any weights
from pathlib import Path
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import LoraConfig
from diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer, Teacher

world = Path.cwd() / "world"
prompts = Dataset.from_dict({{"prompt": ["a red fox", "a lake"], "teacher_id": ["styles", "own"]}})

def train(name, family="sd3", lora=True, **settings):
    out = world / name
    out.mkdir(parents=True)
    for place in (".env", "notes.md", "images/.env", "transformer/.env", "runs/.env", ".hidden/key", "config.json"):
        (out / place).parent.mkdir(exist_ok=True)
        (out / place).write_text({ENV!r})
    args = DiffusionOPDConfig(**(dict(
        output_dir=str(out),
        push_to_hub=True,
        hub_token={TOKEN!r},
        hub_always_push=True,
        model_init_kwargs={{"token": {OTHER_TOKEN!r}, "cache_dir": str(world / "cache")}},
        max_steps=2,
        save_steps=1,
        eval_steps=1,
        eval_strategy="steps",
        load_best_model_at_end=True,
        num_inference_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        call_kwargs={CALL | {"modular": ZOO[MODULAR].call}!r}[family],
        report_to="tensorboard",
        use_cpu=True,
    ) | settings))
    base = world.parent / "secret-bases" / family
    own = base if family == "modular" else DiffusionPipeline.from_pretrained(base)
    teachers = [Teacher(base.parent / "styles" if family == "sd3" else base, id="styles"), Teacher(own, id="own")]
    trainer = DiffusionOPDTrainer(
        str(base),
        teachers,
        args,
        prompts,
        prompts,
        peft_config=LoraConfig(r=2, target_modules=["to_q", "to_v"]) if lora else None,
    )
    trainer.train()
    trainer.push_to_hub(dataset_name=str(world / "prompts.json"))
    trainer.save_model()
"""

RUNS = {
    "lora": "",
    "checkpoint": "hub_strategy='checkpoint'",
    "all-checkpoints": "hub_strategy='all_checkpoints', lora=False",
    "end": "hub_strategy='end', ema_decay=0.5",
    "peft": "family='pixart_sigma'",
    "whole": "lora=False",
    "modular": "family='modular', lora=False",
}
LORA, PEFT = {"pytorch_lora_weights.safetensors"}, {"adapter_model.safetensors", "adapter_config.json"}
WHOLE = {"model_index.json", "scheduler", "transformer", "vae"}
WHOLE |= {f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")}
PARTS = {"modular_model_index.json", *(WHOLE - {"model_index.json", "text_encoder_3", "tokenizer_3"})}
CHECKPOINTS = {"checkpoint-1", "checkpoint-2"}


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """Where the runs are at home: the bases, the teachers, the output folders, the cache."""
    home = tmp_path_factory.mktemp("home")
    for family in ("sd3", "pixart_sigma"):
        BUILDERS[family](0).save_pretrained(home / "secret-bases" / family)
    ZOO[MODULAR].make(0).save_pretrained(str(home / "secret-bases" / "modular"), overwrite_modular_index=True)
    save_diffusers(home / "secret-bases" / "styles", seed=1)
    return home


@pytest.fixture(scope="module")
def hub(places: Path):
    with HubServer() as server:
        calls = "\n".join(f"train({name!r}, {how})" for name, how in RUNS.items())
        client(server, places, f"{RUN}\n{calls}\nresult = {{}}", HF_TOKEN="")
        yield server


def secrets(places: Path) -> set[bytes]:
    known = {TOKEN, OTHER_TOKEN, ENV, HOST, str(places), os.path.realpath(places), "secret-bases", str(Path.home())}
    return {text.encode() for text in known}


def assert_tells_nothing(where: str, content: bytes, words: set[bytes]) -> None:
    for word in words:
        assert word not in where.encode(), where
        found = content.find(word)
        assert found < 0, (where, content[max(0, found - 200) : found + 100])


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_nothing_that_was_pushed_names_a_secret_or_a_place(run: str, hub: HubServer, places: Path):
    commits = hub.repositories[f"models/me/{run}"].commits
    assert len(commits) > 1
    for commit in commits:
        for path, file in commit.files.items():
            assert_tells_nothing(path, file.data, secrets(places))


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_what_goes_up_is_what_the_run_has_made(run: str, hub: HubServer):
    """And not what else lies in its folder."""
    files = set(hub.repositories[f"models/me/{run}"].at("main").files)
    top = {path.partition("/")[0] for path in files} - {".gitattributes"}
    weights = {"lora": LORA, "checkpoint": LORA, "end": LORA, "peft": PEFT, "modular": PARTS}.get(run, WHOLE)
    weights = weights | {"checkpoint": {"last-checkpoint"}, "all-checkpoints": CHECKPOINTS}.get(run, set())
    assert top == weights | {"README.md", "teacher_manifest.json", "metrics.json", "images"}


@pytest.mark.slow
def test_metrics_go_up(hub: HubServer, places: Path):
    pushed = json.loads(hub.repositories["models/me/lora"].at("main").files["metrics.json"].data)
    state = json.loads((places / "world" / "lora" / "checkpoint-2" / "trainer_state.json").read_text())
    assert pushed[: len(state["log_history"])] == state["log_history"]
    assert {"kl", "eval_kl", "train_loss"} <= {key for entry in pushed for key in entry}


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_what_stays_here_names_no_secret(run: str, hub: HubServer, places: Path):
    """The files of TensorBoard, whose names hold the host, and the settings, for whoever hands the folder on."""
    folder = places / "world" / run
    written = [path for path in folder.rglob("*") if path.is_file() and b"battery staple" not in path.read_bytes()]
    assert [path for path in written if "tfevents" in path.name and b"hub_token" in path.read_bytes()]
    for path in written:
        assert_tells_nothing("", path.read_bytes(), {TOKEN.encode(), OTHER_TOKEN.encode()})
    settings = torch.load(folder / "training_args.bin", weights_only=False)
    assert (settings.output_dir, settings.hub_token, settings.seed) == (run, "<HUB_TOKEN>", 42)


# Cards: what a user calls things is shown as it is

NASTY = [
    "a|b",
    "`tick`",
    "``` fence",
    "two\nlines\n\n---\nthree",
    "<script>alert(1)</script> <b>bold</b>",
    "__init__ *star* ~~no~~ [link](http://x.y) ![p](q.png)",
    "&amp; {{ 7 * 7 }} {% raw %} # \\| \\",
    "key: value, 'single' \"double\" - [x] {y} ? @ % !tag &anchor *alias",
    "- yes",
    "---",
    "\u2028 separators \x85 and \x00 nothing \x1b[31m",
    "漢字 🦊",
]


def shown(text: str) -> str:
    """Of a text what one line of a page shows."""
    return " ".join(text.replace("\0", "\ufffd").split())


def cells(markdown: str) -> list[list[str]]:
    """The tables of a page, row by row, as a reader sees their cells."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(markdown)
    assert {token.content.strip() for token in tokens if token.type == "html_block"} == {"<Gallery />"}
    rows: list[list[str]] = []
    for before, token in zip(tokens, tokens[1:], strict=False):
        if before.type == "tr_open":
            rows.append([])
        if before.type == "td_open":
            kinds = {child.type for child in token.children}
            assert kinds <= {"text", "code_inline", "text_special"}, (kinds, token.content)
            rows[-1].append("".join(child.content for child in token.children))
    return [row for row in rows if row]


def test_names_do_not_break_a_card(tmp_path):
    """With a parser of Markdown, and the reader of metadata that the Hub's client has."""
    teachers = {name: BUILDERS["sd3"](1) for name in NASTY}
    data = Dataset.from_dict({"prompt": NASTY, "teacher_id": NASTY})
    trainer = trainer_of(
        tmp_path / "run", teachers=teachers, data=data, image_prompts=NASTY, max_steps=1, image_steps=1
    )
    trainer.pictures.log()
    for name in NASTY:
        trainer.create_model_card(model_name=name, tags=NASTY)
        content = (tmp_path / "run" / "README.md").read_text()
        card = ModelCard(content)
        assert card.data.model_name == name and card.data.tags[-len(NASTY) :] == NASTY
        assert [item["text"] for item in card.data.widget] == NASTY
        assert check_card(content) == ([], [])
        rows = cells(card.text)
        assert [row[0] for row in rows[: len(NASTY)]] == [shown(name) for name in NASTY]
        assert {len(row) for row in rows[: len(NASTY)]} == {4} and {len(row) for row in rows[len(NASTY) :]} == {2}
        tokens = MarkdownIt("commonmark").parse(card.text)
        heading = tokens[[token.type for token in tokens].index("heading_open") + 1]
        assert "".join(child.content for child in heading.children) == shown(name)
        assert re.search("```python\n(.*?)\n```\n", card.text, re.DOTALL)


def test_code_on_a_card_runs_whatever_its_folder_is_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = 'a "quoted" \\ `tick`'
    trainer = trainer_of(Path(name), full=True, max_steps=1)
    trainer.save_model()
    trainer.create_model_card()
    text = ModelCard.load(Path(name, "README.md")).text
    lines = re.search("```python\n(.*?)\n```\n", text, re.DOTALL)[1].splitlines()
    found: dict = {}
    exec("\n".join(line for line in lines if "= pipe(" not in line), found)  # noqa: S102
    assert type(found["pipe"]) is type(trainer.pipeline)


SETTINGS = {
    "secrets": (
        {"hub_token": "hf_x", "a": [{"api_key": "x", "use_auth_token": "y", "token": True}], "proxies": {"https": "z"}},
        {
            "hub_token": "<HUB_TOKEN>",
            "a": [{"api_key": "<API_KEY>", "use_auth_token": "<USE_AUTH_TOKEN>", "token": True}],
        }
        | {"proxies": "<PROXIES>"},
    ),
    "paths": (
        {
            "path": Path("/data/me/run"),
            "file": "/data/me/run.json",
            "url": "https://me:pw@host/x",
            "relative": "runs/x",
        },
        {"path": "run", "file": "run.json", "url": "https://<PASSWORD>@host/x", "relative": "runs/x"},
    ),
    "others": ({"max_token_length": 8, "bos": "<s>", "pair": (1, 2), "nothing": None, "token": None},) * 2,
}


@pytest.mark.parametrize(("given", "told"), SETTINGS.values(), ids=SETTINGS)
def test_settings_as_others_may_read_them(given: dict, told: dict):
    assert disclosed(given) == told
