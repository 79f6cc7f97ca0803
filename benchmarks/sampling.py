"""Compare acceptance at a temperature when draft and verify share their noise and when they do not.

*Shared*: the draft draws with the noise that the verify will draw with. *Independent*: the draft draws anew in every
pass, and equal draws are kept by chance, as in the released code. Both emit AR's tokens, so only the number of passes
differs. Writes `results/sampling.json` and `.md`.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any

from common import questions, record

from nemodiff.builder.build import Builder
from nemodiff.runtime.engines.engine import Prediction
from nemodiff.runtime.generate import decode, prepare
from nemodiff.runtime.loading import LoadedEngine, load
from nemodiff.runtime.requests.options import make_options
from nemodiff.runtime.requests.sequence import Sequence
from nemodiff.runtime.sampling.noise import Noise

TEMPERATURES = (0.0, 0.7, 1.0, 1.5)
BLOCKS = (8, 32)
NEW_TOKENS = 96
PACKAGES = ("nemodiff", "onnxruntime", "numpy")


def forget_the_noise(sequence: Sequence, seeds: itertools.count[int]) -> None:
    """Make a request's drafts draw with noise of their own, new in every pass."""
    selector = sequence.selector
    shared, propose = selector._noise, selector.propose

    def alone(prediction: Prediction, tokens: list[int], rows: range) -> list[int]:
        selector._noise = Noise(next(seeds), sequence.model.vocab_size)
        try:
            return propose(prediction, tokens, rows)
        finally:
            selector._noise = shared

    selector.propose = alone  # type: ignore[method-assign]


def accepted(engine: LoadedEngine, prompts: list[list[int]], temperature: float, block: int, shared: bool) -> Any:
    """Tokens per verify over all questions, and what was emitted."""
    lengths = list[int]()
    tokens = list[list[int]]()
    seeds = itertools.count(1 << 40)
    for seed, ids in enumerate(prompts):
        values = {"temperature": temperature, "seed": seed, "block_length": block, "max_new_tokens": NEW_TOKENS}
        sequence = prepare(engine, ids, make_options(values))
        if not shared:
            forget_the_noise(sequence, seeds)
        for _ in decode(engine.backend, [sequence], 1):
            pass
        lengths += sequence.accepted
        tokens.append(sequence.tokens)
    return sum(lengths) / len(lengths), tokens


def table(results: list[dict[str, Any]], count: int) -> str:
    """The result as Markdown."""
    lines = [
        "# Acceptance at a temperature",
        "",
        f"Tokens per verify of linear self-speculation on {record.MODEL.name}, {count} questions, threshold 0, by",
        "`python benchmarks/sampling.py`. Shared: draft and verify draw with the same noise. Independent: the draft",
        "draws anew, and equal draws are kept, as in the released code. Both emit the same tokens.",
        "",
        "| temperature | block | shared | independent | shared / independent |",
        "|---:|---:|---:|---:|---:|",
    ]
    for r in results:
        ratio = r["shared"] / r["independent"]
        lines.append(
            f"| {r['temperature']} | {r['block_length']} | {r['shared']:.2f} | {r['independent']:.2f} | {ratio:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare acceptance with shared and with independent noise.")
    parser.add_argument("--prompts", type=int, default=100, help="questions, default 100, over all tasks")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, default 1")
    arguments = parser.parse_args()
    origin = record.origin(PACKAGES, arguments.threads)
    drawn = questions.first(arguments.prompts)
    results, unequal = list[dict[str, Any]](), 0
    with tempfile.TemporaryDirectory(prefix="nemodiff-sampling-") as work:
        engine = load(Builder(record.MODEL, Path(work) / "engine").run(), threads=arguments.threads)
        prompts = [q.prompt(engine.text) for q in drawn]
        for temperature, block in itertools.product(TEMPERATURES, BLOCKS):
            shared, tokens = accepted(engine, prompts, temperature, block, True)
            independent, others = accepted(engine, prompts, temperature, block, False)
            unequal += sum(a != b for a, b in zip(tokens, others, strict=True))
            results.append(
                {
                    "temperature": temperature,
                    "block_length": block,
                    "shared": round(shared, 3),
                    "independent": round(independent, 3),
                }
            )
            print(results[-1], flush=True)
    goals = [record.goal("answers that differ between the rules", unequal, "at most", 0, "answers")]
    for result in results:
        if result["temperature"] in (0.7, 1.0):
            name = f"shared over independent, T {result['temperature']}, blocks of {result['block_length']}"
            goals.append(record.goal(name, round(result["shared"] / result["independent"], 3), "at least", 1.0, "x"))
    figures = {
        "checkpoint": record.MODEL.name,
        "dtype": "f32",
        "prompts": len(prompts),
        "new_tokens": NEW_TOKENS,
        "rows": results,
    }
    record.write("sampling", origin, goals, figures)
    (record.RESULTS / "sampling.md").write_text(table(results, len(prompts)), encoding="utf-8")


if __name__ == "__main__":
    main()
