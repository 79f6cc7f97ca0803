"""How a streamed answer leaves the server: what is there together in one piece, nothing held back, nothing lost."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from nemodiff.errors import BusyError
from nemodiff.serving.http.doorbell import doorbell
from nemodiff.serving.http.sse import EventStreamResponse


def written(objects: list[int | Exception], *, ready: set[int] = frozenset(), done: bool = False) -> list[bytes]:
    """The bodies of a stream of objects; after those in `ready` the next one is there already."""
    last: list[Any] = []
    sent: list[dict[str, Any]] = []
    closed: list[bool] = []

    async def given() -> AsyncIterator[int]:
        for value in objects:
            if isinstance(value, Exception):
                raise value
            last[:] = [value]
            yield value

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    async def stream() -> None:
        response = EventStreamResponse(given(), lambda: closed.append(True), lambda: last[0] in ready, done=done)
        await response({"type": "http", "path": "/events"}, receive, send)

    asyncio.run(stream())
    assert closed
    assert [message.get("more_body") for message in sent] == [None, *[True] * (len(sent) - 2), False]
    return [message["body"] for message in sent[1:]]


@pytest.mark.parametrize(
    ("ready", "bodies"),
    [
        (set(), [b"data: 1\n\n", b"data: 2\n\n", b"data: 3\n\n", b"data: [DONE]\n\n"]),
        ({1}, [b"data: 1\n\ndata: 2\n\n", b"data: 3\n\n", b"data: [DONE]\n\n"]),
        ({2, 3}, [b"data: 1\n\n", b"data: 2\n\ndata: 3\n\ndata: [DONE]\n\n"]),
    ],
)
def test_what_is_there_is_written_together(ready: set[int], bodies: list[bytes]) -> None:
    assert written([1, 2, 3], ready=ready, done=True) == bodies


def test_what_was_there_before_an_error_is_written_before_it() -> None:
    (body,) = written([1, BusyError("no room")], ready={1}, done=True)
    assert body.startswith(b'data: 1\n\ndata: {"')
    assert b"no room" in body
    assert b"DONE" not in body


def test_the_doorbell_calls_each_function_once_whoever_rings() -> None:
    async def ring() -> list[int]:
        called: list[int] = []
        all_called = asyncio.Event()

        def call(number: int) -> None:
            called.append(number)
            if len(called) == 2000:
                all_called.set()

        bell = doorbell()
        assert doorbell() is bell
        threads = [
            threading.Thread(target=lambda first=first: [bell.ring(lambda n=n: call(n)) for n in range(first, 2000, 4)])
            for first in range(4)
        ]
        for thread in threads:
            thread.start()
        await asyncio.wait_for(all_called.wait(), 60)
        for thread in threads:
            thread.join()
        return called

    gc.collect()  # what other tests have left behind
    files = len(list(Path(f"/proc/{os.getpid()}/fd").iterdir()))
    for _ in range(2):
        assert sorted(asyncio.run(ring())) == list(range(2000))
    gc.collect()
    assert len(list(Path(f"/proc/{os.getpid()}/fd").iterdir())) == files


def test_a_closed_loop_can_be_rung_for() -> None:
    async def bell() -> Any:
        return doorbell()

    ring = asyncio.run(bell()).ring
    for _ in range(100_000):  # more than a pipe holds
        ring(lambda: None)
