# mypy: ignore-errors
"""The kernels of `ops/block_attention.py`: one runs every split of the cache by itself, one merges the splits.

The query heads that share a key/value head are packed with the queries into one tile, so a few queries fill a tensor
core and K/V are read once for all of them. A program works out, on the device, which slots its queries see at all and
takes its split's share of those, so the work follows the length in use and not the capacity.
"""

import triton
import triton.language as tl

from .attention_share import merged


@triton.jit
def _splits(tiles, SPLITS: tl.constexpr, PROGRAMS: tl.constexpr):
    """Splits of each tile of queries: splitting costs a merge, so only as many as keep the card busy."""
    return tl.minimum(tl.cdiv(PROGRAMS, tiles), SPLITS)


@triton.jit
def split(
    q, k, v, visible, S, T, part, stats,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr,
    SPLITS: tl.constexpr, PROGRAMS: tl.constexpr, LEAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """q (B, H, S, D), k and v (B, G, T, D), visible (B, S, 3) -> part (N, BLOCK_M, D), stats (N, BLOCK_M, 2).

    N counts tiles of queries and their splits. `part` is a split's sum of exp(score - highest) * v and `stats` holds
    (highest, sum of exp(score - highest)), in base 2; where it sees nothing the sum is 0 and `part` undefined.
    """
    group: tl.constexpr = H // G
    row = tl.program_id(1) // G
    kv_head = tl.program_id(1) % G
    share = tl.program_id(2)
    number_of_splits = _splits(tl.num_programs(0) * tl.num_programs(1), SPLITS, PROGRAMS)
    if share >= number_of_splits:
        return
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    query = m // group
    real = query < S
    head = kv_head * group + m % group
    d = tl.arange(0, BLOCK_D)
    in_head = d < D

    seen = visible + (row * S + query) * 3
    prefix_end = tl.minimum(tl.load(seen, mask=real, other=0), T)
    begin = tl.maximum(tl.load(seen + 1, mask=real, other=0), 0)
    end = tl.minimum(tl.load(seen + 2, mask=real, other=0), T)
    # Tiles of slots, numbered without those that no query here sees: the prefix's, then the span's beyond it.
    prefix_tiles = tl.cdiv(tl.maximum(tl.max(prefix_end, 0), 0), BLOCK_N)
    first = tl.maximum(tl.min(tl.where(end > begin, begin, T), 0) // BLOCK_N, prefix_tiles)
    last = tl.cdiv(tl.max(tl.where(end > begin, end, 0), 0), BLOCK_N)
    tiles = prefix_tiles + tl.maximum(last - first, 0)
    # Each split gets LEAST tiles or more; the last splits may get none.
    each = tl.cdiv(tiles, tl.maximum(tl.minimum(number_of_splits, tiles // LEAST), 1))
    at = share * each
    until = tl.minimum(at + each, tiles)

    at_query = (row * H + head).to(tl.int64) * S + query
    query_tile = tl.load(
        q + at_query[:, None] * D + d[None, :], mask=real[:, None] & in_head[None, :], other=0.0
    )  # (M, D) compute
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sum_v = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    cache = (row * G + kv_head).to(tl.int64) * T * D
    k += cache  # offsets within one head's cache fit 32 bits, which halves the registers they take
    v += cache
    for number in range(at, until):
        tile = tl.where(number < prefix_tiles, number, first + number - prefix_tiles)
        slot = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        sees = slot[None, :] < prefix_end[:, None]
        sees |= (slot[None, :] >= begin[:, None]) & (slot[None, :] < end[:, None])  # (M, N) bool
        used = tl.max(sees.to(tl.int32), 0) > 0
        place = slot[:, None] * D + d[None, :]
        # Slots that no query sees are scratch memory: they are read as zeros, since zero times NaN is NaN.
        loaded = used[:, None] & in_head[None, :]
        keys = tl.load(k + place, mask=loaded, other=0.0)  # (N, D) compute
        scores = tl.dot(query_tile, tl.trans(keys), input_precision="ieee") * (SCALE * 1.4426950408889634)
        scores = tl.where(sees, scores, float("-inf"))
        above = tl.maximum(highest, tl.max(scores, 1))
        safe = tl.where(above == float("-inf"), 0.0, above)  # a row that has seen nothing yet
        weight = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(highest - safe)
        values = tl.load(v + place, mask=loaded, other=0.0)
        sum_v = sum_v * shrink[:, None] + tl.dot(weight.to(values.dtype), values, input_precision="ieee")
        total = total * shrink + tl.sum(weight, 1)
        highest = above

    query_tile_number = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    place = (query_tile_number * number_of_splits + share) * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(stats + place * 2, highest, mask=real)
    tl.store(stats + place * 2 + 1, total, mask=real)
    if at < until:
        tl.store(part + place[:, None] * D + d[None, :], sum_v, mask=real[:, None] & in_head[None, :])


@triton.jit
def merge(
    q, part, stats, S, y,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr,
    SPLITS: tl.constexpr, PROGRAMS: tl.constexpr, LEAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """part and stats of `split` -> y (B, H, S, D), 0 for a query that sees nothing. One program per query and head."""
    group: tl.constexpr = H // G
    query = tl.program_id(1)
    row = tl.program_id(0) // H
    head = tl.program_id(0) % H
    tiles = tl.cdiv(S * group, BLOCK_M)
    m = query * group + head % group
    query_tile_number = (row * G + head // group) * tiles + m // BLOCK_M
    number_of_splits = _splits(tiles * (tl.num_programs(0) // group), SPLITS, PROGRAMS)
    share = tl.arange(0, SPLITS)
    real = share < number_of_splits
    d = tl.arange(0, BLOCK_D)
    place = (query_tile_number * number_of_splits + share) * BLOCK_M + m % BLOCK_M
    highest = tl.load(stats + place * 2, mask=real, other=float("-inf"))
    total = tl.load(stats + place * 2 + 1, mask=real, other=0.0)
    filled = real & (total != 0.0)  # NaN counts as filled
    sum_v = tl.load(part + place[:, None] * D + d[None, :], mask=filled[:, None] & (d < D)[None, :], other=0.0)
    out = merged(highest, total, sum_v)
    at = tl.program_id(0).to(tl.int64) * S + query
    tl.store(y + at * D + d, out.to(y.dtype.element_ty), mask=d < D)
