"""Sampling by counter-based noise.

In: one position's logits, the temperature, the request's seed and the absolute position. Out: one token id. The noise
is a function of (seed, position, token id) and of nothing else, so the same request draws the same tokens whatever
else shares its forward. It is Philox 4x32-10, the generator GPUs use, so a kernel can draw the very same bits. The
surprising fact: adding Gumbel noise to the scaled logits and taking the argmax is an exact sample of the softmax
(Gumbel-max), so no probability is ever normalised.
"""

from __future__ import annotations

import numpy as np

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox(seed: int, counter: tuple[np.ndarray, int, int, int]) -> np.ndarray:
    """Philox 4x32-10 for a 64-bit seed, four words per counter: (n, 4) u32.

    `counter` is its four 32-bit words, the first of them (n,). Source: Salmon et al., SC 2011.
    """
    first = counter[0].astype(np.uint64)
    c0, c1, c2, c3 = (first, *(np.full_like(first, word) for word in counter[1:]))
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (b >> _HALF) ^ c1 ^ np.uint64(k0), b & _LOW, (a >> _HALF) ^ c3 ^ np.uint64(k1), a & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def gumbel(seed: int, position: int, size: int) -> np.ndarray:
    """Gumbel noise for every token id at one position, (size,) f64; token t takes word t % 4 of counter t // 4."""
    words = philox(seed, (np.arange(-(-size // 4)), position, 0, 0)).reshape(-1)[:size]
    return -np.log(-np.log((words + 0.5) / 2**32))


def sample(logits: np.ndarray, temperature: float, seed: int, position: int, mask_id: int) -> int:
    """Draw the token at `position` from softmax(logits / temperature), the mask id left out; logits (V,) f32."""
    scores = logits.astype(np.float64) / temperature + gumbel(seed, position, logits.size)
    scores[mask_id] = -np.inf
    return int(scores.argmax())
