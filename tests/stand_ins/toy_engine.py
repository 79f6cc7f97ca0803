"""An engine without a model, for tests of what lies above it: exact, fast, and strict about the contract.

A token is a hash of precisely the ids and positions that its query sees. A slot remembers what was written to it, so a
row that is moved short, a prefix that is copied wrong or a query that sees another row's K/V changes the answer. Two of
three tokens follow from the beginning of the text alone, so that drafts are often right.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

import nemodiff
from nemodiff.contract import PAGE
from nemodiff.engine_info import EngineInfo
from nemodiff.runtime.engines.grouping import Arranged, Arrangement
from nemodiff.runtime.engines.pages import Pages
from nemodiff.runtime.engines.passes import Following, Pass, Prediction, arrange, read_only

_STEPS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F))
START = 12  # positions that every token depends on


def toy(engine: nemodiff.LoadedEngine) -> nemodiff.LoadedEngine:
    """The engine with its backend replaced."""
    return dataclasses.replace(engine, backend=ToyEngine(engine.info))


class ToyEngine:
    """See `nemodiff.runtime.engines.engine.Engine`; counts its open caches, and fails in the forwards `fails_at`."""

    samples = False
    pages: Any = None

    def __init__(self, info: EngineInfo) -> None:
        self.info = info
        self.open_caches = 0
        self.forwards = 0
        self.fails_at: set[int] = set()
        self.said: dict[int, int] = {}  # tokens at positions where it is no hash

    def open(self, rows: int) -> ToyCache:
        self.open_caches += 1
        return ToyCache(self, rows)


class ToyCache:
    """See `nemodiff.runtime.engines.engine.Cache`."""

    def __init__(self, engine: ToyEngine, rows: int) -> None:
        self._engine = engine
        self._closed = False
        self.written = np.full((rows, 4096, 2), -1, np.int64)  # id and position by row and slot

    def forward(self, passes: Sequence[Pass], first: int = 0) -> list[Prediction]:
        assert not self._closed
        assert 0 <= first < first + len(passes) <= len(self.written)
        self._engine.forwards += 1
        if self._engine.forwards in self._engine.fails_at:
            raise RuntimeError("the device has gone\nand more lines")
        return [self._row(self.written[first + i], p) for i, p in enumerate(passes)]

    def move(self, source: int, target: int, slots: int) -> None:
        assert not self._closed
        assert source != target
        self.written[target] = -1  # what is not copied may be anything
        self.written[target, :slots] = self.written[source, :slots]

    def free(self, row: int) -> None:
        assert not self._closed
        self.written[row] = -1

    def close(self) -> None:
        assert not self._closed
        self._closed = True
        self._engine.open_caches -= 1

    def _row(self, slots: np.ndarray, p: Pass) -> Prediction:
        model = self._engine.info.model
        slots[p.write_at : p.write_at + p.ids.size] = np.stack([p.ids, p.pos], axis=1)
        token = np.empty(p.predicted.size, np.int32)
        confidence = np.empty(p.predicted.size, np.float32)
        logits = np.zeros((p.predicted.size, model.vocab_size), np.float32) if p.logits else None
        for i, row in enumerate(p.predicted.tolist()):
            prefix, begin, end = p.visible[row].tolist()
            seen = np.concatenate([slots[:prefix], slots[max(prefix, begin) : max(prefix, end)]])
            assert (seen >= 0).all(), "a query sees a slot that nobody has written"
            position = int(p.pos[row]) + (p.ids[row] != model.mask_id)  # of the token that is predicted
            known = seen[(seen[:, 0] != model.mask_id) & (seen[:, 1] < position)]
            if _mixed(np.array([[position, 7]])) % 3:
                known = known[known[:, 1] < START]
            value = _mixed(np.concatenate([known, [[position, -1]]]))
            token[i] = model.eos_ids[0] if value % 41 == 0 else 130 + value % 600
            token[i] = self._engine.said.get(position, token[i])
            confidence[i] = (value >> 16) % 1000 / 1000
            if logits is not None:  # two tokens that a sample may well be
                logits[i, [130 + (value >> 8) % 600, token[i]]] = (9, 10)
        next_ids = self._commit(p.ids[p.predicted], token, confidence, p.threshold)
        return Prediction(
            read_only(token),
            read_only(confidence),
            read_only(next_ids),
            None if logits is None else read_only(logits),
        )

    def _commit(self, ids: np.ndarray, token: np.ndarray, confidence: np.ndarray, threshold: float) -> np.ndarray:
        masked = ids == self._engine.info.model.mask_id
        if not masked.any():
            return ids.copy()
        chosen = masked & (confidence >= np.float32(threshold))
        chosen[int(np.where(masked, confidence, -1).argmax())] = True
        return np.where(chosen, token, ids)


class PagedToyEngine(ToyEngine):
    """The same with rows of pages; see `nemodiff.runtime.engines.engine.PagedCache`.

    `late`: a forward runs when it is finished, as on a CPU, not when it is launched. `ahead`: one may follow another
    that has not ended.
    """

    def __init__(self, info: EngineInfo, pages: int, *, late: bool = False, ahead: bool = False) -> None:
        super().__init__(info)
        self.ahead = ahead
        self.followed = collections.Counter[str]()  # passes that were begun ahead, by kind
        self.begun_ahead = 0  # forwards
        self.pages = Pages(pages, 400, 64)
        self.late = late
        self.pool = np.full((pages + 1, PAGE, 2), -1, np.int64)  # id and position by page and slot
        self.flight: ToyFlight | None = None

    def open(self, rows: int) -> PagedToyCache:
        numbers = self.pages.open(rows)
        assert numbers is not None
        self.open_caches += 1
        return PagedToyCache(self, numbers)

    def wait(self) -> None:
        if self.flight is not None:
            self.flight.finish()


class PagedToyCache(ToyCache):
    most_tokens = 40

    def __init__(self, engine: PagedToyEngine, rows: list[int]) -> None:
        self._engine: PagedToyEngine = engine
        self._closed = False
        self.rows = rows

    @property
    def ahead(self) -> bool:
        return self._engine.ahead

    def launch(self, passes: Sequence[Pass], rows: Sequence[int]) -> ToyFlight:
        assert not self._closed
        assert len(set(rows)) == len(rows)
        engine = self._engine
        engine.wait()
        engine.forwards += 1
        if engine.forwards in engine.fails_at:
            raise RuntimeError("the device has gone\nand more lines")
        engine.flight = ToyFlight(self, passes, [self.rows[row] for row in rows])
        if not engine.late:
            engine.flight.run()
        return engine.flight

    def follow(
        self, flight: ToyFlight, passes: Sequence[Following], rows: Sequence[int], fed: Sequence[int]
    ) -> ToyFlight | None:
        engine = self._engine
        if not engine.ahead or engine.flight is not flight:
            return None
        known = [flight.peek()[number] for number in fed]
        engine.begun_ahead += 1
        for following in passes:
            engine.followed[following.pass_.kind] += 1
        budget = sum(p.pass_.ids.size for p in passes if isinstance(p.feed, Arrangement))
        made = arrange(passes, known, budget)
        following = self.launch([p.after(*given) for p, *given in zip(passes, known, made, strict=True)], rows)
        following.made = made
        return following

    def forward(self, passes: Sequence[Pass], first: int = 0) -> list[Prediction]:
        rows = range(first, first + len(passes))
        for row, p in zip(rows, passes, strict=True):
            assert self.reserve(row, p.write_at, p.write_at + p.ids.size)
        return self.launch(passes, rows).finish()

    def reserve(self, row: int, begin: int, end: int) -> bool:
        pages, pool, number = self._engine.pages, self._engine.pool, self.rows[row]
        before = set(pages.table[number].tolist())
        copies = pages.reserve(number, begin, end)
        for page in set(pages.table[number].tolist()) - before:
            pool[page] = -1  # what it held before may be anything
        for source, target in copies or ():
            pool[target] = pool[source]
        return copies is not None

    def share(self, source: int, target: int, slots: int) -> int:
        return self._engine.pages.share(self.rows[source], self.rows[target], slots)

    def move(self, source: int, target: int, slots: int) -> None:
        assert self.share(source, target, slots) == slots

    def free(self, row: int) -> None:
        if self._engine.late:
            self._engine.wait()
        self._engine.pages.drop(self.rows[row])

    def set_spare(self, row: int) -> None:
        self._engine.pages.set_spare(self.rows[row])

    def close(self) -> None:
        super().close()
        self._engine.wait()
        self._engine.pages.close(self.rows)

    def run(self, number: int, p: Pass) -> Prediction:
        pages, pool = self._engine.pages, self._engine.pool
        written = np.arange(p.write_at, p.write_at + p.ids.size)
        assert pages.table[number, written // PAGE].all(), "a pass writes where its row has no page"
        slots = pool[pages.table[number]].reshape(-1, 2)
        prediction = self._row(slots, p)
        pool.reshape(-1, 2)[pages.slots_of(number, written)] = slots[written]
        return prediction


class ToyFlight:
    def __init__(self, cache: PagedToyCache, passes: Sequence[Pass], rows: list[int]) -> None:
        self._cache = cache
        self._work = list(zip(rows, passes, strict=True))
        self._predictions: list[Prediction] | None = None
        self.made = list[Arranged | None]()
        self.seconds = 1e-3

    def arranged(self) -> list[Arranged | None]:
        return self.made

    def run(self) -> None:
        self._predictions = [self._cache.run(number, p) for number, p in self._work]

    def finish(self) -> list[Prediction]:
        if self._cache._engine.flight is self:
            self._cache._engine.flight = None
        return self.peek()

    def peek(self) -> list[Prediction]:
        if self._predictions is None:
            self.run()
        assert self._predictions is not None
        return self._predictions


def _mixed(pairs: np.ndarray) -> int:
    """A hash of a set of (id, position), order aside; pairs (n, 2) i64."""
    with np.errstate(over="ignore"):
        words = pairs.astype(np.uint64)
        each = (words[:, 0] + np.uint64(1)) * _STEPS[0] ^ (words[:, 1] + np.uint64(3)) * _STEPS[1]
        each = (each ^ each >> np.uint64(29)) * _STEPS[1]
        total = each.sum(dtype=np.uint64)
        return int((total ^ total >> np.uint64(31)) >> np.uint64(3))
