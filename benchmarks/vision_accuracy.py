"""Measure accuracy and tokens per pass of tiny-vision, by task and mode.

An answer counts only if its whole text is right, letter for letter. Self-speculation must give AR's tokens for every
picture, so the run fails if one token differs. Writes `results/vision_accuracy.json` and `.md`.
"""

from __future__ import annotations

import argparse
import collections
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import record

sys.path.insert(0, str(record.ROOT / "examples" / "tiny-vision"))

from make_pictures import TASKS, example

from nemodiff.builder.build import Builder
from nemodiff.runtime.generate import generate_many
from nemodiff.runtime.loading import load
from nemodiff.runtime.requests.generation import Generation

MODES: dict[str, dict[str, Any]] = {
    "ar": {"mode": "ar"},
    "diffusion, threshold 0.9": {"mode": "diffusion", "threshold": 0.9},
    "diffusion, threshold 0.7": {"mode": "diffusion", "threshold": 0.7},
    "linear_spec": {"mode": "linear_spec"},
    "quadratic_spec": {"mode": "quadratic_spec"},
}
SEED = 2026  # not one of training's


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure accuracy and tokens per pass of tiny-vision.")
    parser.add_argument("--count", type=int, default=100, help="pictures of each task (100)")
    parser.add_argument("--checkpoint", type=Path, default=record.ROOT / "examples" / "tiny-vision")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    arguments = parser.parse_args()
    origin = record.origin(("nemodiff", "onnxruntime", "numpy", "pillow", "tokenizers"), arguments.threads)
    rng = random.Random(SEED)
    asked = [(task, *example(rng, task)) for _ in range(arguments.count) for task in TASKS]
    prompts: list[list[dict[str, Any]]] = [
        [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]
        for _, picture, question, _ in asked
    ]
    with tempfile.TemporaryDirectory() as folder:
        engine = load(Builder(arguments.checkpoint, Path(folder) / "engine").run(), threads=arguments.threads)
        answers: dict[str, list[Generation]] = {
            name: list(generate_many(engine, prompts, rows=1, max_new_tokens=96, **options))
            for name, options in MODES.items()
        }
    rows = {}
    for name, given in answers.items():
        right = collections.Counter(
            task for (task, _, _, expected), one in zip(asked, given, strict=True) if one.text == expected
        )
        tokens = sum(len(one.token_ids) for one in given)
        passes = sum(count for one in given for kind, count in one.nfe.items() if kind != "prefill")
        rows[name] = {
            "accuracy": {task: right[task] / arguments.count for task in TASKS},
            "all": sum(right.values()) / len(asked),
            "tokens_per_pass": round(tokens / passes, 2),
        }
    for name in ("linear_spec", "quadratic_spec"):
        for one, other in zip(answers["ar"], answers[name], strict=True):
            assert one.token_ids == other.token_ids, f"{name} differs from ar"
    figures = {"pictures_of_each_task": arguments.count, "seed": SEED, "modes": rows}
    path = record.write("vision_accuracy", origin, [], figures)
    lines = [f"| mode | {' | '.join(TASKS)} | all | tokens per pass |", f"|{' --- |' * (len(TASKS) + 3)}"]
    for name, row in rows.items():
        cells = " | ".join(f"{row['accuracy'][task]:.2f}" for task in TASKS)
        lines.append(f"| {name} | {cells} | {row['all']:.3f} | {row['tokens_per_pass']:.2f} |")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
