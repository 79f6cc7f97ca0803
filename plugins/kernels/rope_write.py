# mypy: ignore-errors
"""The kernel of `ops/rope_write.py`: one program per token and head."""

import triton
import triton.language as tl


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
