"""Rows that have pages of a common memory: rows of any mode and length share a forward, and none is ever moved.

A sequence begins when there are pages for its prompt, in order of arrival, and takes more as it grows. Where they run
out, kept prefixes go first; then the youngest sequence gives its pages up and computes what it had again once there is
room, by the same passes as a prompt. So the oldest always goes on. The next forward is started before anyone looks at
the results of the last one; where the next passes are known but for what the engine gives, even before those are there.
What it computes for a row that has ended meanwhile or wants another pass is dropped; its K/V lie past what anyone sees.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ...contract import PAGE, PREFILL_CHUNK
from ...errors import EngineError, NemodiffError
from ..engines.engine import Flight, PagedCache
from ..engines.grouping import Arrangement
from ..engines.pages import Pages
from ..engines.passes import Following, Pass, Prediction, causal, most_end
from ..planning.pass_costs import PassCosts
from .prefix_cache import PrefixCache
from .rows import Found, Rows
from .slot import Forward, Slot, committed

_FEW = 8  # a forward begun ahead may leave one of so many rows out


class Work(NamedTuple):
    """A row's pass in a forward. One that is fed by the forward before does not know its ids."""

    slot: Slot
    following: Following
    before: int | None = None  # the number of the row's pass in the forward before, if that was under way then

    @property
    def pass_(self) -> Pass:
        """The pass, as far as it is known."""
        return self.following.pass_


@dataclasses.dataclass
class Running:
    """A forward under way; `serves` tells which of its passes are those that the loops want."""

    flight: Flight
    work: list[Work]
    ahead: bool = False
    serves: Sequence[bool] = ()


class PagedRows(Rows):
    """Up to `rows` slots over the first rows of a cache; what runs now is a forward of some of them, or two."""

    def __init__(
        self,
        cache: PagedCache,
        prefixes: PrefixCache | None,
        prefill_tokens: int,
        cost: PassCosts | None,
        rows: int,
        pages: Pages,
        interrupted: Callable[[], bool],
    ) -> None:
        super().__init__(cache, prefixes, prefill_tokens, cost)
        self.load.ahead = cache.ahead
        self._paged = cache
        self._pages = pages
        self._interrupted = interrupted
        self._free = list(range(rows - 1, -1, -1))
        self._turn = 0  # the arrival to begin with, if not all that decode fit in a forward
        self._running = collections.deque[Running]()
        self._given: list[Prediction] = []  # by the last forward that has ended

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
        last = self._running.popleft()
        flight, work = last.flight, last.work
        self._given = flight.finish()
        if self._running:
            for each, arranged in zip(self._running[0].work, self._running[0].flight.arranged(), strict=True):
                each.slot.sequence.begun = arranged and arranged.grouping
        began = time.perf_counter() - flight.seconds
        wanted = list[Pass]()
        slots = list[Slot]()
        served = list[Pass]()
        results = list[Prediction]()
        for (slot, (pass_, _), _), serves, prediction in zip(work, last.serves, self._given, strict=True):
            if slot.ended:
                wanted += [] if last.ahead else [pass_]
                continue
            if not serves:
                continue
            if slot.built is None:
                slots.append(slot)
                served.append(slot.next_pass)
                results.append(_beginning(prediction, slot.next_pass.predicted.size))
                continue
            wanted.append(pass_)
            slot.built += pass_.ids.size
            self.counts.rebuilt += pass_.ids.size
            if slot.built == slot.sequence.length:
                slot.built = None
        computed = sum(each.pass_.ids.size for each in work)
        self.count(wanted + served, flight.seconds, computed)
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
        if self._running:
            self._judge(self._running[0])
        else:
            work = self._scheduled()
            if not work:
                return
            flight = self._paged.launch([each.pass_ for each in work], [each.slot.row for each in work])
            self._running.append(Running(flight, work, serves=[True] * len(work)))
            for each in work:
                each.slot.left_out = False
        if len(self._running) == 1 and self._paged.ahead:
            self._run_ahead(self._running[0])

    def _judge(self, running: Running) -> None:
        """Find out which passes begun ahead serve, now that the one before has ended and the loops have gone on."""
        running.serves = [
            each.before is None or each.following.serves(self._given[each.before], each.slot.next_pass, arranged)
            for each, arranged in zip(running.work, running.flight.arranged(), strict=True)
        ]

    def _run_ahead(self, last: Running) -> None:
        """Start the forward after one that runs: the passes of that which are known but for its predictions.

        Others join the one after that. There may be few of them, and none twice in a row, as it would lose every other
        turn. Rows that will have all their tokens are left out; one that ends by a prediction is computed in vain.
        """
        known, unknown = self._known(last)
        if len(unknown) * _FEW > len(self.slots) or any(slot.left_out for slot in unknown):
            return
        work = self._chosen(known, last)
        if not work:
            return
        work.sort(key=lambda each: isinstance(each.following.feed, Arrangement))
        fed = [each.before or 0 for each in work]
        passes = [each.following for each in work]
        flight = self._paged.follow(last.flight, passes, [each.slot.row for each in work], fed)
        if flight is None:
            return
        self._running.append(Running(flight, work, ahead=True))
        for slot in unknown:
            slot.left_out = True
        for each in work:
            each.slot.left_out = each.slot.left_out and each.before is None

    def _known(self, last: Running) -> tuple[list[Slot | Work], list[Slot]]:
        """Rows whose next pass is known while a forward runs, with what follows it; and those of which it is not."""
        under_way = {each.slot: n for n, each in enumerate(last.work) if last.serves[n]}
        known, unknown = list[Slot | Work](), list[Slot]()
        for slot in self.slots:
            if slot not in under_way:
                known.append(slot)
                continue
            sequence = slot.sequence
            if slot.built is not None or sequence.follower is None:
                unknown.append(slot)
                continue
            following = sequence.follower(sequence, slot.next_pass)
            if following is None:  # it will have ended
                continue
            try:
                pass_ = sequence.for_engine(following.pass_)
            except NemodiffError:  # an image that cannot be seen again, which the loop will be told
                unknown.append(slot)
                continue
            known.append(Work(slot, following._replace(pass_=pass_), under_way[slot]))
        return known, unknown

    def _scheduled(self) -> list[Work]:
        """The passes of the next forward."""
        return self._chosen(list(self.slots), None)

    def _chosen(self, rows: list[Slot | Work], last: Running | None) -> list[Work]:
        """Of rows, the oldest first, all that decode, then prompts in order of arrival, each within its budget.

        Where another forward is under way none loses its pages; none is chosen where one that decodes gets no pages.
        """
        decoding, others = list[Work](), list[Slot | Work]()
        for row in rows:
            if isinstance(row, Work):
                (others if row.pass_.kind == "prefill" else decoding).append(row)
            elif row.decodes:
                decoding.append(Work(row, Following(row.next_pass, None)))
            else:
                others.append(row)
        for slot, following, before in decoding:
            if slot.reach:  # else an older one has taken its pages just now
                size = slot.size
                if last is not None and before is not None:  # what runs may be longer than what its loop wants
                    size = max(size, last.work[before].pass_.ids.size)
                begin, end = following.pass_.write_at, most_end(following, size)
                if not self._reserve(slot, begin, end, may_take=last is None) and last is not None:
                    return []
        prompts = self._prompts(others, last)
        work = self._decoding([each for each in decoding if each.slot.reach])
        return work + [each for each in prompts if each.slot.reach]

    def _decoding(self, ready: list[Work]) -> list[Work]:
        """The rows that decode, or in turn as many as fit in a forward."""
        room = self._paged.most_tokens
        work: list[Work] = []
        start = next((n for n, each in enumerate(ready) if each.slot.arrival >= self._turn), 0)
        for each in ready[start:] + ready[:start]:
            size = each.pass_.ids.size
            if work and size > room:
                self._turn = each.slot.arrival
                break
            work.append(each)
            room -= size
        return work

    def _prompts(self, rows: list[Slot | Work], last: Running | None) -> list[Work]:
        """Prompts, and rows that are computed again, for which there are pages, within the budget of tokens."""
        room = self._prefill_tokens
        under_way = [] if last is None else [each.slot for each in last.work if each.pass_.kind == "prefill"]
        work: list[Work] = []
        for row in rows:
            if isinstance(row, Work):
                each = row  # whose prompt has its pages
            else:
                slot = row
                if slot.pass_ is None and not self.begin(slot, [*under_way, *(other.slot for other in work)]):
                    continue
                begin = slot.sequence.length if slot.built is None else slot.built
                end = max(len(slot.sequence.prompt), slot.next_pass.write_at + slot.size)
                computed = slot.built != 0 and slot.sequence.nfe["prefill"] > 0
                if not self._reserve(slot, begin, end, may_take=computed and last is None):
                    break
                each = Work(slot, Following(self._prompt_pass(slot), None))
            room -= each.pass_.ids.size
            if room < 0 and work:
                break
            work.append(each)
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
