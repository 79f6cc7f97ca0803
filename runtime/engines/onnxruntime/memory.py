"""The memory of a cache on the CPU: K/V arrays whose capacity follows the texts that they hold.

Attention reads every slot up to the capacity T, so T is the least multiple of a step that the longest row in use needs.
It changes often and cheaply: what is in use is moved within memory that is there already and doubles when it is full.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

STEP = 32  # slots; T at a multiple of 16 is also quicker than just below one (docs/log.md)
_SHARE = 32  # a step is at most this part of T, so that moving costs a small part of a token at any length
_SLACK = 16  # T shrinks only if this part of it is not needed
FIRST_ROOM = 256  # slots


class Memory:
    """K/V of `rows` rows. A row that was copied lies apart, as long as what it holds, until a forward uses it.

    kinds: by cache its last axis and its dtype.
    """

    def __init__(self, kinds: Mapping[str, tuple[int, type]], rows: int, heads: int) -> None:
        self.capacity = 0  # T
        self._least = 0  # slots of which T is too much
        self.room = 0  # the largest T that the memory holds
        self._heads = heads
        self._widths = {name: width for name, (width, _) in kinds.items()}
        self._arrays: dict[str, np.ndarray] = {name: np.zeros(0, dtype) for name, (_, dtype) in kinds.items()}
        self._reach = [0] * rows  # slots in use, of rows that do not lie apart
        self._apart: dict[int, dict[str, np.ndarray]] = {}  # by row and cache: (G, slots, D)

    def views(self, first: int, count: int) -> dict[str, np.ndarray]:
        """By cache: `count` rows (count, G, T, D) over the memory itself, valid as long as T and room are the same."""
        return {name: self._view(name, array)[first : first + count] for name, array in self._arrays.items()}

    def use(self, first: int, begins: Sequence[int], ends: Sequence[int], slots: int) -> None:
        """Fit T to a forward whose rows write from `begins` to `ends`, and with padding up to `slots` at most."""
        for row, begin in enumerate(begins, first):
            if begin == 0:
                self._reach[row] = 0
        if self._apart:
            self._join(range(first, first + len(begins)), slots)
        needed = max(slots, *self._reach)
        if not self._least < needed <= self.capacity:
            self._fit(needed)
        for row, end in enumerate(ends, first):
            if end > self._reach[row]:
                self._reach[row] = end

    def move(self, source: int, target: int, slots: int) -> None:
        """Copy the first `slots` slots of a row over those of another."""
        held = self._apart.get(source) or {name: rows[0] for name, rows in self.views(source, 1).items()}
        self.free(target)
        self._apart[target] = {name: rows[:, :slots].copy() for name, rows in held.items()}

    def read(self, row: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """By cache: a copy of some slots of a row, (G, slots, D) f32."""
        held = self._apart.get(row) or {name: rows[0] for name, rows in self.views(row, 1).items()}
        return {name: rows[:, start:stop].astype(np.float32) for name, rows in held.items()}

    def free(self, row: int) -> None:
        """Forget what a row holds; without a row nothing."""
        self._apart.pop(row, None)
        self._reach[row] = 0

    def free_all(self) -> None:
        """Forget what all rows hold."""
        self._apart.clear()
        self._reach = [0] * len(self._reach)

    def _join(self, rows: range, slots: int) -> None:
        """Put those of the rows that lie apart into the memory, where T is to be `slots` at least."""
        joining = {row: self._apart.pop(row) for row in rows if row in self._apart}
        lengths = {row: next(iter(held.values())).shape[1] for row, held in joining.items()}
        self._fit(max(slots, *lengths.values(), *self._reach))
        for row, held in joining.items():
            for name, kept in held.items():
                self._view(name, self._arrays[name])[row, :, : lengths[row]] = kept
            self._reach[row] = lengths[row]

    def _view(self, name: str, array: np.ndarray) -> np.ndarray:
        """An array's memory as that of a cache, (rows, G, T, its last axis)."""
        shape = (len(self._reach), self._heads, self.capacity, self._widths[name])
        return array[: math.prod(shape)].reshape(shape)

    def _fit(self, slots: int) -> None:
        """Bring T to what `slots` need."""
        step = max(STEP, 1 << (slots // _SHARE).bit_length() >> 1)
        new = -(-slots // step) * step
        old = self.capacity
        if old >= new > self._least:
            return
        room = max(self.room, FIRST_ROOM)
        while room < new:
            room *= 2
        # What is in use moves to where it lies under another T, perhaps within the same memory: a head up where T grows
        # and down where it shrinks, so no copy hits what is still to be read.
        heads = range(self._heads)
        used = [(row * len(heads) + head, reach) for row, reach in enumerate(self._reach) if reach for head in heads]
        if new > old:
            used.reverse()
        for name, array in self._arrays.items():
            target, width = array, self._widths[name]
            if room > self.room:
                target = np.zeros(len(self._reach) * self._heads * room * width, array.dtype)
                self._arrays[name] = target
            for head, reach in used:
                if head or target is not array:  # else it stays where it is
                    begin, source, size = head * new * width, head * old * width, reach * width
                    target[begin : begin + size] = array[source : source + size]
        self.capacity = new
        self.room = room
        self._least = new - max(STEP, new // _SLACK)
