"""Vision language models as judges, behind any server that speaks OpenAI's chat completions (vLLM, sglang).

This file knows questions, replies and HTTP, and no model's weights.
"""

import asyncio
import base64
import io
import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from PIL import Image

from ..disclosure import disclosed
from ..errors import brief
from .scorer import SCALES, frames_of

try:
    import httpx
except ImportError as error:
    raise ImportError("asking a judge needs httpx: pip install 'diffusion-opd[rewards]'") from error

logger = logging.getLogger(__name__)

Read = Callable[[Mapping[str, Any]], float | None]  # a score out of one of a reply's `choices`


class VLMJudge:
    """
    A reward function that asks a vision language model on a server of its own, with many questions in flight.

    Without `pattern` the template is a question of yes or no, and the score the chance of a yes in the first token of
    the answer, `P(yes) / (P(yes) + P(no))`, the same on both scales (after VQAScore, Lin et al. 2024,
    https://arxiv.org/abs/2404.01291, which takes `P(yes)`). With `pattern` it is a number in the answer: on
    `scale="table"` as it is, on `"training"` from 0 for the lower to 1 for the upper end of `score_range`.

    The picture goes before the question, as PNG; temperature is 0. Each frame of a video is a question of its own, and
    their mean is the score. A reply that cannot be read, a timeout and a server's error (5xx, 429) are tried again;
    after the last try the score is `None`, never 0: it is logged as a warning and counted in `failures`.

    Args:
        model (`str`): As the server calls it.
        template (`str`): The question; `{prompt}` in it is the prompt, other braces are left alone.
        base_url (`str`, *optional*, defaults to `"http://localhost:8000/v1"`): Of the server.
        pattern (`str`, *optional*): A regular expression whose first group is the number; its last match counts.
        score_range (`tuple[float, float]`, *optional*, defaults to `(1, 5)`):
            Of the number. One beyond it is not a score.
        api_key (`str`, *optional*): `None`: the environment's `OPENAI_API_KEY`, if there is one.
        max_size (`int`, *optional*):
            A picture whose longer side has more pixels is made smaller (bicubic). `None`: never.
        max_tokens (`int`, *optional*, defaults to `512`): Of an answer with a number.
        extra_body (`dict`, *optional*):
            More of what is sent, e.g. `{"chat_template_kwargs": {"enable_thinking": False}}`.
        num_frames (`int`, *optional*, defaults to `4`): Of a video so many, evenly spaced, are judged.
        max_concurrency (`int`, *optional*, defaults to `16`): Questions in flight, of each process.
        timeout (`float`, *optional*, defaults to `120`): Seconds for a reply.
        max_retries (`int`, *optional*, defaults to `3`): Tries after the first, .5, 1, 2, ... at most 8 seconds apart.
        scale (`str`, *optional*, defaults to `"training"`): `"training"` or `"table"`.

    Raises:
        ImportError: if httpx is missing.
        ValueError: for arguments out of range; when asked, if the server refuses the question (4xx: a wrong model or
            key).
        ConnectionError: when asked, if the server cannot be reached after the last try.
    """

    __name__ = "vlm_judge"

    def __init__(
        self,
        model: str,
        template: str,
        base_url: str = "http://localhost:8000/v1",
        pattern: str | None = None,
        score_range: Sequence[float] = (1, 5),
        api_key: str | None = None,
        max_size: int | None = None,
        max_tokens: int = 512,
        extra_body: Mapping[str, Any] | None = None,
        num_frames: int = 4,
        max_concurrency: int = 16,
        timeout: float = 120,
        max_retries: int = 3,
        scale: str = "training",
    ):
        if scale not in SCALES:
            raise ValueError(f"`scale` of {self.__name__} must be one of {list(SCALES)}, got {scale!r}.")
        if not score_range[0] < score_range[1]:
            raise ValueError(f"`score_range` of {self.__name__} is a lower and an upper number, got {score_range}.")
        self.model, self.template, self.scale = model, template, scale
        self.patterns, self.score_range = [pattern] if pattern else [], list(score_range)
        self.max_size, self.max_tokens, self.num_frames = max_size, max_tokens, num_frames
        self.extra_body = dict(extra_body or {})
        # Apart from what makes a reward another one: a run may go on with a server elsewhere, and with another key
        self._server = _Server(base_url, api_key, max_concurrency, timeout, max_retries)

    @property
    def failures(self) -> int:
        """How many questions got no readable reply so far."""
        return self._server.failures

    async def __call__(self, prompts: Sequence[str], images: Sequence[Any], **columns: Any) -> list[float | None]:
        frames = [frames_of(image, self.num_frames) for image in images]
        bodies = [self._body(prompt, frame) for prompt, own in zip(prompts, frames, strict=True) for frame in own]
        values = iter(await self._server.ask(bodies, self._read))
        scores = [[next(values) for _ in own] for own in frames]
        return [None if None in own else self._on_scale(fmean(own)) for own in scores]  # type: ignore[arg-type]

    def _body(self, prompt: str, image: Image.Image) -> dict[str, Any]:
        text = self.template.replace("{prompt}", prompt)
        picture = {"type": "image_url", "image_url": {"url": _data_url(image, self.max_size)}}
        message = {"role": "user", "content": [picture, {"type": "text", "text": text}]}
        answer = {"max_tokens": self.max_tokens} if self.patterns else _FIRST_TOKEN
        return {"model": self.model, "messages": [message], "temperature": 0, **answer, **self.extra_body}

    def _read(self, choice: Mapping[str, Any]) -> float | None:
        if not self.patterns:
            chances = {"yes": 0.0, "no": 0.0}
            for token in choice["logprobs"]["content"][0]["top_logprobs"]:
                word = token["token"].strip().lower()
                if word in chances:
                    chances[word] += math.exp(token["logprob"])
            total = sum(chances.values())
            return chances["yes"] / total if total else None
        low, high = self.score_range
        values = [float(re.findall(pattern, choice["message"]["content"])[-1]) for pattern in self.patterns]
        return fmean(values) if all(low <= value <= high for value in values) else None

    def _on_scale(self, value: float) -> float:
        if self.scale == "table" or not self.patterns:
            return value
        low, high = self.score_range
        return (value - low) / (high - low)


_FIRST_TOKEN = {"max_tokens": 1, "logprobs": True, "top_logprobs": 20}


class UnifiedReward(VLMJudge):
    """
    The mark of a UnifiedReward model (Wang et al. 2025, https://arxiv.org/abs/2503.05236) on a server.

    - `version="1.5"`: one mark from 1 to 5, after `Final Score:`, for how well a picture fits its prompt and how good
      it looks. `scale="table"`: as it is. `"training"`: a fifth of it, as Flow-GRPO has it.
    - `version="2.0"`: three of them, for alignment, coherence and style. `"table"`: their mean. `"training"`:
      `(mean - 1) / 4`.

    The longer side of a picture has at most 512 pixels; Flow-GRPO's are 512 by 512, whatever their shape was.

    The models know the question that they were trained with. It stands on their model cards; the one here asks for the
    same in other words. Give theirs as `template` where the number is held against a published one.

    Args:
        version (`str`, *optional*, defaults to `"1.5"`): `"1.5"` or `"2.0"`.
        model (`str`, *optional*):
            As the server calls it; by default `CodeGoat24/UnifiedReward-7b-v1.5` or
            `CodeGoat24/UnifiedReward-2.0-qwen3vl-4b`.
        template (`str`, *optional*): The question, with `{prompt}`.
        max_size (`int`, *optional*, defaults to `512`): As of [`VLMJudge`], as is all that is not named here.

    Raises:
        ValueError: for another version, and as [`VLMJudge`].
    """

    __name__ = "unified_reward"

    def __init__(
        self,
        version: str | float = "1.5",
        model: str | None = None,
        template: str | None = None,
        max_size: int | None = 512,
        **kwargs: Any,
    ):
        self.version = str(version)  # YAML reads a number
        if self.version not in _QUESTIONS:
            raise ValueError(f"`version` of {self.__name__} must be one of {list(_QUESTIONS)}, got {version!r}.")
        default_model, question, marks = _QUESTIONS[self.version]
        super().__init__(model or default_model, template or question, max_size=max_size, **kwargs)
        self.patterns = [rf"{mark}\s*(?:\(1-5\))?\s*:\s*([0-9]+(?:\.[0-9]+)?)" for mark in marks]

    def _on_scale(self, value: float) -> float:
        return value / 5 if self.scale == "training" and self.version == "1.5" else super()._on_scale(value)


# By version: the model, the question and what stands before each mark of the answer
_QUESTIONS = {
    "1.5": (
        "CodeGoat24/UnifiedReward-7b-v1.5",
        "Here are a caption and a picture that was generated from it. Judge the picture by two things.\n"
        "1. Alignment: do its objects, their details and their relations fit the caption?\n"
        "2. Quality: is it clear, rich in detail, true in colour and pleasant to look at?\n"
        "Weigh both, and give one mark from 1 to 5 after 'Final Score:'.\n"
        "Caption: [{prompt}]",
        ["Final Score"],
    ),
    "2.0": (
        "CodeGoat24/UnifiedReward-2.0-qwen3vl-4b",
        "Here are a caption and a picture that was generated from it. Mark the picture from 1 to 5 for three things: "
        "alignment (does it show what the caption says?), coherence (is it free of glitches and distorted objects?) "
        "and style (is it beautiful, whatever the caption says?). Answer in these lines:\n"
        "Alignment Score (1-5): X\nCoherence Score (1-5): Y\nStyle Score (1-5): Z\n"
        "Caption: [{prompt}]",
        ["Alignment Score", "Coherence Score", "Style Score"],
    ),
}


class _Server:
    """Where a judge is asked, and how often."""

    def __init__(self, base_url: str, api_key: str | None, max_concurrency: int, timeout: float, max_retries: int):
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"`base_url` of a judge begins with http:// or https://, got {base_url!r}.")
        if max_concurrency < 1 or timeout <= 0 or max_retries < 0:
            raise ValueError(
                "a judge needs `max_concurrency` of at least 1, a `timeout` above 0 and `max_retries` of at least 0, "
                f"got {max_concurrency}, {timeout} and {max_retries}."
            )
        self.base_url, self.api_key = base_url, api_key
        self.max_concurrency, self.timeout, self.max_retries = max_concurrency, timeout, max_retries
        self.failures = 0
        self._place = disclosed(base_url)  # without a password

    async def ask(self, bodies: Sequence[Mapping[str, Any]], read: Read) -> list[float | None]:
        key = self.api_key or os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # A client and its semaphore belong to the event loop of this call
        turns = asyncio.Semaphore(self.max_concurrency)
        limits = httpx.Limits(max_connections=self.max_concurrency)
        async with httpx.AsyncClient(
            base_url=self.base_url, headers=headers, timeout=self.timeout, limits=limits
        ) as client:
            return await asyncio.gather(*(self._ask_one(client, turns, body, read) for body in bodies))

    async def _ask_one(
        self, client: httpx.AsyncClient, turns: asyncio.Semaphore, body: Mapping[str, Any], read: Read
    ) -> float | None:
        fault: Any = None
        for attempt in range(self.max_retries + 1):
            if attempt:
                await asyncio.sleep(min(0.5 * 2 ** (attempt - 1), 8))
            try:
                async with turns:
                    response = await client.post("chat/completions", json=body)
            except httpx.TransportError as error:
                fault = error
                continue
            if response.is_client_error and response.status_code not in (408, 429):
                raise ValueError(
                    f"the judge at {self._place} refuses to be asked: {response.status_code} {_said(response)}"
                )
            if response.is_success and (value := _value(response, read)) is not None:
                return value
            fault = f"its reply was {response.status_code} {_said(response)}"
        tries = self.max_retries + 1
        if isinstance(fault, (httpx.ConnectError, httpx.ConnectTimeout)):
            raise ConnectionError(
                f"the judge at {self._place} cannot be reached after {tries} tries ({fault}); start its server, or "
                "correct `base_url`."
            ) from fault
        self.failures += 1
        logger.warning("The judge at %s gave a picture no score after %d tries: %s.", self._place, tries, fault)
        return None


def _value(response: httpx.Response, read: Read) -> float | None:
    """The score in a reply, or `None` if it cannot be read."""
    try:
        return read(response.json()["choices"][0])
    except (ValueError, KeyError, IndexError, TypeError):
        return None


def _said(response: httpx.Response) -> str:
    try:
        return brief(response.json()["choices"][0]["message"]["content"])
    except (ValueError, KeyError, IndexError, TypeError):
        return brief(response.text)


def _data_url(image: Image.Image, max_size: int | None) -> str:
    """A picture as PNG within a URL, its longer side at most so many pixels."""
    if max_size and max(image.size) > max_size:
        width, height = (max(1, round(side * max_size / max(image.size))) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
