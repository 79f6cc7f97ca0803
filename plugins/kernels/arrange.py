# mypy: ignore-errors
"""The kernel of `ops/arrange.py`: one program per row, whose lanes are heads, then numbers of them, then tokens."""

import triton
import triton.language as tl

from .advance import confirmed


@triton.jit
def arrange(
    ids, pos, slot, visible, adapter, known, results, page_table, M,
    PAGE: tl.constexpr, LANES: tl.constexpr, BITS: tl.constexpr, LEAST: tl.constexpr, MOST_STOPS: tl.constexpr,
    STOPS: tl.constexpr, GROUPS: tl.constexpr, SIZES: tl.constexpr, WIDTH: tl.constexpr, MASK_ID: tl.constexpr,
):  # fmt: skip
    """Write ids, pos, slot, adapter (N,) and visible (N, 3); known (K, WIDTH), page_table (B, M)."""
    known += tl.program_id(0) * WIDTH
    first, size, block = tl.load(known), tl.load(known + 1), tl.load(known + 2)
    row, position, before = tl.load(known + 3), tl.load(known + 4), tl.load(known + 5)
    tokens, confidences, next_ids = tl.load(known + 6), tl.load(known + 7), tl.load(known + 8)
    lane = tl.arange(0, LANES)

    kept = confirmed(results, tokens, next_ids, before, LANES)
    last = tl.load(results + tokens + kept)
    start = position + kept + 1

    # The draft, and its length.
    group_of = tl.load(known + GROUPS + kept)
    begin = group_of // SIZES + 1
    drafted = group_of % SIZES - 1
    inside = lane < drafted
    draft = tl.load(results + tokens + begin + lane, mask=inside, other=-1)
    ends = lane >= drafted
    for stop in tl.static_range(MOST_STOPS):
        ends |= draft == tl.load(known + STOPS + stop)
    length = tl.min(tl.where(ends, lane, LANES), 0)

    # The chance that more than `lane` heads are accepted, one after the other, since the order decides the last bit.
    reached = tl.where(lane == 0, 1 << BITS, 0)
    all_of_them = 1 << BITS
    for head in tl.static_range(1, LANES):
        bits = tl.load(results + confidences + begin + head - 1, mask=head <= length, other=0)
        confidence = bits.to(tl.float32, bitcast=True)
        chance = tl.where(confidence > 0, tl.minimum(confidence, 1.0) * (1 << BITS), 0.0).to(tl.int32)
        all_of_them = (all_of_them * chance) >> BITS
        reached = tl.where(lane == head, all_of_them, reached)
    most = tl.maximum(size - block, 1)
    is_head = (lane < most) & (reached >= LEAST)
    heads = tl.sum(is_head.to(tl.int32), 0)

    # Numbers in the order of their chances, which no two keys of lanes have in common.
    reached = tl.where(is_head, reached, 0)
    after = tl.sum(tl.where(lane[:, None] + 1 == lane[None, :], reached[None, :], 0), 1)
    key = tl.where(is_head, (reached - after) * LANES + LANES - 1 - lane, -1)
    keys = tl.sum(tl.where(lane[:, None] == lane[None, :], key[:, None], 0), 0)  # as rows
    rank = tl.sum((keys[None, :] > key[:, None]).to(tl.int32), 1)

    left: tl.constexpr = 1 if MASK_ID == 0 else 0  # what stands where nothing else does
    for offset in range(0, size, LANES):
        token = offset + lane
        real = token < size
        masked = token - heads  # from here on tokens of groups
        group = tl.where(masked >= 0, masked // block, -1)
        chosen = is_head[:, None] & (rank[:, None] == group[None, :])
        number = tl.sum(tl.where(chosen, lane[:, None] + 1, 0), 0)  # 0 where there is no such group
        masks = tl.minimum(block, size - heads - group * block)
        is_mask = (number > 0) & (masks >= 2)
        is_first = masked < 0
        at = start + token
        own = tl.load(results + tokens + begin + token - 1, mask=is_first & (token > 0), other=0)
        own = tl.where(token == 0, last, own)
        tl.store(ids + first + token, tl.where(is_first, own, tl.where(is_mask, MASK_ID, left)), mask=real)
        place = start + number + masked - group * block
        tl.store(pos + first + token, tl.where(is_mask, place, at), mask=real)
        page = tl.load(page_table + row * M + at // PAGE, mask=real, other=0)
        tl.store(slot + first + token, page * PAGE + at % PAGE, mask=real)
        tl.store(adapter + first + token, is_mask.to(tl.float32), mask=real)
        prefix = tl.where(is_first, at + 1, tl.where(is_mask, start + number, 0))
        span = tl.where(is_mask, start + heads + group * block, at)
        end = tl.where(is_mask, span + masks, at + 1)
        sees = visible + (first + token) * 3
        tl.store(sees, prefix, mask=real)
        tl.store(sees + 1, tl.where(is_first, start, span), mask=real)
        tl.store(sees + 2, tl.where(is_first, start, end), mask=real)
