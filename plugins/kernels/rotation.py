# mypy: ignore-errors
"""The kernel of `ops/rotation.py`: one program per token."""

import triton
import triton.language as tl


@triton.jit
def rotation(
    pos, inv_freq, cos, sin, scale,
    HALF: tl.constexpr, PAIRS: tl.constexpr, FACTOR: tl.constexpr, BETA: tl.constexpr, PERIOD: tl.constexpr,
):  # fmt: skip
    """pos (N,), inv_freq (P,) -> cos, sin (N, P), scale (N,)."""
    token = tl.program_id(0)
    p = tl.arange(0, PAIRS)
    inside = p < HALF
    kind: tl.constexpr = cos.dtype.element_ty
    at = tl.load(pos + token).to(tl.float32)
    angle = at * tl.load(inv_freq + p, mask=inside, other=0.0)
    place = token.to(tl.int64) * HALF + p
    tl.store(cos + place, (tl.cos(angle) * FACTOR).to(kind), mask=inside)
    tl.store(sin + place, (tl.sin(angle) * FACTOR).to(kind), mask=inside)
    gain = 1.0 + BETA * tl.log(1.0 + tl.floor(tl.div_rn(at, PERIOD + 0.0)))
    tl.store(scale + token, gain.to(kind))
