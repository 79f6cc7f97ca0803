"""ResidualNorm: the residual sum and its RMS norm, for the torch engine on a GPU; no op of the graph.

    y, total = ResidualNorm(x, residual, weight)

x, residual (B, S, E) compute, weight (E,) compute -> total = x + residual and y = total / rms(total) * weight, both
(B, S, E).

    y, total = EmbeddingNorm(ids, table, weight)

The same where a pass begins: ids (N) i32, table (V, E) compute -> total = table[ids] and y of it, both (N, E).
"""

from __future__ import annotations

import numpy as np

from ...config import ModelConfig
from ..op import Arg, Ceil, Constants, Dims, Grid, Op, Stage


def reference(x: np.ndarray, residual: np.ndarray, weight: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """The specification in numpy, f32 inside; shapes as in the module's docstring."""
    total = (x.astype(np.float32) + residual.astype(np.float32)).astype(x.dtype)  # rounded, as the next layer reads it
    wide = total.astype(np.float32)
    scale = 1 / np.sqrt((wide * wide).mean(-1, keepdims=True) + np.float32(eps))
    return ((wide * scale).astype(x.dtype) * weight).astype(x.dtype), total


def embedding_reference(
    ids: np.ndarray, table: np.ndarray, weight: np.ndarray, eps: float
) -> tuple[np.ndarray, np.ndarray]:
    """The specification of EmbeddingNorm in numpy."""
    total = table[ids]
    return reference(total, np.zeros_like(total), weight, eps)


def _constants(model: ModelConfig) -> Constants:
    block = 1 << (model.hidden_size - 1).bit_length()
    return {"E": model.hidden_size, "EPS": model.rms_norm_eps, "BLOCK": block}


def _grid(dims: Dims, ceil: Ceil) -> Grid:
    return dims["B"] * dims["S"], 1, 1


_TOKENS = ("B", "S", "E")
_OUTPUTS = (Arg("y", "compute", _TOKENS), Arg("total", "compute", _TOKENS))

OP = Op(
    "ResidualNorm",
    inputs=(Arg("x", "compute", _TOKENS), Arg("residual", "compute", _TOKENS), Arg("weight", "compute", ("E",))),
    outputs=_OUTPUTS,
    attributes=(),
    stages=(
        Stage(
            "ResidualNorm",
            "residual_norm.residual_norm",
            inputs=("x", "residual", "weight"),
            scalars=(),
            outputs=_OUTPUTS,
            constants=_constants,
            grid=_grid,
            num_warps=8,
            follows=True,
        ),
    ),
)

_EMBEDDED = (Arg("y", "compute", ("N", "E")), Arg("total", "compute", ("N", "E")))

EMBEDDING = Op(
    "EmbeddingNorm",
    inputs=(Arg("ids", "i32", ("N",)), Arg("table", "compute", ("V", "E")), Arg("weight", "compute", ("E",))),
    outputs=_EMBEDDED,
    attributes=(),
    stages=(
        Stage(
            "EmbeddingNorm",
            "residual_norm.embedding_norm",
            inputs=("ids", "table", "weight"),
            scalars=(),
            outputs=_EMBEDDED,
            constants=_constants,
            grid=lambda dims, ceil: (dims["N"], 1, 1),
            num_warps=8,
            follows=True,
        ),
    ),
)
