"""Probabilities out of logits."""

from __future__ import annotations

import numpy as np


def probability(logits: np.ndarray, tokens: list[int], mask_id: int) -> np.ndarray:
    """The model's own probability of one token per row, the mask id left out; logits (n, V) f32 -> (n,) f32."""
    scores = _without_mask(logits, mask_id)
    best = scores.max(1)
    weights = np.exp(scores - best[:, None]).sum(1)
    found: np.ndarray = np.exp(scores[np.arange(len(tokens)), tokens] - best) / weights
    return found


def entropies(logits: np.ndarray, mask_id: int) -> np.ndarray:
    """Entropy in nats of the model's distribution per row, the mask id left out; logits (n, V) f32 -> (n,) f64."""
    scores = _without_mask(logits, mask_id).astype(np.float64)
    scores -= scores.max(1, keepdims=True)
    weights = np.exp(scores)
    total = weights.sum(1)
    scores[:, mask_id] = 0  # 0 * -inf
    found: np.ndarray = np.log(total) - (weights * scores).sum(1) / total
    return found


def _without_mask(logits: np.ndarray, mask_id: int) -> np.ndarray:
    scores = logits.copy()
    scores[:, mask_id] = -np.inf
    return scores
