"""TokenQuantise: each token's activations in e4m3 with a scale of its own, for products of 8 bits by 8 bits on a GPU.

    values, scale = TokenQuantise(x)

x (N, K) compute -> values (N, K) u8, the bits of e4m3 nearest to x / scale (ties to even), and scale (N) f32, the
token's largest magnitude over 448; a token of zeros has the smallest scale. With weights of `linear.quantise`
the product is sum(values * weight) * scale * weight_scale, which `torch._scaled_mm` computes on cards with fp8. The
kernel itself uses no fp8 arithmetic.
"""

from __future__ import annotations

import numpy as np

from ...config import ModelConfig
from ..op import Arg, Constants, Op, Stage
from . import linear

BLOCK = 2048  # numbers of a step


def reference(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The specification in numpy; shapes as in the module's docstring."""
    values, scale = linear.quantise(x.astype(np.float32))
    return values.view(np.uint8), scale


def _constants(model: ModelConfig) -> Constants:
    return {"BLOCK": BLOCK}


_OUTPUTS = (Arg("values", "u8", ("N", "K")), Arg("scale", "f32", ("N",)))

OP = Op(
    "TokenQuantise",
    inputs=(Arg("x", "compute", ("N", "K")),),
    outputs=_OUTPUTS,
    attributes=(),
    stages=(
        Stage(
            "TokenQuantise",
            "token_quantise.token_quantise",
            inputs=("x",),
            scalars=("K",),
            outputs=_OUTPUTS,
            constants=_constants,
            grid=lambda dims, ceil: (dims["N"], 1, 1),
            num_warps=8,
            follows=True,
        ),
    ),
)
