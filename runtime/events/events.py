"""What happens to a request, as plain values that displays, traces, servers and pages read.

Nothing in an event changes later, and `as_dict` makes each one JSON.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from ..engines.passes import PassKind
from ..requests.generation import Generation
from ..requests.token_logprobs import TokenLogprobs
from ..tools.answer import Delta


@dataclasses.dataclass(frozen=True)
class Started:
    """A request has a row. Every event has `request`, its number, and `at`, seconds on this process's clock.

    prompt: its ids. mask_id: what stands for an undecided token in a `Step`.
    """

    request: int
    at: float
    mode: str
    block_length: int | str
    prompt_tokens: int
    reused_tokens: int
    prompt: list[int]
    mask_id: int


@dataclasses.dataclass(frozen=True)
class Pieces:
    """What ids stand for, sent once, before the first `Step` that has them; ids of the prompt after `Started`.

    text: whole characters. bytes: the others, a part of a character, as hexadecimal digits. special: tokens that are no
    text, by name.
    """

    request: int
    at: float
    text: dict[int, str]
    bytes: dict[int, str]
    special: dict[int, str]


@dataclasses.dataclass(frozen=True)
class BlockStarted:
    """`length` tokens from position `start` are about to be decided together; all but the first are masks."""

    request: int
    at: float
    start: int
    length: int


@dataclasses.dataclass(frozen=True)
class Committed:
    """A token decided at a position, and the confidence of the pass that decided it."""

    position: int
    token: int
    confidence: float


@dataclasses.dataclass(frozen=True)
class Step:
    """One pass of the request.

    start: the position of its first token. before, after: the ids that went in, and per predicted position the id that
    came out; in a denoise or draft pass these are the block before and after. confidence: of each prediction.
    committed: what the pass decided, in a draft pass as proposals, in a commit pass with masks after it those of the
    next block too. emitted: tokens of the answer by now. kept: of a verify, how many proposals it kept, and refused:
    the others, but for those after the end of the answer. proposed: the next draft, if the pass made one beside what
    else it did. seconds and rows: of the forward that the pass shared with other rows.
    """

    request: int
    at: float
    seconds: float
    rows: int
    kind: PassKind
    start: int
    before: list[int]
    after: list[int]
    confidence: list[float]
    committed: list[Committed]
    emitted: int
    kept: int | None
    refused: list[int]
    proposed: list[Committed]


@dataclasses.dataclass(frozen=True)
class Text:
    """New text of the answer; it is never taken back.

    token_ids: the next tokens of the answer, up to the last whose text has come in full; those that stand after the
    last text are in the `Generation` alone. logprobs, confidences: one for each of them, None unless requested. parts:
    what the text adds to thoughts, content and calls; what may belong to a marker comes later, so the last text may be
    empty.
    """

    request: int
    at: float
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    confidences: list[float | None] | None
    parts: list[Delta]


@dataclasses.dataclass(frozen=True)
class Finished:
    """The request has ended.

    ttft_ms: from submission to the first token, None without one. itl_ms: mean time between tokens, None below two.
    longest_gap_ms: the longest time between two passes that emitted something.
    """

    request: int
    at: float
    generation: Generation
    ttft_ms: float | None
    itl_ms: float | None
    longest_gap_ms: float | None


Event = Started | Pieces | BlockStarted | Step | Text | Finished
_NAMES: dict[type[Event], str] = {
    Started: "started",
    Pieces: "pieces",
    BlockStarted: "block_started",
    Step: "step",
    Text: "text",
    Finished: "finished",
}


def as_dict(event: Event) -> dict[str, Any]:
    """An event as one JSON object; `event` is its kind."""
    values = dataclasses.asdict(event)
    if isinstance(event, Finished):
        values["generation"] = event.generation.as_dict()
    if isinstance(event, Text):
        for name in ("logprobs", "confidences"):
            if values[name] is None:
                del values[name]
        if [(part.part, part.text) for part in event.parts] == [("content", event.text)]:
            del values["parts"]  # which say no more than the text
    return {"event": _NAMES[type(event)], **values}


def answers(events: Iterable[Event]) -> Iterator[Generation]:
    """The finished requests in the order of their numbers, which count from 0."""
    done: dict[int, Generation] = {}
    number = 0
    for event in events:
        if isinstance(event, Finished):
            done[event.request] = event.generation
            while number in done:
                yield done.pop(number)
                number += 1
