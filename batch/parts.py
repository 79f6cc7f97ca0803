"""The output of a shard: answers as they come in journals, and at last all of them, in order, in one part.

A journal is appended to and may hold half a line after a crash; a part appears whole or not at all. Both hold rows
under their keys, so that what has been answered once is taken from them whoever answered it and however it ended.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ..whole_file import whole
from .shards import Shard

JOURNALS = ".journal"


class Part:
    """Where the answers of a shard go. `suffix` is .jsonl or .parquet; every answer has its row's key as `key`."""

    def __init__(self, output: Path, shard: Shard, suffix: str) -> None:
        self.path = output / f"{shard.part}{suffix}"
        self._journals = output / JOURNALS
        self._name = hashlib.sha256(shard.part.encode()).hexdigest()[:32]  # of any path, however long

    def answered(self) -> dict[str, dict[str, Any]]:
        """The answers that exist already, by key."""
        answers: dict[str, dict[str, Any]] = {}
        for journal in self._old():  # before the part: what a worker that ends now drops is in it
            with contextlib.suppress(FileNotFoundError):
                for line in journal.read_bytes().split(b"\n"):
                    with contextlib.suppress(ValueError):  # torn
                        row = json.loads(line)
                        answers[row["key"]] = row
        return answers | {row["key"]: row for row in self._rows()}

    def journal(self) -> IO[str]:
        """A new file of this worker alone, to which answers are appended as lines of JSON."""
        self._journals.mkdir(exist_ok=True)
        return (self._journals / f"{self._name}.{uuid.uuid4().hex}.jsonl").open("x", encoding="utf-8")

    def finish(self, rows: list[dict[str, Any]]) -> None:
        """Make these answers the part, unless they are it already, and drop the journals."""
        if not self.path.is_file() or _places(rows) != _places(self._rows()):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with whole(self.path) as partial:
                self._write(partial, rows)
        for journal in self._old():
            journal.unlink(missing_ok=True)

    def _old(self) -> Iterator[Path]:
        if self._journals.is_dir():
            yield from (path for path in self._journals.iterdir() if path.name.rsplit(".", 2)[0] == self._name)

    def _rows(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        if self.path.suffix == ".parquet":
            from pyarrow import parquet

            rows = parquet.read_table(self.path).to_pylist()
            return [{name: value for name, value in row.items() if value is not None} for row in rows]
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").split("\n") if line]

    def _write(self, path: Path, rows: list[dict[str, Any]]) -> None:
        if self.path.suffix == ".parquet":
            import pyarrow
            from pyarrow import parquet

            rows = [row | {name: str(row[name]) for name in ("id", "custom_id") if name in row} for row in rows]
            parquet.write_table(pyarrow.Table.from_pylist(rows, schema=_schema()), path)
            return
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _places(rows: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(row["key"], row["line"]) for row in rows]


def _schema() -> Any:
    """The columns of a Parquet part, the same in all of them; a row's other figures are left out."""
    import pyarrow as pa

    return pa.schema(
        {
            "id": pa.string(),
            "custom_id": pa.string(),
            "line": pa.int64(),
            "key": pa.string(),
            "text": pa.string(),
            "token_ids": pa.list_(pa.int32()),
            "finish_reason": pa.string(),
            "mode": pa.string(),
            "prompt_tokens": pa.int32(),
            "decode_tpf": pa.float64(),
        }
    )
