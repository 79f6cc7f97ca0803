"""Rows that have pages of a common memory: rows of any mode and length share a forward, and none is ever moved.

A sequence begins when there are pages for its prompt, in order of arrival, and takes more as it grows. Where they run
out, kept prefixes go first; then the youngest sequence gives its pages up and computes what it had again once there is
room, by the same passes as a prompt. So the oldest always goes on. The next forward is started before anyone looks at
the results of the last one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from ...contract import PREFILL_CHUNK
from ..engines.engine import Flight, PagedCache, Pass, Prediction, causal
from ..engines.pages import Pages
from ..planning.pass_costs import PassCosts
from .prefix_cache import PrefixCache
from .rows import Found, Rows
from .slot import Counts, Forward, Slot, committed


class PagedRows(Rows):
    """Up to `rows` slots over the first rows of a cache; what runs now is a forward of some of them."""

    def __init__(
        self,
        cache: PagedCache,
        prefixes: PrefixCache | None,
        prefill_tokens: int,
        counts: Counts,
        cost: PassCosts | None,
        rows: int,
        pages: Pages,
        interrupted: Callable[[], bool],
    ) -> None:
        super().__init__(cache, prefixes, prefill_tokens, counts, cost)
        self._paged = cache
        self._pages = pages
        self._interrupted = interrupted
        self._free = list(range(rows - 1, -1, -1))
        self._turn = 0  # where to begin, if not all that decode fit in a forward
        self._running: tuple[Flight, list[tuple[Slot, Pass]], float] | None = None

    def add(self, slot: Slot) -> None:
        """Give a slot a row, which has no pages yet."""
        slot.row = self._free.pop()
        self.slots.append(slot)

    def leave(self, slot: Slot) -> None:
        """Free a slot's row; its K/V are kept if they are worth it."""
        slot.ended = True  # a forward that still runs is of no use to it
        self.slots.remove(slot)
        ids = slot.held
        if self._prefixes is not None and (target := self._prefixes.keep(ids)) is not None:
            self._paged.share(slot.row, target, len(ids))
            self._paged.set_spare(target)
        self._paged.free(slot.row)
        self._free.append(slot.row)

    def copy(self, found: Found, row: int) -> bool:
        """See `Rows`; a kept prefix may have been emptied for others."""
        shared = self._paged.share(found.row, row, found.length)
        if not shared and self._prefixes is not None:
            self._prefixes.forget(found.row)
        return shared > 0

    def forwards(self) -> Iterator[Forward]:
        """Wait for the forward that runs, or for one that is started now, or for pages that another cache holds."""
        freed = self._pages.freed
        if self._running is None:
            self.go_on()
        if self._running is None:
            if self.slots:
                self._pages.wait(freed, self._interrupted)
            return
        flight, work, began = self._running
        self._running = None
        predictions = flight.finish()
        passes = [pass_ for _, pass_ in work]
        self.count(passes, sum(p.ids.size for p in passes), flight.seconds)
        slots, served, results = list[Slot](), list[Pass](), list[Prediction]()
        for (slot, pass_), prediction in zip(work, predictions, strict=True):
            if slot.ended:
                continue
            if slot.built is None:
                slots.append(slot)
                served.append(pass_)
                results.append(prediction)
                continue
            slot.built += pass_.ids.size
            self.counts.rebuilt += pass_.ids.size
            if slot.built == slot.sequence.length:
                slot.built = None
        yield Forward(slots, served, results, began, flight.seconds, len(work))

    def go_on(self) -> None:
        """Let the rows that have ended go and start the next forward."""
        for slot in [slot for slot in self.slots if slot.ended]:
            self.leave(slot)
        work = self._scheduled()
        if not work:
            return
        began = time.perf_counter()
        flight = self._paged.launch([pass_ for _, pass_ in work], [slot.row for slot, _ in work])
        self._running = flight, work, began

    def _scheduled(self) -> list[tuple[Slot, Pass]]:
        """The passes of the next forward: all that decode, then prompts in order of arrival, each within its budget."""
        decoding = [s for s in self.slots if s.pass_ is not None and s.pass_.kind != "prefill" and s.built is None]
        for slot in self.by_arrival(decoding):
            if slot.reach:  # else an older one has taken its pages just now
                at = slot.next_pass.write_at
                self._reserve(slot, at, at + slot.size, may_take=True)
        prompts = self._prompts([slot for slot in self.slots if slot not in decoding])
        work = self._decoding([slot for slot in decoding if slot.reach])
        return work + [(slot, self._prompt_pass(slot)) for slot in prompts if slot.reach]

    def _decoding(self, ready: list[Slot]) -> list[tuple[Slot, Pass]]:
        """The rows that decode, or in turn as many as fit in a forward."""
        room = self._paged.most_tokens
        work: list[tuple[Slot, Pass]] = []
        start = self._turn % len(ready) if ready else 0
        for slot in ready[start:] + ready[:start]:
            if work and slot.size > room:
                self._turn = start + len(work)
                break
            work.append((slot, slot.next_pass))
            room -= slot.size
        return work

    def _prompts(self, slots: list[Slot]) -> list[Slot]:
        """Prompts, and rows that are computed again, for which there are pages, within the budget of tokens."""
        room = self._prefill_tokens
        ahead = list[Slot]()
        for slot in self.by_arrival(slots):
            if slot.pass_ is None and not self.begin(slot, ahead):
                continue
            begin = slot.sequence.length if slot.built is None else slot.built
            end = max(len(slot.sequence.prompt), slot.next_pass.write_at + slot.size)
            computed = slot.built != 0 and slot.sequence.nfe["prefill"] > 0
            if not self._reserve(slot, begin, end, may_take=computed):
                break
            room -= self._prompt_pass(slot).ids.size
            if room < 0 and ahead:
                break
            ahead.append(slot)
        return ahead

    def _prompt_pass(self, slot: Slot) -> Pass:
        """The pass that the loop wants, or one that computes again what the row has lost."""
        if slot.built is None:
            return slot.next_pass
        size = min(PREFILL_CHUNK, self._prefill_tokens)
        ids = committed(slot.sequence)[slot.built : slot.built + size]
        return slot.sequence.for_engine(causal("prefill", ids, slot.built))

    def _reserve(self, slot: Slot, begin: int, end: int, *, may_take: bool) -> bool:
        """Make slots of a row its own, if need be with the pages of the youngest, which may be the row itself."""
        while not self._paged.reserve(slot.row, begin, end):
            holders = [other for other in self.slots if other.reach]
            if not may_take or not holders:
                return False
            youngest = max(holders, key=lambda other: other.arrival)
            self._preempt(youngest)
            if youngest is slot:
                return False
        slot.reach = max(slot.reach, end)
        return True

    def _preempt(self, slot: Slot) -> None:
        """Take a slot's pages; its loop stands where it stands."""
        self._paged.free(slot.row)
        slot.reach = 0
        slot.built = 0 if slot.sequence.length else None
        self.counts.preempted += 1
