# mypy: ignore-errors
"""The kernel of `ops/split_linear.py`: as those of `low_bit_linear.py`, with weights as they are."""

import triton
import triton.language as tl

from .dependent import follow
from .shares import finish, share_sums


@triton.jit
def split_linear(
    x, weight, counters, N, F, K, W, part, y,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x (N, K), weight (F, K) -> y (N, F), by W shares."""
    follow(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    whole = share_sums(x, weight, weight, weight, N, F, K, 0, W, n, f, "same", BLOCK_N, BLOCK_F, BLOCK_K, STEP)
    finish(whole, tl.full([BLOCK_F], 1.0, tl.float32), counters, N, F, part, y, n, f, BLOCK_N, BLOCK_F)
