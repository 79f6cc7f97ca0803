"""Server-sent events: one line `data: ...` for each JSON object, and one with its name where an API has them.

Once the first line is out the status cannot change any more, so a later error is an object `error` in the stream.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ...errors import NemodiffError
from .error_responses import status_and_body
from .request_group import on_disconnect
from .request_log import record_of

MEDIA_TYPE = "text/event-stream"


class EventStreamResponse(StreamingResponse):
    """A stream of objects. Those that are there together are written together.

    Args:
        objects: what to send.
        close: called when the stream has ended in any way, and when the client has gone; the objects then end soon.
        more: whether the object after the last one is there already, or none is to come.
        done: whether the last line is OpenAI's `[DONE]`.
        named: whether each event has a name, the object's `type`.
    """

    def __init__(
        self,
        objects: AsyncIterator[Any],
        close: Callable[[], None],
        more: Callable[[], bool],
        *,
        done: bool,
        named: bool = False,
    ) -> None:
        self._close = close
        self._more = more
        self._done = done
        self._named = named
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(objects, media_type=MEDIA_TYPE, headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.create_task(on_disconnect(receive, self._close))
        self._path = str(scope["path"])
        self._record = record_of(Request(scope))
        # A task of its own goes on at once, and not by way of every layer between the server and here.
        stream = asyncio.create_task(self.stream_response(send))
        try:
            await stream
        finally:
            watch.cancel()
            self._close()

    async def stream_response(self, send: Send) -> None:
        """See StreamingResponse."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        lines = list[bytes]()
        try:
            async for item in self.body_iterator:
                lines.append(_line(item, self._named))
                if not self._more():
                    await send({"type": "http.response.body", "body": b"".join(lines), "more_body": True})
                    lines.clear()
        except NemodiffError as error:
            lines.append(_line(status_and_body(error, self._path)[1], self._named))
            if self._record is not None:
                self._record.error = str(error)
        else:
            if self._done:
                lines.append(b"data: [DONE]\n\n")
        await send({"type": "http.response.body", "body": b"".join(lines), "more_body": False})


def _line(value: Any, named: bool) -> bytes:
    name = f"event: {value['type']}\n".encode() if named else b""
    try:
        data = orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS)
    except TypeError:  # an integer of more than 64 bits, which a request may have and a response repeat
        data = json.dumps(value).encode()
    return name + b"data: " + data + b"\n\n"
