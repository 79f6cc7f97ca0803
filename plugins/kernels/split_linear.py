# mypy: ignore-errors
"""The kernel of `ops/split_linear.py`: as those of `low_bit_linear`, with weights as they are."""

import triton
import triton.language as tl

from .dependent import follow
from .low_bit_linear import finish


@triton.jit
def split_linear(
    x, weight, counters, N, F, K, W, part, y,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x (N, K), weight (F, K) -> y (N, F), by W shares."""
    follow(PDL)
    K = K // 16 * 16  # no change; tells the compiler that rows and the end of a row are aligned
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    k = tl.arange(0, BLOCK_K)
    real = n < N
    inside = f < F
    of_x = x + n.to(tl.int64)[None, :] * K + k[:, None]
    of_weight = weight + f.to(tl.int64)[:, None] * K + k[None, :]
    length = tl.cdiv(tl.cdiv(K, BLOCK_K), W) * BLOCK_K  # of a share
    whole = tl.zeros([BLOCK_F, BLOCK_N], tl.float32)
    first = tl.program_id(2)
    for share in range(first, first + W // tl.num_programs(2)):
        total = tl.zeros([BLOCK_F, BLOCK_N], tl.float32)
        for start in range(share * length, tl.minimum((share + 1) * length, K), BLOCK_K):
            has = start + k < K
            a = tl.load(of_x + start, mask=has[:, None] & real[None, :], other=0.0)
            w = tl.load(of_weight + start, mask=inside[:, None] & has[None, :], other=0.0)
            total = tl.dot(w, a, total, input_precision="ieee")
        whole += total
    finish(whole, tl.full([BLOCK_F], 1.0, tl.float32), counters, N, F, part, y, n, f, BLOCK_N, BLOCK_F)
