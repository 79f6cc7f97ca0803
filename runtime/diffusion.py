"""Block diffusion: a block of masks is denoised in parallel and committed by confidence.

See docs/semantics.md. The surprising fact: the K/V of the denoise passes are useless afterwards, because bidirectional
attention changes every layer above the first; one causal pass per block writes those that stay.
"""

from __future__ import annotations

from collections.abc import Generator

from ..errors import EngineError
from .ar import Loop, prefill
from .engine import Pass, PassKind, Prediction, bidirectional, causal
from .sequence import Sequence


def diffusion(sequence: Sequence) -> Loop:
    """Decode block by block; emits the decided start of the block after each pass."""
    settings, mask = sequence.settings, sequence.model.mask_id
    seed = yield from prefill(sequence)
    while True:
        block = sequence.close_after_eos([seed] + [mask] * (settings.block_length - 1))
        emitted = 0
        while True:
            decided = block.index(mask) if mask in block else len(block)
            emitted += sequence.emit_all(block[emitted:decided])
            if sequence.finish:
                return
            if decided == len(block):
                break
            block = yield from denoise(sequence, "denoise", block)
        prediction = yield causal("commit", block, sequence.length)
        sequence.length += len(block)
        seed = int(prediction.token[-1])


def denoise(sequence: Sequence, kind: PassKind, block: list[int]) -> Generator[Pass, Prediction, list[int]]:
    """One bidirectional pass over a block with masks; returns the block after the commit rule and the EOS rule."""
    mask = sequence.model.mask_id
    prediction = yield bidirectional(kind, block, sequence.length, sequence.settings.threshold, adapter=kind == "draft")
    after: list[int] = prediction.next_ids.tolist()
    if after.count(mask) >= block.count(mask):
        raise EngineError("the engine committed no token in a pass, so its numbers are broken; build it again in f32")
    return sequence.close_after_eos(after)
