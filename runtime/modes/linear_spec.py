"""Linear self-speculation: diffusion drafts a block, the causal pass verifies it; see docs/semantics.md."""

from __future__ import annotations

import functools
from collections.abc import Generator

from ..engines.passes import Following, Pass, Prediction, causal
from ..requests.sequence import Sequence
from .ar import Again, Follower, Loop, prefill
from .diffusion import denoise, over_block


def linear_spec(sequence: Sequence) -> Loop:
    """Decode by draft and verify; the output is AR's, token for token."""
    follows = sequence.planner is None and sequence.selector.as_predicted
    prediction = yield from prefill(sequence, _first if follows else None)
    sequence.take(prediction, 0)
    while not sequence.finish:
        sequence.plan()
        yield from draft_and_verify(sequence, draft_again)


def draft_and_verify(sequence: Sequence, again: Again) -> Generator[Pass, Prediction, None]:
    """One block after the last emitted token; `again` follows it.

    A rejection undoes nothing: the verify pass has written K/V for the whole block, the length advances by what was
    accepted, and the next pass writes over the rest.
    """
    mask, selector, planner = sequence.model.mask_id, sequence.selector, sequence.planner
    # Where passes are begun ahead, a whole verify costs less than the wait for a shorter one.
    whole = selector.plain and sequence.settings.policy.everything and (planner is None or sequence.load.ahead)
    size = min(sequence.block_length, sequence.remaining)
    block = [sequence.tokens[-1], *selector.with_end_of_thinking([mask] * (size - 1))]
    unseen: list[float] = []
    begins = True
    while mask in block:
        if whole:
            sequence.follower = _verify
        block = yield from denoise(sequence, "draft", block, begins=begins)
        begins = False
    block = block[: sequence.before_stop(block) + 1]  # nothing is emitted after an EOS, so nothing is looked at there
    if planner is not None and not whole and sequence.outcome.confidence is not None:
        unseen = sequence.outcome.confidence[1 : len(block)].tolist()
        worth = planner.worth_verifying(unseen)
        block, unseen = block[: worth + 1], unseen[worth:]
    sequence.follower = again(sequence, size)
    prediction = yield causal("verify", block, sequence.length, predict_all=True, logits=not selector.plain)
    sequence.verify(prediction, block[1:], unseen)


def _first(sequence: Sequence, prompt: Pass) -> Following | None:
    """The first pass over the first block, which begins with the token that the prompt's last pass predicts."""
    size = min(sequence.block_length, sequence.remaining - 1)
    start = prompt.write_at + prompt.ids.size
    block = [sequence.stand_in, *[sequence.model.mask_id] * (size - 1)]
    if size > 1:
        return Following(over_block(sequence, "draft", block, start), "token")
    return Following(causal("verify", block, start, predict_all=True), "token") if size else None


def _verify(sequence: Sequence, draft: Pass) -> Following:
    """The verify of a draft that one pass settles; the loop's own may end before, where the draft does."""
    ids = [sequence.stand_in] * draft.ids.size
    return Following(causal("verify", ids, draft.write_at, predict_all=True), "next_ids")


def draft_again(sequence: Sequence, most: int) -> Follower | None:
    """What makes the next block's first draft after a verify that emits `most` tokens at most, if it is a whole one."""
    _, size = sequence.next_plan()
    known = sequence.selector.as_predicted and 1 < size <= sequence.remaining - most
    return functools.partial(_draft, size) if known else None


def _draft(size: int, sequence: Sequence, verify: Pass) -> Following:
    """A draft of `size` tokens, which begins with the last token that the verify accepts."""
    block = [sequence.stand_in, *[sequence.model.mask_id] * (size - 1)]
    return Following(over_block(sequence, "draft", block, verify.write_at), "accepted")
