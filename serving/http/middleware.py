"""The middleware before the routes: the host, API keys, the size of a body, and refusal while the server drains."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .error_responses import error_body, error_response, status_and_body
from .hosts import AllowedHosts
from .request_group import DrainingError

PROTECTED = (
    "/v1",
    "/events",
    "/tokenize",
    "/detokenize",
)  # paths that need a key and are refused while the server drains


class AdmissionMiddleware:
    """An ASGI application that admits requests to another.

    Args:
        app: answers the requests that are admitted.
        hosts: that a client may call the server by.
        keys: a client must send one of them; without any the server is open.
        max_bytes: of a request's body.
        draining: set once the server is about to stop.
    """

    def __init__(
        self, app: ASGIApp, hosts: AllowedHosts, keys: Sequence[str], max_bytes: int, draining: threading.Event
    ) -> None:
        self._app = app
        self._hosts = hosts
        self._keys = [key.encode() for key in keys]
        self._max_bytes = max_bytes
        self._draining = draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # which every route that takes GET answers; uvicorn leaves the body out
            scope = {**scope, "method": "GET"}
        refusal = self._refusal(scope)
        if refusal is not None:
            await error_response(*refusal)(scope, receive, send)
            return
        await self._app(scope, self._limiting_size(receive), send)

    def _limiting_size(self, receive: Receive) -> Receive:
        """Count the body as it comes in, because a client need not announce its size."""
        size = 0

        async def limiting_receive() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_bytes:
                raise HTTPException(413, self._too_large())
            return message

        return limiting_receive

    def _refusal(self, scope: Scope) -> tuple[int, dict[str, object], dict[str, str]] | None:
        """Why a request is not admitted, as a status, a body, and headers."""
        headers, path = Headers(scope=scope), str(scope["path"])
        host = headers.get("host", "")
        if not self._hosts.allows(host):
            message = f"the server does not go by the host {host!r:.60}; call it by its address, or start it with "
            return 421, error_body(421, message + "--allowed-host NAME", path=path), {}
        if path.startswith(PROTECTED):
            if self._keys and not self._has_key(headers):
                message = "no valid key; send the header Authorization: Bearer KEY"
                return 401, error_body(401, message, code="invalid_api_key", path=path), {"WWW-Authenticate": "Bearer"}
            if self._draining.is_set() and scope["method"] == "POST":
                return *status_and_body(DrainingError(), path), {}
        announced = headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > self._max_bytes:
            return 413, error_body(413, self._too_large(), path=path), {}
        if "transfer-encoding" in headers and "content-length" in headers:  # proxies may disagree
            message = "the headers Content-Length and Transfer-Encoding are both sent; send one of them"
            return 400, error_body(400, message, path=path), {"Connection": "close"}
        coding = headers.get("content-encoding") or "identity"
        if coding.lower() != "identity":
            message = f"the header Content-Encoding is {coding!r:.60}, allowed: identity; send the body uncompressed"
            return 400, error_body(400, message, path=path), {}
        return None

    def _has_key(self, headers: Headers) -> bool:
        """Whether a key is sent, as OpenAI's clients do or as Anthropic's."""
        scheme, _, value = headers.get("authorization", "").partition(" ")
        sent = [headers.get("x-api-key", "")] + ([value] if scheme.lower() == "bearer" else [])
        return any(secrets.compare_digest(one.strip().encode(), key) for one in sent for key in self._keys)

    def _too_large(self) -> str:
        return f"the body has more than {self._max_bytes} bytes; send less, or raise --max-request-bytes"
