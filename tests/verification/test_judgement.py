"""What is judged without running a model: what a pass may see, and which of its predictions rounding explains."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nemodiff.runtime.engines.passes import Pass, bidirectional, causal
from nemodiff.verification.network import Answer
from nemodiff.verification.recorder import RecordedPass
from nemodiff.verification.rounding import LARGEST, NEAR_TIE, NEAR_TIE_UNSEEN
from nemodiff.verification.script import Script, Slots
from nemodiff.verification.verdict import Kind, Tally, Verdict, commit_error, is_near_tie, judge

TEXT = [10, 11, 12, 13, 14, 15]
MASK = 9
BLOCK = bidirectional("draft", [14, MASK, MASK], 4, 0.0)  # after the first four tokens of the text

GROUPS = BLOCK._replace(  # a head and two groups of one mask for the place behind it
    pos=np.array([4, 5, 5], np.int32), visible=np.array([[5, 0, 0], [5, 5, 6], [5, 6, 7]], np.int32)
)


def seeing(token: int, *visible: int) -> Pass:
    """The block, of which one token sees other slots."""
    changed = BLOCK.visible.copy()
    changed[token] = visible
    return BLOCK._replace(visible=changed)


@pytest.mark.parametrize(
    ("passes", "wrong"),
    [
        ([BLOCK], None),
        ([seeing(1, 2, 2, 7)], None),  # all of it as two intervals
        ([GROUPS], None),
        ([causal("verify", TEXT[4:], 4), causal("decode", [16], 6)], None),
        ([causal("decode", [14], 4), causal("decode", [16], 6)], "begins at slot 6, where slots up to 5"),
        ([BLOCK, causal("decode", [15], 5)], "reads slot 4, which holds K/V of a draft"),
        ([causal("decode", [14], 4)._replace(adapter=True), causal("decode", [15], 5)], "reads slot 4"),
        ([causal("verify", [14, 16], 4), causal("decode", [17], 6)], "reads slot 5"),
        ([causal("verify", [16, 15], 4), causal("decode", [14], 4), causal("decode", [17], 6)], "reads slot 5"),
        ([seeing(0, 3, 0, 0)], "token 0 sees 3 of the 4 tokens before the pass"),
        ([seeing(0, 3, 4, 7)], "token 0 sees 3 of the 4 tokens before the pass"),
        ([seeing(2, 8, 0, 0)], "token 2 sees slots after the pass"),
        ([seeing(2, 4, 4, 8)], "token 2 sees slots after the pass"),
        ([seeing(0, 4, 0, 0)], "token 0 does not see itself"),
        ([BLOCK._replace(pos=BLOCK.pos + np.array([0, 1, 1], np.int32))], "token 0 sees positions"),
        ([seeing(1, 6, 0, 0)], "tokens 0 and 1 do not see the same"),
    ],
)
@pytest.mark.parametrize("offset", [0, 100])
def test_a_pass_sees_all_before_it_and_nothing_else(passes: list[Pass], wrong: str | None, offset: int) -> None:
    slots = Slots(Script(TEXT, offset))
    moved = [p._replace(pos=p.pos + np.int32(offset)) for p in (causal("prefill", TEXT[:4], 0), *passes)]
    *before, last = [slots.add(pass_)[1] for pass_ in moved]
    assert before == [None] * len(before)
    assert last is None if wrong is None else wrong in str(last)


NOISE = 0.01
IDS = np.arange(4)
LOGITS = np.array([1.0, 0.5, 0.0, -1.0])


def recorded(token: int, logits: np.ndarray | None, certainty: float) -> RecordedPass:
    one = np.array([token], np.int32)
    confidence = np.exp([certainty]).astype(np.float32)
    return RecordedPass(causal("decode", [5], 0), one, confidence, one, None if logits is None else logits[None])


def answer(gap: float, total: float = 1.6) -> Answer:
    """Token 0 is best, and token 1 is `gap` below it."""
    logits = np.array([[1.0, 1.0 - gap, 0.0, -1.0]])
    best, noise = np.array([1.0]), np.array([NOISE])
    return Answer(np.array([0]), best, np.array([total]), logits, IDS, noise, {}, {})


def kind(token: int, gap: float, off: float | None, certainty: float = -0.6) -> str:
    """The verdict on a token, where all logits are off by so many times the noise; None where there are none."""
    right = answer(gap)
    logits = None if off is None else right.logits[0] + off * NOISE
    return judge(recorded(token, logits, certainty), 0, right, 0, IDS).kind


def test_a_token_is_nearly_tied_as_far_as_rounding_may_move_its_logit() -> None:
    edge = math.sqrt(2) * NOISE
    assert (kind(0, 0.5, 1.0), kind(0, 0.0, None)) == ("equal", "equal")
    for off, times in ((1.0, NEAR_TIE), (3.0, NEAR_TIE * 3), (0.0, NEAR_TIE * 0.1), (None, NEAR_TIE_UNSEEN)):
        for share, expected in ((0.9, "near_tie"), (1.1, "wrong")):
            gap = share * edge * times
            assert kind(1, gap, off, -0.6 - gap) == expected, (off, share)
            assert is_near_tie(-gap, 0.0, answer(gap), 0, off) == (expected == "near_tie")  # whichever is the better


def test_logits_and_probabilities_may_be_off_as_far_as_rounding_takes_them() -> None:
    assert [kind(0, 0.5, 0.99 * LARGEST), kind(0, 0.5, 1.01 * LARGEST)] == ["equal", "strays"]
    assert kind(0, 0.5, math.nan) == "strays"
    edge = 2 * LARGEST * NOISE
    for sign in (1, -1):
        assert [kind(0, 0.5, 1.0, -0.6 + sign * x * edge) for x in (0.99, 1.01)] == ["equal", "strays"]


def test_without_logits_two_tokens_are_tied_that_have_as_much_of_the_probability() -> None:
    def verdict(total: float, certainty: float) -> str:
        right = answer(math.nan, total)
        return judge(recorded(1, None, certainty), 0, right, 0, IDS).kind

    half = math.log(0.5)
    bound = math.sqrt(2) * NEAR_TIE_UNSEEN * NOISE
    assert verdict(1 - half, half) == "near_tie"
    assert verdict(1 - half, half - 0.9 * bound) == "near_tie"
    assert verdict(1 - half, half - 1.1 * bound) == "wrong"
    assert verdict(1 - (half + 1.1 * bound), half + 1.1 * bound) == "wrong"  # no two have more than half


def test_many_positions_together_may_be_off_by_less_than_one() -> None:
    def tally(count: int, deviation: float) -> Tally:
        made = Tally()
        for _ in range(count):
            made.add(Verdict("equal", deviation))
        return made

    assert [tally(1, 30.0).ok, tally(1, 35.0).ok] == [True, False]
    assert [tally(1000, 2.5).ok, tally(1000, 3.5).ok] == [True, False]
    assert (tally(1, math.nan).ok, tally(0, 0.0).ok) == (False, True)
    assert math.isfinite(tally(1, math.nan).largest)  # JSON has no other number
    verdict: Kind
    for verdict, fine in (("near_tie", True), ("wrong", False), ("strays", False)):
        made = tally(9, 0.1)
        made.add(Verdict(verdict, 0.3))
        assert (made.ok, made.positions, made.equal, made.near_ties) == (fine, 10, 9, fine)
        assert made.largest == 0.3


@pytest.mark.parametrize(
    ("next_ids", "wrong"),
    [
        ([14, 21, MASK], None),
        ([14, MASK, MASK], f"commits {MASK} at 1, where the rule gives 21"),  # the surest is always taken
        ([14, 21, 22], f"commits 22 at 2, where the rule gives {MASK}"),
        ([20, 21, MASK], "commits 20 at 0, where the rule gives 14"),
    ],
)
def test_a_commit_follows_the_rule(next_ids: list[int], wrong: str | None) -> None:
    make: Callable[..., Any] = lambda *values: np.array(values, np.int32)  # noqa: E731
    confidence = np.array([0.99, 0.5, 0.4], np.float32)
    pass_ = BLOCK._replace(threshold=0.6)
    assert commit_error(RecordedPass(pass_, make(20, 21, 22), confidence, make(*next_ids), None), MASK) == wrong
    if wrong is None:
        sure = RecordedPass(pass_._replace(threshold=0.4), make(20, 21, 22), confidence, make(14, 21, 22), None)
        assert commit_error(sure, MASK) is None  # 0.4 of f32 reaches its threshold
