"""Measure K and V in 8 bits on the CPU: memory, what passes cost, which answers change, and that modes equal ar.

    python benchmarks/kv_cache.py
    python benchmarks/make_checkpoint.py m133 --size 133m
    python benchmarks/kv_cache.py --checkpoint m133 --name kv_cache_133m --questions 0

Passes of the engines take turns, and CPU time counts, so other work on the machine falls on all of them.
"""

from __future__ import annotations

import statistics
import tempfile
from functools import partial
from pathlib import Path

from common import checkout  # noqa: F401  # isort: skip
from common import compared, record
from common.questions import LONGEST

from nemodiff.builder.build import Builder
from nemodiff.contract import Backend, KvCacheDtype, kv_bytes_per_token
from nemodiff.runtime.engines.passes import bidirectional
from nemodiff.runtime.loading import LoadedEngine, load

KINDS: dict[str, tuple[Backend, KvCacheDtype]] = {
    "f32": ("onnxruntime", "auto"),
    "int8": ("onnxruntime", "int8"),
    "torch f32": ("torch", "auto"),
    "torch int8": ("torch", "int8"),
    "torch fp8": ("torch", "fp8"),
}
CASES = [(context, size) for context in (512, 4096) for size in (1, 32)]


def passes(engines: dict[str, LoadedEngine], rounds: int) -> dict[str, dict[str, float]]:
    """CPU milliseconds of a pass by engine, and by tokens in the cache and in the pass; medians."""
    # One for each context: attention on ONNX Runtime reads as far as the longest row has reached.
    caches = {(context, name): engine.backend.open(1) for name, engine in engines.items() for context, _ in CASES}
    runs = {
        (context, size, name): partial(
            caches[context, name].forward, [bidirectional("denoise", [5] * size, context, 0.9)]
        )
        for context, size in CASES
        for name in engines
    }
    times = compared.in_turns(runs, rounds)
    return {
        name: {
            f"{size} at {context}": round(statistics.median(times[context, size, name]), 4) for context, size in CASES
        }
        for name in engines
    }


def main() -> None:
    about = "Measure K and V in 8 bits against f32 on the CPU."
    args = compared.parser(about, "kv_cache", questions=40, rounds=15).parse_args()
    origin = record.origin(("nemodiff", "onnxruntime", "torch"), args.threads)
    with tempfile.TemporaryDirectory() as work:
        engines = {}
        for name, (backend, kind) in KINDS.items():
            builder = Builder(args.checkpoint, Path(work) / name, backend=backend, dtype="f32", kv_cache_dtype=kind)
            engines[name] = load(builder.run(), threads=args.threads, device="cpu")
        per_token = {name: kv_bytes_per_token(e.info.model, e.info.build) for name, e in engines.items()}
        costs = passes(engines, args.rounds)
        print(per_token, costs, flush=True)
        asked = compared.answers(engines, args.questions, LONGEST) if args.questions else {}
    goals = [
        record.goal(
            "int8: bytes per token over f32's", round(per_token["int8"] / per_token["f32"], 3), "at most", 0.3, "times"
        )
    ]
    goals += compared.unequal_goals(asked)
    ratios = {
        name: {
            case: round(ms / costs[name.replace("int8", "f32").replace("fp8", "f32")][case], 2)
            for case, ms in cost.items()
        }
        for name, cost in costs.items()
    }
    figures = {
        "checkpoint": args.checkpoint.name,
        "bytes_per_token": per_token,
        "cpu_ms": costs,
        "over_f32": ratios,
        "answers": asked,
    }
    record.write(args.name, origin, goals, figures)


if __name__ == "__main__":
    main()
