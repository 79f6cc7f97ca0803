"""Block diffusion: a block of masks is denoised in parallel and committed by confidence; see docs/semantics.md."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np

from ...errors import EngineError
from ..engines.engine import Pass, PassKind, Prediction, bidirectional, causal, with_masks
from ..requests.outcome import Filling
from ..requests.sequence import Sequence
from ..sampling.softmax import entropies, probability
from .ar import Loop, prefill


def diffusion(sequence: Sequence) -> Loop:
    """Decode block by block; emits the decided start of the block after each pass.

    K/V of the denoise passes are useless afterwards, since bidirectional attention changes every layer above the first;
    one causal pass per block writes those that stay.
    """
    settings = sequence.settings
    selector = sequence.selector
    mask = sequence.model.mask_id
    size = settings.block_length
    prediction = yield from prefill(sequence)
    merged = False  # whether the last pass has begun to denoise this block too
    while not _emit_seed(sequence, prediction):
        block = [sequence.tokens[-1], *selector.with_end_of_thinking([mask] * (size - 1))]
        end = settings.end_think
        held = block.index(end) if end in block[1:] else size  # where thinking must end
        sequence.confidences += [None] * (size - 1)
        passes, decided = 0, 1
        if merged and mask in block:
            sequence.outcome.block = (sequence.length, size)
            block = _fill(sequence, block, prediction, first=1, passes=0)
            passes = 1
        while True:
            if held < size and end in block[:held]:  # the model has ended it earlier
                block[held] = mask
                held = size
            before, decided = decided, block.index(mask) if mask in block else size
            sequence.emit(block[before:decided])
            if sequence.finish:
                return
            if decided == size:
                break
            block = yield from denoise(sequence, "denoise", block, begins=passes == 0, passes=passes)
            passes += 1
        commit = causal("commit", block, sequence.length, logits=sequence.needs_logits)
        merged = settings.merge_commit
        prediction = yield with_masks(commit, size, mask) if merged else commit
        sequence.length += size


def denoise(
    sequence: Sequence, kind: PassKind, block: list[int], *, begins: bool, passes: int = 0
) -> Generator[Pass, Prediction, list[int]]:
    """One bidirectional pass over a block with masks; returns the block after the commit rule and the EOS rule.

    `begins`: whether it is the block's first pass. `passes`: how many it has had, where the commit rule counts them.
    """
    settings, mask = sequence.settings, sequence.model.mask_id
    prediction = yield over_block(sequence, kind, block, sequence.length)
    outcome = sequence.outcome
    if begins:
        outcome.block = (sequence.length, len(block))
    if not (sequence.selector.plain and settings.policy.by_engine):
        return _fill(sequence, block, prediction, first=0, passes=passes)
    after: list[int] = prediction.next_ids.tolist()
    if after.count(mask) >= block.count(mask):
        raise EngineError("the engine committed no token in a pass, so its numbers are broken; build it again in f32")
    return _commit(sequence, block, after, prediction.confidence, first=0)


def over_block(sequence: Sequence, kind: PassKind, block: list[int], start: int) -> Pass:
    """The bidirectional pass over a block with masks."""
    threshold, drafts = sequence.settings.threshold, kind == "draft"
    return bidirectional(kind, block, start, threshold, adapter=drafts, logits=sequence.needs_logits)


def _fill(sequence: Sequence, block: list[int], prediction: Prediction, *, first: int, passes: int) -> list[int]:
    """The block after the commit rule and the EOS rule, where the host chooses instead of the engine.

    `first` is the index of the prediction for the block's first token.
    """
    selector = sequence.selector
    policy = sequence.settings.policy
    mask = sequence.model.mask_id
    masked = [i for i, token in enumerate(block) if token == mask]
    rows = np.array(masked) + first
    confidence = prediction.confidence
    if prediction.logits is None or selector.plain:
        tokens: list[int] = prediction.token[rows].tolist()
    else:
        known = len(sequence.prompt) + len(sequence.tokens) - sequence.length  # of the block, emitted already
        chances: list[float] | None = None if sequence.planner is None else []
        chosen = selector.propose(prediction, block[known:], range(first + known, first + len(block)), chances)
        tokens = [chosen[i - known] for i in masked]
        if chances is not None:
            confidence = np.array([*confidence[: first + known], *chances], np.float32)
        elif not policy.everything or sequence.settings.confidences:
            confidence = confidence.copy()
            confidence[rows] = probability(prediction.logits[rows], tokens, mask)
    entropy = entropies(prediction.logits[rows], mask) if policy.by_entropy and prediction.logits is not None else None
    after = list(block)
    for i in policy.commits(confidence[rows], entropy, passes):
        after[masked[i]] = tokens[i]
    return _commit(sequence, block, after, confidence, first=first)


def _commit(sequence: Sequence, block: list[int], after: list[int], confidence: np.ndarray, *, first: int) -> list[int]:
    """Record what the pass has committed; returns the block closed after an EOS."""
    filling = sequence.outcome.filling = Filling(sequence.length, block, after, first)
    sequence.outcome.confidence = confidence
    if sequence.settings.confidences:
        answer_start = sequence.length - len(sequence.prompt)
        for i, _ in filling.filled(sequence.model.mask_id):
            sequence.confidences[answer_start + i] = float(confidence[first + i])
    return sequence.close_after_eos(after)


def _emit_seed(sequence: Sequence, prediction: Prediction) -> bool:
    """Emit the causal model's token that begins a block; returns whether the request has finished."""
    forced = sequence.selector.forced() is not None
    token = sequence.take(prediction, 0)
    if sequence.settings.confidences:
        if forced:
            sequence.confidences.append(None)
        elif prediction.logits is None:
            sequence.confidences.append(float(prediction.confidence[0]))
        else:
            sequence.confidences.append(float(probability(prediction.logits[:1], [token], sequence.model.mask_id)[0]))
    return sequence.finish is not None
