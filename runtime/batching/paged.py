"""Rows that have pages of a common memory: rows of any mode and length share a forward, and none is ever moved.

A sequence begins when there are pages for its prompt, in order of arrival, and takes more as it grows. Where they run
out, kept prefixes go first; then the youngest sequence gives its pages up and computes what it had again once there is
room, by the same passes as a prompt. So the oldest always goes on. The next forward is started before anyone looks at
the results of the last one; where every row's next pass is known but for what the engine gives, even before those are
there. What it computes for a row that has ended meanwhile is dropped, and its K/V lie past what anyone sees.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ...contract import PAGE, PREFILL_CHUNK
from ...errors import EngineError, NemodiffError
from ..engines.engine import Flight, Following, PagedCache, Pass, Prediction, causal
from ..engines.pages import Pages
from ..planning.pass_costs import PassCosts
from .prefix_cache import PrefixCache
from .rows import Found, Rows
from .slot import Counts, Forward, Slot, committed


class Running(NamedTuple):
    """A forward under way; one that was started ahead does not know its ids."""

    flight: Flight
    work: list[tuple[Slot, Pass]]
    ahead: bool = False


class PagedRows(Rows):
    """Up to `rows` slots over the first rows of a cache; what runs now is a forward of some of them, or two."""

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
        self._running = collections.deque[Running]()

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
        if not self._running:
            self.go_on()
        if not self._running:
            if self.slots:
                self._wait(freed)
            return
        flight, work, ahead = self._running.popleft()
        predictions = flight.finish()
        began = time.perf_counter() - flight.seconds
        wanted = list[Pass]()
        slots = list[Slot]()
        served = list[Pass]()
        results = list[Prediction]()
        for (slot, pass_), prediction in zip(work, predictions, strict=True):
            if slot.ended:
                wanted += [] if ahead else [pass_]
                continue
            if slot.built is None:
                if slot.next_pass.kind != pass_.kind:
                    continue  # what came before has broken numbers, as a NaN that leaves a mask in a draft
                slots.append(slot)
                served.append(slot.next_pass)
                results.append(_beginning(prediction, slot.next_pass.predicted.size))
                continue
            wanted.append(pass_)
            slot.built += pass_.ids.size
            self.counts.rebuilt += pass_.ids.size
            if slot.built == slot.sequence.length:
                slot.built = None
        # One that was started ahead began when the host saw the end of the one before, which may have been long past.
        self.count(wanted + served, None if ahead else flight.seconds, sum(p.ids.size for _, p in work))
        yield Forward(slots, served, results, began, flight.seconds, len(work))

    def _wait(self, freed: int) -> None:
        """Wait until pages are freed, since `freed` was read, and hold none, as others may wait for those likewise."""
        for slot in self.slots:
            if slot.reach:
                self._preempt(slot)
        if not self._pages.wait(freed, self._interrupted):
            pages = self._pages
            raise EngineError(
                f"{pages.free * PAGE} of {pages.slots} slots of K/V are free, too few to go on, and the others belong "
                "to answers that this thread has begun; end or close one of those first, or run all of them by "
                "generate_many or a Scheduler"
            )

    def go_on(self) -> None:
        """Let the rows that have ended go and start the next forward, and the one after it if it is known."""
        for slot in [slot for slot in self.slots if slot.ended]:
            self.leave(slot)
        if not self._running:
            work = self._scheduled()
            if not work:
                return
            flight = self._paged.launch([pass_ for _, pass_ in work], [slot.row for slot, _ in work])
            self._running.append(Running(flight, work))
        if len(self._running) == 1:
            self._run_ahead(self._running[0])

    def _run_ahead(self, last: Running) -> None:
        """Start the forward after one whose rows' next passes are known but for its predictions, while that runs.

        Rows that will have all their tokens then are left out; one that ends by what is predicted is computed in vain.
        """
        if not set(self.slots) <= dict(last.work).keys():
            return  # others have come
        work, passes, fed = list[tuple[Slot, Pass]](), list[Following](), list[int]()
        for number, (slot, pass_) in enumerate(last.work):
            if slot.ended:
                continue
            sequence = slot.sequence
            if sequence.follower is None or slot.next_pass.kind != pass_.kind:
                return  # the row's next pass depends on more, or its last one is not the one that it wants
            following = sequence.follower(sequence, slot.next_pass)
            if following is None:
                continue
            following = following._replace(pass_=sequence.for_engine(following.pass_))
            work.append((slot, following.pass_))
            passes.append(following)
            fed.append(number)
        if not work:
            return
        for (slot, pass_), following, number in zip(work, passes, fed, strict=True):
            most = last.work[number][1].ids.size if following.feed == "accepted" else 0
            if not self._reserve(slot, pass_.write_at, pass_.write_at + pass_.ids.size + most, may_take=False):
                return
        flight = self._paged.follow(last.flight, passes, [slot.row for slot, _ in work], fed)
        if flight is not None:
            self._running.append(Running(flight, work, ahead=True))

    def _scheduled(self) -> list[tuple[Slot, Pass]]:
        """The passes of the next forward: all that decode, then prompts in order of arrival, each within its budget."""
        decoding, others = list[Slot](), list[Slot]()  # the oldest first
        for slot in self.slots:
            decodes = slot.pass_ is not None and slot.pass_.kind != "prefill" and slot.built is None
            (decoding if decodes else others).append(slot)
        for slot in decoding:
            if slot.reach:  # else an older one has taken its pages just now
                at = slot.next_pass.write_at
                self._reserve(slot, at, at + slot.size, may_take=True)
        prompts = self._prompts(others)
        work = self._decoding([slot for slot in decoding if slot.reach])
        return work + [(slot, pass_) for slot, pass_ in prompts if slot.reach]

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

    def _prompts(self, slots: list[Slot]) -> list[tuple[Slot, Pass]]:
        """Prompts, and rows that are computed again, for which there are pages, within the budget of tokens."""
        room = self._prefill_tokens
        work: list[tuple[Slot, Pass]] = []
        for slot in slots:
            if slot.pass_ is None and not self.begin(slot, [other for other, _ in work]):
                continue
            begin = slot.sequence.length if slot.built is None else slot.built
            end = max(len(slot.sequence.prompt), slot.next_pass.write_at + slot.size)
            computed = slot.built != 0 and slot.sequence.nfe["prefill"] > 0
            if not self._reserve(slot, begin, end, may_take=computed):
                break
            pass_ = self._prompt_pass(slot)
            room -= pass_.ids.size
            if room < 0 and work:
                break
            work.append((slot, pass_))
        return work

    def _prompt_pass(self, slot: Slot) -> Pass:
        """The pass that the loop wants, or one that computes again what the row has lost.

        Where that needs an image that cannot be seen again, the row lacks the rest and fails with its loop's next pass.
        """
        if slot.built is None:
            return slot.next_pass
        size = min(PREFILL_CHUNK, self._prefill_tokens)
        ids = committed(slot.sequence)[slot.built : slot.built + size]
        try:
            return slot.sequence.for_engine(causal("prefill", ids, slot.built))
        except NemodiffError as error:
            slot.failure, slot.built = error, None
            return slot.next_pass

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


def _beginning(prediction: Prediction, count: int) -> Prediction:
    """Of a prediction, as much as a pass asked for that begins like the one that was started ahead for it."""
    if prediction.token.size == count:
        return prediction
    token, confidence, next_ids, logits = prediction
    return Prediction(token[:count], confidence[:count], next_ids[:count], None if logits is None else logits[:count])
