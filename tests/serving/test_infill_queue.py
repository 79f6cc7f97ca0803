"""The queue of holes: whoever stops waiting for a hole gives its place to others."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import PATIENCE, eventually

import nemodiff
from nemodiff.runtime.engines.passes import causal
from nemodiff.serving.http import infill_queue
from nemodiff.serving.http.infill_queue import CancelledError, InfillQueue


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """What every hole waits for before it is filled."""
    opened = threading.Event()
    infill = infill_queue.infill

    def wait_and_infill(*arguments: Any, **options: Any) -> Any:
        assert opened.wait(PATIENCE)
        return infill(*arguments, **options)

    monkeypatch.setattr(infill_queue, "infill", wait_and_infill)
    yield opened
    opened.set()


def test_a_hole_that_nobody_waits_for_gives_its_place_up(engine: nemodiff.LoadedEngine, gate: threading.Event) -> None:
    queue = InfillQueue(engine, 2)

    def submit() -> concurrent.futures.Future[Any]:
        return queue.submit("def add(a, b):", " a + b", threading.Event(), length=1)

    async def wait_in_vain() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(submit()), 0.01)

    first = submit()
    for _ in range(5):  # more than may wait
        asyncio.run(wait_in_vain())
    assert queue.stats.present == 1
    others = [submit() for _ in range(2)]
    with pytest.raises(nemodiff.BusyError, match="3 holes are filled or wait, allowed: 3"):
        submit()
    gate.set()
    for future in (first, *others):
        assert future.result(PATIENCE).holes
    queue.close()
    assert queue.stats.present == 0
    assert queue.stats.ends == {"finished": 3, "cancelled": 5, "failed": 0}


def test_a_hole_that_is_given_up_ends_before_its_next_pass(
    engine: nemodiff.LoadedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_up = threading.Event()

    def infill(engine: nemodiff.LoadedEngine, *_: Any) -> None:
        with contextlib.closing(engine.backend.open(1)) as cache:
            given_up.set()
            cache.forward([causal("prefill", [130], 0)])

    monkeypatch.setattr(infill_queue, "infill", infill)
    queue = InfillQueue(engine, 2)
    with pytest.raises(CancelledError):
        queue.submit("a", "b", given_up).result(PATIENCE)
    queue.close()
    assert queue.stats.ends == {"finished": 0, "cancelled": 1, "failed": 0}


def test_a_queue_that_is_closed_drops_what_waits(engine: nemodiff.LoadedEngine, gate: threading.Event) -> None:
    queue = InfillQueue(engine, 2)
    first, second = (queue.submit("a", "b", threading.Event(), length=1) for _ in range(2))
    closing = threading.Thread(target=queue.close)
    closing.start()
    eventually(second.cancelled)
    assert closing.is_alive()  # until the first has ended, before its next pass
    gate.set()
    closing.join(PATIENCE)
    assert isinstance(first.exception(), CancelledError)
    assert queue.stats.ends == {"finished": 0, "cancelled": 2, "failed": 0}
