"""Turns the passes of one request into its events."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from ..batching.batch import PassResult
from ..engines.engine import Pass, PassKind, Prediction
from ..modes.linear_spec import matching_prefix
from ..requests.generation import result
from ..requests.sequence import Sequence
from ..sampling.softmax import probability
from .events import BlockStarted, Committed, Event, Finished, Pieces, Started, Step, Text

if TYPE_CHECKING:
    from ..loading import LoadedEngine


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

    def passed(self, result: PassResult) -> list[Event]:
        """The events of one pass; the loop has already taken its prediction."""
        events: list[Event] = []
        sequence, now = self.sequence, result.began + result.seconds
        if not self._begun:
            self._begun = True
            events.append(self._started())
            if self._steps:
                events += self._new_pieces(self.sequence.prompt, sequence.started)
        if self._steps:
            events += self._told(result)
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

    def _told(self, result: PassResult) -> list[Event]:
        pass_, prediction = result.pass_, result.prediction
        events: list[Event] = []
        filling = pass_.kind in ("denoise", "draft")
        if filling and self._previous != pass_.kind:
            events.append(BlockStarted(self.number, result.began, pass_.write_at, pass_.ids.size))
        self._previous = pass_.kind
        kept, refused = self._verdict(pass_, prediction)
        before, after = pass_.ids.tolist(), (prediction.next_ids if filling else prediction.token).tolist()
        committed = [] if filling else self._emitted(pass_, prediction)
        if filling or pass_.kind == "commit":
            filled = self._filled(pass_, prediction)
            if filled and not filling:  # the pass has begun the next block too
                length = pass_.predicted.size - 1
                events.append(BlockStarted(self.number, result.began, int(pass_.pos[-1]) + 1 - length, length))
                self._previous = "denoise"
            committed += filled
        proposed = self._proposed(pass_)
        ids = [*before, *after, *self.sequence.tokens[self._tokens :], *(one.token for one in (*committed, *proposed))]
        events += self._new_pieces(ids, result.began)
        events.append(
            Step(
                self.number,
                result.began,
                result.seconds,
                result.rows,
                pass_.kind,
                pass_.write_at,
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

    def _filled(self, pass_: Pass, prediction: Prediction) -> list[Committed]:
        """The masks that this pass turned into tokens."""
        mask = self.sequence.model.mask_id
        chosen = np.flatnonzero((pass_.ids[pass_.predicted] == mask) & (prediction.next_ids != mask)).tolist()
        pos = pass_.pos[pass_.predicted]
        return [Committed(int(pos[i]), int(prediction.next_ids[i]), float(prediction.confidence[i])) for i in chosen]

    def _proposed(self, pass_: Pass) -> list[Committed]:
        """The next draft; it stands behind the token that the pass emitted last."""
        sequence = self.sequence
        if sequence.finish is not None or not (pass_.ids == sequence.model.mask_id).any():
            return []
        if pass_.kind not in ("prefill", "verify"):
            return []
        return [Committed(sequence.length + 1 + i, *one) for i, one in enumerate(sequence.proposed)]

    def _emitted(self, pass_: Pass, prediction: Prediction) -> list[Committed]:
        """The tokens that this pass emitted by its causal predictions, in order; masks may stand behind those."""
        causal = int(np.count_nonzero(pass_.ids[pass_.predicted] != self.sequence.model.mask_id))
        first, new = len(self.sequence.prompt) + self._tokens, self.sequence.tokens[self._tokens :][:causal]
        if prediction.logits is not None and new:  # the engine's confidence is that of its own best token
            found = probability(prediction.logits[: len(new)], new, self.sequence.model.mask_id)
            prediction.confidence[: len(new)] = found
        return [
            Committed(first + i, token, float(confidence))
            for i, (token, confidence) in enumerate(zip(new, prediction.confidence.tolist(), strict=False))
        ]

    def _verdict(self, pass_: Pass, prediction: Prediction) -> tuple[int | None, list[int]]:
        """How many proposals a verify kept, and the others; masks of the next draft may stand behind them."""
        if pass_.kind != "verify":
            return None, []
        proposed = pass_.ids[1:].tolist()
        mask = self.sequence.model.mask_id
        if mask in proposed:
            proposed = proposed[: proposed.index(mask)]
        emitted = len(self.sequence.tokens) - self._tokens
        kept = matching_prefix(proposed[:emitted], prediction.token.tolist())
        return kept, proposed[kept:] if kept < emitted else []
