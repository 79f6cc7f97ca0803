"""An engine that takes the time of a real one and says what a script says.

In: a torch engine with random weights, and how often a draft is to be right. Out: an `Engine`. A random model drafts
nothing that it would confirm, so what its passes predict is replaced: the true token of a position is a number of that
position, and a mask gives it in a share of positions that is the same for every mode. The surprising fact: a
position is hard or easy for every draft that reaches it, and the confidence tells which, so a mode that plans by
confidence can, and linear and quadratic self-speculation meet the very same drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nemodiff.runtime.engines.engine import Pass, Prediction

FIRST_ID, IDS = 200, 500  # of true tokens: no EOS, no mask
EASY, HARD = 0.99, 0.5  # confidence of a draft, and the share of positions where it is right
PUBLISHED = 5.99  # tokens per pass of linear self-speculation, published for the 8B model
HARD_SHARE = (
    0.115  # of positions that are hard: 5.95 tokens per pass in blocks of 32 (tests/benchmarks/test_gpu_benchmark.py)
)


def truth(position: np.ndarray) -> np.ndarray:
    """The token at each position, (N,) i32."""
    return (FIRST_ID + _hash(position, 1) % IDS).astype(np.int32)


def guess(position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a mask at each position predicts, (N,) i32, and how sure it is, (N,) f32."""
    chance = np.where(_share(position, 2) < HARD_SHARE, HARD, EASY)
    wrong = _share(position, 3) >= chance
    return truth(position) + wrong.astype(np.int32), chance.astype(np.float32)


class Scripted:
    """The engine."""

    samples = False  # what a script says is no sample

    def __init__(self, engine: Any) -> None:
        self._engine, self.info = engine, engine.info

    def open(self, rows: int) -> ScriptedCache:
        """See `engine.Engine.open`."""
        return ScriptedCache(self._engine.open(rows), self.info.model.mask_id)


class ScriptedCache:
    """A cache whose passes are run and then told otherwise."""

    def __init__(self, cache: Any, mask: int) -> None:
        self._cache, self._mask, self.rows = cache, mask, cache.rows
        self.move, self.close = cache.move, cache.close

    @property
    def seconds(self) -> float:
        """See `engine.Cache`."""
        return float(self._cache.seconds)

    def forward(self, passes: Sequence[Pass], first: int = 0) -> list[Prediction]:
        """See `engine.Cache.forward`."""
        found = self._cache.forward(passes, first)
        return [self._told(asked, prediction) for asked, prediction in zip(passes, found, strict=True)]

    def _told(self, asked: Pass, prediction: Prediction) -> Prediction:
        ids, pos = asked.ids[asked.predicted], asked.pos[asked.predicted]
        drafted, sure = guess(pos)
        is_mask = ids == self._mask
        token = np.where(is_mask, drafted, truth(pos + 1)).astype(np.int32)
        return prediction._replace(
            token=token,
            confidence=np.where(is_mask, sure, 1).astype(np.float32),
            next_ids=np.where(is_mask, token, ids).astype(np.int32),
        )


def _hash(position: np.ndarray, salt: int) -> np.ndarray:
    """Well mixed 32 bits of each position, (N,) u64."""
    x = np.asarray(position, np.uint64) + np.uint64(salt * 0x9E3779B9)
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        x = ((x ^ (x >> np.uint64(15))) * np.uint64(factor)) & np.uint64(0xFFFFFFFF)
    return x ^ (x >> np.uint64(16))


def _share(position: np.ndarray, salt: int) -> np.ndarray:
    """Each position's number in 0..1, (N,) f64."""
    return _hash(position, salt) / 2.0**32
