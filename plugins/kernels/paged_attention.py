# mypy: ignore-errors
"""The kernels of `ops/paged_attention.py`: `plan` shares out a pass once, `attend` does one share in each layer.

A tile is some consecutive tokens of one row; the query heads that share a key/value head are packed with its tokens, so
a few queries fill a tensor core and K/V are read once for all of them. The numbers that both kernels know of a tile:
its slots are counted in blocks of a page, the pages of the prefix first, then those of the spans beyond it.
"""

import triton
import triton.language as tl

from .dependent import follow
from .kv_cache import to_numbers

# Fields of an item: one share of one tile. An item of 0 tokens is nothing to do.
FIRST = tl.constexpr(0)  # the tile's first token
TOKENS = tl.constexpr(1)
ROW = tl.constexpr(2)  # of the page table
SMALL = tl.constexpr(3)  # 1 for the smaller of the two shapes of a tile
FULL = tl.constexpr(4)  # pages that every query of the tile sees as a whole
PREFIX = tl.constexpr(5)  # pages that some query's prefix reaches into
SHIFT = tl.constexpr(6)  # from a number behind the prefix to its page
PAGES = tl.constexpr(7)  # of the tile in all
AT = tl.constexpr(8)  # the share's first page
UNTIL = tl.constexpr(9)
SHARE = tl.constexpr(10)  # its number
SHARES = tl.constexpr(11)  # of the tile
PART = tl.constexpr(12)  # where the tile's partial results begin
TILE = tl.constexpr(13)  # the tile's number
FIELDS = tl.constexpr(16)


@triton.jit
def plan(
    row, first, visible, N, B, M, tiles, items, counters,
    G: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, SMALL_M: tl.constexpr, LARGE_M: tl.constexpr,
    MANY_POW2: tl.constexpr, MOST: tl.constexpr, SHORT: tl.constexpr, SPLITS: tl.constexpr, SHARED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """row and first (N,), visible (N, 3) -> tiles (T, FIELDS), items (W, FIELDS) and counters (T, G), all i32.

    One program, once per pass: how often a tile is split depends on what the pass has to read in all, so that about as
    many programs run as a card takes at once, each with as much to read, whatever the lengths of its rows.
    """
    follow(PDL)
    FEW: tl.constexpr = SMALL_M // GROUP  # tokens of a tile
    MANY: tl.constexpr = LARGE_M // GROUP
    # The room for tiles and items, as `ops/paged_attention.py` counts it.
    room = tl.minimum(N, tl.minimum(N // FEW + B, N // MANY + MOST * B))
    item_room = tl.minimum(room + SHARED, SPLITS * room)
    block = tl.arange(0, 256)
    for at in range(0, item_room, 256):
        tl.store(items + (at + block) * FIELDS + TOKENS, 0, mask=at + block < item_room)
    for at in range(0, room * G, 256):
        tl.store(counters + at + block, 0, mask=at + block < room * G)
    for at in range(0, room, 256):
        tl.store(tiles + (at + block) * FIELDS + TOKENS, 0, mask=at + block < room)
    tl.debug_barrier()

    # Tiles of each row: small ones for few tokens, and for some more of them over a short text.
    number_of_tiles = 0
    i = tl.arange(0, 64)
    j = tl.arange(0, MANY_POW2)[None, :]
    for at in range(0, N, 64):
        token = at + i
        real = token < N
        begin = tl.load(first + token, mask=real, other=0)  # of the row's tokens
        few = tl.load(first + begin + FEW, mask=real & (begin + FEW < N), other=-1) != begin
        some = tl.load(first + begin + FEW * MOST, mask=real & (begin + FEW * MOST < N), other=-1) != begin
        reach = tl.load(visible + begin * 3, mask=real, other=0)
        small = few | (some & (reach <= SHORT * PAGE))
        step = tl.where(small, FEW, MANY)
        heads = real & ((token - begin) % step == 0)
        same = (j < step[:, None]) & (token[:, None] + j < N)
        same &= tl.load(first + token[:, None] + j, mask=same, other=-1) == begin[:, None]
        to = tiles + (number_of_tiles + tl.cumsum(heads.to(tl.int32), 0) - 1) * FIELDS
        tl.store(to + FIRST, token, mask=heads)
        tl.store(to + TOKENS, tl.sum(same.to(tl.int32), 1), mask=heads)
        tl.store(to + ROW, tl.load(row + token, mask=real, other=0), mask=heads)
        tl.store(to + SMALL, small.to(tl.int32), mask=heads)
        number_of_tiles += tl.sum(heads.to(tl.int32), 0)
    tl.debug_barrier()

    # What the queries of a tile see.
    work = 0
    t = tl.arange(0, 32)
    for at in range(0, number_of_tiles, 32):
        is_tile = at + t < number_of_tiles
        of_tile = tiles + (at + t) * FIELDS
        begins = tl.load(of_tile + FIRST, mask=is_tile, other=0)
        count = tl.load(of_tile + TOKENS, mask=is_tile, other=0)
        has = j < count[:, None]
        seen = visible + (begins[:, None] + j) * 3
        prefix_end = tl.minimum(tl.maximum(tl.load(seen, mask=has, other=0), 0), M * PAGE)
        span_begin = tl.maximum(tl.load(seen + 1, mask=has, other=0), 0)
        span_end = tl.minimum(tl.load(seen + 2, mask=has, other=0), M * PAGE)
        whole = tl.min(tl.where(has, prefix_end, 2147483647), 1) // PAGE
        prefix = tl.cdiv(tl.max(prefix_end, 1), PAGE)
        span = tl.maximum(tl.min(tl.where(span_end > span_begin, span_begin, M * PAGE), 1) // PAGE, prefix)
        pages = prefix + tl.maximum(tl.cdiv(tl.max(tl.where(span_end > span_begin, span_end, 0), 1), PAGE) - span, 0)
        pages = tl.where(is_tile, pages, 0)
        tl.store(of_tile + FULL, whole, mask=is_tile)
        tl.store(of_tile + PREFIX, prefix, mask=is_tile)
        tl.store(of_tile + SHIFT, span - prefix, mask=is_tile)
        tl.store(of_tile + PAGES, pages, mask=is_tile)
        work += tl.sum(pages, 0)
    tl.debug_barrier()

    # Shares of about one size. A large tile gets half as many, since its results are long to merge.
    most = tl.maximum(tl.cdiv(work, SHARED), 1)
    number_of_items = 0
    number_of_parts = 0
    for at in range(0, number_of_tiles, 32):
        is_tile = at + t < number_of_tiles
        of_tile = tiles + (at + t) * FIELDS
        pages = tl.load(of_tile + PAGES, mask=is_tile, other=0)
        small = tl.load(of_tile + SMALL, mask=is_tile, other=0)
        limit = tl.where(small == 1, most, 2 * most)
        each = tl.maximum(tl.cdiv(pages, tl.minimum(tl.cdiv(tl.maximum(pages, 1), limit), SPLITS)), 1)
        shares = tl.where(is_tile, tl.maximum(tl.cdiv(pages, each), 1), 0)
        parts = tl.where(shares > 1, shares, 0)
        base = number_of_items + tl.cumsum(shares, 0) - shares
        part = number_of_parts + tl.cumsum(parts, 0) - parts
        begins = tl.load(of_tile + FIRST, mask=is_tile, other=0)
        count = tl.load(of_tile + TOKENS, mask=is_tile, other=0)
        of_row = tl.load(of_tile + ROW, mask=is_tile, other=0)
        whole = tl.load(of_tile + FULL, mask=is_tile, other=0)
        prefix = tl.load(of_tile + PREFIX, mask=is_tile, other=0)
        shift = tl.load(of_tile + SHIFT, mask=is_tile, other=0)
        for share in range(tl.max(shares, 0)):
            to = items + (base + share) * FIELDS
            is_share = share < shares
            tl.store(to + FIRST, begins, mask=is_share)
            tl.store(to + TOKENS, count, mask=is_share)
            tl.store(to + ROW, of_row, mask=is_share)
            tl.store(to + SMALL, small, mask=is_share)
            tl.store(to + FULL, whole, mask=is_share)
            tl.store(to + PREFIX, prefix, mask=is_share)
            tl.store(to + SHIFT, shift, mask=is_share)
            tl.store(to + AT, share * each, mask=is_share)
            tl.store(to + UNTIL, tl.minimum(share * each + each, pages), mask=is_share)
            tl.store(to + SHARE, share, mask=is_share)
            tl.store(to + SHARES, shares, mask=is_share)
            tl.store(to + PART, part, mask=is_share)
            tl.store(to + TILE, at + t, mask=is_share)
        number_of_items += tl.sum(shares, 0)
        number_of_parts += tl.sum(parts, 0)


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
