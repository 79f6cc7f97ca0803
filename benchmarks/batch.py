"""Measure `nemodiff batch` on one machine: rows per second with one worker and with two, of one thread each.

Rows count from the first finished part to the last, so that starting Ray and loading engines does not. The contenders
take turns, and all give the same answers. Writes `results/batch.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import questions, record

from nemodiff.batch.job import Job, run_job
from nemodiff.builder.build import Builder

PACKAGES = ("nemodiff", "onnxruntime", "ray", "pyarrow")


@dataclasses.dataclass
class Run:
    """One job. seconds: of all of it. rate: rows per second between its first and its last part."""

    seconds: float
    rate: float
    answers: list[Any]


def measure(engine: Path, prompts: Path, output: Path, workers: int, part: int) -> Run:
    """One job with some workers of one thread each."""
    seen: list[tuple[float, int]] = []
    flags = {"max_new_tokens": 48, "block_length": 16}
    job = Job(engine, (str(prompts),), output, flags, workers=workers, threads=1, rows_per_part=part)
    began = time.perf_counter()
    run_job(job, lambda done, _rows: seen.append((time.perf_counter(), done)))
    seconds = time.perf_counter() - began
    (first, before), (last, after) = seen[1], seen[-1]
    answers = [json.loads(line) for path in sorted(output.glob("*-*.jsonl")) for line in path.read_text().splitlines()]
    return Run(seconds, (after - before) / (last - first), [answer["token_ids"] for answer in answers])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000, help="rows of a job (default 2000)")
    parser.add_argument("--rounds", type=int, default=3, help="jobs of each kind (default 3)")
    arguments = parser.parse_args()
    texts = [question.text for question in questions.first(arguments.rows)]
    origin = record.origin(PACKAGES, 1)
    runs: dict[int, list[Run]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engine = Builder(record.MODEL, folder / "engine").run()
        prompts = folder / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        for number in range(arguments.rounds):
            for workers, kind in runs.items():
                kind.append(measure(engine, prompts, folder / f"{number}-{workers}", workers, arguments.rows // 20))
    unlike = sum(run.answers != runs[1][0].answers for kind in runs.values() for run in kind)
    ratio = statistics.median(two.rate / one.rate for one, two in zip(runs[1], runs[2], strict=True))
    figures = {
        "checkpoint": record.MODEL.name,
        "rows": arguments.rows,
        "rounds": arguments.rounds,
        "ratio": ratio,
        "workers": {
            str(workers): {"rows_per_s": [run.rate for run in kind], "seconds": [run.seconds for run in kind]}
            for workers, kind in runs.items()
        },
    }
    goals = [
        record.goal("rows per second of two workers over one", ratio, "at least", 1.8, "x"),
        record.goal("jobs with other answers than the first", unlike, "at most", 0, "jobs"),
    ]
    record.write("batch", origin, goals, figures)


if __name__ == "__main__":
    main()
