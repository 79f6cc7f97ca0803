"""An engine that answers one shard after the other, many rows of each at the same time."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import NemodiffError
from ..runtime.loading import load
from .answers import answer_lines
from .parts import Part
from .shards import Shard, read


@dataclasses.dataclass(frozen=True)
class Work:
    """What every worker of a job is told.

    flags: options of all rows, under those that a row sets. rows: answered at the same time; None takes the engine's
    max_batch_size. threads, device: as in `load`.
    """

    engine: Path
    output: Path
    suffix: str
    flags: Mapping[str, Any]
    rows: int | None
    threads: int | None
    device: str | None


@dataclasses.dataclass(frozen=True)
class Done:
    """What became of a shard. answered, kept: rows, answered now and before. failed: rows with the reason."""

    rows: int
    answered: int
    kept: int
    tokens: int
    failed: list[dict[str, Any]]


class Worker:
    """Answers shards; Ray keeps one in each actor."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._engine = load(work.engine, threads=work.threads, device=work.device)
        self._rows = work.rows or self._engine.info.build.max_batch_size

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Answer what is left of a shard, given as the fields of `Shard`.

        Gives those of `Done`, the shard's part and its count, as text that Arrow can hold whatever is in it.
        """
        shard = Shard(**row)
        done = dataclasses.asdict(self.answer(shard))
        return {"done": json.dumps({**done, "part": shard.part, "count": shard.count})}

    def answer(self, shard: Shard) -> Done:
        """Answer what is left of a shard and write its part."""
        rows = read(shard)
        part = Part(self._work.output, shard, self._work.suffix)
        answers = part.answered()
        kept = sum(row.key in answers for row in rows)
        failed = [_failure(shard, row.number, row.labels, row.reason) for row in rows if row.reason is not None]
        left = {row.number: row for row in rows if row.line is not None and row.key not in answers}
        tokens = 0
        if left:
            lines = [row.line for row in left.values() if row.line is not None]
            with part.journal() as journal:
                results = answer_lines(
                    self._engine,
                    lines,
                    self._work.flags,
                    lambda event: event,
                    in_order=False,
                    rows=self._rows,
                    prefix_reuse=True,
                    text=False,
                )
                for line, result in results:
                    row = left[line.number]
                    if isinstance(result, NemodiffError):
                        failed.append(_failure(shard, line.number, row.labels, str(line.refusal(result))))
                        continue
                    tokens += len(result.token_ids)
                    answers[row.key] = {**row.labels, "line": line.number, "key": row.key, **result.as_dict()}
                    journal.write(json.dumps(answers[row.key]) + "\n")
                    journal.flush()
        part.finish([answers[row.key] | {"line": row.number} for row in rows if row.key in answers])
        failed.sort(key=lambda failure: failure["error"]["line"])
        return Done(len(rows), len(rows) - kept - len(failed), kept, tokens, failed)


def _failure(shard: Shard, number: int, labels: Mapping[str, Any], reason: str | None) -> dict[str, Any]:
    return {**labels, "error": {"message": reason, "input": shard.source, "line": number}}
