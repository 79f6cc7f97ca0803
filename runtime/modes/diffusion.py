"""Block diffusion: a block of masks is denoised in parallel and committed by confidence.

See docs/semantics.md. The surprising fact: the K/V of the denoise passes are useless afterwards, because bidirectional
attention changes every layer above the first; one causal pass per block writes those that stay.
"""

from __future__ import annotations

from collections.abc import Generator

import numpy as np

from ...errors import EngineError
from ..engines.engine import Pass, PassKind, Prediction, bidirectional, causal, with_masks
from ..requests.sequence import Sequence
from ..sampling.softmax import entropies, probability
from .ar import Loop, prefill


def diffusion(sequence: Sequence) -> Loop:
    """Decode block by block; emits the decided start of the block after each pass."""
    settings, selector, mask = sequence.settings, sequence.selector, sequence.model.mask_id
    size = settings.block_length
    prediction = yield from prefill(sequence)
    early = False  # whether the last pass was the first denoise of the block that begins, too
    while not sequence.emit(_seed(sequence, prediction)):
        block = [sequence.tokens[-1], *selector.with_end_of_thinking([mask] * (size - 1))]
        end = settings.end_think
        held = block.index(end) if end in block[1:] else size  # where thinking must end
        sequence.confidences += [None] * (size - 1)
        passes, decided = 0, 1
        if early and mask in block:
            block, passes = _fill(sequence, block, prediction, 1, 0), 1
        while True:
            if held < size and end in block[:held]:  # the model has ended it earlier
                block[held], held = mask, size
            before, decided = decided, block.index(mask) if mask in block else size
            sequence.emit_all(block[before:decided])
            if sequence.finish:
                return
            if decided == size:
                break
            block, passes = (yield from denoise(sequence, "denoise", block, passes)), passes + 1
        pass_ = causal("commit", block, sequence.length, logits=sequence.needs_logits)
        early = settings.merge_commit
        prediction = yield with_masks(pass_, size, mask) if early else pass_
        prediction.next_ids[1:] = mask  # of the next block nothing is decided before its first token is
        sequence.length += size


def denoise(
    sequence: Sequence, kind: PassKind, block: list[int], passes: int = 0
) -> Generator[Pass, Prediction, list[int]]:
    """One bidirectional pass over a block with masks; returns the block after the commit rule and the EOS rule.

    `passes` is how many this block has had before.
    """
    settings, mask = sequence.settings, sequence.model.mask_id
    prediction = yield bidirectional(
        kind,
        block,
        sequence.length,
        settings.threshold,
        adapter=kind == "draft",
        logits=sequence.needs_logits,
    )
    if not (sequence.selector.plain and settings.policy.by_engine):
        return _fill(sequence, block, prediction, 0, passes)
    after: list[int] = prediction.next_ids.tolist()
    if after.count(mask) >= block.count(mask):
        raise EngineError("the engine committed no token in a pass, so its numbers are broken; build it again in f32")
    return _decided(sequence, block, after, prediction, 0)


def _fill(sequence: Sequence, block: list[int], prediction: Prediction, row: int, passes: int) -> list[int]:
    """The block after the commit rule and the EOS rule, chosen here and written over the engine's.

    `row` is where the block's first prediction is.
    """
    selector, policy, mask = sequence.selector, sequence.settings.policy, sequence.model.mask_id
    masked = [i for i, token in enumerate(block) if token == mask]
    rows = np.array(masked) + row
    if prediction.logits is None or selector.plain:
        tokens: list[int] = prediction.token[rows].tolist()
    else:
        known = len(sequence.prompt) + len(sequence.tokens) - sequence.length  # of the block, emitted already
        found = selector.propose(prediction, block[known:], range(row + known, row + len(block)))
        tokens = [found[i - known] for i in masked]
        if not policy.everything or sequence.settings.confidences:
            prediction.confidence[rows] = probability(prediction.logits[rows], tokens, mask)
    entropy = entropies(prediction.logits[rows], mask) if policy.by_entropy and prediction.logits is not None else None
    after = list(block)
    for i in policy.commits(prediction.confidence[rows], entropy, passes):
        after[masked[i]] = tokens[i]
    prediction.next_ids[rows] = [after[i] for i in masked]
    return _decided(sequence, block, after, prediction, row)


def _decided(sequence: Sequence, block: list[int], after: list[int], prediction: Prediction, row: int) -> list[int]:
    """Note the confidences of what has been committed, if they are wanted, and close the block after an EOS."""
    if sequence.settings.confidences:
        first = sequence.length - len(sequence.prompt)
        for i, (old, new) in enumerate(zip(block, after, strict=True)):
            if old != new:
                sequence.confidences[first + i] = float(prediction.confidence[row + i])
    return sequence.close_after_eos(after)


def _seed(sequence: Sequence, prediction: Prediction) -> int:
    """The causal model's token that begins a block."""
    selector = sequence.selector
    forced = selector.forced() is not None
    token = selector.next(prediction, 0)
    if sequence.settings.confidences:
        if prediction.logits is not None:
            prediction.confidence[0] = probability(prediction.logits[:1], [token], sequence.model.mask_id)[0]
        sequence.confidences.append(None if forced else float(prediction.confidence[0]))
    return token
