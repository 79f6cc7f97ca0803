"""Traces: both formats are valid, hold the whole run, and survive a run that does not end."""

from __future__ import annotations

import collections
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Refused, output_of
from stand_ins.toy_engine import toy

import nemodiff
from nemodiff.runtime.events import trace
from nemodiff.runtime.events.trace import record

PROMPT = "Count from 3 to 9."
SYSTEM = "Answer shortly and to the point, in the form that is asked for."


@pytest.fixture(scope="module")
def engine(tiny_engine: Path) -> nemodiff.LoadedEngine:
    return toy(nemodiff.load(tiny_engine))


def assert_timeline(entries: Any) -> None:
    """The rules of the Trace Event Format that a viewer depends on; spans of one track nest."""
    assert isinstance(entries, list)
    spans, requests = collections.defaultdict(list), collections.defaultdict(list)
    for entry in entries:
        assert isinstance(entry["name"], str)
        assert entry["ph"] in ("M", "X", "i")
        assert all(type(entry[key]) is int for key in ("pid", "tid"))
        assert isinstance(entry.get("args", {}), dict)
        if entry["ph"] == "M":
            assert entry["name"] in ("process_name", "thread_name")
            assert isinstance(entry["args"]["name"], str)
            continue
        assert isinstance(entry["ts"], float)
        if entry["ph"] == "X":
            assert entry["dur"] >= 0
            kind = requests if entry["name"] == "request" else spans
            kind[entry["tid"]].append((entry["ts"], entry["ts"] + entry["dur"]))
        else:
            assert entry["s"] == "t"
    slack = 1.0  # microseconds: sums of floats
    for track, track_spans in spans.items():
        passes = sorted(track_spans)
        for whole in requests[track]:
            assert all(whole[0] - slack <= begin and end <= whole[1] + slack for begin, end in passes)
        assert all(a[1] <= b[0] + slack for a, b in itertools.pairwise(passes))


@pytest.mark.parametrize("mode", nemodiff.MODES)
def test_run_writes_both_formats(tiny_engine: Path, tmp_path: Path, mode: str) -> None:
    arguments = ("run", tiny_engine, "-p", PROMPT, "--mode", mode, "--groups", "all", "--json", "--trace")
    answer = json.loads(output_of(*arguments, tmp_path / "run.jsonl"))
    header, *lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert (header["event"], header["schema"], header["mask_id"]) == ("trace", 1, 100)
    assert (lines[0]["event"], lines[-1]["event"]) == ("started", "finished")
    assert lines[-1]["generation"] | {"timings_ms": 0} == answer | {"timings_ms": 0}
    assert "".join(e["text"] for e in lines if e["event"] == "text") == answer["text"]
    steps = [e for e in lines if e["event"] == "step"]
    assert {kind: sum(e["kind"] == kind for e in steps) for kind in answer["nfe"]} == answer["nfe"]
    assert [e["at"] for e in steps] == sorted(e["at"] for e in steps)
    shown = output_of("trace", "show", tmp_path / "run.jsonl")
    assert shown.startswith(f"request 0, {mode}: {answer['prompt_tokens']} tokens in, {len(answer['token_ids'])} out")
    for kind, count in answer["nfe"].items():
        assert (f" {count} {kind} " in shown) == bool(count)

    output_of(*arguments, tmp_path / "run.json")
    entries = json.loads((tmp_path / "run.json").read_text())
    assert_timeline(entries)
    spans = collections.Counter(e["name"] for e in entries if e["ph"] == "X")
    assert spans == {k: n for k, n in answer["nfe"].items() if n} | {"request": 1}


def test_many_requests_have_a_track_each(tiny_engine: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Count from {i} to 12."}) + "\n" for i in range(5)))
    arguments = (
        "run",
        tiny_engine,
        "--input-file",
        file,
        "--batch-size",
        3,
        "--mode",
        "ar",
        "--json",
        "--system",
        SYSTEM,
        "--trace",
    )
    for suffix in ("json", "jsonl"):
        answers = [json.loads(line) for line in output_of(*arguments, tmp_path / f"t.{suffix}").splitlines()]
    assert [a["reused_tokens"] > 0 for a in answers].count(False) == 1
    entries = json.loads((tmp_path / "t.json").read_text())
    assert_timeline(entries)
    assert {e["tid"] for e in entries if e["name"] == "request"} == {1, 2, 3, 4, 5}
    assert max(e["args"]["rows"] for e in entries if e["name"] == "decode") == 3
    shown = output_of("trace", "show", tmp_path / "t.jsonl").splitlines()
    assert sorted(line.split(",")[0] for line in shown) == [f"request {i}" for i in range(5)]
    assert sum("reused)" in line for line in shown) == 4
    plain = output_of(*arguments[:-1], "--no-prefix-reuse").splitlines()
    again = [json.loads(line) for line in plain]
    assert [a["token_ids"] for a in again] == [a["token_ids"] for a in answers]
    assert {a["reused_tokens"] for a in again} == {0}


def test_a_killed_run_leaves_whole_lines(engine: nemodiff.LoadedEngine, tmp_path: Path) -> None:
    events = nemodiff.events(engine, [PROMPT], steps=True, mode="linear_spec", block_length=4)
    taken = [next(events) for _ in range(9)]
    lines, timeline = tmp_path / "killed.jsonl", tmp_path / "killed.json"
    for path, close in ((lines, ""), (timeline, "]")):
        with record(path, engine) as write:
            for event in taken:
                write(event)
            text = path.read_text()  # as a process that dies now would leave it
        if path is lines:
            assert len([json.loads(line) for line in text.splitlines()]) == 10
        else:
            assert_timeline(json.loads(text + close))
    assert output_of("trace", "show", lines) == "request 0: not finished\n"


def test_without_a_path_or_an_event_there_is_no_file(engine: nemodiff.LoadedEngine, tmp_path: Path) -> None:
    def none() -> Iterator[nemodiff.Event]:
        yield from ()

    for path in (None, tmp_path / "t.json"):
        with record(path, engine) as write:
            assert list(map(write, none())) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (None, "No such file"),
        ("", "not JSON lines of events"),
        ("[\n", "not JSON lines of events"),
        ("5\n", "not JSON lines of events"),
        ('{"event": "trace", "schema": 1}\n[]\n', "not JSON lines of events"),
        ('{"event": "trace"}\n', "not JSON lines of events"),
        ('{"event": "trace", "schema": 1}\n{"event": "step"}\n', "not JSON lines of events"),
        ('{"event": "trace", "schema": 1}\n{"event": "finished", "request": 0, "generation": 5}\n', "not JSON lines"),
        ('{"event": "trace", "schema": 2}\n', "schema is 2, allowed: 1"),
        ("\udcff", "not JSON lines of events"),
        ("[" * 100_000, "not JSON lines of events"),
        ('{"event": "trace", "schema": 1}\n{"event": "text", "request": "0"}\n', "not JSON lines of events"),
        ('{"event": "trace", "schema": 1}\n{"event": "text"}\n', "not JSON lines of events"),
        ('{"event": "trace", "schema": 1}\n', "not JSON lines of events"),
        ('{"event": "trace", "schema": 1}\n{"event": "text", "request": 0}\n', "not JSON lines of events"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, refused: Refused, content: str | None, fragment: str) -> None:
    path = tmp_path / "trace.jsonl"
    if content is not None:
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
    refused(["trace", "show", str(path)], str(path), fragment)
    refused(["trace", "view", str(path), "-o", str(tmp_path / "page.html")], str(path), fragment)


def test_a_request_without_a_pass_is_told(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"event": "trace", "schema": 1}\n{"event": "started", "request": 3}\n')
    assert output_of("trace", "show", tmp_path / "t.jsonl") == "request 3: not finished\n"


def test_a_summary_is_made_once_and_is_plain_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"event": "step", "request": 0, "kind": "decode\x1b[2J", "seconds": 0.25, "kept": None}
    answer = {"mode": "ar", "prompt_tokens": 1, "token_ids": [5], "finish_reason": "stop", "reused_tokens": 0}
    end = {"event": "finished", "request": 0, "generation": answer, "ttft_ms": 1, "itl_ms": None}
    lines = [{"event": "trace", "schema": 1}, {"event": "started", "request": 0}, step, {**end, "longest_gap_ms": None}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    made: list[int] = []
    whole = trace.summary
    monkeypatch.setattr(trace, "summary", lambda events: made.append(1) or whole(events))
    shown = output_of("trace", "show", tmp_path / "t.jsonl")
    assert shown.startswith("request 0, ar: 1 token in, 1 out (stop); 1 decode\\x1b[2J 250.0 ms; 1.0 ms to the first")
    assert made == [1]


def test_a_trace_that_cannot_be_written_is_one_line(tiny_engine: Path, tmp_path: Path, refused: Refused) -> None:
    refused(
        ["run", str(tiny_engine), "-p", PROMPT, "--trace", str(tmp_path / "no" / "t.json")], "no is no folder", code=2
    )
    refused(["run", str(tiny_engine), "-p", PROMPT, "--no-prefix-reuse"], "--input-file", code=2)


@pytest.mark.parametrize("params", [{}, {"temperature": 0.9, "seed": 3}])
def test_a_draft_made_beside_a_verdict_is_told_before_it_is_judged(tiny_engine: Path, params: dict[str, Any]) -> None:
    engine = nemodiff.load(tiny_engine, threads=1)
    options = {"mode": "quadratic_spec", "block_length": 8, "groups": "all", "max_new_tokens": 40, **params}
    events = nemodiff.events(engine, ["Show the times table of 7 up to 5."], steps=True, **options)
    proposed, judged = list[tuple[int, int]](), 0
    for step in (event for event in events if isinstance(event, nemodiff.Step)):
        if step.kind == "verify":
            heads = [token for token in step.before[1:] if token != engine.info.model.mask_id]
            assert heads == [token for _, token in proposed][: len(heads)]
            assert [position for position, _ in proposed] == list(range(step.start + 1, step.start + 1 + len(proposed)))
            judged += len(heads)
        proposed = [(one.position, one.token) for one in step.proposed]
    assert judged > 10


def test_a_merged_commit_tells_what_it_decides(tiny_engine: Path) -> None:
    engine = nemodiff.load(tiny_engine, threads=1)
    model, options = engine.info.model, {"mode": "diffusion", "merge_commit": True, "block_length": 8}
    events = nemodiff.events(engine, [PROMPT], steps=True, max_new_tokens=40, **options)
    decided, more = dict[int, int](), 0
    for step in (event for event in events if isinstance(event, nemodiff.Step)):
        if step.kind == "denoise":
            for i, token in enumerate(step.before):
                assert token in (model.mask_id, *model.eos_ids) or decided[step.start + i] == token
        decided |= {one.position: one.token for one in step.committed}
        more += step.kind == "commit" and len(step.committed) > 1
    assert more > 1
