"""The GPU benchmark on the CPU: all of its code at tiny sizes, its plan, its budget, and the verdicts it draws.

Times mean nothing here; tests only check that they are present.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stand_ins.kernel_launch import SCALES_ROWS
from stand_ins.scripts import load_script
from stand_ins.torch_graphs import RecordingDevice

from nemodiff.contract import BuildConfig
from nemodiff.runtime.engines.passes import causal
from nemodiff.runtime.engines.torch.device import TorchDevice
from nemodiff.runtime.generate import generate, generate_many

pytestmark = pytest.mark.torch
FOLDER = Path(__file__).parents[2] / "benchmarks"
QUICK = "first,forward,variants,decode,serve,kernels,narrow,modes,tensorrt"
Run = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)


def _program() -> Any:
    """`benchmarks/gpu.py`, which shares its name with the package of its parts."""
    return load_script(FOLDER / "gpu.py")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process; its report, with what it printed."""

    def main(*arguments: str) -> dict[str, Any]:
        out = [] if "--plan" in arguments else ["--device", "cpu", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["benchmarks/gpu.py", *out, *arguments])
        _program().main()
        report = tmp_path / "gpu.json"
        figures = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
        return {**figures, "printed": capsys.readouterr().out}

    return main


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so Triton interprets nothing")
@SCALES_ROWS
def test_every_section_but_the_peers(run: Run, tmp_path: Path) -> None:
    report = run("--only", QUICK)
    cells = report["cells"]
    # Peers are not among what is asked for.
    assert [g["name"] for g in report["goals_not_measured"]] == ["AR step over plain torch compiled, tiny, context 64"]
    assert len(report["goals"]) == 26
    exact = {g["name"]: g["got"] for g in report["goals"] if "answers" in g["name"] and "unlike" in g["name"]}
    assert list(exact.values()) == [0, 0]
    skipped = {name: cell["skipped"] for name, cell in cells.items() if "skipped" in cell}
    assert {name.split("/")[0] for name in skipped} == {"tensorrt"}
    forward = [cell for name, cell in cells.items() if name.startswith("forward/")]
    assert len(forward) == 2 * 2 * 2  # tokens, rows, contexts
    for cell in forward:
        assert 0 < cell["device_us"] <= cell["wall_us"]
        assert cell["to_ceiling"] > 0
    served = [cell for name, cell in cells.items() if name.startswith("serve/")]
    assert [(cell["way"], cell["requests"]) for cell in served] == [
        *((way, 1) for way in ("ar", "linear_spec", "quadratic_spec", "diffusion", "auto")),
        *((way, 3) for way in ("ar", "linear_spec", "quadratic_spec", "diffusion", "mix", "auto")),
    ]
    assert all(cell["tokens"] == 12 * cell["requests"] and cell["pages"] > 0 for cell in served)
    assert {cell["captured_meanwhile"] + cell["compiled_meanwhile"] for cell in served} == {0}
    first = cells["first/tiny/answers"]
    settings = importlib.import_module("gpu.modes").SETTINGS
    assert list(first["ways"]) == list(settings)
    assert all(way["first_ms"] > way["ms_to_first_token"] > 0 for way in first["ways"].values())
    products = importlib.import_module("gpu.products")
    for matrix in products.NARROW:  # on a CPU all but one are torch's own product, which may take other bits
        ways = cells[f"narrow/tiny/{matrix}"]["ways"]
        assert list(ways) == list(products.NARROW_WAYS)
        assert all(set(way["us"]) == {"1", "3"} for way in ways.values())
        assert ways[f"of {products.MOST} rows"]["same_bits"]
        winner = cells[f"narrow/tiny/{matrix}"]["winner"]
        assert ways[winner]["same_bits"]
        assert f"{winner} wins; us: " in report["printed"]
    kernel_cells = [cell for name, cell in cells.items() if name.startswith("kernels/")]
    kernels = {row["stages"][0] for row in kernel_cells if "linear" not in row["op"]}
    assert all(row["us"] > 0 and row["bytes"] > 0 for row in kernel_cells)
    plugins = importlib.import_module("nemodiff.plugins")
    assert kernels == {op.stages[0].name for op in (*plugins.OPS, plugins.confidence_commit.SAMPLED, *plugins.FUSED)}
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    for title in (
        "Forward",
        "Ways to run it",
        "Kernels",
        "Ways to multiply",
        "First answers",
        "Decoding at",
        "Cost curve",
        "Many requests",
        "Answers",
        "Not measured",
    ):
        assert f"\n## {title}" in text
    assert (tmp_path / "gpu.png").read_bytes()[:4] == b"\x89PNG"

    # What is known is kept; what was left out is tried again, and with no time nothing is measured.
    again = run("--minutes", "0")
    assert {n: c for n, c in again["cells"].items() if n in cells and n not in skipped} == {
        n: c for n, c in cells.items() if n not in skipped
    }
    assert len(again["runs"]) == 2
    assert "figures not measured: no time was left\n" in again["printed"]  # one line, whatever their number
    assert {c["skipped"] for n, c in again["cells"].items() if n.startswith("peers/")} == {"no time was left"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so Triton interprets nothing")
def test_every_tile(run: Run) -> None:
    cells = run("--only", "tiles")["cells"]
    tiles = importlib.import_module("gpu.tiles")
    measured = {cell["kernel"]: cell for name, cell in cells.items() if name.startswith("tiles/")}
    few_bits = ["Fp8SplitLinear", "Int8SplitLinear", "Int4SplitLinear"]
    assert list(measured) == ["PagedAttention", *tiles.SCANS, "qkv", "o", "down", *few_bits]
    for kernel, cell in measured.items():
        assert cell["refused"] == {}
        assert list(cell["variants"]) == list(tiles.variants(kernel))
        assert all(us > 0 for us in cell["variants"].values())


def test_the_tiles_of_a_size_take_a_minute(run: Run) -> None:
    printed = run("--plan", "--only", "tiles", "--shapes", "8b")["printed"]
    line = next(text for text in printed.splitlines() if text.split()[:2] == ["tiles", "8b"])
    assert float(line.split()[-1]) <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
def test_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its events, graphs and launches at a tiny size, before minutes are spent on a large one."""
    arguments = [
        "--shapes",
        "tiny",
        "--only",
        "first,variants,decode,serve,narrow,kernels",
        "--minutes",
        "3",
        "--out",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", ["benchmarks/gpu.py", *arguments])
    _program().main()
    cells = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["cells"]
    assert [cell for cell in cells.values() if "skipped" in cell] == []
    assert [size for cell in cells.values() for size in cell.values() if "not_captured" in str(size)] == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # dynamo's own
def test_the_peers(run: Run) -> None:
    compiled = importlib.import_module("torch._dynamo.utils").counters
    compiled.clear()
    report = run("--only", "peers")
    assert compiled["stats"]["unique_graphs"] == 1  # of each size; torch compiles no more than eight
    peers = [cell for name, cell in report["cells"].items() if name.startswith("peers/")]
    assert [(r["rows"], r["context"], r["peer"]) for r in peers] == [(1, 64, "plain torch, compiled")]
    assert peers[0]["device_us"] > 0
    assert {g["reason"].split(": ")[-1] for g in report["goals_not_measured"]} >= {"not reached yet"}


@pytest.mark.parametrize("shape", ["3b", "8b", "14b", "8b,3b,14b"])
def test_plan(run: Run, shape: str) -> None:
    printed = run("--plan", "--shapes", shape)["printed"]
    for one in shape.split(","):
        for section in ("forward", "kernels", "decode", "serve", "variants", "peers"):
            line = next(text for text in printed.splitlines() if text.split()[:2] == [section, one])
            assert float(line.split()[-1]) > 0
    if shape == "8b":
        assert float(next(t for t in printed.splitlines() if t.startswith("forward")).split()[4]) > 17  # GiB: weights


def test_a_pass_is_taken_apart_in_each_way(run: Run, tmp_path: Path) -> None:
    report = run("--only", "profile")
    cells = list(report["cells"].values())
    ways = [(cell["way"], cell["context"], cell["tokens"]) for cell in cells]
    places = [("graphs", 64), ("graphs", 128), ("own products", 64)]
    assert ways == [(*place, tokens) for place in places for tokens in (1, 4)]
    assert all(0 < kernel["us"] <= cell["us"] for cell in cells for kernel in cell["kernels"])
    assert "| tiny | own products | 64 | 4 | `all` | " in (tmp_path / "gpu.md").read_text(encoding="utf-8")


def test_a_call_of_six_minutes_has_what_matters_most() -> None:
    """By the estimates: a step and its variants, loops, the step's kernels, requests together, and the peer."""
    program, plan = _program(), importlib.import_module("gpu.plan")
    left, measured = 6 * 60.0, set[str]()
    for cell in program.cells(plan.RunConfig(("8b",), "bf16", Path("tiny-chat"), plan.GPU)):
        left -= cell.seconds
        if left < 0:
            break
        measured.add(cell.name.removeprefix("kernels/8b/"))
    rows = {f"forward/8b/rows 1 context {c} tokens {n}" for c in plan.GPU.contexts for n in plan.GPU.sizes}
    first = ("graphs", "pdl", "own products, pdl")
    ways = {f"variants/8b/{way} context {c}" for way in first for c in plan.GPU.contexts[:2]}
    loops = {"decode/8b/ar", "decode/8b/linear_spec", "decode/8b/quadratic_spec, budget"}
    loops |= {"decode/8b/diffusion", "decode/8b/linear_spec, weights in fp8"}
    crowds = {f"serve/8b/{way} requests {n}" for way in ("ar", "linear_spec") for n in plan.GPU.requests[:-1]}
    sizes = plan.GPU.kernel_sizes
    kernels = {f"PagedAttention context {c} tokens {n}" for c in plan.GPU.kernel_contexts for n in sizes}
    kernels |= {f"linear {name} tokens {n}" for name in ["qkv", "o"] for n in sizes}
    scans = ("ConfidenceCommitScan", "SampledCommitScan", "FlatSampledScan")
    kernels |= {f"{name} tokens {n}" for name in scans for n in sizes}
    kernels |= {"first/8b/answers", "narrow/8b/qkv", "narrow/8b/o", "variants/8b/fp8 context 4096"}
    assert rows | ways | loops | crowds | kernels | {"peers/8b/rows 1 context 512"} <= measured


def test_what_is_asked_for_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (("--only", "everything"), ("--shapes", "70b")):
        monkeypatch.setattr(sys, "argv", ["benchmarks/gpu.py", *arguments])
        with pytest.raises(SystemExit):
            _program().main()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks/gpu.py"])
    with pytest.raises(
        SystemExit, match=r"^nothing measured: device is cuda:0, allowed: cpu .*; choose one that is here$"
    ):
        _program().main()


def test_a_checkout_is_enough(tmp_path: Path) -> None:
    """With the installed package hidden and no path but the script's own."""
    hide = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
    code = f"{hide}sys.path.insert(0, {str(FOLDER)!r})\nfrom common import checkout\n"
    code += "import nemodiff; print(nemodiff.__file__)"
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, env=bare, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == str(FOLDER.parent / "__init__.py")


def test_check_gpu_runs_every_test_that_needs_one() -> None:
    root = FOLDER.parent
    tests = (root / "tests").glob("*/test_*.py")
    marked = {
        str(path.relative_to(root)) for path in tests if re.search(r"\bON_DEVICE$|mark\.gpu", path.read_text(), re.M)
    }
    script = (root / "scripts" / "check-gpu").read_text(encoding="utf-8")
    assert set(re.findall(r"tests/\w+/\w+\.py", script)) == marked


def test_check_gpu_needs_no_more_than_it_says() -> None:
    """Its tests are found as on a card, where packages that the script does not ask for may be missing."""
    root = FOLDER.parent
    files = re.findall(r"tests/\w+/\w+\.py", (root / "scripts" / "check-gpu").read_text(encoding="utf-8"))
    missing = ["onnxruntime", "llguidance", "huggingface_hub", "transformers", "tensorrt_rtx", "polygraphy"]
    code = f"import sys; sys.modules.update(dict.fromkeys({missing})); import pytest; sys.exit(pytest.main())"
    command = [sys.executable, "-c", code, "--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    found = {line.split("::")[0] for line in result.stdout.splitlines() if "::" in line}
    assert found == set(files)


def test_cells_fail_by_themselves() -> None:
    gpu, plan = _program(), importlib.import_module("gpu.plan")
    card = argparse.Namespace(total=2**33, forget=lambda: None)

    def cell(error: Exception | None = None, nbytes: int = 0, seconds: float = 0) -> Any:
        def measure(lab: Any) -> dict[str, Any]:
            if error is not None:
                raise error
            return {"us": 1.0}

        return gpu.measured(plan.Cell("forward", "8b", "x", nbytes, seconds, measure), plan.Lab(card, {}), 10)

    assert cell() == {"us": 1.0}
    assert cell(nbytes=2**35) == {"skipped": "needs about 32 GiB, the card has 8"}
    assert cell(seconds=11) == {"skipped": "no time was left"}
    assert cell(ModuleNotFoundError("no", name="triton")) == {"skipped": "the package triton is missing"}
    assert cell(torch.OutOfMemoryError("Tried.\nx")) == {"skipped": "out of memory: OutOfMemoryError: Tried."}
    assert cell(ValueError("odd")) == {"skipped": "failed: ValueError: odd"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so Triton interprets nothing")
def test_a_way_that_fails_leaves_the_other_first_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, first, card = (importlib.import_module(f"gpu.{name}") for name in ("plan", "first", "card"))
    reports = importlib.import_module("gpu.report")
    generate = first.generate

    def failing(engine: Any, prompt: Any, **options: Any) -> Any:
        if options["mode"] == "linear_spec":
            raise IndexError("list index out of range")
        return generate(engine, prompt, **options)

    monkeypatch.setattr(first, "generate", failing)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    config = plan.RunConfig(("tiny",), "f32", Path("tiny-chat"), plan.CPU)
    cell = next(first.cells(config, "tiny"))
    report = reports.Report(None, {"date": "", "command": ""}, {"name": "cpu", "torch": ""}, {}, config)
    figures = cell.measure(plan.Lab(card.Card("cpu"), {}))
    report.put(cell, figures)
    assert {name for name, way in figures["ways"].items() if "skipped" in way} == {"linear_spec"}
    met, unmeasured = report.goals()
    assert [g["name"] for g in met] == ["graphs and kernels made by first answers"]
    why = "first/tiny/answers, linear_spec: failed: IndexError: list index out of range"
    assert [u["reason"] for u in unmeasured].count(why) == 2


def test_a_cell_that_hangs_or_breaks_the_card_costs_itself_alone(tmp_path: Path) -> None:
    """Its process ends, what there is is written, and the next one leaves it out."""
    program = f"""
import sys, threading
sys.path.insert(0, {str(FOLDER)!r})
from common import checkout
from gpu import guard, plan
there = guard.Guard(__import__("pathlib").Path({str(tmp_path)!r}), print, 60 if sys.argv[1] == "late" else 0.2)
guard.GRACE = 0.3
cell = plan.Cell("forward", "8b", sys.argv[1], 0, 0, None)
there.last()
with there.watch(cell, -5 if cell.key == "late" else 100):
    if cell.key in ("hangs", "late"):
        threading.Event().wait(60)
    if cell.key == "dies":
        __import__("os").abort()
    there.check(cell, True, "no time was left")
    there.check(cell, False, "CUDA error: an illegal memory access")
"""

    def ended(key: str) -> tuple[int, str]:
        command = [sys.executable, "-c", program, key]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout

    assert ended("hangs")[0] == 3
    assert "it took more than 0 s" in ended("late")[1]  # a run's end is nobody's to pass
    assert ended("dies")[0] < 0
    code, said = ended("breaks")
    assert code == 3
    assert "forward/8b/dies {'skipped': 'failed: it ended the process'}" in said
    assert "forward/8b/breaks {'skipped': 'failed: it broke the card for its process: CUDA error: an" in said
    assert list(tmp_path.iterdir()) == []


def test_measure_gpu_goes_on_behind_a_process_that_was_ended(tmp_path: Path) -> None:
    """With what is left of its minutes, and all it writes in one folder."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(
        f"""#!/usr/bin/env bash
[ "$1" = -c ] && exec {sys.executable} "$@"
echo "$*" >> {tmp_path}/calls
[ "$(wc -l < {tmp_path}/calls)" -lt 3 ] && exit 3
exit 0
"""
    )
    python.chmod(0o755)
    environment = {**os.environ, "VENV": str(tmp_path), "OUT": str(tmp_path / "out")}
    command = [FOLDER.parent / "scripts" / "measure-gpu", "5", "--shapes", "8b"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert [call[0] for call in calls] == ["benchmarks/gpu.py"] * 3
    assert ["--go-on" in call for call in calls] == [False, True, True]
    assert all(4 < float(call[call.index("--minutes") + 1]) <= 5 for call in calls)
    assert all(call[-2:] == ["--shapes", "8b"] for call in calls)
    assert (tmp_path / "out" / "gpu.log").is_file()


def test_what_failed_is_left_alone_by_a_process_that_goes_on() -> None:
    plan, reports = importlib.import_module("gpu.plan"), importlib.import_module("gpu.report")
    config = plan.RunConfig(("8b",), "bf16", Path("tiny-chat"), plan.GPU)
    report = reports.Report(None, {"date": "", "command": ""}, {"name": "a card"}, {}, config)
    cells = [plan.Cell("forward", "8b", key, 0, 0, lambda lab: {}) for key in ("met", "failed", "late", "new")]
    for cell, figures in zip(
        cells, ({"us": 1.0}, {"skipped": "failed: x"}, {"skipped": "no time was left"}), strict=False
    ):
        report.put(cell, figures)
    assert [report.has(cell) for cell in cells] == [True, False, False, False]
    report.keeps_failures = True
    assert [report.has(cell) for cell in cells] == [True, True, False, False]


def test_a_replay_is_timed_as_an_eager_step_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are played on the CPU."""
    card, models = importlib.import_module("gpu.card"), importlib.import_module("gpu.models")
    monkeypatch.setattr(TorchDevice, "capture", RecordingDevice.capture)
    there = card.Card("cpu")
    there.graphs = []
    there._refuses = 0
    there._bytes, there._held, there._gone = [], [], []
    engine = models.load("tiny", "f32", there, pages=8).backend
    engine.steps.graphs = True
    cache, spent = engine.open(1), [0.0]
    for _ in range(4):
        began = time.perf_counter()
        cache.forward([causal("decode", [5], 3)])
        wall = time.perf_counter() - began
        spent.append(there.spent)
        assert there.step_seconds() == pytest.approx(spent[-1] - spent[-2])
        assert 0 < there.step_seconds() <= wall
    assert engine.captured == 1
    assert there.graphs[0].replays == 3


def test_goals_are_met_missed_or_not_measured() -> None:
    plan, reports = importlib.import_module("gpu.plan"), importlib.import_module("gpu.report")
    config = plan.RunConfig(("8b",), "bf16", Path("tiny-chat"), plan.GPU)
    report = reports.Report(None, {"date": "", "command": ""}, {"name": "a card"}, {}, config)

    def put(section: str, key: str, **figures: Any) -> None:
        report.put(plan.Cell(section, "8b", key, 0, 0, lambda lab: {}), figures)

    assert report.goals()[0] == []
    assert len(report.goals()[1]) == 27
    times = {(512, 1): 100, (512, 32): 110, (4096, 1): 100, (4096, 32): 116}
    for (context, size), us in times.items():
        put("forward", f"rows 1 context {context} tokens {size}", device_us=us, over_weight_bytes=1.05)
    for context in plan.GPU.kernel_contexts:
        for size in plan.GPU.kernel_sizes:
            share = 0.7 if (context, size) == (32768, 8) else 0.9 - size / 100
            put("kernels", f"PagedAttention context {context} tokens {size}", us=1.0 + size / 8, to_copy_ceiling=share)
    for name, same in (("qkv", True), ("o", False)):
        put("narrow", name, ways={"in shares": {"us": {"1": 3.0}, "same_bits": same}})
    put("first", "answers", captured_meanwhile=0, compiled_meanwhile=2, ways={
        "ar": {"speed_of_first": 0.95, "ms_to_first_token": 20.0},
        "linear_spec": {"speed_of_first": 0.8, "ms_to_first_token": 600.0},
    })  # fmt: skip
    put("decode", "ar", tokens_per_second=100.0, host_gap=0.01)
    put("decode", "linear_spec", skipped="out of memory")
    for way, us in (("graphs", 100), ("fp8", 61)):
        put("variants", f"{way} context 4096", variant=way, **{"1": {"device_us": us}})
    put("variants", "pdl context 512", variant="pdl", **{"1": {"same_choice": True}, "32": {"same_choice": False}})
    put("variants", "own products, pdl context 512", variant="own products, pdl", **{"1": {"over_weight_bytes": 1.11}})
    put("peers", "rows 1 context 512", device_us=99)
    met, unmeasured = report.goals()
    assert [(round(g["got"], 3), g["passed"]) for g in met] == [
        (1.05, True),  # the AR step over its weights, and with own products
        (1.11, True),
        (1.1, True),  # the block at both contexts
        (1.16, False),
        (1.01, False),  # over plain torch
        (5.0, True),  # attention: us, and over the ceiling
        (0.7, False),
        (0.58, True),
        (1, False),  # a pass that chooses otherwise
        (1, False),  # a product whose bits differ
        (0.61, True),  # fp8
        (1.0, True),  # idle
        (0.8, False),  # first answers: their speed, their first token, what they made
        (600.0, False),
        (2, False),
    ]
    assert len(unmeasured) == 12
    assert {u["reason"] for u in unmeasured} >= {"decode/8b/linear_spec: out of memory"}
    report.cells.pop(f"kernels/8b/PagedAttention context {plan.GPU.kernel_contexts[0]} tokens 8")
    missing = "kernels/8b/PagedAttention context 512 tokens 8: not reached yet"
    assert missing in {u["reason"] for u in report.goals()[1]}
    crowds = [(way, 16, 0) for way in importlib.import_module("gpu.serve").WAYS]
    for way, count, captured in [*crowds, ("mix", 64, 3)]:  # whatever the number of requests, nothing may be made
        figures = {"captured_meanwhile": captured, "compiled_meanwhile": 0}
        put("serve", f"{way} requests {count}", way=way, requests=count, **figures)
    made = [g for g in report.goals()[0] if g["name"] == "graphs and kernels made while requests are served"]
    assert [(g["got"], g["passed"]) for g in made] == [(3, False)]


def test_figures_that_cannot_be_shown_end_no_run(tmp_path: Path) -> None:
    """As those of another version in the same folder: they are kept, and what is measured is written beside them."""
    plan, reports = importlib.import_module("gpu.plan"), importlib.import_module("gpu.report")
    config = plan.RunConfig(("8b",), "bf16", Path("tiny-chat"), plan.GPU)
    about = {"name": "a card", "torch": ""}
    origin = {"date": "", "command": ""}
    ceilings = {"copy_bytes_per_second": 1.0, "matrix_operations_per_second": 1.0}
    report = reports.Report(tmp_path, origin, about, ceilings, config)
    for key, figures in (("ar", {"tokens_per_second": 0.0, "host_gap": None}), ("linear_spec", {"other": 1})):
        report.put(plan.Cell("decode", "8b", key, 0, 0, lambda lab: {}), {"way": key, **figures})
    report.save()
    again = reports.Report(tmp_path, origin, about, ceilings, config)
    assert list(again.cells) == ["decode/8b/ar", "decode/8b/linear_spec"]
    assert any(u["reason"].startswith("its figures make no sense: ") for u in again.goals()[1])


def test_the_script_gives_the_published_tokens_per_pass() -> None:
    """And the same drafts to every mode, so the tokens are the same."""
    card, models, script = (importlib.import_module(f"gpu.{name}") for name in ("card", "models", "script"))
    plan, modes = importlib.import_module("gpu.plan"), importlib.import_module("gpu.modes")
    engine = models.load("tiny", "f32", card.Card("cpu"))
    object.__setattr__(engine, "backend", script.Scripted(engine.backend))
    prompt = modes.prompt_of(plan.GPU.prompt)
    answers = {
        name: generate(engine, prompt, max_new_tokens=plan.GPU.new_tokens, **options)
        for name, options in modes.SETTINGS.items()
        if "temperature" not in options and options["mode"] != "diffusion"  # which keeps wrong drafts
    }
    assert len({tuple(a.token_ids) for a in answers.values()}) == 1
    assert answers["linear_spec"].decode_tpf == pytest.approx(script.PUBLISHED, rel=0.02)
    position = np.arange(10**5)
    guessed, sure = script.guess(position)
    correct = guessed == script.truth(position)
    for chance in (script.EASY, script.HARD):
        assert correct[sure == np.float32(chance)].mean() == pytest.approx(chance, abs=0.01)


def test_the_script_says_the_same_to_passes_that_begin_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """As all do on a card, those of rows that share a forward's tokens among them."""
    card, models, script = (importlib.import_module(f"gpu.{name}") for name in ("card", "models", "script"))
    modes = importlib.import_module("gpu.modes")

    def short(*args: Any, **options: Any) -> BuildConfig:  # plain torch attends all that an arranged row may hold
        return dataclasses.replace(BuildConfig(*args, **options), max_seq_len=256)

    monkeypatch.setattr(models, "BuildConfig", short)
    engine = models.load("tiny", "f32", card.Card("cpu"))
    prompts = [modes.prompt_of(count) for count in (40, 70)]
    object.__setattr__(engine, "backend", script.Scripted(held := engine.backend))
    for name, options in modes.SETTINGS.items():
        if "temperature" in options:
            continue
        said = []
        for held.forwards.ahead in (False, True):
            answers = generate_many(engine, prompts, rows=2, max_new_tokens=60, **options)
            said.append([answer.token_ids for answer in answers])
        assert said[0] == said[1], name


def test_the_script_commits_as_the_rule_does() -> None:
    """What reaches the threshold, or the surest of a span; so mode diffusion has passes as by those confidences."""
    card, models, script = (importlib.import_module(f"gpu.{name}") for name in ("card", "models", "script"))
    modes = importlib.import_module("gpu.modes")
    mask, begin = 9, np.array([0, 0, 0, 3, 3, 5], np.int32)
    position = np.flatnonzero(script.guess(np.arange(1000))[1] == np.float32(script.HARD))[:6]
    ids = np.array([7, mask, mask, mask, 7, 7], np.int32)
    for threshold, committed in ((0.9, [1, 3]), (0.5, [1, 2, 3])):
        token, _, next_ids = script.said(ids, position, mask, np.full(6, threshold, np.float32), begin)
        assert np.flatnonzero(next_ids != ids).tolist() == committed
        assert next_ids[committed].tolist() == token[committed].tolist()

    engine = models.load("tiny", "f32", card.Card("cpu"))
    object.__setattr__(engine, "backend", script.Scripted(engine.backend))
    answer = generate(engine, modes.prompt_of(40), max_new_tokens=96, **modes.SETTINGS["diffusion"])
    blocks = script.guess(np.arange(40, 40 + 96))[1].reshape(3, 32)[:, 1:]  # after each one's seed
    assert answer.nfe["denoise"] == 3 + (blocks < np.float32(0.9)).sum()
