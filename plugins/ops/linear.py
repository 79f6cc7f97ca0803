"""Linear: projections of tokens with weights of 16, 8 or 4 bits, for the torch engine on a GPU; no op of the graph.

    part = SplitLinear(x, weight, scale, zero)
    y = ShareSum(part)
    y = Linear(x, weight, scale, zero)
    y = GatedLinear(x, weight, scale, zero)

x (N, K) compute. weight is (F, K) compute, without scale and zero, which are (0); or (F, K) u8, the bits of e4m3 or of
int8, with a scale for each output, (F) f32, by which its sum is multiplied, and without zero. In 4 bits a weight is
(number - zero) * scale, rounded to compute, with a scale for GROUP inputs; all three are as `arranged` lays them out.

part (SHARES, N, F) f32 is share after share of the inputs, summed and scaled. Added in their order and rounded to
compute they are the product x weight^T: `residual_norm`, `rope_write` and `swiglu` add them where they read them, so no
program waits for another and no launch adds them. ShareSum adds them for what takes no shares, y (N, F) compute. Linear
gives the same y, each program summing all shares: for many tokens, whose tiles fill a card. GatedLinear is SwiGLU of a
packed projection, the gate's half first: y (N, F / 2) compute = silu(gate) * up, gate and up rounded before. It is for
one that is wide enough to fill a card in one share.

A token's bits are the same in every pass, whatever else is in it: self-speculation verifies in one pass what mode ar
decides in many. So one family of kernels serves every number of tokens, an instruction sums a token by itself, the
inputs follow one another in the same order in every tile, and how many shares there are is a matter of F and K alone.

K is a multiple of MULTIPLE, in 4 bits of GROUP. No kernel multiplies in 8 bits or fewer, so older cards read fewer
bytes as well. The engine multiplies weights of 16 bits so on request, up to 64 tokens: it is not yet measured whether
that is quicker than cuBLAS.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import ml_dtypes
import numpy as np

from ...config import ModelConfig
from ...contract import Quantization
from ..op import Arg, Constants, Op, Stage, ceil_div
from . import swiglu

if TYPE_CHECKING:
    from torch import Tensor

KINDS: tuple[Quantization | None, ...] = (None, "fp8", "int8", "int4")
TILES = (16, 64)  # tokens of a tile, as in `head_commit`
BLOCK_F = 128  # outputs of a tile; a warpgroup's instructions take 64 of them
BLOCK_K = 128  # shares are whole ones
GROUP = 32  # inputs of a weight of 4 bits that share a scale


class Steps(NamedTuple):
    """How a tile goes over its inputs. At most 99 KB of shared memory, so two programs of a multiprocessor."""

    inputs: int  # of a step
    warps: int
    stages: int  # steps whose weights are on their way or multiplied


# By bits of a weight and tokens of a tile.
STEPS = {
    16: {16: Steps(64, 4, 5), 64: Steps(64, 8, 4)},
    8: {16: Steps(128, 8, 5), 64: Steps(64, 8, 6)},
    4: {16: Steps(2 * GROUP, 8, 6), 64: Steps(2 * GROUP, 8, 4)},
}
STEP_F32 = {"STEP": 16}  # in f32, which a thread multiplies for itself, so many inputs at a time; 64 spilled
PROGRAMS = 264  # that fill a card: two for each of 132 multiprocessors
MOST_SHARES = 4  # a norm reads all of a token's in one program
LEAST_STEPS = 2  # of BLOCK_K in a share
SPLIT_TOKENS = 256  # up to which a share is a program of its own
AHEAD = 2**24  # bytes of weights that all programs together ask for before they may begin
LARGEST = 448.0  # the largest number of e4m3
MULTIPLE = 16  # K is a multiple of it
BLOCK = 1024  # outputs of a program that adds shares


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


def arranged(numbers: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lay a projection of 4 bits out as the kernel reads it.

    Args:
        numbers: (F, K) u8, 0 to 15.
        scale: (F, K / GROUP) f32.
        zero: (F, K / GROUP) u8, the numbers that stand for 0, or (F, 0) where 8 does.

    Returns:
        (P, F, GROUP) u8, P = K / GROUP / 2 rounded up, whose bytes have the inputs of an even group in the lower bits
        and of the next one in the upper bits; of scale and zero (2 P, F), or none, as one row.
    """
    from torch.nn import functional

    grouped = numbers.view(len(numbers), -1, GROUP).transpose(0, 1)  # (K / GROUP, F, GROUP)
    weight = grouped[0::2].contiguous()
    upper = grouped[1::2]
    weight[: len(upper)] |= upper << 4
    more = (0, 0, 0, grouped.shape[0] % 2)  # a last group of no inputs
    zero = functional.pad(zero.T, more) if zero.shape[1] else zero.T
    return weight, functional.pad(scale.T, more).flatten(), zero.flatten()


def reference(
    x: np.ndarray, weight: np.ndarray, scale: np.ndarray, count: int, kind: Quantization | None
) -> np.ndarray:
    """The specification of SplitLinear in numpy, but for 4 bits, (count, N, F) f32."""
    kinds = {"fp8": ml_dtypes.float8_e4m3fn, "int8": np.int8}
    values = weight if kind is None else weight.view(kinds[kind])
    part = _in_shares(x, values.astype(np.float32), count)
    scaled: np.ndarray = part if kind is None else part * scale
    return scaled


def reference_int4(x: np.ndarray, numbers: np.ndarray, scale: np.ndarray, zero: np.ndarray, count: int) -> np.ndarray:
    """The same of 4 bits; numbers, scale and zero as `arranged` takes them."""
    middle = zero.astype(np.float32) if zero.size else np.full(scale.shape, np.float32(8))
    values = (numbers - middle.repeat(GROUP, 1)) * scale.repeat(GROUP, 1)
    return _in_shares(x, values.astype(x.dtype).astype(np.float32), count)


def _in_shares(x: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """x (N, K) times values (F, K) f32, in shares."""
    length = ceil_div(ceil_div(x.shape[1], BLOCK_K), count) * BLOCK_K
    parts = [slice(share * length, (share + 1) * length) for share in range(count)]
    return np.stack([x[:, part].astype(np.float32) @ values[:, part].T for part in parts])


def sum_reference(part: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The specification of ShareSum in numpy."""
    y: np.ndarray = functools.reduce(np.add, part).astype(dtype)
    return y


def gated_reference(part: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The specification of GatedLinear in numpy, from SplitLinear's single share."""
    return swiglu.reference(sum_reference(part, dtype))


def _bits(kind: Quantization | None) -> int:
    """Of a weight."""
    return {None: 16, "int4": 4}.get(kind, 8)


def _constants(model: ModelConfig, kind: Quantization | None, tile: int, count: int, whole: bool) -> Constants:
    form = {"BITS": _bits(kind), "E4M3": kind == "fp8"}
    sizes = {"BLOCK_N": tile, "BLOCK_F": BLOCK_F, "BLOCK_K": BLOCK_K, "STEP": STEPS[_bits(kind)][tile].inputs}
    return {**form, **sizes, "SHARES": count, "WHOLE": whole, "AHEAD": AHEAD}


def _weights(kind: Quantization | None) -> tuple[Arg, ...]:
    weight = (
        Arg("weight", "u8", ("P", "F", GROUP))
        if kind == "int4"
        else Arg("weight", "u8" if kind else "compute", ("F", "K"))
    )
    return weight, Arg("scale", "f32", ("S",)), Arg("zero", "u8", ("Z",))


def _op(name: str, kernel: str, output: Arg, kind: Quantization | None, tile: int, count: int, whole: bool) -> Op:
    name = (kind or "").capitalize() + name
    inputs = (Arg("x", "compute", ("N", "K")), *_weights(kind))
    steps = STEPS[_bits(kind)][tile]
    stage = Stage(
        f"{name}{tile}",
        f"linear.{kernel}",
        inputs=tuple(arg.name for arg in inputs),
        scalars=("N", "F", "K", "Z"),
        outputs=(output,),
        constants=functools.partial(_constants, kind=kind, tile=tile, count=count, whole=whole),
        grid=lambda dims, ceil: (ceil(dims["N"], tile), ceil(dims["F"], BLOCK_F), 1 if whole else count),
        num_warps=steps.warps,
        num_stages=steps.stages,
        constants_f32={} if kind == "int4" else STEP_F32,
        follows=True,
        all_registers=True,
    )
    return Op(name, inputs=inputs, outputs=(output,), attributes=(), stages=(stage,))


@functools.cache
def split(kind: Quantization | None, tile: int, count: int) -> Op:
    """SplitLinear of so many shares, for weights of a kind and tiles of `tile` tokens, one of TILES."""
    return _op("SplitLinear", "linear", Arg("y", "f32", (count, "N", "F")), kind, tile, count, False)


@functools.cache
def whole(kind: Quantization, count: int) -> Op:
    """Linear of so many shares, for tiles of many tokens."""
    return _op("Linear", "linear", Arg("y", "compute", ("N", "F")), kind, TILES[-1], count, True)


@functools.cache
def gated(kind: Quantization | None, tile: int) -> Op:
    """GatedLinear for weights of a kind and tiles of `tile` tokens, one of TILES."""
    return _op("GatedLinear", "gated_linear", Arg("y", "compute", ("N", swiglu.half)), kind, tile, 1, True)


@functools.cache
def share_sum(count: int) -> Op:
    """ShareSum of so many shares."""
    output = Arg("y", "compute", ("N", "F"))
    stage = Stage(
        "ShareSum",
        "linear.share_sum",
        inputs=("part",),
        scalars=("F",),
        outputs=(output,),
        constants=lambda model: {"SHARES": count, "BLOCK": BLOCK},
        grid=lambda dims, ceil: (dims["N"], ceil(dims["F"], BLOCK), 1),
        follows=True,
    )
    inputs = (Arg("part", "f32", (count, "N", "F")),)
    return Op("ShareSum", inputs=inputs, outputs=(output,), attributes=(), stages=(stage,))
