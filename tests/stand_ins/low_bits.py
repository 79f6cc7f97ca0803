"""What an engine of few bits holds, as numbers and as a checkpoint, and its bits of every token."""

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from safetensors.numpy import load_file, save_file
from stand_ins.checkpoints import load_make_data

import nemodiff
from nemodiff.builder.checkpoint.safetensors_file import read_tensors
from nemodiff.engine_folder import TENSORS_FILE
from nemodiff.runtime.engines.passes import causal
from nemodiff.runtime.loading import LoadedEngine

# Options of requests, one for each mode.
WAYS: list[dict[str, Any]] = [
    {"mode": "ar"},
    {"mode": "diffusion", "block_length": 8},
    {"mode": "linear_spec"},
    {"mode": "quadratic_spec", "groups": "all", "block_length": 6},
]


def stored(folder: Path) -> dict[str, np.ndarray]:
    """Every weight of an engine by name."""
    model = onnx.load(folder / "model.onnx")
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def nibbles(array: np.ndarray) -> np.ndarray:
    """The halves of each row's bytes, the lower ones first, 0 to 15."""
    return np.stack([array & 15, array >> 4], -1).reshape(len(array), -1).astype(np.float32)


def loaded(path: Path) -> dict[str, np.ndarray]:
    """As safetensors' load_file, which knows no fp8 in numpy."""
    return {name: np.array(tensor.array()) for name, tensor in read_tensors(path, packed=True).items()}


def torch_values(stored: dict[str, np.ndarray], name: str) -> np.ndarray:
    """What a torch engine's tensors say a projection is, (out, in) f32."""
    numbers, scale = stored[name], stored[f"{name}_scale"]
    if scale.ndim == 1:
        return numbers.astype(np.float32) * scale[:, None]
    zero = np.full(scale.shape, np.float32(8))
    if f"{name}_zero" in stored:
        zero = nibbles(stored[f"{name}_zero"])[:, : scale.shape[1]]
    values: np.ndarray = (nibbles(numbers) - zero.repeat(32, 1)) * scale.repeat(32, 1)
    return values


def dequantised(checkpoint: Path, engine: Path, folder: Path) -> Path:
    """A copy of the checkpoint with the numbers that a torch engine's bits stand for."""
    shutil.copytree(checkpoint, folder)
    stored = loaded(engine / TENSORS_FILE)
    weights = load_file(folder / "model.safetensors")
    for name in stored:
        if f"{name}_scale" in stored:
            weights[name if name in weights else f"encoder.{name}"] = torch_values(stored, name)
    save_file(weights, folder / "model.safetensors")
    return folder


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


def assert_rows_are_alone(engine: LoadedEngine, sizes: tuple[int, ...]) -> None:
    """A forward of texts of so many tokens gives each the bits that it has by itself."""
    rng = np.random.default_rng(1)
    texts = [rng.integers(200, 800, size).tolist() for size in sizes]
    passes = [causal("verify", text, 0, predict_all=True, logits=True) for text in texts]
    together = [np.array(prediction.logits) for prediction in engine.backend.open(len(sizes)).forward(passes)]
    for text, got in zip(texts, together, strict=True):
        np.testing.assert_array_equal(got, causal_bits(engine, text, 1))


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
