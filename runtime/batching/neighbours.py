"""Rows of which those that share a forward are neighbours, of one length and padded to one size.

Rows that usually run passes of equal size lie side by side, so that a forward pads little. A step is several forwards
wherever padding would cost more than a forward of its own, by the measured cost curve: a prompt of 512 tokens beside
seven rows of one token would otherwise be eight rows of 512.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from ..planning.cost import split
from .rows import Rows
from .slot import Forward, Slot

_SAMPLED = 8  # forwards of which one is timed, where no row plans by costs


class NeighbouringRows(Rows):
    """The first rows of a cache without a gap; a slot's row is its place among the slots."""

    def add(self, slot: Slot) -> None:
        """Give a slot a row beside those of its width."""
        slots, row = self.slots, len(self.slots)
        slots.append(slot)
        while row and slots[row - 1].width > slot.width:  # the first of each wider kind goes after the last of it
            first = self._first_of_kind(row - 1)
            self._place(slots[first], first, row)
            row = first
        slots[row] = slot
        slot.row = row

    def leave(self, slot: Slot) -> None:
        """Free a slot's row and keep the others dense and in order."""
        slots, row = self.slots, slot.row
        self.reach = max(self.reach, slot.reach)
        ids = slot.held
        if self._prefixes is not None and (target := self._prefixes.keep(ids)) is not None:
            self._cache.move(row, target, len(ids))
        while row < len(slots) - 1:
            last = row + 1
            while last + 1 < len(slots) and slots[last + 1].width == slots[row + 1].width:
                last += 1
            self._place(slots[last], last, row)
            row = last
        slots.pop()
        self._cache.free(len(slots))

    def forwards(self) -> Iterator[Forward]:
        """Run the forwards of a step, one after the other."""
        for first, end in self._ranges():
            slots = self.slots[first:end]
            passes = [slot.pass_ for slot in slots if slot.pass_ is not None]
            timed = self._is_timed(slots)
            before = self._clock() if timed else 0.0
            began = time.perf_counter()
            predictions = self._cache.forward(passes, first)
            seconds = time.perf_counter() - began
            spent = self._clock() - before if timed else None
            self.count(passes, spent)
            rows = len(passes)
            self.load.padded = (rows * max(p.ids.size for p in passes), rows) if rows > 1 else None
            yield Forward(slots, passes, predictions, began, seconds, len(slots))
        for slot in reversed(self.slots):
            if slot.ended:
                self.leave(slot)

    def _is_timed(self, slots: list[Slot]) -> bool:
        """Whether a forward's cost is read: a system call, which only what plans by it takes in every pass."""
        if self._cost is None:
            return False
        return self.counts.forwards % _SAMPLED == 0 or any(slot.sequence.planner is not None for slot in slots)

    def go_on(self) -> None:
        """Nothing: the next forward is run when it is asked for."""

    def _ranges(self) -> list[tuple[int, int]]:
        """The step's forwards, each as a range of rows."""
        if len(self.slots) == 1 and self.slots[0].pass_ is not None:
            return [(0, 1)]
        rows = self._scheduled()
        ranges: list[tuple[int, int]] = []
        first = 0
        while first < len(rows):
            end = first + 1
            while end < len(rows) and rows[end] == rows[end - 1] + 1:
                end += 1
            sizes = tuple(self.slots[row].size for row in rows[first:end])
            cuts = [end - first] if self._cost is None or len(sizes) == 1 else split(sizes, self._cost.curve)
            start = 0
            for cut in cuts:
                ranges.append((rows[first] + start, rows[first] + cut))
                start = cut
            first = end
        return ranges

    def _scheduled(self) -> list[int]:
        """The rows of this step: all that decode, and in order of arrival as many prefills as fit in the budget."""
        decoding = [slot for slot in self.slots if slot.pass_ is not None and slot.pass_.kind != "prefill"]
        rows = [slot.row for slot in decoding]
        room = self._prefill_tokens
        ahead = list[Slot]()
        waiting = [slot for slot in self.slots if slot not in decoding]
        for slot in sorted(waiting, key=lambda slot: slot.arrival):
            if slot.pass_ is None and not self.begin(slot, ahead):
                continue
            ahead.append(slot)
            room -= slot.size
            if room < 0 and len(ahead) > 1:
                break
            rows.append(slot.row)
        return sorted(rows)

    def _first_of_kind(self, row: int) -> int:
        while row and self.slots[row - 1].width == self.slots[row].width:
            row -= 1
        return row

    def _place(self, slot: Slot, source: int, target: int) -> None:
        self.slots[target] = slot
        slot.row = target
        if slot.reach:
            self._cache.move(source, target, slot.reach)
