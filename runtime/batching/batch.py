"""Requests that share a cache: which row each has, which rows share a forward, who goes on and who leaves.

Rows are dense, and rows that usually run passes of equal size lie side by side, so that a forward over consecutive rows
pads little. A step is several forwards wherever padding would cost more than a forward of its own, by the measured cost
curve: a prompt of 512 tokens beside seven rows of one token would otherwise be eight rows of 512.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import NamedTuple

from ...contract import PREFILL_CHUNK
from ...errors import NemodiffError
from ..engines.drafter import adapted
from ..engines.engine import Engine, Pass, Prediction
from ..modes import LOOPS
from ..modes.ar import Loop
from ..modes.scoring import scored
from ..planning.cost import split
from ..planning.pass_costs import PassCosts
from ..requests.outcome import PassOutcome
from ..requests.sequence import Sequence
from .prefix_cache import SHORTEST, PrefixCache, common

KEPT_PREFIXES = 2  # rows of K/V of finished prompts; each takes the memory of a running row


class PassResult(NamedTuple):
    """One pass of one sequence. The prediction's arrays are overwritten by the next forward."""

    sequence: Sequence
    pass_: Pass
    prediction: Prediction
    outcome: PassOutcome
    began: float
    seconds: float
    rows: int  # that shared the forward
    error: Exception | None  # why this sequence alone cannot go on


@dataclasses.dataclass
class Counts:
    """What a batch has done so far; `padding` are tokens computed for nobody."""

    steps: int = 0
    forwards: int = 0
    tokens: int = 0
    padding: int = 0
    reused: int = 0


@dataclasses.dataclass(eq=False)
class _Slot:
    """A row of the cache in use by a sequence."""

    sequence: Sequence
    arrival: int
    width: int  # tokens of its usual pass
    loop: Loop | None = None
    pass_: Pass | None = None  # None: not begun
    reach: int = 0  # slots that a pass has written to
    ended: bool = False


class Batch:
    """Up to `rows` sequences over one cache.

    Args:
        backend: the engine.
        rows: sequences at a time.
        cost: decides by its curve where rows that meet are split, and learns from every forward; None does neither.
        kept: rows for K/V of finished prompts; None switches the reuse of prefixes off, 0 reuses running rows only.
        prefill_tokens: prompt tokens of one step, over all rows; one pass always runs.
    """

    def __init__(
        self,
        backend: Engine,
        rows: int,
        *,
        cost: PassCosts | None = None,
        kept: int | None = None,
        prefill_tokens: int = PREFILL_CHUNK,
    ) -> None:
        self.rows = rows
        self.counts = Counts()
        self.prefixes = None if kept is None else PrefixCache(rows, kept)
        self._cache = backend.open(rows + (kept or 0))
        self._cost = cost
        self._prefill_tokens = prefill_tokens
        self._slots: list[_Slot] = []
        self._arrivals = 0
        self.reach = 0

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def cache_slots(self) -> int:
        """Cache slots that hold valid K/V of running sequences."""
        return sum(slot.sequence.length for slot in self._slots)

    def add(self, sequence: Sequence) -> None:
        """Give a sequence a row; its first pass is in one of the next steps."""
        assert len(self._slots) < self.rows
        sequence.started = time.perf_counter()
        self._arrivals += 1
        width = 1 if sequence.settings.mode == "ar" else sequence.settings.block_length
        slot, row = _Slot(sequence, self._arrivals, width), len(self._slots)
        self._slots.append(slot)
        while row and self._slots[row - 1].width > width:  # the first of each wider kind goes after the last of it
            first = self._first_of_kind(row - 1)
            self._place(self._slots[first], first, row)
            row = first
        self._slots[row] = slot

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out between two steps, wherever it is."""
        (row,) = (i for i, slot in enumerate(self._slots) if slot.sequence is sequence)
        loop = self._slots[row].loop
        if loop is not None:
            loop.close()
        self._leave(row)

    def close(self) -> None:
        """Give the cache back."""
        self._cache.close()

    def step(self) -> Iterator[PassResult]:
        """One pass of every running sequence, prefill within its budget; exhaust it before anything else.

        An error of one sequence's loop comes in its `PassResult`, an error of the engine is raised.
        """
        self.counts.steps += 1
        for first, end in self._forwards():
            slots = self._slots[first:end]
            passes = [slot.pass_ for slot in slots if slot.pass_ is not None]
            began = time.perf_counter()
            predictions = self._cache.forward(passes, first)
            seconds = time.perf_counter() - began
            self._count(passes, seconds)
            for slot, pass_, prediction in zip(slots, passes, predictions, strict=True):
                error = self._advance(slot, pass_, prediction)
                yield PassResult(
                    slot.sequence, pass_, prediction, slot.sequence.outcome, began, seconds, len(slots), error
                )
        for row in range(len(self._slots) - 1, -1, -1):
            if self._slots[row].ended:
                self._leave(row)

    def _advance(self, slot: _Slot, pass_: Pass, prediction: Prediction) -> Exception | None:
        assert slot.loop is not None
        sequence = slot.sequence
        sequence.outcome = PassOutcome()
        sequence.nfe[pass_.kind] += 1
        sequence.adapter_tokens += adapted(pass_)
        slot.reach = max(slot.reach, pass_.write_at + pass_.ids.size)
        try:
            slot.pass_ = sequence.for_engine(slot.loop.send(prediction))
        except StopIteration:
            slot.ended = True
            sequence.ended = time.perf_counter()
        except NemodiffError as error:
            slot.ended = True
            sequence.ended = time.perf_counter()
            return error
        return None

    def _count(self, passes: list[Pass], seconds: float) -> None:
        counts = self.counts
        tokens = sum(p.ids.size for p in passes)
        computed = max(p.ids.size for p in passes) * len(passes)
        counts.forwards += 1
        counts.tokens += tokens
        counts.padding += computed - tokens
        if self._cost is not None and all(p.kind != "prefill" for p in passes):
            self._cost.learn(computed, seconds)

    # --- which rows run, and which of them together ---

    def _forwards(self) -> list[tuple[int, int]]:
        """The step's forwards, each as a range of rows."""
        if len(self._slots) == 1 and self._slots[0].pass_ is not None:
            return [(0, 1)]
        rows = self._scheduled_rows()
        ranges: list[tuple[int, int]] = []
        first = 0
        while first < len(rows):
            end = first + 1
            while end < len(rows) and rows[end] == rows[end - 1] + 1:
                end += 1
            sizes = tuple(self._size(row) for row in rows[first:end])
            cuts = [end - first] if self._cost is None or len(sizes) == 1 else split(sizes, self._cost.curve)
            start = 0
            for cut in cuts:
                ranges.append((rows[first] + start, rows[first] + cut))
                start = cut
            first = end
        return ranges

    def _scheduled_rows(self) -> list[int]:
        """The rows of this step: all that decode, and in order of arrival as many prefills as fit in the budget."""
        slots = self._slots
        rows = [row for row, slot in enumerate(slots) if slot.pass_ is not None and slot.pass_.kind != "prefill"]
        room = self._prefill_tokens
        ahead = list[_Slot]()
        rest = sorted(set(range(len(slots))) - set(rows), key=lambda row: slots[row].arrival)
        for row in rest:
            slot = slots[row]
            if slot.pass_ is None and not self._begin(slot, row, ahead):
                continue
            ahead.append(slot)
            room -= self._size(row)
            if room < 0 and len(ahead) > 1:
                break
            rows.append(row)
        return sorted(rows)

    def _begin(self, slot: _Slot, row: int, ahead: list[_Slot]) -> bool:
        """Start a slot's loop after what can be copied; False if a row ahead is about to have more of its prompt."""
        sequence = slot.sequence
        if self.prefixes is not None:
            ids = sequence.keys[: sequence.reusable]
            source, shared = self.prefixes.find(ids)
            for other_row, other in enumerate(self._slots):
                if other is not slot and (length := common(_held(other.sequence), ids)) > shared:
                    source, shared = other_row, length
            if any(common(other.sequence.keys, ids) >= shared + SHORTEST for other in ahead):
                return False
            if shared >= SHORTEST:
                self._cache.move(source, row, shared)
                sequence.length = sequence.reused = slot.reach = shared
                self.counts.reused += shared
        slot.loop = scored(sequence, LOOPS[sequence.settings.mode])
        slot.pass_ = sequence.for_engine(next(slot.loop))
        return True

    def _size(self, row: int) -> int:
        pass_ = self._slots[row].pass_
        assert pass_ is not None
        return int(pass_.ids.size)

    # --- rows ---

    def _leave(self, row: int) -> None:
        """Free a row and keep the others dense and in order."""
        slots = self._slots
        leaving = slots[row]
        self.reach = max(self.reach, leaving.reach)
        ids = _held(leaving.sequence)
        if self.prefixes is not None and (target := self.prefixes.keep(ids)) is not None:
            self._cache.move(row, target, len(ids))
        while row < len(slots) - 1:
            last = row + 1
            while last + 1 < len(slots) and slots[last + 1].width == slots[row + 1].width:
                last += 1
            self._place(slots[last], last, row)
            row = last
        slots.pop()
        self._cache.free(len(slots))

    def _first_of_kind(self, row: int) -> int:
        while row and self._slots[row - 1].width == self._slots[row].width:
            row -= 1
        return row

    def _place(self, slot: _Slot, source: int, target: int) -> None:
        self._slots[target] = slot
        if slot.reach:
            self._cache.move(source, target, slot.reach)


def _held(sequence: Sequence) -> list[int]:
    """The ids whose K/V a row holds, those of images by their content."""
    if sequence.length <= len(sequence.keys):
        return sequence.keys[: sequence.length]
    return (sequence.keys + sequence.tokens)[: sequence.length]
