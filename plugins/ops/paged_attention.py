"""PagedAttention: grouped-query attention over K/V in pages, for flat tokens of any number of rows; the torch engine's.

    items, merges = AttentionPlan(row, first, visible, page_table)
    y = PagedAttention(q, k_pages, v_pages, page_table, visible, items, merges)

row (N,) i32 is a token's row of the page table; the tokens of a row lie together, and first (N,) i32 is the number of
their first one. q (N, H, D) compute; k_pages and v_pages (A, G, PAGE, D) compute; page_table (B, M) i32: slot s of row
b is in page page_table[b, s // PAGE]; visible (N, 3) i32 as in `block_attention`, in slots of the token's row; y as q.
Pages may hold 8 bits, of `kv_cache.py`, with k_scales and v_scales (A, G, PAGE) f32 after them. A row's scale is taken
into its scores and weights, so a page costs its bytes and a conversion.

A token that sees nothing gets 0. A slot that a query does not see has no influence on what it gets, whatever finite
values lie there; what no query of its row sees may be NaN. Page numbers past what a row's tokens see are not read.

The plan is made once per pass and used by every layer: which tile of tokens reads which pages in which program. So
sizes of grids depend on N and B alone, and rows of any length share a launch.
"""

from __future__ import annotations

import functools

import numpy as np

from ...config import ModelConfig
from ...contract import PAGE, KvBits
from ..op import Arg, Ceil, Constants, Dims, Grid, Op, Stage
from . import block_attention, kv_cache

PROGRAMS = 264  # that a pass is split into, if nobody says: two for each of an H100's 132 multiprocessors
SPLITS = 32  # at most so many shares of a tile
SMALL_M, LARGE_M = 16, 64  # packed queries and heads of a tile
SMALL_N, LARGE_N = 64, 32  # slots of a step over its pages
GROUP_N = 64  # of a large tile on SM 90, whose registers and shared memory have room for them
# In f32 so many rows of a tile and slots at a time: no tensor core multiplies it, and a thread holds all numbers that a
# product of its rows and columns sums over, so heads come in slices.
F32 = {"MOST_M": 16, "SMALL_N": 16, "SLICE": 32}
MOST_SMALL = 16  # small tiles of a row; one with more tokens gets large ones
SHORT = 10  # pages up to which a row of more than one small tile keeps to them: they read K/V once each
LEAST = 1  # pages of a share that is not the last of its tile
LARGE_PAGES = 1  # pages of a share of a large tile, for one of a small tile
FEW = 128  # tokens of a pass up to which every head of a token is merged by a program of its own
_MERGE_FIELDS = 4
_FIELDS = 16  # of an item, see the kernel


def reference(
    q: np.ndarray, k_pages: np.ndarray, v_pages: np.ndarray, page_table: np.ndarray,
    row: np.ndarray, visible: np.ndarray, scale: float,
) -> np.ndarray:  # fmt: skip
    """The specification in numpy; shapes as in the module's docstring, pages as the numbers that they stand for."""
    y = np.zeros_like(q)
    for number in np.unique(row):
        here = row == number
        pages = page_table[number, : -(-int(visible[here, ::2].max(initial=0)) // PAGE)]
        # (pages, G, PAGE, D) -> (1, G, T, D)
        k, v = (cache[pages].swapaxes(0, 1).reshape(1, cache.shape[1], -1, q.shape[2]) for cache in (k_pages, v_pages))
        if k.shape[2]:
            packed = q[here].swapaxes(0, 1)[None]  # (1, H, S, D)
            y[here] = block_attention.reference(packed, k, v, visible[here][None], scale)[0].swapaxes(0, 1)
    return y


def _rows(group: int) -> tuple[int, int]:
    """Packed rows of a small tile and of a large one, which hold one token at least."""
    small = max(SMALL_M, 1 << (group - 1).bit_length())
    return small, max(LARGE_M, small)


def _shared(groups: int, programs: int | None) -> int:
    """Programs of a key/value head that the pages of a pass are shared between."""
    return max(1, (programs or PROGRAMS) // groups)


def _tile_rows(model: ModelConfig) -> dict[str, int]:
    small, large = _rows(model.num_heads // model.num_kv_heads)
    return {"SMALL_M": small, "LARGE_M": large}


def _plan_constants(model: ModelConfig, programs: int | None) -> Constants:
    rows, group = _tile_rows(model), model.num_heads // model.num_kv_heads
    tokens = 1 << (rows["LARGE_M"] // group - 1).bit_length()
    limits = {"MOST": MOST_SMALL, "SHORT": SHORT, "LEAST": LEAST, "LARGE_PAGES": LARGE_PAGES}
    shared = {"SPLITS": SPLITS, "SHARED": _shared(model.num_kv_heads, programs)}
    return {**rows, "GROUP": group, "PAGE": PAGE, "MANY_POW2": tokens, **limits, **shared}


def _heads(model: ModelConfig) -> dict[str, int]:
    block = max(16, 1 << (model.head_dim - 1).bit_length())  # a tensor core takes a power of two of 16 or more
    return {"H": model.num_heads, "G": model.num_kv_heads, "D": model.head_dim, "BLOCK_D": block}


def _constants(model: ModelConfig, bits: KvBits | None) -> Constants:
    rows, heads = _tile_rows(model), _heads(model)
    large = LARGE_N // 2 if bits else LARGE_N  # 32 spilled on SM 120
    group = large if bits or heads["BLOCK_D"] > 128 else GROUP_N  # only so many of 16 bits were tried
    slots = {"PAGE": PAGE, "SMALL_N": SMALL_N, "LARGE_N": large, "GROUP_N": group}
    tile = {**rows, "MOST_M": rows["LARGE_M"], "SLICE": heads["BLOCK_D"]}
    code = {"CACHE": kv_cache.CODE[bits]} if bits else {}
    return {**heads, "SCALE": float(model.head_dim**-0.5), **slots, **tile, **code}


def _merge_constants(model: ModelConfig) -> Constants:
    return {**_heads(model), "LARGE_M": _tile_rows(model)["LARGE_M"], "SPLITS": SPLITS}


def tiles(dims: Dims, ceil: Ceil) -> int:
    """The most tiles that the tokens of a pass make."""
    group = dims["H"] // dims["G"]
    few, many = (rows // group for rows in _rows(group))
    most: int = min(dims["N"], dims["N"] // few + dims["B"], dims["N"] // many + MOST_SMALL * dims["B"])
    return most


def items(dims: Dims, ceil: Ceil, programs: int | None = None) -> int:
    """The most shares of all tiles: each of `_shared` is full, but for the last of every tile."""
    most = tiles(dims, ceil)
    return min(most + _shared(dims["G"], programs), SPLITS * most)


def _parts(dims: Dims, ceil: Ceil, programs: int | None) -> int:
    """The most shares of tiles that have more than one: those are more than half full on average."""
    return min(2 * _shared(dims["G"], programs), items(dims, ceil, programs))


def _grid(dims: Dims, ceil: Ceil) -> Grid:
    return dims["W"], dims["G"], 1


def _merge_grid(dims: Dims, ceil: Ceil) -> Grid:
    """Of many tokens few are split, and programs that find nothing to do take time, too."""
    return dims["N"], dims["H"] if dims["N"] <= FEW else dims["G"], 1


def _large(dims: Dims, ceil: Ceil) -> int:
    return _rows(dims["H"] // dims["G"])[1]


_TABLE = Arg("page_table", "i32", ("B", "M"))
_VISIBLE = Arg("visible", "i32", ("N", 3))


def cached(bits: KvBits | None) -> tuple[Arg, ...]:
    """Pages of K and V as arguments, and their scales if they hold 8 bits."""
    pages = [Arg(f"{part}_pages", kv_cache.STORED[bits] if bits else "compute", ("A", "G", PAGE, "D")) for part in "kv"]
    scales = [Arg(f"{part}_scales", "f32", ("A", "G", PAGE)) for part in "kv"] if bits else []
    return (*pages, *scales)


@functools.cache
def plan(programs: int | None = None) -> Op:
    """The plan of a pass for a card that takes so many programs at once."""
    shares = functools.partial(items, programs=programs)
    planned = (Arg("items", "i32", (shares, _FIELDS)), Arg("merges", "i32", ("N", _MERGE_FIELDS)))
    return Op(
        "AttentionPlan",
        inputs=(Arg("row", "i32", ("N",)), Arg("first", "i32", ("N",)), _VISIBLE, _TABLE),
        outputs=planned,
        attributes=(),
        stages=(
            Stage(
                "AttentionPlan",
                "attention_plan.plan",
                inputs=("row", "first", "visible"),
                scalars=("N", "B", "M"),
                outputs=(Arg("tiles", "i32", (tiles, _FIELDS)), *planned),
                constants=functools.partial(_plan_constants, programs=programs),
                grid=lambda dims, ceil: (1, 1, 1),
                num_warps=8,
                follows=True,
            ),
        ),
    )


PLAN = plan()


@functools.cache
def op(bits: KvBits | None, programs: int | None = None) -> Op:
    """The op over pages of the engine's dtype, or of 8 bits, for items of a plan for so many programs."""
    name = "PagedAttention" + (bits or "").capitalize()
    parts = functools.partial(_parts, programs=programs)
    inputs = (
        Arg("q", "compute", ("N", "H", "D")),
        *cached(bits),
        _TABLE,
        _VISIBLE,
        Arg("items", "i32", ("W", _FIELDS)),
        Arg("merges", "i32", ("N", _MERGE_FIELDS)),
    )
    return Op(
        name,
        inputs=inputs,
        outputs=(Arg("y", "compute", ("N", "H", "D")),),
        attributes=(),
        stages=(
            Stage(
                name,
                "paged_attention.attend" + ("_bits" if bits else ""),
                inputs=tuple(arg.name for arg in inputs if arg.name != "merges"),
                scalars=("M",),
                outputs=(
                    Arg("part", "f32", (parts, "G", _large, "D")),
                    Arg("stats", "f32", (parts, "G", _large, 2)),
                    Arg("y", "compute", ("N", "H", "D")),
                ),
                constants=functools.partial(_constants, bits=bits),
                grid=_grid,
                num_stages=2 if bits else 3,  # with 3, int8 spilled 8 bytes on SM 100
                constants_f32=F32,
                follows=True,
            ),
            Stage(
                "AttentionMerge",
                "attention_share.merge",
                inputs=("merges", "part", "stats", "y"),
                scalars=(),
                outputs=(),
                constants=_merge_constants,
                grid=_merge_grid,
                follows=True,
            ),
        ),
    )


OP = op(None)
