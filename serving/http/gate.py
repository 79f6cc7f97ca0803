"""What stands before the routes: keys, the size of a request, and the time when the server is about to stop.

In: requests. Out: the same requests, or a refusal, and how many were refused, here or behind. The surprising fact: the
size is counted as the body comes in, because a client need not announce it.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .refusals import ClosingError, body, refusal, respond

PROTECTED = ("/v1", "/events")  # need a key, and are refused while the server drains


class Gate:
    """An ASGI application around another.

    Args:
        app: what the requests are for.
        keys: of which a client must show one; none leaves the server open.
        most_bytes: of a request's body.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], most_bytes: int) -> None:
        self._app, self._keys, self._most = app, [key.encode() for key in keys], most_bytes
        self.draining = False
        self.refused = dict.fromkeys((400, 401, 404, 413, 429, 500, 503, 504), 0)  # by status, of protected paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if str(scope["path"]).startswith(PROTECTED):
            send = self._counted(send)
        refused = self._refused(scope)
        if refused is not None:
            status, headers = refused[0], {"WWW-Authenticate": "Bearer"} if refused[0] == 401 else None
            await respond(status, refused[1], headers)(scope, receive, send)
            return
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._most:
                raise HTTPException(413, self._too_large())
            return message

        await self._app(scope, counted, send)

    def _counted(self, send: Send) -> Send:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start" and (status := int(message["status"])) >= 400:
                self.refused[status] = self.refused.get(status, 0) + 1
            await send(message)

        return counted

    def _refused(self, scope: Scope) -> tuple[int, dict[str, object]] | None:
        headers, path = Headers(scope=scope), str(scope["path"])
        if path.startswith(PROTECTED):
            if self._keys and not self._known(headers.get("authorization", "")):
                return 401, body(401, "no valid key; send the header Authorization: Bearer KEY", code="invalid_api_key")
            if self.draining and scope["method"] == "POST":
                return refusal(ClosingError("the server is about to stop; send the request to another, or later"))
        announced = headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > self._most:
            return 413, body(413, self._too_large())
        return None

    def _known(self, header: str) -> bool:
        scheme, _, key = header.partition(" ")
        given = key.strip().encode()
        return scheme.lower() == "bearer" and any(secrets.compare_digest(given, known) for known in self._keys)

    def _too_large(self) -> str:
        return f"the body has more than {self._most} bytes; send less, or raise --max-request-bytes"
