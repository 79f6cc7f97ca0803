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
    E4M3: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """x (N, K), weight (F, K) u8, scale (F,) f32 -> y (N, F), by W shares."""
    follow(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    whole = share_sums(
        x, weight, weight, weight, N, F, K, 0, W, n, f, "e4m3" if E4M3 else "int8", BLOCK_N, BLOCK_F, BLOCK_K, STEP
    )
    gain = tl.load(scale + f, mask=f < F, other=0.0)
    finish(whole, gain, counters, N, F, part, y, n, f, BLOCK_N, BLOCK_F)


@triton.jit
def nibble_linear(
    x, weight, scale, zero, counters, N, F, K, Z, W, part, y,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x (N, K), weight (P, F, GROUP) u8, scale (2 P, F) f32, zero (2 P, F) or (0, F) u8 -> y (N, F), by W shares."""
    follow(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    pair: tl.constexpr = 2 * GROUP
    whole = share_sums(x, weight, scale, zero, N, F, K, Z, W, n, f, "int4", BLOCK_N, BLOCK_F, pair, pair)
    finish(whole, tl.full([BLOCK_F], 1.0, tl.float32), counters, N, F, part, y, n, f, BLOCK_N, BLOCK_F)
