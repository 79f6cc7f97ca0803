"""Whether what an engine has predicted is right, a near tie, or wrong."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple

import numpy as np

from .network import Answer
from .recorder import RecordedPass
from .rounding import LARGEST, NEAR_TIE, NEAR_TIE_UNSEEN, usual_bound

_LEAST = 0.1  # of a deviation: the logits that are compared may all be small, and a large one is rounded more
_ENDLESS = 1e30  # stands for a deviation that is no number, so that the record is JSON
Kind = Literal["equal", "near_tie", "wrong", "strays"]


@dataclasses.dataclass
class Tally:
    """Positions by verdict.

    strays: right or nearly tied tokens whose logits or confidence are farther off than rounding takes them. largest,
    squares: the largest deviation of logits, in multiples of what rounding does, and the sum of all their squares.
    """

    equal: int = 0
    near_ties: int = 0
    wrong: int = 0
    strays: int = 0
    largest: float = 0.0
    squares: float = 0.0

    @property
    def positions(self) -> int:
        """How many were judged."""
        return self.equal + self.near_ties + self.wrong + self.strays

    @property
    def usual(self) -> float:
        """Root mean square of the deviations."""
        return math.sqrt(self.squares / max(self.positions, 1))

    @property
    def drifts(self) -> bool:
        """Whether the positions together are farther off than rounding takes them, though each may be within it."""
        return not self.usual <= usual_bound(self.positions)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.wrong and not self.strays and not self.drifts

    def add(self, verdict: Verdict) -> None:
        """Count one position."""
        self.equal += verdict.kind == "equal"
        self.near_ties += verdict.kind == "near_tie"
        self.wrong += verdict.kind == "wrong"
        self.strays += verdict.kind == "strays"
        deviation = min(verdict.deviation, _ENDLESS) if math.isfinite(verdict.deviation) else _ENDLESS
        self.largest = max(self.largest, deviation)
        self.squares += deviation**2


class Verdict(NamedTuple):
    """Of one position."""

    kind: Kind
    deviation: float  # of its logits, in multiples of what rounding does
    reason: str = ""


def judge(recorded: RecordedPass, index: int, answer: Answer, place: int, columns: np.ndarray) -> Verdict:
    """The verdict on prediction `index` of a pass, whose answer is at `place`."""
    token = int(recorded.token[index])
    noise = usual_noise(answer, place)
    seen = None
    if recorded.logits is not None:
        right = answer.logits[place, np.searchsorted(answer.ids, columns)]
        seen = float(np.sqrt(np.square(recorded.logits[index] - right).mean())) / noise
    deviation = seen or 0.0
    expected = int(answer.token[place])
    gap = answer.best[place] - answer.logit(place, token)
    certainty = math.log(max(float(recorded.confidence[index]), 1e-30))
    if token != expected and not is_near_tie(gap, certainty, answer, place, seen):
        return Verdict("wrong", deviation, f"token {token} where {expected} is best by {gap:.3g} in logits")
    if not deviation <= LARGEST:  # nan too
        return Verdict("strays", deviation, f"logits are off by {deviation:.3g} times what rounding does")
    right_certainty = answer.best[place] - (0 if math.isnan(gap) else gap) - answer.total[place]
    off = abs(certainty - right_certainty)
    if not off <= 2 * LARGEST * noise + 1e-5:  # of the chosen logit and of the sum over all; and of f32's exp and log
        return Verdict(
            "strays",
            deviation,
            f"its probability is off by a factor of {math.exp(min(off, 700)):.6g}",
        )
    return Verdict("equal" if token == expected else "near_tie", deviation)


def is_near_tie(gap: float, certainty: float, answer: Answer, place: int, deviation: float | None = None) -> bool:
    """Whether rounding may make another token the best one that is `gap` below it in logits.

    deviation: that of the position's logits, in multiples of the noise, if it is known.
    """
    moved = NEAR_TIE_UNSEEN if deviation is None else NEAR_TIE * min(max(deviation, _LEAST), LARGEST)
    bound = math.sqrt(2) * moved * usual_noise(answer, place)
    if not math.isnan(gap):
        return bool(abs(gap) <= bound)
    # Without logits: each of two tied tokens has half of the probability or less, and as much as the other.
    right = float(answer.best[place] - answer.total[place])
    return max(certainty, right) <= math.log(0.5) + bound and abs(certainty - right) <= bound


def usual_noise(answer: Answer, place: int) -> float:
    """What rounding does to logits at a place, at least what it does on average."""
    return float(max(answer.noise[place], np.sqrt(np.square(answer.noise).mean()), 1e-30))


def commit_error(recorded: RecordedPass, mask_id: int) -> str | None:
    """What a pass has committed against the rule, by its own tokens and confidences."""
    ids = recorded.pass_.ids[recorded.pass_.predicted]
    is_open = ids == mask_id
    chosen = is_open & (recorded.confidence >= np.float32(recorded.pass_.threshold))
    if is_open.any():
        chosen[np.where(is_open, recorded.confidence, -1).argmax()] = True
    expected = np.where(chosen, recorded.token, ids)
    if np.array_equal(recorded.next_ids, expected):
        return None
    at = int(np.flatnonzero(recorded.next_ids != expected)[0])
    return f"commits {recorded.next_ids[at]} at {at}, where the rule gives {expected[at]}"
