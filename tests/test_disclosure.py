"""What leaves the machine: every byte that reached a Hub (tests/hub_server.py) is searched for the secrets and the
places of the run that sent it."""

import json
import os
from pathlib import Path

import pytest
import torch

from tests.adapters import save_diffusers
from tests.hub_server import TOKEN, HubServer, client
from tests.tiny_pipelines import BUILDERS, CALL

OTHER_TOKEN = "hf_anotherSecretToken"
ENV = "PASSWORD=correct horse battery staple"

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
        call_kwargs={CALL!r}[family],
        report_to="tensorboard",
        use_cpu=True,
    ) | settings))
    base = world.parent / "secret-bases" / family
    own = DiffusionPipeline.from_pretrained(base)
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
}
LORA, PEFT = {"pytorch_lora_weights.safetensors"}, {"adapter_model.safetensors", "adapter_config.json"}
WHOLE = {"model_index.json", "scheduler", "transformer", "vae"}
WHOLE |= {f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")}
CHECKPOINTS = {"checkpoint-1", "checkpoint-2"}


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """Where the runs are at home: the bases, the teachers, the output folders, the cache."""
    home = tmp_path_factory.mktemp("home")
    for family in ("sd3", "pixart_sigma"):
        BUILDERS[family](0).save_pretrained(home / "secret-bases" / family)
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
    weights = {"lora": LORA, "checkpoint": LORA, "end": LORA, "peft": PEFT}.get(run, WHOLE)
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
