# mypy: ignore-errors
"""The kernels of `ops/flat_commit.py`: one puts samples into a scan, one applies the commit rule span by span."""

import triton
import triton.language as tl

from .confidence_commit import read, rule, sample
from .dependent import follow


@triton.jit
def flat_sampled_scan(
    logits, temperature, seed, ids, pos, index, part, best,
    V: tl.constexpr, MASK_ID: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Put samples into part (R, SPLITS, 4) and best (R, SPLITS) of a scan of logits (R, V).

    temperature (R,) f32, seed (R, 2), index (R,), ids and pos (N,) i32; what has temperature 0 or a NaN stays as it is.
    """
    follow(PDL)
    at = tl.program_id(0)
    heat = tl.load(temperature + at)
    share = tl.program_id(1)
    place = at.to(tl.int64) * SPLITS + share
    before = tl.load(part + place * 4 + 2)
    if (heat <= 0) | (before != before):
        return
    start = share * BLOCK
    choices = start + tl.arange(0, BLOCK)
    x = read(logits, at, start, choices, V, MASK_ID, BLOCK)
    low, high = tl.load(seed + at * 2), tl.load(seed + at * 2 + 1)
    own = tl.load(index + at)
    where = tl.load(pos + own) + (tl.load(ids + own) != MASK_ID)
    top, token, value = sample(logits, x, at, start, low, high, where, heat, V, MASK_ID, BLOCK)
    tl.store(part + place * 4 + 2, top)
    tl.store(part + place * 4 + 3, value)
    tl.store(best + place, token)


@triton.jit
def flat_commit(
    part, best, ids, index, span, threshold, token, confidence, next_ids,
    MASK_ID: tl.constexpr, SPLITS: tl.constexpr, LANES: tl.constexpr, BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """ids (N,), index and threshold (R,), span (R, 2) -> the op's outputs.

    The program of a span's first position does the span.
    """
    follow(PDL)
    at = tl.program_id(0)
    begin = tl.load(span + at * 2)
    if at != begin:
        return
    count = tl.load(span + at * 2 + 1) - begin
    bar = tl.load(threshold + at)
    rule(part, best, ids, index, bar, begin, count, token, confidence, next_ids, MASK_ID, SPLITS, LANES, BLOCK_R, True)
