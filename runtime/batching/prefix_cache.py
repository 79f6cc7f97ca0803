"""Which cache rows already hold the beginning of a new prompt.

K/V of a causal prefix do not depend on what follows, so a copy is what a prefill would write, whichever mode wrote it.
Memory is bounded by the number of kept rows, which are rows of the same cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

SHORTEST = 16  # tokens; below, a copy saves less than it costs to look for it


@dataclasses.dataclass
class _Kept:
    row: int
    ids: list[int]
    used: int  # when, by the count of uses


class PrefixCache:
    """The kept rows `first` .. `first + count - 1` of a cache; none with count 0."""

    def __init__(self, first: int, count: int) -> None:
        self._free = list(range(first, first + count))
        self._kept: list[_Kept] = []
        self._uses = 0

    @property
    def count(self) -> int:
        """Prefixes kept now."""
        return len(self._kept)

    @property
    def tokens(self) -> int:
        """Their tokens."""
        return sum(len(kept.ids) for kept in self._kept)

    @property
    def longest(self) -> int:
        """Tokens of the longest."""
        return max((len(kept.ids) for kept in self._kept), default=0)

    def find(self, ids: list[int]) -> tuple[int, int]:
        """Row and length of the kept prefix that shares the most with `ids`; length 0 if none is worth a copy.

        A shorter one is no use of it either, or it would outlive prefixes that are used.
        """
        best, length = None, 0
        for kept in self._kept:
            if (shared := common(kept.ids, ids)) > max(length, SHORTEST - 1):
                best, length = kept, shared
        if best is None:
            return 0, 0
        self._uses += 1
        best.used = self._uses
        return best.row, length

    def forget(self, row: int) -> None:
        """Take note that a kept row holds nothing any more."""
        self._kept = [kept for kept in self._kept if kept.row != row]
        self._free.append(row)

    def keep(self, ids: list[int]) -> int | None:
        """The row to copy these ids' K/V to, or None if that is not worth it.

        What extends a kept prefix takes its place. What shares half of itself with one is held by it well enough.
        Anything else takes a free row, or that of the least recently used.
        """
        if len(ids) < SHORTEST or not (self._free or self._kept):
            return None
        self._uses += 1
        for kept in self._kept:
            shared = common(kept.ids, ids)
            if shared == len(kept.ids):
                if shared == len(ids):
                    return None
                kept.ids = ids
                kept.used = self._uses
                return kept.row
            if 2 * shared >= len(ids):
                return None
        if self._free:
            self._kept.append(_Kept(self._free.pop(0), ids, self._uses))
            return self._kept[-1].row
        oldest = min(self._kept, key=lambda kept: kept.used)
        oldest.ids = ids
        oldest.used = self._uses
        return oldest.row


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix, by halving: comparing slices is far faster than a loop over thousands of tokens."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
