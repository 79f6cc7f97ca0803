"""Errors as responses in OpenAI's form: a status and `{"error": {"message", "type", "param", "code"}}`.

Beside that stands `"type": "error"`, with which it is Anthropic's form too.

A message may quote what the client sent, so quotes are cut short. Characters beyond ASCII are escaped, because half of
a surrogate pair has no UTF-8 bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ...errors import BusyError, ContextLengthError, NemodiffError, RequestError, excerpt
from ...runtime.requests.options import OPTIONS
from .body import Chat, Completion
from .dialects.messages_body import Messages
from .dialects.responses_body import Responses
from .request_group import DrainingError, RequestTimeoutError

RETRY_AFTER = 1  # seconds
_UNREADABLE = "There was an error parsing the body"  # FastAPI's words for a body that is no JSON of any kind
_BODIES = (Chat, Completion, Messages, Responses)
_FIELDS = {*OPTIONS, "best_of", *(name for body in _BODIES for name in body.model_fields)}
_PLAIN = dict.fromkeys(("dict_type", "model_attributes_type"), "Input should be an object")  # instead of pydantic's
_ANTHROPIC = "/v1/messages"  # the paths whose clients know Anthropic's types
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ErrorInfo(BaseModel):
    """What went wrong; `message` is one sentence."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every status from 400 on."""

    type: str = "error"
    error: ErrorInfo


class ModelNotFoundError(NemodiffError):
    """The request names a model that is not served here."""


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None, *, path: str = ""
) -> dict[str, Any]:
    """The JSON object of an error; its `type` is that of the API which the path belongs to."""
    if path.startswith(_ANTHROPIC):
        error_type = _ANTHROPIC_TYPES.get(status, "invalid_request_error")
    elif status == 429:
        error_type = "rate_limit_error"
    else:
        error_type = "invalid_request_error" if status < 500 else "server_error"
    return {"type": "error", "error": {"message": message, "type": error_type, "param": param, "code": code}}


def status_and_body(error: NemodiffError, path: str) -> tuple[int, dict[str, Any]]:
    """The status and body of an error of nemodiff's that a request to this path meets."""
    message = str(error)
    if isinstance(error, RequestError):
        subject = message.partition(" ")[0].removesuffix(":")  # a field or, after a point, what is in it
        code = "context_length_exceeded" if isinstance(error, ContextLengthError) else None
        return 400, error_body(400, message, subject if subject.partition(".")[0] in _FIELDS else None, code)
    if isinstance(error, BusyError):
        return 429, error_body(429, message, code="queue_full", path=path)
    if isinstance(error, DrainingError):
        return 503, error_body(503, message, code="draining", path=path)
    if isinstance(error, ModelNotFoundError):
        return 404, error_body(404, message, "model", "model_not_found", path=path)
    if isinstance(error, RequestTimeoutError):
        return 504, error_body(504, message, code="timeout", path=path)
    return 500, error_body(500, message, path=path)


def error_response(status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    """An error as a response; one that may pass later says when to try again."""
    retry = {"Retry-After": str(RETRY_AFTER)} if status in (429, 503) else {}
    return Response(json.dumps(body), status, {**retry, **(headers or {})}, "application/json")


async def on_nemodiff_error(request: Request, error: Exception) -> Response:
    """Handle errors of nemodiff's."""
    assert isinstance(error, NemodiffError)
    return error_response(*status_and_body(error, request.url.path))


async def on_validation_error(request: Request, error: Exception) -> Response:
    """Handle a body that is not JSON or not what the route takes: report the first problem in one sentence."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = ".".join(_place(first["loc"], error.body, missing=first["type"] == "missing"))[:100] or None
    if first["type"] == "json_invalid":
        return error_response(400, error_body(400, f"the body is not JSON ({first['ctx']['error']}); send an object"))
    if first["type"] == "value_error":
        return error_response(400, error_body(400, str(first["ctx"]["error"]), param))
    sent = request.headers.get("content-type")
    if param is None and isinstance(first["input"], bytes | None) and not is_json(sent):  # so it has not been parsed
        got = "is missing" if sent is None else f"is {sent!r:.60}"
        remedy = "allowed: application/json; with curl: -H 'Content-Type: application/json'"
        return error_response(400, error_body(400, f"the header Content-Type {got}, {remedy}"))
    if first["loc"] == ("body",):
        state = "is missing" if first["type"] == "missing" else f"is {excerpt(first['input'])}, allowed: a JSON object"
        return error_response(400, error_body(400, f"the body {state}; send an object"))
    return error_response(400, error_body(400, *_complaint(first, param)))


def _complaint(problem: Mapping[str, Any], param: str | None) -> tuple[str, str | None]:
    """The sentence about a value that is wrong, and the field which has it."""
    subject, kind = "the body" if param is None else param, problem["type"]
    if kind == "union_tag_invalid":
        given, allowed = problem["input"]["type"], problem["ctx"]["expected_tags"]
        return f"{subject}.type is {excerpt(given)}, allowed: {allowed}; change it, or leave it out", f"{subject}.type"
    if kind == "union_tag_not_found":
        return f"{subject}.type: Field required; change it", f"{subject}.type"
    got = "" if kind == "missing" else f", got {excerpt(problem['input'])}"
    return f"{subject}: {_PLAIN.get(kind, problem['msg'])[:200]}{got}; change it", param


def _place(location: Sequence[Any], body: Any, *, missing: bool) -> list[str]:
    """Where in a body a problem is, without the names of alternatives that pydantic has put between."""
    place = []
    here = body
    for part in location:
        inside = isinstance(here, dict) and part in here
        if inside or (isinstance(here, list) and isinstance(part, int) and part < len(here)):
            place.append(str(part))
            here = here[part]
    named = missing and location[1:] and location[-1:] != tuple(place[-1:])  # unless it is there, and null
    return [*place, str(location[-1])] if named else place


def is_json(content_type: str | None) -> bool:
    """Whether a body of this type is parsed."""
    kind = (content_type or "").partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def unreadable() -> HTTPException:
    """The error of a body that is no JSON of any kind, as FastAPI raises it."""
    return HTTPException(400, _UNREADABLE)


async def on_http_error(request: Request, error: Exception) -> Response:
    """Handle paths and methods that do not exist, and a body that is too large or cannot be read."""
    assert isinstance(error, HTTPException)
    status, path = error.status_code, request.url.path
    if error.detail == _UNREADABLE:
        return error_response(
            400,
            error_body(
                400, "the body cannot be read; send a JSON object in UTF-8, nested less deeply, with shorter numbers"
            ),
        )
    if status not in (404, 405):
        return error_response(status, error_body(status, str(error.detail), path=path), error.headers)
    message = f"{request.method} {path:.100}: {error.detail}; the routes are in /openapi.json"
    return error_response(status, error_body(status, message, path=path), error.headers)


async def on_unexpected_error(request: Request, error: Exception) -> Response:
    """Handle a defect of nemodiff's: its traceback goes to the log, never to a client."""
    message = f"nemodiff failed ({type(error).__name__}); the server's log says more"
    return error_response(500, error_body(500, message, path=request.url.path))
