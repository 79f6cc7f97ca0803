# mypy: ignore-errors
"""What `paged_attention.py` does without pages: a step of the softmax, and the merge of a tile's shares."""

import triton
import triton.language as tl

from .attention_plan import TILE


@triton.jit
def weigh(scores, highest, total, sum_v, values, gains, CACHE: tl.constexpr):
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
def merge_last(
    item, counters, part, stats, y, parts, shares, first, tokens, kv_head,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PART_M: tl.constexpr,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Merge a tile's shares in their order, ROWS packed rows at a time, in the program that is the last to finish."""
    tl.debug_barrier()  # every thread has written before one says so
    counter = counters + tl.load(item + TILE) * G + kv_head
    done = tl.atomic_add(counter, 1, sem="acq_rel")
    if done == shares - 1:
        tl.store(counter, 0)
        for row in range(0, tokens * (H // G), ROWS):
            _merge(
                part, stats, y, parts, shares, row, first, tokens, kv_head,
                H, G, D, BLOCK_D, PART_M, SPLITS, ROWS, STEP,
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
