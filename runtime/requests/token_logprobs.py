"""What a model says of tokens that have been chosen, or that a prompt holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

_LOGITS = 1 << 24  # elements of one pass's logits while a prompt is scored, 64 MiB in f32


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of the model's own probabilities at one position, the mask id left out.

    logprob: of the token that stands there. top: the likeliest ids with theirs, best first, the smaller id first of
    equals. rank: the token's own place in that order, from 1, which is the one that mode ar would choose.
    """

    logprob: float
    top: list[tuple[int, float]]
    rank: int


def measure(logits: np.ndarray, tokens: Sequence[int], count: int, mask_id: int) -> list[TokenLogprobs]:
    """One entry per row of logits (n, V) f32, for n tokens; `count` of the likeliest are told."""
    measured = []
    for token, given in zip(tokens, logits, strict=True):
        scores = given.copy()
        scores[mask_id] = -np.inf
        best, own = scores.max(), scores[token]
        # Exponentials in f32, which are five times as fast, and their sum in f64: good to 1e-7.
        total = float(best) + float(np.log(np.exp(scores - best).sum(dtype=np.float64)))
        rank = 1 + np.count_nonzero(scores > own) + np.count_nonzero(scores[:token] == own)
        top = np.empty(0, np.int64)
        if count:
            lowest = np.partition(scores, -count)[-count]
            top = np.flatnonzero(scores >= lowest)
            top = top[np.argsort(-scores[top], kind="stable")][:count]
        likeliest = [(int(i), float(scores[i]) - total) for i in top]
        measured.append(TokenLogprobs(float(own) - total, likeliest, int(rank)))
    return measured


class PromptScores:
    """The log-probabilities of a prompt's tokens, each after those before it, as its passes bring them.

    Answers to one prompt share them: each has passes of its own, and the first to come somewhere measures it.

    Args:
        prompt: its ids.
        first: the first token to score, 1 or more: nothing stands before token 0.
        count: likeliest ids to tell at each position.
        mask_id: left out.
        vocab: entries of the vocabulary.
    """

    def __init__(self, prompt: list[int], first: int, count: int, mask_id: int, vocab: int) -> None:
        self.begin = first - 1  # the token whose prediction scores the first one; K/V may be copied up to it
        self.end = len(prompt) - 1  # the last token's prediction is of no token of the prompt
        self.chunk = max(16, _LOGITS // vocab)  # tokens of a pass
        self.logprobs: list[TokenLogprobs] = []
        self._prompt = prompt
        self._count = count
        self._mask_id = mask_id

    @property
    def by_token(self) -> list[TokenLogprobs | None]:
        """One per token of the prompt; None before the first that is scored, and where a request was cancelled."""
        before = self.begin + 1
        unscored = len(self._prompt) - before - len(self.logprobs)
        return [*[None] * before, *self.logprobs, *[None] * unscored]

    def take(self, start: int, logits: np.ndarray) -> None:
        """The predictions (n, V) f32 of the n tokens from `start`."""
        new = self.begin + len(self.logprobs) - start  # those before are known, by another answer
        following = self._prompt[start + 1 + new : start + 1 + len(logits)]
        self.logprobs += measure(logits[new:], following, self._count, self._mask_id)
