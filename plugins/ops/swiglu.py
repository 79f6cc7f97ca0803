"""SwiGLU over a packed projection, for the torch engine on a GPU; no op of the graph.

    y = SwiGLU(gate_up)

gate_up (N, F) compute, the gate's half first -> y = silu(gate) * up (N, F / 2), rounded once, at the end. gate_up may
come in the shares of `linear`, (W, N, F) f32.
"""

from __future__ import annotations

import functools

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


def half(dims: Dims, ceil: Ceil) -> int:
    """Outputs of a packed projection of F."""
    outputs: int = dims["F"] // 2
    return outputs


def _constants(model: ModelConfig, shares: int) -> Constants:
    return {"F": model.intermediate_size, "BLOCK": BLOCK, "SHARES": shares}


def _grid(dims: Dims, ceil: Ceil) -> Grid:
    return dims["N"], ceil(dims["F"] // 2, BLOCK), 1


_OUTPUTS = (Arg("y", "compute", ("N", half)),)


@functools.cache
def op(shares: int = 0) -> Op:
    """The op over a whole gate_up, or one in shares."""
    name = "SwiGLUOfShares" if shares else "SwiGLU"
    return Op(
        name,
        inputs=(Arg("gate_up", "f32", ("W", "N", "F")) if shares else Arg("gate_up", "compute", ("N", "F")),),
        outputs=_OUTPUTS,
        attributes=(),
        stages=(
            Stage(
                name,
                "swiglu.swiglu",
                inputs=("gate_up",),
                scalars=(),
                outputs=_OUTPUTS,
                constants=functools.partial(_constants, shares=shares),
                grid=_grid,
                follows=True,
            ),
        ),
    )
