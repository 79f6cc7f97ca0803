# mypy: ignore-errors
"""Rows of K and V to 8 bits and back, as `ops/kv_cache.py` says; for the kernels that write and read a cache.

CACHE is 0 for numbers of the engine's own dtype, 1 for int8, 2 for e4m3.
"""

import triton
import triton.language as tl

from .token_quantise import e4m3


@triton.jit
def row_scale(first, second, CACHE: tl.constexpr):
    """The scale of each row (H,) f32 from the two halves of its numbers (H, P) f32."""
    most = tl.maximum(tl.max(tl.abs(first), 1), tl.max(tl.abs(second), 1))
    largest: tl.constexpr = 127.0 if CACHE == 1 else 448.0
    return tl.maximum(tl.div_rn(most, largest), 1.1754943508222875e-38)


@triton.jit
def to_bits(x, scale, CACHE: tl.constexpr):
    """The nearest number of 8 bits for x / scale, of one shape; i8, or u8 for e4m3."""
    over = tl.div_rn(x, scale)
    if CACHE == 1:
        # 1.5 * 2^23 leaves no fraction, so the sum rounds, ties to even.
        bits = ((tl.minimum(tl.maximum(over, -127.0), 127.0) + 12582912.0) - 12582912.0).to(tl.int8)
    else:
        bits = e4m3(tl.minimum(tl.maximum(over, -448.0), 448.0))
    return bits


@triton.jit
def to_numbers(bits, kind: tl.constexpr, CACHE: tl.constexpr):
    """What is stored as numbers of a dtype, exactly: of e4m3 1/256, which its bits shifted are as f16.

    A byte with the exponent of 1024 before it is an f16 too, so no slow conversion of integers is needed.
    """
    if CACHE == 0:
        numbers = bits
    elif CACHE == 1:
        byte = bits.to(tl.uint8, bitcast=True).to(tl.uint16)
        numbers = ((byte ^ 0x80) | 0x6400).to(tl.float16, bitcast=True) - 1152.0
    else:
        wide = bits.to(tl.uint16)
        numbers = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return numbers.to(kind)
