"""Requests that share a cache: which row each has, which rows share a forward, who goes on and who leaves.

In: sequences, added and removed between any two steps. Out: `step`, which advances the running ones by one pass each
and hands out what each pass was. Rows are dense, and rows that usually ask for equally many tokens lie side by side, so
that a forward over consecutive rows pads little. The surprising fact: one step is several forwards wherever padding
would cost more than a forward of its own, by the measured cost curve: a prompt of 512 tokens beside seven rows of one
token would otherwise be eight rows of 512.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ...contract import PREFILL_CHUNK
from ...errors import NemodiffError
from ..engines.drafter import adapted
from ..engines.engine import Engine, Pass, Prediction
from ..modes.ar import Loop, ar
from ..modes.auto import auto
from ..modes.diffusion import diffusion
from ..modes.linear_spec import linear_spec
from ..modes.quadratic_spec import quadratic_spec
from ..planning.cost import CostCurve, split
from ..requests.sequence import Sequence
from .prefix_cache import SHORTEST, Prefixes, common

LOOPS: dict[str, Callable[[Sequence], Loop]] = {
    "ar": ar,
    "diffusion": diffusion,
    "linear_spec": linear_spec,
    "quadratic_spec": quadratic_spec,
    "auto": auto,
}
KEPT_PREFIXES = 2  # rows of K/V of finished prompts; each takes the memory of a running row


class Served(NamedTuple):
    """One pass of one sequence. The prediction's arrays are overwritten by the next forward."""

    sequence: Sequence
    asked: Pass
    prediction: Prediction
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
class _Lane:
    """A row in use."""

    sequence: Sequence
    arrival: int
    width: int  # tokens of its usual pass
    loop: Loop | None = None
    asked: Pass | None = None  # None: not begun
    reach: int = 0  # slots that a pass has written to
    ended: bool = False


class Batch:
    """Up to `rows` sequences over one cache.

    Args:
        backend: the engine.
        rows: sequences at a time.
        cost: gives the cost curve, asked for when rows meet; None never splits a step.
        kept: rows for K/V of finished prompts; None switches the reuse of prefixes off, 0 reuses running rows only.
        prefill_tokens: prompt tokens of one step, over all rows; one pass is always served.
    """

    def __init__(
        self,
        backend: Engine,
        rows: int,
        *,
        cost: Callable[[], CostCurve] | None = None,
        kept: int | None = None,
        prefill_tokens: int = PREFILL_CHUNK,
    ) -> None:
        self.rows, self.counts = rows, Counts()
        self.prefixes = None if kept is None else Prefixes(rows, kept)
        self._cache = backend.open(rows + (kept or 0))
        self._cost, self._prefill_tokens = cost, prefill_tokens
        self._lanes: list[_Lane] = []
        self._arrivals = self.reach = 0

    def __len__(self) -> int:
        return len(self._lanes)

    @property
    def slots(self) -> int:
        """Cache slots that hold valid K/V of running sequences."""
        return sum(lane.sequence.length for lane in self._lanes)

    def add(self, sequence: Sequence) -> None:
        """Give a sequence a row; its first pass is in one of the next steps."""
        assert len(self._lanes) < self.rows
        sequence.started = time.perf_counter()
        self._arrivals += 1
        width = 1 if sequence.settings.mode == "ar" else sequence.settings.block_length
        lane, row = _Lane(sequence, self._arrivals, width), len(self._lanes)
        self._lanes.append(lane)
        while row and self._lanes[row - 1].width > width:  # the first of each wider kind goes behind the last of it
            first = self._first_of_kind(row - 1)
            self._place(self._lanes[first], first, row)
            row = first
        self._lanes[row] = lane

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out between two steps, wherever it is."""
        row = next(i for i, lane in enumerate(self._lanes) if lane.sequence is sequence)
        loop = self._lanes[row].loop
        if loop is not None:
            loop.close()
        self._leave(row)

    def close(self) -> None:
        """Give the cache back."""
        self._cache.close()

    def step(self) -> Iterator[Served]:
        """One pass of every running sequence, prefill within its budget; exhaust it before anything else.

        An error of one sequence's loop is told in `Served`, an error of the engine is raised.
        """
        self.counts.steps += 1
        for first, end in self._forwards():
            lanes = self._lanes[first:end]
            passes = [lane.asked for lane in lanes if lane.asked is not None]
            began = time.perf_counter()
            predictions = self._cache.forward(passes, first)
            seconds = time.perf_counter() - began
            self._count(passes)
            for lane, asked, prediction in zip(lanes, passes, predictions, strict=True):
                error = self._advance(lane, asked, prediction)
                yield Served(lane.sequence, asked, prediction, began, seconds, len(lanes), error)
        for row in range(len(self._lanes) - 1, -1, -1):
            if self._lanes[row].ended:
                self._leave(row)

    def _advance(self, lane: _Lane, asked: Pass, prediction: Prediction) -> Exception | None:
        assert lane.loop is not None
        sequence = lane.sequence
        sequence.nfe[asked.kind] += 1
        sequence.adapter_tokens += adapted(asked)
        lane.reach = max(lane.reach, asked.write_at + asked.ids.size)
        try:
            lane.asked = sequence.chooser.ask(lane.loop.send(prediction))
        except StopIteration:
            lane.ended, sequence.ended = True, time.perf_counter()
        except NemodiffError as error:
            lane.ended, sequence.ended = True, time.perf_counter()
            return error
        return None

    def _count(self, passes: list[Pass]) -> None:
        counts, tokens = self.counts, sum(p.ids.size for p in passes)
        counts.forwards += 1
        counts.tokens += tokens
        counts.padding += max(p.ids.size for p in passes) * len(passes) - tokens

    # --- who is served, and together with whom ---

    def _forwards(self) -> list[tuple[int, int]]:
        """The step's forwards, each as a range of rows."""
        if len(self._lanes) == 1 and self._lanes[0].asked is not None:
            return [(0, 1)]
        served = self._served()
        ranges: list[tuple[int, int]] = []
        first = 0
        while first < len(served):
            end = first + 1
            while end < len(served) and served[end] == served[end - 1] + 1:
                end += 1
            sizes = tuple(self._size(row) for row in served[first:end])
            cuts = [end - first] if self._cost is None or len(sizes) == 1 else split(sizes, self._cost())
            start = 0
            for cut in cuts:
                ranges.append((served[first] + start, served[first] + cut))
                start = cut
            first = end
        return ranges

    def _served(self) -> list[int]:
        """The rows of this step: all that decode, and in order of arrival as many prefills as fit in the budget."""
        lanes = self._lanes
        served = [row for row, lane in enumerate(lanes) if lane.asked is not None and lane.asked.kind != "prefill"]
        room, ahead = self._prefill_tokens, list[_Lane]()
        rest = sorted(set(range(len(lanes))) - set(served), key=lambda row: lanes[row].arrival)
        for row in rest:
            lane = lanes[row]
            if lane.asked is None and not self._begin(lane, row, ahead):
                continue
            ahead.append(lane)
            room -= self._size(row)
            if room < 0 and len(ahead) > 1:
                break
            served.append(row)
        return sorted(served)

    def _begin(self, lane: _Lane, row: int, ahead: list[_Lane]) -> bool:
        """Start a lane's loop behind what can be copied; False if a row ahead is about to have more of its prompt."""
        sequence = lane.sequence
        if self.prefixes is not None:
            most = len(sequence.prompt) - 1  # the last token is always forwarded: its prediction is the seed
            ids = sequence.prompt[:most]
            source, shared = self.prefixes.find(ids)
            for other_row, other in enumerate(self._lanes):
                if other is not lane and (length := common(_held(other.sequence), ids)) > shared:
                    source, shared = other_row, length
            if any(common(other.sequence.prompt, ids) >= shared + SHORTEST for other in ahead):
                return False
            if shared >= SHORTEST:
                self._cache.move(source, row, shared)
                sequence.length = sequence.reused = lane.reach = shared
                self.counts.reused += shared
        lane.loop = LOOPS[sequence.settings.mode](sequence)
        lane.asked = sequence.chooser.ask(next(lane.loop))
        return True

    def _size(self, row: int) -> int:
        asked = self._lanes[row].asked
        assert asked is not None
        return int(asked.ids.size)

    # --- rows ---

    def _leave(self, row: int) -> None:
        """Free a row and keep the others dense and in order."""
        leaving, lanes = self._lanes[row], self._lanes
        self.reach = max(self.reach, leaving.reach)
        ids = _held(leaving.sequence)
        if self.prefixes is not None and (target := self.prefixes.keep(ids)) is not None:
            self._cache.move(row, target, len(ids))
        while row < len(lanes) - 1:
            last = row + 1
            while last + 1 < len(lanes) and lanes[last + 1].width == lanes[row + 1].width:
                last += 1
            self._place(lanes[last], last, row)
            row = last
        lanes.pop()

    def _first_of_kind(self, row: int) -> int:
        while row and self._lanes[row - 1].width == self._lanes[row].width:
            row -= 1
        return row

    def _place(self, lane: _Lane, source: int, target: int) -> None:
        self._lanes[target] = lane
        if lane.reach:
            self._cache.move(source, target, lane.reach)


def _held(sequence: Sequence) -> list[int]:
    """The ids whose K/V a row holds."""
    if sequence.length <= len(sequence.prompt):
        return sequence.prompt[: sequence.length]
    return (sequence.prompt + sequence.tokens)[: sequence.length]
