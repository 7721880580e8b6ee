"""A reward function on a server of its own, as `diffusion-opd reward-serve` starts it.

What goes over the wire is JSON, in which pictures are PNG files in base64.

This file knows pictures, JSON and HTTP, and no model.
"""

import asyncio
import base64
import io
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from .scorer import SCALES

try:
    import httpx
except ImportError as error:
    raise ImportError("asking a reward server needs httpx: pip install 'diffusion-opd[rewards]'") from error

logger = logging.getLogger(__name__)

PATH = "/rewards"
_COMES_BACK = (429, 502, 503, 504)  # of a server that is busy, or is being started


class RemoteReward:
    """
    A reward function that asks a server (`diffusion-opd reward-serve`), with several requests in flight.

    Columns go along as JSON, columns of pictures (sources of an editing pipeline) as the images do. What JSON does not
    hold, such as tensors, is left out, which a warning says once.

    Args:
        url (`str`): Of the server, e.g. `"http://localhost:8000"`.
        reward (`str`): As the server calls it; metrics have that name too.
        batch_size (`int`, *optional*, defaults to `8`): Samples of one request.
        max_concurrency (`int`, *optional*, defaults to `8`): Requests in flight, of each process.
        timeout (`float`, *optional*, defaults to `300`):
            Seconds for a reply. A request may have to wait for those of other processes.
        max_retries (`int`, *optional*, defaults to `20`):
            Tries after the first where the server cannot be reached, is busy, or does not answer in time: .5, 1, 2, ...
            at most 5 seconds apart, about 90 in all. Whoever starts the server again meanwhile saves the run.
        scale (`str`, *optional*, defaults to `"training"`): On which its scorer answers, `"training"` or `"table"`.

    Raises:
        ImportError: if httpx is missing.
        ValueError: for arguments out of range; when asked, if the server refuses the request (4xx), with what it says.
        RuntimeError: when asked, if the reward fails there, with what it says.
        ConnectionError: when asked, if there is no answer after the last try.
    """

    def __init__(
        self,
        url: str,
        reward: str,
        batch_size: int = 8,
        max_concurrency: int = 8,
        timeout: float = 300,
        max_retries: int = 20,
        scale: str = "training",
    ):
        self.url, self.reward, self.__name__ = url.rstrip("/"), reward, reward
        self.batch_size, self.max_concurrency = batch_size, max_concurrency
        self.timeout, self.max_retries, self.scale = timeout, max_retries, scale
        self._left_out: set[str] = set()
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"`url` of the remote reward {reward!r} begins with http:// or https://, got {url!r}.")
        if scale not in SCALES:
            raise ValueError(f"`scale` of the remote reward {reward!r} must be one of {list(SCALES)}, got {scale!r}.")
        for name, number in (("batch_size", batch_size), ("max_concurrency", max_concurrency)):
            if number < 1:
                raise ValueError(f"`{name}` of the remote reward {reward!r} must be at least 1, got {number}.")

    def made_of(self) -> dict[str, Any]:
        """What its numbers depend on: a run may go on with a server elsewhere."""
        return {"reward": self.reward, "scale": self.scale}

    async def __call__(self, prompts: Sequence[str], images: Sequence[Any], **columns: Any) -> list[float | None]:
        columns.pop("trainer_state", None)
        pictures = {name: columns.pop(name) for name in list(columns) if _are_pictures(columns[name])}
        columns = self._sent(columns)
        starts = range(0, len(images), self.batch_size)
        # No client, and no semaphore, outlives a call: each has an event loop of its own
        free = asyncio.Semaphore(self.max_concurrency)
        limits = httpx.Limits(max_connections=self.max_concurrency)
        async with httpx.AsyncClient(timeout=self.timeout, limits=limits) as client:

            async def ask(start: int) -> list[float | None]:
                rows = slice(start, start + self.batch_size)
                async with free:
                    body = {
                        "scale": self.scale,
                        "prompts": list(prompts[rows]),
                        "columns": {name: values[rows] for name, values in columns.items()},
                        "images": await asyncio.to_thread(encoded, images[rows]),
                        "pictures": {
                            name: await asyncio.to_thread(encoded, values[rows]) for name, values in pictures.items()
                        },
                    }
                    return await self._ask(client, body)

            return [score for scores in await asyncio.gather(*map(ask, starts)) for score in scores]

    async def _ask(self, client: httpx.AsyncClient, body: Mapping[str, Any]) -> list[float | None]:
        where = f"the reward {self.reward!r} of {self.url}"
        for attempt in range(self.max_retries + 1):
            if attempt:
                await asyncio.sleep(min(0.5 * 2 ** (attempt - 1), 5))
            try:
                reply = await client.post(f"{self.url}{PATH}/{self.reward}", json=body)
                if reply.status_code not in _COMES_BACK:
                    return _scores(reply, where)
                problem = f"{reply.status_code} {_said(reply)}"
            except httpx.TransportError as error:
                problem = f"{type(error).__name__} {error}".strip()
            if attempt == 0:
                logger.warning(f"Waiting for {where}: {problem}.")
        raise ConnectionError(f"{where} did not answer in {self.max_retries + 1} tries; the last: {problem}.")

    def _sent(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        sent = {}
        for name, values in columns.items():
            try:
                json.dumps(values, allow_nan=False)
            except (TypeError, ValueError):
                if name not in self._left_out:
                    logger.warning(f"The column {name!r} is not sent to the reward {self.reward!r}: JSON has no such.")
                self._left_out.add(name)
            else:
                sent[name] = values
        return sent


def _scores(reply: httpx.Response, where: str) -> list[float | None]:
    if 400 <= reply.status_code < 500:
        raise ValueError(f"{where} refuses the request: {_said(reply)}")
    if reply.status_code != 200:
        raise RuntimeError(f"{where} fails: {_said(reply)}")
    try:
        return reply.json()["scores"]
    except (ValueError, KeyError, TypeError) as error:
        raise RuntimeError(f"{where} gives no scores; is that a server of rewards?") from error


def _said(reply: httpx.Response) -> str:
    try:
        return str(reply.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return reply.reason_phrase


def _are_pictures(values: Any) -> bool:
    """Whether a column holds pictures, or lists of them, where it holds anything."""
    if isinstance(values, (list, tuple)):
        present = [value for value in values if value is not None]
        return bool(present) and all(map(_are_pictures, present))
    return isinstance(values, Image.Image)


def encoded(image: Any) -> Any:
    """A picture as base64 of a PNG file; a list, of frames or samples, as a list of them."""
    if image is None or isinstance(image, (list, tuple)):
        return image and [encoded(one) for one in image]
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)  # several times faster, for a tenth more bytes
    return base64.b64encode(file.getvalue()).decode()
