"""Inputs cut into shards: every row once, with the number and the fields that `run --input-file` gives it."""

from __future__ import annotations

import datetime
import json
import math
import os
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

from nemodiff.batch import shards
from nemodiff.batch.lines import read_lines
from nemodiff.batch.shards import Row, cut, find_inputs, read
from nemodiff.errors import RequestError

pyarrow = pytest.importorskip("pyarrow")
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
ROWS = st.lists(st.one_of(TEXTS.map(lambda text: json.dumps({"prompt": text}, ensure_ascii=False)), st.just(" ")))


def rows_of(path: Path, size: int) -> list[Row]:
    return [row for shard in cut([path], size) for row in read(shard)]


@hypothesis.given(rows=ROWS, size=st.integers(1, 5), end=st.sampled_from(["", "\n", "\r\n"]), at_once=st.integers(1, 9))
def test_shards_hold_what_the_whole_file_does(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str], size: int, end: str, at_once: int
) -> None:
    path = tmp_path_factory.mktemp("rows") / "prompts.jsonl"
    path.write_bytes(("\ufeff" + ("\r\n" if end == "\r\n" else "\n").join(rows) + end).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_READ", at_once)
        got = [read(shard) for shard in cut([path], size)]
    whole = read_lines(path, as_json=True) if set(rows) - {" "} else []  # a file of none is refused
    assert [row.line for part in got for row in part] == whole
    assert all(len({row.key for row in part}) == len(part) <= size for part in got)


def test_parquet_gives_the_same_rows(tmp_path: Path) -> None:
    from pyarrow import parquet

    fields: list[dict[str, Any]] = [
        {"id": i, "prompt": f"p{i}", "mode": "ar" if i % 2 else None, "max_new_tokens": 1 + i} for i in range(23)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in fields))
    parquet.write_table(pyarrow.Table.from_pylist(fields), tmp_path / "b.parquet", row_group_size=4)
    lines, table = rows_of(tmp_path / "a.jsonl", 5), rows_of(tmp_path / "b.parquet", 5)
    assert [(row.key, row.number, row.labels) for row in lines] == [(row.key, row.number, row.labels) for row in table]
    assert [row.line and dict(row.line.options) for row in lines] == [
        row.line and dict(row.line.options) for row in table
    ]


def test_gaps_of_a_table_are_what_is_not_given(tmp_path: Path) -> None:
    from pyarrow import parquet

    columns: dict[str, Any] = {
        "id": [datetime.date(2026, 11, 28), None],
        "prompt": ["a", "b"],
        "temperature": [0.5, math.nan],
        "max_new_tokens": [4.0, math.nan],
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    first, second = rows_of(tmp_path / "a.parquet", 5)
    assert first.line is not None, first.reason
    assert dict(first.line.options) == {"temperature": 0.5, "max_new_tokens": 4}
    assert first.labels == {"id": "2026-11-28"}  # what JSON cannot write is text in the answers
    assert second.line is not None, second.reason
    assert (dict(second.line.options), second.labels) == ({}, {})


def test_gaps_inside_of_a_cell_are_what_is_not_given(tmp_path: Path) -> None:
    from pyarrow import parquet

    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "integer"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    fields: list[dict[str, Any]] = [
        {"prompt": "a", "json_schema": schema},
        {
            "messages": [{"role": "system", "content": "a", "name": "x"}, {"role": "user", "content": "b"}],
            "tools": [tool],
        },
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in fields))
    columns = {name: [row.get(name) for row in fields] for name in ("prompt", "messages", "json_schema", "tools")}
    parquet.write_table(pyarrow.table(columns), tmp_path / "b.parquet")
    lines, table = rows_of(tmp_path / "a.jsonl", 5), rows_of(tmp_path / "b.parquet", 5)
    assert [row.reason for row in lines] == [None, None]
    assert [row.key for row in lines] == [row.key for row in table]


def test_a_broken_row_is_told_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "a"}\nnot json\n{"id": "c", "prompt": "a", "modus": "ar"}\n\xff\n{"prompt": "a"}\n')
    rows = rows_of(path, 2)
    assert [row.line is not None for row in rows] == [True, False, False, False, True]
    for row, problem in zip(rows[1:4], ["not JSON", "is mode meant?", "not UTF-8 at byte 0"], strict=True):
        assert row.reason is not None
        assert f"{path}, line {row.number}: " in row.reason
        assert problem in row.reason
    assert rows[2].labels == {"id": "c"}


def test_a_key_follows_the_fields_and_not_their_spelling(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    texts = ['{"prompt": "a", "seed": 1}', '{"seed":1,"prompt":"a"}', '{"prompt": "a", "seed": 2}', '{"prompt": "b"}']
    path.write_text("\n".join(texts))
    keys = [row.key for row in rows_of(path, 4)]
    assert keys[1] == f"{keys[0]}-2"  # the same row a second time
    assert len(set(keys)) == 4
    assert [row.key for row in rows_of(path, 1)][1] == keys[0]  # a key is unique in its shard


def test_parts_lie_as_the_inputs_do(tmp_path: Path) -> None:
    for name in ("x/a.jsonl", "y/a.jsonl", "y/a.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if name.endswith(".jsonl"):
            (tmp_path / name).write_text('{"prompt": "a"}\n' * 3)
        else:
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "a"}]), tmp_path / name)
    inputs = find_inputs([f"{tmp_path}/**/a.*", f"{tmp_path}/x/a.jsonl"], tmp_path / "out")
    parts = [shard.part for shard in cut(inputs, 2)]
    assert parts == ["x/a-00000", "x/a-00001", "y/a.jsonl-00000", "y/a.jsonl-00001", "y/a.parquet-00000"]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("none*", "no such file"),
        ("a.txt", "allowed: files that end in"),
        ("out", "is no regular file"),
        ("pipe", "is no regular file"),
        ("out/*", "is in the output's folder"),
    ],
)
def test_inputs_that_are_none(tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "out" / "a-00000.jsonl").write_text("{}")
    with pytest.raises(RequestError, match=problem):
        find_inputs([str(tmp_path / name)], tmp_path / "out")


def test_a_pattern_does_not_meet_the_answers(tmp_path: Path) -> None:
    for name in ("a.jsonl", "out/a-00000.jsonl", "out/failed.jsonl", "out/job.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert find_inputs([f"{tmp_path}/**/*.json*"], tmp_path / "out") == [tmp_path / "a.jsonl"]


def test_a_file_that_is_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("no")
    with pytest.raises(RequestError, match=r"a\.parquet: not Parquet"):
        cut([tmp_path / "a.parquet"], 5)
