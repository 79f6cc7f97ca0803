"""Measure what a pass costs after a long text: on the engine's cache, and on one of exactly that length."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import checkout  # noqa: F401  # isort: skip
from common import record

from nemodiff.builder.build import Builder
from nemodiff.runtime.engines.passes import bidirectional
from nemodiff.runtime.loading import load

CONTEXTS = (30, 130, 300, 600, 1100, 2100, 4200)
SIZES = (1, 8, 32)
GOAL = 1.08
WARMUP = 2


def exact(cache: Any, slots: int) -> None:
    """Give a cache exactly that capacity, whatever its next passes need."""
    cache.memory._fit(slots)
    cache.memory.capacity = slots  # nothing is in use yet
    cache.memory._fit = lambda slots: None


def measure(backend: Any, context: int, size: int, rounds: int) -> dict[str, float]:
    """CPU milliseconds of a pass on both caches, lower quartiles since other work only ever adds, and their ratio.

    A second cache of the engine's own capacity is the control: its ratio would be 1 on a machine without other work.
    """
    pass_ = bidirectional("denoise", [5] * size, context, 0.9)
    caches = {name: backend.open(1) for name in ("engine", "exact", "control")}
    caches["engine"].forward([pass_])
    exact(caches["exact"], context + size)
    exact(caches["control"], caches["engine"].capacity)
    for cache in caches.values():
        for array in cache.memory._arrays.values():
            array.fill(0)  # pages never written are all one page of zeros, which is read from the processor's cache
    times: dict[str, list[float]] = {name: [] for name in caches}
    for turn in range(WARMUP + rounds):
        order = sorted(caches)
        for name in order[turn % 3 :] + order[: turn % 3]:
            for repeat in range(2):  # the first finds the other's weights and caches in the processor's cache
                started = time.process_time()
                caches[name].forward([pass_])
                if repeat and turn >= WARMUP:
                    times[name].append((time.process_time() - started) * 1e3)
    low = {name: statistics.quantiles(values)[0] for name, values in times.items()}
    return {
        "engine": round(low["engine"], 4),
        "exact": round(low["exact"], 4),
        "slots": caches["engine"].capacity,
        "ratio": round(low["engine"] / low["exact"], 3),
        "control": round(low["engine"] / low["control"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure passes after a long text against caches of exactly its length."
    )
    parser.add_argument("--checkpoint", type=Path, default=record.MODEL, help=f"default examples/{record.MODEL.name}")
    parser.add_argument("--rounds", type=int, default=25, help="passes per cache, context and size, default 25")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="tokens before the pass")
    args = parser.parse_args()
    origin = record.origin(("nemodiff", "onnxruntime"), 1)
    results = []
    with tempfile.TemporaryDirectory() as work:
        backend = load(Builder(args.checkpoint, Path(work) / "engine").run(), threads=1).backend
        for context in args.contexts:
            for size in SIZES:
                results.append({"context": context, "tokens": size, **measure(backend, context, size, args.rounds)})
                print(results[-1], flush=True)
    worst = max(result["ratio"] for result in results)
    goals = [record.goal("a pass over one on a cache of exactly its length", worst, "at most", GOAL, "times")]
    record.write("context", origin, goals, {"checkpoint": args.checkpoint.name, "passes": results})


if __name__ == "__main__":
    main()
