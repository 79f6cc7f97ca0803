"""What the server refuses, in OpenAI's form.

In: an error, or what the framework found wrong. Out: a status and `{"error": {"message", "type", "param", "code"}}`
with one sentence in it. The surprising fact: a client's text may come back in the sentence, so it is cut short, and
every character beyond ASCII is escaped: half of a surrogate pair has no bytes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ...errors import BusyError, NemodiffError, RequestError
from ...runtime.requests.options import Options
from .follow import TimedOut

RETRY_AFTER = 1  # seconds
_OPTIONS = {field.name for field in dataclasses.fields(Options)}
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refusal(BaseModel):
    """Why not; `message` is one sentence."""

    message: str
    type: str
    param: str | None
    code: str | None


class Refused(BaseModel):
    """The body of every status from 400 on."""

    error: Refusal


class ClosingError(NemodiffError):
    """The server is about to stop."""


class ModelError(NemodiffError):
    """A model of another name was asked for."""


def body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON object of a refusal."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refusal(error: NemodiffError) -> tuple[int, dict[str, Any]]:
    """Status and body for an error of nemodiff's."""
    if isinstance(error, RequestError):
        word = str(error).split(" ", 1)[0]
        return 400, body(400, str(error), word if word in _OPTIONS else None)
    if isinstance(error, BusyError):
        return 429, body(429, str(error), code="queue_full")
    if isinstance(error, ClosingError):
        return 503, body(503, str(error), code="draining")
    if isinstance(error, ModelError):
        return 404, body(404, str(error), "model", "model_not_found")
    if isinstance(error, TimedOut):
        return 504, body(504, str(error), code="timeout")
    return 500, body(500, str(error))


def respond(status: int, content: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    """A refusal as a response; one that may succeed later says when to try again."""
    later = {"Retry-After": str(RETRY_AFTER)} if status in (429, 503) else {}
    return Response(json.dumps(content), status, {**later, **(headers or {})}, "application/json")


async def on_nemodiff_error(request: Request, error: Exception) -> Response:
    """For errors of nemodiff's."""
    assert isinstance(error, NemodiffError)
    return respond(*refusal(error))


async def on_invalid_body(request: Request, error: Exception) -> Response:
    """For a body that is not JSON or not what the route takes: the first thing wrong, as one sentence."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    param = ".".join(where)[:100] or None
    if first["type"] == "json_invalid":
        return respond(400, body(400, f"the body is not JSON ({first['ctx']['error']}); send an object"))
    if first["type"] == "value_error":
        return respond(400, body(400, str(first["ctx"]["error"]), param))
    subject = "the body" if param is None else param
    got = f", got {first['input']!r:.60}" if first["type"] != "missing" else ""
    return respond(400, body(400, f"{subject}: {first['msg'][:200]}{got}; change it", param))


async def on_http_error(request: Request, error: Exception) -> Response:
    """For paths and methods that are not there, and for a body that is too large or cannot be read."""
    assert isinstance(error, HTTPException)
    if error.status_code not in (404, 405):
        return respond(error.status_code, body(error.status_code, str(error.detail)), error.headers)
    message = f"{request.method} {request.url.path:.100}: {error.detail}; the routes are in /openapi.json"
    return respond(error.status_code, body(error.status_code, message), error.headers)


async def on_defect(request: Request, error: Exception) -> Response:
    """For a defect of nemodiff's: its traceback goes to the log, never to a client."""
    return respond(500, body(500, f"nemodiff failed ({type(error).__name__}); the server's log says more"))
