"""From one position's logits to one token, by a request's sampling parameters.

docs/semantics.md states the order and every tie.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

import numpy as np

from .noise import HIGHEST, LOWEST, Noise


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How a token is chosen; see `Options` for each field. The defaults are the model's greedy choice."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_tokens: int = 0

    @property
    def penalised(self) -> bool:
        """Whether what has been emitted changes the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def only_temperature(self) -> bool:
        """Whether the choice is a plain sample of the softmax, so that a kernel can draw it."""
        return self.temperature > 0 and self == SamplingParams(temperature=self.temperature, seed=self.seed)

    @property
    def filtered(self) -> bool:
        """Whether some ids may not be drawn for want of probability."""
        return self.top_k != 0 or self.top_p < 1 or self.min_p != 0

    @property
    def greedy(self) -> bool:
        """Whether the choice is the argmax of the model's own logits, whatever has been emitted."""
        return not (self.temperature or self.penalised or self.logit_bias or self.bad_words or self.min_tokens)


def penalise(scores: np.ndarray, params: SamplingParams, prompt: np.ndarray, counts: Mapping[int, int]) -> None:
    """Apply the penalties in place.

    scores (V,) f64; prompt (n,) i64: its distinct ids; counts: how often each id has been emitted, none of them 0.
    """
    emitted = np.fromiter(counts.keys(), np.int64, len(counts))
    if params.repetition_penalty != 1:
        seen = np.concatenate([prompt, emitted])  # an id of both is set to the same value twice
        values = scores[seen]
        scores[seen] = np.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        times = np.fromiter(counts.values(), np.int64, len(counts))
        scores[emitted] -= params.frequency_penalty * times + params.presence_penalty


class BadWords:
    """Bad words as ids, by the id that comes before their last one."""

    def __init__(self, words: Iterable[tuple[int, ...]]) -> None:
        self._alone = list[int]()
        self._after = dict[int, list[tuple[list[int], int]]]()
        for *before, last in words:
            if before:
                self._after.setdefault(before[-1], []).append((before, last))
            else:
                self._alone.append(last)

    def banned(self, emitted: list[int]) -> list[int]:
        """The last id of every bad word whose other ids are the last ones emitted."""
        following = self._after.get(emitted[-1], []) if emitted else []
        return self._alone + [last for before, last in following if emitted[-len(before) :] == before]


def draw(scores: np.ndarray, params: SamplingParams, noise: Noise, position: int) -> int:
    """The token at `position`; scores (V,) f64 after penalties, bias and bans (-inf), overwritten.

    The argmax of scaled logits plus Gumbel noise is an exact sample of their softmax (Gumbel-max), so no probability is
    normalised except for top-p, and no filter is computed unless the winner among all could fall to it.
    """
    if not params.temperature:
        return int(scores.argmax())
    scores /= params.temperature
    best = float(scores.max())
    if not noise.kept:  # noise is dear: for those alone that it can lift to the top
        ids = np.flatnonzero(scores >= max(_floor(scores, params, best), best - (HIGHEST - LOWEST)))
        return int(ids[0]) if ids.size == 1 else int(ids[(scores[ids] + noise.at(position, ids)).argmax()])
    noisy = scores + noise.row(position)
    token = int(noisy.argmax())
    # Who wins among all wins among those that are left, if it is one of them; the best always is.
    if params.filtered and scores[token] < best and scores[token] < (floor := _floor(scores, params, best)):
        noisy[scores < floor] = -np.inf
        token = int(noisy.argmax())
    return token


def _floor(scores: np.ndarray, params: SamplingParams, best: float) -> float:
    """The lowest score that top-k, top-p and min-p leave."""
    floor = -math.inf
    if params.top_k and params.top_k < scores.size:
        floor = float(np.partition(scores, scores.size - params.top_k)[scores.size - params.top_k])
    if params.top_p < 1:
        floor = _nucleus(scores if floor == -math.inf else scores[scores >= floor], params.top_p, best)
    if params.min_p:
        floor = max(floor, best + math.log(params.min_p))
    return floor


def _nucleus(scores: np.ndarray, top_p: float, best: float) -> float:
    """The lowest score that top-p leaves among these: that of the last one whose betters together are below p."""
    weights = np.exp(scores - best)
    total = weights.sum()
    # What is below this share of the rest cannot belong to it, so that little is left to sort.
    heavy = scores[weights >= 0.5 * (1 - top_p) * total / scores.size]
    heavy.sort()
    falling = heavy[::-1]
    before = np.cumsum(np.exp(falling - best)) - np.exp(falling - best)
    return float(falling[np.count_nonzero(before < top_p * total) - 1])
