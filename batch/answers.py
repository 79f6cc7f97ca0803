"""The answers to the lines of a file of prompts."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import NemodiffError

if TYPE_CHECKING:
    from ..runtime.events.events import Event
    from ..runtime.loading import LoadedEngine
    from ..runtime.requests.generation import Generation
    from ..runtime.requests.sequence import Sequence
    from .lines import Line


@dataclasses.dataclass
class _Place:
    """A line whose turn has come; it has a result when it has ended."""

    line: Line
    result: Generation | NemodiffError | None = None


def answer_lines(
    engine: LoadedEngine,
    lines: list[Line],
    flags: Mapping[str, Any],
    write: Callable[[Event], Event],
    *,
    in_order: bool = True,
    **choices: Any,
) -> Iterator[tuple[Line, Generation | NemodiffError]]:
    """Each line with its answer, or with what went wrong with it alone; in their order, or as they end.

    Lines become requests as rows become free. `write` sees every event; `choices` are those of `sequence_events`.
    """
    from ..runtime.events.events import Finished
    from ..runtime.generate import sequence_events
    from ..runtime.requests.prepare import prepare

    begun: deque[_Place] = deque()
    running: dict[int, _Place] = {}

    def prepared() -> Iterator[Sequence]:
        number = 0
        for line in lines:
            place = _Place(line)
            begun.append(place)
            try:
                sequence = prepare(engine, line.prompt, line.chosen(flags))
            except NemodiffError as error:
                place.result = error
                continue
            running[number] = place
            number += 1
            yield sequence

    def failed(number: int, error: NemodiffError) -> None:
        running.pop(number).result = error

    for event in map(write, sequence_events(engine, prepared(), failed=failed, **choices)):
        if isinstance(event, Finished):
            running.pop(event.request).result = event.generation
        yield from _ended(begun, in_order)
    yield from _ended(begun, in_order)


def _ended(begun: deque[_Place], in_order: bool) -> Iterator[tuple[Line, Generation | NemodiffError]]:
    """Those of the places that have a result and, in order, none before them without one; they are taken out."""
    for place in list(begun):
        if place.result is not None:
            begun.remove(place)
            yield place.line, place.result
        elif in_order:
            return
