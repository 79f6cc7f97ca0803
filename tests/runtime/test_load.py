"""Plans by how many rows share a forward: drafts where few do, ar where each of many pays for its tokens."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stand_ins.timed_engine import timed
from stand_ins.toy_engine import PagedToyEngine, toy

import nemodiff
from nemodiff.runtime.batching.batch import Batch
from nemodiff.runtime.engines.torch.flat import graph_shapes
from nemodiff.runtime.generate import decode
from nemodiff.runtime.planning.ahead_size import FORWARDS
from nemodiff.runtime.planning.cost import SIZES, CostCurve
from nemodiff.runtime.planning.draft_planner import AcceptanceStatistics, DraftPlanner, ExactMode, Plan
from nemodiff.runtime.planning.draft_statistics import BLOCKS
from nemodiff.runtime.planning.pass_costs import Load, PassCosts
from nemodiff.runtime.requests.options import make_options
from nemodiff.runtime.requests.prepare import prepare

EVERY: tuple[ExactMode, ...] = ("ar", "linear_spec", "quadratic_spec")
CHOICES: list[dict[str, Any]] = [
    {"mode": "linear_spec", "block_length": "auto"},
    {"mode": "quadratic_spec", "block_length": "auto"},
    {"mode": "quadratic_spec", "block_length": 8},
    {"mode": "auto"},
]
FREE, EACH_PAID = CostCurve((1, 512), (1.0, 1.0)), CostCurve((1, 512), (40.0, 551.0))
# Of the 8B shape in bf16 on one H200, in microseconds (benchmarks/results/gpu_h200.md).
H200 = CostCurve(SIZES, (5234, 5260, 5270, 5617, 5694, 5828, 5828, 5899, 6306, 8573, 10143, 17609))
# In milliseconds of one thread, of tiny-chat-2.
CPU = CostCurve(SIZES, (0.41, 0.55, 0.58, 0.68, 0.83, 1.08, 1.42, 1.83, 3.5, 6.6, 13.1, 26.3))
HARD = 0.115  # share of positions at which a draft is right every other time: published acceptance in blocks of 32


def load_of(rows: int) -> Load:
    load = Load()
    load.take(rows)
    return load


def fed(curve: CostCurve, modes: tuple[ExactMode, ...], emitted: int = 8) -> DraftPlanner:
    """A planner whose engine has met drafts of 32 tokens, of which this many were emitted."""
    planner = DraftPlanner(PassCosts(curve), AcceptanceStatistics(), modes)
    for mode in modes[-2:]:
        planner._taken = Plan(mode, 32)
        for _ in range(40 if mode != "ar" else 0):
            planner.learn(32, emitted)
        planner._engine.of[mode].blocks.clear()
    return DraftPlanner(planner.costs, planner._engine, modes)


def rates_of(planner: DraftPlanner, rows: int) -> dict[Plan, float]:
    planner._rows = rows
    planner._take_in()
    return planner._rates()


def best(planner: DraftPlanner, rows: int) -> Plan:
    rates = rates_of(planner, rows)
    return max(rates, key=rates.__getitem__)


@pytest.mark.parametrize("rows", [1, 4, 64])
def test_a_row_pays_its_part_of_a_forward(rows: int) -> None:
    costs = PassCosts(EACH_PAID)
    for size in (1, 4, 32, 100):
        assert costs.share(rows).seconds(size) == pytest.approx(EACH_PAID.seconds(rows * size) / rows)
    assert costs.share(rows) is costs.share(rows)
    before = costs.share(rows)
    for _ in range(64):
        costs.learn(32, 400.0)
    assert costs.share(rows) is not before  # follows what has been learned


def test_the_load_is_rounded_so_that_plans_last() -> None:
    assert [load_of(rows).rows for rows in (0, 1, 2, 3, 5, 6, 11, 12, 48, 64, 90)] == [
        1,
        1,
        2,
        4,
        4,
        8,
        8,
        16,
        64,
        64,
        64,
    ]


@pytest.mark.parametrize("modes", [("linear_spec",), ("quadratic_spec",), EVERY])
def test_where_tokens_are_free_the_load_changes_nothing(modes: tuple[ExactMode, ...]) -> None:
    alone = rates_of(fed(FREE, modes), 1)
    for rows in (2, 16, 64):
        beside = rates_of(fed(FREE, modes), rows)
        assert beside == pytest.approx({plan: rows * rate for plan, rate in alone.items()})


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_the_next_plan_is_made_before_it_is_due(rows: int) -> None:
    """Rows that go on side by side know it at every pass, whatever is learned meanwhile, and so may begin the next."""
    first, rng = fed(H200, EVERY, emitted=4), random.Random(rows)
    planners = [DraftPlanner(first.costs, first._engine, EVERY) for _ in range(rows)]
    load, known, met = load_of(rows), list[Plan | None](), set[Plan]()
    for turn in range(60):
        taken = [planner.plan(load) for planner in planners]
        assert not turn or taken == known
        for planner, plan in zip(planners, taken, strict=True):
            if plan.mode != "ar":
                planner.learn(plan.size, rng.randint(1, plan.size))
            planner.learn_quadratic(plan.size, plan.size, 1) if plan.mode == "quadratic_spec" else None
        known = [planner.next(load) for planner in planners]
        assert len(set(known)) == 1
        met |= {*taken}
    assert len(met) > 1
    assert planners[0].next(load_of(2 * rows)) is None


def test_where_each_token_is_paid_many_rows_take_ar() -> None:
    """One row pays 40 for a pass and 1 a token; of 64 rows each pays less than 1 and 1."""
    planner = fed(EACH_PAID, EVERY, emitted=4)
    assert best(planner, 1).mode != "ar"
    assert best(planner, 64).mode == "ar"
    sizes = [best(fed(H200, ("linear_spec",), emitted=20), rows).size for rows in (1, 4, 16, 64)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]


def test_what_the_host_takes_is_not_shared() -> None:
    planner = fed(EACH_PAID, EVERY, emitted=4)
    for mode in EVERY:
        planner.costs.host.learn(mode, 30.0, 1)  # much of a row's time where 64 share a forward
    assert best(planner, 64).mode != "ar"
    for mode in EVERY:
        planner.costs.host.learn(mode, 0.001, 64)  # what such a forward's rows take is known for itself
    assert best(planner, 64).mode == "ar"


def test_a_plan_is_made_anew_when_the_load_changes() -> None:
    """In the middle of a plan that would stand for longer; rows that come later take the plan of the first."""
    planner = fed(EACH_PAID, EVERY, emitted=4)
    for _ in range(100):
        planner.plan(load_of(1))
    made = planner._engine.standing[EVERY, BLOCKS]
    others = [DraftPlanner(planner.costs, planner._engine, EVERY) for _ in range(15)]
    modes = [row.plan(load_of(16)).mode for row in (planner, *others)]
    standing = planner._engine.standing[EVERY, BLOCKS]
    assert standing is not made
    assert standing.rows == 16
    assert len(set(modes)) == 1
    assert all(row._standing is standing for row in others)
    assert planner.plan(load_of(1)) is not None
    assert planner._engine.standing[EVERY, BLOCKS].rows == 1


def test_rows_that_wait_for_memory_are_no_load(engine: nemodiff.LoadedEngine) -> None:
    """Of twelve requests there are pages for three at a time."""
    loaded = dataclasses.replace(engine, backend=PagedToyEngine(engine.info, 3))
    batch = Batch(loaded.backend, 12, cost=PassCosts(EACH_PAID))
    sequences = [prepare(loaded, [200 + n] * 20, make_options({"mode": "ar", "max_new_tokens": 24})) for n in range(12)]
    for sequence in sequences:
        batch.add(sequence)
    loads = set[int]()
    while len(batch):
        loads.update(result.sequence.load.rows for result in batch.step())
    assert loads <= {1, 2, 4}
    assert max(loads) > 1
    batch.close()


def test_a_prompt_beside_it_is_no_time_of_the_host(engine: nemodiff.LoadedEngine) -> None:
    """Rows that decode share forwards with prompts, whose time was taken for what a block takes the host."""
    loaded = timed(engine, EACH_PAID, HARD)
    options = make_options({"mode": "auto", "max_new_tokens": 24})
    sequences = [prepare(loaded, [200 + n] * 200, options) for n in range(40)]
    for _ in decode(loaded.backend, sequences, 8, costs=loaded.cost):
        pass
    assert max(map(max, loaded.cost.host._kept.values()), default=0.0) < 1e-6


def test_padding_counts_against_a_mode_whose_rows_differ() -> None:
    """A pass of 8 tokens beside one of 64 takes as long as that."""
    factors = list[float]()
    for longest in (16, 64):
        planner, load = fed(EACH_PAID, ("quadratic_spec",)), load_of(4)
        for _ in range(200):
            load.padded = None
            block = planner.plan(load).size
            load.padded = (4 * longest, 4)
            planner.learn_quadratic(block, 16, 6)
        planner._take_in()
        factors.append(max(planner._engine.of["quadratic_spec"].blocks[4].factors()))
        assert planner._engine.of["quadratic_spec"].blocks[1].factors() == [1.0] * len(BLOCKS)  # one alone pads nothing
    assert factors[1] < 0.8 * factors[0]


def rate(engine: nemodiff.LoadedEngine, rows: int, options: dict[str, Any], tokens: int) -> float:
    """Tokens per unit of the engine's time of twice as many answers as rows."""
    made = make_options({**options, "max_new_tokens": tokens})
    prompts = ([200 + i % 500 for i in range(1 + 7 * number % 97)] for number in range(2 * rows))
    sequences = [prepare(engine, prompt, made) for prompt in prompts]
    backend: Any = engine.backend
    before = backend.now
    for _ in decode(backend, sequences, rows, costs=engine.cost):
        pass
    assert all(len(sequence.tokens) == tokens for sequence in sequences)
    return sum(len(sequence.tokens) for sequence in sequences) / (backend.now - before)


@pytest.mark.parametrize(
    ("curve", "paged", "rows"), [*((H200, True, rows) for rows in (1, 4, 16, 64)), (CPU, False, 1), (CPU, False, 4)]
)
def test_auto_follows_the_load(engine: nemodiff.LoadedEngine, curve: CostCurve, paged: bool, rows: int) -> None:
    """It gives what the best fixed mode and block give, at any number of rows."""
    tokens = 256 if rows < 16 else 96
    fixed = [
        {"mode": "ar"},
        *({"mode": "linear_spec", "block_length": block} for block in (8, 16, 32)),
        *({"mode": "quadratic_spec", "block_length": block} for block in (4, 8, 16, 32)),
    ]
    rates = [rate(timed(engine, curve, HARD, paged=paged), rows, options, tokens) for options in fixed]
    planned = timed(engine, curve, HARD, paged=paged)
    got = [rate(planned, rows, {"mode": "auto"}, tokens) for _ in range(5)]
    assert got[0] > 0.85 * max(rates)  # while it learns
    assert sum(got[1:]) / 4 > 0.95 * max(rates)  # in one of which the other mode may be tried


@pytest.mark.parametrize("curve", [FREE, EACH_PAID, H200], ids=["free", "each paid", "H200"])
@pytest.mark.parametrize("kind", ["side by side", "pages"])
def test_answers_stay_ars_while_the_load_changes(engine: nemodiff.LoadedEngine, kind: str, curve: CostCurve) -> None:
    """Others come and go in the middle of every answer."""
    make: dict[str, Callable[[], nemodiff.LoadedEngine]] = {
        "side by side": lambda: toy(engine),
        "pages": lambda: dataclasses.replace(engine, backend=PagedToyEngine(engine.info, 60)),
    }
    loaded, plain = make[kind](), toy(engine)
    vars(loaded)["cost"], rng = PassCosts(curve), random.Random(1)
    batch, waiting, met, done = Batch(loaded.backend, 12, cost=loaded.cost), 40, set[int](), 0
    while waiting or len(batch):
        most = rng.choice([1, 2, 5, 12])
        while waiting and len(batch) < most:
            waiting -= 1
            options = {**CHOICES[waiting % len(CHOICES)], "max_new_tokens": rng.randint(20, 60)}
            prompt = [rng.randrange(200, 700) for _ in range(rng.randint(1, 30))]
            batch.add(prepare(loaded, prompt, make_options(options)))
        for result in batch.step():
            assert result.error is None
            sequence = result.sequence
            met.add(sequence.load.rows)
            if sequence.ended:
                limit = sequence.settings.max_new_tokens
                expected = nemodiff.generate(plain, sequence.prompt, mode="ar", max_new_tokens=limit)
                assert sequence.tokens == expected.token_ids
                done += 1
    batch.close()
    assert done == 40
    assert len(met) > 2


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_real_answers_stay_ars_while_the_load_changes(
    engine: nemodiff.LoadedEngine, tmp_path: Path, backend: str
) -> None:
    loaded = engine
    if backend == "torch":
        pytest.importorskip("torch")
        from stand_ins.checkpoints import TINY_CHAT

        from nemodiff.builder.build import Builder

        loaded = nemodiff.load(Builder(TINY_CHAT, tmp_path / "engine", backend="torch").run(), threads=1)
    questions = ["Count from 3 to 9.", "Reverse the list: river glass tiger", "Show the times table of 7 up to 5."]
    alone = {text: nemodiff.generate(loaded, text, mode="ar", max_new_tokens=40).token_ids for text in questions}
    with nemodiff.Scheduler(loaded, rows=8) as scheduler:
        handles = [
            (text, scheduler.submit(text, max_new_tokens=40, **choice))
            for number in range(2)
            for choice in CHOICES
            for text in questions[number:]
        ]
        for text, handle in handles:
            assert handle.result(120).token_ids == alone[text]


@pytest.mark.parametrize(
    ("curve", "sure", "rows", "expected"),
    [
        (H200, 1.0, 1, 32),
        (H200, 0.5, 1, 64),
        (FREE, 0.5, 1, 128),
        (CostCurve((1, 512), (1.0, 512.0)), 0.5, 1, 8),
        (H200, 1.0, 16, 32),
        (H200, 0.9, 16, 24),
        (H200, 0.5, 64, 4),
    ],
)
def test_passes_begun_ahead_have_the_size_that_promises_most(
    curve: CostCurve, sure: float, rows: int, expected: int
) -> None:
    """A sure draft wants one group behind its 16 heads, an unsure one several; the least where tokens are paid for."""
    choice = load_of(rows).size_of(16)
    assert choice.best(curve) is None  # nothing is known
    for _ in range(20):
        choice.learn([sure] * 15, ((8, 256), (16, 300)))
    assert choice.best(curve) == expected


def test_sizes_follow_the_drafts_of_late() -> None:
    choice = load_of(16).size_of(16)
    for sure, expected in ((1.0, 32), (0.9, 24)):
        for _ in range(80):
            choice.learn([sure] * 15, ((8, 256), (16, 300)))
        assert choice.best(H200) == expected


def test_sizes_are_those_of_graphs() -> None:
    """So all rows together have what a forward computes anyway."""
    assert set(FORWARDS) == {shape.tokens for shape in graph_shapes(2048) if shape.tokens >= 8}
    assert load_of(512).size_of(16).best(H200) is None
    many = load_of(512).size_of(16)
    many.learn([0.9] * 15, ((8, 256),))
    assert many.best(H200) is None  # no graph has as many tokens as that many passes


@pytest.mark.parametrize(("rows", "least", "more"), [(1, 0.97, 1.07), (4, 0.97, 1.05), (16, 0.93, 1.0)])
def test_passes_begun_ahead_bring_what_planned_ones_would(
    engine: nemodiff.LoadedEngine, rows: int, least: float, more: float
) -> None:
    """Against passes for which the card does not wait; where it waits for 0.7 ms as one did, they bring more."""
    for block in (8, 16, 32):
        options = {"mode": "quadratic_spec", "block_length": block}
        tokens = 256 if rows < 16 else 96
        free, ahead, waits = (
            rate(timed(engine, H200, HARD, host=host, ahead=ahead, graphs=True), rows, options, tokens)
            for host, ahead in ((0.0, False), (700.0 / rows, True), (700.0 / rows, False))
        )
        assert ahead > least * free
        assert ahead > more * waits
