# mypy: ignore-errors
"""The kernels of `ops/residual_norm.py`: one program per token."""

import triton
import triton.language as tl

from .dependent import follow
from .shares import added


@triton.jit
def residual_norm(
    x, residual, weight, y, total,
    E: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr, SHARES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x (N, E), or of SHARES (SHARES, N, E), residual (N, E), weight (E,) -> y, total (N, E)."""
    follow(PDL)
    e = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * E + e
    kind: tl.constexpr = y.dtype.element_ty
    b = tl.load(residual + at, mask=e < E, other=0.0).to(tl.float32)
    a = added(x, at, tl.num_programs(0).to(tl.int64) * E, e < E, kind, SHARES)
    _norm((a + b).to(kind), weight, y, total, at, e, E, EPS)


@triton.jit
def embedding_norm(
    ids, table, weight, y, total, E: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """ids (N,), table (V, E), weight (E,) -> y, total (N, E)."""
    follow(PDL)
    e = tl.arange(0, BLOCK)
    token = tl.program_id(0)
    embedded = tl.load(table + tl.load(ids + token).to(tl.int64) * E + e, mask=e < E, other=0.0)
    _norm(embedded, weight, y, total, token.to(tl.int64) * E + e, e, E, EPS)


@triton.jit
def _norm(summed, weight, y, total, at, e, E: tl.constexpr, EPS: tl.constexpr):
    """Store a token's sum (BLOCK,), which has the type of y, and the norm of it; `at` are their places."""
    inside = e < E
    # Read before the sum, for which all threads wait: on its way meanwhile.
    gain = tl.load(weight + e, mask=inside, other=0.0).to(tl.float32)
    tl.store(total + at, summed, mask=inside)
    wide = summed.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, 0) / E + EPS)
    # The norm is rounded before it is multiplied by the weight, as in the graph.
    normed = (wide * scale).to(summed.dtype).to(tl.float32)
    tl.store(y + at, (normed * gain).to(summed.dtype), mask=inside)
