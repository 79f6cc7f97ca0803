# mypy: ignore-errors
"""Products in shares of their inputs (`ops/linear.py`): what writes shares, and what adds them where they are read."""

import triton
import triton.language as tl


@triton.jit
def added(x, place, apart, mask, kind: tl.constexpr, SHARES: tl.constexpr):
    """Numbers of a product at some places, f32: as they are, or from SHARES sums that lie `apart`, rounded to kind."""
    whole = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    for share in tl.static_range(1, SHARES):
        whole += tl.load(x + share * apart + place, mask=mask, other=0.0)
    return whole.to(kind).to(tl.float32)


def times(a, b, _semantic=None):
    """a * b, f32, rounded before anything is added to it, as it is where it is stored; broadcast.

    A function of the Triton compiler, which gives `_semantic`; its interpreter gives none, and multiplies.
    """
    if _semantic is None:
        return a * b
    asm = "mul.rn.f32 $0, $1, $2;"
    return tl.inline_asm_elementwise(asm, "=f,f,f", [a, b], tl.float32, True, 1, _semantic=_semantic)


times.__triton_builtin__ = True


def put(pointer, value, mask, _semantic=None):
    """`tl.store` of f32 numbers by the threads that have them, which for sums of a product it has change places first.

    A function of the Triton compiler, which gives `_semantic`; its interpreter gives none, and stores.
    """
    if _semantic is None:
        tl.store(pointer, value, mask=mask)
        return
    asm = "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.global.f32 [$1], $2; mov.u32 $0, 0; }"
    arguments = [pointer.to(tl.int64, _semantic=_semantic), value, mask.to(tl.int32, _semantic=_semantic)]
    tl.inline_asm_elementwise(asm, "=r,l,f,r", arguments, tl.int32, False, 1, _semantic=_semantic)


put.__triton_builtin__ = True
