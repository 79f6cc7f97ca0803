"""The likeliest filling of a hole: a beam over the causal reading, judged with the text that stands after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ...contract import PREFILL_CHUNK
from ..engines.passes import Pass, causal
from ..sampling.softmax import log_softmax
from .row import Row

FIRST_PART = 8  # tokens of the text after a hole that every filling is judged by


@dataclasses.dataclass(frozen=True)
class _Chain:
    """The beginning of a filling and its log-probability."""

    tokens: list[int]
    score: float


def search(
    row: Row, size: int | None, longest: int, suffix: list[int], width: int, eos_ids: Sequence[int]
) -> list[int]:
    """The likeliest filling of `size` tokens, or of 1 to `longest`, among those that a beam of `width` meets."""
    chains = [_Chain([], 0.0)]
    best = chains[0]
    best_total = -np.inf
    for length in range(1, (size or longest) + 1):
        grown = _grow(row, chains, min(width, PREFILL_CHUNK // (length + 1)), [row.mask_id, *eos_ids])
        chains = [chain for chain in grown if chain.score > best_total]  # what comes after can only lower it
        if not chains:
            break
        if size not in (None, length):
            continue
        for chain in chains:
            total = _score(row, chain, suffix, best_total)
            if total > best_total:
                best, best_total = chain, total
    return best.tokens


def _grow(row: Row, chains: list[_Chain], width: int, never: list[int]) -> list[_Chain]:
    """The `width` likeliest chains of one more token, the likeliest first."""
    start = row.length - 1
    head = row.tokens[-1]
    size = len(chains[0].tokens) + 1
    ids = np.array([[head, *chain.tokens] for chain in chains], np.int32)  # (K, S)
    begin = start + size * np.arange(len(chains))[:, None]
    step = np.arange(size)
    visible = np.stack(np.broadcast_arrays(start, begin, begin + step + 1), axis=2).astype(np.int32)  # (K, S, 3)
    pass_ = Pass(
        "decode",
        ids.ravel(),
        np.tile(start + step, len(chains)).astype(np.int32),
        start,
        visible.reshape(-1, 3),
        (size * np.arange(1, len(chains) + 1) - 1).astype(np.int32),
        logits=True,
    )
    grown: list[_Chain] = []
    for chain, scores in zip(chains, _log_probabilities(row, pass_), strict=True):
        scores[never] = -np.inf
        grown += [
            _Chain([*chain.tokens, int(token)], chain.score + float(scores[token]))
            for token in np.argsort(-scores, kind="stable")[:width]
            if scores[token] > -np.inf
        ]
    return sorted(grown, key=lambda chain: -chain.score)[:width]


def _score(row: Row, chain: _Chain, suffix: list[int], best: float) -> float:
    """Log-probability of a filling and the text after it, of at most what one pass holds.

    The text is read in parts that double, and no further where the filling is no better than `best`: what comes after
    can only lower it.
    """
    ids = [row.tokens[-1], *chain.tokens, *suffix[: PREFILL_CHUNK - len(chain.tokens)]]
    total = chain.score
    done, size = 0, FIRST_PART
    while (begin := max(done, len(chain.tokens))) < len(ids) - 1 and total > best:
        end = min(begin + size, len(ids) - 1)
        pass_ = causal("verify", ids[done:end], row.length - 1 + done, logits=True)
        predicted = np.arange(begin - done, end - done, dtype=np.int32)
        scores = _log_probabilities(row, pass_._replace(predicted=predicted))
        total += float(scores[np.arange(end - begin), ids[begin + 1 : end + 1]].sum())
        done, size = end, 2 * size
    return total


def _log_probabilities(row: Row, pass_: Pass) -> np.ndarray:  # (R, V) f32
    logits = row.run(pass_).logits
    assert logits is not None
    return log_softmax(logits)
