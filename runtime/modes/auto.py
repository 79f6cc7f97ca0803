"""Decoding that takes, pass by pass, the exact mode that promises the most tokens per second.

See docs/semantics.md. The surprising fact: nothing is carried from one mode to another but the committed length, so a
request may change its mode between any two emitted tokens; only a draft that a quadratic pass has made is lost.
"""

from __future__ import annotations

from ..engines.engine import causal
from ..requests.sequence import Sequence
from .ar import Loop, prefill
from .linear_spec import draft_and_verify
from .quadratic_spec import Draft, prefill_and_draft, proposals, verify_and_draft


def auto(sequence: Sequence) -> Loop:
    """Decode as ar, linear_spec or quadratic_spec, whichever is planned; the output is AR's, token for token."""
    selector, draft, size = sequence.selector, Draft([], []), 0
    if sequence.plan() == "quadratic_spec":
        prediction, size = yield from prefill_and_draft(sequence)
    else:
        prediction = yield from prefill(sequence)
    if sequence.emit(selector.next(prediction, 0)):
        return
    if size:
        draft = proposals(sequence, prediction, 1, size)
    while not sequence.finish:
        mode = sequence.plan()
        if mode == "quadratic_spec":
            draft = yield from verify_and_draft(sequence, draft)
            continue
        draft = Draft([], [])
        if mode == "linear_spec":
            yield from draft_and_verify(sequence)
        else:
            prediction = yield causal("decode", sequence.tokens[-1:], sequence.length, logits=not selector.plain)
            sequence.length += 1
            sequence.emit(selector.next(prediction, 0))
