"""Requests of the scheduler, followed from an event loop.

In: prompts and options of one HTTP request. Out: `Following`, their events in the order they happen, told by the
scheduler's worker and read by the loop. However the reader goes away, what still runs is cancelled before the next
step. The surprising fact: finished requests are counted where they are told, in the worker, because a client that has
gone reads no events any more.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request

from ...errors import NemodiffError
from ...runtime.events.events import Event, Finished
from ...runtime.requests.prepare import Prompt
from ...runtime.scheduler import Handle, Listener, Scheduler
from ..metrics import Metrics


class TimedOut(NemodiffError):
    """A request took longer than the `seconds` that the server allows."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the request took more than {seconds:g} seconds; ask for fewer tokens")


async def when_gone(request: Request, then: Callable[[], None]) -> None:
    """Call `then` once the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    then()


class Following:
    """The requests of one HTTP request; `events` yields each with its place among them.

    Args:
        scheduler: takes the requests.
        metrics: counts the finished ones.
        timeout: seconds until what still runs is cancelled.
    """

    def __init__(self, scheduler: Scheduler, metrics: Metrics, timeout: float) -> None:
        self._scheduler, self._metrics, self._timeout = scheduler, metrics, timeout
        self._loop = asyncio.get_running_loop()
        self._told: asyncio.Queue[tuple[int, list[Event] | NemodiffError]] = asyncio.Queue()
        self._handles = list[Handle]()
        self._closed = self._expired = False
        self._alarm = self._loop.call_later(timeout, self._expire)

    async def submit(self, asked: list[tuple[Prompt, dict[str, Any]]], *, steps: bool = False) -> None:
        """Queue requests: all of them, or none. Raises RequestError and BusyError."""

        def queue() -> None:
            for index, (prompt, options) in enumerate(asked):
                handle = self._scheduler.submit(prompt, steps=steps, listener=self._listener(index), **options)
                self._handles.append(handle)
                if self._closed:  # meanwhile, so that close did not see this one
                    handle.cancel()
                    break

        try:
            await asyncio.to_thread(queue)  # to encode a long prompt takes longer than other clients should wait
        except BaseException:
            self.close()
            raise

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """What happens, until all have ended. Raises NemodiffError for the first that fails."""
        left = len(self._handles)
        while left:
            index, told = await self._told.get()
            if isinstance(told, NemodiffError):
                raise told
            for event in told:
                if isinstance(event, Finished):
                    left -= 1
                    if self._expired and event.generation.finish_reason == "cancelled":
                        raise TimedOut(self._timeout)
                yield index, event

    async def finished(self, request: Request) -> list[Finished]:
        """Wait for all, in their order; a client that goes away meanwhile cancels them."""
        ends: dict[int, Finished] = {}
        watch = asyncio.create_task(when_gone(request, self.close))
        try:
            async for index, event in self.events():
                if isinstance(event, Finished):
                    ends[index] = event
        finally:
            watch.cancel()
            self.close()
        return [ends[index] for index in sorted(ends)]

    def close(self) -> None:
        """Cancel what still runs."""
        self._closed = True
        self._alarm.cancel()
        for handle in self._handles:
            if not handle.done:
                handle.cancel()

    def _listener(self, index: int) -> Listener:
        def hear(told: list[Event] | NemodiffError) -> None:
            if isinstance(told, list) and isinstance(told[-1], Finished):
                self._metrics.observe(told[-1])
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                self._loop.call_soon_threadsafe(self._told.put_nowait, (index, told))

        return hear

    def _expire(self) -> None:
        self._expired = True
        self.close()
