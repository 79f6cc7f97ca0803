# mypy: ignore-errors
"""The kernel of `ops/advance.py`: one program per token."""

import triton
import triton.language as tl


@triton.jit
def confirmed(results, token, drafted, count, LANES: tl.constexpr):
    """How many drafted tokens a verify of `count` tokens confirms, whose tokens and next ids lie there in results."""
    lane = tl.arange(0, LANES)
    judged = lane < count - 1  # never the last lane
    said = tl.load(results + token + lane, mask=judged, other=0)
    held = tl.load(results + drafted + lane + 1, mask=judged, other=0)
    return tl.min(tl.where(judged & (said == held), LANES, lane), 0)


@triton.jit
def advance(
    ids, pos, slot, visible, row, source, verified, results, page_table, M,
    PAGE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Change ids, pos, slot (N,) and visible (N, 3); row and source (N,), verified (N, 3), page_table (B, M)."""
    n = tl.program_id(0)
    token, drafted = tl.load(verified + n * 3), tl.load(verified + n * 3 + 1)
    count = tl.load(verified + n * 3 + 2)
    kept = confirmed(results, token, drafted, count, LANES)
    where = tl.load(source + n)
    own = tl.load(ids + n)
    tl.store(ids + n, tl.load(results + where + kept, mask=where >= 0, other=own))
    if count > 0:
        at = tl.load(pos + n) + kept + 1
        page = tl.load(page_table + tl.load(row + n) * M + at // PAGE)
        tl.store(pos + n, at)
        tl.store(slot + n, page * PAGE + at % PAGE)
        for column in tl.static_range(3):
            tl.store(visible + n * 3 + column, tl.load(visible + n * 3 + column) + kept + 1)
