# mypy: ignore-errors
"""The kernel of `ops/rope_write.py`: one program per token and some heads."""

import triton
import triton.language as tl

from .dependent import follow


@triton.jit
def paged_rope_write(
    qkv, cos, sin, scale, slot, k_pages, v_pages, A, q,
    H: tl.constexpr, G: tl.constexpr, PAGE: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr,
    HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """qkv (N, (H + 2 G) D) -> q (N, H, D); K and V into the pages (A, G, PAGE, D)."""
    follow(PDL)
    token = tl.program_id(0)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    p = tl.arange(0, PAIRS)[None, :]
    kind: tl.constexpr = q.dtype.element_ty
    inside = (head < H + 2 * G) & (p < HALF)
    source = qkv + (token.to(tl.int64) * (H + 2 * G) + head) * 2 * HALF + p
    a = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
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
    row = (at // PAGE).to(tl.int64) * G * PAGE + at % PAGE  # of the first key/value head
    is_key = writes & (head >= H) & (head < H + G)
    place = k_pages + (row + (head - H) * PAGE) * 2 * HALF + p
    tl.store(place, first.to(kind), mask=is_key)
    tl.store(place + HALF, second.to(kind), mask=is_key)
    is_value = writes & (head >= H + G)
    place = v_pages + (row + (head - H - G) * PAGE) * 2 * HALF + p
    tl.store(place, a.to(kind), mask=is_value)
    tl.store(place + HALF, b.to(kind), mask=is_value)
