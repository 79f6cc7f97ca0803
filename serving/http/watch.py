"""What the runtime tells of one request, pass by pass, for pages.

In: events. Out: the lines of a trace as objects: the header, then every event. The surprising fact: there is nothing to
add, as the events themselves tell what token ids stand for.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from ...runtime.events.events import Event, as_dict
from ...runtime.events.trace import header
from ...runtime.loading import LoadedEngine


async def traced(engine: LoadedEngine, events: AsyncIterator[tuple[int, Event]]) -> AsyncIterator[dict[str, Any]]:
    """The objects of one request."""
    begun = False
    async for _, event in events:
        if not begun:
            begun = True
            yield header(engine, event)
        yield as_dict(event)
