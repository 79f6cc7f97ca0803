"""Autoregressive decoding, and the prefill that every mode begins with.

A loop is a generator: it yields a `Pass`, is sent its `Prediction`, and emits tokens into its `Sequence`.
See docs/semantics.md.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

from ..engines.engine import Following, Pass, Prediction, causal
from ..requests.sequence import Sequence

Loop = Generator[Pass, Prediction, None]


def prompt_parts(sequence: Sequence) -> Iterator[tuple[list[int], int]]:
    """What the cache does not hold of the prompt yet, in chunks, each with its position."""
    prompt, chunk = sequence.prompt, sequence.settings.prefill_chunk
    for start in range(sequence.length, len(prompt), chunk):
        yield prompt[start : start + chunk], start


def prefill(sequence: Sequence) -> Generator[Pass, Prediction, Prediction]:
    """Write the prompt's K/V and return the last prediction, that of the token after the prompt."""
    last = len(sequence.prompt)
    for part, start in prompt_parts(sequence):
        logits = not sequence.selector.plain and start + len(part) == last
        prediction = yield causal("prefill", part, start, logits=logits)
        sequence.length += len(part)
    return prediction


def ar(sequence: Sequence) -> Loop:
    """One token per pass."""
    prediction = yield from prefill(sequence)
    sequence.take(prediction, 0)
    while not sequence.finish:
        if sequence.selector.as_predicted:
            sequence.follower = over_next
        prediction = yield over_last(sequence)
        sequence.length += 1
        sequence.take(prediction, 0)


def over_last(sequence: Sequence) -> Pass:
    """The pass over the last emitted token, which predicts the next."""
    return causal("decode", sequence.tokens[-1:], sequence.length, logits=not sequence.selector.plain)


def over_next(sequence: Sequence, pass_: Pass) -> Following | None:
    """The pass over the token that one over the last emitted token predicts."""
    if sequence.remaining == 1:
        return None
    return Following(causal("decode", [sequence.stand_in], pass_.write_at + 1), "token")
