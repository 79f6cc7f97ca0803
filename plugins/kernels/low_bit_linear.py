# mypy: ignore-errors
"""The kernels of `ops/low_bit_linear.py`: a program per tile of tokens and outputs, or for few tokens per share of one.

Programs of one tile of weights are neighbours in the grid, so after the first of them the weights come from the
second-level cache. The weights are the left side of the product: a card may take that side from registers, where they
have just been widened, and a pass of few tokens fills a tile of outputs all the same. `shares.py` sums.
"""

import triton
import triton.language as tl

from .dependent import follow
from .shares import finish, share_sums


@triton.jit
def byte_linear(
    x, weight, scale, counters, N, F, K, W, part, y,
    E4M3: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x (N, K), weight (F, K) u8, scale (F,) f32 -> y (N, F), by W shares."""
    follow(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    whole = share_sums(x, weight, N, F, K, W, n, f, "e4m3" if E4M3 else "int8", BLOCK_N, BLOCK_F, BLOCK_K)
    gain = tl.load(scale + f, mask=f < F, other=0.0)
    finish(whole, gain, counters, N, F, part, y, n, f, BLOCK_N, BLOCK_F)


@triton.jit
def nibble_linear(
    x, weight, scale, zero, counters, N, F, K, Z, W, part, y,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x (N, K), weight (P, F, GROUP) u8, scale (2 P, F) f32, zero (2 P, F) or (0, F) u8 -> y (N, F), by W shares."""
    follow(PDL)
    K = K // 16 * 16
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    k = tl.arange(0, GROUP)
    real = n < N
    inside = f < F
    of_x = x + n.to(tl.int64)[None, :] * K + k[:, None]
    of_weight = weight + f[:, None] * GROUP + k[None, :]
    pairs = tl.cdiv(K, 2 * GROUP)
    length = tl.cdiv(pairs, W)  # of a share
    whole = tl.zeros([BLOCK_F, BLOCK_N], tl.float32)
    first = tl.program_id(2)
    for share in range(first, first + W // tl.num_programs(2)):
        total = tl.zeros([BLOCK_F, BLOCK_N], tl.float32)
        for pair in range(share * length, tl.minimum((share + 1) * length, pairs)):
            bits = tl.load(of_weight + pair * F * GROUP, mask=inside[:, None], other=0).to(tl.uint32)
            for half in tl.static_range(2):
                group = pair * 2 + half
                has = group * GROUP + k < K
                a = tl.load(of_x + group * GROUP, mask=has[:, None] & real[None, :], other=0.0)
                step = tl.load(scale + group * F + f, mask=inside, other=0.0)
                middle = tl.load(zero + group * F + f, mask=inside & (group + 0 * f < Z), other=8).to(tl.float32)
                numbers = (((bits >> (4 * half)) & 15) | 0x4B000000).to(tl.float32, bitcast=True)  # and 2^23
                w = (numbers - (8388608.0 + middle)[:, None]) * step[:, None]
                total = tl.dot(w.to(a.dtype), a, total, input_precision="ieee")
        whole += total
    finish(whole, tl.full([BLOCK_F], 1.0, tl.float32), counters, N, F, part, y, n, f, BLOCK_N, BLOCK_F)
