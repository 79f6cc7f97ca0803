# mypy: ignore-errors
"""Numbers of 8 bits as f32: exact, and the same on every card."""

import triton
import triton.language as tl


def converts_e4m3(_semantic=None):
    """Whether the card that is compiled for converts e4m3, two numbers in an instruction: from SM 89 on.

    A function of the Triton compiler, which gives `_semantic`; its interpreter gives none, and converts.
    """
    return tl.constexpr(_semantic is None or "fp8e4nv" in _semantic.builder.options.supported_fp8_dtypes)


converts_e4m3.__triton_builtin__ = True


@triton.jit
def from_e4m3(bits):
    """The f32 of the bits of e4m3 numbers, u8."""
    # f16 holds them all. Straight to bf16 Triton converts number by number, in the unit of transcendental functions.
    return bits.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(tl.float32) if converts_e4m3() else shifted_e4m3(bits)


@triton.jit
def shifted_e4m3(bits):
    """The same by shifts, of numbers that are finite."""
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
