# mypy: ignore-errors
"""exp, log and log2 by the card's own approximation, an instruction or two, where Triton's take up to 20.

Subnormal numbers are 0, going in and coming out. Functions of the Triton compiler, which gives `_semantic`; its
interpreter gives none and has its own.
"""

import triton.language as tl


def exp(x, _semantic=None):
    """e^x with the bits of `tl.exp`, but for what is subnormal."""
    if _semantic is None:
        return tl.exp(x)
    asm = "{ .reg .f32 t; mul.f32 t, $1, 0f3FB8AA3B; ex2.approx.ftz.f32 $0, t; }"  # 1 / ln 2
    return tl.inline_asm_elementwise(asm, "=r,r", [x], tl.float32, True, 1, _semantic=_semantic)


def log(x, _semantic=None):
    """ln x of positive x, within 1.7e-7 where x is in 1/2..2, and 2.4e-7 of the result elsewhere (PTX: 2^-22)."""
    if _semantic is None:
        return tl.log(x)
    asm = "{ .reg .f32 t; lg2.approx.ftz.f32 t, $1; mul.f32 $0, t, 0f3F317218; }"  # ln 2
    return tl.inline_asm_elementwise(asm, "=r,r", [x], tl.float32, True, 1, _semantic=_semantic)


def log2(x, _semantic=None):
    """log2 of positive x, as near as `log`."""
    if _semantic is None:
        return tl.log2(x)
    asm = "lg2.approx.ftz.f32 $0, $1;"
    return tl.inline_asm_elementwise(asm, "=r,r", [x], tl.float32, True, 1, _semantic=_semantic)


exp.__triton_builtin__ = log.__triton_builtin__ = log2.__triton_builtin__ = True
