"""ConfidenceCommit: from logits to the next state of a block, so that logits never leave the device.

    token, confidence, next_ids, masks_left = ConfidenceCommit(logits, ids, threshold) {mask_id}

logits (B, R, V) f32; ids (B, R) i32; threshold (B) f32 -> token (B, R) i32, confidence (B, R) f32, next_ids (B, R) i32,
masks_left (B) i32. `token` is the best entry and `confidence` its softmax probability, both with the mask id left out
(the smallest id wins a tie). Among the positions whose id is the mask, every one with confidence at or over the row's
threshold takes its token, and always the most confident one does (the leftmost of equals), so each pass makes progress.

`SAMPLED` is the same op with three inputs more, temperature (B, R) f32, seed (B, 2) i32 (low and high word) and
position (B, R) i32: where the temperature is over 0, `token` is a sample of softmax(logits / temperature), by the noise
that `runtime/sampling/noise.py` describes, and `confidence` its probability in softmax(logits). It exists on GPUs only
and has no function body: on a CPU the host samples. `flat_commit.py` has both for predictions of any number of rows.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ...config import ModelConfig
from ..op import Arg, Ceil, Constants, Dims, Grid, Op, Stage, ceil_div

if TYPE_CHECKING:
    import onnx

SHARE = 2048  # vocabulary entries of a program, read at once; a multiple of 4, as noise comes in fours
BLOCK_R = 32  # positions of a step of the commit rule
SCAN_WARPS = 4  # of a scan, which loads 64 bytes a thread at once; with 8 reductions take more instructions of all
SAMPLED_WARPS = 2  # of a scan that samples, which instructions bind: each warp reduces, and draws four words again
WARPS = 8  # of the rule; fewer have too many registers for a step of it

# -1e30 and not -inf: it is safe in TensorRT's f16 paths, and in exp(x - x), where -inf gives NaN.
_BODY = """
<domain: "nemodiff", opset_import: ["" : 24]>
ConfidenceCommit <mask_id, plugin_namespace> (logits, ids, threshold) => (token, confidence, next_ids, masks_left)
{
    mask_id = Constant <value_int: int = @mask_id> ()
    mask = Cast <to = 6> (mask_id)
    row_axis = Constant <value = int64[1] {1}> ()
    vocab_axis = Constant <value = int64[1] {2}> ()
    @BEST
    open = Equal (ids, mask)
    closed = Constant <value = float {-1.0}> ()
    rank = Where (open, confidence, closed)
    first = ArgMax <axis = 1, keepdims = 1> (rank)
    bar = Unsqueeze (threshold, row_axis)
    is_sure = GreaterOrEqual (rank, bar)
    @CHOSEN
    commit = And (chosen, open)
    next_ids = Where (commit, token, ids)
    still_open = Equal (next_ids, mask)
    counted = Cast <to = 6> (still_open)
    masks_left = ReduceSum <keepdims = 0> (counted, row_axis)
}
"""
_BEST = """
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    vocab_shape = Shape <start = 2, end = 3> (logits)
    vocab = Squeeze (vocab_shape)
    entries = Range (zero, vocab, one)
    is_mask = Equal (entries, mask_id)
    never = Constant <value = float {-1e30}> ()
    candidates = Where (is_mask, never, logits)
    best = ArgMax <axis = 2, keepdims = 0> (candidates)
    token = Cast <to = 6> (best)
    probability = Softmax <axis = 2> (candidates)
    confidence = ReduceMax <keepdims = 0> (probability, vocab_axis)
"""
_CHOSEN = """
    rows_shape = Shape <start = 1, end = 2> (ids)
    rows = Squeeze (rows_shape)
    positions = Range (zero, rows, one)
    is_first = Equal (positions, first)
    chosen = Or (is_first, is_sure)
"""
# For ONNX Runtime, where the number of entries is known beforehand. Its ArgMax looks at entries one by one, its
# ReduceMax at many at once: so the best one is sought in shares of the entries, and then in the best share.
_BEST_OF_SHARES = """
    @CANDIDATES
    cut = Constant <value = int64[4] {0, 0, -1, @WIDTH}> ()
    shares = Reshape (candidates, cut)
    share_axis = Constant <value = int64[1] {3}> ()
    highest = ReduceMax <keepdims = 0> (shares, share_axis)
    share = ArgMax <axis = 2> (highest)
    entries = GatherND <batch_dims = 2> (shares, share)
    within = ArgMax <axis = 2> (entries)
    width = Constant <value = int64 {@WIDTH}> ()
    begin = Mul (share, width)
    best = Add (begin, within)
    best_token = Cast <to = 6> (best)
    token = Squeeze (best_token, vocab_axis)
    probability = Softmax <axis = 2> (candidates)
    confidence = GatherND <batch_dims = 2> (probability, best)
"""
# A Min takes an eighth of the time of a Where, and its limits are made once, when the graph is loaded. To copy the
# logits and write into the copy takes half of that, but four nodes more.
MANY = 4096  # entries, for which that is worth it
_LIMITED = """
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    vocab = Constant <value = int64 {@VOCAB}> ()
    every = Range (zero, vocab, one)
    is_mask = Equal (every, mask_id)
    never = Constant <value = float {-1e30}> ()
    always = Constant <value = float {inf}> ()
    limits = Where (is_mask, never, always)
    candidates = Min (logits, limits)
"""
_COPIED = """
    of_mask = Unsqueeze (ids, vocab_axis)
    one_each = Shape (of_mask)
    place = Expand (mask_id, one_each)
    never = ConstantOfShape <value = float[1] {-1e30}> (one_each)
    candidates = ScatterElements <axis = 2> (logits, place, never)
"""
_CHOSEN_WRITTEN = """
    certain = Equal (first, first)
    chosen = ScatterElements <axis = 1> (is_sure, first, certain)
"""


def function(vocab: int | None = None) -> onnx.FunctionProto:
    """The op as an ONNX local function of standard opset-24 ops; with `vocab`, V, it is for that size alone."""
    import onnx.parser  # here, since a running engine needs none of it

    best, chosen = _BEST, _CHOSEN
    if vocab is not None:  # a V without divisors is one share, which is right and no quicker
        width = next(size for size in range(math.isqrt(vocab), vocab + 1) if vocab % size == 0)
        best = _BEST_OF_SHARES.replace("@CANDIDATES", _LIMITED if vocab < MANY else _COPIED)
        best = best.replace("@WIDTH", str(width)).replace("@VOCAB", str(vocab))
        chosen = _CHOSEN_WRITTEN
    return onnx.parser.parse_function(_BODY.replace("@BEST", best).replace("@CHOSEN", chosen))


def reference(
    logits: np.ndarray, ids: np.ndarray, threshold: np.ndarray, mask_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The specification in numpy; shapes as in the module's docstring."""
    candidates = logits.astype(np.float32)
    candidates[:, :, mask_id] = -1e30
    token = candidates.argmax(-1).astype(np.int32)
    weights = np.exp(candidates - candidates.max(-1, keepdims=True))
    confidence = 1 / weights.sum(-1)  # (B, R) f32: the best entry's own weight is exactly 1
    next_ids = ids.copy()
    for row, bar in enumerate(threshold):
        open_ = np.flatnonzero(ids[row] == mask_id)
        if open_.size:
            sure = open_[confidence[row, open_] >= bar]
            first = open_[confidence[row, open_].argmax()]
            commit = np.union1d(sure, first)
            next_ids[row, commit] = token[row, commit]
    return token, confidence, next_ids, (next_ids == mask_id).sum(1).astype(np.int32)


def scan_constants(model: ModelConfig) -> Constants:
    """Of a scan of logits."""
    sizes = {"V": model.vocab_size, "MASK_ID": model.mask_id}
    return {**sizes, "SPLITS": ceil_div(model.vocab_size, SHARE), "BLOCK": SHARE}


def splits(dims: Dims, ceil: Ceil) -> Any:
    """Shares of the vocabulary."""
    return ceil(dims["V"], SHARE)


def _scan_grid(dims: Dims, ceil: Ceil) -> Grid:
    return dims["B"] * dims["R"], splits(dims, ceil), 1


def commit_constants(model: ModelConfig) -> Constants:
    """Of the commit rule over a scan."""
    shares = ceil_div(model.vocab_size, SHARE)
    lanes = 1 << (shares - 1).bit_length()
    return {"MASK_ID": model.mask_id, "SPLITS": shares, "LANES": lanes, "BLOCK_R": BLOCK_R}


def _commit_grid(dims: Dims, ceil: Ceil) -> Grid:
    return dims["B"], 1, 1


_SCAN = (Arg("part", "f32", ("B", "R", splits, 4)), Arg("best", "i32", ("B", "R", splits)))
_OUTPUTS = (
    Arg("token", "i32", ("B", "R")),
    Arg("confidence", "f32", ("B", "R")),
    Arg("next_ids", "i32", ("B", "R")),
    Arg("masks_left", "i32", ("B",)),
)
_COMMIT = Stage(
    "ConfidenceCommitRule",
    "confidence_commit.commit",
    inputs=("part", "best", "ids", "threshold"),
    scalars=("R",),
    outputs=_OUTPUTS,
    constants=commit_constants,
    grid=_commit_grid,
    num_warps=WARPS,
)
_INPUTS = (
    Arg("logits", "logits", ("B", "R", "V")),
    Arg("ids", "i32", ("B", "R")),
    Arg("threshold", "f32", ("B",)),
)
_NOISE = (
    Arg("temperature", "f32", ("B", "R")),
    Arg("seed", "i32", ("B", 2)),
    Arg("position", "i32", ("B", "R")),
)

OP = Op(
    "ConfidenceCommit",
    inputs=_INPUTS,
    outputs=_OUTPUTS,
    attributes=(("mask_id", int),),
    stages=(
        Stage(
            "ConfidenceCommitScan",
            "confidence_commit.scan",
            inputs=("logits",),
            scalars=(),
            outputs=_SCAN,
            constants=scan_constants,
            grid=_scan_grid,
            num_warps=SCAN_WARPS,
        ),
        _COMMIT,
    ),
)

SAMPLED = Op(
    "SampledCommit",
    inputs=(*_INPUTS, *_NOISE),
    outputs=_OUTPUTS,
    attributes=(("mask_id", int),),
    stages=(
        Stage(
            "SampledCommitScan",
            "confidence_commit.drawn_scan",
            inputs=("logits", "temperature", "seed", "position"),
            scalars=("R",),
            outputs=_SCAN,
            constants=scan_constants,
            grid=_scan_grid,
            num_warps=SAMPLED_WARPS,
        ),
        _COMMIT,
    ),
)
