"""What a decoding loop made of a pass: the tokens it took from the prediction and the drafts it judged or made."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np


class Commit(NamedTuple):
    """A token decided at a position."""

    position: int
    token: int
    prediction_index: int  # of the prediction that decided it, among those of the pass


@dataclasses.dataclass(frozen=True)
class Draft:
    """Proposed tokens after the last emitted one, up to the first EOS, and the probability the draft gave each."""

    tokens: list[int]
    confidence: list[float]


@dataclasses.dataclass(eq=False, slots=True)
class PassOutcome:
    """One pass as its loop leaves it; a prediction itself is never written to.

    emitted: tokens chosen by causal predictions, in order. filled: masks of a block that became tokens.
    """

    emitted: list[Commit] = dataclasses.field(default_factory=list)
    filled: list[Commit] = dataclasses.field(default_factory=list)
    block: tuple[int, int] | None = None  # start and length of the block that the pass began
    block_after: list[int] | None = None  # of a denoise or draft pass: the block as the commit rule left it
    confidence: np.ndarray | None = None  # (R,) f32 where the loop measured its own choices; None: the engine's
    kept: int | None = None  # of a verify: how many drafted tokens it kept
    refused: list[int] = dataclasses.field(default_factory=list)  # and the others, unless the answer ended before them
    draft: Draft | None = None  # the next one, if the pass made one beside what else it did
