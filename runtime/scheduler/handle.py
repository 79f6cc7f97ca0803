"""One request submitted to a scheduler, as its submitter sees it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import queue
from collections.abc import Callable, Iterator

from ...errors import EngineError, NemodiffError, first_line
from ..events.events import Event, Finished
from ..events.reporter import Reporter
from ..requests.generation import Generation
from ..requests.sequence import Sequence

Listener = Callable[[list[Event] | NemodiffError], None]


class Handle:
    """One submitted request. Iterate over it for its events; `result` waits for its end without them."""

    def __init__(
        self,
        number: int,
        sequence: Sequence,
        cancel: Callable[[Handle], None],
        *,
        steps: bool,
        listener: Listener | None,
    ) -> None:
        self.number = number
        self.sequence = sequence
        self.reporter = Reporter(number, sequence, steps=steps)
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._listener = listener
        self._cancel = cancel
        self._future: concurrent.futures.Future[Finished] = concurrent.futures.Future()

    def __iter__(self) -> Iterator[Event]:
        """Events as they come, `Finished` last; each is given once. Raises NemodiffError if the request failed.

        A request with a listener has none here.
        """
        while (event := self._events.get()) is not None:
            yield event
        self._events.put(None)  # for who iterates again
        self._future.result()

    def cancel(self) -> None:
        """End the request: a waiting one now, a running one before the next step. It finishes as `cancelled`."""
        self._cancel(self)

    def result(self, timeout: float | None = None) -> Generation:
        """Wait for the end. Raises NemodiffError if the request failed, TimeoutError after `timeout` seconds."""
        return self._future.result(timeout).generation

    @property
    def done(self) -> bool:
        """Whether the request has ended, in whatever way."""
        return self._future.done()

    def deliver(self, events: list[Event]) -> None:
        """Hand events to the listener, or keep them for who iterates; the scheduler's thread calls this."""
        if self._listener is not None:
            if events:
                try:
                    self._listener(events)
                except Exception as error:
                    what = f"{type(error).__name__}: {first_line(error)}"
                    raise EngineError(f"the request's listener failed ({what}); mend it, the engine goes on") from error
            return
        for event in events:
            self._events.put(event)

    def end(self, outcome: Finished | NemodiffError) -> None:
        """The request is over: whoever waits for it goes on. The scheduler's thread calls this, once."""
        if isinstance(outcome, Finished):
            self._future.set_result(outcome)
        else:
            self._future.set_exception(outcome)
            if self._listener is not None:
                with contextlib.suppress(Exception):  # nothing is left to be done about one, and other requests run
                    self._listener(outcome)
        self._listener = None  # which may hold this handle, so that both would be garbage in a cycle
        self._events.put(None)
