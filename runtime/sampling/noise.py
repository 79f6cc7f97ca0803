"""Counter-based noise: the same request draws the same tokens whatever else shares its forward.

Gumbel noise is a function of a seed, an absolute position and a token id, and of nothing else, so the autoregressive
pass, the verify pass and the draft all see the same noise at the same position.
"""

from __future__ import annotations

import numpy as np

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
HIGHEST = 22.88  # no noise is larger: -ln(-ln(1 - 0.5 / 2^32)) is 22.8739
LOWEST = -3.14  # and none smaller: -ln(-ln(0.5 / 2^32)) is -3.1300
_SMALL = 8192  # entries of a vocabulary whose noise is drawn for a run of positions: numpy's cost is per call
_RUN = 16  # positions drawn at once
_KEPT_RUNS = 8  # a block of 64 touches five


def philox(seed: int, counter: tuple[np.ndarray, np.ndarray | int, int, int]) -> np.ndarray:
    """Philox 4x32-10 for a 64-bit seed, four words per counter: (n, 4) u32.

    `counter` is its four 32-bit words, the first of them (n,), the second (n,) or one for all. Source: Salmon et al.,
    SC 2011.
    """
    first = counter[0].astype(np.uint64)
    c0, c1 = first, np.broadcast_to(np.asarray(counter[1], np.uint64), first.shape)
    c2, c3 = (np.full_like(first, word) for word in counter[2:])
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (b >> _HALF) ^ c1 ^ np.uint64(k0), b & _LOW, (a >> _HALF) ^ c3 ^ np.uint64(k1), a & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def gumbel(seed: int, position: int, size: int) -> np.ndarray:
    """Gumbel noise for every token id at one position, (size,) f64; token t takes word t % 4 of counter t // 4."""
    return _gumbel(philox(seed, (np.arange(-(-size // 4)), position, 0, 0)).reshape(-1)[:size])


class Noise:
    """The Gumbel noise of one request over a vocabulary of `size` entries."""

    def __init__(self, seed: int, size: int) -> None:
        self._seed = seed
        self._size = size
        self.kept = size <= _SMALL  # whether runs of positions are drawn and kept
        self._runs: dict[int, np.ndarray] = {}  # (_RUN, size) f64 by position // _RUN

    def row(self, position: int) -> np.ndarray:
        """Noise of every token id at one position; (size,) f64."""
        if not self.kept:
            return gumbel(self._seed, position, self._size)
        noise: np.ndarray = self._run(position // _RUN)[position % _RUN]
        return noise

    def at(self, position: int, ids: np.ndarray) -> np.ndarray:
        """Noise of some token ids at one position; ids (n,) -> (n,) f64."""
        if self.kept or 4 * ids.size >= self._size:
            noise: np.ndarray = self.row(position)[ids]
            return noise
        words = philox(self._seed, (ids // 4, position, 0, 0))
        return _gumbel(words[np.arange(ids.size), ids % 4])

    def _run(self, number: int) -> np.ndarray:
        if number not in self._runs:
            while len(self._runs) >= _KEPT_RUNS:
                del self._runs[next(iter(self._runs))]
            counters = -(-self._size // 4)
            positions = np.repeat(np.arange(number * _RUN, (number + 1) * _RUN), counters)
            words = philox(self._seed, (np.tile(np.arange(counters), _RUN), positions, 0, 0))
            self._runs[number] = _gumbel(words.reshape(_RUN, -1)[:, : self._size])
        return self._runs[number]


def _gumbel(words: np.ndarray) -> np.ndarray:
    noise: np.ndarray = -np.log(-np.log((words + 0.5) / 2**32))
    return noise
