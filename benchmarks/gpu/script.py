"""An engine that takes the time of a real one and predicts what a script says.

A random model drafts nothing that it would confirm, so its predictions are replaced: the true token of a position is a
function of that position, and a mask predicts it in a share of positions that is the same for every mode.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from nemodiff.runtime.engines.grouping import Arranged
from nemodiff.runtime.engines.passes import Following, Pass, Prediction, arrange

POSITIONS = 2**17  # that a script is written for
FIRST_ID, IDS = 200, 500  # of true tokens: no EOS, no mask
EASY, HARD = 0.99, 0.5  # confidence of a draft, and the share of positions where it is right
PUBLISHED = 5.99  # tokens per pass of linear self-speculation, published for the 8B model
# Share of positions that are hard: 5.95 tokens per pass in blocks of 32 (tests/benchmarks/test_gpu_benchmark.py).
HARD_SHARE = 0.115


def truth(position: np.ndarray) -> np.ndarray:
    """The token at each position, (N,) i32."""
    return _known()[0][position]


def guess(position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a mask at each position predicts, (N,) i32, and its confidence, (N,) f32.

    A position is hard or easy for every draft that reaches it, and the confidence shows which, so a mode can plan by
    it, and linear and quadratic self-speculation meet the same drafts.
    """
    _, drafted, sure = _known()
    return drafted[position], sure[position]


def said(
    ids: np.ndarray, position: np.ndarray, mask: int, threshold: np.ndarray, begin: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is predicted at some tokens, by the commit rule: token (N,) i32, confidence (N,) f32 and next ids (N,) i32.

    Masks are committed whose confidence reaches their threshold (N,), and the surest, the first of equals, of those
    that have the same `begin` (N,).
    """
    drafted, sure = guess(position)
    is_mask = ids == mask
    token = np.where(is_mask, drafted, truth(position + 1))
    commits = is_mask & (sure >= threshold)
    undecided = is_mask & ~np.isin(begin, begin[commits])
    for each in np.unique(begin[undecided]):
        among = np.flatnonzero(undecided & (begin == each))
        commits[among[sure[among].argmax()]] = True
    return token, np.where(is_mask, sure, np.float32(1)), np.where(commits, token, ids)


@functools.cache
def _known() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The true token, the drafted one and its confidence at every position, worked out before anything is timed."""
    position = np.arange(POSITIONS)
    true = (FIRST_ID + _hash(position, 1) % IDS).astype(np.int32)
    chance = np.where(_share(position, 2) < HARD_SHARE, HARD, EASY)
    is_wrong = _share(position, 3) >= chance
    return true, true + is_wrong.astype(np.int32), chance.astype(np.float32)


class Scripted:
    """An engine that runs another one's passes and replaces their predictions."""

    samples = False  # scripted predictions are not sampled

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.info = engine.info
        self.pages = engine.pages

    @property
    def pass_seconds(self) -> dict[int, float]:
        """What passes took in the warm-up, which plans begin with."""
        met: dict[int, float] = self._engine.pass_seconds
        return met

    def open(self, rows: int) -> ScriptedCache:
        """See `engine.Engine.open`."""
        return ScriptedCache(self._engine.open(rows), self.info.model.mask_id)


class ScriptedCache:
    """A cache whose passes are run and whose predictions are then replaced."""

    def __init__(self, cache: Any, mask: int) -> None:
        self._cache = cache
        self._mask = mask

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def forward(self, passes: Sequence[Pass], first: int = 0) -> list[Prediction]:
        """See `engine.Cache.forward`."""
        return self.replaced(passes, self._cache.forward(passes, first))

    def launch(self, passes: Sequence[Pass], rows: Sequence[int]) -> ScriptedFlight:
        """See `engine.PagedCache.launch`."""
        return ScriptedFlight(self, self._cache.launch(passes, rows), passes, [None] * len(passes))

    def follow(
        self, flight: ScriptedFlight, passes: Sequence[Following], rows: Sequence[int], fed: Sequence[int]
    ) -> ScriptedFlight | None:
        """See `engine.PagedCache.follow`.

        The engine goes on with its own tokens and what it accepts of them, which the script does not need.
        """
        followed = self._cache.follow(flight.flight, passes, rows, fed)
        if followed is None:
            return None
        said = flight.said()
        feeding = [said[number] for number in fed]
        arranged = arrange(passes, feeding, followed.room)
        known = [each.after(*given) for each, *given in zip(passes, feeding, arranged, strict=True)]
        return ScriptedFlight(self, followed, known, arranged)

    def replaced(self, passes: Sequence[Pass], predictions: list[Prediction]) -> list[Prediction]:
        """What the script says instead of some predictions."""
        return [
            said._replace(logits=prediction.logits)
            for said, prediction in zip(self.said(passes), predictions, strict=True)
        ]

    def said(self, passes: Sequence[Pass]) -> list[Prediction]:
        """What the script says to some passes."""
        return [self._said(pass_) for pass_ in passes]

    def _said(self, pass_: Pass) -> Prediction:
        ids, position = pass_.ids[pass_.predicted], pass_.pos[pass_.predicted]
        threshold, begin = np.full(ids.size, pass_.threshold, np.float32), np.zeros(ids.size, np.int32)
        return Prediction(*said(ids, position, self._mask, threshold, begin), None)


class ScriptedFlight:
    """A forward under way."""

    def __init__(
        self, cache: ScriptedCache, flight: Any, passes: Sequence[Pass], arranged: Sequence[Arranged | None]
    ) -> None:
        self._cache = cache
        self.flight = flight
        self._passes = passes
        self._arranged = arranged

    @property
    def seconds(self) -> float:
        """See `engine.Flight`."""
        return float(self.flight.seconds)

    def arranged(self) -> Sequence[Arranged | None]:
        """See `engine.Flight`; by what the script says, in as many tokens as the engine has for them."""
        return self._arranged

    def said(self) -> list[Prediction]:
        """What the script says to its passes."""
        return self._cache.said(self._passes)

    def finish(self) -> list[Prediction]:
        """See `engine.Flight`."""
        return self._cache.replaced(self._passes, self.flight.finish())


def _hash(position: np.ndarray, salt: int) -> np.ndarray:
    """Well mixed 32 bits of each position, (N,) u64."""
    x = np.asarray(position, np.uint64) + np.uint64(salt * 0x9E3779B9)
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        x = ((x ^ (x >> np.uint64(15))) * np.uint64(factor)) & np.uint64(0xFFFFFFFF)
    return x ^ (x >> np.uint64(16))


def _share(position: np.ndarray, salt: int) -> np.ndarray:
    """Each position's number in 0..1, (N,) f64."""
    return _hash(position, salt) / 2.0**32
