# mypy: ignore-errors
"""The kernels of `ops/rope_write.py`: one program per token and head, or per token and some heads."""

import triton
import triton.language as tl

from .dependent import follow


@triton.jit
def rope_write(
    qkv, cos, sin, scale, write_at, k_cache, v_cache, S, T, q,
    H: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """qkv (B, S, (H + 2 G) D) -> q (B, H, S, D); K and V into the caches (B, G, T, D)."""
    token = tl.program_id(0)
    row = tl.program_id(1)
    head = tl.program_id(2)
    p = tl.arange(0, PAIRS)
    inside = p < HALF
    kind: tl.constexpr = q.dtype.element_ty
    flat = row.to(tl.int64) * S + token
    source = qkv + (flat * (H + 2 * G) + head) * 2 * HALF + p
    a = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    slot = tl.load(write_at + row) + token + tl.zeros([PAIRS], tl.int32)
    writes = inside & (slot >= 0) & (slot < T)
    if head < H + G:
        c = tl.load(cos + flat * HALF + p, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + flat * HALF + p, mask=inside, other=0.0).to(tl.float32)
        first = a * c - b * s
        second = b * c + a * s
        if head < H:
            gain = tl.load(scale + flat).to(tl.float32)
            # Written as (B, H, S, D), so that attention needs no transposed copy.
            place = q + ((row * H + head).to(tl.int64) * S + token) * 2 * HALF + p
            tl.store(place, (first * gain).to(kind), mask=inside)
            tl.store(place + HALF, (second * gain).to(kind), mask=inside)
        else:
            place = k_cache + ((row * G + head - H).to(tl.int64) * T + slot) * 2 * HALF + p
            tl.store(place, first.to(kind), mask=writes)
            tl.store(place + HALF, second.to(kind), mask=writes)
    else:
        place = v_cache + ((row * G + head - H - G).to(tl.int64) * T + slot) * 2 * HALF + p
        tl.store(place, a.to(kind), mask=writes)
        tl.store(place + HALF, b.to(kind), mask=writes)


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
