"""Planned block lengths and modes: always AR's tokens, and the plan that follows from the cost and the acceptance."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nemodiff
from nemodiff.errors import RequestError
from nemodiff.runtime import generate
from nemodiff.runtime.planning.cost import CostCurve
from nemodiff.runtime.planning.draft_planner import AcceptanceStatistics, DraftPlanner, Plan, _Met
from nemodiff.runtime.planning.draft_statistics import BLOCKS
from nemodiff.runtime.planning.pass_costs import PassCosts
from nemodiff.runtime.requests import prepare as request

QUESTIONS = ["Count from 3 to 9.", "Reverse the list: river glass tiger", "Show the times table of 7 up to 5."]
CHOICES = [
    {"mode": "linear_spec", "block_length": "auto"},
    {"mode": "quadratic_spec", "block_length": "auto"},
    {"mode": "auto"},
]
FREE, EACH_PAID = CostCurve((1, 512), (1.0, 1.0)), CostCurve((1, 512), (1.0, 512.0))
MIXED = CostCurve((1, 32), (1.0, 3.0))


@settings(max_examples=25)
@given(
    question=st.sampled_from(QUESTIONS),
    limit=st.integers(1, 60),
    temperature=st.sampled_from([0.0, 1.0]),
    penalty=st.sampled_from([1.0, 1.2]),
    curve=st.sampled_from([FREE, EACH_PAID, MIXED]),
    met=st.lists(st.tuples(st.integers(2, 64), st.integers(1, 64)), max_size=12),
    rows=st.integers(1, 3),
)
def test_every_plan_gives_ars_tokens(
    engine: nemodiff.LoadedEngine,
    question: str,
    limit: int,
    temperature: float,
    penalty: float,
    curve: CostCurve,
    met: list[tuple[int, int]],
    rows: int,
) -> None:
    """Whatever a pass costs, whatever was accepted before, alone or together with others."""
    params = {"temperature": temperature, "repetition_penalty": penalty, "max_new_tokens": limit}
    expected = nemodiff.generate(engine, question, mode="ar", **params).token_ids
    sequences = []
    for choice in CHOICES:
        sequence = request.prepare(engine, question, nemodiff.Options(**choice, **params))  # type: ignore[arg-type]
        record = AcceptanceStatistics()
        for of_mode, (size, emitted) in itertools.product(record.of.values(), met):
            of_mode.add(size, min(size, emitted))
        assert sequence.planner is not None
        sequence.planner = DraftPlanner(PassCosts(curve), record, *sequence.planner._choices)
        sequences.append(sequence)
    for _ in generate.decode(engine.backend, sequences, rows):
        pass
    for sequence in sequences:
        assert sequence.tokens == expected
        plain = sequence.nfe["decode"]
        assert sum(sequence.accepted) + plain == len(expected) - 1  # the seed came from prefill
        assert all(1 <= kept <= seen for kept, seen in zip(sequence.accepted, sequence.verified, strict=True))


def test_a_scheduler_gives_the_same_tokens(engine: nemodiff.LoadedEngine) -> None:
    with nemodiff.Scheduler(engine, rows=4) as scheduler:
        handles = [(q, scheduler.submit(q, max_new_tokens=40, **c)) for q in QUESTIONS for c in CHOICES]
        for question, handle in handles:
            alone = nemodiff.generate(engine, question, mode="ar", max_new_tokens=40)
            assert handle.result(60).token_ids == alone.token_ids


def fed(size: int, emitted: int, modes: tuple[str, ...], curve: CostCurve) -> DraftPlanner:
    planner = DraftPlanner(PassCosts(curve), AcceptanceStatistics(), modes)  # type: ignore[arg-type]
    for mode in modes:
        planner._taken = Plan(mode, size)  # type: ignore[arg-type]
        for _ in range(40 if mode != "ar" else 0):
            planner.learn(size, emitted)
    return planner


def test_the_plan_follows_acceptance_and_cost() -> None:
    spec, every = ("linear_spec",), ("ar", "linear_spec", "quadratic_spec")
    assert fed(64, 64, spec, FREE).plan().size == 64
    assert fed(64, 1, spec, EACH_PAID).plan().size == BLOCKS[0]
    assert fed(32, 8, spec, MIXED).plan().size == 8  # never more than the eighth
    assert fed(64, 1, every, EACH_PAID).plan().mode == "ar"
    assert fed(64, 30, every, FREE).plan().mode == "quadratic_spec"


def test_plans_of_one_token_look_again_at_times() -> None:
    planner = fed(8, 1, ("ar", "linear_spec", "quadratic_spec"), EACH_PAID)
    modes = [planner.plan().mode for _ in range(96)]
    drafts = [at for at, mode in enumerate(modes) if mode == "linear_spec"]
    assert len(drafts) == 2
    assert modes.count("ar") == 94
    assert drafts[1] - drafts[0] > 32


def modes_of(blocks: int, kept: dict[str, int]) -> list[str]:
    """The modes of so many blocks of mode auto, in answers of a dozen, where drafts give this many tokens."""
    costs, met, taken = PassCosts(MIXED), AcceptanceStatistics(), list[str]()
    for number in range(blocks):
        if number % 12 == 0:
            planner = DraftPlanner(costs, met, ("ar", "linear_spec", "quadratic_spec"))
        mode, size = planner.plan()
        taken.append(mode)
        for tokens in {"ar": [1], "linear_spec": [size, size], "quadratic_spec": [2 * size]}[mode]:
            costs.learn(tokens, MIXED.seconds(tokens))
        if mode != "ar":
            planner.learn(size, min(size, kept[mode]))
        if mode == "quadratic_spec":
            planner.learn_quadratic(size, 2 * size, min(size, kept[mode]))
    return taken


def test_a_mode_is_expected_to_draft_as_the_other_does() -> None:
    """Until it has been tried: both fill the same masks."""
    planner = DraftPlanner(PassCosts(MIXED), AcceptanceStatistics(), ("linear_spec", "quadratic_spec"))
    before = planner._expected("linear_spec")[15]
    planner._taken = Plan("quadratic_spec", 16)
    for _ in range(40):
        planner.learn(16, 12)
    planner._take_in()
    assert before == pytest.approx(4.86, abs=0.01)
    assert planner._expected("linear_spec")[15] == pytest.approx(12, abs=0.7)


def test_the_other_mode_is_tried_and_has_an_acceptance_of_its_own() -> None:
    """It is taken once it has been tried where its drafts are the better ones, and else costs next to nothing."""
    assert modes_of(4000, {"linear_spec": 12, "quadratic_spec": 4})[2048:].count("linear_spec") > 1000
    tried = modes_of(6000, {"linear_spec": 2, "quadratic_spec": 4})[3000:].count("linear_spec")
    assert 0 < tried <= 3000 * 8 / 2048 + 8


def test_later_plans_stand_longer() -> None:
    """For all requests that choose among the same modes: in short answers each block would else be planned anew."""
    made = list[object]()

    def rates() -> dict[Plan, float]:
        made.append("made")
        return {Plan("linear_spec", 8): 1.0}

    planner = fed(8, 8, ("linear_spec",), MIXED)
    for times in (1, 2, 4, 8, 8):
        planner._rates = rates  # type: ignore[method-assign]
        for _ in range(times):
            assert planner.plan().size == 8
        made.append("next")
        planner = DraftPlanner(planner.costs, planner._engine, ("linear_spec",))
    assert [entry == "next" for entry in made] == [False, True] * 5


def test_a_length_that_is_known_is_tried_seldom() -> None:
    """What a longer and a shorter block cost is asked for at once, and then hardly ever, for they are not the best."""
    costs = PassCosts(MIXED)
    planner = DraftPlanner(costs, AcceptanceStatistics(), ("linear_spec",))
    sizes = []
    for _ in range(600):
        size = planner.plan().size
        sizes.append(size)
        for _ in range(2):
            costs.learn(size, MIXED.seconds(size))
        planner.learn(size, min(size, 12))
    assert {8, 12, 16} <= set(sizes[:40])
    assert sizes[100:].count(12) > 0.98 * 500


def test_what_verify_leaves_out_counts() -> None:
    """Nothing after a drafted end is looked at, so long drafts at the end of answers are cheaper than their length."""
    planners = [DraftPlanner(PassCosts(MIXED), AcceptanceStatistics(), ("linear_spec",)) for _ in range(2)]
    for planner, looked_at in zip(planners, (32, 4), strict=True):
        planner._taken = Plan("linear_spec", 32)
        for _ in range(60):
            planner.learn(looked_at, 4, ended=looked_at < 32)
        planner._take_in()
    whole, cut = (planner._engine.of["linear_spec"].blocks[1].factors() for planner in planners)
    assert whole == pytest.approx([1.0] * len(BLOCKS), abs=0.02)
    assert 1.2 < cut[BLOCKS.index(32)] < 1.6  # three quarters of the two passes at least, were there none before


def test_what_blocks_gave_counts_beyond_their_positions() -> None:
    """Where some drafts are kept whole and others not at all, a position's chance says too little of a block's."""
    planner = DraftPlanner(PassCosts(MIXED), AcceptanceStatistics(), ("linear_spec",))
    for _ in range(1000):
        for size, emitted in ((12, 12), (16, 8)):
            planner._taken = Plan("linear_spec", size)
            planner.learn(size, emitted)
    planner._take_in()
    expected, factors = (
        planner._engine.of["linear_spec"].expected(planner._own),
        planner._engine.of["linear_spec"].blocks[1].factors(),
    )
    of_12, of_16 = (expected[size - 1] * factors[BLOCKS.index(size)] for size in (12, 16))
    assert expected[15] > expected[11]
    assert of_16 < of_12


def test_a_verify_looks_at_what_is_worth_its_time() -> None:
    """Where every token of a pass costs something, not at what is unlikely; where none does, at all of the draft."""
    confidences = [0.95] * 6 + [0.3] * 9
    looked_at = []
    for curve in (FREE, MIXED, EACH_PAID):
        planner = fed(16, 6, ("linear_spec",), curve)
        planner.plan()
        looked_at.append(planner.worth_verifying(confidences))
    assert looked_at[0] == 15 > looked_at[1] >= 6 >= looked_at[2]


def test_what_a_verify_left_out_is_not_taken_for_kept() -> None:
    """Else drafts would seem the better the less of them is looked at."""
    planner = DraftPlanner(PassCosts(MIXED), AcceptanceStatistics(), ("linear_spec",))
    planner._taken = Plan("linear_spec", 16)
    for _ in range(400):
        planner.learn(5, 5, unseen=[0.1] * 11)
    planner._take_in()
    assert planner._engine.of["linear_spec"].expected(planner._own)[15] == pytest.approx(5.1, abs=0.2)


def test_planned_drafts_are_looked_at_in_part(engine: nemodiff.LoadedEngine) -> None:
    """Only where it pays, so a fixed block is looked at as a whole."""
    looked_at = dict[object, list[int]]()
    for block in ("auto", 16):
        sequence = request.prepare(
            engine, "Count from 1 to 40.", nemodiff.Options(block_length=block, max_new_tokens=60)
        )
        if sequence.planner is not None:
            sequence.planner.costs = PassCosts(EACH_PAID)
            sequence.planner._rates = lambda: {Plan("linear_spec", 16): 8 / 32}  # type: ignore[method-assign]
            sequence.planner._news = lambda best: None  # type: ignore[method-assign]
        for _ in generate.decode(engine.backend, [sequence], 1):
            pass
        looked_at[block] = sequence.verified
    assert looked_at[16] == [16] * 4
    assert min(looked_at["auto"][:-1]) < 16


@pytest.mark.parametrize("choice", [*CHOICES, {"mode": "quadratic_spec", "block_length": 16}], ids=str)
def test_what_a_grammar_leaves_alone_is_a_good_draft(engine: nemodiff.LoadedEngine, choice: dict[str, object]) -> None:
    """The model would never say it, but a verify has the same grammar."""
    pattern = "(Sphinx of black quartz|The five boxing wizards), judge my vow and jump quickly"
    options = nemodiff.Options(**choice, regex=pattern, max_new_tokens=60)  # type: ignore[arg-type]
    sequence = request.prepare(engine, QUESTIONS[0], options)
    costs = PassCosts(CostCurve((1, 64), (1.0, 4.0)))
    if sequence.planner is not None:
        sequence.planner = DraftPlanner(costs, AcceptanceStatistics(), *sequence.planner._choices)
    for _ in generate.decode(engine.backend, [sequence], 1):
        pass
    passes = sum(sequence.nfe.values()) - sequence.nfe["prefill"]
    assert len(sequence.tokens) / passes > 2


def test_what_the_host_takes_counts() -> None:
    """The fewest and cheapest forwards are of no use if the host needs longer for them."""
    planner = fed(32, 8, ("linear_spec", "quadratic_spec"), MIXED)
    assert planner.plan().mode == "quadratic_spec"
    planner = fed(32, 8, ("linear_spec", "quadratic_spec"), MIXED)
    for _ in range(24):
        planner.costs.host.learn("linear_spec", 0.1)
        planner.costs.host.learn("quadratic_spec", 9.0)
    assert planner.plan().mode == "linear_spec"


def test_the_host_is_metered_between_plans() -> None:
    """By the clock from plan to plan, without the forwards; not where another request has come between."""
    now = 0.0
    costs = PassCosts(EACH_PAID, clock=lambda: now)
    planner = DraftPlanner(costs, AcceptanceStatistics(), ("ar", "linear_spec"))
    for _ in range(24):
        passes = 1 if planner.plan().mode == "ar" else 2
        for _ in range(passes):
            costs.learn(1, 1.0)
            now += 1.25
    assert costs.host.seconds("ar") == pytest.approx(0.25)
    for _ in range(24):
        planner.plan()
        for _ in range(3):
            costs.learn(1, 1.0)
            now += 2.0
    assert costs.host.seconds("ar") == pytest.approx(0.25)


def test_what_passes_of_a_mode_take_beyond_their_size_is_the_modes() -> None:
    """Passes of quadratic_spec take longer than the others of as many tokens that the curve is learned from as well."""
    now = 0.0
    costs = PassCosts(EACH_PAID, clock=lambda: now)
    planner = DraftPlanner(costs, AcceptanceStatistics(), ("quadratic_spec",))
    planner._rates = lambda: {Plan("quadratic_spec", 4): 1.0}  # type: ignore[method-assign]
    planner._news = lambda best: None  # type: ignore[method-assign]
    costs.learn(8, costs.curve.seconds(8))
    for _ in range(6):  # before the curve is made anew
        planner.plan()
        planner._standing.left = 0  # type: ignore[union-attr]
        planner._met = _Met(costs.passes, costs.spent, now)
        costs.learn(8, 9.0)
        now += 9.5
    assert costs.host.seconds("quadratic_spec") == pytest.approx(1.5)


def test_expected_tokens_are_the_mean_that_was_met() -> None:
    planner, rng = DraftPlanner(PassCosts(MIXED), AcceptanceStatistics(), ("linear_spec",)), np.random.default_rng(1)
    met = [min(16, int(n)) for n in rng.geometric(0.15, 2000)]
    planner._taken = Plan("linear_spec", 16)
    for emitted in met:
        planner.learn(16, emitted)
    planner._take_in()
    assert abs(planner._engine.of["linear_spec"].expected(planner._own)[15] - np.mean(met)) < 0.5


def test_the_answer_says_what_was_used(engine: nemodiff.LoadedEngine) -> None:
    events = list(nemodiff.stream(engine, QUESTIONS[2], steps=True, mode="auto"))
    answer = events[-1]
    assert isinstance(answer, nemodiff.Generation)
    assert (answer.mode, answer.block_length) == ("auto", "auto")
    assert answer.acceptance.mean is not None
    assert len(answer.acceptance.verified) == answer.nfe["verify"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "diffusion", "block_length": "auto"}, "would then depend on timings"),
        ({"mode": "auto", "block_length": 8}, "mode auto chooses it"),
        ({"mode": "auto", "threshold": 0.5}, "takes one pass"),
        ({"mode": "quadratic_spec", "block_length": "auto", "groups": "all"}, "takes what pays"),
        ({"mode": "auto", "policy": "topk", "per_step": 2}, "mode auto has no such choice"),
        ({"block_length": "longest"}, "allowed: an integer or auto"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    engine: nemodiff.LoadedEngine, options: dict[str, object], words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        nemodiff.generate(engine, "x", **options)
