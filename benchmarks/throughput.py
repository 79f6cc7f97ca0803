"""Measure many mixed requests on the demonstration model: one at a time, in static batches, and scheduled.

The requests have all modes, short and long answers, mostly one system prompt, now and then a long prompt. All
contenders take turns in every round and must give the same tokens. Writes `results/throughput.json` and `.md`.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import questions, record

from nemodiff.builder.build import Builder
from nemodiff.contract import MODES, counted
from nemodiff.runtime.batching.batch import KEPT_PREFIXES, Batch
from nemodiff.runtime.batching.slot import Counts
from nemodiff.runtime.events.events import Finished
from nemodiff.runtime.events.reporter import Reporter
from nemodiff.runtime.loading import LoadedEngine, load
from nemodiff.runtime.requests.options import Options
from nemodiff.runtime.requests.prepare import prepare
from nemodiff.runtime.requests.sequence import Sequence

SYSTEM = "You answer questions about lists, numbers, functions and people. " * 4
BASE = "one at a time"
PACKAGES = ("nemodiff", "onnxruntime", "numpy")

Workload = list[tuple[Any, Options]]


@dataclasses.dataclass
class Served:
    """One round of one contender."""

    seconds: float
    answers: list[Finished]
    counts: Counts


def requests(count: int) -> Workload:
    """`count` requests; quadratic_spec takes all groups, because a budget follows the clock and the passes with it."""
    rng, workload = random.Random(questions.SEED), Workload()
    question_list = questions.draw(-(-count // len(questions.TASKS)))[:count]
    for number, question in enumerate(question_list):
        text = question.text
        if number % 8 == 7:
            text = "Notes: " + " ".join(q.text for q in questions.draw(2, number)) + "\n" + text
        messages = [{"role": "user", "content": text}]
        if rng.random() < 0.75:
            messages = [{"role": "system", "content": SYSTEM}, *messages]
        mode = MODES[number % len(MODES)]
        options = Options(
            mode, rng.choice([16, 48, 96]), block_length=8 if mode == "quadratic_spec" else 16, groups="all"
        )
        workload.append((messages, options))
    return workload


def serve(engine: LoadedEngine, workload: Workload, rows: int, *, static: bool, grouped: bool, reuse: bool) -> Served:
    """Serve all requests, there from the start, in one batch; a static one takes new ones only when it is empty.

    On a CPU a forward costs nearly as much as its tokens, so batching gains little and padding loses much; the gain is
    that of prefixes and of not waiting.
    """
    started = time.perf_counter()
    cost = engine.cost if grouped else None
    batch = Batch(engine.backend, rows, cost=cost, kept=KEPT_PREFIXES if reuse else None)
    waiting = iter([prepare(engine, prompt, options) for prompt, options in workload])
    reporters: dict[Sequence, Reporter] = {}
    done: dict[int, Finished] = {}
    while len(done) < len(workload):
        if not (static and len(batch)):
            _fill(batch, waiting, reporters)
        for served in batch.step():
            reporter = reporters[served.sequence]
            reporter.passed(served)
            if served.sequence.ended:
                end = reporter.finished(engine)[-1]
                assert isinstance(end, Finished)
                done[reporter.number] = end
    batch.close()
    return Served(time.perf_counter() - started, [done[i] for i in range(len(workload))], batch.counts)


def _fill(batch: Batch, waiting: Iterator[Sequence], reporters: dict[Sequence, Reporter]) -> None:
    while len(batch) < batch.rows and (sequence := next(waiting, None)) is not None:
        reporters[sequence] = Reporter(len(reporters), sequence, steps=False)
        batch.add(sequence)


def contenders(engine: LoadedEngine, workload: Workload, rows: int) -> dict[str, Callable[[], Served]]:
    """The contenders."""

    def contender(rows: int, static: bool, grouped: bool, reuse: bool) -> Callable[[], Served]:
        return lambda: serve(engine, workload, rows, static=static, grouped=grouped, reuse=reuse)

    return {
        BASE: contender(1, True, False, False),
        "one at a time, prefixes reused": contender(1, True, False, True),
        f"static batches of {rows}": contender(rows, True, False, False),
        f"scheduled, {rows} rows, padded": contender(rows, False, False, False),
        f"scheduled, {rows} rows, by size": contender(rows, False, True, False),
        f"scheduled, {rows} rows, by size, prefixes reused": contender(rows, False, True, True),
    }


def compare(runners: dict[str, Callable[[], Served]], rounds: int) -> dict[str, Any]:
    """Figures by contender; the first round is run and dropped."""
    done: dict[str, list[Served]] = {name: [] for name in runners}
    for turn in range(rounds + 1):
        for name, run in runners.items():
            served = run()
            if turn:
                done[name].append(served)
    expected = [f.generation.token_ids for f in done[BASE][0].answers]
    return {name: _figures(done[name], done[BASE], expected) for name in runners}


def _figures(rounds: list[Served], base: list[Served], expected: list[list[int]]) -> dict[str, Any]:
    def median(values: list[float]) -> float:
        return statistics.median(values)

    def each(pick: Callable[[Finished], float | None]) -> list[float]:
        return [value for served in rounds for f in served.answers if (value := pick(f)) is not None]

    tokens = sum(map(len, expected))
    ratios = [b.seconds / r.seconds for r, b in zip(rounds, base, strict=True)]
    last = rounds[-1]
    return {
        "tokens_per_second": round(tokens / median([r.seconds for r in rounds]), 1),
        "ratio": round(median(ratios), 2),
        "ratio_min": round(min(ratios), 2),
        "ratio_max": round(max(ratios), 2),
        "first_token_ms": round(median(each(lambda f: f.ttft_ms)), 1),
        "between_tokens_ms": round(median(each(lambda f: f.itl_ms)), 2),
        "longest_gap_ms": round(max(each(lambda f: f.longest_gap_ms)), 1),
        "forwards": last.counts.forwards,
        "tokens_computed": last.counts.tokens,
        "padding": last.counts.padding,
        "reused": last.counts.reused,
        "other_answers": sum(f.generation.token_ids != e for f, e in zip(last.answers, expected, strict=True)),
    }


def table(figures: dict[str, Any], title: str) -> str:
    """The figures in Markdown, ratios first."""
    heads = ["", "ratio (min..max)", "tokens/s", "first token", "between tokens", "longest gap"]
    heads += ["forwards", "padding", "reused", "other answers"]
    lines = [f"# Throughput\n\n{title}\n", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name, f in figures.items():
        cells = [
            name,
            f"{f['ratio']:.2f} ({f['ratio_min']:.2f}..{f['ratio_max']:.2f})",
            f"{f['tokens_per_second']:.0f}",
        ]
        cells += [f"{f[key]:.1f} ms" for key in ("first_token_ms", "between_tokens_ms", "longest_gap_ms")]
        cells += [str(f["forwards"]), f"{f['padding'] / (f['padding'] + f['tokens_computed']):.0%}"]
        cells += [f"{f['reused']} tokens", str(f["other_answers"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure many mixed requests at once.")
    parser.add_argument("--requests", type=int, default=64, help="default 64")
    parser.add_argument("--rows", type=int, default=8, help="requests at a time, default 8")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds after a dropped one, default 5")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads, default 2")
    arguments = parser.parse_args()
    origin = record.origin(PACKAGES, arguments.threads)
    workload = requests(arguments.requests)
    with tempfile.TemporaryDirectory(prefix="nemodiff-throughput-") as work:
        folder = Builder(record.MODEL, Path(work) / "engine", max_batch_size=arguments.rows).run()
        engine = load(folder, threads=arguments.threads)
        curve = engine.cost.curve
        figures = compare(contenders(engine, workload, arguments.rows), arguments.rounds)
    title = (
        f"`{origin['command']}`, {origin['date'][:10]}: {len(workload)} mixed requests that are all there at the "
        f"start, {counted(arguments.threads, 'thread')}; times are medians over requests, the longest gap is the "
        "worst of all."
    )
    page = table(figures, title)
    print(page)
    names = list(figures)
    scheduled, padded, static = (figures[names[i]]["tokens_per_second"] for i in (5, 3, 2))
    goals = [
        record.goal("scheduler over static batches", round(scheduled / static, 2), "at least", 1.0, "x"),
        record.goal("grouping by size over padding", round(scheduled / padded, 2), "at least", 1.0, "x"),
        record.goal("other answers", sum(f["other_answers"] for f in figures.values()), "at most", 0, "requests"),
    ]
    shape = {size: round(seconds * 1e3, 3) for size, seconds in zip(curve.sizes, curve.times, strict=True)}
    values = {"requests": len(workload), "rows": arguments.rows, "rounds": arguments.rounds, "cost_ms": shape}
    record.write("throughput", origin, goals, {"checkpoint": record.MODEL.name, **values, "ways": figures})
    (record.RESULTS / "throughput.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
