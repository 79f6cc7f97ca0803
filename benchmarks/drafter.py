"""What the trained drafter adapter of tiny-chat is worth: self-speculation with and without it, by task.

In: how many held-out questions per task. Out: `results/drafter.md` and `.json`. Every answer of both engines must have
AR's tokens, else the run fails. The surprising fact: an adapter in a one-pass draft costs a few small products per
token, so what it brings shows in tokens per pass; the times of a run are not compared here.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import questions, record
from common.questions import Question

from nemodiff.builder.build import Builder
from nemodiff.runtime.generate import Generation, generate_many
from nemodiff.runtime.loading import LoadedEngine, load

ADAPTER = record.ROOT / "examples" / "tiny-chat-drafter" / "linear_spec_lora"
TRAINED_ON = (1, 2000)  # seed and number of different questions: the defaults of train_drafter.py
BLOCKS = (32, 16, 8)
NEW_TOKENS = 128
PACKAGES = ("nemodiff", "onnxruntime", "numpy", "tokenizers")


def trained_questions() -> set[str]:
    """The questions whose answers the adapter was trained on."""
    from make_data import example

    seed, count = TRAINED_ON
    rng, met = random.Random(seed), set[str]()
    while len(met) < count:
        met.add(example(rng)[1])
    return met


def answer(engine: LoadedEngine, asked: list[Question], **options: Any) -> list[Generation]:
    """One generation per question, each decoded alone."""
    return list(generate_many(engine, [q.text for q in asked], max_new_tokens=NEW_TOKENS, **options))


def score(given: list[Generation]) -> dict[str, Any]:
    """Acceptance and tokens per pass, sums over sums."""
    lengths = [n for g in given for n in g.acceptance.lengths]
    passes = sum(sum(g.nfe.values()) - g.nfe["prefill"] for g in given)
    return {
        "answers": len(given),
        "acceptance_mean": round(sum(lengths) / len(lengths), 3),
        "decode_tpf": round(sum(len(g.token_ids) for g in given) / passes, 3),
        "adapter_tokens": sum(g.adapter_tokens for g in given),
    }


def measure(engines: dict[str, LoadedEngine], asked: list[Question]) -> list[dict[str, Any]]:
    """Every mode and block length with both engines, by task, over all tasks and over what the adapter never met."""
    met, found = trained_questions(), list[dict[str, Any]]()
    plain = [g.token_ids for g in answer(engines["without"], asked, mode="ar")]
    settings: list[dict[str, Any]] = [{"mode": "linear_spec", "block_length": block} for block in BLOCKS]
    settings.append({"mode": "quadratic_spec", "block_length": 16, "groups": "all"})
    for setting in settings:
        for name, engine in engines.items():
            given = answer(engine, asked, **setting)
            pairs = list(zip(asked, given, strict=True))
            row = {
                **setting,
                "adapter": name,
                "tasks": {task: score([g for q, g in pairs if q.task == task]) for task in questions.TASKS},
                "all": score(given),
                "unmet": score([g for q, g in pairs if q.text not in met]),
                "answers_unlike_ar": sum(g.token_ids != p for g, p in zip(given, plain, strict=True)),
            }
            found.append(row)
            print(
                f"{setting['mode']:14} block {setting['block_length']:2}, {name:7} adapter: "
                f"{row['all']['acceptance_mean']:6.2f} tokens per verify, {row['all']['decode_tpf']:5.2f} per pass, "
                f"{row['answers_unlike_ar']} answers unlike AR's",
                flush=True,
            )
    return found


def markdown(found: list[dict[str, Any]], origin: dict[str, Any], per_task: int) -> str:
    """The tables for people."""
    both = {row["adapter"]: row for row in found if (row["mode"], row["block_length"]) == ("linear_spec", BLOCKS[0])}
    cells = {
        name: {**row["tasks"], "**all**": row["all"], "not met in training": row["unmet"]} for name, row in both.items()
    }
    lines = [
        "# The drafter adapter of tiny-chat",
        "",
        f"Self-speculation without and with the adapter of `examples/tiny-chat-drafter`, {per_task} questions per task",
        f"drawn with seed {questions.SEED}; greedy, f32. Tokens emitted per verify, bonus included, and per pass.",
        f"Answers whose tokens are not AR's: {sum(row['answers_unlike_ar'] for row in found)} of "
        f"{sum(row['all']['answers'] for row in found)}.",
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
    for a, b in zip(found[::2], found[1::2], strict=True):
        mode, x, y = a["mode"] + (", all groups" if a["mode"] == "quadratic_spec" else ""), a["all"], b["all"]
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
    parser = argparse.ArgumentParser(description="Measure self-speculation of tiny-chat with and without its drafter.")
    parser.add_argument("--per-task", type=int, default=100, help="questions per task, default 100")
    parser.add_argument("--adapter", type=Path, default=ADAPTER, help="folder of the adapter")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, default 1")
    parser.add_argument("--no-write", action="store_true", help="print only; leave the result files as they are")
    arguments = parser.parse_args()
    origin = record.origin(PACKAGES, arguments.threads)
    with tempfile.TemporaryDirectory(prefix="nemodiff-drafter-") as work:
        built = {
            name: Builder(record.TINY_CHAT, Path(work) / name, adapter=adapter).run()
            for name, adapter in (("without", None), ("with", arguments.adapter))
        }
        engines = {name: load(folder, threads=arguments.threads) for name, folder in built.items()}
        found = measure(engines, questions.draw(arguments.per_task))
    unlike = sum(row["answers_unlike_ar"] for row in found)
    if not arguments.no_write:
        gain = found[1]["all"]["acceptance_mean"] / found[0]["all"]["acceptance_mean"]
        goals = [
            record.goal("answers unlike AR's", unlike, "at most", 0, "answers"),
            record.goal("tokens per verify with the adapter, block 32", round(gain, 3), "at least", 1.0, "times"),
        ]
        figures = {"checkpoint": "tiny-chat", "dtype": "f32", "seed": questions.SEED, "settings": found}
        path = record.write("drafter", origin, goals, figures)
        path.with_suffix(".md").write_text(markdown(found, origin, arguments.per_task), encoding="utf-8")
    if unlike:
        sys.exit(f"self-speculation differs from AR in {unlike} answers")


if __name__ == "__main__":
    main()
