# mypy: ignore-errors
"""The kernels of `ops/split_linear.py`: a program per tile of tokens and outputs, and share of the inputs.

What reads the shares adds them, so no program waits for another. Weights are asked for before the kernel before has
ended, since no kernel writes them, and the kernel behind may begin once they have been multiplied: earlier, and its
own weights would push these out of the cache.
"""

import triton
import triton.language as tl

from .dependent import ask, lead, wait
from .shares import put, share_sums
from .swiglu import gated


@triton.jit
def split_linear(
    x, weight, N, F, K, part,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr, SHARES: tl.constexpr,
    AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x (N, K), weight (F, K) -> part (SHARES, N, F)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    sums = _sums(x, weight, N, F, K, n, f, BLOCK_N, BLOCK_F, BLOCK_K, STEP, SHARES, AHEAD, PDL)
    place = (tl.program_id(2) * N + n[None, :]) * F + f[:, None]
    put(part + place, sums, (f < F)[:, None] & (n < N)[None, :])


@triton.jit
def gated_linear(
    x, weight, N, W, K, y,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr, AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """x (N, K), weight (W, K), the gate's half first -> y (N, W / 2)."""
    half: tl.constexpr = BLOCK_F // 2
    kind: tl.constexpr = y.dtype.element_ty
    F = W // 2
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, BLOCK_F)  # first those of the gate
    f = tl.program_id(1) * half + row % half + row // half * F
    sums = _sums(x, weight, N, W, K, n, f, BLOCK_N, BLOCK_F, BLOCK_K, STEP, 1, AHEAD, PDL)
    pairs = tl.permute(tl.reshape(sums.to(kind), [2, half, BLOCK_N]), [1, 2, 0])
    gate, up = tl.split(pairs)
    f = tl.program_id(1) * half + tl.arange(0, half)
    place = n[None, :] * F + f[:, None]
    inside = (f < F)[:, None] & (n < N)[None, :]
    tl.store(y + place, gated(gate.to(tl.float32), up.to(tl.float32)).to(kind), mask=inside)


@triton.jit
def _sums(
    x, weight, N, F, K, n, f,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr, SHARES: tl.constexpr,
    AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """This program's share of the outputs f (BLOCK_F,) for tokens n (BLOCK_N,), f32."""
    if PDL:
        tiles = tl.cdiv(AHEAD, tl.num_programs(1) * tl.num_programs(2))
        length = tl.cdiv(tl.cdiv(K, BLOCK_K), SHARES) * BLOCK_K
        begin = tl.program_id(2) * length
        numbers = tl.minimum(tl.minimum(tiles * BLOCK_K, length), K - begin)
        size = numbers * (weight.dtype.element_ty.primitive_bitwidth // 8)
        ask(weight + tl.minimum(f, F - 1).to(tl.int64) * K + begin, size + 0 * f)
    wait(PDL)
    sums = share_sums(x, weight, weight, weight, N, F, K, 0, SHARES, n, f, "same", BLOCK_N, BLOCK_F, BLOCK_K, STEP)
    lead(PDL)
    return sums
