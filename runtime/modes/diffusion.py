"""Block diffusion: a block of masks is denoised in parallel and committed by confidence; see docs/semantics.md."""

from __future__ import annotations

import collections
from collections.abc import Generator

import numpy as np

from ...errors import EngineError
from ..engines.passes import Following, Pass, PassKind, Prediction, bidirectional, causal, with_masks
from ..requests.outcome import Filling
from ..requests.sequence import Sequence
from ..sampling.softmax import entropies, probability
from .ar import Follower, Loop, prefill

_RECENT = 16  # passes by which the next ones are judged
_ENOUGH = 2  # of them, if all have done the same


def diffusion(sequence: Sequence) -> Loop:
    """Decode block by block; emits the decided start of the block after each pass.

    K/V of the denoise passes are useless afterwards, since bidirectional attention changes every layer above the first;
    one causal pass per block writes those that stay.
    """
    settings = sequence.settings
    selector = sequence.selector
    mask = sequence.model.mask_id
    size = settings.block_length
    pace = _Pace() if selector.as_predicted and settings.policy.by_engine else None
    prediction = yield from prefill(sequence, None if pace is None else _first)
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
            left, begins = block.count(mask), passes == 0
            if pace is not None:
                sequence.follower = pace.guess(left, begins)
            block = yield from denoise(sequence, "denoise", block, begins=begins, passes=passes)
            if pace is not None:
                pace.learn(left, block.count(mask), begins)
            passes += 1
        merged = settings.merge_commit
        sequence.follower = None if pace is None or merged else _first
        prediction = yield _commit_pass(sequence, block, sequence.length)
        sequence.length += size


class _Pace:
    """How many masks the last passes of a request have decided: those that begin a block, and others."""

    def __init__(self) -> None:
        self._passes = {begins: collections.deque[tuple[int, int]](maxlen=_RECENT) for begins in (True, False)}

    def learn(self, masks: int, left: int, begins: bool) -> None:
        """Take note of a pass over so many masks, and of how many it has left."""
        self._passes[begins].append((masks - left, left))

    def guess(self, masks: int, begins: bool) -> Follower | None:
        """What makes the pass after one over so many masks: it will leave some, or none, if passes go on like that."""
        passes = self._passes[begins]
        if masks == 1:
            return _last
        if passes and masks > max(decided for decided, _ in passes):
            return _next
        if len(passes) >= _ENOUGH and not any(left for _, left in passes):
            return _last
        return None


def _commit_pass(sequence: Sequence, block: list[int], start: int) -> Pass:
    """The pass over a finished block, with the next one's masks where they are merged."""
    commit = causal("commit", block, start, logits=sequence.needs_logits)
    settings = sequence.settings
    return with_masks(commit, len(block), sequence.model.mask_id) if settings.merge_commit else commit


def _first(sequence: Sequence, before: Pass) -> Following | None:
    """A block's first pass, which begins with the token that the pass before the block predicts."""
    if sequence.remaining == 1:
        return None
    start = before.write_at + before.ids.size
    block = [sequence.stand_in, *[sequence.model.mask_id] * (sequence.settings.block_length - 1)]
    if len(block) == 1:
        return Following(_commit_pass(sequence, block, start), "token")
    return Following(over_block(sequence, "denoise", block, start), "token")


def _next(sequence: Sequence, before: Pass) -> Following:
    """The next pass over a block in which masks will be left."""
    ids = [sequence.stand_in] * before.ids.size
    return Following(over_block(sequence, "denoise", ids, before.write_at), "next_ids")


def _last(sequence: Sequence, before: Pass) -> Following | None:
    """The pass after the one that decides a block's last mask."""
    block = before.ids.tolist()
    rest = block[block.index(sequence.model.mask_id) :]
    if len(rest) >= sequence.remaining or not sequence.stops.isdisjoint(rest):
        return None
    return Following(_commit_pass(sequence, [sequence.stand_in] * len(block), before.write_at), "next_ids")


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
