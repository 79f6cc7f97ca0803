"""What comes before a mode's own loop: scoring the prompt, where that is asked for, in causal passes in every mode."""

from __future__ import annotations

from collections.abc import Callable, Generator

from ..engines.passes import Pass, Prediction, causal
from ..requests.sequence import Sequence
from .ar import Loop, prefill


def loop_of(sequence: Sequence, mode: Callable[[Sequence], Loop]) -> Loop:
    """The loop of a request: its mode's alone, unless its prompt is scored or nothing is to be generated."""
    usual = sequence.prompt_scores is None and sequence.settings.max_new_tokens
    return mode(sequence) if usual else _scored(sequence, mode)


def _scored(sequence: Sequence, mode: Callable[[Sequence], Loop]) -> Loop:
    """Score the prompt, then decode by the mode; a request of no new tokens ends with its prompt."""
    scores = sequence.prompt_scores
    if scores is not None:
        yield from _score(sequence)
    if sequence.settings.max_new_tokens:
        yield from mode(sequence)
        return
    if scores is None or scores.begin >= scores.end:  # a request has one pass at least
        yield from prefill(sequence)
    sequence.finish = "length"


def _score(sequence: Sequence) -> Generator[Pass, Prediction, None]:
    """Write the K/V of all of the prompt but its last token, and take the predictions from `begin` on."""
    scores, prompt = sequence.prompt_scores, sequence.prompt
    assert scores is not None
    while (start := sequence.length) < scores.end:
        before = start < scores.begin
        size = sequence.settings.prefill_chunk if before else min(scores.chunk, sequence.settings.prefill_chunk)
        part = prompt[start : min(start + size, scores.begin if before else scores.end)]
        prediction = yield causal("prefill", part, start, predict_all=not before, logits=not before)
        sequence.length += len(part)
        if not before:
            assert prediction.logits is not None
            scores.take(start, prediction.logits)
