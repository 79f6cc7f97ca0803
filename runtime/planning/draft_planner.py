"""Which block length, and which of the exact modes, gives the most tokens per second.

A wrong guess costs time alone: the modes that are chosen among all emit AR's tokens.
"""

from __future__ import annotations

import itertools
import operator
from typing import Literal, NamedTuple

import numpy as np

from ...contract import MAX_BLOCK
from .pass_costs import PassCosts

ExactMode = Literal["ar", "linear_spec", "quadratic_spec"]
BLOCKS = (2, 4, 8, 16, 32, 64)
_GUESS = 0.8  # chance that a drafted token is kept, before anything is known
_WEIGHT = 4.0  # verifies that a prior is worth
_FORGET = 256.0  # verifies after which older ones count half
_PROBE = 32  # passes of one token after which a short draft looks whether that is still right
_PROBE_BLOCK = 4
_STAY = 8  # how often a plan is taken at most before the next is made, and always one of quadratic_spec: each of its
# passes verifies the draft that the one before it has made
_GROUPED = 32.0  # passes of quadratic_spec that its estimate is worth


class AcceptanceStatistics:
    """How often drafted tokens were verified and kept, by their position in the draft."""

    def __init__(self) -> None:
        self.seen = np.zeros(MAX_BLOCK - 1)  # verified, all positions before being kept
        self.kept = np.zeros(MAX_BLOCK - 1)
        self.quadratic = QuadraticStatistics()

    def add(self, size: int, emitted: int) -> None:
        """A verify of a block of `size` tokens, the first of them certain, that emitted this many."""
        self.seen[: min(emitted, size - 1)] += 1
        self.kept[: emitted - 1] += 1
        if self.seen[0] > _FORGET:
            self.seen *= 0.5
            self.kept *= 0.5

    def add_unseen(self, kept: int, confidences: list[float]) -> None:
        """Tokens of a draft after `kept` others that a verify kept and it did not look at, by their confidences.

        They are left out for being unlikely, so without them a draft would seem better than it is.
        """
        reached = [1.0, *itertools.accumulate(confidences[: MAX_BLOCK - 1 - kept], operator.mul)]
        end = kept + len(reached) - 1
        self.seen[kept:end] += reached[:-1]
        self.kept[kept:end] += reached[1:]

    def chances(self, prior: np.ndarray | float) -> np.ndarray:
        """The chance of each position to be kept if all before it were; prior and result (MAX_BLOCK - 1,) f64."""
        chances: np.ndarray = (self.kept + _WEIGHT * prior) / (self.seen + _WEIGHT)
        return chances

    def pooled(self) -> float:
        """The chance of any position, which stands in for those that nobody has looked at."""
        return float((self.kept.sum() + _WEIGHT * _GUESS) / (self.seen.sum() + _WEIGHT))


class QuadraticStatistics:
    """What passes of budgeted quadratic_spec gave and took, over what was expected of a pass with their block.

    Some leave out their groups, and then the next pass has no draft: how often that is right is known afterwards.
    """

    def __init__(self) -> None:
        self.passes = np.zeros(len(BLOCKS))
        self._sums = np.zeros((2, len(BLOCKS)))  # by block: tokens emitted, and seconds, over those expected

    def add(self, block: int, tokens: float, seconds: float) -> None:
        """A pass that was planned with this block gave and took these parts of what was expected."""
        at = BLOCKS.index(block)
        self.passes[at] += 1
        self._sums[:, at] += tokens, seconds
        if self.passes[at] > _FORGET:
            self.passes[at] *= 0.5
            self._sums[:, at] *= 0.5

    def factors(self) -> list[float]:
        """By which to multiply what is expected of each of `BLOCKS` in tokens per second.

        A block of which little is known is taken to be as the others were.
        """
        usual = (self._sums.sum(axis=1, keepdims=True) + _GROUPED) / (self.passes.sum() + _GROUPED)
        tokens, seconds = (self._sums + _GROUPED * usual) / (self.passes + _GROUPED)
        factors: list[float] = (tokens / seconds).tolist()
        return factors


class Plan(NamedTuple):
    """The next pass or two: a mode, and the length of its block."""

    mode: ExactMode
    size: int


class DraftPlanner:
    """Plans the passes of one request.

    Args:
        costs: seconds of a pass by its tokens.
        engine: the statistics of all requests of the engine. They are the prior, since an answer is often over after
            three verifies, and what this request meets is added to them.
        modes: the modes to choose among.
    """

    def __init__(self, costs: PassCosts, engine: AcceptanceStatistics, modes: tuple[ExactMode, ...]) -> None:
        self._costs = costs
        self._engine = engine
        self._own = AcceptanceStatistics()
        self._modes = modes
        self._passes_without_draft = 0
        self._plan = Plan("ar", 1)  # the last one
        self._stood = 1  # how often it was to be taken
        self._standing = 0  # and is yet
        self._expected = (0.0, 0.0)  # tokens and seconds of the pass that is planned, if it is one of quadratic_spec

    def plan(self) -> Plan:
        """What gives the most tokens per second, if the draft fares as those before it.

        Where passes of late do not tell what a block of twice or half the best length costs, it is that at times; and
        where ar is the best, at times a short draft.
        """
        if not self._standing:
            expected, before = self.expected(), self._plan
            self._plan = self._next(expected)
            self._expected = (float(expected[self._plan.size - 1]), self._costs.curve.seconds(_tokens(self._plan)))
            # One that is chosen again stands longer.
            self._stood = min(2 * self._stood, _STAY) if self._plan == before else 1
            self._standing = _STAY if self._plan.mode == "quadratic_spec" else self._stood
        self._standing -= 1
        self._passes_without_draft = self._passes_without_draft + 1 if self._plan.mode == "ar" else 0
        return self._plan

    def _next(self, expected: np.ndarray) -> Plan:
        best = self._best(expected)
        if best.mode == "ar":
            if self._passes_without_draft >= _PROBE or self._costs.wants(_PROBE_BLOCK):
                best = Plan("linear_spec", _PROBE_BLOCK)
        else:
            at = BLOCKS.index(best.size)
            nearby = (Plan(best.mode, size) for size in (*BLOCKS[at + 1 : at + 2], *BLOCKS[max(at - 1, 0) : at]))
            best = next((other for other in nearby if self._is_news(other)), best)
        return best

    def _is_news(self, plan: Plan) -> bool:
        if plan.mode == "quadratic_spec" and self._engine.quadratic.passes[BLOCKS.index(plan.size)] < _STAY:
            return True
        return self._costs.wants(_tokens(plan))

    def _best(self, expected: np.ndarray) -> Plan:
        """A block costs linear_spec two passes of it; quadratic_spec one of its heads and groups, as `_tokens` says."""
        curve, factors = self._costs.curve, self._engine.quadratic.factors()
        best = Plan("ar", 1)
        best_rate = 1 / curve.seconds(1) if "ar" in self._modes else 0.0
        for size, factor in zip(BLOCKS, factors, strict=True):
            tokens = float(expected[size - 1])
            for mode, rate in (
                ("linear_spec", tokens / (2 * curve.seconds(size))),
                ("quadratic_spec", tokens / curve.seconds(2 * size) * factor),
            ):
                if mode in self._modes and rate > best_rate:
                    best, best_rate = Plan(mode, size), rate
        return best

    def expected(self) -> np.ndarray:
        """Tokens that a verify of a block of 1, 2, .. tokens emits on average; (MAX_BLOCK,) f64."""
        chances = self._own.chances(self._engine.chances(self._engine.pooled()))
        return 1 + np.concatenate([[0.0], np.cumsum(np.cumprod(chances))])

    def learn(self, size: int, emitted: int) -> None:
        """Take in a verify of a block of `size` tokens that emitted this many."""
        self._own.add(size, emitted)
        self._engine.add(size, emitted)

    def learn_quadratic(self, block: int, tokens: int, emitted: int, unseen: list[float]) -> None:
        """Take in a pass of quadratic_spec of so many tokens, planned with this block, that emitted this many.

        `unseen` are the confidences of what its draft had beyond the emitted ones, if it kept all that it looked at.
        """
        for statistics in (self._own, self._engine):
            statistics.add_unseen(emitted - 1, unseen)
        expected, seconds = self._expected
        self._engine.quadratic.add(block, emitted / expected, self._costs.curve.seconds(tokens) / seconds)


def _tokens(plan: Plan) -> int:
    """Of one of its passes; of quadratic_spec about: as many heads as the block has, and one group."""
    return 2 * plan.size if plan.mode == "quadratic_spec" else plan.size
