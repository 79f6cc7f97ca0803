"""A route that reads a long body in a thread.

Parsing and checking four megabytes of small messages takes seconds, in which no other client would hear anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from ...runtime.text.checks import check_parts
from .error_responses import is_json, unreadable
from .threads import in_thread

_LONG = 16 << 10  # bytes from which on a thread costs less than others would wait


class BodyRoute(APIRoute):
    """FastAPI's route, which gets a long body checked already."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See APIRoute."""
        handle, field = super().get_route_handler(), self.body_field

        async def route(request: Request) -> Response:
            announced = request.headers.get("content-length", "")
            short = announced.isdecimal() and int(announced) < _LONG
            if field is None or short or not is_json(request.headers.get("content-type")):
                return await handle(request)
            try:
                body = await request.body()
            except ClientDisconnect:
                return Response()  # nobody reads this
            if not body:
                return await handle(request)
            checked = await in_thread(lambda: _checked(body, field.validate))
            return await handle(_Checked(request, checked))

        return route


class _Checked(Request):
    """A request whose body has been read and checked."""

    def __init__(self, request: Request, checked: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._checked = checked

    async def body(self) -> bytes:
        return b"read"

    async def json(self) -> Any:
        return self._checked


def _checked(body: bytes, validate: Callable[..., tuple[Any, list[Any]]]) -> Any:
    """What FastAPI makes of a body, with the errors that it would raise. Raises RequestError."""
    try:
        check_parts(body, "the body")
        value = json.loads(body)
    except json.JSONDecodeError as error:
        problem = {"type": "json_invalid", "loc": ("body", error.pos), "input": {}, "ctx": {"error": error.msg}}
        raise RequestValidationError([problem]) from None
    except (ValueError, RecursionError):  # no UTF-8, or a number of thousands of digits
        raise unreadable() from None
    checked, problems = validate(value, loc=("body",))
    if problems:
        for problem in problems:
            if isinstance(cause := problem.get("ctx", {}).get("error"), Exception):
                cause.__traceback__ = None  # whose frames hold this one, and so the body, which holds the error
        raise RequestValidationError(problems, body=value)
    return checked
