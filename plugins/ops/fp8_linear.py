"""Fp8Linear: a projection with e4m3 weights and 16-bit activations, for the torch engine on a GPU; no op of the graph.

    y = Fp8Linear(x, weight, scale)

x (B, S, K) compute, weight (N, K) u8, the bits of e4m3, scale (N) f32 -> y = x (weight * scale)^T (B, S, N) compute,
summed in f32 and scaled once, at the end. K is a multiple of 16, so that every load is of 16 bytes. `quantise` makes
weight and scale. The kernel uses no fp8 arithmetic, so a card without fp8 halves the bytes it reads as well.
"""

from __future__ import annotations

import functools

import ml_dtypes
import numpy as np

from ...config import ModelConfig
from ..op import Arg, Ceil, Constants, Dims, Grid, Op, Stage

TILES = (16, 64)  # tokens of a tile, as in `head_commit`
BLOCK_N = {16: 32, 64: 64}  # outputs of a tile; small for a decode step, whose 4096 are to fill 132 multiprocessors
BLOCK_K = 128  # the step over K
STAGES = {16: 4, 64: 3}  # loads in flight; four of 64 tokens leave room for one block on SM 86 (docs/log.md)
LARGEST = 448.0  # the largest number of e4m3
MULTIPLE = 16  # K is a multiple of it


def quantise(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give the nearest e4m3 of each weight divided by its row's scale.

    Args:
        weight: (N, K) f32, finite.

    Returns:
        (N, K) e4m3 and (N) f32, the row's largest magnitude over 448; a row of zeros has the smallest scale.
    """
    most = np.abs(weight).max(-1)
    scale = np.maximum(most / np.float32(LARGEST), np.finfo(np.float32).tiny)
    over = np.clip(weight / scale[:, None], -LARGEST, LARGEST)
    return over.astype(ml_dtypes.float8_e4m3fn), scale


def reference(x: np.ndarray, weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The specification in numpy, f32 inside; shapes as in the module's docstring."""
    values = weight.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    y: np.ndarray = x.astype(np.float32) @ values.T * scale
    return y.astype(x.dtype)


def _constants(model: ModelConfig, tile: int) -> Constants:
    return {"BLOCK_M": tile, "BLOCK_N": BLOCK_N[tile], "BLOCK_K": BLOCK_K}


def _grid(dims: Dims, ceil: Ceil, tile: int) -> Grid:
    return ceil(dims["B"] * dims["S"], tile), ceil(dims["N"], BLOCK_N[tile]), 1


_OUTPUTS = (Arg("y", "compute", ("B", "S", "N")),)


@functools.cache
def op(tile: int) -> Op:
    """The op for tiles of `tile` tokens, one of TILES."""
    return Op(
        "Fp8Linear",
        inputs=(Arg("x", "compute", ("B", "S", "K")), Arg("weight", "u8", ("N", "K")), Arg("scale", "f32", ("N",))),
        outputs=_OUTPUTS,
        attributes=(),
        stages=(
            Stage(
                f"Fp8Linear{tile}",
                "fp8_linear.fp8_linear",
                inputs=("x", "weight", "scale"),
                scalars=("B", "S", "N", "K"),
                outputs=_OUTPUTS,
                constants=functools.partial(_constants, tile=tile),
                grid=functools.partial(_grid, tile=tile),
                num_stages=STAGES[tile],
            ),
        ),
    )
