# mypy: ignore-errors
"""What attention does without pages: a step of the softmax, and the merge of a tile's shares."""

import triton
import triton.language as tl

from .attention_plan import MERGE_FIELDS
from .dependent import follow


@triton.jit
def weigh(scores, highest, total, sum_v, values, gains, CACHE: tl.constexpr, SPREAD: tl.constexpr):
    """One step of the running softmax; scores (M, N) in base 2, values (N, D) times gains (N,).

    total is (M,), or with SPREAD (M, N), to be summed in the end: of few rows several warps have the columns, and a sum
    would wait for all of them.
    """
    above = tl.maximum(highest, tl.max(scores, 1))
    safe = tl.where(above == float("-inf"), 0.0, above)  # a row that has seen nothing yet
    weight = tl.exp2(scores - safe[:, None])
    shrink = tl.exp2(highest - safe)
    total = total * shrink[:, None] + weight if SPREAD else total * shrink + tl.sum(weight, 1)
    if CACHE:
        weight *= gains[None, :]
    sum_v = tl.dot(weight.to(values.dtype), values, sum_v * shrink[:, None], input_precision="ieee")
    return above, total, sum_v


@triton.jit
def merged(highest, total, sum_v):
    """What shares with these highest scores and sums, (C,), and sums of values, (C, D), are together, (D,)."""
    above = tl.max(highest, 0)
    safe = tl.where(above == float("-inf"), 0.0, above)
    weight = tl.exp2(highest - safe)
    bottom = tl.sum(weight * total, 0)
    return tl.sum(sum_v * weight[:, None], 0) / tl.where(bottom == 0.0, 1.0, bottom)


@triton.jit
def merge(
    merges, part, stats, y,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, LARGE_M: tl.constexpr,
    SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """merges (N, MERGE_FIELDS), part (C, G, LARGE_M, D) and stats (C, G, LARGE_M, 2) of shares -> y (N, H, D).

    One program per token and some heads; a token whose tile is one share has its y already.
    """
    follow(PDL)
    group: tl.constexpr = H // G
    token = tl.program_id(0)
    shares = tl.load(merges + token * MERGE_FIELDS)
    parts = tl.load(merges + token * MERGE_FIELDS + 1)
    offset = tl.load(merges + token * MERGE_FIELDS + 2)
    if shares == 1:
        return
    share = tl.arange(0, SPLITS)
    real = share < shares
    d = tl.arange(0, BLOCK_D)
    heads = H // tl.num_programs(1)
    for head in range(tl.program_id(1) * heads, (tl.program_id(1) + 1) * heads):
        place = (parts * G + head // group * shares + share).to(tl.int64) * LARGE_M + offset * group + head % group
        sum_v = tl.load(part + place[:, None] * D + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
        highest = tl.load(stats + place * 2, mask=real, other=float("-inf"))
        total = tl.load(stats + place * 2 + 1, mask=real, other=0.0)
        out = merged(highest, total, sum_v)
        tl.store(y + (token * H + head).to(tl.int64) * D + d, out.to(y.dtype.element_ty), mask=d < D)
