"""PagedRopeWrite: rotation, query scale and the write into the pages, for the torch engine on a GPU.

    q = PagedRopeWrite(qkv, cos, sin, scale, slot, k_pages, v_pages)

qkv (N, (H + 2 G) D) compute, the packed projection; cos, sin (N, D / 2) compute and scale (N) compute, made once per
pass for all layers by `rotation`; slot (N) i32, page * PAGE plus the place in the page; k_pages and v_pages
(A, G, PAGE, D) compute -> q (N, H, D), rotated and scaled by position. K, rotated, and V are written in place; a token
whose slot lies in no page is not written.
"""

from __future__ import annotations

import numpy as np

from ...config import ModelConfig
from ..op import Arg, Ceil, Constants, Dims, Grid, Op, Stage
from .paged_attention import PAGE

HEADS = 8  # of a program


def paged_reference(
    qkv: np.ndarray, cos: np.ndarray, sin: np.ndarray, scale: np.ndarray, slot: np.ndarray,
    k_pages: np.ndarray, v_pages: np.ndarray, heads: int,
) -> np.ndarray:  # fmt: skip
    """The specification in numpy, f32 inside, pages changed in place; shapes as in the module's docstring."""
    pages, groups, _, width = k_pages.shape
    half = width // 2
    parts = qkv.astype(np.float32).reshape(len(qkv), heads + 2 * groups, width)
    c, s = (a.astype(np.float32)[:, None] for a in (cos, sin))
    a, b = parts[..., :half], parts[..., half:]
    turned = np.concatenate([a * c - b * s, b * c + a * s], -1)  # (N, H + 2 G, D)
    for token, place in enumerate(slot):
        if 0 <= place < pages * PAGE:
            k_pages[place // PAGE, :, place % PAGE] = turned[token, heads : heads + groups]
            v_pages[place // PAGE, :, place % PAGE] = parts[token, heads + groups :]
    q: np.ndarray = turned[:, :heads] * scale.astype(np.float32)[:, None, None]
    return q.astype(qkv.dtype)


def _constants(model: ModelConfig) -> Constants:
    half = model.head_dim // 2
    pairs = 1 << (half - 1).bit_length()
    sizes = {"H": model.num_heads, "G": model.num_kv_heads, "PAGE": PAGE}
    return {**sizes, "HALF": half, "PAIRS": pairs, "HEADS": HEADS}


def _grid(dims: Dims, ceil: Ceil) -> Grid:
    return dims["N"], ceil(dims["W"] // dims["D"], HEADS), 1


def _heads(dims: Dims, ceil: Ceil) -> int:
    heads: int = dims["W"] // dims["D"] - 2 * dims["G"]
    return heads


_PAGES = ("A", "G", PAGE, "D")
_OUTPUTS = (Arg("q", "compute", ("N", _heads, "D")),)

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
    outputs=_OUTPUTS,
    attributes=(),
    stages=(
        Stage(
            "PagedRopeWrite",
            "rope_write.paged_rope_write",
            inputs=("qkv", "cos", "sin", "scale", "slot", "k_pages", "v_pages"),
            scalars=("A",),
            outputs=_OUTPUTS,
            constants=_constants,
            grid=_grid,
            num_warps=2,
            follows=True,
        ),
    ),
)
