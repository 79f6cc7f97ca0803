"""ResidualNorm: the residual sum and its RMS norm, for the torch engine on a GPU; no op of the graph.

    y, total = ResidualNorm(x, residual, weight)

x, residual (N, E) compute, weight (E) compute -> total = x + residual and y = total / rms(total) * weight, both (N, E).
x may come in the shares of `linear`, (W, N, E) f32.

    y, total = EmbeddingNorm(ids, table, weight)

The same where a pass begins: ids (N) i32, table (V, E) compute -> total = table[ids] and y of it, both (N, E).
"""

from __future__ import annotations

import functools

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
    return dims["N"], 1, 1


_OUTPUTS = (Arg("y", "compute", ("N", "E")), Arg("total", "compute", ("N", "E")))


@functools.cache
def op(shares: int = 0) -> Op:
    """The op over a whole x, or one in shares."""
    name = "ResidualNormOfShares" if shares else "ResidualNorm"
    x = Arg("x", "f32", ("W", "N", "E")) if shares else Arg("x", "compute", ("N", "E"))
    return Op(
        name,
        inputs=(x, Arg("residual", "compute", ("N", "E")), Arg("weight", "compute", ("E",))),
        outputs=_OUTPUTS,
        attributes=(),
        stages=(
            Stage(
                name,
                "residual_norm.residual_norm",
                inputs=("x", "residual", "weight"),
                scalars=(),
                outputs=_OUTPUTS,
                constants=lambda model: {**_constants(model), "SHARES": shares},
                grid=_grid,
                num_warps=32 if shares else 8,  # so few numbers a thread that all its loads leave at once
                follows=True,
            ),
        ),
    )


EMBEDDING = Op(
    "EmbeddingNorm",
    inputs=(Arg("ids", "i32", ("N",)), Arg("table", "compute", ("V", "E")), Arg("weight", "compute", ("E",))),
    outputs=_OUTPUTS,
    attributes=(),
    stages=(
        Stage(
            "EmbeddingNorm",
            "residual_norm.embedding_norm",
            inputs=("ids", "table", "weight"),
            scalars=(),
            outputs=_OUTPUTS,
            constants=_constants,
            grid=_grid,
            num_warps=8,
            follows=True,
        ),
    ),
)
