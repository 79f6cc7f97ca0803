"""Arrange: lays out the next pass of quadratic_spec on the device, before the host knows what the last gave; torch's.

    Arrange(ids, pos, slot, visible, adapter, known, results, page_table)

It writes ids, pos, slot (N) i32, visible (N, 3) i32 and adapter (N) f32 of the tokens of some rows, for each of which
known (K, WIDTH) i32 has a `Known`. results (L) i32 is what the forward before has given, confidences by their bits, and
page_table (B, M) as in `paged_attention`.

That forward has verified a draft, whose confirmed tokens are emitted, and the one after the last of them. The group of
masks that was there for their number holds the next draft, all but its first prediction, up to a token that ends the
answer. The next pass has a size, and `layout` says what of the draft it looks at and which groups of masks follow; a
token that is left over sees itself alone. Chances are fixed-point numbers, so that everybody gets the same layout.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ...config import ModelConfig
from ...contract import MAX_BLOCK, PAGE
from ..op import Arg, Constants, Op, Stage

BITS = 15  # of a chance; 2**BITS is 1, and a product of two fits in 32 bits
MOST_STOPS = 8  # ids that end an answer
SMALLEST = 8  # tokens of a pass
LEAST = 2**BITS // 20  # heads that are reached more rarely than this are not worth a look


class Known(NamedTuple):
    """What the host knows of a row; ids that end the answer follow, and the groups of the pass before by number."""

    first: int  # of the row's tokens
    size: int  # the number of them; 0 writes nothing
    block: int  # masks of a group
    row: int  # of the page table
    position: int  # of the first token of the pass before, which is also its slot
    heads: int  # of that pass
    token: int  # where the tokens that it predicts begin in the results
    confidence: int  # and their confidences
    next_ids: int  # and the next ids, which are the ids of heads


STOPS = len(Known._fields)
GROUPS = STOPS + MOST_STOPS  # from here on, for each number from 1 on, its group's first prediction and size
SIZES = 2 * MAX_BLOCK  # in one number, the prediction in multiples of this
WIDTH = GROUPS + MAX_BLOCK


def packed(known: Known, stops: Iterable[int], groups: dict[int, tuple[int, int]]) -> np.ndarray:
    """A row of `known`, (WIDTH,) i32; groups are first prediction and size by the number of heads accepted."""
    fields = np.zeros(WIDTH, np.int32)
    fields[STOPS:GROUPS] = -1
    ends = list(stops)
    fields[:STOPS], fields[STOPS : STOPS + len(ends)] = known, ends
    for number, (begin, size) in groups.items():
        fields[GROUPS + number - 1] = begin * SIZES + size
    return fields


def reached(confidence: Iterable[float]) -> list[int]:
    """The chances that at least 1, 2, ... heads of a draft with these confidences are accepted."""
    chances = [int(min(chance, 1.0) * 2**BITS) if chance > 0 else 0 for chance in confidence]
    return list(itertools.accumulate(chances, lambda before, chance: before * chance >> BITS, initial=2**BITS))


def layout(chances: Sequence[int], size: int, block: int) -> tuple[int, dict[int, int]]:
    """The heads of a pass of `size` tokens, and its groups, size by number of heads accepted, in their order.

    `chances` are as of `reached`. Heads that are likely enough leave room for a group; the groups are of the numbers of
    highest chance, the lower of equals first, and the last one may be shorter.
    """
    most = min(len(chances), max(1, size - block))
    heads = 1
    while heads < most and chances[heads] >= LEAST:
        heads += 1
    of_number = [*map(operator.sub, chances[: heads - 1], chances[1:heads]), chances[heads - 1]]
    groups, left = dict[int, int](), size - heads
    for at in sorted(range(heads), key=of_number.__getitem__, reverse=True):  # which keeps equals in their order
        masks = min(block, left)
        if masks < 2:  # the first is never drafted
            break
        groups[at + 1] = masks
        left -= masks
    return heads, groups


def reference(
    ids: np.ndarray, pos: np.ndarray, slot: np.ndarray, visible: np.ndarray, adapter: np.ndarray,
    known: np.ndarray, results: np.ndarray, page_table: np.ndarray, mask: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """The specification in numpy: the first five afterwards; shapes as in the module's docstring."""
    ids, pos, slot, visible, adapter = (array.copy() for array in (ids, pos, slot, visible, adapter))
    for fields in known:
        row = Known(*fields[:STOPS].tolist())
        if not row.size:
            continue
        stops = fields[STOPS:GROUPS]
        accepted = 1
        while accepted < row.heads and results[row.token + accepted - 1] == results[row.next_ids + accepted]:
            accepted += 1
        begin, masks = divmod(int(fields[GROUPS + accepted - 1]), SIZES)
        drafted = slice(begin + 1, begin + masks)
        draft = results[row.token :][drafted]
        ends = np.isin(draft, stops[stops >= 0])
        length = int(ends.argmax()) if ends.any() else len(draft)
        confidence = results[row.confidence :][drafted][:length].view(np.float32)
        heads, groups = layout(reached(confidence.tolist()), row.size, row.block)
        start = row.position + accepted
        at = slice(row.first, row.first + row.size)
        own = np.arange(start, start + row.size)
        ids[at], adapter[at], pos[at] = int(mask == 0), 0, own
        visible[at] = np.stack([np.zeros_like(own), own, own + 1], axis=1)
        slot[at] = page_table[row.row, own // PAGE] * PAGE + own % PAGE
        ids[row.first : row.first + heads] = [results[row.token + accepted - 1], *draft[: heads - 1]]
        visible[row.first : row.first + heads] = np.stack([own + 1, own * 0 + start, own * 0 + start], axis=1)[:heads]
        begin = heads
        for number, masks in groups.items():
            at = slice(row.first + begin, row.first + begin + masks)
            ids[at], adapter[at] = mask, 1
            pos[at] = np.arange(start + number, start + number + masks)
            visible[at] = start + number, start + begin, start + begin + masks
            begin += masks
    return ids, pos, slot, visible, adapter


def _constants(model: ModelConfig) -> Constants:
    sizes = {"PAGE": PAGE, "LANES": MAX_BLOCK, "BITS": BITS, "LEAST": LEAST, "MOST_STOPS": MOST_STOPS}
    return {**sizes, "STOPS": STOPS, "GROUPS": GROUPS, "SIZES": SIZES, "WIDTH": WIDTH, "MASK_ID": model.mask_id}


OP = Op(
    "Arrange",
    inputs=(
        Arg("ids", "i32", ("N",)),
        Arg("pos", "i32", ("N",)),
        Arg("slot", "i32", ("N",)),
        Arg("visible", "i32", ("N", 3)),
        Arg("adapter", "f32", ("N",)),
        Arg("known", "i32", ("K", WIDTH)),
        Arg("results", "i32", ("L",)),
        Arg("page_table", "i32", ("B", "M")),
    ),
    outputs=(),
    attributes=(),
    stages=(
        Stage(
            "Arrange",
            "arrange.arrange",
            inputs=("ids", "pos", "slot", "visible", "adapter", "known", "results", "page_table"),
            scalars=("M",),
            outputs=(),
            constants=_constants,
            grid=lambda dims, ceil: (dims["K"], 1, 1),
            num_warps=4,
        ),
    ),
)
