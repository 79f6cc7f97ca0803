"""Rows of a cache: which sequence has which, and where a new one finds the beginning of its prompt."""

from __future__ import annotations

import time
from typing import NamedTuple

from ...errors import NemodiffError
from ..engines.engine import Cache
from ..engines.passes import Pass
from ..modes import LOOPS
from ..modes.scoring import loop_of
from ..planning.pass_costs import Load, PassCosts
from .prefix_cache import SHORTEST, PrefixCache, common
from .slot import Counts, Slot


class Found(NamedTuple):
    """A row that holds the beginning of a prompt."""

    row: int
    length: int


class Rows:
    """What rows of both kinds of cache have in common; see `neighbours.py` and `paged.py`."""

    def __init__(self, cache: Cache, prefixes: PrefixCache | None, prefill_tokens: int, cost: PassCosts | None) -> None:
        self.slots: list[Slot] = []
        self.reach = 0  # slots that a row has been grown to
        self.counts = Counts()
        self.load = Load()
        self._cache = cache
        self._prefixes = prefixes
        self._prefill_tokens = prefill_tokens
        self._cost = cost
        self._clock = time.perf_counter if cost is None else cost.clock

    def find(self, slot: Slot) -> Found:
        """The row that holds most of a prompt, kept or running; of length 0 if a copy is not worth it."""
        assert self._prefixes is not None
        ids = slot.sequence.keys[: slot.sequence.reusable]
        best = Found(*self._prefixes.find(ids))
        for other in self.slots:
            if other is not slot and (length := common(other.held, ids)) > best.length:
                best = Found(other.row, length)
        return best if best.length >= SHORTEST else Found(0, 0)

    def begin(self, slot: Slot, ahead: list[Slot]) -> bool:
        """Start a slot's loop after what can be copied; False if a row ahead is about to have more of its prompt."""
        sequence = slot.sequence
        if self._prefixes is not None:
            ids = sequence.keys[: sequence.reusable]
            found = self.find(slot)
            if any(common(other.sequence.keys, ids) >= found.length + SHORTEST for other in ahead):
                return False
            while found.length and not self.copy(found, slot.row):  # it is known to be gone now
                found = self.find(slot)
            if found.length:
                sequence.length = sequence.reused = slot.reach = found.length
                self.counts.reused += found.length
        slot.loop = loop_of(sequence, LOOPS[sequence.settings.mode])
        first = next(slot.loop)
        try:
            slot.pass_ = sequence.for_engine(first)
        except NemodiffError as error:
            slot.pass_ = first
            slot.failure = error
        return True

    def copy(self, found: Found, row: int) -> bool:
        """Let a row begin as another one does; False if that is gone, and found no more."""
        self._cache.move(found.row, row, found.length)
        return True

    def count(self, passes: list[Pass], seconds: float | None, computed: int | None = None) -> None:
        """Take note of a forward that has ended.

        Its seconds are None where they are not known. `computed` are its tokens with what was computed for nobody;
        None: all passes were padded to the longest.
        """
        tokens = longest = 0
        prefills = False
        for p in passes:
            size = p.ids.size
            tokens += size
            if size > longest:
                longest = size
            prefills = prefills or p.kind == "prefill"
        if computed is None:
            computed = longest * len(passes)
        counts = self.counts
        counts.forwards += 1
        counts.tokens += tokens
        counts.padding += computed - tokens
        self.load.take(sum(slot.runs for slot in self.slots) if len(self.slots) > 1 else 1)
        if self._cost is None:
            return
        if seconds is None or prefills:
            self._cost.pass_over(seconds or 0.0)
        else:
            self._cost.learn(computed, seconds)
