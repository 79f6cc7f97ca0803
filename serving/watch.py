"""What the runtime tells of one request, pass by pass, for pages.

In: events. Out: the lines of a trace as objects: the header, then every event, each with `pieces`, the text of the
token ids that no object before it has named. The surprising fact: a token's text alone may be half a character.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from ..runtime.events import Event, Step, as_dict
from ..runtime.generate import LoadedEngine
from ..runtime.trace import header


async def traced(engine: LoadedEngine, events: AsyncIterator[tuple[int, Event]]) -> AsyncIterator[dict[str, Any]]:
    """The objects of one request."""
    known = {engine.info.model.mask_id}
    begun = False
    async for _, event in events:
        if not begun:
            begun = True
            yield header(engine, event)
        value = as_dict(event)
        if isinstance(event, Step):
            committed = (one.token for one in event.committed)
            new = {*event.before, *event.after, *event.refused, *committed} - known
            known |= new
            value["pieces"] = {token: engine.text.piece(token) for token in sorted(new)}
        yield value
