# mypy: ignore-errors
"""Numbers of 8 bits as f32, by no arithmetic that an older card lacks."""

import triton
import triton.language as tl


@triton.jit
def from_e4m3(bits):
    """The f32 of the bits of e4m3 numbers, u8."""
    wide = bits.to(tl.uint32)
    # Sign to bit 31, exponent and mantissa to bits 26..20: the f32 of exactly 2^-120 of the value, subnormal numbers
    # too, because the exponent's bias is 127 instead of 7.
    small = (((wide & 0x80) << 24) | ((wide & 0x7F) << 20)).to(tl.float32, bitcast=True)
    return small * 1.329227995784916e36  # 2^120


@triton.jit
def from_int8(bits):
    """The f32 of the bits of int8 numbers, u8."""
    # The last bits of 2^23 count from 0; a byte with its sign turned over does so from -128.
    return ((bits.to(tl.uint32) ^ 0x80) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0
