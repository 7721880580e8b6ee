"""A server of reward functions: scorers in an environment, or on a GPU, of their own.

    POST /rewards/{name}    {"prompts": [...], "images": [PNG in base64, of a video a list of such, ...],
                            "columns": {name: [...]}, "pictures": {name: [as in images, or null]},
                            "scale": "training" or "table"}
                            -> {"scores": [number or null, ...]}
    GET /rewards            -> {"rewards": {name: [column that it needs, ...]}}
    GET /health             -> {"status": "ok"}

What it cannot use it refuses with one sentence under `detail` (413 for what is too large, 422 otherwise); a reward that
fails is a 500 with its message. Nothing is unpickled. It asks for no password: keep it on a network that you trust.

This file knows HTTP, pictures and reward functions by name, and no model.
"""

import asyncio
import base64
import binascii
import contextlib
import io
import logging
import math
from collections.abc import Sequence
from typing import Any, Literal

from PIL import Image

from ..inputs import PROMPT
from .functions import RewardFunc, Rewards
from .scorer import SCALES

try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.datastructures import Headers
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from pydantic import BaseModel
except ImportError as error:
    raise ImportError("a reward server needs FastAPI and uvicorn: pip install 'diffusion-opd[rewards]'") from error

logger = logging.getLogger(__name__)

# Of all pictures of a request, 3 GiB as RGB: a small file may be a large picture, and a request has many
_MOST_PIXELS = 2**30


class Judged(BaseModel):
    """What is to be scored: lists of one length."""

    prompts: list[str]
    images: list[str | list[str]]
    columns: dict[str, list[Any]] = {}
    pictures: dict[str, list[str | list[str] | None]] = {}
    scale: Literal["training", "table"] = "training"


def make_app(
    reward_funcs: Sequence[RewardFunc],
    max_batch_size: int = 256,
    max_pixels: int = 4096 * 4096,
    max_bytes: int = 256 * 2**20,
) -> FastAPI:
    """
    The server's application. Each function scores one request at a time, in a thread of its own.

    Args:
        reward_funcs (`list[Callable]`): Each is asked by its name.
        max_batch_size (`int`, *optional*, defaults to `256`): Samples of a request.
        max_pixels (`int`, *optional*, defaults to `16777216`): Of a picture or frame.
        max_bytes (`int`, *optional*, defaults to `268435456`): Of a request.

    Raises:
        ValueError: if two functions have one name.
    """
    app = FastAPI(title="diffusion-opd reward-serve", docs_url=None, redoc_url=None)
    rewards: dict[str, Rewards] = {}
    funcs: dict[str, Any] = {}
    for func in reward_funcs:
        reward = Rewards(func)
        (name,) = reward.all_names
        if name in rewards:
            raise ValueError(f"two rewards are called {name!r}; serve one of them on another port.")
        rewards[name], funcs[name] = reward, func
    busy = {name: asyncio.Lock() for name in rewards}
    held = {name: asyncio.Semaphore(2) for name in rewards}  # one is decoded while another is scored

    app.add_middleware(_Limit, max_bytes=max_bytes)

    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: RequestValidationError) -> Any:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"][1:])) or "the body"
        return _refusal(422, f"`{place}`: {first['msg']}.")

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/rewards")
    async def names() -> dict[str, dict[str, list[str]]]:
        return {"rewards": {name: reward.needed_columns("all")[name] for name, reward in rewards.items()}}

    @app.post("/rewards/{name}")
    async def judge(name: str, judged: Judged, request: Request) -> dict[str, list[float | None]]:
        if name not in rewards:
            raise HTTPException(404, f"no reward is called {name!r} here; there are {list(rewards)}.")
        count = len(judged.prompts)
        if not 0 < count <= max_batch_size:
            raise HTTPException(413 if count else 422, f"a request has 1 to {max_batch_size} samples, got {count}.")
        for key, values in {"images": judged.images, **judged.columns, **judged.pictures}.items():
            if len(values) != count:
                raise HTTPException(422, f"`{key}` has {len(values)} entries for {count} prompts.")
        try:
            rewards[name].check_columns([*judged.columns, *judged.pictures])
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        async with held[name]:
            if await request.is_disconnected():  # whoever has waited for too long asks anew
                raise HTTPException(499, "the client is gone.")
            pictures = await asyncio.to_thread(_decoded, {"images": judged.images, **judged.pictures}, max_pixels)
            images = pictures.pop("images")
            columns = {**judged.columns, **pictures, PROMPT: judged.prompts}
            rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            async with busy[name]:
                if getattr(funcs[name], "scale", None) in SCALES:
                    funcs[name].scale = judged.scale
                try:
                    (scores,) = await asyncio.to_thread(rewards[name].scores, "all", rows, images)
                except Exception as error:
                    logger.exception(f"The reward {name!r} failed.")
                    raise HTTPException(500, f"{type(error).__name__}: {error}") from error
        return {"scores": [None if math.isnan(score) else score for score in scores]}

    return app


def serve(app: FastAPI, host: str, port: int) -> None:
    """Answers until SIGINT or SIGTERM, and then what it has been asked already. One line says that it is ready."""

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            print(f"Rewards are served at http://{host}:{port}.", flush=True)

    with contextlib.suppress(KeyboardInterrupt):
        Server(uvicorn.Config(app, host, port, log_level="warning", access_log=False)).run()


class _Limit:
    """Refuses requests by the length that they announce, before any of it is read."""

    def __init__(self, app: Any, max_bytes: int):
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        answer = self.app
        if scope["type"] == "http" and scope["method"] == "POST":
            length = Headers(scope=scope).get("content-length", "")
            if not length.isdecimal():
                answer = _refusal(411, "the request does not say how long it is (Content-Length).")
            elif int(length) > self.max_bytes:
                answer = _refusal(413, f"the request has {length} bytes, at most {self.max_bytes} are taken.")
        await answer(scope, receive, send)


def _refusal(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"detail": sentence}, status)


def _decoded(columns: dict[str, list[Any]], max_pixels: int) -> dict[str, list[Any]]:
    """Pictures by column, as they were sent."""
    left = _MOST_PIXELS

    def decoded(image: Any, place: str) -> Any:
        nonlocal left
        if image is None or isinstance(image, list):
            return image and [decoded(frame, f"{place}.{number}") for number, frame in enumerate(image)]
        try:
            opened = Image.open(io.BytesIO(base64.b64decode(image, validate=True)), formats=["PNG"])
            width, height = opened.size
            left -= width * height
            if width * height <= max_pixels and left >= 0:
                opened.load()
                return opened
        except Image.DecompressionBombError as error:  # PIL's own limit
            raise HTTPException(413, f"`{place}` is too large, at most {max_pixels} pixels are taken.") from error
        except (binascii.Error, OSError, SyntaxError, ValueError) as error:
            raise HTTPException(422, f"`{place}` is no PNG file in base64.") from error
        if left < 0:
            raise HTTPException(413, f"the pictures of a request have at most {_MOST_PIXELS} pixels together.")
        raise HTTPException(413, f"`{place}` has {width} x {height} pixels, at most {max_pixels} are taken.")

    return {key: [decoded(image, f"{key}.{row}") for row, image in enumerate(own)] for key, own in columns.items()}
