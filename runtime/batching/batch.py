"""Requests that share a cache: who joins, whose pass has given what, who goes on and who leaves.

Which rows share a forward depends on the engine: `neighbours.py` is for one whose rows have one length and lie side by
side, `paged.py` for one whose rows have pages of a common memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from ...contract import PREFILL_CHUNK
from ...errors import NemodiffError
from ..engines.drafter import adapted
from ..engines.engine import Engine
from ..engines.passes import Pass, Prediction
from ..planning.pass_costs import PassCosts
from ..requests.outcome import PassOutcome
from ..requests.sequence import Sequence
from .neighbours import NeighbouringRows
from .paged import PagedRows
from .prefix_cache import PrefixCache
from .slot import Counts, PassResult, Slot

KEPT_PREFIXES = 2  # rows of K/V of finished prompts; each takes the memory of a running row
KEPT_IN_PAGES = 32  # the same where they share pages, and are given up when pages run out


def kept_prefixes(backend: Engine) -> int:
    """How many prefixes an engine keeps, unless another number is given."""
    return KEPT_PREFIXES if backend.pages is None else KEPT_IN_PAGES


class Batch:
    """Up to `rows` sequences over one cache.

    Args:
        backend: the engine.
        rows: sequences at a time.
        cost: learns from every forward, and decides where neighbouring rows are split; None does neither.
        kept: rows for K/V of finished prompts; None switches the reuse of prefixes off, 0 reuses running rows only.
        prefill_tokens: prompt tokens of one step, over all rows; one pass always runs.
        interrupted: whether a step that waits for memory shall end; `wake` makes it look.
    """

    def __init__(
        self,
        backend: Engine,
        rows: int,
        *,
        cost: PassCosts | None = None,
        kept: int | None = None,
        prefill_tokens: int = PREFILL_CHUNK,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.rows = rows
        self.prefixes = None if kept is None else PrefixCache(rows, kept)
        cache: Any = backend.open(rows + (kept or 0))  # a PagedCache, if the engine has pages
        self._cache = cache
        self._rows: NeighbouringRows | PagedRows
        self._pages = backend.pages
        self._adapts = backend.info.has_adapter
        if self._pages is None:
            self._rows = NeighbouringRows(cache, self.prefixes, prefill_tokens, cost)
        else:
            self._rows = PagedRows(cache, self.prefixes, prefill_tokens, cost, rows, self._pages, interrupted)
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._rows.slots)

    @property
    def counts(self) -> Counts:
        """What it has done so far."""
        return self._rows.counts

    @property
    def reach(self) -> int:
        """Slots that a row has been grown to, where rows have one length."""
        return self._rows.reach

    @property
    def cache_slots(self) -> int:
        """Cache slots that hold valid K/V of running sequences."""
        return sum(slot.sequence.length for slot in self._rows.slots)

    def add(self, sequence: Sequence) -> None:
        """Give a sequence a row; its first pass is in one of the next steps."""
        assert len(self) < self.rows
        sequence.started = time.perf_counter()
        sequence.load = self._rows.load
        self._arrivals += 1
        self._rows.add(Slot(sequence, self._arrivals))

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out between two steps, wherever it is."""
        (slot,) = (slot for slot in self._rows.slots if slot.sequence is sequence)
        if slot.loop is not None:
            slot.loop.close()
        self._rows.leave(slot)

    def wake(self) -> None:
        """Let a step that waits for memory look whether it is `interrupted`; any thread may."""
        if self._pages is not None:
            self._pages.wake()

    def close(self) -> None:
        """Give the cache back."""
        self._cache.close()

    def step(self) -> Iterator[PassResult]:
        """One pass of every running sequence, prefill within its budget; exhaust it before anything else.

        On an engine with pages, passes wait where a forward has too many tokens or the memory is short, and the next
        forward runs while the results are looked at. Where others hold the memory for all of them, the step waits, or
        raises EngineError if only this thread could go on with those. An error of one sequence's loop comes in its
        `PassResult`, an error of the engine is raised.
        """
        self.counts.steps += 1
        for forward in self._rows.forwards():
            slots, passes, predictions, began, seconds, rows = forward
            ends = list(map(self._advance, slots, passes, predictions))
            failure: Exception | None = None
            try:
                self._rows.go_on()
            except Exception as error:  # what has been computed is delivered all the same
                failure = error
            for slot, pass_, prediction, end in zip(slots, passes, predictions, ends, strict=True):
                sequence = slot.sequence
                yield PassResult(sequence, pass_, prediction, sequence.outcome, began, seconds, rows, end)
            if failure is not None:
                raise failure

    def _advance(self, slot: Slot, pass_: Pass, prediction: Prediction) -> NemodiffError | None:
        """Let a sequence go on to its next pass; returns why it cannot, if it cannot."""
        assert slot.loop is not None
        sequence = slot.sequence
        sequence.outcome = PassOutcome()
        sequence.follower = None
        sequence.nfe[pass_.kind] += 1
        if self._adapts:
            sequence.adapter_tokens += adapted(pass_)
        slot.reach = max(slot.reach, pass_.write_at + pass_.ids.size)
        try:
            if slot.failure is not None:
                raise slot.failure
            slot.pass_ = sequence.for_engine(slot.loop.send(prediction))
            sequence.begun = None
        except (StopIteration, NemodiffError) as end:
            slot.ended = True
            sequence.ended = time.perf_counter()
            return end if isinstance(end, NemodiffError) else None
        return None
