"""Tells whether the drafter adapter acts: once per engine by a probe, and in a pass by a count of tokens.

An adapter that is never on changes no answer of self-speculation, only its speed, so nothing but a probe finds it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...errors import EngineError
from .engine import Engine
from .passes import Pass, every_token


def check_gate(engine: Engine, folder: Path) -> None:
    """Run the probe on an engine that has an adapter. Raises EngineError if the gate changes nothing."""
    # Two masks at position 0, each of which sees itself alone: they differ in their gate and in nothing else.
    ids = np.full(2, engine.info.model.mask_id, np.int32)
    pos = np.zeros(2, np.int32)
    visible = np.array([[0, 0, 1], [0, 1, 2]], np.int32)
    gate = np.array([0, 1], np.float32)
    cache = engine.open(1)
    (prediction,) = cache.forward([Pass("draft", ids, pos, 0, visible, every_token(2), adapter=gate)])
    acts = bool(prediction.confidence[0] != prediction.confidence[1])
    cache.close()
    if not acts:
        raise EngineError(
            f"{folder}: the drafter adapter changes nothing, its gate is stuck or its weights are zero; build the "
            "engine again with an adapter that was trained, or from a checkpoint without one"
        )


def adapted(pass_: Pass) -> int:
    """Tokens of a pass that the adapter acts on, if the engine has one."""
    if isinstance(pass_.adapter, np.ndarray):
        return int(np.count_nonzero(pass_.adapter))
    return pass_.ids.size if pass_.adapter else 0
