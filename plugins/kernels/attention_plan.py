# mypy: ignore-errors
"""The kernel of `AttentionPlan` in `ops/paged_attention.py`: it shares a pass out once, for every layer's attention.

A tile is some consecutive tokens of one row; the query heads that share a key/value head are packed with its tokens, so
a few queries fill a tensor core and K/V are read once for all of them. The numbers of a tile: its slots are counted in
blocks of a page, the pages of the prefix first, then those of the spans beyond it.
"""

import triton
import triton.language as tl

from .dependent import follow

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
FIELDS = tl.constexpr(16)
MERGE_FIELDS = tl.constexpr(4)  # of a token: its tile's SHARES and PART, its number in the tile, and nothing


@triton.jit
def plan(
    row, first, visible, N, B, M, tiles, items, merges,
    GROUP: tl.constexpr, PAGE: tl.constexpr, SMALL_M: tl.constexpr, LARGE_M: tl.constexpr,
    MANY_POW2: tl.constexpr, MOST: tl.constexpr, SHORT: tl.constexpr, SPLITS: tl.constexpr, SHARED: tl.constexpr,
    LEAST: tl.constexpr, LARGE_PAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """row and first (N,), visible (N, 3) -> tiles (T, FIELDS), items (W, FIELDS) and merges (N, MERGE_FIELDS), all i32.

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

    # Shares of about one size.
    most = tl.maximum(tl.cdiv(work, SHARED), 1)
    number_of_items = 0
    number_of_parts = 0
    for at in range(0, number_of_tiles, 32):
        is_tile = at + t < number_of_tiles
        of_tile = tiles + (at + t) * FIELDS
        pages = tl.load(of_tile + PAGES, mask=is_tile, other=0)
        small = tl.load(of_tile + SMALL, mask=is_tile, other=0)
        limit = tl.where(small == 1, most, LARGE_PAGES * most)
        each = tl.maximum(tl.cdiv(pages, tl.minimum(tl.cdiv(tl.maximum(pages, 1), limit), SPLITS)), LEAST)
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
        has = j < tl.where(is_tile, count, 0)[:, None]
        to = merges + (begins[:, None] + j) * MERGE_FIELDS
        tl.store(to, shares[:, None], mask=has)
        tl.store(to + 1, part[:, None], mask=has)
        tl.store(to + 2, j, mask=has)
        number_of_items += tl.sum(shares, 0)
        number_of_parts += tl.sum(parts, 0)
