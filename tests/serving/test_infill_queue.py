"""The queue of holes: whoever stops waiting for a hole gives its place to others."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import PATIENCE

import nemodiff
from nemodiff.serving.http import infill_queue
from nemodiff.serving.http.infill_queue import InfillQueue


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
