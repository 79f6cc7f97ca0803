"""Turns the passes of one request into its events."""

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy as np

from ..batching.slot import PassResult
from ..loading import LoadedEngine
from ..requests.generation import finished_generation
from ..requests.sequence import Sequence
from ..sampling.softmax import probability
from ..tools.answer import AnswerParser
from .events import BlockStarted, Committed, Event, Finished, Pieces, Started, Step, Text


class Reporter:
    """Turns the passes of one request into its events.

    Args:
        number: the request's, in every event.
        sequence: the request.
        steps: whether to report every pass.
        text: whether to report text before the end.
    """

    def __init__(self, number: int, sequence: Sequence, *, steps: bool, text: bool = True) -> None:
        self.number = number
        self.sequence = sequence
        self._steps = steps
        self._text = text
        self._begun = False
        self._reported_ids: set[int] = set()
        self._tokens = 0  # of the answer, by the last pass
        self._last = 0.0  # when they came
        self._reported = 0  # of them, those in a `Text`
        self._gap = 0.0
        self._parser: AnswerParser | None = AnswerParser(sequence.settings.answer_format, sequence.opened)

    def passed(self, result: PassResult) -> list[Event]:
        """The events of one pass; the loop has already taken its prediction."""
        events: list[Event] = []
        sequence = self.sequence
        now = result.began + result.seconds
        if not self._begun:
            self._begun = True
            events.append(self._started())
            if self._steps:
                events += self._new_pieces(sequence.prompt, sequence.started)
        if self._steps:
            events += self._step(result)
        if len(sequence.tokens) > self._tokens:
            if self._tokens:
                self._gap = max(self._gap, now - self._last)
            self._tokens = len(sequence.tokens)
            self._last = now
            if self._text:
                events += self._new_text(final=sequence.finish is not None)
        return events

    def finished(self, engine: LoadedEngine) -> list[Event]:
        """The last events."""
        events: list[Event] = [] if self._begun else [self._started()]
        sequence = self.sequence
        if self._text:
            events += self._new_text(final=True)
        count = len(sequence.tokens)
        first = sequence.first_token
        events.append(
            Finished(
                self.number,
                sequence.ended,
                finished_generation(engine, sequence),
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
            settings.reported_block_length,
            len(sequence.prompt),
            sequence.reused,
            sequence.prompt,
            sequence.model.mask_id,
        )

    def _new_pieces(self, ids: Iterable[int], at: float) -> list[Event]:
        new = sorted(set(ids) - self._reported_ids)
        if not new:
            return []
        self._reported_ids.update(new)
        return [Pieces(self.number, at, *self.sequence.transcript.codec.pieces(new))]

    def _new_text(self, final: bool) -> list[Event]:
        sequence = self.sequence
        new = sequence.transcript.push(sequence.tokens, final=final)
        parts = [] if self._parser is None else self._parser.push(new, final)
        if final:
            self._parser = None  # which has given all
        if not new and not parts:
            return []
        reported = slice(self._reported, sequence.transcript.handed_out if new else self._reported)
        self._reported = reported.stop
        logprobs = None if sequence.settings.logprobs is None else sequence.selector.logprobs[reported]
        confidences = sequence.confidences[reported] if sequence.settings.confidences else None
        return [Text(self.number, time.perf_counter(), new, sequence.tokens[reported], logprobs, confidences, parts)]

    def _step(self, result: PassResult) -> list[Event]:
        """A pass as its loop recorded it, after what its ids stand for and the block that it began."""
        pass_, outcome = result.pass_, result.outcome
        events: list[Event] = []
        if outcome.block is not None:
            events.append(BlockStarted(self.number, result.began, *outcome.block))
        before = pass_.ids.tolist()
        after = _after(result)
        confidence = _confidence(result, self.sequence.model.mask_id).tolist()
        committed = self._committed(result, confidence)
        proposed = self._proposed(result)
        ids = [*before, *after, *self.sequence.tokens[self._tokens :]]
        events += self._new_pieces([*ids, *(one.token for one in (*committed, *proposed))], result.began)
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
                confidence,
                committed,
                len(self.sequence.tokens),
                outcome.kept,
                list(outcome.refused),
                proposed,
            )
        )
        return events

    def _committed(self, result: PassResult, confidence: list[float]) -> list[Committed]:
        """What the pass decided: tokens after those of earlier passes, and masks of its block."""
        start, filling = len(self.sequence.prompt) + self._tokens, result.outcome.filling
        committed = [Committed(start + i, token, confidence[i]) for i, token in enumerate(result.outcome.emitted)]
        if filling is not None:
            filled = filling.filled(self.sequence.model.mask_id)
            committed += [Committed(filling.start + i, token, confidence[filling.first + i]) for i, token in filled]
        return committed

    def _proposed(self, result: PassResult) -> list[Committed]:
        """The next draft; it stands after the token that the pass emitted last."""
        draft = result.outcome.draft
        if draft is None:
            return []
        start = self.sequence.length + 1
        pairs = zip(draft.tokens, draft.confidence, strict=True)
        return [Committed(start + i, token, confidence) for i, (token, confidence) in enumerate(pairs)]


def _after(result: PassResult) -> list[int]:
    """Per predicted position the id that came out: the block after a denoise or draft pass, else the choices."""
    outcome = result.outcome
    if result.pass_.kind in ("denoise", "draft") and outcome.filling is not None:
        return outcome.filling.after
    rest: list[int] = result.prediction.token[len(outcome.emitted) :].tolist()
    return outcome.emitted + rest


def _confidence(result: PassResult, mask_id: int) -> np.ndarray:
    """Of each prediction, (R,) f32: the engine's is that of its own best token, so other choices are measured."""
    prediction, outcome = result.prediction, result.outcome
    confidence = prediction.confidence if outcome.confidence is None else outcome.confidence
    if prediction.logits is None or not outcome.emitted:
        return confidence
    confidence = confidence.copy()
    count = len(outcome.emitted)
    confidence[:count] = probability(prediction.logits[:count], outcome.emitted, mask_id)
    return confidence
