"""K/V memory in pages: which row of which cache has which pages of one pool. Bookkeeping alone; it needs no device.

A row is a list of pages. Rows share the pages of a common prefix, each page counts its holders, and a page that several
hold is copied before one of them writes to it. A spare row, such as a kept prefix, is emptied when pages run out, the
least recently used first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ...contract import PAGE

SCRATCH = 0  # the page that padding writes to; row 0 of the table is the padding's
_PATIENCE = 5.0  # seconds in which another thread may go on with what this one has begun, as those of web servers do


class Copy(NamedTuple):
    """A page whose K/V another one must get before the next pass."""

    source: int
    target: int


class Pages:
    """The pages of one engine, by the rows that hold them.

    The caller sees to it that one thread is in here at a time; any may `wait` and `wake`.

    Args:
        count: pages that rows can have; the scratch page comes on top.
        rows: rows of all caches together.
        width: pages of the longest row.
    """

    def __init__(self, count: int, rows: int, width: int) -> None:
        self.count = count
        self.table = np.zeros((rows + 1, width), np.int32)  # past a row's pages it holds the scratch page
        self.changed: set[int] = set()  # rows of the table that the device has not seen yet
        self.freed = 0  # how often pages have become free or spare
        self._freeing = threading.Condition()  # over `freed`
        self._holders = [0] * (count + 1)
        self._free = list(range(count, 0, -1))  # the last freed, or the lowest, is the next
        self._free_rows = list(range(rows, 0, -1))
        self._rows: dict[int, list[int]] = {}
        self._spare: dict[int, None] = {}  # the least recently used first
        self._users: dict[int, int] = {}  # the thread that last wrote to a row

    @property
    def slots(self) -> int:
        """Of all pages."""
        return self.count * PAGE

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def spare(self) -> int:
        """Pages that spare rows alone hold; any thread may ask."""
        by_spare, by_others = set[int](), set[int]()
        for row, pages in list(self._rows.items()):
            (by_spare if row in self._spare else by_others).update(pages)
        return len(by_spare - by_others)

    @property
    def spare_rows(self) -> int:
        """Rows that are emptied when pages run out."""
        return len(self._spare)

    @property
    def open_rows(self) -> int:
        """Rows that caches have."""
        return len(self._rows)

    def open(self, count: int) -> list[int] | None:
        """The numbers of `count` empty rows, or None if there are not so many."""
        if count > len(self._free_rows):
            return None
        rows = [self._free_rows.pop() for _ in range(count)]
        for row in rows:
            self._rows[row] = []
        return rows

    def close(self, rows: list[int]) -> None:
        """Give rows back with what they hold."""
        for row in rows:
            self.drop(row)
            del self._rows[row]
            self._users.pop(row, None)
            self._free_rows.append(row)

    def reserve(self, row: int, begin: int, end: int) -> list[Copy] | None:
        """Make slots `begin` to `end` of a row its own to write: the copies to make first, or None if memory is short.

        Nothing has changed for the row if it is None.
        """
        pages = self._rows[row]
        self._users[row] = threading.get_ident()
        needed = -(-end // PAGE)
        assert needed <= self.table.shape[1], "a pass reaches past the longest row"
        while True:
            shared = [at for at in range(begin // PAGE, min(needed, len(pages))) if self._holders[pages[at]] > 1]
            if max(0, needed - len(pages)) + len(shared) <= len(self._free):
                break
            if not self._evict(row):
                return None
        copies = []
        for at in shared:
            copies.append(Copy(pages[at], self._take()))
            self._release(pages[at])
            pages[at] = copies[-1].target
        while len(pages) < needed:
            pages.append(self._take())
        if copies or self.table[row, needed - 1] != pages[needed - 1]:
            self._show(row)
        return copies

    def share(self, source: int, target: int, slots: int) -> int:
        """Let a row begin as another one does, for `slots` slots; returns 0 if the other has been emptied meanwhile."""
        needed = -(-slots // PAGE)
        pages = self._rows[source][:needed]
        if len(pages) < needed:
            return 0
        for page in pages:
            self._holders[page] += 1
        self.drop(target)
        self._rows[target] = pages
        if source in self._spare:
            self.set_spare(source)  # used just now
        self._show(target)
        return slots

    def drop(self, row: int) -> None:
        """Empty a row."""
        self._spare.pop(row, None)
        if self._rows[row]:
            for page in self._rows[row]:
                self._release(page)
            self._rows[row] = []
            self._tell()
        self._show(row)

    def set_spare(self, row: int) -> None:
        """Let a row be emptied whenever pages run out, until it is dropped or written anew."""
        self._spare.pop(row, None)
        self._spare[row] = None
        self._tell()

    def wait(self, freed: int, unless: Callable[[], bool]) -> bool:
        """Sleep until `freed` is another number than this one, or until `unless()`, which `wake` makes it look at.

        False where only the thread that sleeps here uses what others hold, so that it would sleep for ever.
        """
        with self._freeing:
            while not self._freeing.wait_for(lambda: self.freed != freed or unless(), _PATIENCE):
                if self._used_by() <= {threading.get_ident()}:
                    return False
        return True

    def wake(self) -> None:
        """Let all that sleep in `wait` look again."""
        with self._freeing:
            self._freeing.notify_all()

    def slots_of(self, row: int | np.ndarray, at: np.ndarray) -> np.ndarray:
        """Where in the pool slots of a row lie, or of a row each, all (N,) i32."""
        where: np.ndarray = self.table[row, at // PAGE] * np.int32(PAGE) + at % PAGE
        return where

    def _used_by(self) -> set[int | None]:
        """The threads that use rows with pages; None for one that has been written to by nobody yet."""
        held = [row for row, pages in list(self._rows.items()) if pages and row not in self._spare]
        return {self._users.get(row) for row in held}

    def _evict(self, but: int) -> bool:
        victim = next((row for row in self._spare if row != but), None)
        if victim is not None:
            self.drop(victim)
        return victim is not None

    def _tell(self) -> None:
        with self._freeing:
            self.freed += 1
            self._freeing.notify_all()

    def _take(self) -> int:
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def _release(self, page: int) -> None:
        self._holders[page] -= 1
        if not self._holders[page]:
            self._free.append(page)

    def _show(self, row: int) -> None:
        pages = self._rows[row]
        self.table[row, : len(pages)] = pages
        self.table[row, len(pages) :] = SCRATCH
        self.changed.add(row)
