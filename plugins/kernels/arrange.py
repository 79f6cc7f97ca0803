# mypy: ignore-errors
"""The kernels of `ops/arrange.py`: one program per row, whose lanes are heads, then numbers of them, then tokens."""

import triton
import triton.language as tl

from .advance import confirmed


@triton.jit
def reach(
    known, results, reached, accepted,
    GROUPS: tl.constexpr, SIZES: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr, BITS: tl.constexpr,
    STOPS: tl.constexpr, MOST_STOPS: tl.constexpr,
):  # fmt: skip
    """Write the chances that more than `lane` heads are accepted, reached (K, LANES); and accepted (K,)."""
    row = tl.program_id(0)
    known += row * WIDTH
    before, tokens = tl.load(known + 5), tl.load(known + 6)
    confidences, next_ids = tl.load(known + 7), tl.load(known + 8)
    lane = tl.arange(0, LANES)
    kept = confirmed(results, tokens, next_ids, before, LANES)
    tl.store(accepted + row, kept + 1)

    # The draft's length.
    group = tl.load(known + GROUPS + kept)
    begin, drafted = group // SIZES + 1, group % SIZES - 1
    draft = tl.load(results + tokens + begin + lane, mask=lane < drafted, other=-1)
    ends = lane >= drafted
    for stop in tl.static_range(MOST_STOPS):
        ends |= draft == tl.load(known + STOPS + stop)
    length = tl.min(tl.where(ends, lane, LANES), 0)

    # One after the other, since the order decides the last bit.
    chances = tl.where(lane == 0, 1 << BITS, 0)
    all_of_them = 1 << BITS
    for head in tl.static_range(1, LANES):
        bits = tl.load(results + confidences + begin + head - 1, mask=head <= length, other=0)
        confidence = bits.to(tl.float32, bitcast=True)
        chance = tl.where(confidence > 0, tl.minimum(confidence, 1.0) * (1 << BITS), 0.0).to(tl.int32)
        all_of_them = (all_of_them * chance) >> BITS
        chances = tl.where(lane == head, all_of_them, chances)
    tl.store(reached + row * LANES + lane, chances)


@triton.jit
def _price(level, DEAREST: tl.constexpr, BITS: tl.constexpr):
    """A token's price."""
    return tl.where(level % 2 == 0, DEAREST, 1 << BITS) >> (level // 2)


@triton.jit
def _wanted(
    known, reached, rows, of_heads, of_masks, K,
    LENGTHS: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr, RATE_BITS: tl.constexpr,
    MOST_LENGTHS: tl.constexpr,
):  # fmt: skip
    """What rows (ROWS,) want where a head and a mask have these prices (ROWS,).

    Their tokens and heads (ROWS,), the masks of their groups and the chances of those (ROWS, LANES).
    """
    lane = tl.arange(0, LANES)[None, :]
    real = rows < K
    known += rows * WIDTH
    places = reached + rows[:, None] * LANES + lane
    chance = tl.load(places, mask=real[:, None], other=0)
    after = tl.load(places + 1, mask=real[:, None] & (lane < LANES - 1), other=0)
    is_head = real[:, None] & ((chance >= of_heads[:, None]) | (lane == 0))
    chance = tl.where(is_head, chance, 0) - tl.where(after >= of_heads[:, None], after, 0)
    masks = tl.zeros_like(chance)
    for length in range(MOST_LENGTHS):
        size = tl.load(known + LENGTHS + 2 * length, mask=real, other=0)
        rate = tl.load(known + LENGTHS + 2 * length + 1, mask=real, other=0)
        masks = tl.where((chance << RATE_BITS) >= (rate * of_masks)[:, None], size[:, None], masks)
    heads = tl.sum(is_head.to(tl.int32), 1)
    most = tl.load(known + 2, mask=real, other=0)
    return tl.minimum(heads + tl.sum(masks, 1), most), heads, masks, chance


@triton.jit(do_not_specialize=["K"])  # any number of rows may come, and a request waits for what is compiled
def arrange(
    ids, pos, slot, row, first, visible, adapter, known, results, page_table, reached, accepted, K, M, N,
    GROUPS: tl.constexpr, SIZES: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr, BITS: tl.constexpr,
    LENGTHS: tl.constexpr, MOST_LENGTHS: tl.constexpr, RATE_BITS: tl.constexpr, LEVELS: tl.constexpr,
    DEAREST: tl.constexpr, ROWS: tl.constexpr, PAGE: tl.constexpr, MASK_ID: tl.constexpr,
):  # fmt: skip
    """Write ids, pos, slot, row, first, adapter (N,) and visible (N, 3) of a row; all programs find the same price."""
    own = tl.program_id(0)
    at_once = tl.arange(0, ROWS)
    none = tl.zeros_like(at_once)
    budget = tl.load(known + 1)

    # The lowest price at which all rows fit.
    low, high, used = 0, LEVELS, K
    while high - low > 1:
        middle = (low + high) // 2
        price = none + _price(middle, DEAREST, BITS)
        total = 0
        for begin in range(0, K, ROWS):
            size, _, _, _ = _wanted(
                known, reached, begin + at_once, price, price, K, LENGTHS, WIDTH, LANES, RATE_BITS, MOST_LENGTHS
            )
            total += tl.sum(size, 0)
        fits = total <= budget
        low, high, used = tl.where(fits, middle, low), tl.where(fits, high, middle), tl.where(fits, total, used)

    # What is left then to each row, once those before it have what they want more at the next lower price.
    dear = _price(low, DEAREST, BITS)
    cheap = _price(tl.minimum(high, LEVELS - 1), DEAREST, BITS)
    left = budget - used
    start, own_size, own_heads, own_masks = 0, 0, dear, dear
    for begin in range(0, own + 1, ROWS):
        rows = begin + at_once
        size, _, _, _ = _wanted(
            known, reached, rows, none + dear, none + dear, K, LENGTHS, WIDTH, LANES, RATE_BITS, MOST_LENGTHS
        )
        lower, _, _, _ = _wanted(
            known, reached, rows, none + cheap, none + cheap, K, LENGTHS, WIDTH, LANES, RATE_BITS, MOST_LENGTHS
        )
        more = tl.maximum(lower - size, 0)
        room = left - tl.cumsum(more, 0) + more
        left -= tl.sum(more, 0)
        of_heads, of_masks = tl.where(more <= room, cheap, dear), tl.where(room >= 0, cheap, dear)
        wanted, _, _, _ = _wanted(
            known, reached, rows, of_heads, of_masks, K, LENGTHS, WIDTH, LANES, RATE_BITS, MOST_LENGTHS
        )
        size = tl.minimum(wanted, size + tl.maximum(room, 0))
        start += tl.sum(tl.where(rows < own, size, 0), 0)
        is_own = rows == own
        own_size += tl.sum(tl.where(is_own, size, 0), 0)
        own_heads = tl.where(tl.sum((is_own & (of_heads == cheap)).to(tl.int32), 0) > 0, cheap, own_heads)
        own_masks = tl.where(tl.sum((is_own & (of_masks == cheap)).to(tl.int32), 0) > 0, cheap, own_masks)

    # The own row: for each number of heads its group's masks, cut by their chances, and where they begin.
    one = tl.zeros_like(tl.arange(0, 1))
    _, heads, masks, chance = _wanted(
        known, reached, one + own, one + own_heads, one + own_masks, K, LENGTHS, WIDTH, LANES, RATE_BITS, MOST_LENGTHS
    )
    heads, masks, chance = tl.minimum(tl.sum(heads, 0), own_size), tl.sum(masks, 0), tl.sum(chance, 0)
    lane = tl.arange(0, LANES)
    key = chance * LANES + LANES - 1 - lane  # which no two lanes have in common
    square = lane[:, None] == lane[None, :]
    of_row = tl.sum(tl.where(square, key[:, None], 0), 0)  # the same, along the other axis
    masks_of_row = tl.sum(tl.where(square, masks[:, None], 0), 0)
    before = tl.sum(tl.where(of_row[None, :] > key[:, None], masks_of_row[None, :], 0), 1)
    masks = tl.minimum(masks, tl.maximum(own_size - heads - before, 0))
    begins = heads + tl.cumsum(masks, 0) - masks

    kept = tl.load(accepted + own)
    known += own * WIDTH
    where, table, tokens = tl.load(known) + start, page_table + tl.load(known + 3) * M, tl.load(known + 6)
    place = tl.load(known + 4) + kept
    last = tl.load(results + tokens + kept - 1)
    draft = results + tokens + tl.load(known + GROUPS + kept - 1) // SIZES
    size = heads + tl.sum(masks, 0)
    for offset in range(0, size, LANES):
        token = offset + lane
        real = token < size
        is_first = token < heads
        inside = (token[None, :] >= begins[:, None]) & (token[None, :] < (begins + masks)[:, None])
        number = tl.sum(tl.where(inside, lane[:, None] + 1, 0), 0)  # of the token's group
        group = tl.sum(tl.where(inside, begins[:, None], 0), 0)
        end = group + tl.sum(tl.where(inside, masks[:, None], 0), 0)
        at = place + token
        head = tl.load(draft + token, mask=is_first & (token > 0), other=0)
        head = tl.where(token == 0, last, head)
        tl.store(ids + where + token, tl.where(is_first, head, MASK_ID), mask=real)
        tl.store(pos + where + token, tl.where(is_first, at, at + number - group), mask=real)
        page = tl.load(table + at // PAGE, mask=real, other=0)
        tl.store(slot + where + token, page * PAGE + at % PAGE, mask=real)
        tl.store(row + where + token, tl.zeros_like(token) + tl.load(known + 3), mask=real)
        tl.store(first + where + token, tl.zeros_like(token) + where, mask=real)
        tl.store(adapter + where + token, tl.where(is_first, 0.0, 1.0), mask=real)
        sees = visible + (where + token) * 3
        tl.store(sees, tl.where(is_first, at + 1, place + number), mask=real)
        tl.store(sees + 1, tl.where(is_first, place, place + group), mask=real)
        tl.store(sees + 2, tl.where(is_first, place, place + end), mask=real)
    if own == K - 1:  # what is left over is a row of its own
        for offset in range(where + size, N, LANES):
            tl.store(first + offset + lane, tl.zeros_like(lane) + where + size, mask=offset + lane < N)
