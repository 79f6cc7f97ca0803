"""Decoding that takes, pass by pass, the exact mode that promises the most tokens per second; see docs/semantics.md."""

from __future__ import annotations

from ..engines.passes import Following, Pass, causal
from ..requests.outcome import Draft
from ..requests.sequence import Sequence
from .ar import Follower, Loop, over_last, prefill
from .linear_spec import draft_again, draft_and_verify
from .quadratic_spec import group_again, prefill_and_draft, propose, verify_and_draft


def auto(sequence: Sequence) -> Loop:
    """Decode as ar, linear_spec or quadratic_spec, whichever is planned; the output is AR's, token for token.

    Modes share nothing but the committed length, so they may change between any two emitted tokens; only a draft that
    a quadratic pass has made is lost.
    """
    group = 0
    if sequence.plan() == "quadratic_spec":
        prediction, group = yield from prefill_and_draft(sequence)
    else:
        prediction = yield from prefill(sequence)
    sequence.take(prediction, 0)
    if sequence.finish:
        return
    draft = propose(sequence, prediction, 1, group) if group else Draft([], [])
    while not sequence.finish:
        mode = sequence.plan()
        if mode == "quadratic_spec":
            draft = yield from verify_and_draft(sequence, draft, _begin_again)
            continue
        draft = Draft([], [])
        if mode == "linear_spec":
            yield from draft_and_verify(sequence, _begin_again)
        else:
            sequence.follower = _begin_again(sequence, 1)
            prediction = yield over_last(sequence)
            sequence.length += 1
            sequence.take(prediction, 0)


def _begin_again(sequence: Sequence, most: int) -> Follower | None:
    """What makes the first pass of the next plan, if that is known, after one that emits `most` tokens at most."""
    mode, _ = sequence.next_plan()
    if mode == "linear_spec":
        return draft_again(sequence, most)
    if mode == "quadratic_spec":
        return group_again(sequence, most)
    return _over_accepted if mode and sequence.selector.as_predicted and sequence.remaining > most else None


def _over_accepted(sequence: Sequence, before: Pass) -> Following:
    """The pass over the last token that is accepted."""
    return Following(causal("decode", [sequence.stand_in], before.write_at), "accepted")
