"""Judges behind a server that speaks chat completions: a real one, on a local port, with the answers of each test."""

import asyncio
import base64
import io
import json
import logging
import math
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from diffusion_opd.rewards import Rewards, load_reward
from diffusion_opd.rewards.vlm import UnifiedReward, VLMJudge
from diffusion_opd.runs import hash_function

RED, GREEN = (Image.new("RGB", (40, 20), colour) for colour in ("red", "green"))
SCORE = r"Score: ([\d.]+)"


def says(text: str) -> dict:
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


def first_token(**chances: float) -> dict:
    """An answer whose first token has these chances."""
    top = [{"token": token.replace("_", " "), "logprob": math.log(chance)} for token, chance in chances.items()]
    return {"choices": [{"message": {"content": "?"}, "logprobs": {"content": [{"top_logprobs": top}]}}]}


class ChatServer(ThreadingHTTPServer):
    """Answers question number `n`, from 0 (asked again it counts again), with `answer(n, body)`: JSON, bytes or a
    status."""

    daemon_threads = True

    def __init__(self, answer):
        self.answer, self.lock, self.questions, self.keys = answer, threading.Lock(), [], []
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self):
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        return self

    def __exit__(self, *args):
        self.shutdown()
        self.thread.join()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        assert self.path == "/v1/chat/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.questions)
            self.server.questions.append(body)
            self.server.keys.append(self.headers["Authorization"])
        answer = self.server.answer(number, body)
        status = answer if isinstance(answer, int) else 200
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


def asked(judge, prompts, images):
    return asyncio.run(judge(prompts, images))


def parts(body: dict) -> tuple[Image.Image, str]:
    """The picture and the text of a question."""
    picture, text = body["messages"][0]["content"]
    header, _, data = picture["image_url"]["url"].partition(",")
    assert header == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data))), text["text"]


def test_yes_against_no_in_the_first_token():
    answers = {"cat": first_token(Yes=0.5, _yes=0.1, No=0.2, maybe=0.2), "dog": first_token(no=0.5)}
    with ChatServer(lambda n, body: answers[re.search("cat|dog", parts(body)[1])[0]]) as server:
        judge = VLMJudge("judge", "Is this {prompt}? {yes} or {no}", server.url)
        assert asked(judge, ["a {cat}", "a {prompt} dog"], [RED, GREEN]) == [pytest.approx(0.6 / 0.8), 0]
    by_text = {parts(body)[1]: body for body in server.questions}
    assert by_text.keys() == {"Is this a {cat}? {yes} or {no}", "Is this a {prompt} dog? {yes} or {no}"}
    body = by_text["Is this a {cat}? {yes} or {no}"]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge", 0, 1)
    assert body["logprobs"] is True and body["top_logprobs"] == 20
    assert np.array_equal(np.asarray(parts(body)[0]), np.asarray(RED))


@pytest.mark.parametrize(("scale", "expected"), [("table", [7.5, 0, 10]), ("training", [0.75, 0, 1])])
def test_a_number_in_the_answer(scale, expected):
    answers = ["Not a Score: 3. Score: 7.5", "Score: 0.0", "Score: 10"]
    with ChatServer(lambda n, body: says(answers[int(parts(body)[1])])) as server:
        options = {"extra_body": {"seed": 1}, "max_tokens": 9}
        judge = VLMJudge("judge", "{prompt}", server.url, SCORE, (0, 10), scale=scale, **options)
        assert asked(judge, ["0", "1", "2"], [RED] * 3) == expected
    assert all(body["seed"] == 1 and body["max_tokens"] == 9 for body in server.questions)


def test_rewards_await_it_and_frames_count_alike():
    with ChatServer(lambda n, body: says("Score: 5" if parts(body)[0].getpixel((0, 0))[0] else "Score: 1")) as server:
        judge = VLMJudge("judge", "?", server.url, SCORE, num_frames=2)
        rewards = Rewards(judge)
        scores = rewards("a", [{"prompt": "x"}] * 2, [[RED, RED, GREEN], [RED]])
    assert scores.tolist() == [[0.5], [1]] and rewards.names("a") == ["vlm_judge"]
    assert len(server.questions) == 3


def test_large_pictures_are_made_smaller():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8))
    with ChatServer(lambda n, body: says("Score: 1")) as server:
        asked(VLMJudge("judge", "?", server.url, SCORE, max_size=45), [""], [picture])
        asked(VLMJudge("judge", "?", server.url, SCORE, max_size=90), [""], [picture])
    small, same = (parts(body)[0] for body in server.questions)
    assert np.array_equal(np.asarray(small), np.asarray(picture.resize((45, 30), Image.Resampling.BICUBIC)))
    assert np.array_equal(np.asarray(same), np.asarray(picture))


# What goes wrong

BROKEN = {
    "no number": says("I cannot tell."),
    "beyond the range": says("Score: 6"),
    "no choices": {"choices": []},
    "no text": {"choices": [{"message": {"content": None}}]},
    "no JSON": b"<html>",
    "a broken server": 500,
    "a busy server": 429,
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_read_is_asked_again(broken):
    with ChatServer(lambda n, body: says("Score: 4") if n else broken) as server:
        judge = VLMJudge("judge", "?", server.url, SCORE, scale="table")
        assert asked(judge, [""], [RED]) == [4]
    assert len(server.questions) == 2 and judge.failures == 0


@pytest.mark.parametrize("broken", [says("I cannot tell."), 503], ids=["no number", "a broken server"])
def test_then_there_is_no_score_and_it_is_told(broken, caplog):
    with ChatServer(lambda n, body: broken if "cat" in parts(body)[1] else says("Score: 4")) as server:
        judge = VLMJudge("judge", "{prompt}", server.url, SCORE, scale="table", max_retries=1)
        with caplog.at_level(logging.WARNING, "diffusion_opd"):
            scores = asked(judge, ["cat", "dog", "cat"], [RED, RED, [GREEN, RED]])
    assert scores == [None, 4, None]
    assert judge.failures == 3 and len(server.questions) == 3 * 2 + 1
    told = [record.getMessage() for record in caplog.records if record.name.startswith("diffusion_opd")]
    reason = "200 str: 'I cannot tell.'" if broken != 503 else "503 str: '503'"
    assert told == [f"The judge at {server.url} gave a picture no score after 2 tries: its reply was {reason}."] * 3


def test_tokens_without_yes_or_no_are_no_score():
    with ChatServer(lambda n, body: first_token(maybe=1.0)) as server:
        assert asked(VLMJudge("judge", "?", server.url, max_retries=0), [""], [RED]) == [None]


def test_a_slow_reply_is_asked_for_again():
    waiting = threading.Event()

    def answer(number, body):
        if number == 0:
            waiting.wait(30)
        return says("Score: 4")

    with ChatServer(answer) as server:
        judge = VLMJudge("judge", "?", server.url, SCORE, scale="table", timeout=0.5)
        assert asked(judge, [""], [RED]) == [4]
        waiting.set()
    assert len(server.questions) == 2


def test_so_many_questions_are_in_flight_and_no_more():
    everyone, in_flight, seen = threading.Barrier(4, timeout=30), Counter(), []

    def answer(number, body):
        with server.lock:
            in_flight["now"] += 1
            seen.append(in_flight["now"])
        everyone.wait()  # four must be here before one goes on
        with server.lock:
            in_flight["now"] -= 1
        return says(f"Score: {parts(body)[1]}")

    with ChatServer(answer) as server:
        judge = VLMJudge("judge", "{prompt}", server.url, SCORE, (0, 11), scale="table", max_concurrency=4)
        assert asked(judge, [str(i) for i in range(12)], [RED] * 12) == list(range(12))
    assert max(seen) == 4


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refused_question_is_an_error(status):
    with ChatServer(lambda n, body: status) as server:
        message = f"^the judge at {server.url} refuses to be asked: {status} str: '{status}'$"
        with pytest.raises(ValueError, match=message):
            asked(VLMJudge("judge", "?", server.url, SCORE), [""], [RED])
    assert len(server.questions) == 1


def test_a_server_that_is_not_there_is_named():
    with ChatServer(lambda n, body: 500) as server:
        pass  # its port is free again
    url = server.url.replace("http://", "http://user:word@")
    judge = VLMJudge("judge", "?", url, SCORE, max_retries=1)
    place = server.url.replace("http://", "http://<PASSWORD>@")
    with pytest.raises(ConnectionError, match=f"^the judge at {place} cannot be reached after 2 tries .*; start its "):
        asked(judge, [""], [RED])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "paper"}, r"^`scale` of vlm_judge must be one of \['training', 'table'\], got 'paper'\.$"),
        ({"score_range": (5, 1)}, r"^`score_range` of vlm_judge is a lower and an upper number, got \(5, 1\)\.$"),
        ({"base_url": "localhost:8000"}, r"^`base_url` of a judge begins with http:// or https://, got 'localhost:80"),
        ({"max_concurrency": 0}, r"^a judge needs `max_concurrency` of at least 1, .* got 0, 120 and 3\.$"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        VLMJudge("judge", "?", **options)


# Keys, and what makes a judge another one


def test_the_key_is_sent_and_known_to_nobody_else(monkeypatch):
    with ChatServer(lambda n, body: says("Score: 1")) as server:
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        asked(VLMJudge("judge", "?", server.url, SCORE), [""], [RED])
        monkeypatch.setenv("OPENAI_API_KEY", "of-the-environment")
        asked(VLMJudge("judge", "?", server.url, SCORE), [""], [RED])
        judge = VLMJudge("judge", "?", server.url, SCORE, api_key="secret")
        asked(judge, [""], [RED])
    assert server.keys == [None, "Bearer of-the-environment", "Bearer secret"]
    assert "secret" not in json.dumps(vars(judge), default=repr)


def test_a_judge_is_the_same_after_failures_and_at_another_place():
    with ChatServer(lambda n, body: says("?")) as server:
        judge = VLMJudge("judge", "?", server.url, SCORE, max_retries=0)
        before = hash_function(judge)
        assert asked(judge, [""], [RED]) == [None] and judge.failures == 1
    assert hash_function(judge) == before
    assert hash_function(VLMJudge("judge", "?", "http://there/v1", SCORE, api_key="secret", timeout=1)) == before
    assert hash_function(VLMJudge("judge", "!", server.url, SCORE)) != before
    assert hash_function(VLMJudge("judge", "?", server.url, SCORE, (1, 10))) != before


# UnifiedReward


@pytest.mark.parametrize(("scale", "expected"), [("training", 3.5 / 5), ("table", 3.5)])
def test_unified_reward(scale, expected):
    with ChatServer(lambda n, body: says("It fits the caption.\nFinal Score: 3.5")) as server:
        judge = UnifiedReward(base_url=server.url, scale=scale)
        assert asked(judge, ["a {braced} cat"], [Image.new("RGB", (1024, 512))]) == [pytest.approx(expected)]
    picture, text = parts(server.questions[0])
    assert picture.size == (512, 256) and "[a {braced} cat]" in text and "'Final Score:'" in text
    assert server.questions[0]["model"] == "CodeGoat24/UnifiedReward-7b-v1.5"
    assert Rewards(judge).names("a") == ["unified_reward"]


@pytest.mark.parametrize(("scale", "expected"), [("training", (11 / 3 - 1) / 4), ("table", 11 / 3)])
def test_unified_reward_2(scale, expected):
    marks = "Alignment Score (1-5): 4.5\nCoherence Score (1-5): 4\nStyle Score (1-5): 2.5\n"
    with ChatServer(lambda n, body: says(marks)) as server:
        # A number, as YAML reads it
        judge = load_reward({"name": "unified_reward", "version": 2.0, "base_url": server.url}, scale=scale)
        assert asked(judge, ["a cat"], [RED]) == [pytest.approx(expected)]
        own = UnifiedReward(2.0, "mine", "Mark {prompt}!", base_url=server.url, scale=scale)
        assert asked(own, ["a cat"], [RED]) == [pytest.approx(expected)]
    assert parts(server.questions[1])[1] == "Mark a cat!" and server.questions[1]["model"] == "mine"


def test_an_argument_that_nothing_takes_is_refused():
    with pytest.raises(ValueError, match=r"^the reward 'unified_reward' takes no \['colour'\]; .* 'base_url', "):
        load_reward({"name": "unified_reward", "colour": 1})


def test_a_missing_mark_is_no_score():
    with ChatServer(lambda n, body: says("Alignment Score (1-5): 4\nStyle Score (1-5): 2")) as server:
        assert asked(UnifiedReward("2.0", base_url=server.url, max_retries=0), ["a cat"], [RED]) == [None]
    with pytest.raises(ValueError, match=r"^`version` of unified_reward must be one of \['1\.5', '2\.0'\], got '3'\.$"):
        UnifiedReward("3")
