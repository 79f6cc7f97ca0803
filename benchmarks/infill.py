"""Compare filling in and revising on the demonstration model's tasks with answers from left to right.

A hole of 1 to 12 tokens is cut out of a right answer and counts only if exactly its tokens come back. A revision counts
only if the whole right answer does. Writes `results/infill.json` and `.md`.
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
from nemodiff.runtime.engines.passes import Pass, bidirectional, every_token
from nemodiff.runtime.generate import generate, generate_many
from nemodiff.runtime.loading import LoadedEngine, load

PACKAGES = ("nemodiff", "onnxruntime", "numpy", "tokenizers")
LONGEST = 12
REPLACED_TOKENS = (1, 2, 4)
KEEPS = (0.01, 0.05, 0.3)


@dataclasses.dataclass(frozen=True)
class Hole:
    """An answer with `tokens` cut out between two texts."""

    task: str
    question: str
    prefix: str
    tokens: list[int]
    suffix: str


Method = Callable[[LoadedEngine, Hole], tuple[list[int], int]]  # tokens and passes, prefill left out


def holes(engine: LoadedEngine, per_task: int) -> list[Hole]:
    """Holes of every task, at places where the texts around them are encoded as they are in the whole answer."""
    rng = random.Random(questions.SEED)
    plain = engine.text.encode_plain
    result = list[Hole]()
    count = collections.Counter[str]()
    for q in questions.draw(4 * per_task):
        ids = plain(q.answer)
        if count[q.task] == per_task or len(ids) < 3:  # nothing would stand on both sides of a hole
            continue
        count[q.task] += 1
        while True:
            size = rng.randint(1, min(LONGEST, len(ids) - 2))
            at = rng.randint(1, len(ids) - size - 1)
            prefix, suffix = engine.text.decode(ids[:at]), engine.text.decode(ids[at + size :])
            if plain(prefix) == ids[:at] and plain(suffix) == ids[at + size :]:
                break
        result.append(Hole(q.task, q.text, prefix, ids[at : at + size], suffix))
    return result


def _before(engine: LoadedEngine, hole: Hole) -> list[int]:
    """The question and the answer up to the hole."""
    question = engine.text.encode_rendered(engine.text.render_chat([{"role": "user", "content": hole.question}]))
    return question + engine.text.encode_plain(hole.prefix)


def left_to_right(mode: str) -> Method:
    """The model's continuation of the prefix; an answer that ends too early is wrong."""

    def run(engine: LoadedEngine, hole: Hole) -> tuple[list[int], int]:
        ids = _before(engine, hole)
        answer = generate(engine, ids, mode=mode, max_new_tokens=len(hole.tokens))
        return answer.token_ids, sum(answer.nfe.values()) - answer.nfe["prefill"]

    return run


def filled(length: bool = True, **options: Any) -> Method:
    """The product's own filling; without `length` it has to find the length too."""

    def run(engine: LoadedEngine, hole: Hole) -> tuple[list[int], int]:
        template = [hole.prefix, len(hole.tokens) if length else None, hole.suffix]
        answer = fill(engine, template, prompt=hole.question, **options)
        return answer.token_ids[0], sum(answer.nfe.values()) - answer.nfe["prefill"]

    return run


def suffix_as_context(engine: LoadedEngine, hole: Hole) -> tuple[list[int], int]:
    """The layout that was not kept.

    The text after the hole goes first, causally, into the slots after it, and the hole sees it by its second interval.
    """
    before = _before(engine, hole)
    after, size = engine.text.encode_plain(hole.suffix), len(hole.tokens)
    with Row(engine.backend, before) as row:
        row.commit(len(before))
        begin = len(before) + size
        at = np.arange(begin, begin + len(after), dtype=np.int32)
        visible = np.stack([np.full_like(at, len(before)), np.full_like(at, begin), at + 1], axis=1)
        row.run(Pass("verify", np.array(after, np.int32), at, begin, visible, every_token(len(after))))
        block = [row.mask_id] * size
        while row.mask_id in block:
            pass_ = bidirectional("denoise", block, len(before), 0.9)
            pass_.visible[:, 1:] = begin, begin + len(after)
            block = row.run(pass_).next_ids.tolist()
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


def measure_holes(engine: LoadedEngine, hole_list: list[Hole], question: str) -> list[dict[str, Any]]:
    """Every method on every hole."""
    results = []
    for name, method in METHODS.items():
        correct = collections.Counter[str]()
        count = collections.Counter[str]()
        passes = 0
        for hole in hole_list:
            answer, taken = method(engine, hole)
            count[hole.task] += 1
            correct[hole.task] += answer == hole.tokens
            passes += taken
        result = {
            "question": question,
            "method": name,
            "tasks": {task: round(100 * correct[task] / count[task], 1) for task in TASKS},
            "all": round(100 * sum(correct.values()) / len(hole_list), 1),
            "passes": round(passes / len(hole_list), 2),
        }
        results.append(result)
        print(f"{question:8} {name:32} {result['all']:5.1f} %  {result['passes']:6.2f} passes", flush=True)
    return results


def measure_revision(engine: LoadedEngine, per_task: int) -> list[dict[str, Any]]:
    """Answers that the model itself gives right, with some tokens replaced by others of the vocabulary."""
    drawn = questions.draw(per_task)
    answers = generate_many(engine, [q.text for q in drawn], max_new_tokens=questions.LONGEST)
    question_list = [q for q, answer in zip(drawn, answers, strict=True) if answer.text == q.answer]
    results = []
    for replaced in (0, *REPLACED_TOKENS):
        for keep in KEEPS:
            rng = random.Random(replaced)
            correct = 0
            passes = 0
            for q in question_list:
                ids = engine.text.encode_plain(q.answer)
                for i in rng.sample(range(len(ids)), min(replaced, len(ids))):
                    ids[i] = rng.randrange(400, engine.info.model.vocab_size)
                answer = revise(engine, engine.text.decode(ids), prompt=q.text, keep=keep)
                correct += answer.text == q.answer
                passes += sum(answer.nfe.values()) - answer.nfe["prefill"]
            result = {"wrong_tokens": replaced, "keep": keep, "right": round(100 * correct / len(question_list), 1)}
            result |= {"answers": len(question_list), "passes": round(passes / len(question_list), 2)}
            results.append(result)
            print(
                f"{replaced} wrong tokens, keep {keep}: {result['right']:5.1f} % right, {result['passes']:.2f} passes",
                flush=True,
            )
    return results


def markdown(
    filled_results: list[dict[str, Any]], revision_results: list[dict[str, Any]], origin: dict[str, Any], per_task: int
) -> str:
    """The tables for people."""
    lines = [
        f"# Filling in and revising with {record.MODEL.name}",
        "",
        f"Holes of 1 to {LONGEST} tokens in right answers, {per_task} per task, questions of seed {questions.SEED}.",
        "Percent of holes whose tokens came back exactly, and passes per hole (prefill not counted).",
    ]
    for question in ("given", "empty"):
        results = [result for result in filled_results if result["question"] == question]
        lines += ["", f"Question {question}:", "", f"| method | {' | '.join(TASKS)} | **all** | passes |"]
        lines.append("| --- |" + " ---: |" * (len(TASKS) + 2))
        for result in results:
            cells = " | ".join(f"{result['tasks'][task]:.0f}" for task in TASKS)
            lines.append(f"| {result['method']} | {cells} | **{result['all']:.1f}** | {result['passes']:.1f} |")
    lines += [
        "",
        f"Revision of {revision_results[0]['answers']} answers that the model gives right by itself, with some tokens "
        "replaced",
        "by random ones, the question given. Percent of answers that are right afterwards, and passes per answer; by",
        "the least causal probability that keeps a token. Decoding from scratch gets all of them right.",
        "",
        "| wrong tokens | " + " | ".join(f"keep {keep}" for keep in KEEPS) + " |",
        "| ---: |" + " ---: |" * len(KEEPS),
    ]
    for replaced in (0, *REPLACED_TOKENS):
        cells = [f"{r['right']:.1f} / {r['passes']:.1f}" for r in revision_results if r["wrong_tokens"] == replaced]
        lines.append(f"| {replaced} | {' | '.join(cells)} |")
    lines += [
        "",
        record.footer(origin),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure infill and revise against left to right.")
    parser.add_argument("--per-task", type=int, default=10, help="answers per task, default 10")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, default 1")
    parser.add_argument("--no-write", action="store_true", help="print only; leave the result files as they are")
    arguments = parser.parse_args()
    origin = record.origin(PACKAGES, arguments.threads)
    with tempfile.TemporaryDirectory(prefix="nemodiff-infill-") as work:
        engine = load(Builder(record.MODEL, Path(work) / "engine").run(), threads=arguments.threads)
        hole_list = holes(engine, arguments.per_task)
        # With the question the text after a hole helps little, because the model has learned to answer and not to look
        # ahead; with an empty question only the text around a hole can tell.
        without_question = [dataclasses.replace(hole, question="") for hole in hole_list]
        filled_results = measure_holes(engine, hole_list, "given") + measure_holes(engine, without_question, "empty")
        revision_results = measure_revision(engine, arguments.per_task)
    if not arguments.no_write:
        figures = {
            "checkpoint": record.MODEL.name,
            "dtype": "f32",
            "seed": questions.SEED,
            "holes": filled_results,
            "revised": revision_results,
        }
        best = {(result["question"], result["method"]): result["all"] for result in filled_results}
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
        path.with_suffix(".md").write_text(
            markdown(filled_results, revision_results, origin, arguments.per_task), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
