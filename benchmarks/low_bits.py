"""Measure weights of few bits: what passes cost, how far logits are off, which answers change, and that
self-speculation equals ar.

    python benchmarks/low_bits.py
    python benchmarks/make_checkpoint.py m133 --size 133m
    python benchmarks/low_bits.py --checkpoint m133 --name low_bits_133m --questions 0
    python benchmarks/low_bits.py --backend torch --name low_bits_torch --questions 20

Passes of the engines take turns, and CPU time counts, so other work on the machine falls on all of them. The torch
engines run on the CPU without kernels, with the same numbers, all in f32 but one in bf16 to compare with; what their
passes cost there says nothing of a GPU and is left out.
"""

from __future__ import annotations

import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from common import checkout  # noqa: F401  # isort: skip
from common import compared, record
from common.questions import LONGEST

from nemodiff.builder.build import Builder
from nemodiff.runtime.engines.passes import bidirectional
from nemodiff.runtime.loading import LoadedEngine, load

ENGINES: dict[str, dict[str, dict[str, Any]]] = {  # choices of the builds by backend and name
    "onnxruntime": {
        "f32": {},
        "int8": {"quantization": "int8"},
        "int4": {"quantization": "int4"},
        "int4 by 32": {"quantization": "int4", "group_size": 32},
        "int4 by 64": {"quantization": "int4", "group_size": 64},
        "int4 by 128": {"quantization": "int4", "group_size": 128},
    },
    "torch": {
        "f32": {"dtype": "f32"},
        "bf16": {"dtype": "bf16"},
        **{kind: {"dtype": "f32", "quantization": kind} for kind in ("fp8", "fp8_dynamic", "int8", "int4")},
    },
}
SIZES = (1, 8, 32)
CONTEXT = 128


def passes(engines: dict[str, LoadedEngine], rounds: int) -> dict[str, dict[int, float]]:
    """CPU milliseconds of a pass by engine and size, lower quartiles."""
    caches = {name: engine.backend.open(1) for name, engine in engines.items()}
    runs = {
        (name, size): partial(cache.forward, [bidirectional("denoise", [5] * size, CONTEXT, 0.9)])
        for size in SIZES
        for name, cache in caches.items()
    }
    times = compared.in_turns(runs, rounds)
    return {name: {size: round(statistics.quantiles(times[name, size])[0], 4) for size in SIZES} for name in engines}


def logit_errors(engines: dict[str, LoadedEngine]) -> dict[str, dict[str, float]]:
    """How far the logits of questions with their answers are from f32's, by engine."""
    texts = compared.texts(engines["f32"])
    got = {name: compared.logits(engine, texts) for name, engine in engines.items()}
    return {name: {**compared.differences(one, got["f32"]), "positions": len(one)} for name, one in got.items()}


def main() -> None:
    parser = compared.parser("Measure int8 and int4 against f32 on the CPU.", "low_bits", questions=100, rounds=25)
    parser.add_argument("--backend", choices=ENGINES, default="onnxruntime", help="default onnxruntime")
    args = parser.parse_args()
    origin = record.origin(("nemodiff", args.backend), args.threads)
    with tempfile.TemporaryDirectory() as work:
        engines = {}
        for name, choices in ENGINES[args.backend].items():
            folder = Builder(args.checkpoint, Path(work) / name, backend=args.backend, **choices).run()
            engines[name] = load(folder, threads=args.threads, device="cpu")
        errors = logit_errors(engines)
        print(errors, flush=True)
        costs = passes(engines, args.rounds) if args.backend == "onnxruntime" else {}
        print(costs, flush=True)
        asked = compared.answers(engines, args.questions, LONGEST) if args.questions else {}
    goals = []
    if costs:
        ratio = costs["int8"][32] / costs["int8"][1]
        goals = [record.goal("int8: a pass of 32 over one of 1", round(ratio, 2), "at most", 4.0, "times")]
    goals += compared.unequal_goals(asked)
    gains = {name: {s: round(costs["f32"][s] / ms, 2) for s, ms in cost.items()} for name, cost in costs.items()}
    figures = {
        "checkpoint": args.checkpoint.name,
        "logits": errors,
        "cpu_ms": costs,
        "times_f32": gains,
        "answers": asked,
    }
    record.write(args.name, origin, goals, figures)


if __name__ == "__main__":
    main()
