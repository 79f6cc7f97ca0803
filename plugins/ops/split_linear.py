"""SplitLinear: a projection whose inputs are summed in shares, for the torch engine on a GPU; no op of the graph.

    y = SplitLinear(x, weight, counters)

x (N, K) and weight (F, K) compute -> y = x weight^T (N, F) compute, summed in f32. For projections too narrow to fill a
card by their outputs (qkv and o). Tiles, shares and counters are those of `low_bit_linear`, and so a token's bits are
the same in every pass, whatever else is in it. The engine does not use it yet: it is not yet measured whether it is
quicker than cuBLAS.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from ...config import ModelConfig
from ..op import Arg, Constants, Op
from . import low_bit_linear
from .low_bit_linear import BLOCK_F, BLOCK_K, TILES

__all__ = ["TILES", "op", "reference"]


def reference(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The specification in numpy, f32 inside; shapes as in the module's docstring."""
    y: np.ndarray = x.astype(np.float32) @ weight.astype(np.float32).T
    return y.astype(x.dtype)


def _constants(model: ModelConfig, tile: int) -> Constants:
    return {"BLOCK_N": tile, "BLOCK_F": BLOCK_F, "BLOCK_K": BLOCK_K, "STEP": BLOCK_K}


@functools.cache
def op(tile: int) -> Op:
    """The op for tiles of `tile` tokens, one of TILES."""
    like = low_bit_linear.op("int8", tile)
    stage = dataclasses.replace(
        like.stages[0],
        name=f"SplitLinear{tile}",
        kernel="split_linear.split_linear",
        inputs=("x", "weight", "counters"),
        constants=functools.partial(_constants, tile=tile),
    )
    weight = Arg("weight", "compute", ("F", "K"))
    inputs = (like.args["x"], weight, like.args["counters"])
    return dataclasses.replace(like, name="SplitLinear", inputs=inputs, stages=(stage,))
