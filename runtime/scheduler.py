"""Many requests at once: submitted from any thread, decoded together in one, each an iterable of its own events.

The oldest waiting request gets the next free row, every decoding row gets one pass in every step, and prompts share a
budget of tokens per step in order of arrival, so a request waits for nothing but the bounded work of those before it.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

from ..contract import PREFILL_CHUNK
from ..errors import BusyError, EngineError, NemodiffError, RequestError, first_line
from .batching.batch import Batch, kept_prefixes
from .batching.slot import Counts
from .engines.engine import PASS_KINDS, PassKind
from .engines.pages import PAGE
from .events.events import Event, Finished
from .handle import Handle, Listener
from .loading import LoadedEngine, check_rows
from .requests.options import make_options
from .requests.prepare import Prompt, prepare
from .requests.sequence import Sequence

QUEUE = 64  # waiting requests, unless another number is given
_SMALL = 256  # slots per row that may stay allocated for nothing


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What a scheduler does and has done; taken at one moment, while a step may be under way.

    running, waiting: requests now. slots, kept_slots: cache slots in use by them and by kept prefixes, of `capacity`;
    where rows have pages, those of all users of the engine. The rest count from the start: requests by their end;
    tokens of prompts, of these reused, and emitted; passes of ended requests by kind; steps, forwards, tokens computed
    in them, padding beside those, how often a request had to give its pages to an older one, and the tokens computed
    again for it.
    """

    rows: int
    running: int
    waiting: int
    capacity: int
    slots: int
    kept_prefixes: int
    kept_slots: int
    finished: int
    cancelled: int
    failed: int
    prompt_tokens: int
    reused_tokens: int
    emitted_tokens: int
    nfe: dict[PassKind, int]
    steps: int
    forwards: int
    computed_tokens: int
    padding_tokens: int
    preempted: int
    rebuilt_tokens: int


class Scheduler:
    """Decodes many requests at once; a context manager that lets running and waiting requests finish when it closes.

    Args:
        engine: from `load`.
        rows: requests at a time; None takes the engine's max_batch_size.
        waiting: requests that may wait for a row before `submit` refuses.
        prefix_reuse: copy the K/V of a prompt's beginning from an earlier prompt that begins alike.
        prefill_tokens: prompt tokens computed in one step; fewer let a long prompt delay running requests less.

    Raises:
        RequestError: a number is out of range.
    """

    def __init__(
        self,
        engine: LoadedEngine,
        *,
        rows: int | None = None,
        waiting: int = QUEUE,
        prefix_reuse: bool = True,
        prefill_tokens: int = PREFILL_CHUNK,
    ) -> None:
        self._rows = engine.info.build.max_batch_size if rows is None else rows
        check_rows(engine, self._rows)
        for name, value in (("waiting", waiting), ("prefill_tokens", prefill_tokens)):
            if not isinstance(value, int) or value < 1:
                raise RequestError(f"{name} is {value!r}, allowed: 1 or more")
        if self._rows > 1:
            engine.cost.curve  # noqa: B018  (measured before the first request, not in the middle of it)
        self._engine = engine
        self._most_waiting = waiting
        self._kept = kept_prefixes(engine.backend) if prefix_reuse else None
        self._prefill_tokens = prefill_tokens
        self._numbers = itertools.count()
        self._changed = threading.Condition()  # over all below
        self._waiting: collections.deque[Handle] = collections.deque()
        self._running: dict[Sequence, Handle] = {}
        self._cancelled: list[Handle] = []
        self._closed = False
        self._batch: Batch | None = None
        self._past = Counts()  # of batches that were given back
        self._ends = {"finished": 0, "cancelled": 0, "failed": 0}
        self._prompt_tokens = 0
        self._emitted = 0
        self._nfe: dict[PassKind, int] = dict.fromkeys(PASS_KINDS, 0)
        self._worker = threading.Thread(target=self._work, name="nemodiff-scheduler", daemon=True)
        self._worker.start()

    def submit(
        self, prompt: Prompt, *, steps: bool = False, listener: Listener | None = None, **options: Any
    ) -> Handle:
        """Queue a request; any thread may.

        Args:
            prompt: as in `generate`.
            steps: whether the events report every pass.
            listener: called in the worker's thread with events as they happen, or at last with the error of a request
                that failed; it must be quick and raise nothing.
            options: fields of `Options`.

        Raises:
            RequestError: an option is out of range or the prompt does not fit.
            BusyError: too many requests wait already, or the scheduler is closed.
        """
        return self._queue([(prompt, options)], steps, [listener])[0]

    def submit_many(
        self,
        requests: Iterable[tuple[Prompt, Mapping[str, Any]]],
        *,
        steps: bool = False,
        listener: Callable[[int, list[Event] | NemodiffError], None] | None = None,
    ) -> list[Handle]:
        """Queue several requests side by side: all of them, or none.

        Args:
            requests: prompts with their options.
            steps: as in `submit`.
            listener: as in `submit`; it gets a request's place before each outcome.

        Raises:
            RequestError: as in `submit`, or more requests than can ever run and wait at a time.
            BusyError: as in `submit`.
        """
        submitted = list(requests)
        listeners: list[Listener | None] = [
            None if listener is None else functools.partial(listener, index) for index in range(len(submitted))
        ]
        return self._queue(submitted, steps, listeners)

    @property
    def statistics(self) -> Statistics:
        """What the scheduler does and has done."""
        with self._changed:
            batch = self._batch
            counts = self._counts()
            prefixes = batch.prefixes if batch is not None else None
            capacity = (self._rows + (self._kept or 0)) * self._engine.info.build.max_seq_len
            slots = sum(sequence.length for sequence in self._running)
            kept_slots = prefixes.tokens if prefixes is not None else 0
            if (pages := self._engine.backend.pages) is not None:
                capacity = pages.slots
                kept_slots = pages.spare * PAGE
                slots = capacity - pages.free * PAGE - kept_slots
            return Statistics(
                rows=self._rows,
                running=len(self._running),
                waiting=len(self._waiting),
                capacity=capacity,
                slots=slots,
                kept_prefixes=prefixes.count if prefixes is not None else 0,
                kept_slots=kept_slots,
                **self._ends,
                prompt_tokens=self._prompt_tokens,
                reused_tokens=counts.reused,
                emitted_tokens=self._emitted + sum(len(sequence.tokens) for sequence in self._running),
                nfe=dict(self._nfe),
                steps=counts.steps,
                forwards=counts.forwards,
                computed_tokens=counts.tokens,
                padding_tokens=counts.padding,
                preempted=counts.preempted,
                rebuilt_tokens=counts.rebuilt,
            )

    def close(self, *, drain: bool = True) -> None:
        """Take no more requests and wait for the worker: until all have finished, or with drain=False cancelled."""
        with self._changed:
            self._closed = True
            if not drain:
                self._cancelled += [*self._waiting, *self._running.values()]
            self._wake()
        self._worker.join()

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(drain=kind is None)

    def _queue(
        self,
        requests: list[tuple[Prompt, Mapping[str, Any]]],
        steps: bool,
        listeners: list[Listener | None],
    ) -> list[Handle]:
        """Queue all requests, or raise RequestError or BusyError before any is queued."""
        most = self._rows + self._most_waiting
        if len(requests) > most:
            raise RequestError(
                f"{len(requests)} answers are asked for at once, allowed: {most} ({self._rows} that run and "
                f"{self._most_waiting} that wait); ask for fewer at a time"
            )
        self._refuse_if_busy(len(requests))
        sequences = [self._prepare(prompt, options) for prompt, options in requests]
        with self._changed:
            self._refuse_if_busy(len(requests))
            handles = [
                Handle(next(self._numbers), sequence, self._cancel, steps=steps, listener=listener)
                for sequence, listener in zip(sequences, listeners, strict=True)
            ]
            self._waiting.extend(handles)
            self._changed.notify_all()
        return handles

    def _prepare(self, prompt: Prompt, options: Mapping[str, Any]) -> Sequence:
        sequence = prepare(self._engine, prompt, make_options(options))
        chunk = min(sequence.settings.prefill_chunk, self._prefill_tokens)
        sequence.settings = dataclasses.replace(sequence.settings, prefill_chunk=chunk)
        return sequence

    def _refuse_if_busy(self, count: int) -> None:
        """Raise BusyError unless there is room for `count` further requests."""
        if self._closed:
            raise BusyError("the scheduler is closed; give the request to a new one")
        present = len(self._waiting) + len(self._running)  # a free row is about to be filled, so it counts as room
        if present + count > self._most_waiting + self._rows:
            further = f", and {count} more are asked for" if count > 1 else ""
            raise BusyError(
                f"{present} requests run or wait{further}, allowed: {self._rows} and {self._most_waiting}; try again "
                "later, or make the scheduler with more rows or a longer queue"
            )

    def _cancel(self, handle: Handle) -> None:
        with self._changed:
            self._cancelled.append(handle)
            self._wake()

    def _wake(self) -> None:
        """Tell the worker of what has changed, wherever it waits."""
        self._changed.notify_all()
        if self._batch is not None:
            self._batch.wake()

    # --- the worker ---

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
                if self._closed:
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
            sequence.finish, sequence.ended = "cancelled", time.perf_counter()
            self._finish(handle)
        self._cancelled.clear()

    def _step(self) -> None:
        assert self._batch is not None
        for result in self._batch.step():
            handle = self._running[result.sequence]
            if result.error is not None:
                self._fail(handle, result.error)
                continue
            handle.deliver(handle.reporter.passed(result))
            if result.sequence.ended:
                with self._changed:
                    self._finish(handle)

    def _finish(self, handle: Handle) -> None:
        """Count a request that has ended and say so."""
        sequence = handle.sequence
        self._running.pop(sequence, None)
        self._ends["cancelled" if sequence.finish == "cancelled" else "finished"] += 1
        self._count(sequence)
        events = handle.reporter.finished(self._engine)
        handle.deliver(events)
        assert isinstance(events[-1], Finished)
        handle.end(events[-1])

    def _fail(self, handle: Handle, error: Exception) -> None:
        with self._changed:
            self._running.pop(handle.sequence, None)
            self._ends["failed"] += 1
            self._count(handle.sequence)
        handle.end(error if isinstance(error, NemodiffError) else _one_line(error))

    def _count(self, sequence: Sequence) -> None:
        self._emitted += len(sequence.tokens)
        for kind, passes in sequence.nfe.items():
            self._nfe[kind] += passes

    def _abandon(self, error: Exception) -> None:
        """Fail all that run, and the cache with them; those that wait get a new one."""
        with self._changed:
            self._past = self._counts()
            self._batch = None
        for handle in list(self._running.values()):
            self._fail(handle, error)

    def _rest(self) -> None:
        """Give a cache back that nobody needs: nothing is kept in it, or it has grown far beyond what is kept."""
        batch = self._batch
        if batch is not None and (batch.prefixes is None or batch.reach > max(_SMALL, 2 * batch.prefixes.longest)):
            self._give_back()

    def _give_back(self) -> None:
        if self._batch is not None:
            self._past = self._counts()
            self._batch.close()
            self._batch = None

    def _counts(self) -> Counts:
        """Of all batches so far."""
        if self._batch is None:
            return self._past
        now = dataclasses.asdict(self._batch.counts)
        return Counts(**{name: value + now[name] for name, value in dataclasses.asdict(self._past).items()})


def _one_line(error: Exception) -> EngineError:
    return EngineError(f"the engine failed ({first_line(error)}); the request may be sent again")
