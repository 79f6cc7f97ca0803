# mypy: ignore-errors
"""The kernels of `ops/confidence_commit.py`: one scans the vocabulary in splits, one applies the commit rule.

Every logit is read once and none is written. The sampled forms add Gumbel noise to the logits over the temperature
before the argmax, from the same Philox words as `runtime/sampling/noise.py`, with f32 logarithms where that takes f64.
"""

import triton
import triton.language as tl

from .approximate import exp, log, log2


@triton.jit
def gumbel(words):
    """-ln(-ln((w + 0.5) / 2^32)) of u32 words, f32 with an error of about 1e-6, relative where it is over 1."""
    u = words.to(tl.float32) * (1.0 / 4294967296.0) + 0.5 / 4294967296.0
    # Near 2^32 f32 rounds u to 1, whose noise is infinite, once in a few passes, and `log` is least accurate near 1:
    # there the first terms of the series in the distance to 1.
    far = (~words).to(tl.float32) * (1.0 / 4294967296.0) + 0.5 / 4294967296.0  # 1 - u, exact where u is rounded
    near = far * (1.0 + far * (1 / 2 + far * (1 / 3 + far * (1 / 4 + far * (1 / 5 + far * (1 / 6))))))
    return -log(tl.where(far < 0.125, near, -log(u)))


@triton.jit
def philox(low, high, c0, c1, c2, c3):
    """The words of `tl.philox`, u32, which multiplies twice, for the upper half of a product and for the lower."""
    k0 = low.to(tl.uint32, bitcast=True)
    k1 = high.to(tl.uint32, bitcast=True)
    for _ in tl.static_range(10):
        one = c0.to(tl.uint64) * 0xD2511F53
        other = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (other >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (one >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = other.to(tl.uint32)
        c3 = one.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _words(low, high, position, start, BLOCK: tl.constexpr):
    """The words of tokens start..start + BLOCK - 1 at a position, (BLOCK,) u32; `start` is a multiple of 4."""
    counter = (start // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = tl.zeros_like(counter)
    w0, w1, w2, w3 = philox(low, high, counter, zero + position.to(tl.uint32), zero, zero)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK])


@triton.jit
def read(logits, at, start, ids, V: tl.constexpr, MASK_ID: tl.constexpr, BLOCK: tl.constexpr):
    """Logits of tokens `ids`, start..start + BLOCK - 1, at a position, f32: -1e30 of the mask, -inf past the last."""
    place = logits + at.to(tl.int64) * V + ids
    if V % BLOCK == 0:
        x = tl.load(place).to(tl.float32)
    else:
        x = tl.load(place, mask=ids < V, other=float("-inf")).to(tl.float32)
    return _hide(x, start, ids, MASK_ID, BLOCK)


@triton.jit
def _hide(x, start, ids, MASK_ID: tl.constexpr, BLOCK: tl.constexpr):
    """x with -1e30 for the mask."""
    if (start <= MASK_ID) & (start + BLOCK > MASK_ID):
        x = tl.where(ids == MASK_ID, -1e30, x)
    return x


@triton.jit
def sample(
    logits, x, at, start, low, high, position, temperature,
    V: tl.constexpr, MASK_ID: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The highest of the scores that a sample goes by, its token, and that one's logit; of none of them if all are NaN.

    No noise is above -ln(1 - u), and high noise is hardly below. So fours of tokens, whose words are drawn together,
    are looked at in the order of what their scores cannot be above, until no other can have the highest: mostly one.
    """
    heat = 1.4426950408889634 / temperature
    far = (~_words(low, high, position, start, BLOCK)).to(tl.float32)  # 2^32 (1 - u) - 0.5
    most = _of_fours(x * heat - log2(far), BLOCK)  # log2 of what no score is above, over 2^32
    highest = tl.max(most, 0)
    top = float("-inf")
    token = V
    value = float("-inf")
    possible = True
    while possible:
        four = _first(most, highest, start, V, BLOCK)
        its_top, its_token, its_value = _best(logits, at, four, low, high, position, temperature, V, MASK_ID)
        if (its_top > top) | ((its_top == top) & (its_token < token)):
            top = its_top
            token = its_token
            value = its_value
        most = tl.where(start + 4 * tl.arange(0, BLOCK // 4) == four, float("-inf"), most)
        highest = tl.max(most, 0)
        # Both sides are rounded, by less than is taken off here.
        possible = highest > (top - 2e-6 * tl.abs(top)) * 1.4426950408889634 - 32.001
    return top, token, value


@triton.jit
def _best(logits, at, four, low, high, position, temperature, V: tl.constexpr, MASK_ID: tl.constexpr):
    """`sample` of the four tokens from `four` on."""
    ids = four + tl.arange(0, 4)
    x = read(logits, at, four, ids, V, MASK_ID, 4)
    score = x * (1.0 / temperature) + gumbel(_words(low, high, position, four, 4))
    score = _hide(score, four, ids, MASK_ID, 4)
    top = tl.max(score, 0)
    token = _least(score == top, ids, V)
    return top, token, tl.max(tl.where(ids == token, x, float("-inf")), 0)


@triton.jit
def _of_fours(x, BLOCK: tl.constexpr):
    """The highest of each four of x (BLOCK,), (BLOCK / 4,)."""
    return tl.max(tl.reshape(x, [BLOCK // 4, 4]), 1)


@triton.jit
def _first(most, highest, start, V: tl.constexpr, BLOCK: tl.constexpr):
    """The first token of the first four whose number is the highest; of some four where that is NaN."""
    four = _least(most == highest, tl.arange(0, BLOCK // 4), BLOCK // 4)
    return tl.minimum(start + 4 * four, (V - 1) // 4 * 4)


@triton.jit
def _least(wins, ids, none: tl.constexpr):
    """The least id that wins, `none` if none does."""
    return tl.min(tl.where(wins, ids, none), 0)


@triton.jit
def _scan(
    logits, at, low, high, position, temperature, part, best,
    V: tl.constexpr, MASK_ID: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One split of one position: part (4,) f32 = highest logit, sum of exp(l - highest), best score, its logit.

    A program reads its whole split at once, so that all of its loads are under way together. A temperature that is 0
    for the compiler leaves nothing of sampling.
    """
    share = tl.program_id(1)
    start = share * BLOCK
    ids = start + tl.arange(0, BLOCK)
    x = read(logits, at, start, ids, V, MASK_ID, BLOCK)
    most = _of_fours(x, BLOCK)
    highest = tl.max(most, 0)
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(exp(x - safe), 0)
    if temperature > 0:
        top, token, value = sample(logits, x, at, start, low, high, position, temperature, V, MASK_ID, BLOCK)
    else:
        four = _first(most, highest, start, V, BLOCK)
        those = four + tl.arange(0, 4)
        token = _least(read(logits, at, four, those, V, MASK_ID, 4) == highest, those, V)
        top = highest
        value = highest
    if total != total:  # by a NaN, of which the first one counts, or by an infinity
        broken = V
        piece = start
        while (broken == V) & (piece < tl.minimum(start + BLOCK, V)):  # read once more, so that none are kept for this
            PIECE: tl.constexpr = BLOCK // 4
            some = piece + tl.arange(0, PIECE)
            y = read(logits, at, piece, some, V, MASK_ID, PIECE)
            broken = _least(y != y, some, V)
            piece += PIECE
        if broken < V:
            token = broken
            top = float("nan")
    place = at.to(tl.int64) * SPLITS + share
    tl.store(part + place * 4, highest)
    tl.store(part + place * 4 + 1, total)
    tl.store(part + place * 4 + 2, top)
    tl.store(part + place * 4 + 3, value)
    tl.store(best + place, token)


@triton.jit
def scan(
    logits, part, best,
    V: tl.constexpr, MASK_ID: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """logits (B, R, V) -> part (B, R, SPLITS, 4) f32, best (B, R, SPLITS) i32; one program per position and split."""
    _scan(logits, tl.program_id(0), 0, 0, 0, 0.0, part, best, V, MASK_ID, SPLITS, BLOCK)


@triton.jit
def drawn_scan(
    logits, temperature, seed, position, R, part, best,
    V: tl.constexpr, MASK_ID: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`scan` with temperature and position (B, R), f32 and i32, and seed (B, 2) i32; temperature 0 is greedy."""
    at = tl.program_id(0)
    row = at // R
    low = tl.load(seed + row * 2)
    high = tl.load(seed + row * 2 + 1)
    _scan(
        logits, at, low, high, tl.load(position + at), tl.load(temperature + at), part, best,
        V, MASK_ID, SPLITS, BLOCK,
    )  # fmt: skip


@triton.jit
def _merge(part, best, first, r, R, SPLITS: tl.constexpr, LANES: tl.constexpr):
    """Token and confidence of some positions of one row, (BLOCK_R,) each; a NaN logit gives its own id and NaN."""
    share = tl.arange(0, LANES)
    inside = (r < R)[:, None] & (share < SPLITS)[None, :]
    place = (first + r).to(tl.int64)[:, None] * SPLITS + share[None, :]
    highest = tl.load(part + place * 4, mask=inside, other=0.0)
    total = tl.load(part + place * 4 + 1, mask=inside, other=1.0)
    top = tl.load(part + place * 4 + 2, mask=inside, other=0.0)
    value = tl.load(part + place * 4 + 3, mask=inside, other=0.0)
    token = tl.load(best + place, mask=inside, other=0)
    is_share = (share < SPLITS)[None, :]  # and not one of the lanes behind the last
    highest = tl.where(is_share, highest, float("-inf"))
    total = tl.where(is_share, total, 0.0)
    top = tl.where(is_share, top, float("-inf"))
    token = tl.where(is_share, token, 2147483647)
    broken = top != top
    any_broken = tl.max(broken.to(tl.int32), 1) > 0
    above = tl.max(highest, 1)
    safe = tl.where(above == float("-inf"), 0.0, above)
    bottom = tl.sum(total * tl.exp(highest - safe[:, None]), 1)
    best_top = tl.max(tl.where(broken, float("-inf"), top), 1)
    wins = tl.where(any_broken[:, None], broken, top == best_top[:, None])
    chosen = tl.min(tl.where(wins, token, 2147483647), 1)
    logit = tl.max(tl.where(token == chosen[:, None], value, float("-inf")), 1)
    confidence = tl.where(any_broken, float("nan"), tl.exp(logit - safe) / bottom)
    return chosen, confidence


@triton.jit
def _ids_of(ids, index, position, real, INDEXED: tl.constexpr):
    if INDEXED:
        position = tl.load(index + position, mask=real, other=0)
    return tl.load(ids + position, mask=real, other=0)


@triton.jit
def rule(
    part, best, ids, index, bar, first, R, token, confidence, next_ids,
    MASK_ID: tl.constexpr, SPLITS: tl.constexpr, LANES: tl.constexpr, BLOCK_R: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """The commit rule of positions first..first + R - 1, and the number of masks it leaves.

    A position's id is ids[position], or if they are INDEXED ids[index[position]].

    The most confident open position is the leftmost of equals, and NaN counts as the highest confidence, as numpy's
    argmax has it, so that a broken engine commits and is noticed instead of looping.
    """
    surest = -1.0
    where = -1
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        chosen, sure = _merge(part, best, first, r, R, SPLITS, LANES)
        tl.store(token + first + r, chosen, mask=r < R)
        tl.store(confidence + first + r, sure, mask=r < R)
        is_open = (r < R) & (_ids_of(ids, index, first + r, r < R, INDEXED) == MASK_ID)
        rank = tl.where(is_open, tl.where(sure != sure, float("inf"), sure), -1.0)
        block_surest = tl.max(rank, 0)
        if block_surest > surest:
            surest = block_surest
            where = tl.min(tl.where(rank == block_surest, r, 2147483647), 0)
    tl.debug_barrier()  # what all threads have written is read back
    left = 0
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        chosen = tl.load(token + first + r, mask=r < R, other=0)
        sure = tl.load(confidence + first + r, mask=r < R, other=0.0)
        before = _ids_of(ids, index, first + r, r < R, INDEXED)
        commits = ((sure >= bar) | (r == where)) & (before == MASK_ID)
        after = tl.where(commits, chosen, before)
        tl.store(next_ids + first + r, after, mask=r < R)
        left += tl.sum(((after == MASK_ID) & (r < R)).to(tl.int32), 0)
    return left


@triton.jit
def commit(
    part, best, ids, threshold, R, token, confidence, next_ids, masks_left,
    MASK_ID: tl.constexpr, SPLITS: tl.constexpr, LANES: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """part and best of a scan, ids (B, R), threshold (B,) -> the op's outputs; one program per row."""
    row = tl.program_id(0)
    bar = tl.load(threshold + row)
    left = rule(
        part, best, ids, ids, bar, row * R, R, token, confidence, next_ids, MASK_ID, SPLITS, LANES, BLOCK_R, False
    )
    tl.store(masks_left + row, left)
