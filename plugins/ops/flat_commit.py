"""FlatSampled and FlatCommit: ConfidenceCommit over R predictions of any number of rows, for the torch engine on a GPU.

    FlatSampled(logits, temperature, seed, ids, pos, index, part, best)
    token, confidence, next_ids = FlatCommit(part, best, ids, index, span, threshold)

part and best are what `head_commit` has found while it made the logits. FlatSampled writes samples over them where a
prediction's temperature is over 0, FlatCommit is the rule. logits (R, V), threshold and temperature (R), seed (R, 2),
ids and pos (N) i32 of all tokens, index (R) i32, which of them are predicted, and span (R, 2) i32, the begin and end of
the predictions among which the rule chooses, the same for all of them. The noise of a sample is that of its position:
a mask stands at its token's, any other token one before it. `reference` specifies the rule, of the ids that are
predicted.
"""

from __future__ import annotations

import numpy as np

from ..op import Arg, Op, Stage
from . import confidence_commit
from .confidence_commit import SAMPLED_WARPS, WARPS, commit_constants, scan_constants, splits


def reference(
    logits: np.ndarray, ids: np.ndarray, span: np.ndarray, threshold: np.ndarray, mask_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rule over flat positions, span after span; shapes as in the module's docstring."""
    parts = [
        confidence_commit.reference(logits[None, begin:end], ids[None, begin:end], threshold[None, begin], mask_id)[:3]
        for begin, end in np.unique(span, axis=0)
    ]
    token, confidence, next_ids = (np.concatenate([part[i][0] for part in parts]) for i in range(3))
    return token, confidence, next_ids


SCAN = (Arg("part", "f32", ("R", splits, 4)), Arg("best", "i32", ("R", splits)))

SAMPLED = Op(
    "FlatSampled",
    inputs=(
        Arg("logits", "f32", ("R", "V")),
        Arg("temperature", "f32", ("R",)),
        Arg("seed", "i32", ("R", 2)),
        Arg("ids", "i32", ("N",)),
        Arg("pos", "i32", ("N",)),
        Arg("index", "i32", ("R",)),
        *SCAN,
    ),
    outputs=(),
    attributes=(),
    stages=(
        Stage(
            "FlatSampledScan",
            "flat_commit.flat_sampled_scan",
            inputs=("logits", "temperature", "seed", "ids", "pos", "index", "part", "best"),
            scalars=(),
            outputs=(),
            constants=scan_constants,
            grid=lambda dims, ceil: (dims["R"], splits(dims, ceil), 1),
            num_warps=SAMPLED_WARPS,
            follows=True,
        ),
    ),
)

_OUTPUTS = (Arg("token", "i32", ("R",)), Arg("confidence", "f32", ("R",)), Arg("next_ids", "i32", ("R",)))
OP = Op(
    "FlatCommit",
    inputs=(
        *SCAN,
        Arg("ids", "i32", ("N",)),
        Arg("index", "i32", ("R",)),
        Arg("span", "i32", ("R", 2)),
        Arg("threshold", "f32", ("R",)),
    ),
    outputs=_OUTPUTS,
    attributes=(),
    stages=(
        Stage(
            "FlatCommitRule",
            "flat_commit.flat_commit",
            inputs=("part", "best", "ids", "index", "span", "threshold"),
            scalars=(),
            outputs=_OUTPUTS,
            constants=commit_constants,
            grid=lambda dims, ceil: (dims["R"], 1, 1),
            num_warps=WARPS,
            follows=True,
        ),
    ),
)
