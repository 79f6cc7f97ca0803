"""`nemodiff batch`: a killed command goes on, a lost machine costs nothing, wrong folders are refused.

On real Ray, but for how many workers there are, what each gets and what becomes of its results.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import conftest
import pytest
from conftest import Refused, assert_one_line, eventually

import nemodiff
from nemodiff.batch import job as jobs
from nemodiff.batch.cluster import connected
from nemodiff.batch.job import Job, Totals, run_job
from nemodiff.batch.parts import JOURNALS
from nemodiff.batch.worker import Work
from nemodiff.engine_folder import engine_digest
from nemodiff.engine_info import read_engine
from nemodiff.errors import EngineError, RequestError

pytest.importorskip("ray")
ROWS = 240
OPTIONS = ["--max-new-tokens", "24", "--mode", "ar", "--rows-per-part", "20", "--batch-size", "2"]
CLUSTER = Path(__file__).parents[1] / "stand_ins" / "ray_cluster.py"
PATIENCE = 3 * conftest.PATIENCE  # of a command that starts Ray


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """Of a command whose Ray keeps its files in a short-lived folder; a socket's path has room for a short name."""
    folder = tempfile.mkdtemp(prefix="ray")
    yield {**os.environ, "RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"id": i, "prompt": f"Count from {i % 12} to {i}."} for i in range(ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(engine: Path, prompts: Path, output: Path, *flags: str) -> list[str]:
    words = ["batch", str(engine), "--input", str(prompts), "--output", str(output), *OPTIONS, *flags]
    return [sys.executable, "-m", "nemodiff", *words]


def answered(output: Path) -> set[int]:
    """The rows that have an answer; one that goes from a journal into a part may be in both, or its journal be gone."""
    found: set[int] = set()
    for path in (*output.glob(f"{JOURNALS}/*"), *output.glob("prompts-*.jsonl")):
        with contextlib.suppress(FileNotFoundError):
            found |= {json.loads(line)["id"] for line in path.read_bytes().split(b"\n")[:-1]}
    return found


def check(output: Path, engine: Path) -> None:
    """Every row has one answer, in the input's order; a sample is what the engine answers alone."""
    rows = [
        json.loads(line) for path in sorted(output.glob("prompts-*.jsonl")) for line in path.read_text().splitlines()
    ]
    assert [row["id"] for row in rows] == list(range(ROWS))
    assert not (output / JOURNALS).exists()
    loaded = nemodiff.load(engine, threads=1)
    for i in range(0, ROWS, 40):
        alone = nemodiff.generate(loaded, f"Count from {i % 12} to {i}.", max_new_tokens=24, mode="ar")
        assert rows[i]["token_ids"] == alone.token_ids


@pytest.mark.long
def test_a_command_goes_on_after_it_was_told_to_end_and_killed(
    tiny_engine: Path, prompts: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    """What is told to end says nothing. What was killed before it, and after it, is as good."""
    output = tmp_path / "out"
    words = command(tiny_engine, prompts, output, "--threads", "1")
    with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True) as first:
        eventually(lambda: len(answered(output)) > 3 or first.poll() is not None)
        first.terminate()
        _, said = first.communicate(timeout=PATIENCE)
    assert (first.returncode, said) == (128 + signal.SIGTERM, "")
    before = len(answered(output))
    second = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    eventually(lambda: len(answered(output)) > before + 3 or second.poll() is not None)
    os.killpg(second.pid, signal.SIGKILL)
    second.communicate()
    eventually(lambda: not _alive(second.pid))
    before = len(answered(output))
    assert before < ROWS
    left = output / JOURNALS / f"{'0' * 32}.{'1' * 32}.jsonl"  # of a shard that has left the input
    left.write_text('{"key": "k", "line": 5}\n')
    third = subprocess.run(words, env=environment, stderr=subprocess.PIPE, text=True, timeout=PATIENCE)
    assert third.returncode == 0, third.stderr
    assert "logging.cc" not in third.stderr
    last = third.stderr.splitlines()[-1]
    match = re.search(r"(\d+) rows answered .* (\d+) kept from before, 0 failed", last)
    assert match, last
    answered_now, kept = map(int, match.groups())
    assert answered_now + kept == ROWS
    assert before <= kept < ROWS  # a worker may live a moment longer than the command
    check(output, tiny_engine)


def test_a_command_that_is_told_to_end_while_ray_begins(
    tiny_engine: Path, prompts: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    """Ray's own handler takes the signal's number for an exit code."""
    program = """
import signal
from ray._private import worker
worker.connect = lambda *_, **__: signal.raise_signal(signal.SIGTERM)
from nemodiff.__main__ import main
main()
"""
    python, _, _, *words = command(tiny_engine, prompts, tmp_path / "out")
    words = [python, "-c", program, *words]
    with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True) as job:
        _, said = job.communicate(timeout=PATIENCE)
    assert (job.returncode, said) == (128 + signal.SIGTERM, "")
    eventually(lambda: not _alive(job.pid))


def _alive(group: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, 0)
        return True
    return False


@pytest.mark.long
def test_a_lost_machine_costs_nothing(
    tiny_engine: Path, prompts: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    output = tmp_path / "out"
    started = [sys.executable, str(CLUSTER)]
    with subprocess.Popen(
        started, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as cluster:
        assert cluster.stdin is not None
        assert cluster.stdout is not None
        try:
            address = cluster.stdout.readline().strip()
            words = command(tiny_engine, prompts, output, "--address", address)
            job = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
            eventually(lambda: len(list(output.glob(f"{JOURNALS}/*"))) > 1 or job.poll() is not None)
            assert len(list(output.glob("prompts-*.jsonl"))) < ROWS // 20  # both have work to do
            cluster.stdin.write("kill\n")
            cluster.stdin.flush()
            assert cluster.stdout.readline() == "killed\n"
            _, said = job.communicate(timeout=PATIENCE)
        finally:
            cluster.stdin.close()
    assert job.returncode == 0, said
    assert "by 2 workers" in said.splitlines()[-1]
    check(output, tiny_engine)


def test_folders_of_others_are_refused(tiny_engine: Path, prompts: Path, tmp_path: Path, refused: Refused) -> None:
    words = ["batch", str(tiny_engine), "--input", str(prompts), "--output", str(tmp_path / "out")]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    refused(words, "holds files but no job.json", "give an empty folder")
    (tmp_path / "out" / "notes.txt").unlink()
    (tmp_path / "out" / "job.json").write_text(json.dumps({"engine": "another"}))
    refused(words, "holds answers of another job, whose engine is", "give another folder")


def test_what_no_row_could_get_is_refused_at_once(
    tiny_engine: Path, prompts: Path, tmp_path: Path, refused: Refused
) -> None:
    words = ["batch", str(tiny_engine), "--output", str(tmp_path / "out"), "--input"]
    refused([*words, str(tmp_path / "none.jsonl")], "none.jsonl: no such file")
    (tmp_path / "empty.jsonl").touch()
    here = ["batch", str(tiny_engine), "--input", str(prompts), "--output", str(tmp_path / "empty.jsonl")]
    refused(here, "empty.jsonl: no folder can be made there (File exists); give another")
    refused([*words, str(tmp_path / "empty.jsonl")], "empty.jsonl: no prompts")
    refused([*words, str(prompts), "--threshold", "-1"], "threshold")
    refused([*words, str(prompts), "--batch-size", "9"], "rows is 9, allowed: 1 to 8", "--max-batch-size")


def test_more_threads_than_a_machine_has_are_not_waited_for(
    tiny_engine: Path, prompts: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    Pretended(monkeypatch, 2.0, 4.0)
    words = ["batch", str(tiny_engine), "--input", str(prompts), "--output", str(tmp_path / "out"), "--threads", "5"]
    refused(words, "--threads is 5, allowed: 1 to 4", "the largest machine", "give fewer, or leave it out")


def test_a_cluster_that_is_not_there(
    tiny_engine: Path, prompts: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    for address, why in (
        ("127.0.0.1:1", "no cluster answers (Connection refused)"),
        ("head:port", "no cluster answers (its port is no number)"),
    ):
        words = command(tiny_engine, prompts, tmp_path / "out", "--address", address)
        ended = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=PATIENCE)
        assert ended.returncode == 1
        assert_one_line(ended.stderr, f"{address}: {why}", "give --address HOST:PORT")
    assert not (tmp_path / "out").exists()


def test_a_ray_that_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed_out(**_: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.init", timed_out)
    with pytest.raises(RequestError, match=r"^Ray: no cluster answers \(The current node timed out"), connected(None):
        pass


class Pretended:
    """Ray with some machines: one worker here answers all shards, the last one first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *cpus: float, gpus: int = 0) -> None:
        self.cpus = cpus
        self.gpus = gpus
        self.given: dict[str, Any] = {}  # to the workers
        self.dead: list[dict[str, Any]] = []
        self._rows: list[dict[str, Any]] = []
        names = {"from_items": self._from_items, "ActorPoolStrategy": lambda **choices: choices}
        monkeypatch.setitem(sys.modules, "ray.data", SimpleNamespace(**names))
        monkeypatch.setattr(jobs, "connected", lambda address: contextlib.nullcontext(self))

    def cluster_resources(self) -> dict[str, float]:
        return {"GPU": float(self.gpus)} if self.gpus else {}

    def nodes(self) -> list[dict[str, Any]]:
        machines = [{"Alive": True, "Resources": {"CPU": count} if count else {}} for count in self.cpus]
        return [*machines, {"Alive": False, "Resources": {"CPU": 1.0}}]

    def _from_items(self, items: list[dict[str, Any]], **_: int) -> Pretended:
        self._rows = items
        return self

    def map(self, kind: Any, *, fn_constructor_args: tuple[Any, ...], **given: Any) -> Pretended:
        self.given = given
        worker = kind(*fn_constructor_args)
        self._rows = [worker(row) for row in reversed(self._rows)]
        return self

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        yield from self._rows


def idle_workers(monkeypatch: pytest.MonkeyPatch) -> list[Work]:
    """What workers are told that answer nothing."""
    told = list[Work]()

    def worker(work: Work) -> Any:
        told.append(work)
        nothing = {"rows": 0, "answered": 0, "kept": 0, "tokens": 0, "failed": [], "count": 0}
        return lambda row: {"done": json.dumps({**nothing, "part": row["part"]})}

    monkeypatch.setattr(jobs, "Worker", worker)
    return told


@pytest.mark.parametrize(
    ("cpus", "gpus", "chosen", "workers", "share"),
    [
        ((8.0, 4.0, 0), 0, {}, 2, {"num_cpus": 4}),
        ((8.0, 4.0), 0, {"workers": 1}, 1, {"num_cpus": 4}),
        ((8.0, 4.0), 0, {"workers": 3}, 3, {"num_cpus": 2}),
        ((2.0,), 0, {"workers": 9}, 5, {"num_cpus": 1}),  # there are 5 shards
        ((2.0,), 0, {"workers": 4}, 4, {"num_cpus": 1}),
        ((8.0, 4.0), 0, {"threads": 8}, 2, {"num_cpus": 8}),
        ((8.0, 4.0), 3, {"backend": "torch"}, 3, {"num_gpus": 1}),
        ((0,), 1, {"backend": "torch"}, 1, {"num_gpus": 1}),
        ((8.0,), 1, {"backend": "torch", "threads": 2}, 1, {"num_gpus": 1}),
        ((8.0,), 0, {"backend": "torch", "device": "cuda"}, 1, {"num_gpus": 1}),
        ((8.0,), 3, {"backend": "torch", "device": "cpu"}, 1, {"num_cpus": 8}),
        ((8.0,), 3, {}, 1, {"num_cpus": 8}),
    ],
)
def test_workers_share_what_the_machines_have(
    tiny_engine: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cpus: tuple[float, ...],
    gpus: int,
    chosen: dict[str, Any],
    workers: int,
    share: dict[str, int],
) -> None:
    """One for each GPU or machine; where they have no GPU, the CPUs of the least machine are shared."""
    pretended = Pretended(monkeypatch, *cpus, gpus=gpus)
    info = read_engine(tiny_engine)
    manifest = dataclasses.replace(info.manifest, backend=chosen.pop("backend", info.manifest.backend))
    monkeypatch.setattr(jobs, "read_engine", lambda engine: dataclasses.replace(info, manifest=manifest))
    told = idle_workers(monkeypatch)
    job = Job(tiny_engine, (str(prompts),), tmp_path / "out", {"mode": "ar"}, 48, **chosen)
    assert run_job(job, lambda done, rows: None).workers == workers
    pool = {"min_size": 1, "max_size": workers, "initial_size": workers, "max_tasks_in_flight_per_actor": 2}
    assert pretended.given == {"compute": pool, **share}
    threads = share.get("num_cpus", chosen.get("threads"))
    assert told == [Work(tiny_engine, tmp_path / "out", ".jsonl", {"mode": "ar"}, None, threads, job.device)]


@pytest.mark.parametrize(
    ("name", "format", "suffix"),
    [
        ("a.jsonl", None, ".jsonl"),
        ("a.parquet", None, ".parquet"),
        ("a.jsonl", "parquet", ".parquet"),
        ("a.parquet", "jsonl", ".jsonl"),
    ],
)
def test_answers_are_written_as_asked_or_as_the_input_is(
    tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, format: str | None, suffix: str
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    Pretended(monkeypatch, 1.0)
    told = idle_workers(monkeypatch)
    (tmp_path / "a.jsonl").write_text('{"prompt": "Hi"}')
    parquet.write_table(pyarrow.table({"prompt": ["Hi"]}), tmp_path / "a.parquet")
    run_job(Job(tiny_engine, (str(tmp_path / name),), tmp_path / "out", {}, 1, format=format), lambda *_: None)
    assert [work.suffix for work in told] == [suffix]


def test_a_cluster_without_cpus_is_not_waited_for(
    tiny_engine: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Pretended(monkeypatch, 0)
    with pytest.raises(RequestError, match="the cluster has no CPUs for workers; start a machine of it with some"):
        run_job(Job(tiny_engine, (str(prompts),), tmp_path / "out", {}, 48), lambda done, rows: None)


def test_rows_that_fail_are_told_and_a_job_counts_what_it_does(
    tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Pretended(monkeypatch, 1.0)
    file, output = tmp_path / "prompts.jsonl", tmp_path / "out"
    told = list[tuple[int, int]]()
    job = Job(tiny_engine, (str(file),), output, {"mode": "ar", "max_new_tokens": 3}, 2, threads=1)

    def run(*rows: str) -> Totals:
        told.clear()
        file.write_text("\n".join(rows))
        return run_job(job, lambda done, rows: told.append((done, rows)))

    rows = ['{"prompt": "Hi"}', "no", "", '{"prompt": "Ho"}', '{"id": 3, "prompt": 1}']
    assert run(*rows) == Totals(rows=4, answered=2, kept=0, failed=2, tokens=6, workers=1)
    assert told == [(0, 5), (1, 5), (3, 5), (5, 5)]
    said = {"engine": engine_digest(tiny_engine), "inputs": [str(file)], "rows_per_part": 2, "format": "jsonl"}
    assert json.loads((output / "job.json").read_text()) == {**said, **job.flags}
    first, last = map(json.loads, (output / "failed.jsonl").read_text().splitlines())
    assert (first["error"]["line"], first["error"]["input"]) == (2, str(file))
    assert (last["error"]["line"], last["id"]) == (5, 3)
    assert run(*rows) == Totals(rows=4, answered=0, kept=2, failed=2, tokens=0, workers=1)
    assert run(rows[0], "", "", *rows[3:4] * 2) == Totals(rows=3, answered=1, kept=2, failed=0, tokens=3, workers=1)
    assert {path.name for path in output.iterdir()} == {"job.json", *(f"prompts-0000{n}.jsonl" for n in range(3))}
    with pytest.raises(RequestError, match=r"prompts-00001\.jsonl: holds answers to rows that the input no longer has"):
        run(rows[0])
    (output / "job.json").write_text(json.dumps({**said, **job.flags, "of_another_version": 1}))
    with pytest.raises(RequestError, match="answers of another job, whose of_another_version is 1, now null; give"):
        run(*rows)


def test_a_worker_that_fails_is_one_line(
    tiny_engine: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Pretended(monkeypatch, 1.0)

    class ActorError(Exception):
        cause = ValueError("a trace\n  of Ray\n\nits reason\n\n")

    def worker(work: Work) -> Any:
        raise ActorError("words around it") from None

    monkeypatch.setattr(jobs, "Worker", worker)
    with pytest.raises(EngineError, match=r"^a worker failed \(its reason\); run the same command again"):
        run_job(Job(tiny_engine, (str(prompts),), tmp_path / "out", {}, 48), lambda done, rows: None)
