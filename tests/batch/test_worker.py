"""A worker's parts: what `run --input-file` prints, once per row, wherever an earlier worker was stopped."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import nemodiff
from nemodiff.batch import worker as worker_of_a_job
from nemodiff.batch.parts import JOURNALS, Part
from nemodiff.batch.shards import Shard, cut
from nemodiff.batch.worker import Work, Worker

pyarrow = pytest.importorskip("pyarrow")
FLAGS = {"max_new_tokens": 12, "mode": "linear_spec", "block_length": 8}
MODES = ("ar", "diffusion", None, "quadratic_spec")


def questions(count: int) -> list[dict[str, Any]]:
    return [
        {"id": f"q{i}", "prompt": f"Count from {i} to {i + 5}."} | ({"mode": MODES[i % 4]} if MODES[i % 4] else {})
        for i in range(count)
    ]


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in [*questions(9), {"prompt": "x" * 60_000}]))
    return cut([path], 100)[0]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture
def worker(tiny_engine: Path, output: Path) -> Worker:
    return Worker(Work(tiny_engine, output, ".jsonl", FLAGS, rows=3, threads=1, device=None))


@pytest.fixture(scope="module")
def expected(tiny_engine: Path) -> list[tuple[str, list[int]]]:
    engine = nemodiff.load(tiny_engine, threads=1)
    given = [{**FLAGS, **{k: v for k, v in q.items() if k == "mode"}} for q in questions(9)]
    return [
        (q["id"], nemodiff.generate(engine, q["prompt"], **options).token_ids)
        for q, options in zip(questions(9), given, strict=True)
    ]


def answers(path: Path) -> list[tuple[str, list[int]]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["line"] for row in rows] == sorted(row["line"] for row in rows)
    return [(row["id"], row["token_ids"]) for row in rows]


def test_a_part_holds_the_answers_in_order_and_tells_what_failed(
    worker: Worker, shard: Shard, output: Path, expected: list[tuple[str, list[int]]]
) -> None:
    done = worker.answer(shard)
    assert (done.rows, done.answered, done.kept) == (10, 9, 0)
    assert done.tokens == sum(len(tokens) for _, tokens in expected)
    (failure,) = done.failed
    assert failure["error"]["line"] == 10
    assert "max_seq_len" in failure["error"]["message"]
    assert answers(output / "prompts-00000.jsonl") == expected
    assert list((output / JOURNALS).iterdir()) == []
    again = worker.answer(shard)
    assert (again.answered, again.kept, len(again.failed)) == (0, 9, 1)  # what failed is tried again


@pytest.mark.parametrize("stop", [1, 4, 8])
@pytest.mark.parametrize("torn", [b"", b'{"key": "half'])
def test_a_stopped_worker_s_answers_are_kept(
    worker: Worker,
    shard: Shard,
    output: Path,
    expected: list[tuple[str, list[int]]],
    stop: int,
    torn: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = worker_of_a_job.answer_lines

    def stopping(*arguments: Any, **choices: Any) -> Any:
        for number, result in enumerate(original(*arguments, **choices)):
            if number == stop:
                raise KeyboardInterrupt
            yield result

    with monkeypatch.context() as patch:
        patch.setattr(worker_of_a_job, "answer_lines", stopping)
        with pytest.raises(KeyboardInterrupt):
            worker.answer(shard)
    (journal,) = (output / JOURNALS).iterdir()
    with journal.open("ab") as file:
        file.write(torn)
    kept = journal.read_bytes().count(b"\n")
    assert not (output / "prompts-00000.jsonl").exists()
    done = worker.answer(shard)
    assert (done.answered, done.kept) == (9 - kept, kept)
    assert answers(output / "prompts-00000.jsonl") == expected


def test_rows_that_have_changed_are_answered_anew(worker: Worker, shard: Shard, output: Path) -> None:
    worker.answer(shard)
    path = Path(shard.source)
    lines = path.read_text().splitlines()
    changed = json.loads(lines[2]) | {"prompt": "Count from 1 to 3."}
    path.write_text("\n".join([*lines[:2], json.dumps(changed), *lines[3:9]]) + "\n")
    (shard,) = cut([path], 100)
    done = worker.answer(shard)
    assert (done.rows, done.answered, done.kept) == (9, 1, 8)
    assert len(answers(output / "prompts-00000.jsonl")) == 9


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_part_follows_rows_that_left_or_moved(tiny_engine: Path, tmp_path: Path, output: Path, suffix: str) -> None:
    worker = Worker(Work(tiny_engine, output, suffix, FLAGS, rows=2, threads=1, device=None))
    path = tmp_path / "prompts.jsonl"

    def written(rows: list[dict[str, Any]]) -> tuple[int, list[tuple[int, str]]]:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (shard,) = cut([path], 100)
        done = worker.answer(shard)
        part = Part(output, shard, suffix)
        return done.answered, [(row["line"], row.get("custom_id", "none")) for row in part.answered().values()]

    rows = [{"prompt": "Hi", "custom_id": "a"}, {"prompt": "Hi"}, {"prompt": "Hello", "custom_id": "b"}]
    assert written(rows) == (3, [(1, "a"), (2, "none"), (3, "b")])
    assert written(rows[1:]) == (0, [(1, "none"), (2, "b")])
    assert written(rows[:0:-1]) == (0, [(1, "b"), (2, "none")])
    assert written(rows) == (1, [(1, "a"), (2, "none"), (3, "b")])


def test_a_worker_killed_before_it_dropped_its_journal(worker: Worker, shard: Shard, output: Path) -> None:
    part = Part(output, shard, ".jsonl")
    worker.answer(shard)
    with part.journal() as journal:
        journal.write((output / "prompts-00000.jsonl").read_text())
        journal.write('\0\0\0\n{"key": "half\n')  # as a lost machine may leave it
    before = (output / "prompts-00000.jsonl").stat()
    assert worker.answer(shard).kept == 9
    assert list((output / JOURNALS).iterdir()) == []
    assert (output / "prompts-00000.jsonl").stat() == before  # which is written again only where it would differ


def test_parquet_parts_give_the_same(
    tiny_engine: Path, shard: Shard, output: Path, expected: list[tuple[str, list[int]]]
) -> None:
    worker = Worker(Work(tiny_engine, output, ".parquet", FLAGS, rows=2, threads=1, device=None))
    assert worker.answer(shard).answered == 9
    assert worker.answer(shard).kept == 9
    from pyarrow import parquet

    rows = parquet.read_table(output / "prompts-00000.parquet").to_pylist()
    assert [(row["id"], row["token_ids"]) for row in rows] == expected


def test_a_part_appears_whole_or_not_at_all(output: Path, shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    part = Part(output, shard, ".jsonl")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            part.finish([])
    assert list(output.iterdir()) == []
    Part(output, dataclasses.replace(shard, part="some/where/prompts-00000"), ".jsonl").finish([])
    assert (output / "some/where/prompts-00000.jsonl").is_file()
