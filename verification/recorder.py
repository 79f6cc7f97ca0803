"""An engine that notes every pass it serves, around any other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from ..runtime.engines.engine import Cache, Engine
from ..runtime.engines.passes import Pass, Prediction

SAMPLE = 256  # logits of a prediction that are compared, spread over the vocabulary


class RecordedPass(NamedTuple):
    """A pass and copies of its results."""

    pass_: Pass
    token: np.ndarray  # (R,) i32
    confidence: np.ndarray  # (R,) f32
    next_ids: np.ndarray  # (R,) i32
    logits: np.ndarray | None  # (R, SAMPLE) f32


class Recorder:
    """Forwards passes, with logits where the engine has them, and keeps them in `passes`."""

    def __init__(self, engine: Engine) -> None:
        self.info = engine.info
        self.samples = engine.samples
        self.columns = columns(engine.info.model.vocab_size)
        self.pages = None  # of a backend that has them: without, every pass goes through `forward`
        self.passes: list[RecordedPass] = []
        self._engine = engine

    def open(self, rows: int) -> Cache:
        """See `engine.Engine.open`."""
        return cast(Cache, _RecordedCache(self, self._engine.open(rows)))


class _RecordedCache:
    def __init__(self, recorder: Recorder, cache: Cache) -> None:
        self._recorder = recorder
        self._cache = cache

    def forward(self, passes: Sequence[Pass], first: int = 0) -> list[Prediction]:
        recorder = self._recorder
        if recorder.info.build.gather_generation_logits:
            passes = [p._replace(logits=True) for p in passes]
        predictions = self._cache.forward(passes, first)
        for p, got in zip(passes, predictions, strict=True):
            logits = None if got.logits is None else got.logits[:, recorder.columns].copy()
            result = (got.token.copy(), got.confidence.copy(), got.next_ids.copy(), logits)
            recorder.passes.append(RecordedPass(p, *result))
        return predictions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def columns(vocab: int) -> np.ndarray:
    """Ids spread over a vocabulary, at most SAMPLE of them."""
    return np.unique(np.linspace(0, vocab - 1, min(vocab, SAMPLE)).astype(np.int64))
