"""Which block length, and which of the exact modes, gives the most tokens per second.

A wrong guess costs time alone: the modes that are chosen among all emit AR's tokens.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from ...contract import MAX_BLOCK
from .cost import CostCurve

ExactMode = Literal["ar", "linear_spec", "quadratic_spec"]
BLOCKS = (2, 4, 8, 16, 32, 64)
_GUESS = 0.8  # chance that a drafted token is kept, before anything is known
_WEIGHT = 4.0  # verifies that a prior is worth
_FORGET = 256.0  # verifies after which older ones count half
_PROBE = 32  # passes of one token after which a short draft looks whether that is still right
_PROBE_BLOCK = 4


class AcceptanceStatistics:
    """How often drafted tokens were verified and kept, by their position in the draft."""

    def __init__(self) -> None:
        self.seen = np.zeros(MAX_BLOCK - 1)  # verified, all positions before being kept
        self.kept = np.zeros(MAX_BLOCK - 1)

    def add(self, size: int, emitted: int) -> None:
        """A verify of a block of `size` tokens, the first of them certain, that emitted this many."""
        self.seen[: min(emitted, size - 1)] += 1
        self.kept[: emitted - 1] += 1
        if self.seen[0] > _FORGET:
            self.seen *= 0.5
            self.kept *= 0.5

    def chances(self, prior: np.ndarray | float) -> np.ndarray:
        """The chance of each position to be kept if all before it were; prior and result (MAX_BLOCK - 1,) f64."""
        chances: np.ndarray = (self.kept + _WEIGHT * prior) / (self.seen + _WEIGHT)
        return chances

    def pooled(self) -> float:
        """The chance of any position, which stands in for those that nobody has looked at."""
        return float((self.kept.sum() + _WEIGHT * _GUESS) / (self.seen.sum() + _WEIGHT))


class Plan(NamedTuple):
    """The next pass or two: a mode, and the length of its block."""

    mode: ExactMode
    size: int


class DraftPlanner:
    """Plans the passes of one request.

    Args:
        cost: seconds of a pass by its tokens.
        engine: the statistics of all requests of the engine. They are the prior, since an answer is often over after
            three verifies, and what this request meets is added to them.
        modes: the modes to choose among.
    """

    def __init__(self, cost: CostCurve, engine: AcceptanceStatistics, modes: tuple[ExactMode, ...]) -> None:
        self._engine = engine
        self._own = AcceptanceStatistics()
        self._modes = modes
        self._passes_without_draft = 0
        self._seconds = {size: cost.seconds(size) for size in (1, *BLOCKS, 2 * BLOCKS[-1])}

    def plan(self) -> Plan:
        """What gives the most tokens per second, if the draft fares as those before it.

        A block costs linear_spec two passes of it, and quadratic_spec about one of twice its length: the heads, and one
        group after them.
        """
        expected, seconds_of = self.expected(), self._seconds
        best = Plan("ar", 1)
        best_rate = 1 / seconds_of[1] if "ar" in self._modes else 0.0
        for size in BLOCKS:
            tokens = float(expected[size - 1])
            for mode, seconds in (("linear_spec", 2 * seconds_of[size]), ("quadratic_spec", seconds_of[2 * size])):
                if mode in self._modes and tokens / seconds > best_rate:
                    best, best_rate = Plan(mode, size), tokens / seconds
        if best.mode == "ar":
            self._passes_without_draft += 1
            if self._passes_without_draft % _PROBE == 0:
                return Plan("linear_spec", _PROBE_BLOCK)
        return best

    def expected(self) -> np.ndarray:
        """Tokens that a verify of a block of 1, 2, .. tokens emits on average; (MAX_BLOCK,) f64."""
        chances = self._own.chances(self._engine.chances(self._engine.pooled()))
        return 1 + np.concatenate([[0.0], np.cumsum(np.cumprod(chances))])

    def learn(self, size: int, emitted: int) -> None:
        """Take in a verify of a block of `size` tokens that emitted this many."""
        self._own.add(size, emitted)
        self._engine.add(size, emitted)
