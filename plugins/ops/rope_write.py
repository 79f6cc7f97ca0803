"""PagedRopeWrite: rotation, query scale and the write into the pages, for the torch engine on a GPU.

    q = PagedRopeWrite(qkv, cos, sin, scale, slot, k_pages, v_pages)

qkv (N, (H + 2 G) D) compute, the packed projection; cos, sin (N, D / 2) compute and scale (N) compute, made once per
pass for all layers by `rotation`; slot (N) i32, page * PAGE plus the place in the page; k_pages and v_pages
(A, G, PAGE, D) compute -> q (N, H, D), rotated and scaled by position. K, rotated, and V are written in place; a token
whose slot lies in no page is not written. Pages may hold 8 bits, of `kv_cache.py`; then their scales k_scales and
v_scales (A, G, PAGE) f32 are written as well. qkv may come in the shares of `linear`, (W, N, (H + 2 G) D) f32.
"""

from __future__ import annotations

import functools

import numpy as np

from ...config import ModelConfig
from ...contract import PAGE, KvBits
from ..op import Arg, Ceil, Constants, Dims, Grid, Op, Stage
from . import kv_cache
from .paged_attention import cached

HEADS = 8  # of a program


def paged_reference(
    qkv: np.ndarray, cos: np.ndarray, sin: np.ndarray, scale: np.ndarray, slot: np.ndarray,
    k_pages: np.ndarray, v_pages: np.ndarray, heads: int,
    k_scales: np.ndarray | None = None, v_scales: np.ndarray | None = None, bits: KvBits | None = None,
) -> np.ndarray:  # fmt: skip
    """The specification in numpy, f32 inside, pages changed in place; shapes as in the module's docstring."""
    pages, groups, _, width = k_pages.shape
    half = width // 2
    parts = qkv.astype(np.float32).reshape(len(qkv), heads + 2 * groups, width)
    c, s = (a.astype(np.float32)[:, None] for a in (cos, sin))
    a, b = parts[..., :half], parts[..., half:]
    turned = np.concatenate([a * c - b * s, b * c + a * s], -1)  # (N, H + 2 G, D)
    keys, values = turned[:, heads : heads + groups], parts[:, heads + groups :]
    for rows, to, scales in ((keys, k_pages, k_scales), (values, v_pages, v_scales)):
        for row, place in zip(rows, slot, strict=True):
            here = place // PAGE, slice(None), place % PAGE
            if 0 <= place < pages * PAGE and bits and scales is not None:
                to[here], scales[here] = kv_cache.quantise(row, bits)
            elif 0 <= place < pages * PAGE:
                to[here] = row
    q: np.ndarray = turned[:, :heads] * scale.astype(np.float32)[:, None, None]
    return q.astype(qkv.dtype)


def _constants(model: ModelConfig, bits: KvBits | None, shares: int) -> Constants:
    half = model.head_dim // 2
    pairs = 1 << (half - 1).bit_length()
    sizes = {"H": model.num_heads, "G": model.num_kv_heads, "PAGE": PAGE}
    known = {**sizes, "HALF": half, "PAIRS": pairs, "HEADS": HEADS, "SHARES": shares}
    return {**known, **({"CACHE": kv_cache.CODE[bits]} if bits else {})}


def _grid(dims: Dims, ceil: Ceil) -> Grid:
    return dims["N"], ceil(dims["F"] // dims["D"], HEADS), 1


def _heads(dims: Dims, ceil: Ceil) -> int:
    heads: int = dims["F"] // dims["D"] - 2 * dims["G"]
    return heads


_OUTPUTS = (Arg("q", "compute", ("N", _heads, "D")),)


@functools.cache
def paged(bits: KvBits | None, shares: int = 0) -> Op:
    """The op over pages of the engine's dtype, or of 8 bits, and a whole qkv or one in shares."""
    name = "PagedRopeWrite" + (bits or "").capitalize() + ("OfShares" if shares else "")
    inputs = (
        Arg("qkv", "f32", ("W", "N", "F")) if shares else Arg("qkv", "compute", ("N", "F")),
        Arg("cos", "compute", ("N", "P")),
        Arg("sin", "compute", ("N", "P")),
        Arg("scale", "compute", ("N",)),
        Arg("slot", "i32", ("N",)),
        *cached(bits),
    )
    return Op(
        name,
        inputs=inputs,
        outputs=_OUTPUTS,
        attributes=(),
        stages=(
            Stage(
                name,
                "rope_write.paged_rope_write" + ("_bits" if bits else ""),
                inputs=tuple(arg.name for arg in inputs),
                scalars=("A",),
                outputs=_OUTPUTS,
                constants=functools.partial(_constants, bits=bits, shares=shares),
                grid=_grid,
                num_warps=8,
                follows=True,
            ),
        ),
    )
