"""The routes of `nemodiff serve`.

FastAPI makes of one declaration of a field its check, its error message and its entry in `/openapi.json`.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import Request

from ...errors import NemodiffError
from ...version import __version__
from . import error_responses
from .body import Chat, Completion, Detokenize, Tokenize, Watched
from .dialects.messages_body import Counted, Messages
from .dialects.responses_body import Responses
from .fim_body import Fim
from .handlers import Handlers
from .long_bodies import BodyRoute
from .page_export import PAGE
from .sse import MEDIA_TYPE

_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}  # one, not the stream
_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {MEDIA_TYPE: {"schema": _EVENT}}}}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "model": error_responses.ErrorResponse}
    for status, text in {
        400: "The request is wrong, or asks for what is not supported.",
        401: "The key is missing or wrong.",
        404: "There is no such model.",
        408: "The request has not arrived in full.",
        413: "The body is too large.",
        421: "The server does not go by this host.",
        429: "Too many requests wait.",
        500: "The engine failed.",
        503: "The server is about to stop.",
        504: "The request took too long.",
    }.items()
}


def create_routes(handlers: Handlers, draining: threading.Event) -> FastAPI:
    """The application that the middleware wraps; `draining` is set once the server is about to stop."""
    app = FastAPI(
        title="nemodiff", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False, responses=_ERRORS
    )
    app.router.route_class = BodyRoute
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    app.add_exception_handler(NemodiffError, error_responses.on_nemodiff_error)
    app.add_exception_handler(RequestValidationError, error_responses.on_validation_error)
    app.add_exception_handler(HTTPException, error_responses.on_http_error)
    app.add_exception_handler(Exception, error_responses.on_unexpected_error)
    _add_generating_routes(app, handlers)
    _add_operating_routes(app, handlers, draining)

    # A mount at / would match every path, and so answer 404 where a route knows that the method is wrong.
    for file in PAGE.iterdir():
        path = "/" if file.name == "index.html" else f"/{file.name}"
        app.add_route(path, _file(file), ["GET"], include_in_schema=False)

    return app


def _add_generating_routes(app: FastAPI, handlers: Handlers) -> None:
    @app.post("/v1/chat/completions", responses=_STREAM)
    async def chat(request: Request, body: Chat) -> Response:
        """Generate the next turn of a conversation."""
        return await handlers.generate(request, body)

    @app.post("/v1/completions", responses=_STREAM)
    async def completion(request: Request, body: Completion) -> Response:
        """Continue a text."""
        return await handlers.generate(request, body)

    @app.post("/v1/messages", responses=_STREAM)
    async def messages(request: Request, body: Messages) -> Response:
        """Generate the next turn of a conversation, in Anthropic's words."""
        return await handlers.answer(request, body)

    @app.post("/v1/messages/count_tokens")
    async def count_tokens(body: Counted) -> dict[str, Any]:
        """Count the tokens of a conversation, in Anthropic's words."""
        return await handlers.count(body)

    @app.post("/v1/responses", responses=_STREAM)
    async def responses(request: Request, body: Responses) -> Response:
        """Generate the next turn of a conversation, in the words of OpenAI's Responses API."""
        return await handlers.answer(request, body)

    @app.post("/v1/fim/completions", responses=_STREAM)
    async def fim(request: Request, body: Fim) -> Response:
        """Fill the hole in a text."""
        return await handlers.infill(request, body)

    @app.post("/tokenize")
    async def tokenize(body: Tokenize) -> Response:
        """Encode a text or a conversation."""
        return await handlers.tokenize(body)

    @app.post("/detokenize")
    async def detokenize(body: Detokenize) -> Response:
        """Decode tokens, special ones included."""
        return await handlers.detokenize(body)

    @app.post("/events", responses=_STREAM)
    async def events(request: Request, body: Watched) -> Response:
        """Stream what the runtime does for one request, pass by pass."""
        return await handlers.trace(request, body)


def _add_operating_routes(app: FastAPI, handlers: Handlers, draining: threading.Event) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the model, and its names that choose a mode."""
        return handlers.models()

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        """Describe one of the models."""
        return handlers.model(model)

    @app.get("/health")
    async def health() -> Response:
        """Tell whether the process answers, and will answer requests again."""
        if (reason := handlers.engine.lost) is not None:
            return JSONResponse({"status": reason}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/health/ready")
    async def ready() -> Response:
        """Tell whether new requests are taken."""
        if draining.is_set():
            return JSONResponse({"status": "draining"}, 503)
        if (reason := handlers.engine.lost) is not None:
            return JSONResponse({"status": reason}, 503)
        return JSONResponse({"status": "ready"})

    @app.get("/version")
    async def versions() -> dict[str, str]:
        """Give the version of nemodiff, and what the engine was built for."""
        engine = handlers.engine
        return {"version": __version__, "engine": engine.folder.name, "backend": engine.info.manifest.backend}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics(request: Request) -> Response:
        """Give the metrics to Prometheus."""
        text, content_type = handlers.metrics.render(request.headers.get("accept", ""))
        return Response(text, media_type=content_type)


def _file(path: Path) -> Callable[[Request], Awaitable[Response]]:
    async def send(_: Request) -> Response:
        return FileResponse(path)

    return send


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description; FastAPI's own status for a wrong body, 422, is 400 here."""
    description = FastAPI.openapi(app)
    for methods in description["paths"].values():
        for operation in methods.values():
            operation["responses"].pop("422", None)
    return description
