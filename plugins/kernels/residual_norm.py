# mypy: ignore-errors
"""The kernel of `ops/residual_norm.py`: one program per token."""

import triton
import triton.language as tl

from .dependent import follow


@triton.jit
def residual_norm(
    x, residual, weight, y, total, E: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """x, residual (B, S, E), weight (E,) -> y, total (B, S, E)."""
    follow(PDL)
    e = tl.arange(0, BLOCK)
    inside = e < E
    at = tl.program_id(0).to(tl.int64) * E + e
    kind: tl.constexpr = y.dtype.element_ty
    a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    summed = (a + b).to(kind)
    tl.store(total + at, summed, mask=inside)
    wide = summed.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, 0) / E + EPS)
    gain = tl.load(weight + e, mask=inside, other=0.0).to(tl.float32)
    # The norm is rounded before it is multiplied by the weight, as in the graph.
    tl.store(y + at, ((wide * scale).to(kind).to(tl.float32) * gain).to(kind), mask=inside)
