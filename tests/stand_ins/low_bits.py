"""What an engine of few bits holds, and its bits of every token."""

from pathlib import Path

import numpy as np
import onnx

from nemodiff.runtime.engines.engine import causal
from nemodiff.runtime.loading import LoadedEngine


def stored(folder: Path) -> dict[str, np.ndarray]:
    """Every weight of an engine by name."""
    model = onnx.load(folder / "model.onnx")
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def nibbles(array: np.ndarray) -> np.ndarray:
    """The halves of each row's bytes, the lower ones first, 0 to 15."""
    return np.stack([array & 15, array >> 4], -1).reshape(len(array), -1).astype(np.float32)


def causal_bits(engine: LoadedEngine, ids: list[int], size: int) -> np.ndarray:
    """The logits after every token, in passes of `size`."""
    cache = engine.backend.open(1)
    rows = []
    for start in range(0, len(ids), size):
        pass_ = causal("verify", ids[start : start + size], start, predict_all=True, logits=True)
        logits = cache.forward([pass_])[0].logits
        assert logits is not None
        rows.append(logits.copy())
    return np.concatenate(rows)
