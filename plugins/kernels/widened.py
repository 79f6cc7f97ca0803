# mypy: ignore-errors
"""Numbers of 8 bits as f32, by no arithmetic that an older card lacks."""

import triton
import triton.language as tl


@triton.jit
def from_e4m3(bits):
    """The f32 of the bits of e4m3 numbers, u8."""
    # Sign to bit 31, exponent and mantissa to bits 26..20: the f32 of exactly 2^-120 of the value, subnormal numbers
    # too, because the exponent's bias is 127 instead of 7. Widened with its sign, a byte takes one shift and one mask.
    wide = bits.to(tl.int8, bitcast=True).to(tl.int32) << 20
    small = (wide & -2014314496).to(tl.float32, bitcast=True)  # 0x87F00000
    return small * 1.329227995784916e36  # 2^120


@triton.jit
def from_int8(bits):
    """The f32 of the bits of int8 numbers, u8."""
    # The last bits of 1.5 * 2^23, 0x4B400000, count by one.
    return (bits.to(tl.int8, bitcast=True).to(tl.int32) + 1262485504).to(tl.float32, bitcast=True) - 12582912.0
