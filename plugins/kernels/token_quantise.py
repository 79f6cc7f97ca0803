# mypy: ignore-errors
"""The kernel of `ops/token_quantise.py`: one program per token, which reads it twice, the second time from a cache."""

import triton
import triton.language as tl

from .dependent import follow


@triton.jit
def e4m3(x):
    """The bits of the nearest e4m3, ties to even, of f32 numbers up to 448 in magnitude; u8."""
    size = tl.abs(x)
    exponent = tl.maximum((size.to(tl.int32, bitcast=True) >> 23) - 127, -6)  # -6 for the subnormal numbers too
    steps = size * ((130 - exponent) << 23).to(tl.float32, bitcast=True)  # over the distance of neighbours, exactly
    count = ((steps + 8388608.0) - 8388608.0).to(tl.int32)  # 2^23 leaves no fraction, so it rounds; 0 to 16
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (sign | (((exponent + 6) << 3) + count)).to(tl.uint8)


@triton.jit
def token_quantise(x, K, values, scale, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """x (N, K) -> values (N, K) u8, scale (N,) f32."""
    follow(PDL)
    K = K // 16 * 16  # no change; tells the compiler that rows are aligned
    token = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    most = tl.zeros([BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        part = tl.load(x + token * K + start + k, mask=start + k < K, other=0.0)
        most = tl.maximum(most, tl.abs(part.to(tl.float32)))
    size = tl.maximum(tl.div_rn(tl.max(most, 0), 448.0), 1.1754943508222875e-38)
    tl.store(scale + token, size)
    for start in range(0, K, BLOCK):
        inside = start + k < K
        part = tl.load(x + token * K + start + k, mask=inside, other=0.0).to(tl.float32)
        over = tl.minimum(tl.maximum(tl.div_rn(part, size), -448.0), 448.0)
        tl.store(values + token * K + start + k, e4m3(over), mask=inside)
