"""Probabilities out of logits, over the whole vocabulary or without the mask id, which no token can be."""

from __future__ import annotations

import numpy as np


def probability(logits: np.ndarray, tokens: list[int], mask_id: int | None = None) -> np.ndarray:
    """The model's probability of one token per row; logits (n, V) f32 -> (n,) f32."""
    scores, total = _shifted(logits, mask_id)
    probabilities: np.ndarray = np.exp(scores[np.arange(len(tokens)), tokens]) / total
    return probabilities


def chance(scores: np.ndarray, entry: int) -> float:
    """The probability of one of these scores (V,) f64, of which some are -inf; 0 if all are."""
    best = scores.max()
    return float(np.exp(scores[entry] - best) / np.exp(scores - best).sum()) if best > -np.inf else 0.0


def entropies(logits: np.ndarray, mask_id: int) -> np.ndarray:
    """Entropy of the model's distribution per row, in nats; logits (n, V) f32 -> (n,) f64."""
    scores, total = _shifted(logits.astype(np.float64), mask_id)
    weights = np.exp(scores)
    scores[:, mask_id] = 0  # 0 * -inf is no number
    nats: np.ndarray = np.log(total) - (weights * scores).sum(1) / total
    return nats


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural logarithms of the probabilities; logits (n, V) -> (n, V) of the same dtype."""
    scores, total = _shifted(logits, None)
    scores -= np.log(total)[:, None]
    return scores


def _shifted(logits: np.ndarray, mask_id: int | None) -> tuple[np.ndarray, np.ndarray]:
    """A copy of the logits whose highest per row is 0, (n, V), and the sum of their exponentials, (n,)."""
    scores = logits.copy()
    if mask_id is not None:
        scores[:, mask_id] = -np.inf
    scores -= scores.max(axis=1, keepdims=True)
    return scores, np.exp(scores).sum(axis=1)
