"""Measure what 8-bit projections cost in right answers and acceptance, compared with the same engine in f32.

The engines are torch's on the CPU and sum in f32, as the GPU's kernel does, so they differ in the weights alone; the
third rounds what a projection takes to e4m3 too, token by token, as `plugins/ops/token_quantise.py` does. No engine
does that yet. Writes `results/fp8.json`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from common import questions, record
from common.questions import Question

from nemodiff.builder.build import Builder
from nemodiff.contract import Quantization
from nemodiff.runtime.generate import Generation, generate_many
from nemodiff.runtime.loading import LoadedEngine, load

SETTINGS: tuple[dict[str, Any], ...] = (
    {"mode": "ar"},
    {"mode": "diffusion", "block_length": 32, "threshold": 0.9},
    {"mode": "linear_spec", "block_length": 32},
)
KINDS: dict[str, Quantization | None] = {"f32": None, "fp8": "fp8", "fp8 by fp8": "fp8"}
PACKAGES = ("nemodiff", "torch", "numpy", "tokenizers")


def round_activations(engine: Any) -> None:
    """Let the projections of a torch engine take e4m3, with a scale per token."""
    import torch

    plain = engine.model.project

    def projected(x: Any, weight: Any) -> Any:
        scale = (x.abs().amax(-1, keepdim=True) / 448).clamp(min=torch.finfo(torch.float32).tiny)
        return plain((x / scale).to(torch.float8_e4m3fn).float() * scale, weight)

    engine.model.project = projected


def answer(engine: LoadedEngine, question_list: list[Question], rows: int, **options: Any) -> list[Generation]:
    """One generation per question, `rows` of them together."""
    return list(
        generate_many(engine, [q.text for q in question_list], max_new_tokens=questions.LONGEST, rows=rows, **options)
    )


def score(question_list: list[Question], answers: list[Generation], plain: list[Generation]) -> dict[str, Any]:
    """Right answers, tokens per pass, acceptance; and answers whose tokens are not those of `plain`.

    Right answers alone would hide a change, as one engine may be right as often in other places.
    """
    passes = sum(sum(g.nfe.values()) - g.nfe["prefill"] for g in answers)
    lengths = [n for g in answers for n in g.acceptance.lengths]
    return {
        "questions": len(question_list),
        "right": sum(g.text == q.answer for q, g in zip(question_list, answers, strict=True)),
        "unlike": sum(g.token_ids != p.token_ids for g, p in zip(answers, plain, strict=True)),
        "decode_tpf": round(sum(len(g.token_ids) for g in answers) / passes, 3),
        "acceptance_mean": round(sum(lengths) / len(lengths), 3) if lengths else None,
    }


def measure(engines: dict[str, LoadedEngine], question_list: list[Question], rows: int) -> dict[str, Any]:
    """Every setting with every engine. `unlike` counts against f32 in the same mode, `unlike_ar` within one engine."""
    results: dict[str, Any] = {}
    plain: dict[str, list[Generation]] = {}
    for setting in SETTINGS:
        answers_by_engine = {name: answer(engine, question_list, rows, **setting) for name, engine in engines.items()}
        plain = plain or answers_by_engine
        for name, answers in answers_by_engine.items():
            cell = score(question_list, answers, answers_by_engine["f32"])
            cell["unlike_ar"] = score(question_list, answers, plain[name])["unlike"]
            results[f"{setting['mode']} {name}"] = cell
            print(f"{setting['mode']:12} {name}  {cell}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what 8-bit projections cost the demonstration model.")
    parser.add_argument("--per-task", type=int, default=20, help="questions per task, default 20")
    parser.add_argument("--rows", type=int, default=8, help="questions decoded together, default 8")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, default 1")
    parser.add_argument("--no-write", action="store_true", help="print only; leave the result file as it is")
    arguments = parser.parse_args()
    origin = record.origin(PACKAGES, arguments.threads)
    question_list = questions.draw(arguments.per_task)
    with tempfile.TemporaryDirectory(prefix="nemodiff-fp8-") as work:
        engines, weights = dict[str, LoadedEngine](), dict[str, int]()
        for name, quantization in KINDS.items():
            builder = Builder(record.MODEL, Path(work) / name, backend="torch", dtype="f32", quantization=quantization)
            weights[name] = builder.plan().weight_bytes
            engines[name] = load(builder.run(), device="cpu", threads=arguments.threads)
            if name == "fp8 by fp8":
                round_activations(engines[name].backend)
        results = measure(engines, question_list, arguments.rows)
    wide, narrow = results["linear_spec f32"], results["linear_spec fp8"]
    unlike = sum(results[f"linear_spec {name}"]["unlike_ar"] for name in KINDS)
    goals = [
        record.goal("right answers of ar over f32's", results["ar fp8"]["right"] / results["ar f32"]["right"],
                    "at least", 0.98, "x"),
        record.goal("tokens per verify over f32's", narrow["acceptance_mean"] / wide["acceptance_mean"],
                    "at least", 0.95, "x"),
        record.goal("right answers of ar over f32's, activations in fp8 too",
                    results["ar fp8 by fp8"]["right"] / results["ar f32"]["right"], "at least", 0.98, "x"),
        record.goal("answers of linear_spec unlike the same engine's ar", unlike, "at most", 0, "answers"),
    ]  # fmt: skip
    if not arguments.no_write:
        record.write(
            "fp8", origin, goals, {"checkpoint": record.MODEL.name, "weight_bytes": weights, "settings": results}
        )


if __name__ == "__main__":
    main()
