"""Compare the CPU engine with llama.cpp at the same bits, on the same weights: the exported twin as GGUF.

    pip install nemodiff[llama-cpp]
    python benchmarks/llamacpp.py
    python benchmarks/llamacpp.py --checkpoint FOLDER --name llamacpp_133m --questions 0

Both run in one process and take turns pass by pass; CPU time counts, so other work on the machine falls on both. It
cannot be called llama_cpp.py, as its own folder comes first on Python's path.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import checkout  # noqa: F401  # isort: skip
from common import record
from common.questions import first
from common.twin_gguf import LlamaCpp, write_gguf

from nemodiff.builder.build import Builder
from nemodiff.builder.export import Exporter
from nemodiff.runtime.engines.engine import causal
from nemodiff.runtime.generate import generate
from nemodiff.runtime.loading import load

PAIRS: tuple[tuple[str, str | None], ...] = (("F32", None), ("Q8_0", "int8"), ("Q4_0", "int4"))
SIZES = (1, 8, 32, 512)
CONTEXT = 64
WARMUP = 2


def clock(run: Callable[[], object]) -> float:
    """CPU milliseconds of the second of two runs; the first finds the other's weights in the processor's cache."""
    run()
    started = time.process_time()
    run()
    return (time.process_time() - started) * 1e3


def compare(cache: Any, other: LlamaCpp, size: int, rounds: int) -> dict[str, float]:
    """Lower quartiles of a causal pass of `size` tokens that predicts the last one."""
    ids = list(range(200, 200 + size)) if size < 500 else [200 + i % 500 for i in range(size)]
    pass_ = causal("verify" if size > 1 else "decode", ids, CONTEXT)
    ours, theirs = [], []
    for turn in range(WARMUP + rounds):
        mine = clock(lambda: cache.forward([pass_]))
        yours = clock(lambda: other.forward(ids, CONTEXT))
        if turn >= WARMUP:
            ours.append(mine)
            theirs.append(yours)
    a, b = statistics.quantiles(ours)[0], statistics.quantiles(theirs)[0]
    return {"nemodiff_ms": round(a, 3), "llama_cpp_ms": round(b, 3), "speed": round(b / a, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the CPU engine with llama.cpp at the same bits.")
    parser.add_argument("--checkpoint", type=Path, default=record.MODEL, help=f"default examples/{record.MODEL.name}")
    parser.add_argument("--name", default="llamacpp", help="name of the result, default llamacpp")
    parser.add_argument("--questions", type=int, default=50, help="default 50; 0 where the model answers nothing")
    parser.add_argument("--rounds", type=int, default=15, help="passes per engine and size, default 15")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    args = parser.parse_args()
    origin = record.origin(("nemodiff", "onnxruntime", "llama-cpp-python"), args.threads)
    passes: dict[str, Any] = {}
    equal: dict[str, int] = {}
    goals = []
    with tempfile.TemporaryDirectory() as work:
        twin = Exporter(args.checkpoint, Path(work) / "twin").run()
        plain: list[list[int]] = []
        for kind, quantization in PAIRS:
            folder = Builder(args.checkpoint, Path(work) / kind, quantization=quantization).run()  # type: ignore[arg-type]
            engine = load(folder, threads=args.threads)
            other = LlamaCpp(write_gguf(twin, Path(work) / f"{kind}.gguf", kind), args.threads)
            cache = engine.backend.open(1)
            cache.forward([causal("prefill", [300] * CONTEXT, 0)])
            other.forward([300] * CONTEXT, 0)
            passes[kind] = {size: compare(cache, other, size, args.rounds) for size in SIZES}
            print(kind, passes[kind], flush=True)
            goals.append(record.goal(f"one token, {kind}", passes[kind][1]["speed"], "at least", 1.0, "of llama.cpp"))
            model = engine.info.model
            equal[kind] = 0
            for number, question in enumerate(first(args.questions)):
                prompt = question.prompt(engine.text)
                if kind == "F32":
                    plain.append(generate(engine, prompt, mode="ar", max_new_tokens=60).token_ids)
                got = other.greedy(prompt, 60, model.eos_ids, model.mask_id)
                equal[kind] += got == plain[number]
            other.close()
    if args.questions:
        goals.append(
            record.goal("the twin's answers equal to ar's", equal["F32"], "at least", args.questions, "answers")
        )
        print(f"answers equal to ar's in f32: {equal} of {args.questions}")
    record.write(args.name, origin, goals, {"checkpoint": args.checkpoint.name, "passes": passes, "equal": equal})


if __name__ == "__main__":
    main()
