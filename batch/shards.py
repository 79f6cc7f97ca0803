"""Inputs cut into shards: rows of one file that one worker answers into one part of the output."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import RequestError, first_line, install
from ..runtime.text.files import plain
from .lines import Line, given, labels, make_line, read_object

_READ = 8 << 20  # bytes at once while lines are counted
_KEY = 32  # hexadecimal digits


@dataclasses.dataclass(frozen=True)
class Shard:
    """Some rows of an input.

    part: of the output, relative to its folder and without a suffix. first: the first row, from 0. count: rows, blank
    lines included. begin, end: bytes of the file; of JSON lines alone.
    """

    source: str
    part: str
    first: int
    count: int
    begin: int = 0
    end: int = 0


class Row(NamedTuple):
    """A row as it was read. `key` stands for its id, prompt and options; `line` is None where `reason` refuses it."""

    key: str
    number: int  # from 1
    labels: dict[str, Any]
    line: Line | None
    reason: str | None


def find_inputs(patterns: Iterable[str], output: Path) -> list[Path]:
    """The files that paths and patterns name, each once, in the order of their names; none of the output's folder.

    Raises RequestError.
    """
    output = output.resolve()
    found = set[Path]()
    for pattern in patterns:
        names = [pattern] if Path(pattern).is_file() else glob.glob(pattern, recursive=True)  # noqa: PTH207 (absolute too)
        paths = [Path(name).resolve() for name in names if Path(name).is_file()]
        files = [path for path in paths if not path.is_relative_to(output)]
        if not files:
            problem = "is in the output's folder" if paths else "is no regular file" if names else "no such file"
            raise RequestError(f"{pattern}: {problem}; give files or patterns of JSON lines or Parquet")
        found.update(files)
    for path in found:
        if path.suffix not in (".jsonl", ".json", ".ndjson", ".parquet"):
            raise RequestError(
                f"{path}: allowed: files that end in .jsonl, .ndjson, .json or .parquet; unpack or rename it"
            )
    return sorted(found)


def cut(inputs: list[Path], rows: int) -> list[Shard]:
    """Shards of up to `rows` rows, over all inputs; parts lie as the inputs do below the folder that holds them all."""
    above = Path(os.path.commonpath([path.parent for path in inputs]))
    shards = []
    for path in inputs:
        name = path.relative_to(above).with_suffix("")
        if any(other != path and other.with_suffix("") == path.with_suffix("") for other in inputs):
            name = path.relative_to(above)  # a.jsonl beside a.parquet
        pieces = _cut_parquet(path, rows) if path.suffix == ".parquet" else _cut_lines(path, rows)
        for number, (first, count, begin, end) in enumerate(pieces):
            shards.append(Shard(str(path), f"{name}-{number:05d}", first, count, begin, end))
    return shards


def read(shard: Shard) -> list[Row]:
    """The rows of a shard, blank lines left out; what is wrong with a row is told in its place."""
    rows = []
    seen: dict[str, int] = {}
    for number, fields, reason in _parquet(shard) if shard.source.endswith(".parquet") else _lines(shard):
        line = None
        if reason is None:
            try:
                line = make_line(fields, Path(shard.source), number)
            except RequestError as error:
                reason = str(error)
        key = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:_KEY]
        seen[key] = seen.get(key, 0) + 1
        if seen[key] > 1:  # the same row again is a row of its own
            key += f"-{seen[key]}"
        own = json.loads(json.dumps(labels(fields), default=str))  # a table has dates, and JSON none
        rows.append(Row(key, number, own, line, reason))
    return rows


def _cut_lines(path: Path, rows: int) -> Iterator[tuple[int, int, int, int]]:
    first = count = begin = at = 0
    with path.open("rb") as file:
        while data := file.read(_READ):
            start = 0
            while (end := data.find(b"\n", start) + 1) > 0:
                count += 1
                if count == rows:
                    yield first, count, begin, at + end
                    first += count
                    count = 0
                    begin = at + end
                start = end
            at += len(data)
    if at > begin:
        yield first, count + 1, begin, at


def _lines(shard: Shard) -> Iterator[tuple[int, dict[str, Any], str | None]]:
    with Path(shard.source).open("rb") as file:
        file.seek(shard.begin)
        data = file.read(shard.end - shard.begin)
    for number, line in enumerate(data.split(b"\n"), shard.first + 1):
        try:
            text = plain(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield number, {}, f"{shard.source}, line {number}: not UTF-8 at byte {error.start} of it; convert it first"
            continue
        if not text.strip():
            continue
        try:
            yield number, read_object(text, f"{shard.source}, line {number}"), None
        except RequestError as error:
            yield number, {}, str(error)


def _cut_parquet(path: Path, rows: int) -> Iterator[tuple[int, int, int, int]]:
    total = _open_parquet(path).metadata.num_rows
    for first in range(0, total, rows):
        yield first, min(rows, total - first), 0, 0


def _parquet(shard: Shard) -> Iterator[tuple[int, dict[str, Any], str | None]]:
    file = _open_parquet(Path(shard.source))
    start = 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        low, high = max(shard.first, start), min(shard.first + shard.count, start + count)
        if low < high:
            table = file.read_row_group(group).slice(low - start, high - low)
            for number, fields in enumerate(table.to_pylist(), low + 1):
                yield number, given(fields), None
        start += count


def _open_parquet(path: Path) -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise RequestError(f"{path}: needs pyarrow; install it: {install('nemodiff[ray]')}") from None
    try:
        return parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise RequestError(f"{path}: not Parquet ({first_line(error)}); write it again or give JSON lines") from None
