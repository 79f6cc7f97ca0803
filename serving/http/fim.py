"""Filling a hole beside the scheduler's requests.

In: what stands before and behind. Out: `Filled`, and counts. A hole is filled in a thread of its own, one at a time,
over a cache row of its own; its passes and the scheduler's take turns, as the backends allow for caches in several
threads. The surprising fact: a search asks nobody whether it should go on, so the cache it is given answers for it.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

from ...engine_folder import EngineInfo
from ...errors import BusyError, RequestError
from ...runtime.editing.infill import Filled, infill
from ...runtime.engines.engine import PASS_KINDS, Cache, Engine, Pass, PassKind, Prediction
from ...runtime.loading import LoadedEngine
from ..metrics import FillCounts


class GoneError(Exception):
    """Nobody waits for the answer any more."""


class Fills:
    """Fills holes one after the other; `waiting` of them may wait."""

    def __init__(self, engine: LoadedEngine, waiting: int) -> None:
        self._engine, self._most = engine, waiting + 1
        self._worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="nemodiff-fim")
        self._lock = threading.Lock()
        self._present = self._tokens = 0
        self._ends = {"finished": 0, "cancelled": 0, "failed": 0}
        self._nfe: dict[PassKind, int] = dict.fromkeys(PASS_KINDS, 0)

    @property
    def counts(self) -> FillCounts:
        """What has been done by now."""
        with self._lock:
            return FillCounts(self._present, dict(self._ends), self._tokens, dict(self._nfe))

    def submit(
        self, before: str, behind: str, gone: threading.Event, **options: Any
    ) -> concurrent.futures.Future[Filled]:
        """Queue a hole; once `gone` is set, the future raises GoneError. Raises BusyError."""
        with self._lock:
            if self._present >= self._most:
                raise BusyError(f"{self._present} holes are filled or wait, allowed: {self._most}; try again later")
            self._present += 1
        watched = dataclasses.replace(self._engine, backend=_Watched(self._engine.backend, gone))

        def work() -> Filled:
            end: str | None = "failed"
            filled = None
            try:
                _check(gone)
                filled = infill(watched, before, behind, **options)
                end = "finished"
                return filled
            except GoneError:
                end = "cancelled"
                raise
            except RequestError:
                end = None  # refused
                raise
            finally:
                self._ended(end, filled)

        return self._worker.submit(work)

    def _ended(self, end: str | None, filled: Filled | None) -> None:
        with self._lock:
            self._present -= 1
            if end is not None:
                self._ends[end] += 1
            if filled is not None:
                self._tokens += sum(map(len, filled.token_ids))
                for kind, passes in filled.nfe.items():
                    self._nfe[kind] += passes

    def close(self) -> None:
        """Take no more."""
        self._worker.shutdown(wait=True, cancel_futures=True)


class _Watched:
    """An engine whose caches stop a request that nobody waits for."""

    def __init__(self, engine: Engine, gone: threading.Event) -> None:
        self._engine, self._gone, self.samples = engine, gone, engine.samples
        self.info: EngineInfo = engine.info

    def open(self, rows: int) -> Cache:
        return _WatchedCache(self._engine.open(rows), self._gone)


class _WatchedCache:
    def __init__(self, cache: Cache, gone: threading.Event) -> None:
        self._cache, self._gone, self.seconds = cache, gone, 0.0

    def forward(self, passes: Sequence[Pass], first: int = 0) -> list[Prediction]:
        _check(self._gone)
        return self._cache.forward(passes, first)

    def move(self, source: int, target: int, slots: int) -> None:
        self._cache.move(source, target, slots)

    def close(self) -> None:
        self._cache.close()


def _check(gone: threading.Event) -> None:
    if gone.is_set():
        raise GoneError
