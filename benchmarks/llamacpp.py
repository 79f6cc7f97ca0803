"""Compare the CPU engine with llama.cpp at the same bits, on the same weights: the exported twin as GGUF.

    pip install "nemodiff[llama-cpp]"
    python benchmarks/llamacpp.py
    python benchmarks/make_checkpoint.py m133 --size 133m
    python benchmarks/llamacpp.py --checkpoint m133 --name llamacpp_133m --questions 0

Both run in one process and take turns pass by pass, each from token ids to the best next token, which in nemodiff is a
part of the graph. CPU time counts, so other work on the machine falls on both. Where the memory of weights happens to
lie moves a pass by some percent for as long as they are loaded, so both are loaded several times. Q4_0, which has a
scale for 32 weights, is compared with int4 as it is by default, with a scale for 32 in attention and for 128 in MLPs,
and with int4 in groups of 32 and of 128 alone: `errors` says how far each engine's logits are from the same program's
in f32. The heads of both have 8 bits, and in the last pair llama.cpp's 6.6, for so its own quantizer makes a Q4_0. It
cannot be called llama_cpp.py, as its own folder comes first on Python's path.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from common import checkout  # noqa: F401  # isort: skip
from common import compared, record
from common.questions import first
from common.twin_gguf import LlamaCpp, quantize_gguf, write_gguf

from nemodiff.builder.build import Builder
from nemodiff.builder.export import Exporter
from nemodiff.engine_folder import WEIGHTS_FILE
from nemodiff.runtime.engines.passes import causal
from nemodiff.runtime.generate import generate
from nemodiff.runtime.loading import LoadedEngine, load

QUANTIZER = "Q4_0 by llama-quantize"
PAIRS: dict[str, tuple[str, dict[str, Any]]] = {  # by name: llama.cpp's kind, and what nemodiff builds
    "F32": ("F32", {}),
    "Q8_0": ("Q8_0", {"quantization": "int8"}),
    "Q4_0": ("Q4_0", {"quantization": "int4"}),
    "Q4_0, int4 by 32": ("Q4_0", {"quantization": "int4", "group_size": 32}),
    "Q4_0, int4 by 128": ("Q4_0", {"quantization": "int4", "group_size": 128}),
    "Q4_0 with a head in Q6_K": (QUANTIZER, {"quantization": "int4"}),
}
BITS = {"F32": 32, "Q8_0": 8.5, "Q4_0": 4.5, QUANTIZER: 4.5}  # of a weight in GGUF, with its share of a scale
SIZES = (1, 8, 32, 512)
CONTEXT = 64


def fill(cache: Any, other: LlamaCpp) -> None:
    """Begin a text anew in both, of CONTEXT tokens."""
    cache.forward([causal("prefill", [300] * CONTEXT, 0)])
    other.forward([300] * CONTEXT, 0)


def begin(folder: Path, gguf: Path, threads: int) -> tuple[LoadedEngine, Any, LlamaCpp]:
    """Load both and begin a text in them: the engine, its cache, and llama.cpp."""
    engine, other = load(folder, threads=threads), LlamaCpp(gguf, threads)
    cache = engine.backend.open(1)
    fill(cache, other)
    return engine, cache, other


def compare(cache: Any, other: LlamaCpp, size: int, rounds: int) -> dict[str, float]:
    """Lower quartiles of a causal pass of `size` tokens that predicts the last one."""
    ids = list(range(200, 200 + size)) if size < 500 else [200 + i % 500 for i in range(size)]
    pass_ = causal("verify" if size > 1 else "decode", ids, CONTEXT)
    runs = {"ours": lambda: cache.forward([pass_]), "theirs": lambda: other.token(ids, CONTEXT)}
    a, b = (statistics.quantiles(times)[0] for times in compared.in_turns(runs, rounds).values())
    return {"nemodiff_ms": round(a, 3), "llama_cpp_ms": round(b, 3), "speed": round(b / a, 2)}


def medians(loads: list[dict[str, float]]) -> dict[str, Any]:
    """The median of each figure, and every load's speed."""
    found: dict[str, Any] = {name: round(statistics.median(one[name] for one in loads), 3) for name in loads[0]}
    return found | {"speeds": [one["speed"] for one in loads]}


def limit(cache: Any, other: LlamaCpp, nbytes: dict[str, int], rounds: int) -> dict[str, dict[str, float]]:
    """What share of a plain read's speed each engine's token has; `nbytes` are those of its projections by engine.

    The read is numpy's product of an array with itself, in turns with the tokens.
    """
    arrays = {name: np.ones(count // 4, np.float32) for name, count in nbytes.items()}
    runs: dict[str, Callable[[], object]] = {
        "nemodiff": lambda: cache.forward([causal("decode", [200], CONTEXT)]),
        "llama_cpp": lambda: other.token([200], CONTEXT),
    }
    fill(cache, other)  # a long pass before this one would have left the cache with more slots to read
    runs |= {f"{name} read": partial(np.dot, array, array) for name, array in arrays.items()}
    ms = {name: statistics.quantiles(times)[0] for name, times in compared.in_turns(runs, rounds).items()}
    return {
        name: {
            "mb": round(count / 1e6, 1),
            "read_gb_per_s": round(count / ms[f"{name} read"] / 1e6, 1),
            "share": round(ms[f"{name} read"] / ms[name], 2),
        }
        for name, count in nbytes.items()
    }


def main() -> None:
    about = "Compare the CPU engine with llama.cpp at the same bits."
    parser = compared.parser(about, "llamacpp", questions=50, rounds=15)
    parser.add_argument("--loads", type=int, default=5, help="load both so often and take medians; default 5")
    args = parser.parse_args()
    origin = record.origin(("nemodiff", "onnxruntime", "llama-cpp-python"), args.threads)
    passes: dict[str, Any] = {}
    reads: dict[str, Any] = {}
    equal: dict[str, int] = {}
    errors: dict[str, dict[str, dict[str, float]]] = {}
    goals = []
    with tempfile.TemporaryDirectory() as work:
        twin = Exporter(args.checkpoint, Path(work) / "twin").run()
        plain: list[list[int]] = []
        exact: dict[str, np.ndarray] = {}
        for kind, (theirs, choices) in PAIRS.items():
            folder = Builder(args.checkpoint, Path(work) / kind, **choices).run()
            gguf = Path(work) / f"{theirs}.gguf"
            if theirs == QUANTIZER:
                quantize_gguf(Path(work) / "F32.gguf", gguf)
            else:
                write_gguf(twin, gguf, theirs)
            loads = []
            for _ in range(args.loads):
                _, cache, other = begin(folder, gguf, args.threads)
                loads.append({size: compare(cache, other, size, args.rounds) for size in SIZES})
                other.close()
            engine, cache, other = begin(folder, gguf, args.threads)
            passes[kind] = {size: medians([one[size] for one in loads]) for size in SIZES}
            model = engine.info.model
            table = 4 * model.vocab_size * model.hidden_size  # of the embeddings, of which a token reads a row
            nbytes = {"nemodiff": (folder / WEIGHTS_FILE).stat().st_size - table}
            nbytes["llama_cpp"] = gguf.stat().st_size - int(table * BITS[theirs] / 32)
            reads[kind] = limit(cache, other, nbytes, args.rounds)
            texts = compared.texts(engine)
            logits = {
                "nemodiff": compared.logits(engine, texts),
                "llama_cpp": np.concatenate([other.forward(ids, 0, predict_all=True).copy() for ids in texts]),
            }
            exact = exact or logits
            errors[kind] = {name: compared.differences(got, exact[name]) for name, got in logits.items()}
            print(kind, passes[kind], reads[kind], errors[kind], flush=True)
            if kind == theirs:
                goal = record.goal(f"one token, {kind}", passes[kind][1]["speed"], "at least", 1.0, "of llama.cpp")
                goals.append(goal)
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
    figures = {"checkpoint": args.checkpoint.name, "passes": passes, "reads": reads, "errors": errors, "equal": equal}
    record.write(args.name, origin, goals, figures)


if __name__ == "__main__":
    main()
