"""What a scheduler does and has done."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ..engines.passes import PASS_KINDS, PassKind
from ..requests.sequence import Sequence

End = Literal["finished", "cancelled", "failed"]


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What a scheduler does and has done; taken at one moment, while a step may be under way.

    running, waiting: requests now. slots, kept_slots: cache slots in use by them and by kept prefixes, of `capacity`;
    where rows have pages, these and kept_prefixes are of all users of the engine. The rest count from the start:
    requests by their end; tokens of prompts, of these reused, and emitted; passes of ended requests by kind; steps,
    forwards, tokens computed in them, padding beside those, how often a request had to give its pages to an older one,
    and the tokens computed again for it.
    """

    rows: int
    running: int
    waiting: int
    capacity: int
    slots: int
    kept_prefixes: int
    kept_slots: int
    finished: int
    cancelled: int
    failed: int
    prompt_tokens: int
    reused_tokens: int
    emitted_tokens: int
    nfe: dict[PassKind, int]
    steps: int
    forwards: int
    computed_tokens: int
    padding_tokens: int
    preempted: int
    rebuilt_tokens: int


class Ended:
    """Counts of the requests that have ended; whoever changes them holds the worker's lock."""

    def __init__(self) -> None:
        self.ends: dict[End, int] = {"finished": 0, "cancelled": 0, "failed": 0}
        self.emitted = 0
        self.nfe: dict[PassKind, int] = dict.fromkeys(PASS_KINDS, 0)

    def count(self, sequence: Sequence, end: End) -> None:
        """Add a request."""
        self.ends[end] += 1
        self.emitted += len(sequence.tokens)
        for kind, passes in sequence.nfe.items():
            self.nfe[kind] += passes
