"""Sampling by counter-based noise.

In: one position's logits, the temperature, the request's seed and the absolute position. Out: one token id. The noise
is a function of (seed, position, token id) and of nothing else, so the same request draws the same tokens whatever else
shares its forward. The surprising fact: adding Gumbel noise to the scaled logits and taking the argmax is an exact
sample of the softmax (Gumbel-max), so no probability is ever normalised.
"""

from __future__ import annotations

import numpy as np


def gumbel(seed: int, position: int, size: int) -> np.ndarray:
    """Gumbel noise for every token id at one position, (size,) f64."""
    counter = np.array([0, 0, 0, position], np.uint64)  # the low words count within the position
    uniform = np.random.Generator(np.random.Philox(key=seed, counter=counter)).random(size)
    return -np.log(-np.log(np.maximum(uniform, np.finfo(np.float64).tiny)))


def sample(logits: np.ndarray, temperature: float, seed: int, position: int, mask_id: int) -> int:
    """Draw the token at `position` from softmax(logits / temperature), the mask id left out; logits (V,) f32."""
    scores = logits.astype(np.float64) / temperature + gumbel(seed, position, logits.size)
    scores[mask_id] = -np.inf
    return int(scores.argmax())
