"""Planned quadratic_spec: the heads and groups of a pass by what a draft promises and by what its time is worth."""

from __future__ import annotations

from typing import Any

import pytest
from stand_ins.timed_engine import TimedEngine, timed

import nemodiff
from nemodiff.runtime.generate import decode
from nemodiff.runtime.planning.cost import CostCurve
from nemodiff.runtime.planning.draft_planner import AcceptanceStatistics, DraftPlanner, Plan
from nemodiff.runtime.planning.draft_statistics import BLOCKS
from nemodiff.runtime.planning.pass_costs import PassCosts
from nemodiff.runtime.requests.options import make_options
from nemodiff.runtime.requests.prepare import prepare

PLANNED: dict[str, Any] = {"mode": "quadratic_spec", "block_length": "auto"}
AUTO: dict[str, Any] = {"mode": "auto"}
# In milliseconds of one thread, of tiny-chat, and of a machine where the first 64 tokens cost next to nothing.
CPU = CostCurve((1, 2, 4, 8, 16, 32, 64, 128, 256, 512), (0.63, 0.75, 0.9, 1.1, 1.45, 2.2, 4.1, 7.9, 15.5, 31.0))
FLAT = CostCurve((1, 64, 512), (5.0, 5.5, 20.0))


def fed(curve: CostCurve, emitted: int, size: int = 32) -> DraftPlanner:
    """A planner, asked once, whose engine has met drafts of this size, of which this many tokens were emitted."""
    planner = DraftPlanner(PassCosts(curve), AcceptanceStatistics(), ("quadratic_spec",))
    planner._taken = Plan("quadratic_spec", size)
    for _ in range(40):
        planner.learn(size, emitted)
        planner.learn_quadratic(size, 2 * size, emitted)
    planner.plan()
    return planner


def test_a_group_is_the_longer_the_surer_it_is_needed() -> None:
    planner = fed(CPU, 10)
    sizes = [
        planner.grouping([chance], 1.0, 400).groups.get(1, 0) for chance in (0.05, 0.4, 0.7, 0.95)
    ]  # 1: nothing is kept
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1] == 0
    heads, groups = planner.grouping([0.99] * 3, 0.0, 400)
    assert heads == 4
    assert max(groups) == 4
    assert set(groups.values()) <= set(BLOCKS)


def test_no_group_follows_the_end_of_an_answer() -> None:
    planner = fed(CPU, 10)
    assert 6 in planner.grouping([0.99] * 5, 0.0, 400).groups
    assert 6 not in planner.grouping([0.99] * 5, 0.99, 400).groups
    heads, groups = planner.grouping([0.99] * 5, 0.0, 4)
    assert heads == 4
    assert not groups  # the limit is an end too
    assert all(accepted + masks <= 7 for accepted, masks in planner.grouping([0.99] * 5, 0.0, 7).groups.items())


def test_where_drafts_fare_badly_a_pass_has_one_token_and_seldom_a_short_group() -> None:
    planner = fed(CPU, 1)
    passes = [planner.grouping([], 0.0, 400) for _ in range(200)]
    assert {one.heads for one in passes} == {1}
    assert [one.groups for one in passes if one.groups] == [{1: 4}] * 6  # one of 32 passes


def test_a_pass_has_no_more_tokens_than_an_engine_takes() -> None:
    planner = fed(CostCurve((1, 512), (1.0, 1.0)), 2)
    grouping = planner.grouping([0.9] * 63, 0.0, 4000)
    assert grouping.heads == 64
    assert 400 < grouping.tokens <= 512


def answer(engine: nemodiff.LoadedEngine, options: dict[str, Any], tokens: int) -> tuple[float, int]:
    """Tokens per millisecond of the engine's time, and the number of passes, of one answer."""
    backend: Any = engine.backend
    sequence = prepare(engine, list(range(200, 220)), make_options({**options, "max_new_tokens": tokens}))
    before = backend.decoding
    passes = sum(1 for _ in decode(backend, [sequence], 1, costs=engine.cost)) - 1
    return tokens / (backend.decoding - before), passes


def best_fixed(engine: nemodiff.LoadedEngine, curve: CostCurve, hard: float, tokens: int) -> float:
    blocks = ({"mode": "quadratic_spec", "block_length": block} for block in BLOCKS)
    return max(answer(timed(engine, curve, hard), fixed, tokens)[0] for fixed in blocks)


@pytest.mark.parametrize("options", [PLANNED, AUTO], ids=["quadratic_spec", "auto"])
def test_a_far_length_is_found_within_some_passes(engine: nemodiff.LoadedEngine, options: dict[str, Any]) -> None:
    """After requests whose drafts were short and bad, where 32 and 64 masks are the best length for those that come."""
    loaded = timed(engine, FLAT, 1.0)
    backend: Any = loaded.backend
    for _ in range(4):
        answer(loaded, options, 200)
    become(backend, timed(engine, FLAT, 0.02).backend, 0)
    assert answer(loaded, options, 200)[1] <= 25
    rates = [answer(loaded, options, 600)[0] for _ in range(3)]
    best = best_fixed(engine, FLAT, 0.02, 600)
    assert rates[0] > 0.8 * best
    assert rates[2] > 0.95 * best


@pytest.mark.parametrize(("options", "least"), [(PLANNED, 0.97), (AUTO, 0.94)], ids=["quadratic_spec", "auto"])
def test_drafts_that_fare_badly_cost_next_to_nothing(
    engine: nemodiff.LoadedEngine, options: dict[str, Any], least: float
) -> None:
    """Half of all drafted tokens are wrong, so ar is the best."""
    loaded = timed(engine, CPU, 1.0)
    ar = answer(timed(engine, CPU, 1.0), {"mode": "ar"}, 400)[0]
    assert all(answer(loaded, options, 400)[0] > least * ar for _ in range(4))


@pytest.mark.parametrize("options", [PLANNED, AUTO], ids=["quadratic_spec", "auto"])
def test_drafts_that_fare_better_later_are_taken_later(engine: nemodiff.LoadedEngine, options: dict[str, Any]) -> None:
    """In the middle of an answer, as in one that comes to a list of numbers."""
    loaded = timed(engine, CPU, 1.0)
    backend: Any = loaded.backend
    become(backend, timed(engine, CPU, 0.1).backend, 620)
    ar = answer(timed(engine, CPU, 1.0), {"mode": "ar"}, 1200)[0]
    assert answer(loaded, options, 1200)[0] > 1.15 * ar


@pytest.mark.parametrize("options", [PLANNED, AUTO], ids=["quadratic_spec", "auto"])
def test_short_answers_find_out_that_drafts_fare_better(engine: nemodiff.LoadedEngine, options: dict[str, Any]) -> None:
    """They are over before a test is due, so their first draft, in the prefill, is always made."""
    loaded = timed(engine, CPU, 1.0)
    for _ in range(12):
        answer(loaded, options, 300)
    become(loaded.backend, timed(engine, CPU, 0.1).backend, 0)  # type: ignore[arg-type]
    ar = answer(timed(engine, CPU, 1.0), {"mode": "ar"}, 40)[0]
    assert all(answer(loaded, options, 40)[0] > 1.3 * ar for _ in range(6))


def become(backend: TimedEngine, other: TimedEngine, first: int) -> None:
    """Let drafts fare as in another engine from this position on."""
    backend.sure[first:] = other.sure[first:]
    backend.drafted[first:] = backend.true[first:] + (other.drafted - other.true)[first:]
