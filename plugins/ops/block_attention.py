"""BlockAttention: grouped-query attention over the static cache with two visible intervals per query.

    y = BlockAttention(q, k, v, visible, slots) {scale}

q (B, H, S, D), k and v (B, G, T, D) in f32, f16 or bf16; visible (B, S, 3) i32; slots (T,) i32; y like q. Query head
`h` reads key/value head `h * G // H`. A query with `visible = (prefix_end, span_begin, span_end)` sees cache slots
`[0, prefix_end)` and `[span_begin, span_end)`; what one gets that sees nothing is finite and otherwise unspecified.
A slot that a query does not see has no influence on what it gets, whatever finite values lie there, as long as their
product with the query is finite too. A NaN or infinity may spread, since zero times either is NaN.

`slots` is 0..T-1, made once per graph. A fused kernel does not need it; the function body does, because ONNX Runtime
merges masks built from one shared tensor into one, but not masks built from each layer's own cache shape.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from ...config import ModelConfig
from ...contract import Dtype
from ..op import Arg, Ceil, Constants, Dims, Grid, Op, Stage

if TYPE_CHECKING:
    import onnx

SPLITS = 16  # at most so many shares of the cache
PROGRAMS = 256  # enough to keep a card busy: two for each of an H100's 132 multiprocessors
LEAST_TILES = 4  # tiles of the cache in a split, since fewer are not worth the merge
BLOCK_M, BLOCK_N = 64, 64  # queries and cache slots of a tile; with 8 warps nothing spills (benchmarks/kernels.py)

# What an engine's body adds to a hidden score. TensorRT's kernels may keep a running maximum over tiles, and of a tile
# with nothing but -inf that can make NaN, so there it is finite: low enough for any real score, high enough that a sum
# with one stays finite (docs/log.md). ONNX Runtime takes -inf as a score of nothing even where the product overflows.
FINITE: dict[Dtype, float] = {"f32": -1e30, "bf16": -1e30, "f16": -60000.0}

# The mask is additive and in the compute type: TensorRT-RTX does not build a bool mask shared by two attentions.
BODY = """
<domain: "nemodiff", opset_import: ["" : 24]>
BlockAttention <scale, plugin_namespace> (q, k, v, visible, slots) => (y)
{
    prefix_end, span_begin, span_end = Split <axis = 2, num_outputs = 3> (visible)
    in_prefix = Less (slots, prefix_end)
    after_begin = GreaterOrEqual (slots, span_begin)
    before_end = Less (slots, span_end)
    in_span = And (after_begin, before_end)
    seen = Or (in_prefix, in_span)
    nothing = Constant <value = float {0.0}> ()
    hidden = Constant <value = float {-inf}> ()
    mask = Where (seen, nothing, hidden)
    heads_axis = Constant <value = int64[1] {1}> ()
    mask4 = Unsqueeze (mask, heads_axis)
    mask_q = CastLike (mask4, q)
    y = Attention <scale: float = @scale> (q, k, v, mask_q)
}
"""
# ONNX Runtime's attention goes through K and V once for every query head, so there the heads that share a key/value
# head become one head of as many times the queries: 1.1 to 1.6 times as fast on a CPU (docs/log.md).
_ALL = "y = Attention <scale: float = @scale> (q, k, v, mask_q)"
_GROUPED = """
    shared_heads = Constant <value = int64[4] {0, @G, -1, @D}> ()
    q_shared = Reshape (q, shared_heads)
    repeats = Constant <value = int64[4] {1, 1, @N, 1}> ()
    mask_shared = Tile (mask_q, repeats)
    y_shared = Attention <scale: float = @scale> (q_shared, k, v, mask_shared)
    all_heads = Constant <value = int64[4] {0, @H, -1, @D}> ()
    y = Reshape (y_shared, all_heads)
"""

# With K and V in int8, whose scales (B, G, T, 1) f32 go into the scores and into the weights: two products with numbers
# that were bytes, for heads that share K and V, in f32 on ONNX Runtime alone.
_INT8 = """
<domain: "nemodiff", opset_import: ["" : 24]>
Int8BlockAttention <scale, plugin_namespace> (q, k, k_scale, v, v_scale, visible, slots) => (y)
{
    k_numbers = Cast <to = 1> (k)
    k_turned = Transpose <perm = [0, 1, 3, 2]> (k_numbers)
    k_scales = Transpose <perm = [0, 1, 3, 2]> (k_scale)
    gain = Constant <value_float: float = @scale> ()
    gains = Mul (k_scales, gain)
    shared_heads = Constant <value = int64[4] {0, @G, -1, @D}> ()
    q_shared = Reshape (q, shared_heads)
    products = MatMul (q_shared, k_turned)
    scores = Mul (products, gains)
    @MASK
    repeats = Constant <value = int64[4] {1, 1, @N, 1}> ()
    mask_shared = Tile (mask4, repeats)
    masked = Add (scores, mask_shared)
    weights = Softmax <axis = -1> (masked)
    v_scales = Transpose <perm = [0, 1, 3, 2]> (v_scale)
    weighted = Mul (weights, v_scales)
    v_numbers = Cast <to = 1> (v)
    y_shared = MatMul (weighted, v_numbers)
    all_heads = Constant <value = int64[4] {0, @H, -1, @D}> ()
    y = Reshape (y_shared, all_heads)
}
"""


def int8_function(heads: tuple[int, int, int]) -> onnx.FunctionProto:
    """Int8BlockAttention as an ONNX local function, for H, G and D heads."""
    import onnx.parser

    mask = BODY[BODY.index("prefix_end") : BODY.index("mask_q =")]
    return onnx.parser.parse_function(_with_sizes(_INT8.replace("@MASK", mask), heads))


def _with_sizes(body: str, heads: tuple[int, int, int]) -> str:
    sizes = {**dict(zip("HGD", heads, strict=True)), "N": heads[0] // heads[1]}
    return re.sub("@([GDNH])\\b", lambda match: str(sizes[match[1]]), body)


def function(hidden: float = -math.inf, heads: tuple[int, int, int] | None = None) -> onnx.FunctionProto:
    """The op as an ONNX local function of standard opset-24 ops.

    It adds `hidden` to the score of a hidden slot. With `heads`, which are H, G and D, it is for those alone.
    """
    import onnx.parser  # here, since a running engine needs none of it

    body = BODY.replace("-inf", str(hidden))
    if heads is not None and heads[0] > heads[1]:
        body = body.replace(_ALL, _with_sizes(_GROUPED, heads))
    return onnx.parser.parse_function(body)


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray, scale: float) -> np.ndarray:
    """The specification in numpy, f32 inside; shapes as in the module's docstring."""
    group = q.shape[1] // k.shape[1]
    keys = k.astype(np.float32).repeat(group, axis=1)  # (B, H, T, D) f32
    values = v.astype(np.float32).repeat(group, axis=1)
    slots = np.arange(k.shape[2])
    prefix_end, begin, end = (visible[:, :, i, None] for i in range(3))  # (B, S, 1) i32
    seen = (slots < prefix_end) | ((slots >= begin) & (slots < end))  # (B, S, T) bool
    scores = q.astype(np.float32) @ keys.swapaxes(2, 3) * np.float32(scale)
    scores = np.where(seen[:, None], scores, np.float32(-np.inf))  # (B, H, S, T) f32
    highest = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(highest == -np.inf, np.float32(0), highest))
    total = weights.sum(-1, keepdims=True)
    y: np.ndarray = weights / np.where(total == 0, np.float32(1), total) @ values  # 0 for a query that sees nothing
    return y.astype(q.dtype)


def _constants(model: ModelConfig) -> Constants:
    heads = {"H": model.num_heads, "G": model.num_kv_heads, "D": model.head_dim, "SCALE": float(model.head_dim**-0.5)}
    splits = {"SPLITS": SPLITS, "PROGRAMS": PROGRAMS, "LEAST": LEAST_TILES}
    # A tensor core takes a power of two of 16 or more.
    tile = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_D": max(16, 1 << (model.head_dim - 1).bit_length())}
    return {**heads, **splits, **tile}


def _tiles(dims: Dims, ceil: Ceil) -> Any:
    """Tiles of queries over the whole batch: each is a program for each split."""
    return ceil(dims["S"] * (dims["H"] // dims["G"]), BLOCK_M) * dims["B"] * dims["G"]


def _parts(dims: Dims, ceil: Ceil) -> Any:
    """Room for every tile's splits: with x tiles there are at most PROGRAMS / x + 1 splits of each."""
    return _tiles(dims, ceil) + PROGRAMS


def _split_grid(dims: Dims, ceil: Ceil) -> Grid:
    return ceil(dims["S"] * (dims["H"] // dims["G"]), BLOCK_M), dims["B"] * dims["G"], SPLITS


def _merge_grid(dims: Dims, ceil: Ceil) -> Grid:
    return dims["B"] * dims["H"], dims["S"], 1


OP = Op(
    "BlockAttention",
    inputs=(
        Arg("q", "compute", ("B", "H", "S", "D")),
        Arg("k", "compute", ("B", "G", "T", "D")),
        Arg("v", "compute", ("B", "G", "T", "D")),
        Arg("visible", "i32", ("B", "S", 3)),
        Arg("slots", "i32", ("T",)),
    ),
    outputs=(Arg("y", "compute", ("B", "H", "S", "D")),),
    attributes=(("scale", float),),
    stages=(
        Stage(
            "BlockAttentionSplit",
            "block_attention.split",
            inputs=("q", "k", "v", "visible"),
            scalars=("S", "T"),
            outputs=(
                Arg("part", "f32", (_parts, BLOCK_M, "D")),
                Arg("stats", "f32", (_parts, BLOCK_M, 2)),
            ),
            constants=_constants,
            grid=_split_grid,
            num_warps=8,
        ),
        Stage(
            "BlockAttentionMerge",
            "block_attention.merge",
            inputs=("q", "part", "stats"),  # q for its shape
            scalars=("S",),
            outputs=(Arg("y", "compute", ("B", "H", "S", "D")),),
            constants=_constants,
            grid=_merge_grid,
            num_warps=2,
        ),
    ),
)
