"""Many requests at once: submitted from any thread, decoded together in one, each an iterable of its own events.

The oldest waiting request gets the next free row, every decoding row gets one pass in every step, and prompts share a
budget of tokens per step in order of arrival, so a request waits for nothing but the bounded work of those before it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

from ...contract import PREFILL_CHUNK
from ...engine_info import EngineInfo
from ...errors import NemodiffError, RequestError
from ..batching.batch import kept_prefixes
from ..events.events import Event
from ..loading import LoadedEngine, check_engine, check_rows
from ..requests.options import MOST_LOGPROBS, Options, make_options
from ..requests.prepare import Prompt, prepare_all
from ..requests.sequence import Sequence
from ..text.checks import check_list
from .handle import Handle, Listener
from .statistics import Statistics
from .worker import Worker

QUEUE = 64  # waiting requests, unless another number is given


def check_limits(
    info: EngineInfo, *, rows: object, waiting: object, prefill_tokens: object, max_logprobs: object
) -> None:
    """Refuse numbers that no `Scheduler` over such an engine takes. Raises RequestError."""
    if rows is not None:
        check_rows(info, rows)
    numbers = (("waiting", waiting, 1), ("prefill_tokens", prefill_tokens, 1), ("max_logprobs", max_logprobs, 0))
    for name, value, least in numbers:
        if not isinstance(value, int) or value < least:
            raise RequestError(f"{name} is {value!r}, allowed: {least} or more")


class Scheduler:
    """Decodes many requests at once; a context manager that lets running and waiting requests finish when it closes.

    Args:
        engine: from `load`.
        rows: requests at a time; None takes the engine's max_batch_size.
        waiting: requests that may wait for a row before `submit` refuses.
        prefix_reuse: copy the K/V of a prompt's beginning from an earlier prompt that begins alike.
        prefill_tokens: prompt tokens computed in one step; fewer let a long prompt delay running requests less.
        max_logprobs: likeliest tokens that a request may ask for, which are kept until its answer is sent.

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
        max_logprobs: int = MOST_LOGPROBS,
    ) -> None:
        check_engine(engine)
        self._rows = engine.info.build.max_batch_size if rows is None else rows
        check_limits(engine.info, rows=rows, waiting=waiting, prefill_tokens=prefill_tokens, max_logprobs=max_logprobs)
        if self._rows > 1:
            engine.cost.curve  # noqa: B018  (measured before the first request, not in the middle of it)
        self._engine = engine
        self._most_waiting = waiting
        self._prefill_tokens = prefill_tokens
        self._max_logprobs = max_logprobs
        kept = kept_prefixes(engine.backend) if prefix_reuse else None
        self._worker = Worker(engine, self._rows, waiting, kept, prefill_tokens)

    def submit(
        self, prompt: Prompt, *, steps: bool = False, listener: Listener | None = None, **options: Any
    ) -> Handle:
        """Queue a request; any thread may.

        Args:
            prompt: as in `generate`.
            steps: whether the events report every pass.
            listener: called in the worker's thread with events as they happen, or at last with the error of a request
                that failed; it must be quick, raise nothing, and wait for no other thread that uses the scheduler.
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
        check_list(requests, "requests", "prompts with their options")
        submitted = list(requests)
        for one in submitted:
            if not isinstance(one, (tuple, list)) or len(one) != 2 or not isinstance(one[1], Mapping):
                raise RequestError(f"a request is {one!r:.60}, allowed: a prompt and a mapping of its options")
        listeners: list[Listener | None] = [
            None if listener is None else functools.partial(listener, index) for index in range(len(submitted))
        ]
        return self._queue(submitted, steps, listeners)

    def check_count(self, count: int) -> None:
        """Raise RequestError for more requests than can ever run and wait at a time."""
        most = self._rows + self._most_waiting
        if count > most:
            raise RequestError(
                f"{count} answers are asked for at once, allowed: {most} ({self._rows} that run and "
                f"{self._most_waiting} that wait); ask for fewer at a time"
            )

    @property
    def statistics(self) -> Statistics:
        """What the scheduler does and has done."""
        return self._worker.statistics

    @property
    def closed(self) -> bool:
        """Whether no more requests are taken."""
        return self._worker.closed

    def close(self, *, drain: bool = True) -> None:
        """Take no more requests and wait for the worker: until all have finished, or with drain=False cancelled.

        A listener, which is in the worker's thread, does not wait.
        """
        self._worker.close(drain=drain)

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
        self.check_count(len(requests))
        self._worker.refuse_if_busy(len(requests))
        prepared = prepare_all(self._engine, ((prompt, self._allowed(options)) for prompt, options in requests))
        return self._worker.add([self._in_small_chunks(sequence) for sequence in prepared], listeners, steps=steps)

    def _allowed(self, options: Mapping[str, Any]) -> Options:
        """A request's options. Raises RequestError."""
        made = make_options(options)
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(made, name)
            if asked is not None and asked > self._max_logprobs:
                raise RequestError(
                    f"{name} is {asked}, allowed: at most {self._max_logprobs} on this server; ask for "
                    "fewer, or raise max_logprobs"
                )
        return made

    def _in_small_chunks(self, sequence: Sequence) -> Sequence:
        """The sequence with its prompt read in passes that a step has room for."""
        chunk = min(sequence.settings.prefill_chunk, self._prefill_tokens)
        sequence.settings = dataclasses.replace(sequence.settings, prefill_chunk=chunk)
        return sequence
