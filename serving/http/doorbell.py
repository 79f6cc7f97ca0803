"""Waking an event loop from another thread, for a sixth of what `call_soon_threadsafe` costs, and seldom.

A small model's token takes a third of a millisecond, so what wakes the loop for each of them counts. asyncio's own way
is a pair of sockets, which it reads twice, and a handle with a copied context for each call. And whoever wakes a loop
still holds the interpreter's lock, so the loop sleeps again until it is woken once more for that: both cost the thread
that decodes a tenth of such a token. So a loop that is rung for again and again looks by itself.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import sys
import weakref
from collections.abc import Callable

_SPACING = 0.002  # seconds between two looks; a loop that is rung for less often is woken each time


class Doorbell:
    """Calls functions in a running event loop, which other threads ask for. One per loop: `doorbell` gives it."""

    def __init__(self) -> None:
        self._callbacks = collections.deque[Callable[[], object]]()
        self._rung = False  # and not answered yet
        self._looks = False  # whether the loop is about to look by itself
        self._answered = 0.0  # when it was woken last
        self._loop = weakref.ref(asyncio.get_running_loop())  # which keeps this, and is not to be kept by it
        self._pipe: tuple[int, ...] = ()  # its end in the loop, and the one outside
        if sys.platform != "win32":  # whose loop reads no pipe, so that it is woken in asyncio's own way
            self._pipe = os.pipe()
            for end in self._pipe:
                os.set_blocking(end, False)
            asyncio.get_running_loop().add_reader(self._pipe[0], self._answer)

    def __del__(self) -> None:
        for end in self._pipe:
            os.close(end)

    def ring(self, callback: Callable[[], object], *, at_once: bool = False) -> None:
        """Have the loop call a function soon, or never if it has been closed; any thread may.

        While the loop is rung for again and again, soon is within `_SPACING`, unless it has to be at once.
        """
        self._callbacks.append(callback)
        if not self._rung and (at_once or not self._looks):
            self._rung = True
            self._wake()

    def _wake(self) -> None:
        if self._pipe:
            os.write(self._pipe[1], b"\0")
        elif (loop := self._loop()) is not None:
            with contextlib.suppress(RuntimeError):  # it has been closed
                loop.call_soon_threadsafe(self._answer)

    def _answer(self) -> None:
        if self._pipe:
            with contextlib.suppress(BlockingIOError):
                os.read(self._pipe[0], 64)
        self._rung = False  # first, so that none is left that nobody rings for
        self._call()
        now = asyncio.get_running_loop().time()
        if now < self._answered + _SPACING and not self._looks:
            self._look_soon()
        self._answered = now

    def _look(self) -> None:
        self._looks = False  # first, as above
        if self._callbacks:
            self._call()
            self._look_soon()

    def _look_soon(self) -> None:
        self._looks = True
        asyncio.get_running_loop().call_later(_SPACING, self._look)

    def _call(self) -> None:
        while self._callbacks:
            self._callbacks.popleft()()


_BELLS: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Doorbell] = weakref.WeakKeyDictionary()


def doorbell() -> Doorbell:
    """The running loop's."""
    loop = asyncio.get_running_loop()
    if (bell := _BELLS.get(loop)) is None:
        bell = _BELLS[loop] = Doorbell()
    return bell
