"""SplitLinear: a projection of few tokens in shares of its inputs, for the torch engine on a GPU; no op of the graph.

    part = SplitLinear(x, weight)

x (N, K) and weight (F, K) compute -> part (SHARES, N, F) f32: share after share of the inputs, summed in f32. Added in
their order and rounded to compute, the shares are x weight^T; `residual_norm` and `rope_write` add them where they read
them, so that no program waits for another and no launch adds them.

    y = GatedLinear(x, weight)

SwiGLU of a packed projection: weight (W, K), the gate's half first -> y (N, W / 2) compute = silu(gate) * up, gate and
up rounded before. It is wide enough to fill a card in one share.

How many shares there are is a matter of F and K alone, and tiles differ in tokens alone, so a token's bits are the same
in every pass, whatever else is in it. K is a multiple of 16. The engine uses both on request, of up to 64 tokens: it
is not yet measured whether they are quicker than cuBLAS.
"""

from __future__ import annotations

import functools

import numpy as np

from ...config import ModelConfig
from ..op import Arg, Ceil, Constants, Dims, Op, Stage, ceil_div
from . import swiglu
from .low_bit_linear import MULTIPLE, PROGRAMS, STEP_F32

__all__ = ["MULTIPLE", "TILES", "gated", "gated_reference", "op", "reference", "shares"]

TILES = (16, 64)  # tokens of a tile
BLOCK_F = 128  # outputs of a tile
BLOCK_K = 64  # inputs of a tile; shares are whole ones
WARPS = {16: 4, 64: 8}
STAGES = {16: 5, 64: 4}  # 96 KB of shared memory at most, so two programs of a multiprocessor
MOST_SHARES = 4  # a norm reads all of a token's in one program
LEAST_STEPS = 4  # of BLOCK_K in a share
AHEAD = 1024  # tiles of weights, 16 KB each in 16 bits, that all programs together ask for before they may begin


def shares(outputs: int, inputs: int) -> int:
    """In how many shares a projection's inputs are summed."""
    fill = PROGRAMS // ceil_div(outputs, BLOCK_F)
    return max(1, min(MOST_SHARES, fill, ceil_div(inputs, BLOCK_K) // LEAST_STEPS))


def reference(x: np.ndarray, weight: np.ndarray, count: int) -> np.ndarray:
    """The specification in numpy, of so many shares; shapes as in the module's docstring."""
    length = ceil_div(ceil_div(x.shape[1], BLOCK_K), count) * BLOCK_K
    parts = [slice(share * length, (share + 1) * length) for share in range(count)]
    return np.stack([x[:, part].astype(np.float32) @ weight[:, part].astype(np.float32).T for part in parts])


def gated_reference(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The specification of GatedLinear in numpy."""
    return swiglu.reference(reference(x, weight, 1)[0].astype(x.dtype))


def _constants(model: ModelConfig, tile: int, count: int | None) -> Constants:
    sizes = {"BLOCK_N": tile, "BLOCK_F": BLOCK_F, "BLOCK_K": BLOCK_K, "STEP": BLOCK_K}
    return {**sizes, **({} if count is None else {"SHARES": count}), "AHEAD": AHEAD}


def _half(dims: Dims, ceil: Ceil) -> int:
    half: int = dims["W"] // 2
    return half


def _op(name: str, kernel: str, letter: str, output: Arg, tile: int, count: int | None) -> Op:
    """An op over weight (`letter`, K)."""
    inputs = (Arg("x", "compute", ("N", "K")), Arg("weight", "compute", (letter, "K")))
    stage = Stage(
        f"{name}{tile}",
        kernel,
        inputs=("x", "weight"),
        scalars=("N", letter, "K"),
        outputs=(output,),
        constants=functools.partial(_constants, tile=tile, count=count),
        grid=lambda dims, ceil: (ceil(dims["N"], tile), ceil(dims[letter], BLOCK_F), count or 1),
        num_warps=WARPS[tile],
        num_stages=STAGES[tile],
        constants_f32=STEP_F32,
        follows=True,
        all_registers=True,
    )
    return Op(name, inputs=inputs, outputs=(output,), attributes=(), stages=(stage,))


@functools.cache
def op(tile: int, count: int) -> Op:
    """The op of so many shares for tiles of `tile` tokens, one of TILES."""
    return _op("SplitLinear", "split_linear.split_linear", "F", Arg("part", "f32", (count, "N", "F")), tile, count)


@functools.cache
def gated(tile: int) -> Op:
    """GatedLinear for tiles of `tile` tokens, one of TILES."""
    return _op("GatedLinear", "split_linear.gated_linear", "W", Arg("y", "compute", ("N", _half)), tile, None)
