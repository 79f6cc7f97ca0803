"""How many tokens a pass of quadratic_spec gets that is begun before it is known which they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...contract import MAX_BLOCK
from ...plugins.ops import arrange
from .cost import CostCurve

_MOST = 256  # tokens of a pass
FORWARDS = (8, 16, 32, 64, 128, 256, 320, 384, 448, 512, 576, 640, 768, 896, 1024)  # tokens, as graphs have them
_RECENT = 16  # drafts that the choice is made by
_EVERY = 8  # passes of all rows of whose drafts one is looked at, after so many have been
_PRICES = np.array(arrange.PRICES)


def most_tokens(size: int) -> int:
    """Of a pass, where so many are the mean; its row has memory for them."""
    return min(_MOST, MAX_BLOCK + 2 * size)


class AheadSize:
    """Chooses a size by what drafts of late have promised at each price of a token; for one load and length of block.

    Rows that share a forward pay the same price, so that is what one draft gets on average.

    Args:
        rows: that decode, a power of two.
        block: masks of a group.
    """

    def __init__(self, rows: int, block: int) -> None:
        self._rows = rows
        self._block = block
        self._every = _EVERY * rows
        self._met = 0  # drafts, and how many of them have been looked at
        self._drafts = 0
        self._means = np.zeros((3, arrange.LEVELS))  # by price: tokens of the pass, what it brings, `missed`
        self._best: int | None = None
        self._cost: CostCurve | None = None  # by which that has been chosen, if it still holds

    def wants_draft(self) -> bool:
        """Whether the draft that there is now should be looked at."""
        self._met += 1
        return self._drafts < _EVERY or self._met % self._every == 0

    def learn(self, confidence: Sequence[float], lengths: arrange.Lengths) -> None:
        """Take in a draft, whose groups may have these lengths."""
        self._drafts += 1
        self._cost = None
        reached = arrange.reached(confidence)
        draft = arrange.Drafts.of([reached] * len(_PRICES), [lengths] * len(_PRICES), [_MOST] * len(_PRICES))
        heads, masks, chances = draft.at(_PRICES, _PRICES)
        missed = 1 - (chances * _part(masks, lengths)).sum(1) / 2**arrange.BITS
        tokens = (chances * np.arange(1, len(reached) + 1)).sum(1) / 2**arrange.BITS
        new = np.stack([heads + masks.sum(1), tokens, missed])
        self._means += (new - self._means) / min(self._drafts, _RECENT)

    def best(self, cost: CostCurve) -> int | None:
        """The size that promises the most tokens per second, by what forwards cost; None before a draft is known."""
        if cost is not self._cost and self._drafts:
            self._cost = cost
            without = cost.seconds(self._rows * (1 + self._block)) / self._rows
            rates = dict[int, float]()
            for forward in FORWARDS:
                if (size := forward // self._rows) >= arrange.SMALLEST:
                    tokens, missed = (np.interp(size, self._means[0], mean) for mean in self._means[1:])
                    rates[size] = (tokens + missed) / (cost.seconds(forward) / self._rows + missed * without)
            self._best = max(rates, key=rates.__getitem__, default=None)
        return self._best


def _part(masks: np.ndarray, lengths: arrange.Lengths) -> np.ndarray:
    """What groups of so many masks are worth, as a part of the longest."""
    sizes, worth = [0], [0.0]
    for size, rate in lengths:
        worth.append(worth[-1] + (size - sizes[-1]) / rate)
        sizes.append(size)
    parts: np.ndarray = np.interp(masks, sizes, np.array(worth) / (worth[-1] or 1.0))
    return parts
