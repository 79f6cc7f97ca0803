# mypy: ignore-errors
"""The kernels of `ops/head_commit.py`: one takes tiles of the vocabulary, one reduces them to the commit rule's splits.

Programs of one tile of the vocabulary are neighbours in the grid, so after the first of them its weights come from the
second-level cache.
"""

import triton
import triton.language as tl

from .dependent import follow
from .widened import from_int8


@triton.jit
def flat_head_scan(
    x, index, weight, kept, R, W, tile_part, tile_best,
    V: tl.constexpr, E: tl.constexpr, MASK_ID: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x (N, E), index (R,), weight (V, E) -> tile_part (R, N, 4) f32, tile_best (R, N) i32, as ConfidenceCommit's scan.

    kept (R, W) f32 gets the logits if W is V, and nothing if not.
    """
    follow(PDL)
    _scan(x, index, weight, weight, kept, R, W, tile_part, tile_best, V, E, MASK_ID, BLOCK_M, BLOCK_V, BLOCK_E, False)


@triton.jit
def flat_head_scan_int8(
    x, index, weight, scale, kept, R, W, tile_part, tile_best,
    V: tl.constexpr, E: tl.constexpr, MASK_ID: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The same for weight (V, E) u8, the bits of int8, and scale (V,) f32."""
    follow(PDL)
    _scan(x, index, weight, scale, kept, R, W, tile_part, tile_best, V, E, MASK_ID, BLOCK_M, BLOCK_V, BLOCK_E, True)


@triton.jit
def _scan(
    x, index, weight, scale, kept, positions, W, tile_part, tile_best,
    V: tl.constexpr, E: tl.constexpr, MASK_ID: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """One tile of positions and vocabulary."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    e = tl.arange(0, BLOCK_E)
    real = m < positions
    token_place = tl.load(index + m, mask=real, other=0).to(tl.int64) * E
    inside = v < V
    # The weights are the left side, as in `linear.py`, so that both tiles take the same instructions.
    columns = tl.zeros([BLOCK_V, BLOCK_M], tl.float32)
    for start in range(0, E, BLOCK_E):
        has = start + e < E
        a = tl.load(x + token_place[None, :] + start + e[:, None], mask=has[:, None] & real[None, :], other=0.0)
        place = v.to(tl.int64)[:, None] * E + start + e[None, :]
        w = tl.load(weight + place, mask=inside[:, None] & has[None, :], other=0)
        if INT8:
            w = from_int8(w).to(a.dtype)
        columns = tl.dot(w, a, columns, input_precision="ieee")
    logits = tl.trans(columns)  # (M, V)
    if INT8:
        logits *= tl.load(scale + v, mask=inside, other=0.0)[None, :]
    if W == V:
        tl.store(kept + m.to(tl.int64)[:, None] * V + v[None, :], logits, mask=real[:, None] & inside[None, :])
    logits = tl.where((v == MASK_ID)[None, :], -1e30, logits)
    logits = tl.where(inside[None, :], logits, float("-inf"))
    ids = v[None, :]
    broken = tl.min(tl.where(logits != logits, ids, V), 1)  # (M,) the first NaN
    logits = tl.where(logits != logits, float("-inf"), logits)
    highest = tl.max(logits, 1)
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.exp(logits - safe[:, None]), 1)
    token = tl.min(tl.where((logits == highest[:, None]) & inside[None, :], ids, V), 1)
    token = tl.where(broken < V, broken, token)
    top = tl.where(broken < V, float("nan"), highest)
    place = m.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(tile_part + place * 4, highest, mask=real)
    tl.store(tile_part + place * 4 + 1, total, mask=real)
    tl.store(tile_part + place * 4 + 2, top, mask=real)
    tl.store(tile_part + place * 4 + 3, highest, mask=real)
    tl.store(tile_best + place, token, mask=real)


@triton.jit
def head_reduce(
    tile_part, tile_best, part, best,
    TILES: tl.constexpr, SPLITS: tl.constexpr, LANES: tl.constexpr, SHARE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """tile_part (R, TILES, 4), tile_best (R, TILES) -> part (R, SPLITS, 4), best (R, SPLITS).

    One program per position.
    """
    follow(PDL)
    position = tl.program_id(0).to(tl.int64)
    share = tl.arange(0, LANES)
    tile = share[:, None] * SHARE + tl.arange(0, SHARE)[None, :]
    real = tile < TILES
    place = position * TILES + tile
    highest = tl.load(tile_part + place * 4, mask=real, other=float("-inf"))  # (LANES, SHARE) f32
    total = tl.load(tile_part + place * 4 + 1, mask=real, other=0.0)
    top = tl.load(tile_part + place * 4 + 2, mask=real, other=float("-inf"))
    token = tl.load(tile_best + place, mask=real, other=2147483647)
    broken = top != top
    any_broken = tl.max(broken.to(tl.int32), 1) > 0
    above = tl.max(highest, 1)
    safe = tl.where(above == float("-inf"), 0.0, above)
    summed = tl.sum(total * tl.exp(highest - safe[:, None]), 1)
    best_top = tl.max(tl.where(broken, float("-inf"), top), 1)
    wins = tl.where(any_broken[:, None], broken, top == best_top[:, None])
    to = position * SPLITS + share
    tl.store(part + to * 4, above, mask=share < SPLITS)
    tl.store(part + to * 4 + 1, summed, mask=share < SPLITS)
    tl.store(part + to * 4 + 2, tl.where(any_broken, float("nan"), best_top), mask=share < SPLITS)
    tl.store(part + to * 4 + 3, best_top, mask=share < SPLITS)
    tl.store(best + to, tl.min(tl.where(wins, token, 2147483647), 1), mask=share < SPLITS)
