"""Arrange: lays out the next passes of quadratic_spec on the device, before the host knows what the last gave; torch's.

    Arrange(ids, pos, slot, row, first, visible, adapter, known, results, page_table)

It writes ids, pos, slot, row, first (N) i32, visible (N, 3) i32 and adapter (N) f32 of the tokens of some rows, for
each of which known (K, WIDTH) i32 has a `Known`. results (L) i32 is what the forward before has given, confidences by
their bits, and page_table (B, M) as in `paged_attention`.

That forward has verified a draft, whose confirmed tokens are emitted, and the one after the last of them. The group of
masks that was there for their number holds the next draft, all but its first prediction, up to a token that ends the
answer. What of a draft the next pass looks at and which groups follow is up to `Drafts.layouts`, which shares a
budget of tokens among all rows. These come one after the other, and last of the forward; tokens that are left over stay
as they are, of a row of their own. Chances are fixed-point numbers, so that everybody gets the same layout.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ...config import ModelConfig
from ...contract import MAX_BLOCK, PAGE
from ..op import Arg, Constants, Op, Stage

BITS = 15  # of a chance; 2**BITS is 1, and a product of two fits in 32 bits
RATE_BITS = 8  # of the tokens that it takes to bring one
NEVER = 2**15  # such a rate of what is not worth any price
MOST_STOPS = 8  # ids that end an answer
MOST_LENGTHS = 8  # of groups
SMALLEST = 4  # tokens of a pass, on average at least
# A token's price is the chance at which a head is worth it. They go down by the root of two, from one that nothing is
# worth but the first head.
LEVELS = 16
PRICES = tuple((46341, 2**BITS)[level % 2] >> level // 2 for level in range(LEVELS))


class Known(NamedTuple):
    """What the host knows of a row; lengths of groups follow, ids that end the answer, groups of the pass before."""

    first: int  # token of all rows here
    budget: int  # tokens of all rows here, and at least one for each
    most: int  # tokens of this one, at least `MAX_BLOCK`; 0 writes nothing
    row: int  # of the page table
    position: int  # of the first token of the pass before, which is also its slot
    heads: int  # of that pass
    token: int  # where the tokens that it predicts begin in the results
    confidence: int  # and their confidences
    next_ids: int  # and the next ids, which are the ids of heads


# Of groups: masks, and their rate, the tokens that it takes to bring one more than the length before, in 2**RATE_BITS.
# Both rise.
Lengths = tuple[tuple[int, int], ...]

LENGTHS = len(Known._fields)
STOPS = LENGTHS + 2 * MOST_LENGTHS
GROUPS = STOPS + MOST_STOPS  # from here on, for each number from 1 on, its group's first prediction and size
SIZES = 2 * MAX_BLOCK  # in one number, the prediction in multiples of this
WIDTH = GROUPS + MAX_BLOCK


def packed(known: Known, lengths: Lengths, stops: Sequence[int], groups: Mapping[int, tuple[int, int]]) -> list[int]:
    """A row of `known`; groups are first prediction and size by the number of heads accepted."""
    of_number = [0] * MAX_BLOCK
    for number, (begin, size) in groups.items():
        of_number[number - 1] = begin * SIZES + size
    return [*known, *_full(lengths), *stops, *[-1] * (MOST_STOPS - len(stops)), *of_number]


@functools.lru_cache(maxsize=256)
def _full(lengths: Lengths) -> tuple[int, ...]:
    """Masks and rates, with what fills them up."""
    longest = lengths[-1][0] if lengths else 0
    return tuple(itertools.chain(*lengths, *[(longest, NEVER)] * (MOST_LENGTHS - len(lengths))))


def reached(confidence: Iterable[float]) -> list[int]:
    """The chances that at least 1, 2, ... heads of a draft with these confidences are accepted."""
    chance = 2**BITS
    chances = [chance]
    for each in confidence:
        chance = chance * int(min(each, 1.0) * 2**BITS) >> BITS if each > 0 else 0
        chances.append(chance)
    return chances


class Layouts(NamedTuple):
    """Of each row its heads, and the masks of its group for each number of heads accepted."""

    heads: np.ndarray  # (K,)
    masks: np.ndarray  # (K, L): for 1, 2, ..; 0 where there is no group
    chances: np.ndarray  # (K, L): that it is this number

    def sizes(self, most: np.ndarray) -> np.ndarray:
        """Tokens of each row, (K,), of so many at most."""
        sizes: np.ndarray = np.minimum(self.heads + self.masks.sum(1), most)
        return sizes

    def cut(self, sizes: np.ndarray) -> Layouts:
        """The same in so many tokens of each row: the groups of the lowest chances lose theirs, of equals the later."""
        order = np.argsort(-self.chances, axis=1, kind="stable")
        masks = np.take_along_axis(self.masks, order, axis=1)
        room = (sizes - self.heads)[:, None] - masks.cumsum(1) + masks
        masks = np.minimum(masks, room.clip(min=0))
        masks = np.take_along_axis(masks, np.argsort(order, axis=1), axis=1)
        return self._replace(heads=np.minimum(self.heads, sizes), masks=masks)


class Drafts(NamedTuple):
    """The drafts of some rows, and what may be made of them."""

    reached: np.ndarray  # (K, L) i64: see the function
    lengths: np.ndarray  # (K, MOST_LENGTHS, 2) i64
    most: np.ndarray  # (K,) i64: tokens

    @classmethod
    def of(cls, chances: Sequence[Sequence[int]], lengths: Sequence[Lengths], most: Sequence[int]) -> Drafts:
        """Those of rows with these chances, of different number."""
        longest = max(map(len, chances))
        filled = [[*each, *[0] * (longest - len(each))] for each in chances]
        table = np.array([_full(each) for each in lengths], np.int64).reshape(-1, MOST_LENGTHS, 2)
        return cls(np.array(filled, np.int64), table, np.array(most, np.int64))

    def at(self, of_heads: np.ndarray, of_masks: np.ndarray) -> Layouts:
        """What rows want where a head and a mask have these prices, (K,).

        The first head, and those that are reached with a chance of the price. For each number of them the longest group
        whose masks are worth their rate times the price, at the chance that it is that number.
        """
        head = self.reached >= of_heads[:, None]
        head[:, 0] = True
        chances = np.where(head, self.reached, 0)
        chances[:, :-1] -= chances[:, 1:].copy()
        worth = chances[:, :, None] << RATE_BITS >= (self.lengths[:, :, 1] * of_masks[:, None])[:, None]
        masks = (worth * np.diff(self.lengths[:, :, 0], prepend=0)[:, None]).sum(2)
        return Layouts(head.sum(1), masks, chances)

    def layouts(self, budget: int) -> Layouts:
        """Those of the lowest price at which all fit in so many tokens.

        Of the next lower one as many of the first rows as there is room for; the one after them has no more heads than
        before, and what masks are left.
        """
        low, high = 0, LEVELS  # at the first all fit, at the other perhaps not
        sizes = np.minimum(self.most, 1)
        while high - low > 1:
            middle = (low + high) // 2
            wanted = self._sizes(middle)
            if wanted.sum() <= budget:
                low, sizes = middle, wanted
            else:
                high = middle
        high = min(high, LEVELS - 1)
        more = (self._sizes(high) - sizes).clip(min=0)
        left = budget - sizes.sum() - more.cumsum() + more  # to a row
        of_heads, of_masks = (np.where(cheap, PRICES[high], PRICES[low]) for cheap in (more <= left, left >= 0))
        layouts = self.at(of_heads, of_masks)
        return layouts.cut(np.minimum(layouts.sizes(self.most), sizes + left.clip(min=0)))

    def _sizes(self, level: int) -> np.ndarray:
        """The tokens of rows at a price, (K,)."""
        price = np.full(len(self.most), PRICES[level])
        return self.at(price, price).sizes(self.most)


def reference(
    ids: np.ndarray, pos: np.ndarray, slot: np.ndarray, row: np.ndarray, first: np.ndarray, visible: np.ndarray,
    adapter: np.ndarray, known: np.ndarray, results: np.ndarray, page_table: np.ndarray, mask: int,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    """The specification in numpy: the first seven afterwards; shapes as in the module's docstring."""
    ids, pos, slot, row, first, visible, adapter = (a.copy() for a in (ids, pos, slot, row, first, visible, adapter))
    rows, tokens, chances = list[Known](), list[list[int]](), list[list[int]]()
    for fields in known:
        of = Known(*fields[:LENGTHS].tolist())
        accepted = 1
        while accepted < of.heads and results[of.token + accepted - 1] == results[of.next_ids + accepted]:
            accepted += 1
        begin, masks = divmod(int(fields[GROUPS + accepted - 1]), SIZES)
        drafted = slice(begin + 1, begin + masks)
        draft = results[of.token :][drafted]
        stops = fields[STOPS:GROUPS]
        ends = np.isin(draft, stops[stops >= 0])
        length = int(ends.argmax()) if ends.any() else len(draft)
        confidence = results[of.confidence :][drafted][:length].view(np.float32)
        rows.append(of._replace(position=of.position + accepted))
        tokens.append([int(results[of.token + accepted - 1]), *draft.tolist()])
        chances.append(reached(confidence.tolist()))
    lengths = [tuple(map(tuple, pairs)) for pairs in known[:, LENGTHS:STOPS].reshape(-1, MOST_LENGTHS, 2).tolist()]
    layouts = Drafts.of(chances, lengths, [of.most for of in rows]).layouts(rows[0].budget)
    at = rows[0].first
    for of, head_ids, heads, groups in zip(rows, tokens, layouts.heads.tolist(), layouts.masks.tolist(), strict=True):
        start, begin = of.position, at
        own = np.arange(start, start + heads + sum(groups))
        here = slice(begin, begin + len(own))
        row[here], first[here] = of.row, begin
        slot[here] = page_table[of.row, own // PAGE] * PAGE + own % PAGE
        here = slice(begin, begin + heads)
        ids[here], adapter[here], pos[here] = head_ids[:heads], 0, own[:heads]
        visible[here] = np.stack([own + 1, own * 0 + start, own * 0 + start], axis=1)[:heads]
        at += heads
        for number, masks in enumerate(groups, 1):
            here = slice(at, at + masks)
            ids[here], adapter[here] = mask, 1
            pos[here] = np.arange(start + number, start + number + masks)
            visible[here] = start + number, start + at - begin, start + at - begin + masks
            at += masks
    first[at:] = at
    return ids, pos, slot, row, first, visible, adapter


def _constants(model: ModelConfig) -> Constants:
    return {"GROUPS": GROUPS, "SIZES": SIZES, "WIDTH": WIDTH, "LANES": MAX_BLOCK, "BITS": BITS}


def _of_reach(model: ModelConfig) -> Constants:
    return {**_constants(model), "STOPS": STOPS, "MOST_STOPS": MOST_STOPS}


def _of_arrange(model: ModelConfig) -> Constants:
    lengths = {"LENGTHS": LENGTHS, "MOST_LENGTHS": MOST_LENGTHS, "RATE_BITS": RATE_BITS}
    prices = {"LEVELS": LEVELS, "DEAREST": PRICES[0], "ROWS": 8}
    return {**_constants(model), **lengths, **prices, "PAGE": PAGE, "MASK_ID": model.mask_id}


_OF_TOKENS = ("ids", "pos", "slot", "row", "first")
WRITTEN = (*_OF_TOKENS, "visible", "adapter")

OP = Op(
    "Arrange",
    inputs=(
        *(Arg(name, "i32", ("N",)) for name in _OF_TOKENS),
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
            "Reach",
            "arrange.reach",
            inputs=("known", "results"),
            scalars=(),
            outputs=(Arg("reached", "i32", ("K", MAX_BLOCK)), Arg("accepted", "i32", ("K",))),
            constants=_of_reach,
            grid=lambda dims, ceil: (dims["K"], 1, 1),
            num_warps=1,
        ),
        Stage(
            "Arrange",
            "arrange.arrange",
            inputs=(*WRITTEN, "known", "results", "page_table", "reached", "accepted"),
            scalars=("K", "M", "N"),
            outputs=(),
            constants=_of_arrange,
            grid=lambda dims, ceil: (dims["K"], 1, 1),
            num_warps=4,
        ),
    ),
)
