"""LowBitLinear: a projection with weights of 8 or 4 bits, for the torch engine on a GPU; no op of the graph.

    y = Fp8Linear(x, weight, scale, counters)
    y = Int8Linear(x, weight, scale, counters)
    y = Int4Linear(x, weight, scale, zero, counters)

x (N, K) compute -> y (N, F) compute, summed in f32. In 8 bits weight is (F, K) u8, the bits of e4m3 or of int8, and
scale (F) f32: y = x weight^T scale, scaled once, at the end. In 4 bits a weight is (number - zero) * scale, rounded to
compute, with a scale for GROUP inputs; weight, scale and zero are as `arranged` lays them out.

A token's bits are the same in every pass, whatever else is in it: self-speculation verifies in one pass what mode ar
decides in many. So one kernel serves every number of tokens, its tiles differ in tokens alone, and the inputs are
summed in shares whose number comes from K and F. Where tokens are few, every share is a program of its own, since F
alone does not fill a card; `counters` say which program finishes last, and are left as they were, zeros.

K is a multiple of 16 in 8 bits and of GROUP in 4. No kernel multiplies in 8 bits or fewer, so older cards read
fewer bytes as well.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from ...config import ModelConfig
from ...contract import Quantization
from ..op import Arg, Ceil, Constants, Dims, Grid, Op, Stage, ceil_div

if TYPE_CHECKING:
    from torch import Tensor

KINDS: tuple[Quantization, ...] = ("fp8", "int8", "int4")
TILES = (16, 64)  # tokens of a tile, as in `head_commit`
BLOCK_F = 128  # outputs of a tile; a warpgroup's instructions take 64 of them
BLOCK_K = 64  # the step over K, in 4 bits a pair of groups
STEP_F32 = {"STEP": 16}  # in f32, which a thread multiplies for itself, so many inputs at a time; 64 spilled
WARPS = {16: 4, 64: 8}
STAGES = {16: 4, 64: 3}  # loads in flight
GROUP = 32  # inputs of a weight of 4 bits that share a scale
PROGRAMS = 264  # that fill a card: two for each of 132 multiprocessors
MOST_SHARES = 16
LEAST_STEPS = 4  # of BLOCK_K in a share
SPLIT_TOKENS = 256  # up to which a share is a program of its own
LARGEST = 448.0  # the largest number of e4m3
MULTIPLE = 16  # K is a multiple of it in 8 bits


def quantise(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give the nearest e4m3 of each weight divided by its row's scale.

    Args:
        weight: (F, K) f32, finite.

    Returns:
        (F, K) e4m3 and (F) f32, the row's largest magnitude over 448; a row of zeros has the smallest scale.
    """
    most = np.abs(weight).max(-1)
    scale = np.maximum(most / np.float32(LARGEST), np.finfo(np.float32).tiny)
    over = np.clip(weight / scale[:, None], -LARGEST, LARGEST)
    return over.astype(ml_dtypes.float8_e4m3fn), scale


def shares(outputs: int, inputs: int) -> int:
    """In how many shares a projection's inputs are summed; of its shape alone."""
    fill = PROGRAMS // ceil_div(outputs, BLOCK_F)
    return max(1, min(MOST_SHARES, fill, ceil_div(inputs, BLOCK_K) // LEAST_STEPS))


def counters(outputs: int, inputs: int) -> tuple[int, int]:
    """The shape (W, C) of a projection's counters: W shares, and C tiles of passes whose shares are programs."""
    return shares(outputs, inputs), ceil_div(SPLIT_TOKENS, TILES[1]) * ceil_div(outputs, BLOCK_F)


def arranged(numbers: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lay a projection of 4 bits out as the kernel reads it.

    Args:
        numbers: (F, K) u8, 0 to 15.
        scale: (F, K / GROUP) f32.
        zero: (F, K / GROUP) u8, the numbers that stand for 0, or (F, 0) where 8 does.

    Returns:
        (P, F, GROUP) u8, P = K / GROUP / 2 rounded up, whose bytes have the inputs of an even group in the lower bits
        and of the next one in the upper bits; scale (2 P, F) f32; zero (2 P, F) u8, or (0, F).
    """
    from torch.nn import functional

    grouped = numbers.view(len(numbers), -1, GROUP).transpose(0, 1)  # (K / GROUP, F, GROUP)
    weight = grouped[0::2].contiguous()
    upper = grouped[1::2]
    weight[: len(upper)] |= upper << 4
    more = (0, 0, 0, grouped.shape[0] % 2)  # a last group of no inputs
    zero = functional.pad(zero.T, more) if zero.shape[1] else zero.T
    return weight, functional.pad(scale.T, more).contiguous(), zero.contiguous()


def reference(x: np.ndarray, weight: np.ndarray, scale: np.ndarray, kind: Quantization) -> np.ndarray:
    """The specification in numpy for 8 bits, f32 inside; shapes as in the module's docstring."""
    values = weight.view(ml_dtypes.float8_e4m3fn if kind == "fp8" else np.int8).astype(np.float32)
    y: np.ndarray = x.astype(np.float32) @ values.T * scale
    return y.astype(x.dtype)


def reference_int4(x: np.ndarray, numbers: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """The specification in numpy for 4 bits, f32 inside; numbers, scale and zero as `arranged` takes them."""
    middle = zero.astype(np.float32) if zero.size else np.full(scale.shape, np.float32(8))
    values = (numbers - middle.repeat(GROUP, 1)) * scale.repeat(GROUP, 1)
    y: np.ndarray = x.astype(np.float32) @ values.astype(x.dtype).astype(np.float32).T
    return y.astype(x.dtype)


def _constants(model: ModelConfig, kind: Quantization, tile: int) -> Constants:
    step = {"GROUP": GROUP} if kind == "int4" else {"E4M3": kind == "fp8", "BLOCK_K": BLOCK_K, "STEP": BLOCK_K}
    return {"BLOCK_N": tile, "BLOCK_F": BLOCK_F, **step}


def _programs(dims: Dims, ceil: Ceil) -> int:
    """Programs that share a tile's inputs."""
    return int(dims["W"]) if dims["N"] <= SPLIT_TOKENS else 1


def _parts(dims: Dims, ceil: Ceil) -> int:
    return _programs(dims, ceil) if dims["W"] > 1 else 0


def _grid(dims: Dims, ceil: Ceil, tile: int) -> Grid:
    return ceil(dims["N"], tile), ceil(dims["F"], BLOCK_F), _programs(dims, ceil)


_Y = Arg("y", "compute", ("N", "F"))
_INPUTS: dict[str, tuple[Arg, ...]] = {
    "8 bits": (Arg("weight", "u8", ("F", "K")), Arg("scale", "f32", ("F",))),
    "int4": (Arg("weight", "u8", ("P", "F", GROUP)), Arg("scale", "f32", ("L", "F")), Arg("zero", "u8", ("Z", "F"))),
}


@functools.cache
def op(kind: Quantization, tile: int) -> Op:
    """The op for weights of a kind and tiles of `tile` tokens, one of TILES."""
    weights = _INPUTS["int4" if kind == "int4" else "8 bits"]
    inputs = (Arg("x", "compute", ("N", "K")), *weights, Arg("counters", "i32", ("W", "C")))
    return Op(
        f"{kind.capitalize()}Linear",
        inputs=inputs,
        outputs=(_Y,),
        attributes=(),
        stages=(
            Stage(
                f"{kind.capitalize()}Linear{tile}",
                f"low_bit_linear.{'nibble' if kind == 'int4' else 'byte'}_linear",
                inputs=tuple(arg.name for arg in inputs),
                scalars=("N", "F", "K", "Z", "W") if kind == "int4" else ("N", "F", "K", "W"),
                outputs=(Arg("part", "f32", (_parts, "N", "F")), _Y),
                constants=functools.partial(_constants, kind=kind, tile=tile),
                grid=functools.partial(_grid, tile=tile),
                num_warps=WARPS[tile],
                num_stages=STAGES[tile],
                constants_f32={} if kind == "int4" else STEP_F32,
                follows=True,
            ),
        ),
    )
