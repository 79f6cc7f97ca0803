"""Linear self-speculation: diffusion drafts a block, the causal pass verifies it.

See docs/semantics.md. The surprising fact: nothing is undone after a rejection. The verify pass wrote K/V for the whole
block; the length simply advances by what was accepted, and the rest is overwritten by the next pass.
"""

from __future__ import annotations

from .ar import Loop, prefill
from .diffusion import denoise
from .engine import causal
from .sequence import Sequence


def linear_spec(sequence: Sequence) -> Loop:
    """Decode by draft and verify; the output is AR's, token for token."""
    mask = sequence.model.mask_id
    seed = yield from prefill(sequence)
    sequence.emit(seed)
    while not sequence.finish:
        size = min(sequence.settings.block_length, sequence.remaining)
        block = [seed] + [mask] * (size - 1)
        while mask in block:
            block = yield from denoise(sequence, "draft", block)
        prediction = yield causal("verify", block, sequence.length, every_row=True)
        verdict: list[int] = prediction.token.tolist()
        accepted = matching_prefix(block[1:], verdict) + 1
        sequence.length += accepted
        sequence.accepted.append(sequence.emit_all(verdict[:accepted]))
        seed = verdict[accepted - 1]


def matching_prefix(draft: list[int], verdict: list[int]) -> int:
    """Number of leading tokens of the draft that the causal model would have chosen too."""
    for count, (drafted, chosen) in enumerate(zip(draft, verdict, strict=False)):
        if drafted != chosen:
            return count
    return len(draft)
