"""Answers as server-sent events.

In: JSON objects as they come. Out: a response whose body is a line `data: ...` per object. An error after the first
line cannot change the status any more, so it comes as an object `error` in the stream. The surprising fact: whoever
streams must be told of every end, also when the client goes away in the middle of a write.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ...errors import NemodiffError
from .refusals import refusal

MEDIA_TYPE = "text/event-stream"


class Events(StreamingResponse):
    """A stream of objects.

    Args:
        objects: what to send.
        close: called when the stream has ended, in whatever way.
        done: whether the last line is OpenAI's `[DONE]`.
    """

    def __init__(self, objects: AsyncIterator[Any], close: Callable[[], None], *, done: bool) -> None:
        self._close = close
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(_lines(objects, done), media_type=MEDIA_TYPE, headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def _lines(objects: AsyncIterator[Any], done: bool) -> AsyncIterator[bytes]:
    try:
        async for one in objects:
            yield _line(one)
    except NemodiffError as error:
        yield _line(refusal(error)[1])
        return
    if done:
        yield b"data: [DONE]\n\n"


def _line(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
