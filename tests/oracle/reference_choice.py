"""The oracle's choice of a token and of the masks to commit, written from docs/semantics.md and nothing else.

It follows the page literally: sets and sums where the product prunes and keeps counts, and Philox in plain integers.
"""

import functools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
M32 = 0xFFFFFFFF


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen; `prompt` is its ids, `stops` the ids that end it."""

    prompt: tuple[int, ...]
    stops: frozenset[int]
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logit_bias: dict[int, float] = field(default_factory=dict)
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_tokens: int = 0
    thinking_budget: int | None = None
    end_think: int = -1


@dataclass(frozen=True)
class Control:
    """How diffusion commits."""

    policy: str = "threshold"
    per_step: int = 1
    entropy_bound: float = 0.0
    steps: int | None = None
    merge_commit: bool = False


def philox(seed: int, first: int, position: int) -> list[int]:
    """The four words of Philox 4x32-10 at counter (first, position, 0, 0)."""
    c, k = [first, position, 0, 0], [seed & M32, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & M32, (a >> 32) ^ c[3] ^ k[1], a & M32]
        k = [(k[0] + 0x9E3779B9) & M32, (k[1] + 0xBB67AE85) & M32]
    return c


@functools.lru_cache(maxsize=4096)
def gumbel(seed: int, position: int, size: int) -> NDArray[np.float64]:
    """Noise (size,) of a seed at a position; remembered, which makes the oracle fast enough."""
    words = [word for first in range(-(-size // 4)) for word in philox(seed, first, position)][:size]
    return np.array([-math.log(-math.log((word + 0.5) / 2**32)) for word in words])


def choose(logits: Floats, params: SamplingParams, emitted: Sequence[int], mask_id: int) -> int:
    """The token after the prompt and `emitted`."""
    if (
        params.thinking_budget is not None
        and len(emitted) >= params.thinking_budget
        and params.end_think not in emitted
    ):
        return params.end_think
    score = logits.astype(np.float64)
    for i in {*params.prompt, *emitted}:
        score[i] = score[i] / params.repetition_penalty if score[i] > 0 else score[i] * params.repetition_penalty
    for i in set(emitted):
        score[i] -= params.frequency_penalty * list(emitted).count(i) + params.presence_penalty
    for i, bias in params.logit_bias.items():
        score[i] += bias
    never = {mask_id}
    if len(emitted) < params.min_tokens:
        never |= params.stops
    for word in params.bad_words:
        if list(emitted)[len(emitted) - len(word) + 1 :] == list(word[:-1]) and len(emitted) >= len(word) - 1:
            never.add(word[-1])
    ids = np.array([i for i in range(score.size) if i not in never])
    if params.temperature == 0:
        return int(ids[score[ids].argmax()])
    score /= params.temperature
    if params.top_k:
        ids = ids[_betters(score[ids], np.ones(ids.size)) < params.top_k]
    chance = np.exp(score[ids] - score[ids].max())
    chance /= chance.sum()
    if params.top_p < 1:
        left = _betters(score[ids], chance) < params.top_p
        ids, chance = ids[left], chance[left]
    if params.min_p:
        ids = ids[chance >= params.min_p * chance.max()]
    noise = gumbel(params.seed, len(params.prompt) + len(emitted), score.size)
    return int(ids[(score[ids] + noise[ids]).argmax()])


def _betters(score: NDArray[np.float64], weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each id the total weight of those with a higher score."""
    values, number = np.unique(score, return_inverse=True)  # ascending
    by_value = np.bincount(number, weight, values.size)
    higher = np.append(by_value[::-1].cumsum()[::-1][1:], 0.0)
    total: NDArray[np.float64] = higher[number]
    return total


def commits(
    control: Control, threshold: float, confidence: Floats, entropy: NDArray[np.float64], passes: int
) -> Collection[int]:
    """Which of a block's masks become tokens, by their place among the masks."""
    places = range(len(confidence))
    sure = [bool(c >= np.float32(threshold)) for c in confidence]
    if control.policy == "entropy":
        order = sorted(places, key=lambda i: (entropy[i], i))
        count = sum(e <= control.entropy_bound for e in entropy)
    elif control.policy == "left_to_right":
        order = list(places)
        count = next((i for i in places if not sure[i]), len(sure))
    else:
        order = sorted(places, key=lambda i: (-confidence[i], i))
        count = control.per_step if control.policy == "topk" else sum(sure)
    quota = 1 if control.steps is None else math.ceil(len(order) / max(1, control.steps - passes))
    return order[: max(1, count, quota)]
