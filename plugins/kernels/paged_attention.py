# mypy: ignore-errors
"""The kernels of `ops/paged_attention.py`: a program does one share of one tile of `attention_plan`."""

import triton
import triton.language as tl

from .attention_plan import (
    AT,
    FIELDS,
    FIRST,
    FULL,
    PART,
    PREFIX,
    ROW,
    SHARE,
    SHARES,
    SHIFT,
    SMALL,
    TOKENS,
    UNTIL,
)
from .attention_share import weigh
from .dependent import follow
from .kv_cache import to_numbers


def warpgroups(_semantic=None):
    """Whether four warps multiply together (wgmma), which takes K and V from shared memory, not from registers.

    A function of the Triton compiler, which gives `_semantic`; its interpreter gives none.
    """
    return tl.constexpr(_semantic is not None and _semantic.builder.options.arch == "sm90")


warpgroups.__triton_builtin__ = True


@triton.jit
def _sliced(
    of_query, of_key, real, used, gain, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, SLICE: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """Scores (M, N) by slices of the head, in f32; queries begin at of_query (M,) and keys at of_key (N,)."""
    scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for at in tl.range(0, BLOCK_D, SLICE, num_stages=1):
        d = at + tl.arange(0, SLICE)
        in_head = (d < D)[None, :]
        query = tl.load(of_query[:, None] + d[None, :], mask=real[:, None] & in_head, other=0.0)
        keys = tl.load(of_key[:, None] + d[None, :], mask=used[:, None] & in_head, other=0.0)
        scores = tl.dot(query, tl.trans(to_numbers(keys, tl.float32, CACHE)), scores, input_precision="ieee")
    return scores * gain


@triton.jit
def _whole(place, in_head, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """What is stored at a place (N, D)."""
    return tl.load(place) if D == BLOCK_D else tl.load(place, mask=in_head[None, :], other=0.0)


@triton.jit
def _attend(
    q, k_pages, v_pages, k_scales, v_scales, table, visible, begins, part, stats, y,
    item, first, tokens, full, at, until,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SLICE: tl.constexpr, PART_M: tl.constexpr,
    CACHE: tl.constexpr,
):  # fmt: skip
    """One share of BLOCK_M packed queries and heads of a tile, the first of them `begins`.

    Scales are read where CACHE is not 0.
    """
    group: tl.constexpr = H // G
    kv_head = tl.program_id(1)
    m = begins + tl.arange(0, BLOCK_M)
    token = first + m // group
    real = m // group < tokens
    d = tl.arange(0, BLOCK_D)
    in_head = d < D
    of_query = (token * H + kv_head * group + m % group).to(tl.int64) * D
    if SLICE >= BLOCK_D:
        query = tl.load(q + of_query[:, None] + d[None, :], mask=real[:, None] & in_head[None, :], other=0.0)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    spread: tl.constexpr = BLOCK_M < 64
    total = tl.zeros([BLOCK_M, BLOCK_N] if spread else [BLOCK_M], tl.float32)
    sum_v = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # What numbers out of 8 bits lack (`to_numbers`). Weights of int8 values get back to the size of the values, since
    # an f16 could not hold them; what they are too large by is taken from the sum.
    unit: tl.constexpr = 256.0 if CACHE == 2 else 1.0
    lift: tl.constexpr = 128.0 if CACHE == 1 else unit
    gain: tl.constexpr = SCALE * 1.4426950408889634 * unit
    kind: tl.constexpr = q.dtype.element_ty
    # Pages that every query sees as a whole. The number of the next page is read before the slots of this one.
    n = tl.arange(0, BLOCK_N)
    of_key = n[:, None] * D + d[None, :]
    of_value = n[:, None] * D + d[None, :]
    steps: tl.constexpr = PAGE // BLOCK_N
    whole = tl.minimum(until, full) * steps
    page = tl.load(table + at, mask=at * steps < whole, other=0)
    for number in range(at * steps, whole):
        row = (page.to(tl.int64) * G + kv_head) * PAGE + number % steps * BLOCK_N
        head = row * D
        page = tl.load(table + (number + 1) // steps, mask=number + 1 < whole, other=0)
        if SLICE >= BLOCK_D:
            keys = _whole(k_pages + head + of_key, in_head, D, BLOCK_D)
        values = _whole(v_pages + head + of_value, in_head, D, BLOCK_D)
        if SLICE >= BLOCK_D:
            scores = tl.dot(query, tl.trans(to_numbers(keys, kind, CACHE)), input_precision="ieee") * gain
        else:
            of_slot = k_pages + head + n * D
            scores = _sliced(q + of_query, of_slot, real, n >= 0, gain, D, BLOCK_M, BLOCK_N, BLOCK_D, SLICE, CACHE)
        gains = highest
        if CACHE:
            scores *= tl.load(k_scales + row + n)[None, :]
            gains = tl.load(v_scales + row + n) * lift
        highest, total, sum_v = weigh(
            scores, highest, total, sum_v, to_numbers(values, kind, CACHE), gains, CACHE, spread
        )

    # The prefixes' ends and the spans. What is left of the item is read where it is needed, as registers are short; it
    # has been in the first-level cache since its first fields were read.
    prefix = tl.load(item + PREFIX)
    shift = tl.load(item + SHIFT)
    seen = visible + token * 3
    prefix_end = tl.load(seen, mask=real, other=0)
    begin = tl.load(seen + 1, mask=real, other=0)
    end = tl.load(seen + 2, mask=real, other=0)
    for number in tl.range(tl.maximum(at, full) * steps, until * steps, num_stages=1):
        numbered = number // steps
        logical = numbered + tl.where(numbered < prefix, 0, shift)
        offset = number % steps * BLOCK_N
        row = (tl.load(table + logical).to(tl.int64) * G + kv_head) * PAGE + offset
        head = row * D
        slot = logical * PAGE + offset + n
        sees = slot[None, :] < prefix_end[:, None]
        sees |= (slot[None, :] >= begin[:, None]) & (slot[None, :] < end[:, None])  # (M, N) bool
        # Slots that no query sees may hold anything: they are read as zeros, since zero times NaN is NaN.
        used = tl.max(sees.to(tl.int32), 0) > 0
        if SLICE >= BLOCK_D:
            keys = tl.load(k_pages + head + of_key, mask=used[:, None] & in_head[None, :], other=0.0)
        values = tl.load(v_pages + head + of_value, mask=used[:, None] & in_head[None, :], other=0.0)
        if SLICE >= BLOCK_D:
            scores = tl.dot(query, tl.trans(to_numbers(keys, kind, CACHE)), input_precision="ieee") * gain
        else:
            of_slot = k_pages + head + n * D
            scores = _sliced(q + of_query, of_slot, real, used, gain, D, BLOCK_M, BLOCK_N, BLOCK_D, SLICE, CACHE)
        gains = highest
        if CACHE:
            scores *= tl.load(k_scales + row + n, mask=used, other=0.0)[None, :]
            gains = tl.load(v_scales + row + n, mask=used, other=0.0) * lift
        scores = tl.where(sees, scores, float("-inf"))
        highest, total, sum_v = weigh(
            scores, highest, total, sum_v, to_numbers(values, kind, CACHE), gains, CACHE, spread
        )
    if spread:
        total = tl.sum(total, 1)
    if CACHE == 1:
        sum_v *= 1.0 / lift

    # Read and worked out anew, rather than kept in registers through the loops.
    first = tl.load(item + FIRST, volatile=True)
    tokens = tl.load(item + TOKENS, volatile=True)
    real = m // group < tokens
    shares = tl.load(item + SHARES)
    if shares == 1:
        of_query = ((first + m // group) * H + kv_head * group + m % group).to(tl.int64) * D
        out = sum_v * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
        tl.store(y + of_query[:, None] + d[None, :], out.to(y.dtype.element_ty), mask=real[:, None] & in_head[None, :])
    else:
        parts = tl.load(item + PART) * G + kv_head * shares
        place = (parts + tl.load(item + SHARE)).to(tl.int64) * PART_M + m
        tl.store(stats + place * 2, highest, mask=real)
        tl.store(stats + place * 2 + 1, total, mask=real)
        tl.store(part + place[:, None] * D + d[None, :], sum_v, mask=real[:, None] & in_head[None, :])


@triton.jit
def _attend_item(
    q, k_pages, v_pages, k_scales, v_scales, page_table, visible, items, M, part, stats, y,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, PAGE: tl.constexpr,
    SMALL_M: tl.constexpr, LARGE_M: tl.constexpr, SMALL_N: tl.constexpr, LARGE_N: tl.constexpr,
    GROUP_N: tl.constexpr, MOST_M: tl.constexpr, SLICE: tl.constexpr, BLOCK_D: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """One program per item and key/value head."""
    # At once: another wait for memory would cost a share of a page's time.
    item = items + tl.program_id(0) * FIELDS
    first = tl.load(item + FIRST)
    tokens = tl.load(item + TOKENS)
    table = page_table + tl.load(item + ROW) * M
    small = tl.load(item + SMALL)
    full = tl.load(item + FULL)
    at = tl.load(item + AT)
    until = tl.load(item + UNTIL)
    if tokens == 0:
        return
    if MOST_M < LARGE_M:
        for begins in range(0, tokens * (H // G), MOST_M):
            _attend(
                q, k_pages, v_pages, k_scales, v_scales, table, visible, begins, part, stats, y,
                item, first, tokens, full, at, until,
                H, G, D, SCALE, PAGE, MOST_M, SMALL_N, BLOCK_D, SLICE, LARGE_M, CACHE,
            )  # fmt: skip
    elif small == 1:
        _attend(
            q, k_pages, v_pages, k_scales, v_scales, table, visible, 0, part, stats, y,
            item, first, tokens, full, at, until,
            H, G, D, SCALE, PAGE, SMALL_M, SMALL_N, BLOCK_D, SLICE, LARGE_M, CACHE,
        )  # fmt: skip
    else:
        slots: tl.constexpr = GROUP_N if warpgroups() else LARGE_N
        _attend(
            q, k_pages, v_pages, k_scales, v_scales, table, visible, 0, part, stats, y,
            item, first, tokens, full, at, until,
            H, G, D, SCALE, PAGE, LARGE_M, slots, BLOCK_D, SLICE, LARGE_M, CACHE,
        )  # fmt: skip


@triton.jit
def attend(
    q, k_pages, v_pages, page_table, visible, items, M, part, stats, y,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, PAGE: tl.constexpr,
    SMALL_M: tl.constexpr, LARGE_M: tl.constexpr, SMALL_N: tl.constexpr, LARGE_N: tl.constexpr,
    GROUP_N: tl.constexpr, MOST_M: tl.constexpr, SLICE: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """q (N, H, D), pages (A, G, PAGE, D) -> y (N, H, D)."""
    follow(PDL)
    _attend_item(
        q, k_pages, v_pages, k_pages, v_pages, page_table, visible, items, M, part, stats, y,
        H, G, D, SCALE, PAGE, SMALL_M, LARGE_M, SMALL_N, LARGE_N, GROUP_N, MOST_M, SLICE, BLOCK_D, 0,
    )  # fmt: skip


@triton.jit
def attend_bits(
    q, k_pages, v_pages, k_scales, v_scales, page_table, visible, items, M, part, stats, y,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, PAGE: tl.constexpr,
    SMALL_M: tl.constexpr, LARGE_M: tl.constexpr, SMALL_N: tl.constexpr, LARGE_N: tl.constexpr,
    GROUP_N: tl.constexpr, MOST_M: tl.constexpr, SLICE: tl.constexpr, BLOCK_D: tl.constexpr, CACHE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The same over pages of 8 bits with scales (A, G, PAGE) f32."""
    follow(PDL)
    _attend_item(
        q, k_pages, v_pages, k_scales, v_scales, page_table, visible, items, M, part, stats, y,
        H, G, D, SCALE, PAGE, SMALL_M, LARGE_M, SMALL_N, LARGE_N, GROUP_N, MOST_M, SLICE, BLOCK_D, CACHE,
    )  # fmt: skip
