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
    TILE,
    TOKENS,
    UNTIL,
)
from .dependent import follow
from .kv_cache import to_numbers


@triton.jit
def _weigh(scores, highest, total, sum_v, values, gains, CACHE: tl.constexpr):
    """One step of the running softmax; scores (M, N) in base 2, values (N, D) times gains (N,)."""
    above = tl.maximum(highest, tl.max(scores, 1))
    safe = tl.where(above == float("-inf"), 0.0, above)  # a row that has seen nothing yet
    weight = tl.exp2(scores - safe[:, None])
    shrink = tl.exp2(highest - safe)
    total = total * shrink + tl.sum(weight, 1)
    if CACHE:
        weight *= gains[None, :]
    sum_v = tl.dot(weight.to(values.dtype), values, sum_v * shrink[:, None], input_precision="ieee")
    return above, total, sum_v


@triton.jit
def _attend(
    q, k_pages, v_pages, k_scales, v_scales, page_table, visible, item, counters, M, part, stats, y,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PART_M: tl.constexpr,
    SPLITS: tl.constexpr, MERGE_ROWS: tl.constexpr, MERGE_SHARES: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """One share of one tile of BLOCK_M packed queries and heads; scales are read where CACHE is not 0."""
    group: tl.constexpr = H // G
    kv_head = tl.program_id(1)
    first = tl.load(item + FIRST)
    tokens = tl.load(item + TOKENS)
    table = page_table + tl.load(item + ROW) * M
    full = tl.load(item + FULL)
    prefix = tl.load(item + PREFIX)
    shift = tl.load(item + SHIFT)
    at = tl.load(item + AT)
    until = tl.load(item + UNTIL)

    m = tl.arange(0, BLOCK_M)
    token = first + m // group
    real = m // group < tokens
    d = tl.arange(0, BLOCK_D)
    in_head = d < D
    of_query = (token * H + kv_head * group + m % group).to(tl.int64) * D
    query = tl.load(q + of_query[:, None] + d[None, :], mask=real[:, None] & in_head[None, :], other=0.0)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
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
        if D == BLOCK_D:
            keys = tl.load(k_pages + head + of_key)
            values = tl.load(v_pages + head + of_value)
        else:
            keys = tl.load(k_pages + head + of_key, mask=in_head[None, :], other=0.0)
            values = tl.load(v_pages + head + of_value, mask=in_head[None, :], other=0.0)
        scores = tl.dot(query, tl.trans(to_numbers(keys, kind, CACHE)), input_precision="ieee") * gain
        gains = highest
        if CACHE:
            scores *= tl.load(k_scales + row + n)[None, :]
            gains = tl.load(v_scales + row + n) * lift
        highest, total, sum_v = _weigh(scores, highest, total, sum_v, to_numbers(values, kind, CACHE), gains, CACHE)

    # The prefixes' ends and the spans.
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
        keys = tl.load(k_pages + head + of_key, mask=used[:, None] & in_head[None, :], other=0.0)
        values = tl.load(v_pages + head + of_value, mask=used[:, None] & in_head[None, :], other=0.0)
        scores = tl.dot(query, tl.trans(to_numbers(keys, kind, CACHE)), input_precision="ieee") * gain
        gains = highest
        if CACHE:
            scores *= tl.load(k_scales + row + n, mask=used, other=0.0)[None, :]
            gains = tl.load(v_scales + row + n, mask=used, other=0.0) * lift
        scores = tl.where(sees, scores, float("-inf"))
        highest, total, sum_v = _weigh(scores, highest, total, sum_v, to_numbers(values, kind, CACHE), gains, CACHE)
    if CACHE == 1:
        sum_v *= 1.0 / lift

    # Read and worked out anew, rather than kept in registers through the loops.
    first = tl.load(item + FIRST, volatile=True)
    tokens = tl.load(item + TOKENS, volatile=True)
    share = tl.load(item + SHARE)
    shares = tl.load(item + SHARES)
    real = m // group < tokens
    if shares == 1:
        of_query = ((first + m // group) * H + kv_head * group + m % group).to(tl.int64) * D
        out = sum_v * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
        tl.store(y + of_query[:, None] + d[None, :], out.to(y.dtype.element_ty), mask=real[:, None] & in_head[None, :])
    else:
        parts = tl.load(item + PART) * G + kv_head * shares
        place = (parts + share).to(tl.int64) * PART_M + m
        tl.store(stats + place * 2, highest, mask=real)
        tl.store(stats + place * 2 + 1, total, mask=real)
        tl.store(part + place[:, None] * D + d[None, :], sum_v, mask=real[:, None] & in_head[None, :])
        tl.debug_barrier()  # every thread has written before one says so
        counter = counters + tl.load(item + TILE) * G + kv_head
        done = tl.atomic_add(counter, 1, sem="acq_rel")
        if done == shares - 1:  # the last to finish merges, in the order of shares
            tl.store(counter, 0)
            for row in range(0, tokens * group, MERGE_ROWS):
                _merge(
                    part, stats, y, parts, shares, row, first, tokens, kv_head,
                    H, G, D, BLOCK_D, PART_M, SPLITS, MERGE_ROWS, MERGE_SHARES,
                )  # fmt: skip


@triton.jit
def _merge(
    part, stats, y, parts, shares, row, first, tokens, kv_head,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PART_M: tl.constexpr,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Merge ROWS packed rows of a tile from all of its shares. What others wrote is read past the first-level cache."""
    group: tl.constexpr = H // G
    m = row + tl.arange(0, ROWS)
    real = m < tokens * group
    d = tl.arange(0, BLOCK_D)
    every = tl.arange(0, SPLITS)
    place = (parts + every).to(tl.int64)[:, None] * PART_M + m[None, :]
    filled = (every < shares)[:, None] & real[None, :]
    high = tl.load(stats + place * 2, mask=filled, other=float("-inf"), cache_modifier=".cg")
    total = tl.load(stats + place * 2 + 1, mask=filled, other=0.0, cache_modifier=".cg")
    highest = tl.max(high, 0)  # (ROWS,)
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    bottom = tl.sum(tl.exp2(high - safe[None, :]) * total, 0)
    sum_v = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for at in range(0, shares, STEP):
        some = at + tl.arange(0, STEP)
        there = (parts + some).to(tl.int64)[:, None] * PART_M + m[None, :]
        has = (some < shares)[:, None] & real[None, :]
        weight = tl.exp2(tl.load(stats + there * 2, mask=has, other=float("-inf"), cache_modifier=".cg") - safe)
        of_head = has[:, :, None] & (d < D)[None, None, :]
        values = tl.load(part + there[:, :, None] * D + d[None, None, :], mask=of_head, other=0.0, cache_modifier=".cg")
        sum_v += tl.sum(values * weight[:, :, None], 0)
    out = sum_v / tl.where(bottom == 0.0, 1.0, bottom)[:, None]
    to = ((first + m // group) * H + kv_head * group + m % group).to(tl.int64) * D
    tl.store(y + to[:, None] + d[None, :], out.to(y.dtype.element_ty), mask=real[:, None] & (d < D)[None, :])


@triton.jit
def _attend_item(
    q, k_pages, v_pages, k_scales, v_scales, page_table, visible, items, counters, M, part, stats, y,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, PAGE: tl.constexpr,
    SMALL_M: tl.constexpr, LARGE_M: tl.constexpr, SMALL_N: tl.constexpr, LARGE_N: tl.constexpr,
    BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """One program per item and key/value head."""
    item = items + tl.program_id(0) * FIELDS
    if tl.load(item + TOKENS) == 0:
        return
    if tl.load(item + SMALL) == 1:
        _attend(
            q, k_pages, v_pages, k_scales, v_scales, page_table, visible, item, counters, M, part, stats, y,
            H, G, D, SCALE, PAGE, SMALL_M, SMALL_N, BLOCK_D, LARGE_M, SPLITS, 2, SPLITS, CACHE,
        )  # fmt: skip
    else:
        _attend(
            q, k_pages, v_pages, k_scales, v_scales, page_table, visible, item, counters, M, part, stats, y,
            H, G, D, SCALE, PAGE, LARGE_M, LARGE_N, BLOCK_D, LARGE_M, SPLITS, 2, 16, CACHE,
        )  # fmt: skip


@triton.jit
def attend(
    q, k_pages, v_pages, page_table, visible, items, counters, M, part, stats, y,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, PAGE: tl.constexpr,
    SMALL_M: tl.constexpr, LARGE_M: tl.constexpr, SMALL_N: tl.constexpr, LARGE_N: tl.constexpr,
    BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """q (N, H, D), pages (A, G, PAGE, D) -> y (N, H, D)."""
    follow(PDL)
    _attend_item(
        q, k_pages, v_pages, k_pages, v_pages, page_table, visible, items, counters, M, part, stats, y,
        H, G, D, SCALE, PAGE, SMALL_M, LARGE_M, SMALL_N, LARGE_N, BLOCK_D, SPLITS, 0,
    )  # fmt: skip


@triton.jit
def attend_bits(
    q, k_pages, v_pages, k_scales, v_scales, page_table, visible, items, counters, M, part, stats, y,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, PAGE: tl.constexpr,
    SMALL_M: tl.constexpr, LARGE_M: tl.constexpr, SMALL_N: tl.constexpr, LARGE_N: tl.constexpr,
    BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, CACHE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The same over pages of 8 bits with scales (A, G, PAGE) f32."""
    follow(PDL)
    _attend_item(
        q, k_pages, v_pages, k_scales, v_scales, page_table, visible, items, counters, M, part, stats, y,
        H, G, D, SCALE, PAGE, SMALL_M, LARGE_M, SMALL_N, LARGE_N, BLOCK_D, SPLITS, CACHE,
    )  # fmt: skip
