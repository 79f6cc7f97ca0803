"""Quadratic self-speculation: one pass verifies a draft and makes the next one for every way the verdict may fall.

A pass holds the draft's tokens, the heads, as a causal chain, and after them a group of masks for each number of heads
that may be accepted; the group of the number that was accepted is the next draft. Heads come first, so what is kept
lies contiguous in the cache and nothing is moved. See docs/semantics.md.
"""

from __future__ import annotations

import functools
from collections.abc import Generator

import numpy as np

from ...plugins.ops.arrange import MOST_STOPS
from ..engines.grouping import Arrangement, Grouping
from ..engines.passes import Following, Pass, Prediction, causal, every_token, with_masks
from ..planning.ahead_size import most_tokens
from ..requests.outcome import Draft
from ..requests.sequence import Sequence
from .ar import Again, Follower, Loop, prompt_parts


def quadratic_spec(sequence: Sequence) -> Loop:
    """Decode with one pass per cycle; the output is AR's, token for token."""
    sequence.plan()
    prediction, group = yield from prefill_and_draft(sequence)
    sequence.take(prediction, 0)
    if sequence.finish:
        return
    draft = propose(sequence, prediction, 1, group)
    while not sequence.finish:
        sequence.plan()
        draft = yield from verify_and_draft(sequence, draft, group_again)


def verify_and_draft(sequence: Sequence, draft: Draft, again: Again) -> Generator[Pass, Prediction, Draft]:
    """One pass over a draft, which may be empty; returns the next draft. `again` follows where there will be none.

    A group that is left out to save work costs a short next pass and never a wrong token.
    """
    grouping = _planned(sequence, draft)
    heads = [sequence.tokens[-1], *draft.tokens][: grouping.heads]
    if not grouping.groups:
        sequence.follower = again(sequence, grouping.heads)
    elif (ahead := _ahead(sequence, draft, grouping)) is not None:
        sequence.follower = functools.partial(_next, *ahead)
    prediction = yield _pass(sequence, grouping, heads)
    accepted = sequence.verify(prediction, heads[1:], draft.confidence[grouping.heads - 1 :])
    if sequence.planner is not None:
        sequence.planner.learn_quadratic(sequence.block_length, grouping.tokens, accepted)
    if sequence.finish:
        return Draft([], [])
    place = grouping.places.get(accepted)
    return Draft([], []) if place is None else propose(sequence, prediction, *place)


def _pass(sequence: Sequence, grouping: Grouping, heads: list[int]) -> Pass:
    """The pass of a grouping at the sequence's length; it predicts after every token."""
    start, logits = sequence.length, not sequence.selector.plain
    ids, pos, visible, adapter = grouping.inputs(heads, start, sequence.model.mask_id)
    return Pass("verify", ids, pos, start, visible, every_token(ids.size), 0.0, adapter, logits)


def group_again(sequence: Sequence, most: int) -> Follower | None:
    """What makes the pass after one that has no groups and emits `most` tokens at most, if its group is whole."""
    _, size = sequence.next_plan()
    return _without_draft if sequence.selector.as_predicted and 0 < size < sequence.remaining - most else None


def _without_draft(sequence: Sequence, before: Pass) -> Following:
    """The pass over the last token that is accepted, with a group or none."""
    grouping = _plan(sequence, Draft([], []), sequence.remaining - 1, ahead=True)
    return Following(_pass(sequence, grouping, [sequence.stand_in]), "accepted")


def _next(size: int, arrangement: Arrangement, sequence: Sequence, verify: Pass) -> Following:
    """The pass after a verify, about of so many tokens, which follows from that one's results."""
    ids = np.full(size, sequence.stand_in, np.int32)
    return Following(verify._replace(ids=ids, predicted=every_token(size)), arrangement)


def prefill_and_draft(sequence: Sequence) -> Generator[Pass, Prediction, tuple[Prediction, int]]:
    """Write the prompt's K/V; the last part carries masks after it, whose predictions are the first draft.

    Returns the last prediction and the number of masks.
    """
    size = min(sequence.block_length, sequence.remaining)
    group = size if size > 1 else 0  # else no draft is needed
    for part, start in prompt_parts(sequence):
        last = start + len(part) == len(sequence.prompt)
        pass_ = causal("prefill", part, start, logits=last and not sequence.selector.plain)
        if last and group:
            pass_ = with_masks(pass_, group, sequence.model.mask_id, adapter=True)
        prediction = yield pass_
        sequence.length += len(part)
    return prediction, group


def propose(sequence: Sequence, prediction: Prediction, at: int, size: int) -> Draft:
    """The draft of a group of `size` masks whose predictions begin at index `at`, cut at an EOS.

    The group's first position is the causal model's to decide, so the draft begins with the second.
    """
    selector, rows = sequence.selector, range(at + 1, at + size)
    confidence: list[float] = []
    if prediction.logits is None or selector.plain:
        tokens = selector.with_end_of_thinking(prediction.token[at + 1 : at + size].tolist())
    else:
        chances = None if sequence.planner is None else confidence
        tokens = selector.propose(prediction, [sequence.model.mask_id] * len(rows), rows, chances)
    length = sequence.before_stop(tokens)
    confidence = confidence or prediction.confidence[at + 1 : at + size].tolist()
    draft = Draft(tokens[:length], confidence[:length], confidence[length] if length < len(tokens) else 0.0)
    sequence.outcome.draft = draft
    return draft


def _planned(sequence: Sequence, draft: Draft) -> Grouping:
    """What the pass over a draft is to be, or what it is, if it has been begun."""
    return sequence.begun or _plan(sequence, draft, sequence.remaining)


def _ahead(sequence: Sequence, draft: Draft, grouping: Grouping) -> tuple[int, Arrangement] | None:
    """About how many tokens the pass after this one has, and what it follows from, if it may be begun before that."""
    planner, selector = sequence.planner, sequence.selector
    if not sequence.load.ahead or planner is None or not selector.as_predicted or selector.drawn:
        return None
    mode, block = sequence.next_plan()
    if mode not in (None, "quadratic_spec") or block < 2 or len(sequence.stops) > MOST_STOPS:
        return None
    if sequence.remaining <= grouping.heads:  # there may be none
        return None
    choice = sequence.load.size_of(block)
    if draft.tokens and choice.wants_draft():
        choice.learn(draft.confidence, planner.lengths)
    size = choice.best(planner.costs.curve)
    if size is None:
        return None
    stops = tuple(sorted(sequence.stops))
    return size, Arrangement(grouping, planner.lengths, most_tokens(size), stops, sequence.model.mask_id)


def _plan(sequence: Sequence, draft: Draft, remaining: int, *, ahead: bool = False) -> Grouping:
    """All heads and groups, or those that promise the most tokens per second where so many tokens are wanted.

    `ahead`: it is only looked at, or is a guess.
    """
    if sequence.planner is not None:
        return sequence.planner.grouping(draft.confidence, draft.end, remaining, ahead=ahead)
    block, most = sequence.block_length, min(1 + len(draft.tokens), remaining)
    last = min(most, remaining - 2) if block > 1 else 0  # a group has two masks at least
    return Grouping(most, {at: min(block, remaining - at) for at in range(1, last + 1)})
