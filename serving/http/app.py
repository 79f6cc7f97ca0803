"""The routes.

In: a scheduler over an engine, and `Limits`. Out: an ASGI application: OpenAI's routes, the events behind the page, and
what operators ask for. FastAPI earns its place here: one declaration of a field is its check, its sentence when it is
wrong and its entry in `/openapi.json`, against which the tests throw requests. The surprising fact: no route blocks the
loop; what takes time runs in the scheduler's worker or in a thread.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.metadata
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import Request

from ...contract import MODES
from ...errors import NemodiffError
from ...runtime.loading import LoadedEngine, load
from ...runtime.scheduler import Scheduler
from ..metrics import Metrics, Now
from . import refusals
from .answers import Form
from .body import Chat, Completion, Decoding, Fim, Watched
from .fim import Fills
from .follow import Following, TimedOut, when_gone
from .gate import Gate
from .page_export import PAGE
from .sse import MEDIA_TYPE, Events
from .watch import traced

_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}  # one, not the whole
_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {MEDIA_TYPE: {"schema": _EVENT}}}}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "model": refusals.Refused}
    for status, text in {
        400: "The request is wrong, or asks for what is not supported.",
        401: "The key is missing or wrong.",
        404: "There is no such model.",
        413: "The body is too large.",
        429: "Too many requests wait.",
        500: "The engine failed.",
        503: "The server is about to stop.",
        504: "The request took too long.",
    }.items()
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a server allows. timeout: seconds of one request. max_request_bytes: of a body. keys: none for everybody."""

    timeout: float = 600.0
    max_request_bytes: int = 4 << 20
    keys: tuple[str, ...] = ()
    waiting: int = 64


class Server:
    """One engine behind HTTP.

    Args:
        engine: from `load`.
        scheduler: over it.
        limits: what is allowed.
        name: of the model, for clients.
        defaults: options that a request does not give.
    """

    def __init__(
        self, engine: LoadedEngine, scheduler: Scheduler, limits: Limits, name: str, defaults: dict[str, Any]
    ) -> None:
        self.engine, self.scheduler, self.limits, self.name, self.defaults = engine, scheduler, limits, name, defaults
        self.metrics, self.fills = Metrics(), Fills(engine, limits.waiting)
        self.started = int(time.time())
        self.gate = Gate(_routes(self), limits.keys, limits.max_request_bytes)

    @property
    def busy(self) -> bool:
        """Whether anybody waits for an answer."""
        now = self.scheduler.statistics
        return bool(now.running or now.waiting or self.fills.counts.present)

    def chosen(self, asked: Decoding) -> tuple[str, dict[str, Any]]:
        """The model's name as asked for, and options that come with it. Raises ModelError."""
        name = asked.model if asked.model is not None else self.name
        base, _, mode = name.rpartition(":")
        if name == self.name:
            return name, dict(self.defaults)
        if base == self.name and mode in MODES:
            return name, {**self.defaults, "mode": mode}
        raise refusals.ModelError(f"model {name!r:.60} is not here, allowed: {self.name}; see /v1/models")

    async def answer(self, request: Request, asked: Chat | Completion) -> Response:
        """A chat or a completion, whole or streamed. Raises NemodiffError."""
        name, options = self.chosen(asked)
        options |= asked.options()
        chat = isinstance(asked, Chat)
        form = Form(
            self.engine,
            "chat" if chat else "completion",
            name,
            thinking=bool(options.get("thinking")),
            logprobs="logprobs" in options,
        )
        prompts = [(prompt, _reseeded(options, i)) for prompt in asked.prompts() for i in range(asked.n or 1)]
        following, diffusing = Following(self.scheduler, self.metrics, self.limits.timeout), bool(asked.diffusing)
        await following.submit(prompts, steps=diffusing)
        if not asked.stream:
            ends = await following.finished(request)
            return JSONResponse(form.whole([end.generation for end in ends]))
        with_usage = asked.stream_options is not None and asked.stream_options.include_usage
        chunks = form.chunks(following.events(), len(prompts), with_usage=with_usage, diffusing=diffusing)
        return Events(chunks, following.close, done=True)

    async def watch(self, asked: Watched) -> Response:
        """The events of one request. Raises NemodiffError."""
        _, options = self.chosen(asked)
        following = Following(self.scheduler, self.metrics, self.limits.timeout)
        await following.submit([(asked.prompts()[0], options | asked.options())], steps=True)
        return Events(traced(self.engine, following.events()), following.close, done=False)

    async def fill(self, request: Request, asked: Fim) -> Response:
        """A hole, filled. Raises NemodiffError."""
        name, _ = self.chosen(asked)
        given = asked.model_dump(include={"threshold", "block_length", "method", "width"}, exclude_none=True)
        gone = threading.Event()
        future = self.fills.submit(asked.prompt, asked.suffix, gone, length=asked.max_tokens, **given)
        watch = asyncio.create_task(when_gone(request, gone.set))
        try:
            filled = await asyncio.wait_for(asyncio.wrap_future(future), self.limits.timeout)
        except TimeoutError:
            raise TimedOut(self.limits.timeout) from None
        finally:
            gone.set()
            watch.cancel()
        count = self.engine.text.encode_plain
        counts: dict[str, Any] = {
            "prompt_tokens": len(count(asked.prompt)) + len(count(asked.suffix)),
            "completion_tokens": len(filled.token_ids[0]),
        }
        counts |= {"total_tokens": sum(counts.values()), "nfe": filled.nfe, "method": filled.method}
        whole = Form(self.engine, "completion", name).filling(filled.holes[0], counts)
        if not asked.stream:
            return JSONResponse(whole)
        if asked.stream_options is None or not asked.stream_options.include_usage:
            del whole["usage"]
        return Events(_one(whole), gone.set, done=True)


def _reseeded(options: dict[str, Any], index: int) -> dict[str, Any]:
    return {**options, "seed": options["seed"] + index} if index and "seed" in options else options


async def _one(value: Any) -> AsyncIterator[Any]:
    yield value


def open_server(
    folder: Path,
    *,
    limits: Limits,
    name: str | None,
    defaults: dict[str, Any],
    threads: int | None = None,
    device: str | None = None,
    rows: int | None = None,
    prefix_reuse: bool = True,
) -> Server:
    """Load an engine and put it behind HTTP. Raises NemodiffError."""
    engine = load(folder, threads=threads, device=device)
    scheduler = Scheduler(engine, rows=rows, waiting=limits.waiting, prefix_reuse=prefix_reuse)
    return Server(engine, scheduler, limits, name or folder.resolve().name, defaults)


def _routes(server: Server) -> FastAPI:
    version = importlib.metadata.version("nemodiff")
    app = FastAPI(title="nemodiff", version=version, docs_url=None, redoc_url=None, responses=_ERRORS)
    app.openapi = lambda: _described(app)  # type: ignore[method-assign]
    app.add_exception_handler(NemodiffError, refusals.on_nemodiff_error)
    app.add_exception_handler(RequestValidationError, refusals.on_invalid_body)
    app.add_exception_handler(HTTPException, refusals.on_http_error)
    app.add_exception_handler(Exception, refusals.on_defect)

    @app.post("/v1/chat/completions", responses=_STREAM)
    async def chat(request: Request, asked: Chat) -> Response:
        """The next turn of a conversation."""
        return await server.answer(request, asked)

    @app.post("/v1/completions", responses=_STREAM)
    async def completion(request: Request, asked: Completion) -> Response:
        """A text, continued."""
        return await server.answer(request, asked)

    @app.post("/v1/fim/completions", responses=_STREAM)
    async def fim(request: Request, asked: Fim) -> Response:
        """A text with its hole filled."""
        return await server.fill(request, asked)

    @app.post("/events", responses=_STREAM)
    async def events(asked: Watched) -> Response:
        """What the runtime does for one request, pass by pass."""
        return await server.watch(asked)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model, and its names that choose a mode."""
        about = {"object": "model", "created": server.started, "owned_by": "nemodiff"}
        about["max_model_len"] = server.engine.info.build.max_seq_len
        names = [server.name, *(f"{server.name}:{mode}" for mode in MODES)]
        return {"object": "list", "data": [{"id": name, **about} for name in names]}

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.get("/health/ready")
    async def ready() -> Response:
        """Whether new requests are taken."""
        draining = server.gate.draining
        return JSONResponse({"status": "draining" if draining else "ready"}, 503 if draining else 200)

    @app.get("/version")
    async def versions() -> dict[str, str]:
        """Of nemodiff, and what the engine was built for."""
        return {"version": version, "engine": server.engine.folder.name, "backend": server.engine.info.manifest.backend}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        text = server.metrics.render(Now(server.scheduler.statistics, server.gate.refused, server.fills.counts))
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    # A mount at / would match every path, and so answer 404 where a route knows that the method is wrong.
    for file in PAGE.iterdir():
        path = "/" if file.name == "index.html" else f"/{file.name}"
        app.add_route(path, _file(file), ["GET"], include_in_schema=False)

    return app


def _file(path: Path) -> Callable[[Request], Awaitable[Response]]:
    async def send(_: Request) -> Response:
        return FileResponse(path)

    return send


def _described(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description; FastAPI's own status for a wrong body, 422, is 400 here."""
    description = FastAPI.openapi(app)
    for methods in description["paths"].values():
        for operation in methods.values():
            operation["responses"].pop("422", None)
    return description
