"""What passes cost by what they have cost: a prior curve, corrected by the passes that really ran.

Only the ratios of costs matter to a plan, so what disturbs all sizes alike (other work, a longer context) may pass
by. Figures of single sizes are what must be right, and those that no pass has met lately are asked for at times.

Where many rows share a forward, a plan reckons with its row's part of that, which no longer is next to nothing for a
drafted token.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import math
import time
from collections.abc import Callable

import numpy as np

from .ahead_size import AheadSize
from .cost import SIZES, CostCurve, without_noise

_KEPT = 384  # passes
_HALF_LIFE = 128  # passes after which one counts half, so that a size that runs no more follows the others
_LOWER = (0.05, 0.35)  # of the passes of a size, in the order of their seconds
_TRUST = 0.5  # passes near a size that what passes far from it say is worth
_GUESS = 0.02  # passes at a size that the prior is worth
_FAR = 2.0**20  # a pass of twice the size says as much about a size as this part of one of the size itself
_FARTHEST = 16.0  # square of octaves; 2.0**-1074 is the least weight that there is
_WIDE = 8.0  # and where none has run near one of twice the size this part of one of the size itself
_REFIT = 8  # passes after which the curve is made anew, or half of those that it is made of
_GAP = 6  # passes between two that are taken to learn what they cost, where that has never been known
_GAP_OF_KNOWN = 256  # where it has
_KNOWN = 3.0  # passes of about a size that make its cost known
_HOST_KEPT = 12  # figures that one of what the host takes is made of, and those that will do
_HOST_FEW = 4


class HostCosts:
    """What a way of decoding takes beside its forwards: planning a block, choosing tokens, making passes.

    Rows that share a forward take it one after the other, each a little less than one alone, whose code has to come
    into the processor's caches after every forward.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, int], collections.deque[float]] = {}

    def learn(self, way: str, seconds: float, rows: int = 1) -> None:
        """Take in what a block took each of so many rows."""
        first = collections.deque([seconds], maxlen=_HOST_KEPT)
        kept = self._kept.setdefault((way, rows), first)  # never empty, for other threads may look
        if kept is not first:
            kept.append(seconds)

    def seconds(self, way: str, rows: int = 1) -> float:
        """Of a block; what so many rows have hardly met takes the least that it or else any other way has taken.

        Of figures the quicker third counts, for other work only adds.
        """
        kept = self._kept.get((way, rows), ())
        if len(kept) >= _HOST_FEW:
            return sorted(kept)[len(kept) // 3]
        of_way = [min(kept) for (of, _), kept in list(self._kept.items()) if of == way]
        return min(of_way or map(min, self._kept.values()), default=0.0)


class Load:
    """How many rows decode side by side in a batch, as plans reckon with it.

    To the nearest power of two: parts of a forward hardly differ in between, and a new plan has to be made less often.
    """

    def __init__(self) -> None:
        self.rows = 1
        # Tokens and rows of the forward that has ended last, if it was padded to its longest row.
        self.padded: tuple[int, int] | None = None
        self.ahead = False  # whether passes may be begun before it is known what those before them give
        self._sizes: dict[tuple[int, int], AheadSize] = {}

    def size_of(self, block: int) -> AheadSize:
        """What chooses sizes of passes of quadratic_spec, with groups of so many masks."""
        if (size := self._sizes.get((self.rows, block))) is None:
            size = self._sizes[self.rows, block] = AheadSize(self.rows, block)
        return size

    def take(self, running: int) -> None:
        """Take in how many rows run now."""
        self.rows = 1 << round(math.log2(running)) if running > 1 else 1


class PassCosts:
    """Learns what passes cost.

    Args:
        prior: the curve to begin with, or what makes it when a cost is first asked for.
        clock: what costs are read from, in seconds.
    """

    def __init__(
        self, prior: CostCurve | Callable[[], CostCurve], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.clock = clock
        self.host = HostCosts()
        self.spent = 0.0  # seconds of all forwards learned, by the curve, and of making curves
        self._make_prior = prior
        self._prior: CostCurve | None = None
        self._curve: CostCurve | None = None
        self._shares: dict[int, tuple[CostCurve, CostCurve]] = {}  # by rows, each with the curve it is made of
        self._met: collections.deque[tuple[int, float]] = collections.deque(maxlen=_KEPT)
        self._before = 0  # tokens of the last forward
        self._passes = 0
        self._learned = 0
        self._fitted = 0
        self._probed = 0
        self._uncounted: collections.deque[int] = collections.deque(maxlen=_KEPT)  # sizes of passes since `_count`
        self._evidence = [0.0] * len(SIZES)
        self._ever = [0] * len(SIZES)

    @property
    def curve(self) -> CostCurve:
        """Seconds of a pass by its tokens, by what is known now."""
        if self._curve is None:
            prior = self._make_prior() if callable(self._make_prior) else self._make_prior
            self._prior = self._curve = without_noise(prior)
        if self._learned - self._fitted >= max(_REFIT, len(self._met) // 2):
            before = self.clock()
            self._fit()
            self.spent += self.clock() - before
        return self._curve

    def share(self, rows: int) -> CostCurve:
        """Seconds that a pass costs one of so many rows that share a forward."""
        curve = self.curve
        if rows == 1:
            return curve
        made_of, share = self._shares.get(rows, (None, curve))
        if made_of is not curve:
            share = curve.shared(rows)
            self._shares[rows] = curve, share
        return share

    @property
    def passes(self) -> int:
        """Forwards so far."""
        return self._passes

    def begin(self, curve: CostCurve) -> None:
        """Forget what passes have cost so far, and begin with this curve."""
        self._make_prior, self._prior, self._curve = curve, None, None
        self._met.clear()
        self._before = self._passes = self._learned = self._fitted = self._probed = 0
        self._uncounted.clear()
        self._evidence = [0.0] * len(SIZES)
        self._ever = [0] * len(SIZES)

    def learn(self, size: int, seconds: float) -> None:
        """Take in a forward of `size` tokens, padding included, that has predicted all of them.

        After a longer one the processor's caches hold less of the weights, and a forward of 4 tokens was seen to take
        1.6 times what it takes after others of its size. So it says nothing of the size.
        """
        if size >= self._before:
            self._met.append((size, seconds))
            self._uncounted.append(size)
            self._learned += 1
        self._before = size
        self._passes += 1
        # What this one took beyond its size's cost is taken for the host's: passes of quadratic_spec take longer.
        self.spent += seconds if self._curve is None else self._curve.seconds(size)

    def pass_over(self, seconds: float) -> None:
        """Take note of a forward that says nothing of what passes cost; it is no time of the host's."""
        self._passes += 1
        self.spent += seconds

    def wants(self, size: int) -> bool:
        """Whether a pass of `size` tokens should be taken for what it would teach; if so it is expected to follow."""
        knot = _knot(size)
        if not self._is_due(knot):  # nearly always, and what has not been counted yet makes no pass due
            return False
        self.curve  # noqa: B018  (brings the evidence up to date)
        self._count()
        if not self._is_due(knot):
            return False
        self._probed = self._passes
        return True

    def _is_due(self, knot: int) -> bool:
        """Whether too little is known of passes about there, and the last one that was taken for that is long ago."""
        gap = _GAP if self._ever[knot] < _KNOWN else _GAP_OF_KNOWN
        return self._evidence[knot] < _KNOWN and self._passes - self._probed >= gap

    def _count(self) -> None:
        """Take the passes since the last time for evidence."""
        with contextlib.suppress(IndexError):  # until there is none; other threads may count too
            while True:
                knot = _knot(self._uncounted.popleft())
                self._evidence[knot] += 1
                self._ever[knot] += 1

    def _fit(self) -> None:
        """The prior times a correction by the passes of about each size, or else by those of sizes further off."""
        prior = self._prior
        assert prior is not None
        self._count()
        self._fitted = self._learned
        met, seconds = np.array(tuple(self._met)).T
        sizes, which = np.unique(met, return_inverse=True)
        off = np.log(seconds / np.array([prior.seconds(int(size)) for size in sizes])[which])  # (n,) f64
        recent = 0.5 ** (np.arange(len(off))[::-1] / _HALF_LIFE)  # (n,)
        apart = np.abs(np.log2(SIZES)[:, None] - np.log2(sizes))  # (knots, sizes): octaves
        corrections = np.zeros(len(SIZES))
        for weights, trust in ((_WIDE**-apart, _GUESS), (_FAR ** -np.minimum(apart**2, _FARTHEST), _TRUST)):
            near = recent * weights[:, which]  # (knots, n)
            known = near.sum(axis=1) / trust
            corrections = (known * _lower_mean(off, near) + corrections) / (known + 1)
        logs = np.log([prior.seconds(size) for size in SIZES]) + corrections
        self._curve = CostCurve(SIZES, tuple(np.exp(_rising(logs, known + 1)).tolist()))
        knots = np.array([_knot(int(size)) for size in sizes])[which]
        self._evidence = np.bincount(knots, recent, len(SIZES)).tolist()


@functools.lru_cache(maxsize=1024)
def _knot(size: int) -> int:
    """The index in `SIZES` of the one nearest to a size."""
    return min(range(len(SIZES)), key=lambda at: abs(math.log2(SIZES[at] / size)))


def _lower_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The weighted mean of the lower part, without the lowest; values (n,), weights (m, n), result (m,).

    Other work on the machine only adds, and meets nearly every long pass and few short ones: a mean or a median would
    take long passes for dearer than they are.
    """
    order = np.argsort(values)
    ends = np.cumsum(weights[:, order], axis=1)
    whole = ends[:, -1:]
    low, high = (share * whole for share in _LOWER)
    kept = np.diff(np.clip(ends, low, high), axis=1, prepend=low)
    mean: np.ndarray = kept @ values[order] / (high - low)[:, 0]
    return mean


def _rising(values: np.ndarray, weights: np.ndarray) -> list[float]:
    """The nearest values that never fall (weighted isotonic regression): what falls is replaced by its mean."""
    pools: list[tuple[float, float, int]] = []  # mean, weight, number of values
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            before, other, number = pools.pop()
            mean = (mean * weight + before * other) / (weight + other)
            weight, count = weight + other, count + number
        pools.append((mean, weight, count))
    return [mean for mean, _, count in pools for _ in range(count)]
