"""Compare what is accepted of drafts at a temperature, by the rule that draws them.

*Half*, the product's: a draft is drawn at half the request's temperature, with the noise that the verify will draw
with. *Full*: at all of it, with the same noise. *Best*: a draft is the likeliest tokens. *Independent*: at all of it
with noise of its own, new in every pass; equal draws are kept by chance, as in the released code. All emit AR's tokens,
so only the number of passes differs. Writes `results/sampling.json` and `.md`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import tempfile
from pathlib import Path
from typing import Any

from common import questions, record

from nemodiff.builder.build import Builder
from nemodiff.runtime.engines.passes import Prediction
from nemodiff.runtime.generate import decode, prepare
from nemodiff.runtime.loading import LoadedEngine, load
from nemodiff.runtime.requests.options import make_options
from nemodiff.runtime.requests.sequence import Sequence
from nemodiff.runtime.sampling.noise import Noise

RULES = ("half", "full", "best", "independent")
TEMPERATURES = (0.3, 0.7, 1.0, 1.5)
WAYS: tuple[dict[str, Any], ...] = (
    *({"mode": "linear_spec", "block_length": block} for block in (8, 16, 32)),
    {"mode": "quadratic_spec", "block_length": 16, "groups": "all"},
)
NEW_TOKENS = 96
PACKAGES = ("nemodiff", "onnxruntime", "numpy")


def draft_by(rule: str, sequence: Sequence, seeds: itertools.count[int]) -> None:
    """Make a request's drafts follow a rule."""
    if rule == "half":
        return
    selector = sequence.selector
    heat = 0.0 if rule == "best" else selector._params.temperature
    selector._mask_params = dataclasses.replace(selector._params, temperature=heat)
    if rule != "independent":
        return
    shared, propose = selector._noise, selector.propose

    def alone(prediction: Prediction, tokens: list[int], rows: range) -> list[int]:
        selector._noise = Noise(next(seeds), sequence.model.vocab_size)
        try:
            return propose(prediction, tokens, rows)
        finally:
            selector._noise = shared

    selector.propose = alone  # type: ignore[method-assign]


def accepted(engine: LoadedEngine, prompts: list[list[int]], rule: str, **options: Any) -> Any:
    """Tokens per verify over all questions, and what was emitted."""
    lengths = list[int]()
    tokens = list[list[int]]()
    seeds = itertools.count(1 << 40)
    for seed, ids in enumerate(prompts):
        sequence = prepare(engine, ids, make_options({**options, "seed": seed, "max_new_tokens": NEW_TOKENS}))
        draft_by(rule, sequence, seeds)
        for _ in decode(engine.backend, [sequence], 1):
            pass
        lengths += sequence.accepted
        tokens.append(sequence.tokens)
    return sum(lengths) / len(lengths), tokens


def table(results: list[dict[str, Any]], counts: dict[str, int]) -> str:
    """The result as Markdown."""
    lines = [
        "# Acceptance at a temperature",
        "",
        f"Tokens per verify of {record.MODEL.name}, threshold 0, by `python benchmarks/sampling.py`, for",
        f"{counts['one']} questions with one right answer and {counts['open']} open ones, stories and loops. *Half*,",
        "the rule: drafts are drawn at half the temperature with the verify's noise. *Full*: at all of it, with that",
        "noise. *Best*: the likeliest tokens. *Independent*: at all of it with other noise, as in the released code.",
        "All emit the same tokens.",
        "",
        f"| answers | mode, block | temperature | {' | '.join(RULES)} | half / independent |",
        f"|---|---|{'---:|' * (len(RULES) + 2)}",
    ]
    for r in results:
        figures = " | ".join(f"{r[rule]:.2f}" for rule in RULES)
        ratio = r["half"] / r["independent"]
        way = f"{r['mode']}, {r['block_length']}"
        lines.append(f"| {r['answers']} | {way} | {r['temperature']} | {figures} | {ratio:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare acceptance at a temperature by the rule that draws drafts.")
    parser.add_argument("--prompts", type=int, default=100, help="questions with one answer, default 100")
    parser.add_argument("--open", type=int, default=20, help="questions with many right answers, default 20")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, default 1")
    arguments = parser.parse_args()
    origin = record.origin(PACKAGES, arguments.threads)
    drawn = {
        "one": questions.first(arguments.prompts),
        "open": questions.draw(-(-arguments.open // len(questions.OPEN)), tasks=questions.OPEN)[: arguments.open],
    }
    results, unequal = list[dict[str, Any]](), 0
    with tempfile.TemporaryDirectory(prefix="nemodiff-sampling-") as work:
        engine = load(Builder(record.MODEL, Path(work) / "engine").run(), threads=arguments.threads)
        for answers, way, temperature in itertools.product(drawn, WAYS, TEMPERATURES):
            prompts = [q.prompt(engine.text) for q in drawn[answers]]
            found = {rule: accepted(engine, prompts, rule, temperature=temperature, **way) for rule in RULES}
            expected = found["half"][1]
            unequal += sum(a != b for _, tokens in found.values() for a, b in zip(tokens, expected, strict=True))
            means = {rule: round(mean, 3) for rule, (mean, _) in found.items()}
            results.append({"answers": answers, **way, "temperature": temperature, **means})
            print(results[-1], flush=True)
    goals = [record.goal("answers that differ between the rules", unequal, "at most", 0, "answers")]
    for r in results:
        case = f"{r['answers']}, {r['mode']}, blocks of {r['block_length']}, T {r['temperature']}"
        ratio = round(r["half"] / r["independent"], 3)
        goals.append(record.goal(f"half over independent, {case}", ratio, "at least", 1.0, "x"))
    counts = {answers: len(drawn[answers]) for answers in drawn}
    figures = {
        "checkpoint": record.MODEL.name,
        "dtype": "f32",
        "prompts": counts,
        "new_tokens": NEW_TOKENS,
        "rows": results,
    }
    record.write("sampling", origin, goals, figures)
    (record.RESULTS / "sampling.md").write_text(table(results, counts), encoding="utf-8")


if __name__ == "__main__":
    main()
