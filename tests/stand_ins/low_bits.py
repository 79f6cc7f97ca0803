"""What an engine of few bits holds, and its bits of every token."""

import random
from pathlib import Path

import numpy as np
import onnx
from stand_ins.checkpoints import load_make_data

import nemodiff
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


def assert_speculation_is_ar(engine: LoadedEngine, questions: int) -> None:
    """Self-speculation gives ar's tokens. A sample; `python benchmarks/low_bits.py` asks a hundred questions."""
    data, rng = load_make_data(), random.Random(4)
    for _ in range(questions):
        question = data.example(rng)[1]
        expected = nemodiff.generate(engine, question, mode="ar", max_new_tokens=60).token_ids
        for mode in ("linear_spec", "quadratic_spec"):
            for block_length in (5, 32):
                answer = nemodiff.generate(engine, question, mode=mode, block_length=block_length, max_new_tokens=60)
                assert answer.token_ids == expected
