"""The thread that answers requests: it sends what the scheduler reports and cancels requests whose client has gone.

A stream's first text goes out at once and later text at most every `stream_interval_ms`, because a response costs as
much as a small model's token.
"""

from __future__ import annotations

import collections
import dataclasses
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from ...errors import NemodiffError
from ...runtime.events.events import Event, Finished, Text
from ...runtime.scheduler.handle import Handle
from ...runtime.scheduler.scheduler import Scheduler
from ..metrics import ServerStats
from .metrics import TritonMetrics
from .parameters import TritonRequest
from .response_writer import ResponseWriter

_CANCELLATION_INTERVAL = 0.01  # seconds between two looks for clients that have gone
_CANCELLATION_SHARE = 0.1  # of the time that these looks may take
_METRICS_INTERVAL = 0.2  # seconds between two updates of the counters and gauges


@dataclasses.dataclass(eq=False)
class ActiveRequest:
    """A request that has not ended.

    outcomes: what the scheduler has reported and the responder has not read. wakes: whether the next outcome is to wake
    the responder. text: what has not been sent. next_send: when a stream's next text may be sent; 0 before the first.
    The scheduler's thread touches `outcomes` and `wakes` alone.
    """

    sender: Any
    request: TritonRequest
    handle: Handle | None = None
    outcomes: collections.deque[list[Event] | NemodiffError] = dataclasses.field(default_factory=collections.deque)
    wakes: bool = False
    text: str = ""
    next_send: float = 0.0

    def __post_init__(self) -> None:
        self.wakes = self.request.stream

    def take_text(self) -> str:
        """The text that has not been sent, after the prompt if that is echoed and nothing has been sent yet."""
        echo = self.request.prompt if self.request.echo and not self.next_send else ""
        text = echo + self.text
        self.text = ""
        return text


class Responder:
    """Answers all requests of a scheduler from one thread.

    Args:
        scheduler: its statistics become metrics.
        writer: sends the responses.
        metrics: of the server.
        interval: least seconds between two texts of a stream.
    """

    def __init__(self, scheduler: Scheduler, writer: ResponseWriter, metrics: TritonMetrics, interval: float) -> None:
        self._scheduler = scheduler
        self._writer = writer
        self._metrics = metrics
        self._interval = interval
        self._active: set[ActiveRequest] = set()
        self._paced: set[ActiveRequest] = set()  # streams to be looked at when their next text may be sent
        self._woken: queue.SimpleQueue[ActiveRequest | None] = queue.SimpleQueue()
        self._update_metrics()
        self._thread = threading.Thread(target=self._run, name="nemodiff-responder", daemon=True)
        self._thread.start()

    def is_alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Answer what has been reported so far, end the thread and take the metrics off the server's port."""
        self._woken.put(None)
        self._thread.join()
        self._metrics.close()

    def add(self, sender: Any, request: TritonRequest) -> ActiveRequest:
        """Begin to follow a request; whoever submits it sets its handle."""
        active = ActiveRequest(sender, request)
        self._active.add(active)
        return active

    def discard(self, active: ActiveRequest) -> None:
        """Stop following a request."""
        self._active.discard(active)
        self._paced.discard(active)

    def listen(self, active: ActiveRequest, outcome: list[Event] | NemodiffError) -> None:
        """In the scheduler's thread: keep what has happened, and wake the responder only if it can do something."""
        active.outcomes.append(outcome)
        if active.wakes or isinstance(outcome, NemodiffError) or isinstance(outcome[-1], Finished):
            active.wakes = False
            self._woken.put(active)

    def _run(self) -> None:
        cancelled_at = time.perf_counter()
        updated_at = cancelled_at
        pause = _CANCELLATION_INTERVAL
        while True:
            wake_at = min([cancelled_at + pause, *(active.next_send for active in self._paced)])
            try:
                woken = self._woken.get(timeout=max(0.0, wake_at - time.perf_counter()))
                if woken is None:
                    return
                self._answer(woken)
            except queue.Empty:
                pass
            now = time.perf_counter()
            for active in [active for active in self._paced if active.next_send <= now]:
                self._answer(active)
            now = time.perf_counter()
            if now > cancelled_at + pause:
                self._attempt(self._cancel_abandoned)
                cancelled_at = time.perf_counter()
                pause = max(_CANCELLATION_INTERVAL, (cancelled_at - now) / _CANCELLATION_SHARE)
                if cancelled_at > updated_at + _METRICS_INTERVAL:
                    self._attempt(self._update_metrics)
                    updated_at = cancelled_at

    def _attempt(self, action: Callable[..., None], *arguments: Any) -> None:
        """Do something by way of the server. Where that fails, as for want of shared memory, all else goes on."""
        try:
            action(*arguments)
        except Exception as error:
            self._writer.report(error)

    def _update_metrics(self) -> None:
        self._metrics.update(ServerStats(self._scheduler.statistics, self._writer.refused))

    def _cancel_abandoned(self) -> None:
        """Cancel requests whose client has gone."""
        for active in list(self._active):
            if active.handle is not None and active.sender.is_cancelled():
                active.handle.cancel()

    def _answer(self, active: ActiveRequest) -> None:
        """Read what has been reported of a request; send its end, or a stream's text if that is due."""
        try:
            while True:
                while active.outcomes:
                    if self._read(active, active.outcomes.popleft()):
                        return
                if active not in self._active:  # woken once more after its end
                    return
                if active.request.stream and active.next_send > time.perf_counter():
                    self._paced.add(active)
                    return
                if active.request.stream and active.text:
                    self._send_text(active)
                    continue
                self._paced.discard(active)
                active.wakes = active.request.stream
                if not active.outcomes:  # else one came just before `wakes` was set, and nobody has been woken
                    return
        except Exception as error:
            self.discard(active)
            self._attempt(self._writer.send_error, active.sender, error)

    def _read(self, active: ActiveRequest, outcome: list[Event] | NemodiffError) -> bool:
        """Keep a request's new text; at its end answer it and return True. Raises NemodiffError if it has failed."""
        if isinstance(outcome, NemodiffError):
            if active.request.stream and active.text:
                self._send_text(active)
            raise outcome
        for event in outcome:
            if isinstance(event, Text):
                active.text += event.text
            elif isinstance(event, Finished):
                self._finish(active, event)
                return True
        return False

    def _send_text(self, active: ActiveRequest) -> None:
        self._writer.send_text(active.sender, active.take_text())
        active.next_send = time.perf_counter() + self._interval

    def _finish(self, active: ActiveRequest, event: Finished) -> None:
        self.discard(active)
        if event.generation.finish_reason == "cancelled":
            self._writer.send_cancelled(active.sender)
        else:
            self._writer.send_final(active.sender, active.take_text(), event)
        # After the answer, since each value is a call to the server's process.
        self._attempt(self._metrics.observe, event)
