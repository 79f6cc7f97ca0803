"""`nemodiff batch` on real Ray: a killed command goes on, a lost machine costs nothing, wrong folders are refused."""

from __future__ import annotations

import contextlib
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

import conftest
import pytest
from conftest import Refused, assert_one_line, eventually

import nemodiff
from nemodiff.batch.cluster import connected
from nemodiff.batch.parts import JOURNALS
from nemodiff.engine_folder import engine_digest
from nemodiff.errors import RequestError

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
    said = {"engine": engine_digest(tiny_engine), "inputs": [str(prompts)], "rows_per_part": 1000, "format": "jsonl"}
    (tmp_path / "out" / "job.json").write_text(json.dumps({**said, "chat": True, "of_another_version": 1}))
    refused(words, "holds answers of another job, whose ", "give another folder")


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
    tiny_engine: Path, prompts: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    words = command(tiny_engine, prompts, tmp_path / "out", "--threads", "1000")
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert_one_line(done.stderr, "--threads is 1000, allowed: 1 to ", "give fewer, or leave it out")
    assert (done.returncode, (tmp_path / "out").exists()) == (1, False)


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
