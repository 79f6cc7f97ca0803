# mypy: ignore-errors
"""The kernel of `ops/swiglu.py`: one program per token and share of its width."""

import triton
import triton.language as tl

from .dependent import follow


@triton.jit
def swiglu(gate_up, y, F: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """gate_up (B, S, 2 F) -> y (B, S, F)."""
    follow(PDL)
    token = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = f < F
    gate = tl.load(gate_up + token * 2 * F + f, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * F + F + f, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + token * F + f, gated(gate, up).to(y.dtype.element_ty), mask=inside)


@triton.jit
def gated(gate, up):
    """silu(gate) * up, f32."""
    small = tl.exp(-tl.abs(gate))  # never overflows
    return gate * (tl.where(gate >= 0, 1.0, small) / (1.0 + small)) * up
