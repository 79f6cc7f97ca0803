"""What a decoding loop made of a pass: the tokens it took from the prediction and the drafts it judged or made."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Filling(NamedTuple):
    """A block whose masks were looked at."""

    start: int  # the position of its first token
    before: list[int]
    after: list[int]  # as the commit rule left it
    first: int  # the prediction for its first token, among those of the pass

    def filled(self, mask_id: int) -> list[tuple[int, int]]:
        """The masks that became tokens: the place in the block, and the token."""
        pairs = enumerate(zip(self.before, self.after, strict=True))
        return [(at, new) for at, (old, new) in pairs if old == mask_id != new]


class Draft(NamedTuple):
    """Proposed tokens after the last emitted one, up to the first EOS, and the probability the draft gave each."""

    tokens: list[int]
    confidence: list[float]
    end: float = 0.0  # the probability that it gave an EOS after them


@dataclasses.dataclass(eq=False, slots=True)
class PassOutcome:
    """One pass as its loop leaves it; a prediction itself is never written to.

    It holds what the loop has at hand anyway, and whoever reports it works out the rest: most passes nobody reports.
    """

    emitted: list[int] = dataclasses.field(default_factory=list)  # tokens chosen by the causal predictions 0, 1, ..
    block: tuple[int, int] | None = None  # start and length of the block that the pass began
    filling: Filling | None = None
    confidence: np.ndarray | None = None  # (R,) f32 of what masks became, if the pass filled any
    kept: int | None = None  # of a verify: how many drafted tokens it kept
    refused: Sequence[int] = ()  # and the others, unless the answer ended before them
    draft: Draft | None = None  # the next one, if the pass made one beside what else it did
