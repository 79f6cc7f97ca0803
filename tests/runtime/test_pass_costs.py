"""What passes cost: learned from those that run, whatever the curve to begin with, and kept beside the engine."""

import itertools
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nemodiff
from nemodiff.contract import PREFILL_CHUNK
from nemodiff.engine_folder import CONFIG_FILE, COST_FILE, MANIFEST_FILE, engine_digest
from nemodiff.engine_info import EngineInfo
from nemodiff.runtime import loading
from nemodiff.runtime.engines.onnxruntime.cache import OnnxRuntimeCache
from nemodiff.runtime.engines.passes import Pass, causal
from nemodiff.runtime.modes.quadratic_spec import group_again, verify_and_draft
from nemodiff.runtime.planning.cost import GUESS, SIZES, CostCurve, measure, without_noise
from nemodiff.runtime.planning.draft_planner import AcceptanceStatistics, DraftPlanner
from nemodiff.runtime.planning.draft_statistics import BLOCKS
from nemodiff.runtime.planning.kept_curve import cpu_name, read_curve, write_curve
from nemodiff.runtime.planning.pass_costs import HostCosts, PassCosts
from nemodiff.runtime.requests import prepare as request
from nemodiff.runtime.requests.outcome import Draft

Seconds = Callable[[float], float]
TRUTHS: dict[str, Seconds] = {
    "a CPU": lambda size: 1.0 + 0.085 * size,
    "a slow CPU": lambda size: 0.3 + 0.7 * size,
    "a GPU": lambda size: 1.0 + max(0.0, size - 128) / 128,
}
# How the curve to begin with is wrong. What all sizes share does not matter, so these bend it.
MISTAKES: dict[str, Seconds] = {
    "right": lambda size: 1.0,
    "three times too dear": lambda size: 3.0,
    "three times too cheap": lambda size: 1 / 3,
    "long passes three times too dear": lambda size: 3.0 ** min(1, np.log2(size) / 5),
    "long passes three times too cheap": lambda size: 3.0 ** -min(1, np.log2(size) / 5),
}


def curve(truth: Seconds, mistake: Seconds) -> CostCurve:
    return CostCurve(SIZES, tuple(truth(size) * mistake(size) for size in SIZES))


def noise(rng: np.random.Generator) -> float:
    """Of a machine with other work: a tenth of jitter, and every fifth pass takes up to five times as long."""
    return float(np.exp(rng.normal(0, 0.1)) * (rng.uniform(2, 5) if rng.random() < 0.2 else 1))


@pytest.mark.parametrize("truth", TRUTHS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_curve_is_gone_after_some_dozens_of_passes(truth: str, mistake: str) -> None:
    real, rng = TRUTHS[truth], np.random.default_rng(1)
    costs = PassCosts(curve(real, MISTAKES[mistake]))
    sizes = [1, 3, 8, 16, 32]
    for _ in range(12):
        for size in sizes:
            costs.learn(size, real(size) * noise(rng))
    learned = [costs.curve.seconds(size) / real(size) for size in sizes]
    assert max(learned) / min(learned) < 1.35
    assert list(costs.curve.times) == sorted(costs.curve.times)


def test_neighbouring_sizes_keep_a_cost_of_their_own() -> None:
    """A product takes 12 rows at once, so 13 tokens may cost a good deal more than 12."""
    real = {8: 1.0, 12: 1.0, 16: 1.3, 24: 1.5}
    costs = PassCosts(curve(lambda size: 1.0 + 0.03 * size, MISTAKES["right"]))
    for _ in range(40):
        for size, seconds in real.items():
            costs.learn(size, seconds)
    assert costs.curve.seconds(16) / costs.curve.seconds(12) == pytest.approx(1.3, rel=0.03)


class CachedWeights:
    """A cache whose forwards, after a longer one, take longer until the weights are back in the processor's caches."""

    def __init__(self, info: EngineInfo) -> None:
        self.info = info
        self.now = 0.0
        self._before = 1.0

    def clock(self) -> float:
        return self.now

    def open(self, rows: int) -> "CachedWeights":
        assert rows == 1
        return self

    def forward(self, passes: list[Pass], first: int = 0) -> None:
        size = passes[0].ids.size
        self._before = max(size, 0.7 * self._before)
        self.now += TRUTHS["a CPU"](size) * (self._before / size) ** 0.25

    def close(self) -> None:
        assert self.now


def test_a_measured_curve_is_of_passes_among_others_of_their_size(engine: nemodiff.LoadedEngine) -> None:
    """And so is what is learned, of which the truncated verifies of long drafts are no part."""
    cached = CachedWeights(engine.info)
    measured = measure(cached, limit=2.0)  # type: ignore[arg-type]
    assert measured is not None
    for size in (1, 4, 12, 32):
        assert measured.seconds(size) == pytest.approx(TRUTHS["a CPU"](size), rel=0.3)
    costs = PassCosts(curve(TRUTHS["a CPU"], MISTAKES["right"]))
    for size in (24, 4, 12, 12) * 30:
        before = cached.now
        cached.forward([causal("verify", [1] * size, 0, predict_all=True)])
        costs.learn(size, cached.now - before)
    assert costs.curve.seconds(4) / costs.curve.seconds(24) < 1.15 * measured.seconds(4) / measured.seconds(24)


def test_no_answer_waits_for_the_curve_of_a_slow_engine(engine: nemodiff.LoadedEngine) -> None:
    """Both passes of one token that it takes to see that are all there is; a guess is where plans begin then."""
    slow = CachedWeights(engine.info)
    assert measure(slow, limit=1.0) is None  # type: ignore[arg-type]
    assert slow.now == pytest.approx(2 * TRUTHS["a CPU"](1))
    loaded = nemodiff.LoadedEngine(engine.folder, slow, engine.text, 0.0)  # type: ignore[arg-type]
    assert loaded.cost.curve == GUESS


def test_sizes_far_apart_are_learned_together() -> None:
    costs = PassCosts(curve(TRUTHS["a CPU"], MISTAKES["right"]))
    for _ in range(40):
        for size in (1, 2**16):
            costs.learn(size, 2 * TRUTHS["a CPU"](size))
    assert costs.curve.seconds(1) == pytest.approx(2 * TRUTHS["a CPU"](1), rel=0.1)
    assert np.isfinite(costs.curve.times).all()


def test_interruptions_do_not_make_long_passes_dear() -> None:
    """Other work meets a pass the likelier the longer it is: nearly all long ones, few short ones."""
    real, rng = TRUTHS["a CPU"], np.random.default_rng(1)
    costs = PassCosts(curve(real, MISTAKES["right"]))
    for _ in range(40):
        for size in (1, 4, 8, 16, 32):
            interruptions = rng.poisson(0.25 * real(size))
            costs.learn(size, real(size) + float(rng.exponential(6.0, interruptions).sum()))
    learned = [costs.curve.seconds(size) / real(size) for size in (1, 4, 8, 16, 32)]
    assert max(learned) / min(learned) < 1.35


def test_a_single_figure_of_the_host_is_not_believed_where_others_are_less() -> None:
    host = HostCosts()
    host.learn("linear_spec", 1.0, 1)
    for _ in range(3):
        host.learn("linear_spec", 50.0, 8)
        assert host.seconds("linear_spec", 8) == 1.0
    host.learn("linear_spec", 50.0, 8)
    assert host.seconds("linear_spec", 8) == 50.0


def test_one_slow_turn_of_the_host_changes_nothing() -> None:
    """Of up to three figures the least counts, and later what the quicker ones of the last dozen say."""
    host = HostCosts()
    for turn in range(60):
        host.learn("ar", 50.0 if turn % 12 == 0 and turn else 1.0)
        assert host.seconds("ar") == 1.0


def test_what_the_host_takes_is_asked_for_while_others_learn_it() -> None:
    """Batches in threads of their own share the figures."""
    host = HostCosts()

    class Interrupted(dict[tuple[str, int], Any]):
        def setdefault(self, key: tuple[str, int], default: Any = None) -> Any:
            found = super().setdefault(key, default)
            assert host.seconds("ar", 4) == 1.0  # by another thread
            return found

    class Way(str):
        def __eq__(self, other: object) -> bool:
            host._kept[str(self), len(host._kept)] = [2.0]  # type: ignore[assignment]
            return str(self) == other

        __hash__ = str.__hash__

    host._kept = Interrupted()
    host.learn("ar", 1.0)
    host.learn("ar", 3.0, 2)
    assert host.seconds(Way("ar"), 4) == 1.0


def rate(planner: DraftPlanner, costs: PassCosts, real: Seconds, rng: np.random.Generator, chance: float) -> float:
    """Tokens per second of forty verifies, each draft's token being kept at a chance; thirty to settle first."""
    tokens = seconds = 0.0
    for verify in range(70):
        plan = planner.plan()
        emitted = min(plan.size, int(rng.geometric(1 - chance)))
        passes = 1 if plan.mode == "ar" else 2
        for _ in range(passes):
            costs.learn(plan.size, real(plan.size) * noise(rng))
        if plan.size > 1:
            planner.learn(plan.size, emitted)
        if verify >= 30:
            tokens += emitted
            seconds += passes * real(plan.size)
    return tokens / seconds


@pytest.mark.parametrize("truth", TRUTHS)
@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("chance", [0.5, 0.95])
def test_plans_get_over_a_wrong_curve(truth: str, mistake: str, chance: float) -> None:
    """After thirty verifies they give nine tenths of what the best fixed block gives, those tried for knowledge too."""
    real = TRUTHS[truth]
    kept = [(1 - chance**size) / (1 - chance) for size in BLOCKS]  # mean tokens of a verify
    best = max([1 / real(1), *(tokens / (2 * real(size)) for size, tokens in zip(BLOCKS, kept, strict=True))])
    rates = []
    for seed in range(12):
        costs = PassCosts(curve(real, MISTAKES[mistake]))
        planner = DraftPlanner(costs, AcceptanceStatistics(), ("ar", "linear_spec"))
        rates.append(rate(planner, costs, real, np.random.default_rng(seed), chance))
    assert np.mean(rates) > 0.85 * best


QUESTIONS = ["Count from 3 to 9.", "Show the times table of 7 up to 5.", "Count from 20 to 29."]


def tokens_per_pass(engine: nemodiff.LoadedEngine, prior: CostCurve, real: Seconds) -> float:
    """Of budgeted quadratic_spec where passes take what `real` says, some answers after the first."""
    costs = PassCosts(prior)
    vars(costs)["learn"] = lambda size, seconds: PassCosts.learn(costs, size, real(size))
    vars(engine)["cost"] = costs
    try:
        options = {"mode": "quadratic_spec", "block_length": 16, "max_new_tokens": 48}
        answers = [nemodiff.generate(engine, question, **options) for question in QUESTIONS * 2]
    finally:
        del vars(engine)["cost"]
    later = answers[len(QUESTIONS) :]
    return sum(len(a.token_ids) for a in later) / sum(a.nfe["verify"] for a in later)


@pytest.mark.parametrize("truth", ["a CPU", "a GPU"])
def test_a_noisy_measurement_does_not_stop_drafting(engine: nemodiff.LoadedEngine, truth: str) -> None:
    real = TRUTHS[truth]
    usual = tokens_per_pass(engine, curve(real, MISTAKES["right"]), real)
    assert usual > 3
    for noisy in (2, 8, 32):
        measured = curve(real, lambda size, noisy=noisy: 20.0 if size == noisy else 1.0)
        assert tokens_per_pass(engine, measured, real) > 0.7 * usual
    for mistake in list(MISTAKES)[3:]:
        assert tokens_per_pass(engine, curve(real, MISTAKES[mistake]), real) > 0.7 * usual


def test_drafts_are_not_given_up_for_passes_without_one(engine: nemodiff.LoadedEngine) -> None:
    """A few passes of one head do not make drafts look worthless, or there would never be another."""
    options = nemodiff.Options(mode="quadratic_spec", block_length=8, max_new_tokens=60)
    sequence = request.prepare(engine, QUESTIONS[0], options)
    costs = PassCosts(curve(TRUTHS["a GPU"], MISTAKES["right"]))
    sequence.planner = DraftPlanner(costs, AcceptanceStatistics(), ("quadratic_spec",), (8,))
    for _ in range(16):
        sequence.plan()
        sequence.planner.learn_quadratic(8, 1, 1)
    sequence.accepted, sequence.verified = [1] * 16, [1] * 16
    for _ in nemodiff.runtime.generate.decode(engine.backend, [sequence], 1):
        pass
    assert max(sequence.verified[16:]) > 4


@pytest.mark.parametrize("block", [16, 64])
def test_a_pass_that_is_tried_has_no_more_tokens_than_any(engine: nemodiff.LoadedEngine, block: int) -> None:
    """Where passes of up to 330 tokens cost the same, twice the best one would be more than a pass may have."""
    options = nemodiff.Options(mode="quadratic_spec", block_length=block, max_new_tokens=300)
    sequence = request.prepare(engine, QUESTIONS[0], options)
    sequence.tokens = [200]
    costs = PassCosts(CostCurve((1, 330, 512), (1.0, 1.0, 9.0)))
    sequence.planner = DraftPlanner(costs, AcceptanceStatistics(), ("quadratic_spec",), (block,))
    draft = Draft([200] * (block - 1), [0.95] * (block - 1))
    tokens = list[int]()
    for _ in range(40):
        sequence.plan()
        tokens.append(next(verify_and_draft(sequence, draft, group_again)).ids.size)
        costs.learn(tokens[-1], 1.0 if tokens[-1] <= 330 else 9.0)
    assert min(tokens) < max(tokens) <= PREFILL_CHUNK


@settings(max_examples=50)
@given(st.lists(st.floats(1e-6, 10), min_size=2, max_size=len(SIZES)))
def test_what_cannot_be_is_noise(times: list[float]) -> None:
    clean = without_noise(CostCurve(SIZES[: len(times)], tuple(times)))
    assert clean.sizes == SIZES[: len(times)]
    assert all(low <= high <= 2 * low for low, high in zip(clean.times, clean.times[1:], strict=False))
    assert all(after <= before for before, after in zip(times, clean.times, strict=True))


def test_a_size_is_asked_for_until_it_is_known_and_not_in_a_row() -> None:
    costs = PassCosts(curve(TRUTHS["a CPU"], MISTAKES["right"]))
    wanted = []
    for number in range(60):
        if costs.wants(32):
            wanted.append(number)
            costs.learn(32, 3.7)
        else:
            costs.learn(4, 1.3)
    assert 3 <= len(wanted) <= 6
    assert min(b - a for a, b in itertools.pairwise(wanted)) >= 6


def test_a_batch_learns_from_its_forwards(engine: nemodiff.LoadedEngine) -> None:
    vars(engine).pop("cost", None)
    list(nemodiff.generate_many(engine, QUESTIONS, rows=3, mode="ar", max_new_tokens=8))
    met = {size for size, _ in engine.cost._met}
    assert met <= {1, 2, 3}  # no prefill
    measured = measure(engine.backend, limit=0.01)
    assert measured is not None
    assert measured.sizes[0] == 1
    assert 32 in measured.sizes
    assert measured.sizes[-1] < SIZES[-1]  # what there is no time for is left out


def test_what_else_the_machine_does_is_no_cost(engine: nemodiff.LoadedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    vars(engine).pop("cost", None)
    run = OnnxRuntimeCache.forward

    def interrupted(*arguments: Any) -> Any:
        time.sleep(0.2)
        return run(*arguments)

    monkeypatch.setattr(OnnxRuntimeCache, "forward", interrupted)
    nemodiff.generate(engine, QUESTIONS[0], mode="quadratic_spec", block_length=4, max_new_tokens=8)
    assert max(seconds for _, seconds in engine.cost._met) < 0.2


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("processor : 0\nmodel name\t: AMD EPYC\nflags\t: fpu\n", "AMD EPYC"),
        ("CPU implementer\t: 0x41\nCPU part\t: 0xd4f\n\n" * 2, "aarch64 0x41/0xd4f"),
        (
            "CPU implementer\t: 0x41\nCPU part\t: 0xd87\n\nCPU implementer\t: 0x41\nCPU part\t: 0xd85\n\n",
            "aarch64 0x41/0xd85 0x41/0xd87",
        ),
        ("processor\t: 0\n", "aarch64"),
    ],
)
def test_a_processor_is_told_from_others(told: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On arm64 Linux has numbers alone: of who designed a core, and of which kind it is."""
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: told)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr("platform.processor", lambda: "")
    assert cpu_name() == name


def test_a_kept_curve_spares_the_measurement(
    tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny_engine, tmp_path / "engine")
    kept, other = curve(TRUTHS["a CPU"], MISTAKES["right"]), curve(TRUTHS["a GPU"], MISTAKES["right"])
    write_curve(folder, cpu_name(), 1, kept, "2026-11-27")
    write_curve(folder, cpu_name(), 2, other, "2026-11-27")
    write_curve(folder, "another processor", 1, other, "2026-11-27")
    write_curve(folder, cpu_name(), 1, kept, "2026-11-28")
    assert len(json.loads((folder / COST_FILE).read_text())["curves"]) == 3
    assert [path.name for path in folder.glob(".*")] == []

    def fails(*_: object) -> CostCurve:
        raise AssertionError("measured")

    monkeypatch.setattr(loading, "measure", fails)
    loaded = nemodiff.load(folder, threads=1)
    assert nemodiff.generate(loaded, QUESTIONS[0], mode="auto", max_new_tokens=8).token_ids
    assert loaded.cost._prior == kept
    assert nemodiff.load(folder, threads=2).cost.curve == other
    with pytest.raises(AssertionError, match="measured"):
        nemodiff.load(folder).cost.curve  # noqa: B018


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"curves": 3}',
        '{"curves": [3, {}]}',
        '{"curves": [{"processor": "p", "threads": 1, "sizes": [1], "seconds": [1.0]}]}',
        '{"curves": [{"processor": "p", "threads": 1, "sizes": [2, 1], "seconds": [1.0, 1.0]}]}',
        '{"curves": [{"processor": "p", "threads": 1, "sizes": [1, 2], "seconds": [1.0, 0.0]}]}',
        '{"curves": [{"processor": "p", "threads": 1, "sizes": [1, 2], "seconds": [1.0, "x"]}]}',
        '{"curves": [{"processor": "p", "threads": 1, "sizes": [1, 2], "seconds": [1.0, NaN]}]}',
    ],
)
def test_a_broken_file_is_no_curve_and_can_be_replaced(tmp_path: Path, text: str) -> None:
    for name in (CONFIG_FILE, MANIFEST_FILE):
        (tmp_path / name).write_text("{}")
    if text.startswith("{"):
        text = json.dumps({**json.loads(text), "engine": engine_digest(tmp_path)})
    (tmp_path / COST_FILE).write_text(text)
    assert read_curve(tmp_path, "p", 1) is None
    good = CostCurve((1, 2), (1.0, 1.5))
    write_curve(tmp_path, "p", 1, good, "2026-11-27")
    assert read_curve(tmp_path, "p", 1) == good
    (tmp_path / MANIFEST_FILE).write_text("{ }")  # another engine
    assert read_curve(tmp_path, "p", 1) is None
