"""The thread that decodes: it gives free rows to the requests that wait, and alone touches sequences and cache."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import threading
import time
from collections.abc import Sequence as Items

from ...contract import PAGE, counted
from ...errors import BusyError, EngineError, NemodiffError, first_line
from ..batching.batch import Batch
from ..batching.slot import Counts
from ..events.events import Event, Finished
from ..loading import LoadedEngine
from ..requests.sequence import Sequence
from .handle import Handle, Listener
from .statistics import Ended, Statistics

_SMALL = 256  # slots per row that may stay allocated for nothing


class Worker:
    """Decodes the requests that are added, until it is closed.

    A forward runs without the lock, so that requests may come and go meanwhile. `_start`, `_drop_cancelled`, `_finish`,
    `_rest` and `_give_back` are called with it, so a listener hears of an end while it is held.

    Args:
        engine: from `load`.
        rows: requests at a time.
        waiting: requests that may wait for a row.
        kept: of `Batch`.
        prefill_tokens: of `Batch`.
    """

    def __init__(self, engine: LoadedEngine, rows: int, waiting: int, kept: int | None, prefill_tokens: int) -> None:
        self._engine = engine
        self._rows = rows
        self._most_waiting = waiting
        self._kept = kept
        self._prefill_tokens = prefill_tokens
        self._numbers = itertools.count()
        self._changed = threading.Condition()  # with the lock of all below; it may be taken twice
        self._waiting: collections.deque[Handle] = collections.deque()
        self._running: dict[Sequence, Handle] = {}
        self._cancelled: list[Handle] = []
        self.closed = False  # for good
        self._batch: Batch | None = None
        self._past = Counts()  # of batches that were given back
        self._ended = Ended()
        self._prompt_tokens = 0
        self._thread = threading.Thread(target=self._work, name="nemodiff-scheduler", daemon=True)
        self._thread.start()

    def add(self, sequences: Items[Sequence], listeners: Items[Listener | None], *, steps: bool) -> list[Handle]:
        """Queue requests side by side, all of them or none. Raises BusyError."""
        with self._changed:
            self.refuse_if_busy(len(sequences))
            handles = [
                Handle(next(self._numbers), sequence, self.cancel, steps=steps, listener=listener)
                for sequence, listener in zip(sequences, listeners, strict=True)
            ]
            self._waiting.extend(handles)
            self._changed.notify_all()
        return handles

    def refuse_if_busy(self, count: int) -> None:
        """Raise BusyError unless there is room for `count` further requests."""
        if self.closed:
            raise BusyError("the scheduler is closed; give the request to a new one")
        present = len(self._waiting) + len(self._running)  # a free row is about to be filled, so it counts as room
        if present + count > self._most_waiting + self._rows:
            further = f", and {count} more are asked for" if count > 1 else ""
            raise BusyError(
                f"{counted(present, 'request')} running or waiting{further}, allowed: {self._rows} and "
                f"{self._most_waiting}; try again later, or make the scheduler with more rows or a longer queue"
            )

    def cancel(self, handle: Handle) -> None:
        """End a request: a waiting one now, a running one before the next step."""
        with self._changed:
            self._cancelled.append(handle)
            self._wake()

    def close(self, *, drain: bool) -> None:
        """See `Scheduler.close`."""
        with self._changed:
            self.closed = True
            if not drain:
                self._cancelled += [*self._waiting, *self._running.values()]
            self._wake()
        if threading.current_thread() is not self._thread:  # as it is where a listener closes
            self._thread.join()

    @property
    def statistics(self) -> Statistics:
        """What the scheduler does and has done."""
        with self._changed:
            batch = self._batch
            counts = self._counts()
            prefixes = batch.prefixes if batch is not None else None
            capacity = (self._rows + (self._kept or 0)) * self._engine.info.build.max_seq_len
            slots = sum(sequence.length for sequence in self._running)
            kept_prefixes, kept_slots = (prefixes.count, prefixes.tokens) if prefixes is not None else (0, 0)
            if (pages := self._engine.backend.pages) is not None:
                capacity = pages.slots
                kept_prefixes, kept_slots = pages.spare_rows, pages.spare * PAGE
                slots = capacity - pages.free * PAGE - kept_slots
            return Statistics(
                rows=self._rows,
                running=len(self._running),
                waiting=len(self._waiting),
                capacity=capacity,
                slots=slots,
                kept_prefixes=kept_prefixes,
                kept_slots=kept_slots,
                **self._ended.ends,
                prompt_tokens=self._prompt_tokens,
                reused_tokens=counts.reused,
                emitted_tokens=self._ended.emitted + sum(len(sequence.tokens) for sequence in self._running),
                nfe=dict(self._ended.nfe),
                steps=counts.steps,
                forwards=counts.forwards,
                computed_tokens=counts.tokens,
                padding_tokens=counts.padding,
                preempted=counts.preempted,
                rebuilt_tokens=counts.rebuilt,
            )

    def _wake(self) -> None:
        """Tell the worker of what has changed, wherever it waits."""
        self._changed.notify_all()
        if self._batch is not None:
            self._batch.wake()

    def _work(self) -> None:
        while True:
            try:
                if not self._take_in():
                    break
                self._step()
            except Exception as error:  # whatever a backend raises: nobody may be left waiting for an answer
                self._abandon(error)
        with self._changed:
            self._give_back()

    def _take_in(self) -> bool:
        """Wait for work, drop what was cancelled and fill free rows; False once closed and empty."""
        with self._changed:
            while True:
                self._drop_cancelled()
                while self._waiting and len(self._running) < self._rows:
                    self._start(self._waiting.popleft())
                if self._running:
                    return True
                if self.closed:
                    return False
                self._rest()
                self._changed.wait()

    def _start(self, handle: Handle) -> None:
        self._running[handle.sequence] = handle
        self._prompt_tokens += len(handle.sequence.prompt)
        if self._batch is None:
            self._batch = Batch(
                self._engine.backend,
                self._rows,
                cost=self._engine.cost,
                kept=self._kept,
                prefill_tokens=self._prefill_tokens,
                interrupted=lambda: bool(self._cancelled),
            )
        self._batch.add(handle.sequence)

    def _drop_cancelled(self) -> None:
        for handle in self._cancelled:
            sequence = handle.sequence
            if sequence in self._running and self._batch is not None:
                self._batch.remove(sequence)
            elif handle in self._waiting:
                self._waiting.remove(handle)
                sequence.started = time.perf_counter()
            else:
                continue  # it has ended already
            sequence.finish = "cancelled"
            sequence.ended = time.perf_counter()
            self._finish(handle, [])
        self._cancelled.clear()

    def _step(self) -> None:
        assert self._batch is not None
        untold = list[tuple[Handle, Exception]]()
        for result in self._batch.step():
            handle = self._running[result.sequence]
            if result.error is not None:
                self._fail(handle, result.error)
                continue
            try:
                events = handle.reporter.passed(result)
                if not result.sequence.ended:
                    handle.deliver(events)
                    continue
            except Exception as error:  # which is no reason for the others to fail
                untold.append((handle, error))
                continue
            with self._changed:
                self._finish(handle, events)
        for handle, problem in untold:
            if not handle.sequence.ended:
                self._batch.remove(handle.sequence)
            self._fail(handle, problem)

    def _finish(self, handle: Handle, last: list[Event]) -> None:
        """Count a request that has ended and say so, together with what its last pass gave."""
        sequence = handle.sequence
        try:
            events = last + handle.reporter.finished(self._engine)
            handle.deliver(events)
        except Exception as error:  # else it would wait for ever, as it does not run any more
            self._fail(handle, error)
            return
        self._running.pop(sequence, None)
        self._ended.count(sequence, "cancelled" if sequence.finish == "cancelled" else "finished")
        assert isinstance(events[-1], Finished)
        handle.end(events[-1])

    def _fail(self, handle: Handle, error: Exception) -> None:
        with self._changed:
            self._running.pop(handle.sequence, None)
            self._ended.count(handle.sequence, "failed")
        handle.end(error if isinstance(error, NemodiffError) else _one_line(error))

    def _abandon(self, error: Exception) -> None:
        """Fail all that run, and give the cache back; those that wait get a new one."""
        with self._changed:
            self._give_back()
        for handle in list(self._running.values()):
            self._fail(handle, error)

    def _rest(self) -> None:
        """Give a cache back that nobody needs: nothing is kept in it, or it has grown far beyond what is kept."""
        batch = self._batch
        if batch is not None and (batch.prefixes is None or batch.reach > max(_SMALL, 2 * batch.prefixes.longest)):
            self._give_back()

    def _give_back(self) -> None:
        if (batch := self._batch) is not None:
            self._past = self._counts()
            self._batch = None
            with contextlib.suppress(Exception):  # a broken engine may refuse that, too
                batch.close()

    def _counts(self) -> Counts:
        """Of all batches so far."""
        if self._batch is None:
            return self._past
        now = dataclasses.asdict(self._batch.counts)
        return Counts(**{name: value + now[name] for name, value in dataclasses.asdict(self._past).items()})


def _one_line(error: Exception) -> EngineError:
    return EngineError(f"the engine failed ({first_line(error)}); the request may be sent again")
