"""Measure what the trained drafter adapter of the demonstration model brings to self-speculation, by task.

Every answer with and without the adapter must have AR's tokens, else the run fails. Times are not compared: the adapter
costs a few small products per token, and what it brings shows in tokens per pass. Writes `results/drafter.json` and
`.md`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import questions, record
from common.questions import Question

from nemodiff.builder.build import Builder
from nemodiff.runtime.generate import Generation, generate_many
from nemodiff.runtime.loading import LoadedEngine, load

TASKS = (*questions.TASKS, *questions.WITH_MORE)
BLOCKS = (32, 16, 8)
PACKAGES = ("nemodiff", "onnxruntime", "numpy", "tokenizers")


def answer(engine: LoadedEngine, question_list: list[Question], **options: Any) -> list[Generation]:
    """One generation per question, each decoded alone."""
    prompts = [q.prompt(engine.text) for q in question_list]
    return list(generate_many(engine, prompts, max_new_tokens=questions.LONGEST, **options))


def score(answers: list[Generation]) -> dict[str, Any]:
    """Acceptance and tokens per pass, sums over sums."""
    lengths = [n for g in answers for n in g.acceptance.lengths]
    passes = sum(sum(g.nfe.values()) - g.nfe["prefill"] for g in answers)
    return {
        "answers": len(answers),
        "acceptance_mean": round(sum(lengths) / max(1, len(lengths)), 3),
        "decode_tpf": round(sum(len(g.token_ids) for g in answers) / max(1, passes), 3),
        "adapter_tokens": sum(g.adapter_tokens for g in answers),
    }


def measure(engines: dict[str, LoadedEngine], question_list: list[Question]) -> list[dict[str, Any]]:
    """Every mode and block length with both engines, by task and over all tasks."""
    results = list[dict[str, Any]]()
    plain = [g.token_ids for g in answer(engines["without"], question_list, mode="ar")]
    settings: list[dict[str, Any]] = [{"mode": "linear_spec", "block_length": block} for block in BLOCKS]
    settings.append({"mode": "quadratic_spec", "block_length": 16, "groups": "all"})
    for setting in settings:
        for name, engine in engines.items():
            answers = answer(engine, question_list, **setting)
            pairs = list(zip(question_list, answers, strict=True))
            result = {
                **setting,
                "adapter": name,
                "tasks": {task: score([g for q, g in pairs if q.task == task]) for task in TASKS},
                "all": score(answers),
                "answers_unlike_ar": sum(g.token_ids != p for g, p in zip(answers, plain, strict=True)),
            }
            results.append(result)
            total = result["all"]
            print(
                f"{setting['mode']:14} block {setting['block_length']:2}, {name:7} adapter: "
                f"{total['acceptance_mean']:6.2f} tokens per verify, {total['decode_tpf']:5.2f} per pass, "
                f"{result['answers_unlike_ar']} answers unlike AR's",
                flush=True,
            )
    return results


def markdown(results: list[dict[str, Any]], origin: dict[str, Any], per_task: int) -> str:
    """The tables for people."""
    both = {
        result["adapter"]: result
        for result in results
        if (result["mode"], result["block_length"]) == ("linear_spec", BLOCKS[0])
    }
    cells = {name: {**result["tasks"], "**all**": result["all"]} for name, result in both.items()}
    lines = [
        f"# The drafter adapter of {record.MODEL.name}",
        "",
        f"Self-speculation without and with the adapter of `examples/{record.DRAFTER.parent.name}`, {per_task}",
        f"questions per task, drawn with seed {questions.SEED}; greedy, f32. Tokens emitted per verify, bonus",
        "included, and per pass.",
        f"Answers whose tokens are not AR's: {sum(result['answers_unlike_ar'] for result in results)} of "
        f"{sum(result['all']['answers'] for result in results)}.",
        "",
        "linear_spec, block length 32:",
        "",
        "| task | answers | per verify, without | with | per pass, without | with |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for task, a in cells["without"].items():
        b = cells["with"][task]
        lines.append(
            f"| {task} | {a['answers']} | {a['acceptance_mean']:.2f} | {b['acceptance_mean']:.2f} "
            f"| {a['decode_tpf']:.2f} | {b['decode_tpf']:.2f} |"
        )
    lines += [
        "",
        "All tasks, by mode and block length:",
        "",
        "| mode | block | per verify, without | with | per pass, without | with |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for a, b in zip(results[::2], results[1::2], strict=True):
        mode = a["mode"] + (", all groups" if a["mode"] == "quadratic_spec" else "")
        x = a["all"]
        y = b["all"]
        lines.append(
            f"| {mode} | {a['block_length']} | {x['acceptance_mean']:.2f} | {y['acceptance_mean']:.2f} "
            f"| {x['decode_tpf']:.2f} | {y['decode_tpf']:.2f} |"
        )
    lines += [
        "",
        record.footer(origin),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure self-speculation with and without the trained drafter.")
    parser.add_argument("--per-task", type=int, default=100, help="questions per task, default 100")
    parser.add_argument("--adapter", type=Path, default=record.DRAFTER, help="folder of the adapter")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, default 1")
    parser.add_argument("--no-write", action="store_true", help="print only; leave the result files as they are")
    arguments = parser.parse_args()
    origin = record.origin(PACKAGES, arguments.threads)
    with tempfile.TemporaryDirectory(prefix="nemodiff-drafter-") as work:
        built = {
            name: Builder(record.MODEL, Path(work) / name, adapter=adapter).run()
            for name, adapter in (("without", None), ("with", arguments.adapter))
        }
        engines = {name: load(folder, threads=arguments.threads) for name, folder in built.items()}
        results = measure(engines, questions.draw(arguments.per_task, tasks=TASKS))
    unlike = sum(result["answers_unlike_ar"] for result in results)
    if not arguments.no_write:
        gain = results[1]["all"]["acceptance_mean"] / results[0]["all"]["acceptance_mean"]
        goals = [
            record.goal("answers unlike AR's", unlike, "at most", 0, "answers"),
            record.goal("tokens per verify with the adapter, block 32", round(gain, 3), "at least", 1.0, "times"),
        ]
        figures = {"checkpoint": record.MODEL.name, "dtype": "f32", "seed": questions.SEED, "settings": results}
        path = record.write("drafter", origin, goals, figures)
        path.with_suffix(".md").write_text(markdown(results, origin, arguments.per_task), encoding="utf-8")
    if unlike:
        sys.exit(f"self-speculation differs from AR in {unlike} answers")


if __name__ == "__main__":
    main()
