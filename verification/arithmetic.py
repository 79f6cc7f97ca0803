"""How the reference computes: more precisely than an engine, or with every result rounded as an engine rounds it."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np

STORED: dict[str, Any] = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """How numbers are computed: in `compute`, each result rounded to `stored`, weights of projections to a grid."""

    compute: Any
    stored: Any = None
    quantization: str | None = None

    def round(self, x: np.ndarray) -> np.ndarray:
        """The values that a result can have."""
        if self.stored is None:
            return x
        rounded: np.ndarray = x.astype(self.stored).astype(self.compute)
        return rounded

    def weight(self, weight: np.ndarray, projection: bool = False) -> np.ndarray:
        """A weight as it is stored, (out, in) where it is a matrix."""
        if self.stored is None:
            return weight.astype(self.compute)
        if projection and self.quantization is not None:
            weight = _on_grid(weight, self.quantization)
        return self.round(weight.astype(self.compute))


def _on_grid(weight: np.ndarray, quantization: str) -> np.ndarray:
    """A projection (out, in) f32 in 8 or 4 bits: fp8 by outputs, integers by outputs and 32 inputs."""
    group = weight.shape[1] if quantization == "fp8" or weight.shape[1] % 32 else 32
    parts = weight.reshape(weight.shape[0], -1, group)
    most = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}[quantization]
    scale = np.maximum(np.abs(parts).max(-1, keepdims=True) / most, 1e-30)
    steps = parts / scale
    rounded = steps.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) if quantization == "fp8" else np.rint(steps)
    result: np.ndarray = (rounded * scale).reshape(weight.shape).astype(np.float32)
    return result
