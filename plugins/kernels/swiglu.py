# mypy: ignore-errors
"""The kernel of `ops/swiglu.py`: one program per token and share of its width."""

import triton
import triton.language as tl

from .dependent import follow
from .shares import added


@triton.jit
def swiglu(gate_up, y, F: tl.constexpr, BLOCK: tl.constexpr, SHARES: tl.constexpr, PDL: tl.constexpr):
    """gate_up (N, 2 F), or of SHARES (SHARES, N, 2 F) -> y (N, F)."""
    follow(PDL)
    token = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = f < F
    kind: tl.constexpr = y.dtype.element_ty
    apart = tl.num_programs(0).to(tl.int64) * 2 * F
    gate = added(gate_up, token * 2 * F + f, apart, inside, kind, SHARES)
    up = added(gate_up, token * 2 * F + F + f, apart, inside, kind, SHARES)
    tl.store(y + token * F + f, gated(gate, up).to(kind), mask=inside)


@triton.jit
def gated(gate, up):
    """silu(gate) * up, f32."""
    small = tl.exp(-tl.abs(gate))  # never overflows
    return gate * (tl.where(gate >= 0, 1.0, small) / (1.0 + small)) * up
