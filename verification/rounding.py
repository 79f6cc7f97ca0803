"""What rounding may do to a logit: from the checkpoint's own network where there is one, else by this estimate.

Every result of a layer is rounded to within the unit roundoff `u` of its dtype, and a sum over E products in f32 to
within about sqrt(E) 2^-24. Such errors are independent, so after n of them the relative error is about sqrt(n) as
large. A layer has eight that count: two norms, projections in and out of attention and MLP, two inner values, two sums;
embedding, last norm and head are four more. Logits have the relative error of the state they come from:

    noise = 4 sqrt(u1^2 + u2^2 + 2 E 2^-48) sqrt(8 layers + 4) std(logits)

The 4 is for what the estimate leaves out: layers may amplify the errors of those before them, up to about 5 times in
twelve layers of random weights. A weight, or K and V, on a coarser grid adds its own relative error to the u of its
engine. docs/verify.md says what this was held against.
"""

from __future__ import annotations

import math

from ..engine_info import EngineInfo

UNIT = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}
_AMPLIFIED = 4.0
GRID = {"fp8": 0.03, "fp8_dynamic": 0.045, "int8": 0.01, "int4": 0.1}  # relative error of a projection's result
# The bounds, as multiples of the noise. Deviations of honest engines have a root mean square below 1 and long tails, up
# to 25 in single positions whose attention hangs in the balance (docs/verify.md).
LARGEST = 64.0  # deviation of one position
NEAR_TIE = 12.0  # how far a logit may move, in multiples of its position's deviation; 7.4 was seen, in int4
NEAR_TIE_UNSEEN = 16.0  # the same in multiples of the noise, where that deviation is not known
USUAL = 2.0  # root mean square over many positions
STATE = 4.0  # mean deviation of a layer's values


def usual_bound(count: int) -> float:
    """What the root mean square of `count` deviations may be; few are no average."""
    return USUAL + LARGEST / 2 / math.sqrt(max(count, 1))


def relative_noise(one: EngineInfo, other: EngineInfo) -> float:
    """Expected relative difference of two engines' logits."""
    squares = sum(UNIT[info.build.dtype] ** 2 + info.model.hidden_size * UNIT["f32"] ** 2 for info in (one, other))
    for grids in (
        {info.build.quantization for info in (one, other)},
        {info.build.kv_bits for info in (one, other)},
    ):
        if len(grids) == 2:
            squares += sum(GRID[name] ** 2 for name in grids if name is not None)
    return _AMPLIFIED * math.sqrt(squares * (8 * one.model.num_layers + 4))
