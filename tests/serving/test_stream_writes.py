"""How a streamed answer leaves the server: what is there together in one piece, nothing held back, nothing lost."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemodiff.errors import BusyError
from nemodiff.runtime.events.events import Event, Finished, Text
from nemodiff.serving.http.doorbell import Doorbell, doorbell
from nemodiff.serving.http.request_group import RequestGroup
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


@pytest.fixture
def wakings(monkeypatch: pytest.MonkeyPatch) -> list[Doorbell]:
    """The doorbell that has woken a loop, once for each time."""
    answer = Doorbell._answer
    answered: list[Doorbell] = []

    def counted(bell: Doorbell) -> None:
        answered.append(bell)
        answer(bell)

    monkeypatch.setattr(Doorbell, "_answer", counted)
    return answered


async def settle() -> None:
    """Let the loop do all that it has to do soon."""
    for _ in range(5):
        await asyncio.sleep(0.001)


@pytest.mark.parametrize(("spacing", "heard", "woken"), [(0.0, "abcd", 4), (30.0, "ab", 2)])
def test_a_loop_that_is_rung_for_again_and_again_is_not_woken(
    monkeypatch: pytest.MonkeyPatch, wakings: list[Doorbell], spacing: float, heard: str, woken: int
) -> None:
    async def ring() -> None:
        called: list[str] = []
        for name in "abcd":
            doorbell().ring(lambda name=name: called.append(name))
            await settle()
        assert called == [*heard]
        assert len(wakings) == woken
        doorbell().ring(lambda: called.append("e"), at_once=True)
        await settle()
        assert called == [*"abcde"]

    monkeypatch.setattr("nemodiff.serving.http.doorbell._SPACING", spacing)
    asyncio.run(ring())


def test_a_loop_looks_by_itself_until_nobody_has_rung(monkeypatch: pytest.MonkeyPatch, wakings: list[Doorbell]) -> None:
    async def ring() -> None:
        called: list[str] = []
        for name in "abcd":
            doorbell().ring(lambda name=name: called.append(name))
            await settle()
        while len(called) < 4:
            await asyncio.sleep(0.01)
        assert called == [*"abcd"]
        assert len(wakings) == 2
        await asyncio.sleep(1.5)
        doorbell().ring(lambda: called.append("e"))
        await settle()
        assert called == [*"abcde"]
        assert len(wakings) == 3

    monkeypatch.setattr("nemodiff.serving.http.doorbell._SPACING", 0.6)
    asyncio.run(asyncio.wait_for(ring(), 30))


class Told:
    """A group of requests over a scheduler that tells what the test says."""

    def __init__(self) -> None:
        self.group = RequestGroup(self, lambda *_: None, 60)

    def submit_many(self, requests: list[Any], *, steps: bool, listener: Any) -> list[Any]:
        self._listener = listener
        return [SimpleNamespace(done=True) for _ in requests]

    async def tell(self, texts: str, *, end: bool = False, of: int = 0) -> None:
        """Tell of one text after the other, of the last together with the end."""
        for text in texts:
            events: list[Event] = [Text(of, 0.0, text, [], None, None, [])]
            if end and text == texts[-1]:
                generation: Any = SimpleNamespace(finish_reason="length")
                events.append(Finished(of, 0.0, generation, None, None, None))
            self._listener(of, events)
            await settle()


def test_the_end_of_a_quick_stream_is_read_at_once(monkeypatch: pytest.MonkeyPatch, wakings: list[Doorbell]) -> None:
    async def stream() -> None:
        told = Told()
        read: list[str] = []
        more: list[bool] = []

        async def follow() -> None:
            async for _, event in told.group.events():
                read.append(event.text if isinstance(event, Text) else "end")
                more.append(told.group.more)

        await told.group.submit(lambda: [("x", {})])
        reading = asyncio.create_task(follow())
        await settle()
        await told.tell("abcd")
        assert read == [*"ab"]
        await told.tell("e", end=True)
        await asyncio.wait_for(reading, 10)
        assert read == [*"abcde", "end"]
        assert more == [False] * 2 + [True] * 4  # what came together is written together
        assert len(wakings) == 3

    monkeypatch.setattr("nemodiff.serving.http.doorbell._SPACING", 30.0)
    asyncio.run(stream())


def test_answers_that_are_not_streamed_wake_the_loop_at_their_ends(wakings: list[Doorbell]) -> None:
    async def whole() -> None:
        told = Told()
        await told.group.submit(lambda: [("x", {}), ("y", {})])
        receive: Any = asyncio.Event().wait
        answers = asyncio.create_task(told.group.finished(receive))
        await settle()
        await told.tell("abcd")
        assert not wakings
        await told.tell("f", end=True, of=1)
        await told.tell("e", end=True)
        ended = await asyncio.wait_for(answers, 10)
        assert [(type(event), event.request) for event in ended] == [(Finished, 0), (Finished, 1)]
        assert len(wakings) == 2
        group = weakref.ref(told.group)
        del told, answers
        gc.collect()
        assert group() is None  # and is not kept until its time would be over

    asyncio.run(whole())
