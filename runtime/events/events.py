"""What happens to a request, as one typed stream that displays, traces, servers and pages read.

In: after each pass of a request, the pass and its prediction. Out: `Started`, `BlockStarted` and `Step` if somebody
wants to know of every pass, with `Pieces` before ids that are new, `Text` as it becomes final, `Finished`. Events are
plain values: nothing in them changes later, and `as_dict` makes each one JSON. The surprising fact: a pass is described
completely by what went in and what came out, so the modes themselves know nothing of events.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engines.engine import Pass, PassKind, Prediction
from ..modes.linear_spec import matching_prefix
from ..requests.prepare import Generation, result
from ..requests.sequence import Sequence
from ..sampling.commit import probability

if TYPE_CHECKING:
    from ..batching.batch import Served
    from ..generate import LoadedEngine


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
    """What ids stand for, told once, before the first `Step` that has them; ids of the prompt after `Started`.

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
    committed: what the pass decided, in a draft pass as proposals, in a commit pass with masks behind it those of the
    next block too. emitted: tokens of the answer by now. kept: of a verify, how many proposals it kept, and refused:
    the others, but for those behind the end of the answer. proposed: the next draft, if the pass made one beside what
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
    """New text of the answer; it is never taken back."""

    request: int
    at: float
    text: str


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
    found = dataclasses.asdict(event)
    if isinstance(event, Finished):
        found["generation"] = event.generation.as_dict()
    return {"event": _NAMES[type(event)], **found}


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


class Reporter:
    """Turns the passes of one request into its events.

    Args:
        number: the request's, in every event.
        sequence: the request.
        steps: whether to tell of every pass.
        text: whether to tell of text before the end.
    """

    def __init__(self, number: int, sequence: Sequence, *, steps: bool, text: bool = True) -> None:
        self.number, self.sequence = number, sequence
        self._steps, self._text = steps, text
        self._begun = False
        self._previous: PassKind | None = None
        self._told_ids: set[int] = set()
        self._tokens, self._last, self._gap = 0, 0.0, 0.0

    def passed(self, served: Served) -> list[Event]:
        """The events of one pass; the loop has already taken its prediction."""
        events: list[Event] = []
        sequence, now = self.sequence, served.began + served.seconds
        if not self._begun:
            self._begun = True
            events.append(self._started())
            if self._steps:
                events += self._new_pieces(self.sequence.prompt, sequence.started)
        if self._steps:
            events += self._told(served)
        if len(sequence.tokens) > self._tokens:
            if self._tokens:
                self._gap = max(self._gap, now - self._last)
            self._tokens, self._last = len(sequence.tokens), now
            if self._text:
                events += self._new_text(final=sequence.finish is not None)
        return events

    def finished(self, engine: LoadedEngine) -> list[Event]:
        """The last events."""
        events: list[Event] = [] if self._begun else [self._started()]
        sequence = self.sequence
        if self._text:
            events += self._new_text(final=True)
        count, first = len(sequence.tokens), sequence.first_token
        events.append(
            Finished(
                self.number,
                sequence.ended,
                result(engine, sequence),
                ttft_ms=(first - sequence.submitted) * 1e3 if count else None,
                itl_ms=(self._last - first) / (count - 1) * 1e3 if count > 1 else None,
                longest_gap_ms=self._gap * 1e3 if count > 1 else None,
            )
        )
        return events

    def _started(self) -> Started:
        sequence, settings = self.sequence, self.sequence.settings
        return Started(
            self.number,
            sequence.started,
            settings.mode,
            settings.asked_block,
            len(sequence.prompt),
            sequence.reused,
            sequence.prompt,
            sequence.model.mask_id,
        )

    def _new_pieces(self, ids: Iterable[int], at: float) -> list[Event]:
        new = sorted(set(ids) - self._told_ids)
        if not new:
            return []
        self._told_ids.update(new)
        return [Pieces(self.number, at, *self.sequence.transcript.codec.pieces(new))]

    def _new_text(self, final: bool) -> list[Event]:
        new = self.sequence.transcript.push(self.sequence.tokens, final=final)
        return [Text(self.number, time.perf_counter(), new)] if new else []

    def _told(self, served: Served) -> list[Event]:
        asked, prediction = served.asked, served.prediction
        events: list[Event] = []
        filling = asked.kind in ("denoise", "draft")
        if filling and self._previous != asked.kind:
            events.append(BlockStarted(self.number, served.began, asked.write_at, asked.ids.size))
        self._previous = asked.kind
        kept, refused = self._verdict(asked, prediction)
        before, after = asked.ids.tolist(), (prediction.next_ids if filling else prediction.token).tolist()
        committed = [] if filling else self._emitted(asked, prediction)
        if filling or asked.kind == "commit":
            filled = self._filled(asked, prediction)
            if filled and not filling:  # the pass has begun the next block too
                length = asked.rows.size - 1
                events.append(BlockStarted(self.number, served.began, int(asked.pos[-1]) + 1 - length, length))
                self._previous = "denoise"
            committed += filled
        proposed = self._proposed(asked)
        ids = [*before, *after, *self.sequence.tokens[self._tokens :], *(one.token for one in (*committed, *proposed))]
        events += self._new_pieces(ids, served.began)
        events.append(
            Step(
                self.number,
                served.began,
                served.seconds,
                served.rows,
                asked.kind,
                asked.write_at,
                before,
                after,
                prediction.confidence.tolist(),
                committed,
                len(self.sequence.tokens),
                kept,
                refused,
                proposed,
            )
        )
        return events

    def _filled(self, asked: Pass, prediction: Prediction) -> list[Committed]:
        """The masks that this pass turned into tokens."""
        mask = self.sequence.model.mask_id
        chosen = np.flatnonzero((asked.ids[asked.rows] == mask) & (prediction.next_ids != mask)).tolist()
        pos = asked.pos[asked.rows]
        return [Committed(int(pos[i]), int(prediction.next_ids[i]), float(prediction.confidence[i])) for i in chosen]

    def _proposed(self, asked: Pass) -> list[Committed]:
        """The next draft; it stands behind the token that the pass emitted last."""
        sequence = self.sequence
        if sequence.finish is not None or not (asked.ids == sequence.model.mask_id).any():
            return []
        if asked.kind not in ("prefill", "verify"):
            return []
        return [Committed(sequence.length + 1 + i, *one) for i, one in enumerate(sequence.proposed)]

    def _emitted(self, asked: Pass, prediction: Prediction) -> list[Committed]:
        """The tokens that this pass emitted by its causal predictions, in order; masks may stand behind those."""
        causal = int(np.count_nonzero(asked.ids[asked.rows] != self.sequence.model.mask_id))
        first, new = len(self.sequence.prompt) + self._tokens, self.sequence.tokens[self._tokens :][:causal]
        if prediction.logits is not None and new:  # the engine's confidence is that of its own best token
            found = probability(prediction.logits[: len(new)], new, self.sequence.model.mask_id)
            prediction.confidence[: len(new)] = found
        return [
            Committed(first + i, token, float(confidence))
            for i, (token, confidence) in enumerate(zip(new, prediction.confidence.tolist(), strict=False))
        ]

    def _verdict(self, asked: Pass, prediction: Prediction) -> tuple[int | None, list[int]]:
        """How many proposals a verify kept, and the others; masks of the next draft may stand behind them."""
        if asked.kind != "verify":
            return None, []
        proposed = asked.ids[1:].tolist()
        mask = self.sequence.model.mask_id
        if mask in proposed:
            proposed = proposed[: proposed.index(mask)]
        emitted = len(self.sequence.tokens) - self._tokens
        kept = matching_prefix(proposed[:emitted], prediction.token.tolist())
        return kept, proposed[kept:] if kept < emitted else []
