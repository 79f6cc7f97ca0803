"""Work in another thread whose errors the event loop takes."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def without_stop_iteration(function: Callable[[], Result]) -> Result:
    """Call a function whose result a future gets: none takes a StopIteration, so that one would wait for ever."""
    try:
        return function()
    except StopIteration as error:
        raise RuntimeError("an iterator ended too early") from error


async def in_thread(function: Callable[[], Result], pool: concurrent.futures.Executor | None = None) -> Result:
    """Call a function outside of the event loop, which it would block for other clients.

    `pool` has the thread, instead of the loop's own few, for what may wait for others.
    """
    return await asyncio.get_running_loop().run_in_executor(pool, without_stop_iteration, function)
