"""Measure int8 and int4 on the CPU: what passes cost, which answers change, and that self-speculation equals ar.

    python benchmarks/low_bits.py
    python benchmarks/low_bits.py --checkpoint FOLDER --name low_bits_133m --questions 0

Passes of the engines take turns, and CPU time counts, so other work on the machine falls on all of them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import checkout  # noqa: F401  # isort: skip
from common import record
from common.questions import draw

from nemodiff.builder.build import Builder
from nemodiff.runtime.engines.engine import bidirectional
from nemodiff.runtime.generate import generate
from nemodiff.runtime.loading import LoadedEngine, load

KINDS: tuple[str | None, ...] = (None, "int8", "int4")
SIZES = (1, 8, 32)
CONTEXT = 128
MODES = (("linear_spec", 16), ("linear_spec", 32), ("quadratic_spec", 16), ("quadratic_spec", 32))
WARMUP = 2


def passes(engines: dict[str, LoadedEngine], rounds: int) -> dict[str, dict[int, float]]:
    """CPU milliseconds of a pass by engine and size, lower quartiles."""
    caches = {name: engine.backend.open(1) for name, engine in engines.items()}
    times: dict[tuple[str, int], list[float]] = {(name, size): [] for size in SIZES for name in engines}
    for turn in range(WARMUP + rounds):
        for (name, size), values in times.items():
            pass_ = bidirectional("denoise", [5] * size, CONTEXT, 0.9)
            for repeat in range(2):
                started = time.process_time()
                caches[name].forward([pass_])
                if repeat and turn >= WARMUP:
                    values.append((time.process_time() - started) * 1e3)
    return {name: {size: round(statistics.quantiles(times[name, size])[0], 4) for size in SIZES} for name in engines}


def answers(engines: dict[str, LoadedEngine], questions: int, new_tokens: int) -> dict[str, Any]:
    """By engine: right answers, answers equal to f32's, and answers of each other mode that are not its own ar's."""
    asked = draw(-(-questions // 10))[:questions]
    results: dict[str, Any] = {}
    plain: list[list[int]] = []
    for name, engine in engines.items():
        result = {"right": 0, "equal to f32": 0, "unequal to ar": {f"{m} {b}": 0 for m, b in MODES}}
        for number, question in enumerate(asked):
            answer = generate(engine, question.text, mode="ar", max_new_tokens=new_tokens)
            if name == "f32":
                plain.append(answer.token_ids)
            result["right"] += answer.text.strip() == question.answer.strip()
            result["equal to f32"] += answer.token_ids == plain[number]
            for mode, block in MODES:
                other = generate(engine, question.text, mode=mode, block_length=block, max_new_tokens=new_tokens)
                result["unequal to ar"][f"{mode} {block}"] += other.token_ids != answer.token_ids
        results[name] = {"answers": len(asked), **result}
        print(name, results[name], flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure int8 and int4 against f32 on the CPU.")
    parser.add_argument("--checkpoint", type=Path, default=record.TINY_CHAT, help="default examples/tiny-chat")
    parser.add_argument("--name", default="low_bits", help="name of the result, default low_bits")
    parser.add_argument("--questions", type=int, default=100, help="default 100; 0 where the model answers nothing")
    parser.add_argument("--rounds", type=int, default=25, help="passes per engine and size, default 25")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    args = parser.parse_args()
    origin = record.origin(("nemodiff", "onnxruntime"), args.threads)
    with tempfile.TemporaryDirectory() as work:
        engines = {}
        for kind in KINDS:
            name = kind or "f32"
            folder = Builder(args.checkpoint, Path(work) / name, quantization=kind).run()  # type: ignore[arg-type]
            engines[name] = load(folder, threads=args.threads)
        costs = passes(engines, args.rounds)
        print(costs, flush=True)
        asked = answers(engines, args.questions, 100) if args.questions else {}
    ratio = costs["int8"][32] / costs["int8"][1]
    goals = [record.goal("int8: a pass of 32 over one of 1", round(ratio, 2), "at most", 4.0, "times")]
    for name, result in asked.items():
        unequal = sum(result["unequal to ar"].values())
        goals.append(record.goal(f"{name}: answers that are not ar's", unequal, "at most", 0, "answers"))
    gains = {name: {s: round(costs["f32"][s] / ms, 2) for s, ms in cost.items()} for name, cost in costs.items()}
    figures = {"checkpoint": args.checkpoint.name, "cpu_ms": costs, "times_f32": gains, "answers": asked}
    record.write(args.name, origin, goals, figures)


if __name__ == "__main__":
    main()
