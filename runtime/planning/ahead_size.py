"""How many tokens a pass of quadratic_spec gets that is begun before it is known which they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...plugins.ops import arrange
from .cost import CostCurve

_SIZES = (arrange.SMALLEST, 16, 32, 64, 128, 256)  # of tokens, as graphs have them
_RECENT = 16  # drafts that the choice is made by
_EVERY = 8  # passes of all rows of whose drafts one is looked at, after so many have been
_SERVED = 0.9  # of the time a card works while every pass waits for its host (benchmarks/results/gpu_h200.md)


class AheadSize:
    """Chooses a size by what drafts of late have promised with each; for one load and one length of block.

    Args:
        rows: that decode.
        block: masks of a group.
    """

    def __init__(self, rows: int, block: int) -> None:
        self._block = block
        self._every = _EVERY * rows
        self._met = 0  # drafts, and how many of them have been looked at
        self._drafts = 0
        self._best: int | None = None
        self._cost: CostCurve | None = None  # by which that has been chosen, if it still holds
        self._promised = dict.fromkeys(_SIZES, (0.0, 0.0))
        self._planned = 0.0  # tokens per second of passes that the host plans

    def wants_draft(self) -> bool:
        """Whether the draft that there is now should be looked at."""
        self._met += 1
        return self._drafts < _EVERY or self._met % self._every == 0

    def learn(self, confidence: Sequence[float], heads: int, groups: Mapping[int, int], cost: CostCurve) -> None:
        """Take in a draft, and the heads and groups that the host would plan for it."""
        chances = arrange.reached(confidence)
        self._drafts += 1
        self._cost = None
        weight = 1 / min(self._drafts, _RECENT)
        for size, (tokens, missed) in self._promised.items():
            more, most = _promise(chances, *arrange.layout(chances, size, self._block), self._block)
            self._promised[size] = tokens + weight * (more - tokens), missed + weight * (most - missed)
        promise = _promise(chances, heads, groups, self._block)
        drafts = heads > 1 or groups  # where they are looked at they are made
        without = cost.seconds(1 + self._block if drafts else 1)
        rate = _rate(*promise, cost.seconds(heads + sum(groups.values())), without)
        self._planned += weight * (rate - self._planned)

    def best(self, cost: CostCurve) -> int | None:
        """The size that promises the most tokens per second; None where passes that are planned promise more."""
        if cost is not self._cost and self._drafts:
            rates = dict[int, float]()
            for size, promise in self._promised.items():
                seconds = cost.seconds(size)
                rates[size] = _rate(*promise, seconds, seconds)
            best = max(rates, key=rates.__getitem__)
            self._best = best if rates[best] >= _SERVED * self._planned else None
            self._cost = cost
        return self._best


def _promise(chances: Sequence[int], heads: int, groups: Mapping[int, int], block: int) -> tuple[float, float]:
    """The tokens that a pass is likely to bring, and the chance that the draft after it is missed.

    A group that is cut short has a part of a draft.
    """
    chances = [*chances[:heads], 0]
    met = sum((chances[number - 1] - chances[number]) * (size - 1) for number, size in groups.items())
    return sum(chances) / 2**arrange.BITS, 1 - met / (2**arrange.BITS * (block - 1))


def _rate(tokens: float, missed: float, seconds: float, seconds_without: float) -> float:
    """Tokens per second in the long run: after a draft that is missed a pass has one token, and the next draft."""
    return (tokens + missed) / (seconds + missed * seconds_without)
