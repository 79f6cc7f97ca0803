"""SwiGLU over a packed projection, for the torch engine on a GPU; no op of the graph.

    y = SwiGLU(gate_up)

gate_up (B, S, 2 F) compute, the gate's half first -> y = silu(gate) * up (B, S, F), rounded once, at the end.
"""

from __future__ import annotations

import numpy as np

from ...config import ModelConfig
from ..op import Arg, Ceil, Constants, Dims, Grid, Op, Stage

BLOCK = 1024  # numbers of a program


def reference(gate_up: np.ndarray) -> np.ndarray:
    """The specification in numpy, f32 inside; shapes as in the module's docstring."""
    gate, up = np.split(gate_up.astype(np.float32), 2, axis=-1)
    with np.errstate(over="ignore"):
        y: np.ndarray = gate / (1 + np.exp(-gate)) * up
    return y.astype(gate_up.dtype)


def _width(dims: Dims, ceil: Ceil) -> int:
    half: int = dims["W"] // 2
    return half


def _constants(model: ModelConfig) -> Constants:
    return {"F": model.intermediate_size, "BLOCK": BLOCK}


def _grid(dims: Dims, ceil: Ceil) -> Grid:
    return dims["B"] * dims["S"], ceil(dims["W"] // 2, BLOCK), 1


_OUTPUTS = (Arg("y", "compute", ("B", "S", _width)),)

OP = Op(
    "SwiGLU",
    inputs=(Arg("gate_up", "compute", ("B", "S", "W")),),
    outputs=_OUTPUTS,
    attributes=(),
    stages=(
        Stage(
            "SwiGLU",
            "swiglu.swiglu",
            inputs=("gate_up",),
            scalars=(),
            outputs=_OUTPUTS,
            constants=_constants,
            grid=_grid,
            follows=True,
        ),
    ),
)
