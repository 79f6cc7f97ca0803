"""Autoregressive decoding, and the prefill that every mode begins with.

A loop is a generator: it yields a `Pass`, is sent its `Prediction`, and emits tokens into its `Sequence`.
See docs/semantics.md.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

from ..engines.passes import Following, Pass, Prediction, causal
from ..requests.sequence import Sequence

Loop = Generator[Pass, Prediction, None]
Follower = Callable[[Sequence, Pass], Following | None]
# Of a loop that is about to yield a pass which leaves no draft, and emits so many tokens at most: what makes the one
# after it, where that is known.
Again = Callable[[Sequence, int], Follower | None]


def prompt_parts(sequence: Sequence) -> Iterator[tuple[list[int], int]]:
    """What the cache does not hold of the prompt yet, in chunks, each with its position."""
    prompt, chunk = sequence.prompt, sequence.settings.prefill_chunk
    for start in range(sequence.length, len(prompt), chunk):
        yield prompt[start : start + chunk], start


def prefill(sequence: Sequence, follower: Follower | None = None) -> Generator[Pass, Prediction, Prediction]:
    """Write the prompt's K/V and return the last prediction, that of the token after the prompt.

    `follower` makes the pass after the last one, where that needs no more than its token.
    """
    last = len(sequence.prompt)
    for part, start in prompt_parts(sequence):
        end = start + len(part)
        sequence.follower = _next_part if end < last else follower
        prediction = yield _over_part(sequence, part, start)
        sequence.length += len(part)
    return prediction


def _over_part(sequence: Sequence, part: list[int], start: int) -> Pass:
    """The pass over a part of the prompt; the last one predicts the first token."""
    ends = start + len(part) == len(sequence.prompt)
    return causal("prefill", part, start, logits=ends and not sequence.selector.plain)


def _next_part(sequence: Sequence, pass_: Pass) -> Following:
    """The pass over the prompt's next part."""
    start = pass_.write_at + pass_.ids.size
    part = sequence.prompt[start : start + sequence.settings.prefill_chunk]
    return Following(_over_part(sequence, part, start), None)


def ar(sequence: Sequence) -> Loop:
    """One token per pass."""
    follower = over_next if sequence.selector.as_predicted else None
    prediction = yield from prefill(sequence, follower)
    sequence.take(prediction, 0)
    while not sequence.finish:
        sequence.follower = follower
        prediction = yield over_last(sequence)
        sequence.length += 1
        sequence.take(prediction, 0)


def over_last(sequence: Sequence) -> Pass:
    """The pass over the last emitted token, which predicts the next."""
    return causal("decode", sequence.tokens[-1:], sequence.length, logits=not sequence.selector.plain)


def over_next(sequence: Sequence, pass_: Pass) -> Following | None:
    """The pass over the token that one over all before it predicts."""
    if sequence.remaining == 1:
        return None
    return Following(causal("decode", [sequence.stand_in], pass_.write_at + pass_.ids.size), "token")
