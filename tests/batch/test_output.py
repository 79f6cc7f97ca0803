"""The folder of a job's answers is one job's and one process's, and nothing is left of a job that came to nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemodiff.batch.output import check_leftovers, claimed, write_failed
from nemodiff.batch.parts import JOURNALS
from nemodiff.batch.shards import Shard
from nemodiff.errors import RequestError

SAID = {"engine": "a", "inputs": ["x" * 60], "mode": None}


def test_a_folder_is_one_process_s(tmp_path: Path) -> None:
    for _ in range(2):  # and free once it has ended
        with claimed(tmp_path / "out", SAID):
            (tmp_path / "out" / "part").touch()
            with (
                pytest.raises(RequestError, match="out: another process works on it; wait or give another folder"),
                claimed(tmp_path / "out", SAID),
            ):
                pass
            assert json.loads((tmp_path / "out" / "job.json").read_text()) == SAID


@pytest.mark.parametrize(
    ("now", "told"),
    [
        ({**SAID, "engine": "b"}, 'whose engine is "a", now "b"; give'),
        ({**SAID, "mode": "ar"}, 'whose mode is null, now "ar"; give'),
        ({**SAID, "inputs": []}, rf'whose inputs is \["{"x" * 55}\.\.\., now \[\]; give'),
        ({**SAID, "more": 1}, "whose more is null, now 1; give"),
    ],
    ids=str,
)
def test_a_folder_is_one_job_s(tmp_path: Path, now: dict[str, object], told: str) -> None:
    with claimed(tmp_path, SAID):
        (tmp_path / "part").touch()
    with pytest.raises(RequestError, match=f"holds answers of another job, {told}"), claimed(tmp_path, now):
        pass


@pytest.mark.parametrize("made", [True, False])
def test_a_job_that_came_to_nothing_leaves_nothing(tmp_path: Path, made: bool) -> None:
    output = tmp_path / "out" if made else tmp_path
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), claimed(output, SAID):
            raise ZeroDivisionError
        assert list(tmp_path.iterdir()) == []


def test_a_record_that_was_torn_as_it_was_written_is_written_again(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text('{"engine": "of another job')
    with claimed(tmp_path, SAID):
        (tmp_path / "part").touch()
    assert json.loads((tmp_path / "job.json").read_text()) == SAID


@pytest.mark.parametrize("record", ["[]", "5", '"engine"', "false"])
def test_a_record_of_something_else_is_another_job_s(tmp_path: Path, record: str) -> None:
    (tmp_path / "job.json").write_text(record)
    with (
        pytest.raises(RequestError, match='holds answers of another job, whose engine is null, now "a"; give another'),
        claimed(tmp_path, SAID),
    ):
        pass
    assert (tmp_path / "job.json").read_text() == record


def test_only_parts_of_rows_that_have_left_are_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / JOURNALS).mkdir()
    for name in (f"{JOURNALS}/a.jsonl", ".part.jsonl", "failed.jsonl", "deep/a-00000.jsonl", "notes.txt", "b.parquet"):
        (tmp_path / name).touch()
    shards = [Shard("a.jsonl", "deep/a-00000", 0, 1)]
    check_leftovers(tmp_path, shards, ".jsonl")
    for name in ("deep/a-00001.jsonl", "a-00000.jsonl"):  # the first of them is told
        (tmp_path / name).touch()
        with pytest.raises(RequestError, match=f"^{tmp_path / name}: holds answers to rows that the input no longer"):
            check_leftovers(tmp_path, shards, ".jsonl")


def test_what_failed_is_forgotten_where_nothing_fails_any_more(tmp_path: Path) -> None:
    write_failed(tmp_path, [{"line": 1}, {"line": 2}])
    assert (tmp_path / "failed.jsonl").read_text() == '{"line": 1}\n{"line": 2}\n'
    for _ in range(2):
        write_failed(tmp_path, [])
        assert list(tmp_path.iterdir()) == []
