"""A server of reward functions: scorers in an environment, or on a GPU, of their own.

    POST /rewards/{name}    {"prompts": [...], "images": [PNG in base64, or a list of such], "columns": {name: [...]}}
                            -> {"scores": [number or null, ...]}
    GET /rewards            -> {"rewards": [name, ...]}
    GET /health             -> {"status": "ok"}

What it cannot use it refuses with one sentence under `detail` (413 for what is too large, 422 otherwise); a reward that
fails is a 500 with its message. Nothing is unpickled. It asks for no password: keep it on a network that you trust.

This file knows HTTP, pictures and reward functions by name, and no model.
"""

import asyncio
import base64
import binascii
import io
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image

from .functions import RewardFunc, Rewards

try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from pydantic import BaseModel
except ImportError as error:
    raise ImportError("a reward server needs FastAPI and uvicorn: pip install 'diffusion-opd[rewards]'") from error

__all__ = ["make_app", "uvicorn"]

logger = logging.getLogger(__name__)


class Judged(BaseModel):
    """What is to be scored: lists of one length."""

    prompts: list[str]
    images: list[str | list[str]]
    columns: dict[str, list[Any]] = {}


def make_app(
    reward_funcs: Mapping[str, RewardFunc],
    max_batch_size: int = 256,
    max_pixels: int = 4096 * 4096,
    max_bytes: int = 256 * 2**20,
) -> FastAPI:
    """
    The server's application.

    Args:
        reward_funcs (`dict[str, Callable]`): By the name under which each is asked.
        max_batch_size (`int`, *optional*, defaults to `256`): Samples of a request.
        max_pixels (`int`, *optional*, defaults to `16777216`): Of a picture or frame.
        max_bytes (`int`, *optional*, defaults to `268435456`): Of a request.
    """
    app = FastAPI(title="diffusion-opd reward-serve", docs_url=None, redoc_url=None)
    rewards = {name: Rewards(func) for name, func in reward_funcs.items()}
    busy = {name: asyncio.Lock() for name in rewards}  # a model scores one request at a time

    @app.middleware("http")
    async def limit(request: Request, call_next: Callable) -> Any:
        if request.method == "POST":
            length = request.headers.get("content-length", "")
            if not length.isdecimal():
                return _refusal(411, "the request does not say how long it is (Content-Length).")
            if int(length) > max_bytes:
                return _refusal(413, f"the request has {length} bytes, at most {max_bytes} are taken.")
        return await call_next(request)

    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: RequestValidationError) -> Any:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"][1:])) or "the body"
        return _refusal(422, f"`{place}`: {first['msg']}.")

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/rewards")
    async def names() -> dict[str, list[str]]:
        return {"rewards": list(rewards)}

    @app.post("/rewards/{name}")
    async def judge(name: str, judged: Judged) -> dict[str, list[float | None]]:
        if name not in rewards:
            raise HTTPException(404, f"no reward is called {name!r} here; there are {list(rewards)}.")
        count = len(judged.prompts)
        lengths = {"images": len(judged.images)} | {key: len(values) for key, values in judged.columns.items()}
        for key, length in lengths.items():
            if length != count:
                raise HTTPException(422, f"`{key}` has {length} entries for {count} prompts.")
        if not 0 < count <= max_batch_size:
            raise HTTPException(413, f"a request has 1 to {max_batch_size} samples, got {count}.")
        try:
            images = await asyncio.to_thread(lambda: [_decoded(image, max_pixels) for image in judged.images])
            rewards[name].check_columns(list(judged.columns))
        except ValueError as error:
            raise HTTPException(413 if isinstance(error, _TooLarge) else 422, str(error)) from error
        rows = [
            {"prompt": prompt, **{key: values[row] for key, values in judged.columns.items()}}
            for row, prompt in enumerate(judged.prompts)
        ]
        async with busy[name]:
            try:
                scores = (await asyncio.to_thread(rewards[name], "all", rows, images))[:, 0].tolist()
            except Exception as error:
                logger.exception(f"The reward {name!r} failed.")
                raise HTTPException(500, f"{type(error).__name__}: {error}") from error
        return {"scores": [None if math.isnan(score) else score for score in scores]}

    return app


class _TooLarge(ValueError):
    pass


def _refusal(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"detail": sentence}, status)


def _decoded(image: Any, max_pixels: int) -> Any:
    if isinstance(image, list):
        return [_decoded(frame, max_pixels) for frame in image]
    try:
        opened = Image.open(io.BytesIO(base64.b64decode(image, validate=True)), formats=["PNG"])
        width, height = opened.size
        if width * height <= max_pixels:
            opened.load()
            return opened
    except Image.DecompressionBombError as error:  # PIL's own limit
        raise _TooLarge(f"a picture is too large, at most {max_pixels} pixels are taken.") from error
    except (binascii.Error, OSError, SyntaxError) as error:
        raise ValueError(f"`images` holds what is no PNG file in base64: {error}.") from error
    raise _TooLarge(f"a picture of {width} x {height} is too large, at most {max_pixels} pixels are taken.")
