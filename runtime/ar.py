"""Autoregressive decoding, and the prefill that every mode begins with.

A loop is a generator: it yields a `Pass`, is sent its `Prediction`, and emits tokens into its `Sequence`.
See docs/semantics.md.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

from .engine import Pass, Prediction, causal
from .sampling import sample
from .sequence import Sequence

Loop = Generator[Pass, Prediction, None]


def prompt_parts(sequence: Sequence) -> Iterator[tuple[list[int], int]]:
    """What the cache does not hold of the prompt yet, in chunks, each with its position."""
    prompt, chunk = sequence.prompt, sequence.settings.prefill_chunk
    for start in range(sequence.length, len(prompt), chunk):
        yield prompt[start : start + chunk], start


def prefill(sequence: Sequence) -> Generator[Pass, Prediction, int]:
    """Write the prompt's K/V and return the seed, the token after the prompt."""
    sampled = sequence.settings.temperature > 0
    for part, start in prompt_parts(sequence):
        prediction = yield causal("prefill", part, start, logits=sampled)
        sequence.length += len(part)
    return _choose(sequence, prediction)


def ar(sequence: Sequence) -> Loop:
    """One token per pass."""
    token = yield from prefill(sequence)
    sampled = sequence.settings.temperature > 0
    while not sequence.emit(token):
        prediction = yield causal("decode", [token], sequence.length, logits=sampled)
        sequence.length += 1
        token = _choose(sequence, prediction)


def _choose(sequence: Sequence, prediction: Prediction) -> int:
    """The next token: the engine's best, or a sample at its absolute position."""
    settings = sequence.settings
    if prediction.logits is None:
        return int(prediction.token[-1])
    return sample(prediction.logits[-1], settings.temperature, settings.seed, sequence.length, sequence.model.mask_id)
