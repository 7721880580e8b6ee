"""`diffusion-opd reward-serve` as a process of its own, asked by `RemoteReward`."""

import asyncio
import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from PIL import Image
from transformers import TrainerState

from diffusion_opd.cli.main import main
from diffusion_opd.rewards import Rewards, load_reward
from diffusion_opd.rewards.remote import RemoteReward, encoded
from diffusion_opd.runs import hash_function
from tests import served_rewards
from tests.launched import held_port

ROOT = Path(__file__).parents[1]
FUNCS = [f"tests.served_rewards.{name}" for name in ("brightness", "length", "broken", "miscounts")]


@contextlib.contextmanager
def serving(port: int, *more: str):
    command = [sys.executable, "-m", "diffusion_opd.cli.main", "reward-serve", "--port", str(port), *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for _ in range(1200):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/health").json() == {"status": "ok"}:
                    break
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def url():
    with held_port() as port, serving(port, "--reward_funcs", *FUNCS, "--max_pixels", "10000"):
        yield f"http://127.0.0.1:{port}"


def grey(value: int, size=(8, 8)) -> Image.Image:
    return Image.new("RGB", size, (value, value, value))


def ask(reward, prompts, images, **columns):
    return asyncio.run(reward(prompts=prompts, images=images, **columns))


def test_the_numbers_are_those_of_the_function(url):
    prompts, images = ["a cat", "no score", "a video"], [grey(10), grey(20), [grey(30), grey(50)]]
    wanted = served_rewards.brightness(prompts, images, bonus=[1.0, 2.0, 0.5])
    assert wanted == [11.0, None, 40.5]
    remote = RemoteReward(url, "brightness", batch_size=2)
    assert ask(remote, prompts, images, bonus=[1.0, 2.0, 0.5], trainer_state=TrainerState()) == wanted
    assert httpx.get(f"{url}/rewards").json() == {"rewards": ["brightness", "length", "broken", "miscounts"]}


def test_sixty_four_at_once(url):
    """Each request gets its own answer, and the scorer one request at a time."""

    def one(number: int) -> list:
        return ask(RemoteReward(url, "brightness"), [str(number)] * 2, [grey(number), grey(number + 100)])

    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(one, range(64)))
    assert answers == [[number, number + 100] for number in range(64)]
    many = RemoteReward(url, "brightness", batch_size=1, max_concurrency=64)
    assert ask(many, ["x"] * 64, [grey(number) for number in range(64)]) == list(range(64))


def test_as_a_reward_function_of_a_trainer(url):
    """`Rewards`, which trainers call, awaits it beside a local one; the name is the remote one's."""
    remote = load_reward({"name": "remote", "url": url, "reward": "length"})
    rewards = Rewards([remote, served_rewards.brightness])
    rows = [{"prompt": "four", "wanted": 1, "picture": grey(0)}, {"prompt": "a", "wanted": 1, "picture": grey(0)}]
    assert rewards("all", rows, [grey(1), grey(2)], TrainerState()).tolist() == [[3.0, 1.0], [0.0, 2.0]]
    assert rewards.all_names == ["length", "brightness"]
    assert hash_function(remote) == hash_function(RemoteReward("http://elsewhere:1", "length", timeout=3))
    assert hash_function(remote) != hash_function(RemoteReward(url, "brightness"))


def test_what_fails_says_so(url):
    images = [grey(1), grey(2)]
    for reward, columns, error, message in [
        ("broken", {}, RuntimeError, "'broken' of .* fails: RuntimeError: the scorer's model is gone"),
        ("miscounts", {}, RuntimeError, "'miscounts' must return a list of 2 rewards"),
        ("length", {}, ValueError, r"refuses the request: .*'length' needs \['wanted'\]"),
        ("unheard", {}, ValueError, "no reward is called 'unheard' here; there are"),
        ("brightness", {"trainer_states": [1]}, ValueError, "`trainer_states` has 1 entries for 2 prompts"),
    ]:
        with pytest.raises(error, match=message):
            ask(RemoteReward(url, reward), ["a", "b"], images, **columns)
    with pytest.raises(ValueError, match="a picture of 200 x 100 is too large, at most 10000 pixels are taken"):
        ask(RemoteReward(url, "brightness"), ["a"], [grey(1, (200, 100))])
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
        ({"prompts": ["a"], "images": ["!!!"]}, 422, "no PNG file in base64"),
        ({"prompts": ["a"], "images": [_jpeg()]}, 422, "no PNG file in base64"),
        ({"prompts": ["a"], "images": [_bomb()]}, 413, "a picture is too large, at most 10000 pixels"),
        ({"prompts": ["a"], "images": [encoded(grey(1))[:40]]}, 422, "no PNG file in base64"),
        ({"prompts": ["a", "b"], "images": [encoded(grey(1))]}, 422, "`images` has 1 entries for 2 prompts"),
        ({"prompts": [], "images": []}, 413, "a request has 1 to 256 samples, got 0"),
        ({"prompts": ["a"], "images": [encoded(grey(1))], "columns": {"prompts": [1]}}, 422, "rename them"),
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


def test_a_server_that_is_killed_and_started_again():
    """A client that waits meanwhile goes on without noticing."""
    with held_port() as port:
        answers: list = []
        with serving(port, "--reward_funcs", FUNCS[0]) as server:
            remote = RemoteReward(f"http://127.0.0.1:{port}", "brightness", batch_size=1)
            assert ask(remote, ["a"], [grey(5)]) == [5.0]
            server.send_signal(signal.SIGKILL)
            server.wait(30)
        waiting = threading.Thread(
            target=lambda: answers.append(ask(remote, ["a"] * 20, [grey(number) for number in range(20)]))
        )
        waiting.start()
        with serving(port, "--reward_funcs", FUNCS[0]):
            waiting.join(120)
        assert answers == [list(range(20))]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "`reward_funcs` is empty"),
        (["--reward_funcs", "geneva"], "no reward is called 'geneva'"),
        (["--reward_funcs", FUNCS[0], FUNCS[0]], "two rewards are called 'brightness'"),
        (["--reward_func", FUNCS[0]], "does it mean '--reward_funcs'?"),
    ],
)
def test_a_mistake_on_the_command_line(flags, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["reward-serve", *flags])
    assert ended.value.code == 2 and sentence in capsys.readouterr().err
