"""How the reference computes: more precisely than an engine, or with every result rounded as an engine rounds it."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import ml_dtypes
import numpy as np

from ..contract import GROUP_SIZE

STORED: dict[str, Any] = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}

Part = Literal["projection", "mlp", "head", "other"]  # the MLPs' projections are a part of their own


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """How numbers are computed: in `compute`, each result rounded to `stored`, projections on a grid.

    fp8 is e4m3 with a scale per output, fp8_dynamic has inputs in e4m3 with one per token too; int8 has a scale per
    output, also in the head; int4 has scales by groups, and the head in int8. With `rounds_inputs` the inputs of int8
    and int4 are on a grid too, per token and by groups.
    """

    compute: Any
    stored: Any = None
    quantization: str | None = None
    rounds_inputs: bool = True
    kv_bits: str | None = None  # of K and V: int8, or fp8; each head of a token has a scale
    group_size: int = GROUP_SIZE  # inputs that share a scale in int4
    mlp_group_size: int = GROUP_SIZE  # likewise in the MLPs
    kept: bool = False  # weights are on their grid already, and the head on none

    def round(self, x: np.ndarray) -> np.ndarray:
        """The values that a result can have."""
        if self.stored is None:
            return x
        rounded: np.ndarray = x.astype(self.stored).astype(self.compute)
        return rounded

    def weight(self, weight: np.ndarray, part: Part = "other") -> np.ndarray:
        """A weight as it is stored, (out, in) where it is a matrix."""
        if self.stored is None:
            return weight.astype(self.compute)
        grid = None if self.kept else self._grid(part)
        if grid in ("fp8", "fp8_dynamic"):
            weight = _e4m3(weight)
        elif grid == "int8":
            weight = _integers(weight, 127)
        elif grid == "int4":
            weight = _by_groups(weight, 8, self._group(part))
        return self.round(weight.astype(self.compute))

    def inputs(self, x: np.ndarray, part: Part) -> np.ndarray:
        """What a matrix is multiplied by, (T, in)."""
        grid = self._grid(part)
        if grid == "fp8_dynamic":
            return _e4m3(x)
        if not self.rounds_inputs:
            return x
        if grid == "int8":
            return _integers(x, 127)
        return _by_groups(x, 127, self._group(part)) if grid == "int4" else x

    def cached(self, x: np.ndarray) -> np.ndarray:
        """What a cache keeps of K or V, (T, G, D)."""
        if self.kv_bits is None:
            return x
        kept = _integers(x, 127) if self.kv_bits == "int8" else _e4m3(x.astype(np.float32))
        return kept.astype(self.compute)

    def _group(self, part: Part) -> int:
        return self.mlp_group_size if part == "mlp" else self.group_size

    def _grid(self, part: Part) -> str | None:
        plain_head = self.kept or self.quantization in ("fp8", "fp8_dynamic")
        if self.stored is None or part == "other" or (part == "head" and plain_head):
            return None
        return "int8" if part == "head" and self.quantization else self.quantization


def _e4m3(x: np.ndarray) -> np.ndarray:
    """The nearest of e4m3 times a scale of each row."""
    scale = np.maximum(np.abs(x).max(-1, keepdims=True) / 448, 1e-30)
    rounded: np.ndarray = (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    return rounded


def _integers(x: np.ndarray, most: int) -> np.ndarray:
    """Whole multiples of a step that is `most` times in each row's largest magnitude."""
    step = np.maximum(np.abs(x).max(-1, keepdims=True) / most, 1e-30)
    rounded: np.ndarray = np.rint(x / step) * step
    return rounded


def _by_groups(x: np.ndarray, most: int, size: int) -> np.ndarray:
    """The same with a step for every group of the last axis."""
    if x.shape[-1] % size:
        return _integers(x, most)
    return _integers(x.reshape(len(x), -1, size), most).reshape(x.shape)
