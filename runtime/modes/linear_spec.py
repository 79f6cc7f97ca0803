"""Linear self-speculation: diffusion drafts a block, the causal pass verifies it.

See docs/semantics.md. The surprising fact: nothing is undone after a rejection. The verify pass wrote K/V for the whole
block; the length simply advances by what was accepted, and the rest is overwritten by the next pass.
"""

from __future__ import annotations

from collections.abc import Generator

from ..engines.engine import Pass, Prediction, causal
from ..requests.sequence import Sequence
from .ar import Loop, prefill
from .diffusion import denoise


def linear_spec(sequence: Sequence) -> Loop:
    """Decode by draft and verify; the output is AR's, token for token."""
    prediction = yield from prefill(sequence)
    sequence.emit(sequence.selector.next(prediction, 0))
    while not sequence.finish:
        sequence.plan()
        yield from draft_and_verify(sequence)


def draft_and_verify(sequence: Sequence) -> Generator[Pass, Prediction, None]:
    """One block after the last emitted token."""
    mask, selector = sequence.model.mask_id, sequence.selector
    size = min(sequence.block_length, sequence.remaining)
    block = [sequence.tokens[-1], *selector.with_end_of_thinking([mask] * (size - 1))]
    while mask in block:
        block = yield from denoise(sequence, "draft", block)
    prediction = yield causal("verify", block, sequence.length, predict_all=True, logits=not selector.plain)
    sequence.verify(prediction, block[1:])


def matching_prefix(draft: list[int], verdict: list[int]) -> int:
    """Number of leading tokens of the draft that the causal model would have chosen too."""
    for count, (drafted, chosen) in enumerate(zip(draft, verdict, strict=False)):
        if drafted != chosen:
            return count
    return len(draft)
