"""Filling holes beside the scheduler's requests.

One thread fills one hole at a time, over a cache row of its own. Its passes and the scheduler's take turns, as the
engines allow for caches in several threads.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

from ...errors import BusyError, RequestError
from ...runtime.editing.infill import Filled, infill
from ...runtime.engines.engine import Cache, Engine
from ...runtime.engines.passes import PASS_KINDS, Pass, PassKind, Prediction
from ...runtime.loading import LoadedEngine
from ..metrics import InfillStats
from .request_group import DrainingError
from .threads import without_stop_iteration


class CancelledError(Exception):
    """The client no longer waits for the answer, or the queue has been closed."""


class InfillQueue:
    """Fills holes one after the other.

    Args:
        engine: from `load`.
        waiting: holes that may wait while one is being filled.
    """

    def __init__(self, engine: LoadedEngine, waiting: int) -> None:
        self._engine = engine
        self._capacity = waiting + 1
        self._worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="nemodiff-infill")
        self._lock = threading.Lock()
        self.closed = False  # for good, and no hole is filled any more
        self._present = 0
        self._tokens = 0
        self._ends = {"finished": 0, "cancelled": 0, "failed": 0}
        self._nfe: dict[PassKind, int] = dict.fromkeys(PASS_KINDS, 0)

    @property
    def stats(self) -> InfillStats:
        """What has been done so far."""
        with self._lock:
            return InfillStats(self._present, dict(self._ends), self._tokens, dict(self._nfe))

    def submit(
        self, prefix: str, suffix: str, cancelled: threading.Event, **options: Any
    ) -> concurrent.futures.Future[Filled]:
        """Queue a hole. Raises BusyError and DrainingError.

        Once `cancelled` is set, the future raises CancelledError; a hole that waits gives its place up at once if the
        future is cancelled too.
        """
        with self._lock:
            if self.closed:
                raise DrainingError
            if self._present >= self._capacity:
                raise BusyError(f"{self._present} holes are filled or wait, allowed: {self._capacity}; try again later")
            future = self._worker.submit(self._fill, prefix, suffix, cancelled, options)
            self._present += 1
        future.add_done_callback(self._count)
        return future

    def close(self) -> None:
        """Drop the holes that wait, and the one that is being filled before its next pass."""
        with self._lock:
            self.closed = True
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _fill(self, prefix: str, suffix: str, cancelled: threading.Event, options: dict[str, Any]) -> Filled:
        def check() -> None:
            if cancelled.is_set() or self.closed:
                raise CancelledError

        engine = dataclasses.replace(self._engine, backend=cast(Engine, _Checking(self._engine.backend, check)))
        check()
        return without_stop_iteration(lambda: infill(engine, prefix, suffix, **options))

    def _count(self, future: concurrent.futures.Future[Filled]) -> None:
        """Count a hole that has ended, in whatever way; one that was cancelled while it waited has never begun."""
        error = CancelledError() if future.cancelled() else future.exception()
        with self._lock:
            self._present -= 1
            if isinstance(error, CancelledError):
                self._ends["cancelled"] += 1
            elif error is None:
                filled = future.result()
                self._ends["finished"] += 1
                self._tokens += sum(map(len, filled.token_ids))
                for kind, passes in filled.nfe.items():
                    self._nfe[kind] += passes
            elif not isinstance(error, RequestError):  # a refused request is counted by its HTTP status instead
                self._ends["failed"] += 1


class _Checking:
    """An engine, or one of its caches, that checks before each pass: a search has no other way to be stopped."""

    def __init__(self, checked: Any, check: Callable[[], None]) -> None:
        self._checked = checked
        self._check = check

    def open(self, rows: int) -> Cache:
        return cast(Cache, _Checking(self._checked.open(rows), self._check))

    def forward(self, passes: Sequence[Pass], first: int = 0) -> list[Prediction]:
        self._check()
        predictions: list[Prediction] = self._checked.forward(passes, first)
        return predictions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checked, name)
