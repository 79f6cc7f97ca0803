"""Server-sent events: one line `data: ...` for each JSON object, and one with its name where an API has them.

Once the first line is out the status cannot change any more, so a later error is an object `error` in the stream.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ...errors import NemodiffError
from .error_responses import status_and_body

MEDIA_TYPE = "text/event-stream"


class EventStreamResponse(StreamingResponse):
    """A stream of objects.

    Args:
        objects: what to send.
        close: called when the stream has ended in any way, also by a client that left in the middle of a write.
        done: whether the last line is OpenAI's `[DONE]`.
        named: whether each event has a name, the object's `type`.
    """

    def __init__(
        self, objects: AsyncIterator[Any], close: Callable[[], None], *, done: bool, named: bool = False
    ) -> None:
        self._close = close
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(_lines(objects, done, named), media_type=MEDIA_TYPE, headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def _lines(objects: AsyncIterator[Any], done: bool, named: bool) -> AsyncIterator[bytes]:
    try:
        async for item in objects:
            yield _line(item, named)
    except NemodiffError as error:
        yield _line(status_and_body(error)[1], named)
        return
    if done:
        yield b"data: [DONE]\n\n"


def _line(value: Any, named: bool) -> bytes:
    name = f"event: {value['type']}\n".encode() if named else b""
    return name + b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
