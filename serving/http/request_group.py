"""The scheduler's requests of one HTTP request, followed from the event loop.

The scheduler's worker hands over events as they happen, and the loop reads them. However the client goes away, what
still runs is cancelled before the next step.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.types import Receive

from ...errors import BusyError, NemodiffError
from ...runtime.events.events import Event, Finished
from ...runtime.requests.prepare import Prompt
from ...runtime.requests.sequence import Sequence
from ...runtime.scheduler.handle import Handle
from ...runtime.scheduler.scheduler import Scheduler
from .doorbell import doorbell
from .threads import in_thread


class DrainingError(NemodiffError):
    """The server is about to stop."""

    def __init__(self) -> None:
        super().__init__("the server is about to stop; send the request to another, or later")


class RequestTimeoutError(NemodiffError):
    """A request took longer than the `seconds` that the server allows."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the request took more than {seconds:g} s; ask for fewer tokens")


async def on_disconnect(receive: Receive, callback: Callable[[], None]) -> None:
    """Wait until the client has disconnected, then call `callback`."""
    while (await receive())["type"] != "http.disconnect":
        pass
    callback()


class RequestGroup:
    """Requests that are submitted and cancelled together; `events` yields each event with its request's index.

    Args:
        scheduler: takes the requests.
        observe: called in the scheduler's worker with what happened to a request, by its index.
        timeout: seconds until what still runs is cancelled.
        pool: its threads read the prompts; see `in_thread`.
        own_words: in which refusals are told; see `Decoding.own_words`.
        tells_cut: whether its API can tell an answer that the server's end has cut from a whole one.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        observe: Callable[[int, list[Event]], None],
        timeout: float,
        pool: concurrent.futures.Executor | None = None,
        own_words: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
        tells_cut: bool = True,
    ) -> None:
        self._scheduler = scheduler
        self._observe = observe
        self._timeout = timeout
        self._pool = pool
        self._own_words = own_words
        self._tells_cut = tells_cut
        self._bell = doorbell()
        self._outcomes = collections.deque[tuple[int, list[Event] | NemodiffError]]()
        self._loop = asyncio.get_running_loop()
        self._woken = self._loop.create_future()
        self._sleeps = False  # whether the next outcome has to wake the loop; an end always does
        self._streams = True  # whether outcomes before an end are read
        self.more = False  # whether what follows the event yielded last is here already
        self._handles = list[Handle]()
        self._closed = False
        self._expired = False
        self._timer = self._loop.call_later(timeout, self._expire)

    async def submit(
        self, read: Callable[[], list[tuple[Prompt, dict[str, Any]]]], *, steps: bool = False
    ) -> list[tuple[Prompt, dict[str, Any]]]:
        """Queue prompts with their options: all of them, or none. `read` gives them, in a thread.

        Raises RequestError, BusyError and DrainingError.
        """

        def submit_all() -> list[tuple[Prompt, dict[str, Any]]]:
            requests = read()
            with self._own_words():
                self._handles = self._scheduler.submit_many(requests, steps=steps, listener=self._listen)
            if self._closed:  # in the meantime, so that `close` did not see these handles
                self.close()
            return requests

        try:
            return await in_thread(submit_all, self._pool)  # encoding a long prompt takes time
        except BaseException as error:
            self.close()
            if isinstance(error, BusyError) and self._scheduler.closed:
                raise DrainingError from None
            raise

    @property
    def sequences(self) -> list[Sequence]:
        """The submitted requests, in their order; the scheduler's worker changes them."""
        return [handle.sequence for handle in self._handles]

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """What happens, until all requests have ended. Raises NemodiffError for the first that fails."""
        unfinished = len(self._handles)
        while unfinished:
            for left in reversed(range(await self._arrived())):
                index, outcome = self._outcomes.popleft()
                if isinstance(outcome, NemodiffError):
                    with self._own_words():
                        raise outcome
                for event in outcome:
                    if isinstance(event, Finished):
                        unfinished -= 1
                        if event.generation.finish_reason == "cancelled":
                            self._check_cancelled(event)
                    self.more = left > 0 or event is not outcome[-1] or not unfinished
                    yield index, event

    async def finished(self, receive: Receive) -> list[Finished]:
        """Wait for all requests, in their order; a client that disconnects meanwhile cancels them."""
        self._streams = False
        finished: dict[int, Finished] = {}
        watch = asyncio.create_task(on_disconnect(receive, self.close))
        try:
            async for index, event in self.events():
                if isinstance(event, Finished):
                    finished[index] = event
        finally:
            watch.cancel()
            self.close()
        return [finished[index] for index in sorted(finished)]

    def close(self) -> None:
        """Cancel what still runs."""
        self._closed = True
        self._timer.cancel()
        for handle in self._handles:
            if not handle.done:
                handle.cancel()

    def _check_cancelled(self, event: Finished) -> None:
        """Raise the reason of a cancellation that the client has to know; if it has gone, there is none."""
        if self._expired:
            raise RequestTimeoutError(self._timeout)
        if not self._closed and not (event.generation.token_ids and self._tells_cut):
            raise DrainingError

    async def _arrived(self) -> int:
        """How many outcomes are here to be read, once there is one."""
        while not self._outcomes:
            self._woken = self._loop.create_future()
            self._sleeps = True
            if not self._outcomes:  # else one came just before, and nobody has been woken
                await self._woken
        self._sleeps = False
        return len(self._outcomes)

    def _listen(self, index: int, outcome: list[Event] | NemodiffError) -> None:
        # Called here and not where events are read, because nobody reads them once the client has gone.
        if isinstance(outcome, list):
            self._observe(index, outcome)
        ends = not isinstance(outcome, list) or isinstance(outcome[-1], Finished)
        if not (ends or self._streams):
            return
        self._outcomes.append((index, outcome))
        if ends or self._sleeps:
            self._sleeps = False
            self._bell.ring(self._wake, at_once=ends)

    def _wake(self) -> None:
        if not self._woken.done():
            self._woken.set_result(None)

    def _expire(self) -> None:
        self._expired = True
        self.close()
