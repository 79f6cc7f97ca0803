"""The benchmarks: random checkpoints have the released shapes, scripts start, results say where they come from.

Nothing is timed here. A cut checkpoint is written and built for real; the full sizes are only counted.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from stand_ins.chats import chat_ids
from stand_ins.scripts import load_script

from nemodiff import generate, load
from nemodiff.builder.build import Builder
from nemodiff.builder.checkpoint.checkpoint import open_checkpoint
from nemodiff.config import parse_config

FOLDER = Path(__file__).parents[2] / "benchmarks"
RESULTS = sorted((FOLDER / "results").glob("*.json"))
SCRIPTS = (
    "accuracy",
    "aiperf",
    "auto",
    "batch",
    "build_memory",
    "build_tensorrt",
    "context",
    "drafter",
    "fp8",
    "gpu",
    "host",
    "infill",
    "kernels",
    "kv_cache",
    "llamacpp",
    "low_bits",
    "make_checkpoint",
    "mask_lowering",
    "quadratic",
    "replicas",
    "serving",
    "sampling",
    "speed",
    "throughput",
    "triton_load",
    "trtllm",
)
PUBLISHED = {"3b": (3_831_659_520, 237), "8b": (8_489_553_920, 309), "14b": (13_506_073_600, 363)}
TINY = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 1024}


MAKE: Any = load_script(FOLDER / "make_checkpoint.py")


@pytest.mark.parametrize("size", sorted(PUBLISHED))
def test_full_sizes_have_the_published_counts(size: str) -> None:
    values = MAKE.config(size)
    shapes = MAKE.shapes(values)
    published = PUBLISHED[size]
    assert (sum(map(math.prod, shapes.values())), len(shapes)) == published
    assert parse_config(values).parameters == published[0]
    assert values["rope_parameters"]["rope_theta"] == (1e9 if size == "14b" else 1e6)


def test_the_size_of_the_cpu_benchmarks_has_the_count_that_their_results_tell() -> None:
    assert sum(map(math.prod, MAKE.shapes(MAKE.config("133m")).values())) == 132_926_208


def test_cut_checkpoint_builds_and_answers(tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    changes = [f"--set={name}={value}" for name, value in TINY.items() if name != "num_hidden_layers"]
    command = [sys.executable, str(FOLDER / "make_checkpoint.py"), str(folder), "--layers=2", "--adapter", *changes]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    builder = Builder(folder, tmp_path / "engine", max_seq_len=256)
    plan = builder.plan()
    assert plan.parameters == sum(map(math.prod, MAKE.shapes(MAKE.config("3b", TINY)).values()))
    assert (plan.tensors, plan.adapter_rank) == (9 * 2 + 3 + 2 * 2, MAKE.RANK)
    assert plan.unknown_fields == ()
    answer = generate(load(builder.run(), threads=1), "Hello", max_new_tokens=4)
    assert len(answer.token_ids) <= 4


def test_weights_are_random_finite_and_alike_for_a_seed(tmp_path: Path) -> None:
    for name in ("one", "two"):
        MAKE.write_checkpoint(tmp_path / name, "8b", TINY)
    path = tmp_path / "one" / "model.safetensors"
    assert path.read_bytes() == (tmp_path / "two" / "model.safetensors").read_bytes()
    matrix = open_checkpoint(tmp_path / "one").tensors["diffusion_head.weight"].array().astype(np.float32)
    assert matrix.shape == (1024, 64)
    assert np.isfinite(matrix).all()
    assert matrix.std() == pytest.approx(MAKE.STD, rel=0.02)
    assert len(np.unique(matrix, axis=0)) == 1024
    with safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_large_model_is_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MAKE, "SHARD", 200_000)
    MAKE.write_checkpoint(tmp_path / "cut", "3b", TINY)
    shards = sorted((tmp_path / "cut").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    tensors = open_checkpoint(tmp_path / "cut").tensors
    assert set(tensors) == set(index["weight_map"]) == set(MAKE.shapes(MAKE.config("3b", TINY)))
    assert sum(t.nbytes for t in tensors.values()) == index["metadata"]["total_size"]


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "make_checkpoint.py"), str(tmp_path)]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "exists" in result.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_scripts_explain_themselves() -> None:
    """In one process, since each imports about the same."""
    program = """
import runpy, sys
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        print("ended", end.code)
"""
    command = [sys.executable, "-P", "-c", program, *(str(FOLDER / f"{name}.py") for name in SCRIPTS)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FOLDER), *sys.path])}
    ended = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120, env=environment)
    *shown, rest = ended.stdout.split("ended 0\n")
    assert [text.startswith("usage: ") for text in shown] == [True] * len(SCRIPTS)
    assert rest == ""


@pytest.mark.trt
def test_compiling_is_measured_against_the_bare_builder(tmp_path: Path) -> None:
    flags = ["--rounds=1", "--layers=1", "--hidden=64", f"--workdir={tmp_path}"]
    command = [sys.executable, str(FOLDER / "build_tensorrt.py"), *flags]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    _, alone, whole = shown.splitlines()
    figures = re.compile(r": \d+\.\d s, (\d+\.\d+) GiB anonymous .*, engine (\d+\.\d+) GiB")
    for line, name in ((alone, "parser and builder alone"), (whole, "nemodiff build")):
        assert line.startswith(name)
        match = figures.search(line)
        assert match is not None
        assert float(match[1]) > 0.05  # GiB, of the library alone: children are counted
        assert float(match[2]) > 0
    assert not list(tmp_path.iterdir())


def test_kernels_fit_a_multiprocessor() -> None:
    """Of the graph's ops and of the fused ones, on every card, within what a multiprocessor holds."""
    kernels = json.loads((FOLDER / "results" / "kernels.json").read_text(encoding="utf-8"))["kernels"]
    most = {80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 120: 24}  # blocks, by the CUDA C++ Programming Guide
    assert {kernel["sm"] for kernel in kernels} == set(most)
    of_both = {
        "BlockAttentionSplit",
        "ConfidenceCommitScan",
        "PagedAttention",
        "PagedRopeWrite",
        "SwiGLU",
        "FlatHeadScan16",
    }
    assert of_both <= {kernel["stage"] for kernel in kernels}
    for kernel in kernels:
        assert 1 <= kernel["blocks_per_multiprocessor"] <= most[kernel["sm"]], kernel
        assert 0 < kernel["occupancy"] <= 1
        assert kernel["spill_bytes"] == 0


def test_loads_and_passes_are_timed_in_a_process_of_their_own(
    tiny_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    figures = importlib.import_module("build_memory").run(tiny_engine)
    assert list(figures["seconds_of_a_pass_by_tokens"]) == ["1", "8", "32"]
    assert 0 < figures["anonymous_bytes"] <= figures["peak_resident_bytes"]


def test_the_host_has_a_share_of_every_mode(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    timing = importlib.import_module("common.timing")
    engine = load(tiny_engine)
    session = timing.TimedSession(engine)
    prompt = chat_ids(engine.text, [{"role": "user", "content": "Count from 3 to 9."}])
    shares = timing.host_share(engine, session, [prompt], 8, 1, 0)
    assert all(0 < share["share"] < 1 for share in shares.values())
    curve = timing.cost_curve(engine, session, 1, 0)
    assert curve[1]["over_one_token"] == 1
    assert all(one["ms"] > 0 for one in curve.values())


def test_engines_take_turns_and_the_second_pass_of_each_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "common", raising=False)
    from common import compared

    clock = [0.0]
    order: list[str] = []

    def run(name: str, *seconds: float) -> None:
        clock[0] += seconds[order.count(name) % 2]
        order.append(name)

    monkeypatch.setattr(compared.time, "process_time", lambda: clock[0])
    times = compared.in_turns({"a": lambda: run("a", 5, 1), "b": lambda: run("b", 7, 2)}, 3)
    assert times == {"a": [1000.0] * 3, "b": [2000.0] * 3}
    assert order == ["a", "a", "b", "b"] * (compared.WARMUP + 3)


def test_questions_repeat_and_cover_every_task() -> None:
    code = "import json; from common import questions as q\n"
    code += "print(json.dumps([q.SEED, list(q.TASKS), [vars(x) | {'text': x.text} for x in q.draw(3)]]))"
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, cwd=FOLDER, check=True, capture_output=True, timeout=120).stdout for _ in range(2)]
    assert runs[0] == runs[1]
    seed, tasks, drawn = json.loads(runs[0])
    assert seed not in (1, 7, 999)  # training's
    assert [q["task"] for q in drawn] == tasks * 3
    assert all(q["text"] and q["answer"] for q in drawn)


ACCURACY = """
import json
from types import SimpleNamespace
from unittest import mock
import accuracy
from common import questions, record
from common.questions import Question

class Engine:
    text = SimpleNamespace(
        render_chat=lambda messages, thinking, tools: [messages, thinking, tools], encode_rendered=lambda text: text
    )

def question(task, text, thoughts=None):
    return Question(task, [{"role": "user", "content": text}], None, thoughts, text.upper())

def generate(engine, prompts, *, mode, max_new_tokens, **options):
    for messages, thinking, _ in prompts:
        text = messages[-1]["content"]
        said = text.upper() if mode != "diffusion" and (thinking or text != "hard") else "no"
        yield SimpleNamespace(
            text=f"so</think>{said}" if thinking else said, content=said, reasoning="so" if thinking else "",
            token_ids=[ord(c) for c in said], nfe={"prefill": 1, "decode": 2}, finish_reason="stop",
            acceptance=SimpleNamespace(lengths=[2, 3] if mode in accuracy.SPECULATION else []),
        )

asked = [question("easy", "a"), question("easy", "hard", "so"), question("open", "b")]
chosen = accuracy.settings([32], ["threshold"])
pool = SimpleNamespace(imap=map)
with (
    mock.patch.multiple(accuracy, SCORED=("easy",), generate_many=generate, _loaded=lambda folder: Engine),
    mock.patch.object(questions, "OPEN", ("open",)),
    mock.patch("multiprocessing.get_context") as context,
):
    context().Pool().__enter__.return_value = pool
    results = accuracy.measure(None, asked, chosen, 1)
    page = accuracy.markdown(results, record.origin(accuracy.PACKAGES, 1), 1)
print(json.dumps([results, page]), end="")
"""


def test_accuracy_scores_text_after_thoughts_and_leaves_open_tasks_out() -> None:
    command = [sys.executable, "-c", ACCURACY]
    shown = subprocess.run(command, cwd=FOLDER, check=True, capture_output=True, text=True, timeout=120).stdout
    results, page = json.loads(shown.splitlines()[-1])
    ar, thinking, linear, quadratic, *diffusion = results
    assert [ar["mode"], linear["mode"], quadratic["mode"]] == ["ar", "linear_spec", "quadratic_spec"]
    assert [ar["all"]["questions"], ar["all"]["right"], ar["all"]["decode_tpf"]] == [2, 1, round((1 + 2) / 4, 3)]
    assert ar["tasks"]["open"]["accuracy"] is None
    assert ar["tasks"]["open"]["decode_tpf"] == 0.5
    assert thinking["thinking"]
    assert [thinking["all"]["questions"], thinking["all"]["right"]] == [1, 1]
    assert linear["answers_unlike_ar"] == quadratic["answers_unlike_ar"] == 0
    assert linear["all"]["acceptance_mean"] == 2.5
    assert len(diffusion) == 4
    assert all(one["answers_unlike_ar"] == 2 and one["all"]["right"] == 0 for one in diffusion)
    assert "| easy | 50.0 / 0.75 | 100.0 / 2.00 |" in page
    assert "| open | - / 0.50 |" in page
    assert "quadratic self-speculation gave AR's tokens in 3 of 3 answers" in page


AIPERF = """
import json, sys
from pathlib import Path
import aiperf
print(json.dumps([aiperf.rows(Path(sys.argv[1])), aiperf.command("aiperf", "http://x", "m", 4, 8)]))
"""
FIGURES = """Metric,avg,min,max,p1,p50,p99,std
Request Latency (ms),3.0,1.0,5.0,1.0,2.5,4.9,0.1
Usage Prompt Tokens (tokens),1,1,1,1,1,1,0

Metric,Value
Request Count (requests),8.0
"""


def test_what_aiperf_exports_becomes_a_table(tmp_path: Path) -> None:
    (tmp_path / "figures.csv").write_text(FIGURES)
    command = [sys.executable, "-c", AIPERF, str(tmp_path / "figures.csv")]
    shown = subprocess.run(command, cwd=FOLDER, check=True, capture_output=True, text=True, timeout=120).stdout
    table, words = json.loads(shown)
    assert table == [
        ["Request Latency (ms)", "3.0", "1.0", "5.0", "4.9", "2.5"],
        ["Request Count (requests)", "8.0", "", "", "", ""],
    ]
    assert words[words.index("--tokenizer") + 1].endswith("examples/tiny-chat-2")


HOST = """
import json, sys
from pathlib import Path
import host
print(json.dumps(host.measure(Path(sys.argv[1]), ["ar", "linear_spec", "mix"], [1, 3], 1, 96)))
"""


def test_the_host_is_timed_beside_a_card_and_while_it_stands_still(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOST, str(tmp_path)]
    shown = subprocess.run(command, cwd=FOLDER, check=True, capture_output=True, text=True, timeout=120).stdout
    results = json.loads(shown.splitlines()[-1])
    assert [(r["mode"], r["rows"]) for r in results] == [
        ("ar", 1),
        ("ar", 3),
        ("linear_spec", 1),
        ("linear_spec", 3),
        ("mix", 3),
    ]
    for result in results:
        assert (result["gap_us"] == 0) == (result["mode"] == "ar")  # whose forwards are begun ahead
        assert result["beside_us"] > 0
        for name in ("gap_us", "beside_us"):
            assert result[f"{name}_per_row"] == pytest.approx(result[name] / result["rows"], rel=0.3, abs=0.1)


CLOCK = """
import time
from types import SimpleNamespace
import numpy as np
import host

def said(ids, *_):
    until = time.thread_time() + 0.05
    while time.thread_time() < until:
        pass
    return ids, ids, ids

host.script.said = said
one = np.zeros(1, np.int32)
inputs = {name: one for name in ("ids", "pos", "index", "threshold", "row")} | {"span": np.zeros((1, 2), np.int32)}
outputs = {name: one.copy() for name in ("token", "confidence", "next_ids")}
card = host.Card(None, 0)
began = card.now()
card.upload(SimpleNamespace(arrays=inputs))
card.download(SimpleNamespace(arrays=outputs, there=None))
print(card.now() - began)
card.wait(card.mark())
print(card.now() - began - card.between(0, 1))
"""


def test_the_script_takes_no_time_of_the_simulated_card() -> None:
    command = [sys.executable, "-c", CLOCK]
    shown = subprocess.run(command, cwd=FOLDER, check=True, capture_output=True, text=True, timeout=120).stdout
    assert all(0 <= float(seconds) < 0.01 for seconds in shown.split())


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_results_say_where_they_come_from(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    result = json.loads(text)
    assert {"date", "command", "versions"} <= set(result)
    assert re.match(r"\d{4}-\d\d-\d\d", result["date"])
    assert result["command"].startswith("python ")
    assert "nemodiff" in result["versions"]
    assert not re.search(r'[" ]/\w', text), "an absolute path of some machine"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_verdicts_follow_from_the_numbers(path: Path) -> None:
    for goal in json.loads(path.read_text(encoding="utf-8")).get("goals", []):
        low, high = (goal["got"], goal["limit"]) if goal["sense"] == "at most" else (goal["limit"], goal["got"])
        assert goal["passed"] == (low <= high), goal
