"""HeadCommit: the language model's head without logits in memory, for the torch engine on a GPU.

    part, best = FlatHeadCommit(x, weight, index, kept)

x (N, E) and weight (V, E) compute; index (R) i32 are the tokens that get logits = x[index] weight^T in f32, of which
part and best are what ConfidenceCommit's scan would find, for `flat_commit.py`. `kept` (R, W) f32
receives the logits: W is V where someone wants them, 0 where not. Every tile of the vocabulary keeps its highest logit,
sum of exponentials, best entry and first NaN; a second stage brings the tiles down to the splits of the commit rule.
The tokens are chosen from the f32 logits; a head that writes them in 16 bits makes ties, so it may choose another of
two near-equal entries. A head in int8 has weight (V, E) u8, its bits, and scale (V) f32, by which the logits are
multiplied.
"""

from __future__ import annotations

import functools

import numpy as np

from ...config import ModelConfig
from ..op import Arg, Ceil, Constants, Dims, Op, Stage, ceil_div
from . import flat_commit
from .confidence_commit import SHARE

TILES = (16, 64)  # positions of a tile: 16 keeps a decode step light, 64 reads the weights once for a block of 64
BLOCK_V, BLOCK_E = 64, 64  # vocabulary entries of a tile, and the step over E


def reference(
    x: np.ndarray, weight: np.ndarray, ids: np.ndarray, index: np.ndarray, span: np.ndarray, threshold: np.ndarray,
    mask_id: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """The specification of both ops in numpy, token, confidence and next_ids; shapes as in the modules' docstrings."""
    logits = x[index].astype(np.float32) @ weight.astype(np.float32).T
    return flat_commit.reference(logits, ids[index], span, threshold, mask_id)


def _tiles(dims: Dims, ceil: Ceil) -> int:
    tiles: int = ceil(dims["V"], BLOCK_V)
    return tiles


def _scan_constants(model: ModelConfig, tile: int) -> Constants:
    sizes = {"V": model.vocab_size, "E": model.hidden_size, "MASK_ID": model.mask_id}
    return {**sizes, "BLOCK_M": tile, "BLOCK_V": BLOCK_V, "BLOCK_E": BLOCK_E}


def _reduce_constants(model: ModelConfig) -> Constants:
    sizes = {"TILES": ceil_div(model.vocab_size, BLOCK_V), "SPLITS": ceil_div(model.vocab_size, SHARE)}
    return {**sizes, "LANES": 1 << (sizes["SPLITS"] - 1).bit_length(), "SHARE": SHARE // BLOCK_V}


@functools.cache
def flat_op(tile: int, int8: bool = False) -> Op:
    """The op over flat positions for tiles of `tile` of them, one of TILES; of a head in int8 on request."""
    weight = [Arg("weight", "compute", ("V", "E"))]
    if int8:
        weight = [Arg("weight", "u8", ("V", "E")), Arg("scale", "f32", ("V",))]
    tile_outputs = (Arg("tile_part", "f32", ("R", _tiles, 4)), Arg("tile_best", "i32", ("R", _tiles)))
    return Op(
        "FlatHeadCommit",
        inputs=(
            Arg("x", "compute", ("N", "E")),
            *weight,
            Arg("index", "i32", ("R",)),
            Arg("kept", "f32", ("R", "W")),
        ),
        outputs=flat_commit.SCAN,
        attributes=(),
        stages=(
            Stage(
                f"FlatHeadScan{'Int8' if int8 else ''}{tile}",
                f"head_commit.flat_head_scan{'_int8' if int8 else ''}",
                inputs=("x", "index", *(arg.name for arg in weight), "kept"),
                scalars=("R", "W"),
                outputs=tile_outputs,
                constants=functools.partial(_scan_constants, tile=tile),
                grid=lambda dims, ceil: (ceil(dims["R"], tile), ceil(dims["V"], BLOCK_V), 1),
                num_stages=3,
                constants_f32={"BLOCK_E": 16},  # 64 spilled in tiles of 64
                follows=True,
            ),
            Stage(
                "HeadReduce",
                "head_commit.head_reduce",
                inputs=("tile_part", "tile_best"),
                scalars=(),
                outputs=flat_commit.SCAN,
                constants=_reduce_constants,
                grid=lambda dims, ceil: (dims["R"], 1, 1),
                num_warps=16,  # so few numbers a thread that all its loads leave at once
                follows=True,
            ),
        ),
    )
