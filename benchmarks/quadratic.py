"""Compare quadratic self-speculation with linear: tokens per pass, tokens per verify and wall time.

Every setting answers each question in turn, so that other load falls on all of them. All emit AR's tokens and differ
only in the number of passes and in what a pass costs. Writes `results/quadratic.json` and `.md`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from common import questions, record

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.runtime.requests.generation import tokens_per_pass

SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("linear_spec", {}),
    ("quadratic_spec, budgeted", {"mode": "quadratic_spec"}),
    ("quadratic_spec, all groups", {"mode": "quadratic_spec", "groups": "all"}),
)
BLOCKS = {8: SETTINGS, 16: SETTINGS, 32: SETTINGS[:2]}  # all groups of 32 exceed a pass


def measure(engine: nemodiff.LoadedEngine, prompts: list[str], rounds: int) -> tuple[list[dict[str, Any]], int]:
    """Figures by block length and setting, and how many answers are not AR's."""
    expected = [nemodiff.generate(engine, text, mode="ar").token_ids for text in prompts]
    results, unlike = list[dict[str, Any]](), 0
    for block, settings in BLOCKS.items():
        answers_by_setting: dict[str, list[nemodiff.Generation]] = {name: [] for name, _ in settings}
        for _ in range(rounds):
            for text, tokens in zip(prompts, expected, strict=True):
                for name, choice in settings:
                    options = {"mode": "linear_spec", "block_length": block, **choice}
                    answers_by_setting[name].append(nemodiff.generate(engine, text, **options))
                    unlike += answers_by_setting[name][-1].token_ids != tokens
        base = [answer.timings_ms["total"] for answer in answers_by_setting["linear_spec"]]
        for name, answers in answers_by_setting.items():
            lengths = [length for answer in answers for length in answer.acceptance.lengths]
            nfe = sum((Counter(answer.nfe) for answer in answers), Counter())
            per_pass, _ = tokens_per_pass(sum(len(answer.token_ids) for answer in answers), nfe)
            ratios = [one / answer.timings_ms["total"] for one, answer in zip(base, answers, strict=True)]
            results.append(
                {
                    "block_length": block,
                    "way": name,
                    "tokens_per_pass": round(per_pass, 3),
                    "tokens_per_verify": round(sum(lengths) / len(lengths), 3),
                    "speed_over_linear": round(statistics.median(ratios), 3),
                }
            )
    return results, unlike


def table(results: list[dict[str, Any]], count: int, origin: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "# Quadratic self-speculation against linear",
        "",
        f"{record.MODEL.name}, {count} questions, greedy, f32. Tokens per pass after the prefill, tokens per verify,",
        "and speed by wall time, prefill included, over linear_spec with blocks of the same length. A verify of",
        "quadratic_spec is a whole pass; linear_spec has a draft for each.",
        "",
        "| block | way | tokens per pass | tokens per verify | speed over linear |",
        "|---:|---|---:|---:|---:|",
    ]
    for r in results:
        figures = f"{r['tokens_per_pass']:.2f} | {r['tokens_per_verify']:.2f} | {r['speed_over_linear']:.2f}"
        lines.append(f"| {r['block_length']} | {r['way']} | {figures} |")
    load = origin["machine"]["load_before"]
    return "\n".join([*lines, "", f"{origin['date']}, `{origin['command']}`, load before {load}."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare quadratic with linear self-speculation.")
    parser.add_argument("--per-task", type=int, default=10, help="questions per task, default 10")
    parser.add_argument("--rounds", type=int, default=2, help="times that each setting answers each, default 2")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, default 1")
    arguments = parser.parse_args()
    origin = record.origin(("nemodiff", "onnxruntime", "numpy"), arguments.threads)
    prompts = [question.text for question in questions.draw(arguments.per_task)]
    with tempfile.TemporaryDirectory(prefix="nemodiff-quadratic-") as work:
        engine = nemodiff.load(Builder(record.MODEL, Path(work) / "engine").run(), threads=arguments.threads)
        results, unlike = measure(engine, prompts, arguments.rounds)
    goals = [record.goal("answers unlike AR's", unlike, "at most", 0, "answers")]
    record.write(
        "quadratic",
        origin,
        goals,
        {"checkpoint": record.MODEL.name, "dtype": "f32", "questions": len(prompts), "rows": results},
    )
    (record.RESULTS / "quadratic.md").write_text(table(results, len(prompts), origin), encoding="utf-8")


if __name__ == "__main__":
    main()
