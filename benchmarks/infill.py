"""Filling in and revising on tiny-chat's tasks, against answers from left to right.

In: how many held-out answers per task. Out: `results/infill.md` and `.json`. A hole of 1 to 12 tokens is cut out of a
right answer and counts only if exactly its tokens come back; a revision counts only if the whole right answer does. The
surprising fact: with the question at hand the text behind a hole helps little, because the model has learned to answer
and not to look ahead; so holes are also filled with an empty question, where only the text around them can tell.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import questions, record
from common.questions import TASKS

from nemodiff.builder.build import Builder
from nemodiff.runtime.editing.infill import fill
from nemodiff.runtime.editing.revise import revise
from nemodiff.runtime.editing.row import Row
from nemodiff.runtime.engines.engine import Pass, bidirectional, every_token
from nemodiff.runtime.generate import generate
from nemodiff.runtime.loading import LoadedEngine, load

PACKAGES = ("nemodiff", "onnxruntime", "numpy", "tokenizers")
LONGEST = 12
WRONG_TOKENS = (1, 2, 4)
KEEPS = (0.01, 0.05, 0.3)


@dataclasses.dataclass(frozen=True)
class Hole:
    """An answer with `wanted` cut out between two texts."""

    task: str
    question: str
    prefix: str
    wanted: list[int]
    suffix: str


Method = Callable[[LoadedEngine, Hole], tuple[list[int], int]]  # tokens and passes, prefill left out


def holes(engine: LoadedEngine, per_task: int) -> list[Hole]:
    """Holes at places where the texts around them are encoded as they are in the whole answer."""
    rng, plain, found = random.Random(questions.SEED), engine.text.encode_plain, list[Hole]()
    for q in questions.draw(per_task):
        ids = plain(q.answer)
        while True:
            size = rng.randint(1, min(LONGEST, len(ids) - 2))
            at = rng.randint(1, len(ids) - size - 1)
            prefix, suffix = engine.text.decode(ids[:at]), engine.text.decode(ids[at + size :])
            if plain(prefix) == ids[:at] and plain(suffix) == ids[at + size :]:
                break
        found.append(Hole(q.task, q.text, prefix, ids[at : at + size], suffix))
    return found


def _before(engine: LoadedEngine, hole: Hole) -> list[int]:
    """The question and the answer up to the hole."""
    question = engine.text.encode_chat([{"role": "user", "content": hole.question}])
    return question + engine.text.encode_plain(hole.prefix)


def left_to_right(mode: str) -> Method:
    """The model's continuation of the prefix; an answer that ends too early is wrong."""

    def run(engine: LoadedEngine, hole: Hole) -> tuple[list[int], int]:
        ids = _before(engine, hole)
        answer = generate(engine, ids, mode=mode, max_new_tokens=len(hole.wanted))
        return answer.token_ids, sum(answer.nfe.values()) - answer.nfe["prefill"]

    return run


def filled(length: bool = True, **options: Any) -> Method:
    """The product's own filling; without `length` it has to find the length too."""

    def run(engine: LoadedEngine, hole: Hole) -> tuple[list[int], int]:
        template = [hole.prefix, len(hole.wanted) if length else None, hole.suffix]
        got = fill(engine, template, prompt=hole.question, **options)
        return got.token_ids[0], sum(got.nfe.values()) - got.nfe["prefill"]

    return run


def suffix_as_context(engine: LoadedEngine, hole: Hole) -> tuple[list[int], int]:
    """The layout that was not kept: the text behind the hole goes first, causally, into the slots behind it, and the
    hole sees it by its second interval."""
    before = _before(engine, hole)
    behind, size = engine.text.encode_plain(hole.suffix), len(hole.wanted)
    with Row(engine.backend, before) as row:
        row.commit(len(before))
        begin = len(before) + size
        at = np.arange(begin, begin + len(behind), dtype=np.int32)
        visible = np.stack([np.full_like(at, len(before)), np.full_like(at, begin), at + 1], axis=1)
        row.ask(Pass("verify", np.array(behind, np.int32), at, begin, visible, every_token(len(behind))))
        block = [row.mask_id] * size
        while row.mask_id in block:
            asked = bidirectional("denoise", block, len(before), 0.9)
            asked.visible[:, 1:] = begin, begin + len(behind)
            block = row.ask(asked).next_ids.tolist()
        return block, sum(row.nfe.values()) - row.nfe["prefill"]


METHODS: dict[str, Method] = {
    "left to right, ar": left_to_right("ar"),
    "left to right, diffusion": left_to_right("diffusion"),
    "block of 16": filled(method="block", block_length=16),
    "block of 32": filled(method="block", block_length=32),
    "block of 64": filled(method="block", block_length=64),
    "block of 32, a token per pass": filled(method="block", block_length=32, threshold=2.0),
    "text behind as causal context": suffix_as_context,
    "search, width 2": filled(width=2),
    "search, width 8": filled(width=8),
    "search, width 32": filled(width=32),
    "search, width 8, length unknown": filled(length=False, width=8),
}


def measure_holes(engine: LoadedEngine, asked: list[Hole], question: str) -> list[dict[str, Any]]:
    """Every method on every hole."""
    found = []
    for name, method in METHODS.items():
        right, count, passes = collections.Counter[str](), collections.Counter[str](), 0
        for hole in asked:
            got, taken = method(engine, hole)
            count[hole.task] += 1
            right[hole.task] += got == hole.wanted
            passes += taken
        row = {
            "question": question,
            "method": name,
            "tasks": {task: round(100 * right[task] / count[task], 1) for task in TASKS},
            "all": round(100 * sum(right.values()) / len(asked), 1),
            "passes": round(passes / len(asked), 2),
        }
        found.append(row)
        print(f"{question:8} {name:32} {row['all']:5.1f} %  {row['passes']:6.2f} passes", flush=True)
    return found


def measure_revision(engine: LoadedEngine, per_task: int) -> list[dict[str, Any]]:
    """Answers that the model itself gives right, with some tokens replaced by others of the vocabulary."""
    asked = [q for q in questions.draw(per_task) if generate(engine, q.text, max_new_tokens=128).text == q.answer]
    found = []
    for wrong in (0, *WRONG_TOKENS):
        for keep in KEEPS:
            rng, right, passes = random.Random(wrong), 0, 0
            for q in asked:
                ids = engine.text.encode_plain(q.answer)
                for i in rng.sample(range(len(ids)), min(wrong, len(ids))):
                    ids[i] = rng.randrange(400, engine.info.model.vocab_size)
                got = revise(engine, engine.text.decode(ids), prompt=q.text, keep=keep)
                right += got.text == q.answer
                passes += sum(got.nfe.values()) - got.nfe["prefill"]
            row = {"wrong_tokens": wrong, "keep": keep, "right": round(100 * right / len(asked), 1)}
            row |= {"answers": len(asked), "passes": round(passes / len(asked), 2)}
            found.append(row)
            print(
                f"{wrong} wrong tokens, keep {keep}: {row['right']:5.1f} % right, {row['passes']:.2f} passes",
                flush=True,
            )
    return found


def markdown(given: list[dict[str, Any]], revised: list[dict[str, Any]], origin: dict[str, Any], per_task: int) -> str:
    """The tables for people."""
    lines = [
        "# Filling in and revising with tiny-chat",
        "",
        f"Holes of 1 to {LONGEST} tokens in right answers, {per_task} per task, questions of seed {questions.SEED}.",
        "Percent of holes whose tokens came back exactly, and passes per hole (prefill not counted).",
    ]
    for question in ("given", "empty"):
        rows = [row for row in given if row["question"] == question]
        lines += ["", f"Question {question}:", "", f"| method | {' | '.join(TASKS)} | **all** | passes |"]
        lines.append("| --- |" + " ---: |" * (len(TASKS) + 2))
        for row in rows:
            cells = " | ".join(f"{row['tasks'][task]:.0f}" for task in TASKS)
            lines.append(f"| {row['method']} | {cells} | **{row['all']:.1f}** | {row['passes']:.1f} |")
    lines += [
        "",
        f"Revision of {revised[0]['answers']} answers that the model gives right by itself, with some tokens replaced",
        "by random ones, the question given. Percent of answers that are right afterwards, and passes per answer; by",
        "the least causal probability that keeps a token. Decoding from scratch gets all of them right.",
        "",
        "| wrong tokens | " + " | ".join(f"keep {keep}" for keep in KEEPS) + " |",
        "| ---: |" + " ---: |" * len(KEEPS),
    ]
    for wrong in (0, *WRONG_TOKENS):
        cells = [f"{r['right']:.1f} / {r['passes']:.1f}" for r in revised if r["wrong_tokens"] == wrong]
        lines.append(f"| {wrong} | {' | '.join(cells)} |")
    lines += [
        "",
        record.footer(origin),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure infill and revise of tiny-chat against left to right.")
    parser.add_argument("--per-task", type=int, default=20, help="answers per task, default 20")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, default 1")
    parser.add_argument("--no-write", action="store_true", help="print only; leave the result files as they are")
    arguments = parser.parse_args()
    origin = record.origin(PACKAGES, arguments.threads)
    with tempfile.TemporaryDirectory(prefix="nemodiff-infill-") as work:
        engine = load(Builder(record.TINY_CHAT, Path(work) / "engine").run(), threads=arguments.threads)
        asked = holes(engine, arguments.per_task)
        given = measure_holes(engine, asked, "given")
        given += measure_holes(engine, [dataclasses.replace(hole, question="") for hole in asked], "empty")
        revised = measure_revision(engine, arguments.per_task)
    if not arguments.no_write:
        figures = {
            "checkpoint": "tiny-chat",
            "dtype": "f32",
            "seed": questions.SEED,
            "holes": given,
            "revised": revised,
        }
        best = {(row["question"], row["method"]): row["all"] for row in given}
        goals = [
            record.goal(
                f"search over ar, question {question}",
                round(best[question, "search, width 8"] - best[question, "left to right, ar"], 1),
                "at least",
                0,
                "points",
            )
            for question in ("given", "empty")
        ]
        path = record.write("infill", origin, goals, figures)
        path.with_suffix(".md").write_text(markdown(given, revised, origin, arguments.per_task), encoding="utf-8")


if __name__ == "__main__":
    main()
