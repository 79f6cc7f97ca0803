"""A sequence while it has a row, and what a forward and a pass of it come to."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from ..engines.passes import Pass, Prediction
from ..modes.ar import Loop
from ..requests.outcome import PassOutcome
from ..requests.sequence import Sequence


class PassResult(NamedTuple):
    """One pass of one sequence. The prediction's arrays are overwritten by the next forward."""

    sequence: Sequence
    pass_: Pass
    prediction: Prediction
    outcome: PassOutcome
    began: float
    seconds: float
    rows: int  # that shared the forward
    error: Exception | None  # why this sequence alone cannot go on


@dataclasses.dataclass
class Counts:
    """What a batch has done so far.

    `padding` are tokens computed for nobody, `preempted` how often a row's pages went to an older request, and
    `rebuilt` the tokens computed again for it.
    """

    steps: int = 0
    forwards: int = 0
    tokens: int = 0
    padding: int = 0
    reused: int = 0
    preempted: int = 0
    rebuilt: int = 0


@dataclasses.dataclass(eq=False)
class Slot:
    """A row of the cache in use by a sequence; the row's own slots, which `reach` counts, have a token's K/V each."""

    sequence: Sequence
    arrival: int
    row: int = 0
    loop: Loop | None = None
    pass_: Pass | None = None  # None: not begun
    reach: int = 0  # slots that a pass has written to
    ended: bool = False
    failure: Exception | None = None  # of making a pass ready, told when what there is of it or the next has run
    built: int | None = None  # tokens computed again of a row whose pages were taken; None: it lacks none
    left_out: bool = False  # of a forward begun ahead, and not in two in a row since

    @property
    def width(self) -> int:
        """Tokens of its usual pass."""
        settings = self.sequence.settings
        return 1 if settings.mode == "ar" else settings.block_length

    @property
    def runs(self) -> bool:
        """Whether it has begun and waits for no memory."""
        return self.pass_ is not None and self.built is None

    @property
    def decodes(self) -> bool:
        """Whether it wants a pass that is no part of a prompt."""
        return self.pass_ is not None and self.pass_.kind != "prefill" and self.built is None

    @property
    def next_pass(self) -> Pass:
        """What its loop wants, once it has begun."""
        assert self.pass_ is not None
        return self.pass_

    @property
    def size(self) -> int:
        """Tokens of its next pass."""
        return int(self.next_pass.ids.size)

    @property
    def held(self) -> list[int]:
        """The ids whose K/V its row holds, those of images by their content."""
        if self.failure is not None:
            return []  # it may lack some of what its sequence has committed
        sequence = self.sequence
        length = sequence.length if self.built is None else self.built
        if length <= len(sequence.keys):
            return sequence.keys[:length]
        return (sequence.keys + sequence.tokens)[:length]


def committed(sequence: Sequence) -> list[int]:
    """The ids whose K/V every next pass of a sequence relies on."""
    return (sequence.prompt + sequence.tokens)[: sequence.length]


class Forward(NamedTuple):
    """A forward that has ended."""

    slots: list[Slot]
    passes: list[Pass]
    predictions: list[Prediction]
    began: float
    seconds: float
    rows: int
