"""What a pass costs on this machine, by its number of tokens.

The curve's shape decides what speculation is worth: on a CPU 32 tokens cost three to four times as much as one
(benchmarks/results/speed.json), on a GPU about the same.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import time

from ..engines.engine import Engine, causal

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_REPEATS = 5
_LIMIT = 1.0  # seconds for all of it; longer passes are extrapolated


@dataclasses.dataclass(frozen=True)
class CostCurve:
    """Seconds of a forward at some sizes, linear between them and beyond."""

    sizes: tuple[int, ...]
    times: tuple[float, ...]

    def seconds(self, size: int) -> float:
        """Expected seconds of a forward of `size` tokens in one row."""
        return self._table[size] if size < len(self._table) else self._between(size)

    @functools.cached_property
    def _table(self) -> list[float]:
        """Seconds by size up to the largest pass; planning looks up dozens of sizes per pass."""
        return [self._between(size) for size in range(SIZES[-1] + 1)]

    def _between(self, size: int) -> float:
        at = min(max(bisect.bisect_left(self.sizes, size), 1), len(self.sizes) - 1)
        (a, b), (low, high) = self.sizes[at - 1 : at + 1], self.times[at - 1 : at + 1]
        return low + (high - low) * (size - a) / (b - a)


def measure(engine: Engine) -> CostCurve:
    """Time forwards of growing size, the least of some repeats each, until the time for it is used up."""
    cache, times, started = engine.open(1), list[float](), time.perf_counter()
    token = int(engine.info.model.mask_id == 0)
    for size in SIZES:
        if len(times) > 1 and size > engine.info.build.max_seq_len:
            break
        pass_ = causal("verify", [token] * size, 0, predict_all=True)
        cache.forward([pass_])  # binds the shape
        seconds = []
        for _ in range(_REPEATS):
            before = cache.seconds
            cache.forward([pass_])
            seconds.append(cache.seconds - before)
        times.append(max(min(seconds), times[-1] if times else 0.0))
        if len(times) > 1 and time.perf_counter() - started > _LIMIT:
            break
    cache.close()
    return CostCurve(SIZES[: len(times)], tuple(times))


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
