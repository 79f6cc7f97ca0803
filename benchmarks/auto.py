"""Planned block length and mode against every fixed length.

In: tiny-chat, with its trained drafter and without, and questions. Out: tokens per second by fixed block length and by
plan, per task and over all, by the wall, by the processor, and by the cost curve summed over the passes taken, which no
other load changes; `results/auto.json` and `results/auto.md`. Ways take turns within each round, in one process. The
surprising fact: the best fixed length differs by mode and by task, so no single one could be the right default.
"""

from __future__ import annotations

import argparse
import collections
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import questions, record

from nemodiff.builder.build import Builder
from nemodiff.runtime.generate import decode
from nemodiff.runtime.loading import LoadedEngine, load
from nemodiff.runtime.requests.options import AUTO, make_options
from nemodiff.runtime.requests.prepare import prepare

BLOCKS: tuple[int | str, ...] = (4, 8, 16, 32, 64, AUTO)
WAYS: tuple[dict[str, Any], ...] = (
    {"mode": "ar"},
    *({"mode": mode, "block_length": block} for mode in ("linear_spec", "quadratic_spec") for block in BLOCKS),
    {"mode": AUTO},
)
CLOCKS = ("curve", "cpu", "wall")
NEW_TOKENS = 128
DRAFTER = record.TINY_CHAT.parent / "tiny-chat-drafter" / "linear_spec_lora"
PACKAGES = ("nemodiff", "onnxruntime", "numpy")


def name_of(way: dict[str, Any]) -> str:
    """As it is written in tables."""
    return f"{way['mode']} {way['block_length']}" if "block_length" in way else str(way["mode"])


def measure(engine: LoadedEngine, drawn: list[questions.Question], rounds: int) -> tuple[dict[str, Any], int]:
    """Tokens per second by way, task and clock, the median over the rounds; and how many answers differ from AR's."""
    rates: dict[tuple[str, str, str], list[float]] = collections.defaultdict(list)
    used: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    curve, unlike, plain = engine.cost, 0, list[list[int]]()
    tasks = [*questions.TASKS, "all"]
    for turn in range(rounds):
        for way in WAYS:
            spent: dict[str, list[float]] = {task: [0.0] * 4 for task in tasks}
            for number, question in enumerate(drawn):
                sequence = prepare(engine, question.text, make_options({**way, "max_new_tokens": NEW_TOKENS}))
                cost, cpu, wall = 0.0, time.process_time(), time.perf_counter()
                for _, asked, _ in decode(engine.backend, [sequence], 1):
                    cost += curve.seconds(asked.ids.size) if asked.kind != "prefill" else 0.0
                took = (cost, time.process_time() - cpu, time.perf_counter() - wall, len(sequence.tokens))
                for task in (question.task, "all"):
                    spent[task] = [a + b for a, b in zip(spent[task], took, strict=True)]
                used[name_of(way)].update({k: n for k, n in sequence.nfe.items() if n and k != "prefill"})
                if way["mode"] == "ar" and not turn:
                    plain.append(sequence.tokens)
                unlike += sequence.tokens != plain[number]
            for task, (*seconds, tokens) in spent.items():
                for clock, value in zip(CLOCKS, seconds, strict=True):
                    rates[name_of(way), task, clock].append(tokens / value)
        print(f"round {turn + 1} of {rounds}", flush=True)
    found = {
        name_of(way): {
            "passes": dict(used[name_of(way)]),
            **{
                task: {clock: round(statistics.median(rates[name_of(way), task, clock]), 1) for clock in CLOCKS}
                for task in tasks
            },
        }
        for way in WAYS
    }
    return found, unlike


def ratios(found: dict[str, Any], clock: str) -> dict[str, dict[str, float]]:
    """By planned way and task, its tokens per second over those of the best fixed way it could have been."""
    fixed = {
        f"{mode} {AUTO}": [f"{mode} {block}" for block in BLOCKS if block != AUTO]
        for mode in ("linear_spec", "quadratic_spec")
    }
    fixed[AUTO] = ["ar", *fixed[f"linear_spec {AUTO}"], *fixed[f"quadratic_spec {AUTO}"]]
    return {
        planned: {
            task: round(found[planned][task][clock] / max(found[way][task][clock] for way in ways), 3)
            for task in (*questions.TASKS, "all")
        }
        for planned, ways in fixed.items()
    }


def table(engines: dict[str, dict[str, Any]], origin: dict[str, Any], count: int) -> str:
    """The result as Markdown."""
    lines = [
        "# Planned block length and mode",
        "",
        f"Tokens per second, {count} questions, greedy. By the cost curve (the",
    ]
    lines += [
        "passes after the prefill, each at its measured cost), and by processor and wall time, prefill included. Wall"
    ]
    lines += ["and processor time hold what else the machine did."]
    for name, found in engines.items():
        lines += ["", f"## {name}", "", "| way | curve | processor | wall |", "|---|---:|---:|---:|"]
        for way, cells in found.items():
            lines.append(f"| {way} | " + " | ".join(f"{cells['all'][clock]:.0f}" for clock in CLOCKS) + " |")
        lines += ["", "Planned over the best fixed way of each line, by the curve:", ""]
        both = ratios(found, "curve")
        lines += [f"| task | {' | '.join(both)} |", "|---|" + "---:|" * len(both)]
        for task in (*questions.TASKS, "all"):
            lines.append(f"| {task} | " + " | ".join(f"{cells[task]:.2f}" for cells in both.values()) + " |")
    return "\n".join([*lines, "", record.footer(origin)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare planned block lengths and modes with fixed ones.")
    parser.add_argument("--per-task", type=int, default=6, help="questions per task, default 6")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, default 1")
    parser.add_argument("--no-write", action="store_true", help="print only; leave the result files as they are")
    arguments = parser.parse_args()
    origin = record.origin(PACKAGES, arguments.threads)
    drawn = questions.draw(arguments.per_task)
    engines, curves, goals = dict[str, Any](), dict[str, Any](), []
    with tempfile.TemporaryDirectory(prefix="nemodiff-auto-") as work:
        for name, adapter in (("tiny-chat", None), ("tiny-chat with its drafter", DRAFTER)):
            folder = Builder(record.TINY_CHAT, Path(work) / name, adapter=adapter).run()
            engine = load(folder, threads=arguments.threads)
            engines[name], unlike = measure(engine, drawn, arguments.rounds)
            curve = engine.cost
            curves[name] = {s: round(t * 1e3, 3) for s, t in zip(curve.sizes, curve.times, strict=True)}
            goals.append(record.goal(f"{name}: answers unlike AR's", unlike, "at most", 0, "answers"))
            for clock in CLOCKS:
                for planned, cells in ratios(engines[name], clock).items():
                    goal = f"{name}: {planned} over the best fixed, all tasks, by {clock}"
                    goals.append(record.goal(goal, cells["all"], "at least", 0.95, "x"))
                    print(goals[-1]["name"], cells["all"], flush=True)
    if arguments.no_write:
        return
    figures = {"dtype": "f32", "questions": len(drawn), "cost_ms": curves, "tokens_per_second": engines}
    figures["ratios_by_curve"] = {name: ratios(found, "curve") for name, found in engines.items()}
    path = record.write("auto", origin, goals, figures)
    path.with_suffix(".md").write_text(table(engines, origin, len(drawn)), encoding="utf-8")


if __name__ == "__main__":
    main()
