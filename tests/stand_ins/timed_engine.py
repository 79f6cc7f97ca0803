"""An engine without a model, in whose time a forward takes what a curve says, and whose drafts are right at a chance.

What a token is and whether a draft has it right are functions of its position alone, so all modes meet the same drafts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

import nemodiff
from nemodiff.engine_info import EngineInfo
from nemodiff.runtime.engines.grouping import Arranged, Arrangement
from nemodiff.runtime.engines.pages import Pages
from nemodiff.runtime.engines.passes import Following, Pass, Prediction, arrange
from nemodiff.runtime.engines.torch.flat import rounded_tokens
from nemodiff.runtime.planning.cost import CostCurve
from nemodiff.runtime.planning.draft_planner import AcceptanceStatistics
from nemodiff.runtime.planning.pass_costs import PassCosts

EASY, HARD = 0.99, 0.5  # confidence of a draft, and the share of positions where it is right
_POSITIONS = 2**15


def timed(
    engine: nemodiff.LoadedEngine,
    curve: CostCurve,
    hard: float,
    *,
    paged: bool = True,
    host: float = 0.0,
    ahead: bool = False,
    graphs: bool = False,
) -> nemodiff.LoadedEngine:
    """The engine with its backend replaced, and plans that know the curve.

    hard: share of positions that are hard. paged: whether rows share forwards unpadded, or side by side and padded.
    host: seconds that every pass of a row takes beside the forward, unless it is begun `ahead`. graphs: a forward has
    as many tokens as graphs have.
    """
    backend = TimedEngine(engine.info, curve, hard, paged=paged, host=host, ahead=ahead, graphs=graphs)
    copy = dataclasses.replace(engine, backend=backend)
    vars(copy)["cost"] = PassCosts(curve, clock=backend.clock)
    vars(copy)["acceptance"] = AcceptanceStatistics()
    return copy


class TimedEngine:
    """See `nemodiff.runtime.engines.engine.Engine`."""

    samples = False

    def __init__(
        self,
        info: EngineInfo,
        curve: CostCurve,
        hard: float,
        *,
        paged: bool,
        host: float,
        ahead: bool,
        graphs: bool,
    ) -> None:
        self.info, self.curve, self.host, self.ahead, self.graphs = info, curve, host, ahead, graphs
        self.pages: Any = Pages(4096, 400, 64) if paged else None
        self.now = 0.0
        self.decoding = 0.0  # seconds of forwards without a prompt, and of what the host takes for them
        rng = np.random.default_rng(1)
        self.true = rng.integers(200, 700, _POSITIONS).astype(np.int32)
        self.sure = np.where(rng.random(_POSITIONS) < hard, HARD, EASY).astype(np.float32)
        self.drafted = self.true + (rng.random(_POSITIONS) > self.sure).astype(np.int32)

    def clock(self) -> float:
        return self.now

    def open(self, rows: int) -> TimedCache:
        return TimedCache(self, self.pages.open(rows) if self.pages is not None else None)


class TimedCache:
    """See `nemodiff.runtime.engines.engine.PagedCache`."""

    most_tokens = 2048
    ahead = False

    def __init__(self, engine: TimedEngine, rows: list[int] | None) -> None:
        self._engine = engine
        self._rows = rows
        self.ahead = engine.ahead

    def forward(self, passes: Sequence[Pass], first: int = 0) -> list[Prediction]:
        return self._run(passes, len(passes) * max(p.ids.size for p in passes)).finish()

    def launch(self, passes: Sequence[Pass], rows: Sequence[int]) -> TimedFlight:
        return self._run(passes, self._tokens(passes))

    def follow(
        self, flight: TimedFlight, passes: Sequence[Following], rows: Sequence[int], fed: Sequence[int]
    ) -> TimedFlight | None:
        if not self.ahead:
            return None
        feeding = [flight.finish()[number] for number in fed]
        fixed = sum(p.pass_.ids.size for p in passes if not isinstance(p.feed, Arrangement))
        tokens = self._tokens([p.pass_ for p in passes])
        made = arrange(passes, feeding, tokens - fixed)
        known = [p.after(*given) for p, *given in zip(passes, feeding, made, strict=True)]
        running = self._run(known, tokens, host=0.0)
        running.made = made
        return running

    def _tokens(self, passes: Sequence[Pass]) -> int:
        tokens = sum(p.ids.size for p in passes)
        return rounded_tokens(tokens) if self._engine.graphs else tokens

    def _run(self, passes: Sequence[Pass], computed: int, host: float | None = None) -> TimedFlight:
        engine = self._engine
        seconds = engine.curve.seconds(computed)
        took = seconds + (engine.host if host is None else host) * len(passes)
        engine.now += took
        if all(p.kind != "prefill" for p in passes):
            engine.decoding += took
        return TimedFlight(seconds, [self._row(p) for p in passes])

    def _row(self, p: Pass) -> Prediction:
        engine = self._engine
        ids, pos = p.ids[p.predicted], p.pos[p.predicted]
        is_mask = ids == engine.info.model.mask_id
        token = np.where(is_mask, engine.drafted[pos], engine.true[pos + 1]).astype(np.int32)
        confidence = np.where(is_mask, engine.sure[pos], 1).astype(np.float32)
        return Prediction(token, confidence, np.where(is_mask, token, ids).astype(np.int32), None)

    def reserve(self, row: int, begin: int, end: int) -> bool:
        return True

    def share(self, source: int, target: int, slots: int) -> int:
        return 0

    def move(self, source: int, target: int, slots: int) -> None:
        pass

    def free(self, row: int) -> None:
        pass

    def close(self) -> None:
        if self._rows is not None:
            self._engine.pages.close(self._rows)


class TimedFlight:
    """See `nemodiff.runtime.engines.engine.Flight`; it has ended."""

    def __init__(self, seconds: float, predictions: list[Prediction]) -> None:
        self.seconds = seconds
        self.made = list[Arranged | None]()
        self._predictions = predictions

    def finish(self) -> list[Prediction]:
        return self._predictions

    def arranged(self) -> list[Arranged | None]:
        return self.made
