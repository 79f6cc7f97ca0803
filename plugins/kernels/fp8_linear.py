# mypy: ignore-errors
"""The kernel of `ops/fp8_linear.py`: one program per tile of tokens and outputs.

Programs of one tile of weights are neighbours in the grid, so after the first of them the weights come from the
second-level cache.
"""

import triton
import triton.language as tl


@triton.jit
def fp8_linear(
    x, weight, scale, B, S, N, K, y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x (B, S, K), weight (N, K) u8, scale (N,) f32 -> y (B, S, N)."""
    K = K // 16 * 16  # no change; tells the compiler that rows and the end of a row are aligned
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    real = m < B * S
    inside = n < N
    of_x = x + m.to(tl.int64)[:, None] * K + k[None, :]
    of_weight = weight + n.to(tl.int64)[:, None] * K + k[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        has = start + k < K
        a = tl.load(of_x + start, mask=real[:, None] & has[None, :], other=0.0)
        bits = tl.load(of_weight + start, mask=inside[:, None] & has[None, :], other=0).to(tl.uint16)
        # Sign to bit 15, exponent and mantissa to bits 13..7: the f16 of exactly 1/256 of the value, subnormal numbers
        # too, because the exponent's bias is 15 instead of 7.
        w = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        total = tl.dot(a, tl.trans(w.to(a.dtype)), total, input_precision="ieee")
    gain = tl.load(scale + n, mask=inside, other=0.0) * 256.0
    place = y + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(place, (total * gain[None, :]).to(y.dtype.element_ty), mask=real[:, None] & inside[None, :])
