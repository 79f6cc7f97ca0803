"""Rotation: the tables that turn the heads of a pass, for the torch engine on a GPU; no op of the graph.

    cos, sin, scale = Rotation(pos, inv_freq)

pos (N) i32, inv_freq (P) f32 radians per position -> cos, sin (N, P) compute, times the attention factor, of the f32
angle pos * inv_freq, and scale (N) compute, the query scale 1 + beta ln(1 + floor(pos / L0)), 1 where beta is 0. Made
once per pass for all layers.
"""

from __future__ import annotations

import numpy as np

from ...config import ModelConfig, RopeConfig
from ..op import Arg, Constants, Op, Stage


def reference(pos: np.ndarray, inv_freq: np.ndarray, rope: RopeConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The specification in numpy, f32; shapes as in the module's docstring."""
    angle = pos[:, None].astype(np.float32) * inv_freq
    factor = np.float32(rope.attention_factor)
    scale = np.ones(pos.shape, np.float32)
    if rope.llama_4_scaling_beta:
        periods = np.floor(pos.astype(np.float32) / np.float32(rope.original_max_position))
        scale += np.float32(rope.llama_4_scaling_beta) * np.log(1 + periods)
    return np.cos(angle) * factor, np.sin(angle) * factor, scale


def _constants(model: ModelConfig) -> Constants:
    half = model.head_dim // 2
    rope = model.rope
    turn = {"HALF": half, "PAIRS": 1 << (half - 1).bit_length(), "FACTOR": rope.attention_factor}
    return {**turn, "BETA": rope.llama_4_scaling_beta, "PERIOD": max(1, rope.original_max_position)}


_OUTPUTS = (Arg("cos", "compute", ("N", "P")), Arg("sin", "compute", ("N", "P")), Arg("scale", "compute", ("N",)))

OP = Op(
    "Rotation",
    inputs=(Arg("pos", "i32", ("N",)), Arg("inv_freq", "f32", ("P",))),
    outputs=_OUTPUTS,
    attributes=(),
    stages=(
        Stage(
            "Rotation",
            "rotation.rotation",
            inputs=("pos", "inv_freq"),
            scalars=(),
            outputs=_OUTPUTS,
            constants=_constants,
            grid=lambda dims, ceil: (dims["N"], 1, 1),
            num_warps=1,
        ),
    ),
)
