"""RopeWrite: rotation, query scale and the write into the cache, for the torch engine on a GPU; no op of the graph.

    q = RopeWrite(qkv, cos, sin, scale, write_at, k_cache, v_cache)

qkv (B, S, (H + 2 G) D) compute, the packed projection; cos, sin (B, S, D / 2) compute and scale (B, S) compute, made
once per pass for all layers; write_at (B) i32; the caches (B, G, T, D) compute -> q (B, H, S, D), rotated and scaled by
position. K, rotated, and V are written in place at slots [write_at, write_at + S); a token whose slot lies outside
0..T-1 is not written, so a wrong write_at cannot touch another row.

    q = PagedRopeWrite(qkv, cos, sin, scale, slot, k_pages, v_pages)

The same for flat tokens and pages (A, G, PAGE, D): qkv (N, (H + 2 G) D); cos, sin (N, D / 2); scale (N); slot (N) i32
is page * PAGE plus the place in the page; q (N, H, D). A token whose slot lies in no page is not written.
"""

from __future__ import annotations

import numpy as np

from ...config import ModelConfig
from ..op import Arg, Ceil, Constants, Dims, Grid, Op, Stage
from .paged_attention import PAGE

HEADS = 8  # of a program over pages


def reference(
    qkv: np.ndarray, cos: np.ndarray, sin: np.ndarray, scale: np.ndarray, write_at: np.ndarray,
    k_cache: np.ndarray, v_cache: np.ndarray, heads: int,
) -> np.ndarray:  # fmt: skip
    """The specification in numpy, f32 inside, caches changed in place; shapes as in the module's docstring."""
    rows, groups, slots, width = k_cache.shape
    size, half = qkv.shape[1], width // 2
    parts = qkv.astype(np.float32).reshape(rows, size, heads + 2 * groups, width)
    c, s = (a.astype(np.float32)[:, :, None] for a in (cos, sin))
    a, b = parts[..., :half], parts[..., half:]
    turned = np.concatenate([a * c - b * s, b * c + a * s], -1)  # (B, S, H + 2 G, D)
    for row in range(rows):
        for token in range(size):
            slot = write_at[row] + token
            if 0 <= slot < slots:
                k_cache[row, :, slot] = turned[row, token, heads : heads + groups]
                v_cache[row, :, slot] = parts[row, token, heads + groups :]
    q: np.ndarray = turned[:, :, :heads] * scale.astype(np.float32)[:, :, None, None]
    return q.transpose(0, 2, 1, 3).astype(qkv.dtype)


def paged_reference(
    qkv: np.ndarray, cos: np.ndarray, sin: np.ndarray, scale: np.ndarray, slot: np.ndarray,
    k_pages: np.ndarray, v_pages: np.ndarray, heads: int,
) -> np.ndarray:  # fmt: skip
    """The specification over pages, which are changed in place: every token as a row of its own."""
    each = {"qkv": qkv[:, None], "cos": cos[:, None], "sin": sin[:, None], "scale": scale[:, None]}
    at = np.zeros(len(qkv), np.int32)
    empty = np.zeros((len(qkv), k_pages.shape[1], 1, k_pages.shape[3]), k_pages.dtype)
    k, v = empty.copy(), empty
    q = reference(**each, write_at=at, k_cache=k, v_cache=v, heads=heads)  # (N, H, 1, D)
    for token, place in enumerate(slot):
        if 0 <= place < len(k_pages) * PAGE:
            k_pages[place // PAGE, :, place % PAGE] = k[token, :, 0]
            v_pages[place // PAGE, :, place % PAGE] = v[token, :, 0]
    return q[:, :, 0]


def _constants(model: ModelConfig) -> Constants:
    half = model.head_dim // 2
    pairs = 1 << (half - 1).bit_length()
    return {"H": model.num_heads, "G": model.num_kv_heads, "HALF": half, "PAIRS": pairs}


def _grid(dims: Dims, ceil: Ceil) -> Grid:
    return dims["S"], dims["B"], dims["W"] // dims["D"]


def _paged_constants(model: ModelConfig) -> Constants:
    return {**_constants(model), "PAGE": PAGE, "HEADS": HEADS}


def _paged_grid(dims: Dims, ceil: Ceil) -> Grid:
    return dims["N"], ceil(dims["W"] // dims["D"], HEADS), 1


def _heads(dims: Dims, ceil: Ceil) -> int:
    heads: int = dims["W"] // dims["D"] - 2 * dims["G"]
    return heads


_CACHE = ("B", "G", "T", "D")
_OUTPUTS = (Arg("q", "compute", ("B", _heads, "S", "D")),)

OP = Op(
    "RopeWrite",
    inputs=(
        Arg("qkv", "compute", ("B", "S", "W")),
        Arg("cos", "compute", ("B", "S", "P")),
        Arg("sin", "compute", ("B", "S", "P")),
        Arg("scale", "compute", ("B", "S")),
        Arg("write_at", "i32", ("B",)),
        Arg("k_cache", "compute", _CACHE),
        Arg("v_cache", "compute", _CACHE),
    ),
    outputs=_OUTPUTS,
    attributes=(),
    stages=(
        Stage(
            "RopeWrite",
            "rope_write.rope_write",
            inputs=("qkv", "cos", "sin", "scale", "write_at", "k_cache", "v_cache"),
            scalars=("S", "T"),
            outputs=_OUTPUTS,
            constants=_constants,
            grid=_grid,
            num_warps=1,
        ),
    ),
)

_PAGES = ("A", "G", PAGE, "D")
_PAGED_OUTPUTS = (Arg("q", "compute", ("N", _heads, "D")),)

PAGED = Op(
    "PagedRopeWrite",
    inputs=(
        Arg("qkv", "compute", ("N", "W")),
        Arg("cos", "compute", ("N", "P")),
        Arg("sin", "compute", ("N", "P")),
        Arg("scale", "compute", ("N",)),
        Arg("slot", "i32", ("N",)),
        Arg("k_pages", "compute", _PAGES),
        Arg("v_pages", "compute", _PAGES),
    ),
    outputs=_PAGED_OUTPUTS,
    attributes=(),
    stages=(
        Stage(
            "PagedRopeWrite",
            "rope_write.paged_rope_write",
            inputs=("qkv", "cos", "sin", "scale", "slot", "k_pages", "v_pages"),
            scalars=("A",),
            outputs=_PAGED_OUTPUTS,
            constants=_paged_constants,
            grid=_paged_grid,
            num_warps=2,
            follows=True,
        ),
    ),
)
