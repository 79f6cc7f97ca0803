"""`nemodiff bench`: its figures by their definitions, two engines in turns, and the curve that it keeps."""

import importlib.util
import itertools
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import Refused, output_of
from stand_ins.checkpoints import write_checkpoint

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.cli import main
from nemodiff.engine_folder import COST_FILE
from nemodiff.measurement import bench
from nemodiff.measurement.figures import Percentiles, Spread, figures, ratios
from nemodiff.measurement.round import Answer, Request, Round, serve
from nemodiff.runtime.planning.cost import SIZES, CostCurve
from nemodiff.runtime.planning.kept_curve import read_curve

SHORT = ("--threads", "1", "-r", "2", "--max-new-tokens", "12", "--input-len", "40")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take no more time for the curve to begin with than it must have."""
    monkeypatch.setattr(bench, "_CURVE_SECONDS", 0.0)


@pytest.fixture
def engine(tiny_engine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_engine, tmp_path / "engine"))


def answer(outputs: list[float], tokens: int, **counts: Any) -> Any:
    nfe = {"prefill": 1, "draft": 2, "verify": 2}
    sequence = SimpleNamespace(
        tokens=list(range(tokens)), prompt=[1, 2, 3], nfe=nfe, accepted=counts.pop("accepted", [])
    )
    return Answer(sequence, 10.0, outputs, **counts)  # type: ignore[arg-type]


def test_figures_are_what_they_are_called() -> None:
    one = answer([10.5, 11.0, 12.5], 9, accepted=[5, 3], drafted=10, kept=6)
    assert (one.ttft, one.e2el, one.tpot, one.itl) == (0.5, 2.5, 0.25, [0.5, 1.5])
    two = answer([10.25], 1)
    assert (two.tpot, two.itl) == (None, [])
    memory: dict[str, int | None] = {"process": 7, "gpu": None}
    ar = Round(9.0, [answer([11.0], 9), answer([11.0], 2)], memory)
    rounds = [Round(2.0, [one, two], memory), Round(4.0, [one, two], {"process": 9, "gpu": None})]
    got = figures("linear_spec", 2, rounds, ar)
    assert got.throughput == Spread(3.75, 2.5, 5.0, pytest.approx(3.125**0.5), [5.0, 2.5])
    assert got.ttft_ms == Percentiles(375.0, 375.0, 500.0, 500.0)
    assert got.itl_ms == Percentiles(1000.0, 1000.0, 1500.0, 1500.0)
    assert got.tokens_per_pass == 20 / 16  # of four answers, in four passes each beside prefill
    assert (got.acceptance_length, got.acceptance_rate) == (4.0, 0.6)
    assert got.passes == {"prefill": 4, "draft": 8, "verify": 8}
    assert got.peak_memory_bytes == {"process": 9, "gpu": None}
    assert got.different_from_ar == 1
    assert got.output_tokens == 10
    prompt = figures("pp3", 1, rounds, ar)
    assert (prompt.throughput.rounds, prompt.tokens_per_pass, prompt.different_from_ar) == ([3.0, 1.5], None, None)
    alone = figures("ar", 1, [Round(2.0, [two, two], memory), Round(2.0, [one, two], memory)], None)
    assert (alone.output_tokens, alone.different_from_ar) == (10, None)  # of the last round
    assert Percentiles.of([n / 1e3 for n in range(300)]) == Percentiles(149.5, 149.5, 296.0, 299.0)
    slower = figures("linear_spec", 2, [Round(4.0, [one, two], memory), Round(4.0, [one, two], memory)], ar)
    assert ratios(got, slower).rounds == [2.0, 1.0]


def test_a_round_gives_the_tokens_that_a_request_gives(tiny_engine: Path) -> None:
    loaded = nemodiff.load(tiny_engine, threads=1)
    options = nemodiff.Options(mode="linear_spec", block_length=8, max_new_tokens=20)
    served = serve(loaded, [Request(prompt, options) for prompt in bench.PROMPTS], 3)
    for prompt, one in zip(bench.PROMPTS, served.answers, strict=True):
        alone = nemodiff.generate(loaded, prompt, mode="linear_spec", block_length=8, max_new_tokens=20)
        assert one.tokens == alone.token_ids
        assert len(one.outputs) <= 1 + alone.nfe["verify"]  # what a pass emits comes together
        assert one.submitted < one.outputs[0] <= one.outputs[-1] < one.submitted + served.seconds
        assert one.kept <= one.drafted


def test_it_measures_every_mode_and_keeps_the_curve(engine: Path) -> None:
    result = json.loads(output_of("bench", str(engine), *SHORT, "--concurrency", "1", "--concurrency", "2", "--json"))
    (measured,) = result["engines"]
    ways = [(one["test"], one["concurrency"]) for one in measured["tests"]]
    modes = ("ar", "diffusion", "linear_spec", "quadratic_spec", "auto")
    assert ways == [("pp40", 1), *((mode, rows) for rows in (1, 2) for mode in modes)]
    for one in measured["tests"]:
        assert len(one["throughput"]["rounds"]) == 2
        assert 0 < one["throughput"]["min"] <= one["throughput"]["median"] <= one["throughput"]["max"]
        assert one["peak_memory_bytes"]["process"] > 10**7
        if one["test"] in ("linear_spec", "quadratic_spec", "auto", "ar"):
            assert one["different_from_ar"] == 0
        assert (one["acceptance_rate"] is None) == (one["test"] in ("pp40", "ar", "diffusion")) or one["test"] == "auto"
    assert measured["tests"][1]["tokens_per_pass"] > 1  # the first token comes with the prefill
    curve = read_curve(engine, measured["processor"], 1)
    assert curve is not None
    assert curve.sizes == tuple(map(int, measured["cost_curve_ms"]))
    described = json.loads(output_of("inspect", str(engine), "--json"))
    assert COST_FILE not in described["files"]  # a record of use, not of the build


def test_two_engines_take_turns(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Path(shutil.copytree(engine, engine.with_name("other")))
    turns = []

    def noted(loaded: nemodiff.LoadedEngine, *rest: Any) -> Round:
        turns.append(loaded.folder.name[0])
        return serve(loaded, *rest)

    monkeypatch.setattr(bench, "serve", noted)
    words = ["bench", str(engine), "--compare", str(other), *SHORT, "--mode", "ar", "--no-keep"]
    text = output_of(*words)
    assert "".join(turns) in ("oeeooe" * 2, "eooeeo" * 2)  # warm-up and two rounds of two tests, none always first
    assert re.search(r"tokens/s of engine over other.*\n.*\npp40 .*\nar +1 +\d+\.\d\d \(\d+\.\d\d\.\.\d+\.\d\d\)", text)
    assert not (engine / COST_FILE).exists()
    ratio = json.loads(output_of(*words, "--json"))["ratios"][1]
    assert (ratio["test"], ratio["concurrency"]) == ("ar", 1)
    assert ratio["min"] <= ratio["median"] <= ratio["max"]


def test_what_is_given_twice_is_measured_once_and_every_mode_compared_with_ar(engine: Path) -> None:
    twice = [word for flag in ("--mode linear_spec", "--mode ar", "--concurrency 2") for word in flag.split() * 2]
    (measured,) = json.loads(output_of("bench", str(engine), *SHORT, "--input-len", "40", *twice, "--json"))["engines"]
    tests = [(one["test"], one["different_from_ar"]) for one in measured["tests"]]
    assert tests == [("pp40", None), ("ar", 0), ("linear_spec", 0)]


def test_the_table_says_what_an_engine_is(tmp_path: Path) -> None:
    folder = Builder(write_checkpoint(tmp_path / "checkpoint"), tmp_path / "engine", quantization="int8").run()
    text = output_of("bench", str(folder), *SHORT, "--mode", "ar", "--no-keep")
    assert "\nengine: onnxruntime, f32 with int8 projections, on " in text


def test_a_short_engine_is_measured_as_far_as_it_goes_and_named_where_it_is_not(engine: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    short = Builder(checkpoint, tmp_path / "short", max_seq_len=120, max_batch_size=1).run()
    words = ["--threads", "1", "-r", "1", "--max-new-tokens", "4", "--mode", "ar", "--no-keep"]
    assert re.search(r"\npp119 +1 ", output_of("bench", str(short), *words))
    both = ["bench", str(engine), "--compare", str(short), *words]
    assert output_of(*both).count("\npp119 ") == 3
    result = CliRunner().invoke(main, [*both, "--concurrency", "2"])
    assert "Error: short: rows is 2, allowed: 1 to 1; " in result.stderr


def test_engines_in_folders_of_the_same_name_are_told_apart(engine: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(engine, tmp_path / "other" / engine.name))
    text = output_of("bench", str(engine), "--compare", str(other), *SHORT, "--mode", "ar", "--no-keep")
    assert f"\n{engine.resolve()}: onnxruntime" in text
    assert f"tokens/s of {engine.resolve()} over {other.resolve()}, " in text


def test_what_is_given_and_not_used_is_warned_of(engine: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "x", "mode": "diffusion", "stop": ["y"], "logprobs": 1}')
    words = ["bench", str(engine), *SHORT, "--mode", "ar", "--block-length", "8", "--input-file", str(file)]
    assert CliRunner().invoke(main, words).stderr.splitlines()[:2] == [
        "Warning: --block-length has no effect in mode ar",
        f"Warning: {file}: bench does not use the options of lines (logprobs, mode, stop)",
    ]


def test_a_folder_that_cannot_be_written_is_measured_all_the_same(engine: Path) -> None:
    (engine / COST_FILE).mkdir()  # in the way of a new file, for root too
    result = CliRunner().invoke(main, ["bench", str(engine), *SHORT, "--mode", "ar"])
    assert result.exit_code == 0
    assert "\nar " in result.stdout
    assert result.stderr.splitlines()[-1].startswith(f"{engine}: the cost curve is not kept (")


def test_a_picture_has_a_bar_for_every_engine_mode_and_number_of_requests(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from nemodiff.measurement.plot import _bars, _curves

    rates = {mode: Spread.of([1200.0, 1234.4, 1300.0]) for mode in ("ar", "quadratic_spec")}
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes, curves = figure.subplots(1, 2, width_ratios=(3, 2))
    outcome = bench.Outcome([], CostCurve(SIZES, tuple(1.0 + size for size in SIZES)), 0.0)
    _curves(curves, ["same"], [outcome])
    _bars(axes, [("same", rates), ("same", {"ar": Spread.of([7.251])})], list(rates))
    figure.savefig(tmp_path / "bars.png")
    assert len(axes.patches) == 3
    assert sorted(text.get_text() for text in axes.texts) == ["1234", "1234", "7.25"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["ar", "quadratic_spec"]
    edges = [tick.get_window_extent() for tick in axes.get_yticklabels()]
    assert edges[0].y0 > edges[1].y1  # no name covers another
    edges = [tick.get_window_extent() for tick in curves.get_xticklabels() if tick.get_text()]
    assert len(edges) > 6
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(edges))


def test_a_picture_is_drawn(engine: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    output_of("bench", str(engine), *SHORT, "--mode", "ar", "--plot", str(tmp_path / "bench.png"))
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_measured_is_refused(
    engine: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["bench", str(engine), "--threads", "1"]
    refused([*words, "--concurrency", "5000"], "max-batch-size")
    refused([*words, "--input-len", "40000000"], "--input-len", "allowed: 1 to")
    refused([*words, "--block-length", "65"], "block_length is 65", "1 to 64")
    refused([*words, "--block-length", "long"], "block_length is 'long'", "auto")
    refused([*words, "--mode", "fast"], "--mode", code=2)
    with pytest.raises(nemodiff.RequestError, match="block_length is 65, allowed: 1 to 64"):
        bench.tests(nemodiff.load(engine), bench.Plan(modes=("ar",), block_length=65))
    (tmp_path / "none.jsonl").write_text("\n")
    refused([*words, "--input-file", str(tmp_path / "none.jsonl")], "no prompts; give")
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "word " * 40000}))
    refused([*words, "--input-file", str(tmp_path / "long.jsonl"), "--input-len", "8", "--no-keep"], "max_seq_len")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    refused([*words, "--plot", str(tmp_path / "bench.png")], "--plot needs the package matplotlib", "nemodiff[plot]")
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    refused(
        [*words, "--plot", str(tmp_path / "bench.foo")],
        "bench.foo is no name of a picture, allowed: one that ends in ",
        "png",
    )
    refused([*words, "--plot", str(tmp_path / "none" / "bench.png")], "none is no folder; make it", code=2)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"rounds": 0}, "rounds is 0, allowed: 1 or more"),
        ({"rounds": "2"}, "rounds is '2', allowed: 1 or more"),
        ({"warmup": -1}, "warmup is -1, allowed: 0 or more"),
        ({"input_lens": (8, -1)}, "input_lens is -1, allowed: 1 or more"),
        ({"input_lens": 8}, "input_lens is 8, allowed: a list"),
        ({"concurrency": 2}, "concurrency is 2, allowed: a list"),
        ({"modes": "ar"}, "modes is 'ar', allowed: a list"),
        ({"prompts": "Hi"}, "prompts is 'Hi', allowed: a list"),
        ({"prompts": []}, r"prompts is \[\], allowed: one or more"),
    ],
)
def test_a_plan_that_measures_nothing_is_refused(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(nemodiff.RequestError, match=f"^{problem}"):
        bench.Plan(**fields)


@pytest.mark.parametrize("engines", [["engines/tiny"], [None]])
def test_what_is_no_loaded_engine_is_not_measured(engines: Any) -> None:
    with pytest.raises(nemodiff.RequestError, match=r"^engine is .*, allowed: what load\(\.\.\.\) returns"):
        bench.bench(engines, bench.Plan())
