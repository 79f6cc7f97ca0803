# mypy: ignore-errors
"""The kernel of `ops/rope_write.py`: one program per token and some heads."""

import triton
import triton.language as tl

from .dependent import follow
from .kv_cache import row_scale, to_bits
from .shares import added


@triton.jit
def _rotated_heads(
    qkv, cos, sin, scale, slot, A, q,
    H: tl.constexpr, G: tl.constexpr, PAGE: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr,
    HEADS: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """Write some heads of a token into q (N, H, D) where they are queries; give those of K and V.

    That is both halves (HEADS, PAIRS) f32, where in a page they go as a row of 2 HALF numbers (HEADS, 1), and which of
    them are K, and V.
    """
    token = tl.program_id(0)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    p = tl.arange(0, PAIRS)[None, :]
    kind: tl.constexpr = q.dtype.element_ty
    inside = (head < H + 2 * G) & (p < HALF)
    source = (token.to(tl.int64) * (H + 2 * G) + head) * 2 * HALF + p
    apart = tl.num_programs(0).to(tl.int64) * (H + 2 * G) * 2 * HALF
    a = added(qkv, source, apart, inside, kind, SHARES)
    b = added(qkv, source + HALF, apart, inside, kind, SHARES)
    c = tl.load(cos + token * HALF + p, mask=p < HALF, other=0.0).to(tl.float32)
    s = tl.load(sin + token * HALF + p, mask=p < HALF, other=0.0).to(tl.float32)
    gain = tl.load(scale + token).to(tl.float32)
    at = tl.load(slot + token) + tl.zeros([1, 1], tl.int32)
    first = a * c - b * s
    second = b * c + a * s
    is_query = inside & (head < H)
    place = q + (token.to(tl.int64) * H + head) * 2 * HALF + p
    tl.store(place, (first * gain).to(kind), mask=is_query)
    tl.store(place + HALF, (second * gain).to(kind), mask=is_query)
    writes = inside & (at >= 0) & (at // PAGE < A)
    is_key = writes & (head >= H) & (head < H + G)
    is_value = writes & (head >= H + G)
    row = (at // PAGE).to(tl.int64) * G * PAGE + at % PAGE + (head - tl.where(head < H + G, H, H + G)) * PAGE
    return tl.where(is_key, first, a), tl.where(is_key, second, b), row, is_key, is_value


@triton.jit
def paged_rope_write(
    qkv, cos, sin, scale, slot, k_pages, v_pages, A, q,
    H: tl.constexpr, G: tl.constexpr, PAGE: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr,
    HEADS: tl.constexpr, SHARES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """qkv (N, (H + 2 G) D), or of SHARES one before the other -> q (N, H, D); K and V into pages (A, G, PAGE, D)."""
    follow(PDL)
    first, second, row, is_key, is_value = _rotated_heads(
        qkv, cos, sin, scale, slot, A, q, H, G, PAGE, HALF, PAIRS, HEADS, SHARES
    )
    kind: tl.constexpr = q.dtype.element_ty
    place = row * 2 * HALF + tl.arange(0, PAIRS)[None, :]
    tl.store(k_pages + place, first.to(kind), mask=is_key)
    tl.store(k_pages + place + HALF, second.to(kind), mask=is_key)
    tl.store(v_pages + place, first.to(kind), mask=is_value)
    tl.store(v_pages + place + HALF, second.to(kind), mask=is_value)


@triton.jit
def paged_rope_write_bits(
    qkv, cos, sin, scale, slot, k_pages, v_pages, k_scales, v_scales, A, q,
    H: tl.constexpr, G: tl.constexpr, PAGE: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr,
    HEADS: tl.constexpr, SHARES: tl.constexpr, CACHE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The same into pages of 8 bits (A, G, PAGE, D) and their scales (A, G, PAGE) f32."""
    follow(PDL)
    first, second, row, is_key, is_value = _rotated_heads(
        qkv, cos, sin, scale, slot, A, q, H, G, PAGE, HALF, PAIRS, HEADS, SHARES
    )
    step = row_scale(first, second, CACHE)[:, None] + tl.zeros([HEADS, PAIRS], tl.float32)
    p = tl.arange(0, PAIRS)[None, :]
    place = row * 2 * HALF + p
    low = to_bits(first, step, CACHE)
    high = to_bits(second, step, CACHE)
    tl.store(k_pages + place, low, mask=is_key)
    tl.store(k_pages + place + HALF, high, mask=is_key)
    tl.store(v_pages + place, low, mask=is_value)
    tl.store(v_pages + place + HALF, high, mask=is_value)
    tl.store(k_scales + row + p, step, mask=is_key & (p == 0))
    tl.store(v_scales + row + p, step, mask=is_value & (p == 0))
