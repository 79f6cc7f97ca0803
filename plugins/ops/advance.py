"""Advance: makes passes that follow others ready on the device, before the host knows what those gave; torch's alone.

    Advance(ids, pos, slot, visible, row, source, verified, results, page_table)

It changes ids, pos, slot (N) and visible (N, 3), all i32, which hold what the host knows. results (L) i32 is what the
forward before has given. A token's id is results[source[n]], or its own where source[n] is negative. verified (N, 3)
are where the tokens and the next ids of the verify lie that comes before a token's row, and how many: those of its
draft that it confirms are kept, and the token after the last of them. Tokens of that row move behind these: pos and
visible grow by as many, and slot becomes that of pos, by row (N) and page_table (B, M) as in `paged_attention`; and an
id from results is taken as many places further as drafted tokens are kept. Where the number is 0 the row stands where
it stands.
"""

from __future__ import annotations

import numpy as np

from ...contract import MAX_BLOCK, PAGE
from ..op import Arg, Op, Stage


def reference(
    ids: np.ndarray, pos: np.ndarray, slot: np.ndarray, visible: np.ndarray, row: np.ndarray,
    source: np.ndarray, verified: np.ndarray, results: np.ndarray, page_table: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """The specification in numpy: ids, pos, slot and visible afterwards; shapes as in the module's docstring."""
    ids, pos, slot, visible = ids.copy(), pos.copy(), slot.copy(), visible.copy()
    for n, (token, drafted, count) in enumerate(verified.tolist()):
        kept = 0
        while kept < count - 1 and results[token + kept] == results[drafted + kept + 1]:
            kept += 1
        if source[n] >= 0:
            ids[n] = results[source[n] + kept]
        if count:
            pos[n] += kept + 1
            visible[n] += kept + 1
            slot[n] = page_table[row[n], pos[n] // PAGE] * PAGE + pos[n] % PAGE
    return ids, pos, slot, visible


OP = Op(
    "Advance",
    inputs=(
        Arg("ids", "i32", ("N",)),
        Arg("pos", "i32", ("N",)),
        Arg("slot", "i32", ("N",)),
        Arg("visible", "i32", ("N", 3)),
        Arg("row", "i32", ("N",)),
        Arg("source", "i32", ("N",)),
        Arg("verified", "i32", ("N", 3)),
        Arg("results", "i32", ("L",)),
        Arg("page_table", "i32", ("B", "M")),
    ),
    outputs=(),
    attributes=(),
    stages=(
        Stage(
            "Advance",
            "advance.advance",
            inputs=("ids", "pos", "slot", "visible", "row", "source", "verified", "results", "page_table"),
            scalars=("M",),
            outputs=(),
            constants=lambda model: {"PAGE": PAGE, "LANES": MAX_BLOCK},
            grid=lambda dims, ceil: (dims["N"], 1, 1),
            num_warps=1,
        ),
    ),
)
