"""`diffusion-opd reward-serve` as a process of its own, asked by `RemoteReward`."""

import asyncio
import base64
import contextlib
import importlib
import io
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
import yaml
from PIL import Image
from transformers import TrainerState

from diffusion_opd.cli.main import main
from diffusion_opd.rewards import load_reward
from diffusion_opd.rewards.remote import RemoteReward, encoded
from diffusion_opd.runs import hash_function
from tests import served_rewards
from tests.launched import held_port
from tests.rl_training import DATA, GRPO, trainer_of

ROOT = Path(__file__).parents[1]
NAMES = ["brightness", "length", "difference", "gated", "halved", "broken", "miscounts"]


class Server:
    """`reward-serve` of a YAML file, which can be ended and started again."""

    def __init__(self, folder: Path, port: int):
        self.folder, self.port, self.url = folder, port, f"http://127.0.0.1:{port}"
        funcs: list = [f"tests.served_rewards.{name}" for name in NAMES]
        funcs[4] = "tests.served_rewards.Halved"
        funcs[3] = {"name": funcs[3], "folder": str(folder)}
        self.config = folder / "serve.yaml"
        self.config.write_text(yaml.safe_dump({"reward_funcs": funcs, "max_pixels": 10000, "max_bytes": 1000000}))
        self.log = folder / "log"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        if self.process and self.process.poll() is None:
            return
        command = [sys.executable, "-m", "diffusion_opd.cli.main", "reward-serve", "--port", str(self.port)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--config", str(self.config)], env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        until(lambda: self.process.poll() is not None or self.url in self.log.read_text())
        assert self.process.poll() is None, self.log.read_text()

    def end(self, how: int) -> None:
        self.process.send_signal(how)
        self.process.wait(60)

    @contextlib.contextmanager
    def asked(self, *prompts: str, **options):
        """Clients of `gated`, which answers when the block opens it or ends; gives their answers to be."""
        asked, opened = self.folder / "asked", self.folder / "open"
        asked.write_text("")
        opened.unlink(missing_ok=True)
        remote = RemoteReward(self.url, "gated", **options)
        with ThreadPoolExecutor(len(prompts)) as pool:
            try:
                answers = [pool.submit(ask, remote, [prompt], [grey(0)]) for prompt in prompts]
                until(asked.read_text)
                yield answers
            finally:
                opened.touch()


def until(true) -> None:
    for _ in range(12000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("two minutes were not enough")


@pytest.fixture(scope="module")
def the_server(tmp_path_factory):
    with held_port() as port:
        server = Server(tmp_path_factory.mktemp("server"), port)
        yield server
        if server.process.poll() is None:
            server.end(signal.SIGTERM)


@pytest.fixture
def server(the_server):
    the_server.start()
    return the_server


@pytest.fixture
def url(server) -> str:
    return server.url


def grey(value: int, size=(8, 8)) -> Image.Image:
    return Image.new("RGB", size, (value, value, value))


def ask(reward, prompts, images, **columns):
    return asyncio.run(reward(prompts=prompts, images=images, **columns))


def test_the_numbers_are_those_of_the_function(url):
    """To the last bit, over several requests, with columns, a video, and no score where the function has none."""
    prompts = ["a cat", "no score", "a video", "nan", "a dog"]
    images = [grey(10), grey(20), [grey(30), grey(50)], grey(60), Image.radial_gradient("L").resize((80, 90))]
    bonus = [0.1, 2.0, 0.5, 3.0, 1 / 3]
    wanted = served_rewards.brightness(prompts, images, bonus=bonus)
    assert wanted[:3] == [10.1, None, 40.5] and math.isnan(wanted[3])
    wanted[3] = None
    remote = RemoteReward(url, "brightness", batch_size=2)
    assert ask(remote, prompts, images, bonus=bonus, trainer_state=TrainerState()) == wanted


def test_columns_of_pictures_are_sent_as_pictures(url, caplog):
    remote, images = RemoteReward(url, "difference", batch_size=1), [grey(10), grey(20), grey(30)]
    assert ask(remote, ["a"] * 3, images, source=[grey(4), None, grey(31)]) == [6.0, None, 1.0]
    assert not caplog.records
    # What is no JSON and no picture stays here
    for _ in range(2):
        assert ask(remote, ["a"], [grey(10)], source=[grey(4)], latent=[torch.zeros(2)]) == [6.0]
    assert [record.message for record in caplog.records] == [
        "The column 'latent' is not sent to the reward 'difference': JSON has no such."
    ]


def test_the_client_chooses_the_scale(url):
    """One server is enough for training and for tables."""
    remote = {"name": "remote", "url": url, "reward": "halved"}
    for scale, wanted in (("table", 10.0), ("training", 5.0), ("table", 10.0)):
        assert ask(load_reward(remote, scale=scale), ["a"], [grey(10)]) == [wanted]
    assert ask(load_reward(remote), ["a"], [grey(10)]) == [5.0]


def test_what_is_served(server):
    needs = {"length": ["wanted"], "difference": ["source"]}
    assert httpx.get(f"{server.url}/rewards").json() == {"rewards": {name: needs.get(name, []) for name in NAMES}}
    assert server.log.read_text().splitlines().count(f"Rewards are served at {server.url}.") == 1  # libraries print too


def test_sixty_four_at_once(url):
    """Each request gets its own answer, and the scorer one request at a time."""

    def one(number: int) -> list:
        return ask(RemoteReward(url, "brightness"), [str(number)] * 2, [grey(number), grey(number + 100)])

    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(one, range(64)))
    assert answers == [[number, number + 100] for number in range(64)]
    many = RemoteReward(url, "brightness", batch_size=1, max_concurrency=64)
    assert ask(many, ["x"] * 64, [grey(number) for number in range(64)]) == list(range(64))


def test_a_scorer_at_work_holds_up_nobody_else(server):
    with server.asked("a cat") as (answer,):
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
        assert ask(RemoteReward(server.url, "brightness"), ["a"], [grey(7)]) == [7.0]
        assert not answer.done()
    assert answer.result() == [5.0]


def test_who_has_gone_is_not_scored(server):
    """One is scored and the next is read already; those behind them leave the queue when their clients do."""
    with server.asked("a") as (first,):
        impatient = RemoteReward(server.url, "gated", timeout=0.5, max_retries=0)
        with ThreadPoolExecutor(8) as pool:
            gone = [pool.submit(ask, impatient, ["gone"], [grey(0)]) for _ in range(8)]
        assert {type(one.exception()) for one in gone} == {ConnectionError}
    assert first.result() == [1.0] and ask(impatient, ["last"], [grey(0)]) == [4.0]
    assert (server.folder / "asked").read_text().split().count("gone") <= 1


def test_as_a_reward_function_of_a_trainer(url, tmp_path):
    """A run learns from the server exactly what it learns from the function."""
    remote = load_reward({"name": "remote", "url": url, "reward": "brightness", "batch_size": 3})
    data = DATA.add_column("bonus", [0.1 * row for row in range(len(DATA))])
    runs = []
    for reward in (remote, served_rewards.brightness):
        trainer = trainer_of(GRPO, tmp_path / str(len(runs)), rewards=reward, data=data)
        trainer.train()
        metrics = [log["rewards/brightness/mean"] for log in trainer.state.log_history if "loss" in log]
        runs.append((metrics, [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]))
    assert runs[0][0] == runs[1][0] and len(runs[0][0]) == 2
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=0, atol=0)


def test_a_resumed_run_may_ask_a_server_elsewhere():
    remote = RemoteReward("http://here:1", "length")
    assert hash_function(remote) == hash_function(RemoteReward("http://elsewhere:2", "length", timeout=3))
    for other in (RemoteReward("http://here:1", "brightness"), RemoteReward("http://here:1", "length", scale="table")):
        assert hash_function(remote) != hash_function(other)


def test_what_fails_says_so(url):
    images = [grey(1), grey(2)]
    for reward, columns, error, message in [
        ("broken", {}, RuntimeError, "'broken' of .* fails: RuntimeError: the scorer's model is gone"),
        ("miscounts", {}, RuntimeError, "'miscounts' must return a list of 2 rewards"),
        ("length", {}, ValueError, r"refuses the request: .*'length' needs \['wanted'\]"),
        ("unheard", {}, ValueError, "no reward is called 'unheard' here; there are"),
        ("brightness", {"bonus": [1]}, ValueError, "`bonus` has 1 entries for 2 prompts"),
        ("difference", {"source": [grey(1)] * 3}, ValueError, "`source` has 3 entries for 2 prompts"),
    ]:
        with pytest.raises(error, match=message):
            ask(RemoteReward(url, reward), ["a", "b"], images, **columns)
    with pytest.raises(ValueError, match="`images.0` has 200 x 100 pixels, at most 10000 are taken"):
        ask(RemoteReward(url, "brightness"), ["a"], [grey(1, (200, 100))])
    with pytest.raises(ValueError, match="refuses the request: the request has [0-9]+ bytes, at most 1000000 are"):
        ask(RemoteReward(url, "brightness"), ["a" * 8000000], [grey(1)])
    with pytest.raises(ValueError, match="begins with http:// or https://, got 'localhost:8000'"):
        RemoteReward("localhost:8000", "brightness")
    # A server that is not there, tried twice
    with held_port() as port, pytest.raises(ConnectionError, match="did not answer in 2 tries"):
        ask(RemoteReward(f"http://127.0.0.1:{port}", "brightness", max_retries=1), ["a"], images[:1])


def _bomb() -> str:
    """The header of a PNG of 60000 x 60000, and little else."""
    file = io.BytesIO()
    grey(0).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = (60000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return base64.b64encode(bytes(data)).decode()


def _jpeg() -> str:
    file = io.BytesIO()
    grey(0).save(file, "JPEG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    ("content", "status", "sentence"),
    [
        (b"\x80\x04pickle", 400, "error parsing the body"),
        (b"[1]", 422, "valid dictionary"),
        ({"prompts": ["a"]}, 422, "`images`: Field required"),
        ({"prompts": ["a"], "images": ["!!!"]}, 422, "`images.0` is no PNG file in base64"),
        ({"prompts": ["a"], "images": [_jpeg()]}, 422, "`images.0` is no PNG file in base64"),
        ({"prompts": ["a"], "images": [_bomb()]}, 413, "`images.0` is too large, at most 10000 pixels"),
        ({"prompts": ["a"], "images": [encoded(grey(1))[:40]]}, 422, "`images.0` is no PNG file in base64"),
        ({"prompts": ["a", "b"], "images": [encoded(grey(1))]}, 422, "`images` has 1 entries for 2 prompts"),
        ({"prompts": ["a"] * 257, "images": [encoded(grey(1))] * 257}, 413, "1 to 256 samples, got 257"),
        ({"prompts": [], "images": []}, 422, "a request has 1 to 256 samples, got 0"),
        ({"prompts": ["a"], "images": [encoded(grey(1))], "columns": {"prompts": [1]}}, 422, "rename them"),
        ({"prompts": ["a"], "images": [[encoded(grey(1)), "x"]]}, 422, "`images.0.1` is no PNG file in base64"),
    ],
)
def test_wrong_input_is_refused_in_a_sentence(url, content, status, sentence):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    reply = httpx.post(f"{url}/rewards/brightness", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == status and sentence in reply.json()["detail"], reply.text
    assert ask(RemoteReward(url, "brightness"), ["a"], [grey(7)]) == [7.0]  # it serves on


def test_a_request_that_is_too_long_or_does_not_say(url):
    def chunks():
        yield b"{}"

    assert httpx.post(f"{url}/rewards/brightness", content=chunks()).status_code == 411
    # Its length alone is looked at
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as line:
        line.sendall(b"POST /rewards/brightness HTTP/1.1\r\nHost: x\r\nContent-Length: 1099511627776\r\n\r\n")
        assert b" 413 " in line.recv(4096)


def test_a_server_that_is_killed_and_started_again(server, caplog):
    """Who waits for an answer then gets it from the new one."""
    with server.asked("a cat", "a mouse") as answers:
        server.end(signal.SIGKILL)
        server.start()
    assert [answer.result() for answer in answers] == [[5.0], [7.0]]
    assert f"Waiting for the reward 'gated' of {server.url}: " in caplog.text


def test_a_server_that_is_told_to_end_answers_first(server):
    with server.asked("a cat", max_retries=0) as (answer,):
        server.process.send_signal(signal.SIGTERM)
        until(lambda: _refuses(server.port))
        assert server.process.poll() is None
    assert answer.result() == [5.0]
    server.process.wait(60)


def _refuses(port: int) -> bool:
    with socket.socket() as line:
        return line.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.parametrize(
    ("package", "reward"), [("httpx", {"name": "remote", "url": "http://here:1", "reward": "a"}), ("fastapi", None)]
)
def test_without_the_extra(package, reward, monkeypatch):
    for module in ("remote", "server"):
        monkeypatch.delitem(sys.modules, f"diffusion_opd.rewards.{module}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'diffusion-opd\[rewards\]'"):
        load_reward(reward) if reward else importlib.import_module("diffusion_opd.rewards.server")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "`reward_funcs` is empty"),
        (["--reward_funcs", "geneva"], "no reward is called 'geneva'"),
        (["--reward_funcs", *["tests.served_rewards.brightness"] * 2], "two rewards are called 'brightness'"),
        (["--reward_func", "ocr"], "does it mean '--reward_funcs'?"),
    ],
)
def test_a_mistake_on_the_command_line(flags, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["reward-serve", *flags])
    assert ended.value.code == 2 and sentence in capsys.readouterr().err


def test_a_scale_in_the_file_of_a_server(tmp_path, capsys):
    config = tmp_path / "serve.yaml"
    config.write_text("reward_funcs: [{name: jpeg_compressibility, scale: table}]")
    with pytest.raises(SystemExit):
        main(["reward-serve", "--config", str(config)])
    assert "`scale` of 'jpeg_compressibility' is chosen by whoever asks; leave it out." in capsys.readouterr().err
