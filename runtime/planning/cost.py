"""What a pass costs on this machine, by its number of tokens.

The curve's shape decides what speculation is worth: on a CPU 32 tokens cost four to five times as much as one
(benchmarks/results/speed.json), on a GPU about the same.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Mapping

import numpy as np

from ...contract import PREFILL_CHUNK
from ...errors import EngineError
from ..engines.engine import Engine
from ..engines.passes import causal

SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 64, 128, 256, 512)
_FIRST = (1, 32)  # measured before any other, however long they take: their ratio is what plans hang on
_TURNS, _LONG_TURNS = 20, 3  # of those up to the longer of these, which plans compare, and of longer ones
_SHORT = 0.5  # of the time for all of it
_LIMIT = 0.05  # seconds, which an answer waits for; sizes for which no time is left lie between or beyond the others


@dataclasses.dataclass(frozen=True)
class CostCurve:
    """Seconds of a forward at some sizes, two at least, linear between them and beyond."""

    sizes: tuple[int, ...]
    times: tuple[float, ...]

    def seconds(self, size: int) -> float:
        """Expected seconds of a forward of `size` tokens in one row."""
        return self.table[size] if size < len(self.table) else self._beyond(size)

    @functools.cached_property
    def table(self) -> list[float]:
        """Seconds by size, up to `PREFILL_CHUNK` tokens at least; planning looks up dozens of sizes per pass."""
        table: list[float] = np.interp(np.arange(self.sizes[-1] + 1), self.sizes, self.times).tolist()
        (a, b), (low, high) = self.sizes[:2], self.times[:2]
        table[:a] = [low + (high - low) * (size - a) / (b - a) for size in range(a)]
        return table + [self._beyond(size) for size in range(len(table), PREFILL_CHUNK + 1)]

    def shared(self, rows: int) -> CostCurve:
        """What a pass costs one of so many rows that share a forward: its part, where all have as many tokens."""
        return CostCurve(SIZES, tuple(self.seconds(rows * size) / rows for size in SIZES))

    def _beyond(self, size: int) -> float:
        (a, b), (low, high) = self.sizes[-2:], self.times[-2:]
        return low + (high - low) * (size - a) / (b - a)


GUESS = CostCurve((1, 32), (0.01, 0.045))  # to begin with where nothing can be measured: as on a CPU


def without_noise(curve: CostCurve) -> CostCurve:
    """The curve without what cannot be: other work on the machine adds to a measured time and never takes away.

    A pass costs no more than a longer one, nor than the passes of half its size that could stand for it.
    """
    times = list(itertools.accumulate(reversed(curve.times), min))[::-1]
    for at in range(1, len(times)):
        times[at] = min(times[at], times[at - 1] * curve.sizes[at] / curve.sizes[at - 1])
    return CostCurve(curve.sizes, tuple(times))


def met(seconds: Mapping[int, float]) -> CostCurve | None:
    """The curve of passes that have run, by their tokens; None of fewer than two sizes."""
    times = {size: seconds[size] for size in SIZES if size in seconds}
    return CostCurve(tuple(times), tuple(times.values())) if len(times) > 1 else None


def clock_of(engine: Engine) -> Callable[[], float]:
    """What an engine's passes are timed by, in seconds: of one on the CPU the thread's processor time, if it says so.

    Other work that the machine does between does not count there.
    """
    clock: Callable[[], float] = getattr(engine, "clock", time.perf_counter)
    return clock


def measure(engine: Engine, limit: float = _LIMIT) -> CostCurve | None:
    """Time forwards of every size in turns, the least of each, until the time for it is used up.

    None if one token alone takes longer than that: then forwards that answer something have to tell what they cost.
    Long ones come last: they throw the weights out of the processor's caches, and a forward of one token takes up to
    three times as long after one, and a dozen forwards to get over it.
    """
    cache, least, started, clock = engine.open(1), dict[int, float](), time.perf_counter(), clock_of(engine)
    token = int(engine.info.model.mask_id == 0)
    longest = max(2, engine.info.build.max_seq_len)
    sizes = [size for size in dict.fromkeys((*_FIRST, *SIZES)) if size <= longest]
    short = [size for size in sizes if size <= max(_FIRST)]
    try:
        for group, turns, until in ((short, _TURNS, _SHORT * limit), (sizes[len(short) :], _LONG_TURNS, limit)):
            for turn, size in itertools.product(range(turns), group):
                if (turn or size not in _FIRST) and len(least) > 1 and time.perf_counter() - started > until:
                    break
                pass_ = causal("verify", [token] * size, 0, predict_all=True)
                cache.forward([pass_])  # binds the shape, and warms what a change of shape has cooled
                before = clock()
                cache.forward([pass_])
                least[size] = min(clock() - before, least.get(size, float("inf")))
                if least[size] > limit and len(least) == 1:
                    return None
    except EngineError:  # other requests have the memory that longer passes need
        if len(least) < 2:
            raise
    finally:
        cache.close()
    measured = sorted(least.items())
    return without_noise(CostCurve(tuple(size for size, _ in measured), tuple(seconds for _, seconds in measured)))


@functools.lru_cache(maxsize=4096)
def split(sizes: tuple[int, ...], cost: CostCurve) -> list[int]:
    """Where to cut neighbouring rows of these sizes into forwards so that they take the least time together.

    A forward of some rows costs what one row of all its tokens costs, padding included. Returned are the ends of the
    forwards.
    """
    best: list[tuple[float, list[int]]] = [(0.0, [])]
    for end in range(1, len(sizes) + 1):
        widest = 0
        cheapest: tuple[float, list[int]] = (float("inf"), [])
        for start in range(end - 1, -1, -1):
            widest = max(widest, sizes[start])
            spent = best[start][0] + cost.seconds(widest * (end - start))
            if spent < cheapest[0]:
                cheapest = (spent, [*best[start][1], end])
        best.append(cheapest)
    return best[-1][1]
