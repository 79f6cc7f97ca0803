"""Accuracy and tokens per pass of tiny-chat, by task and mode, in the shape of the paper's Table 5.

In: how many questions per task. Out: `results/accuracy.md`, `.json` and `.png`. An answer counts only if its whole text
is right, letter for letter. The surprising fact: self-speculation must give AR's tokens for every question, so its
accuracy is not measured but proven equal, and the run fails if one token differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

import questions
import record
from questions import Question

from nemodiff.builder.build import Builder
from nemodiff.runtime.generate import LoadedEngine, generate_many, load
from nemodiff.runtime.request import Generation

BLOCKS = (32, 16, 8)
THRESHOLDS = (0.7, 0.9, 0.95, 0.99)
COLORS = dict(zip(BLOCKS, ("#1f5fbf", "#2a8c2a", "#c43131"), strict=True))
NEW_TOKENS = 128  # limit; right answers are shorter
PACKAGES = ("nemodiff", "onnxruntime", "numpy", "tokenizers")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to decode; `threshold` 0 is the draft of linear_spec that fills its block in one pass."""

    mode: str
    block: int = 1
    threshold: float = 0.0

    @property
    def label(self) -> str:
        """As it is written in tables and in the plot."""
        if self.mode == "ar":
            return "AR"
        return f"diffusion {self.threshold:g}" if self.mode == "diffusion" else "self-speculation"


AR = Setting("ar")
SETTINGS = (
    AR,
    *(Setting("diffusion", block, threshold) for block in BLOCKS for threshold in THRESHOLDS),
    *(Setting("linear_spec", block) for block in BLOCKS),
)


def answer(engine: LoadedEngine, asked: list[Question], setting: Setting) -> list[Generation]:
    """One generation per question, each decoded alone."""
    options = {"mode": setting.mode, "block_length": setting.block, "threshold": setting.threshold}
    return list(generate_many(engine, [q.text for q in asked], max_new_tokens=NEW_TOKENS, **options))


def score(asked: list[Question], given: list[Generation]) -> dict[str, Any]:
    """Figures of one cell: sums of tokens over sums of passes, so that long answers weigh as much as they cost."""
    right = sum(g.text == q.answer for q, g in zip(asked, given, strict=True))
    passes = sum(sum(g.nfe.values()) - g.nfe["prefill"] for g in given)
    lengths = [n for g in given for n in g.acceptance.lengths]
    return {
        "questions": len(asked),
        "right": right,
        "accuracy": round(100 * right / len(asked), 2),
        "tokens": sum(len(g.token_ids) for g in given),
        "passes": passes,
        "decode_tpf": round(sum(len(g.token_ids) for g in given) / passes, 3),
        "acceptance_mean": round(sum(lengths) / len(lengths), 3) if lengths else None,
        "cut_by_limit": sum(g.finish_reason == "length" for g in given),
    }


def measure(engine: LoadedEngine, asked: list[Question]) -> list[dict[str, Any]]:
    """All settings; each with its cells by task and over all tasks, and how many answers differ from AR's."""
    found: list[dict[str, Any]] = []
    for setting in SETTINGS:
        given = answer(engine, asked, setting)
        if setting == AR:
            plain = given
        cells = {}
        for task in questions.TASKS:
            picked = [i for i, q in enumerate(asked) if q.task == task]
            cells[task] = score([asked[i] for i in picked], [given[i] for i in picked])
        total = score(asked, given)
        unlike = sum(a.token_ids != b.token_ids for a, b in zip(given, plain, strict=True))
        found.append({**dataclasses.asdict(setting), "tasks": cells, "all": total, "answers_unlike_ar": unlike})
        name = setting.label + (f", block {setting.block}" if setting != AR else "")
        print(
            f"{name:28} {total['accuracy']:6.2f} %  {total['decode_tpf']:6.2f} tokens per pass, "
            f"{unlike} of {len(asked)} answers unlike AR's",
            flush=True,
        )
    return found


def markdown(found: list[dict[str, Any]], origin: dict[str, Any], per_task: int) -> str:
    """The tables for people."""
    wide = [f for f in found if f["mode"] == "ar" or f["block"] == BLOCKS[0]]
    lines = [
        "# Accuracy and tokens per pass of tiny-chat",
        "",
        f"Exact answers in percent and, after the slash, tokens per pass (prefill not counted). {per_task} questions",
        f"per task, drawn with seed {questions.SEED}, which training did not use. Some tasks have so few possible",
        "questions (times tables 48, counting 610, functions 1260) that training can have met all of them.",
        "Greedy, f32, CPU; block length 32.",
        "",
        _row(["task", *(_setting(f).label for f in wide)]),
        _row(["---", *("---:" for _ in wide)]),
    ]
    for task in questions.TASKS:
        lines.append(_row([task, *(_cell(f["tasks"][task]) for f in wide)]))
    lines.append(_row(["**all**", *(f"**{_cell(f['all'])}**" for f in wide)]))
    lines += ["", "All tasks, by block length:", "", _row(["mode", *(f"block {b}" for b in BLOCKS)])]
    lines.append(_row(["---", *("---:" for _ in BLOCKS)]))
    for label in dict.fromkeys(_setting(f).label for f in found if f["mode"] != "ar"):
        same = {f["block"]: f for f in found if _setting(f).label == label}
        lines.append(_row([label, *(_cell(same[b]["all"]) for b in BLOCKS)]))
    spec = [f for f in found if f["mode"] == "linear_spec"]
    accepted = ", ".join(f"{f['all']['acceptance_mean']:.2f} (block {f['block']})" for f in spec)
    equal = sum(f["all"]["questions"] - f["answers_unlike_ar"] for f in spec)
    lines += [
        "",
        f"Self-speculation gave AR's tokens in {equal} of {sum(f['all']['questions'] for f in spec)} answers. Tokens",
        f"emitted per verify, bonus included: {accepted}.",
        "The number after `diffusion` is the confidence threshold.",
        "",
        "![accuracy against tokens per pass](accuracy.png)",
        "",
        record.footer(origin),
    ]
    return "\n".join(lines) + "\n"


def _setting(found: dict[str, Any]) -> Setting:
    return Setting(found["mode"], found["block"], found["threshold"])


def _cell(cell: dict[str, Any]) -> str:
    return f"{cell['accuracy']:.1f} / {cell['decode_tpf']:.2f}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against tokens per pass: diffusion a line per block length, self-speculation beside AR."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")

    def note(text: str, at: tuple[float, float], by: tuple[int, int], color: str) -> None:
        axes.annotate(text, at, by, textcoords="offset points", color=color, fontsize=9, ha="center")

    base = found[0]["all"]["accuracy"]
    axes.axhline(base, color="0.8", linewidth=1, zorder=0)
    for f in found:
        cell, mode, block = f["all"], f["mode"], f["block"]
        at = (cell["decode_tpf"], cell["accuracy"])
        if mode == "ar":
            axes.plot(*at, "ks", markersize=9)
            note("AR", at, (0, 10), "k")
        elif mode == "linear_spec":
            axes.plot(*at, "*", color=COLORS[block], markersize=15, markeredgecolor="k")
            note(f"self-speculation,\nblock {block}", at, (0, 10), COLORS[block])
    for block, color in COLORS.items():
        line = [f for f in found if f["mode"] == "diffusion" and f["block"] == block]
        points = [(f["all"]["decode_tpf"], f["all"]["accuracy"]) for f in line]
        axes.plot(*zip(*points, strict=True), "o-", color=color, markersize=6)
        note(f"diffusion, block {block}", points[-1], (0, -29), color)
        note(f"{line[0]['threshold']:g}", points[0], (0, -15), color)
        note(f"{line[-1]['threshold']:g}", points[-1], (0, -15), color)
    axes.set_xlabel("tokens per pass")
    axes.set_ylabel("exact answers, %")
    axes.set_xlim(0, 1.08 * max(f["all"]["decode_tpf"] for f in found))
    axes.set_ylim(min(f["all"]["accuracy"] for f in found) - 2, base + 2)
    axes.grid(alpha=0.25)
    span = ", ".join(f"{t:g}" for t in reversed(THRESHOLDS))
    axes.set_title(f"tiny-chat, all tasks; dots of diffusion, left to right: threshold {span}", fontsize=11)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure accuracy and tokens per pass of tiny-chat in every mode.")
    parser.add_argument("--per-task", type=int, default=100, help="questions per task, default 100")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, default 1")
    parser.add_argument("--no-write", action="store_true", help="print only; leave the result files as they are")
    arguments = parser.parse_args()
    origin = record.origin(PACKAGES, arguments.threads)
    with tempfile.TemporaryDirectory(prefix="nemodiff-accuracy-") as work:
        engine = load(Builder(record.TINY_CHAT, Path(work) / "engine").run(), threads=arguments.threads)
        found = measure(engine, questions.draw(arguments.per_task))
    unlike = sum(f["answers_unlike_ar"] for f in found if f["mode"] == "linear_spec")
    if not arguments.no_write:
        goals = [record.goal("self-speculation's answers unlike AR's", unlike, "at most", 0, "answers")]
        figures = {"checkpoint": "tiny-chat", "dtype": "f32", "seed": questions.SEED, "settings": found}
        path = record.write("accuracy", origin, goals, figures)
        path.with_suffix(".md").write_text(markdown(found, origin, arguments.per_task), encoding="utf-8")
        plot(found, path.with_suffix(".png"))
    if unlike:
        sys.exit(f"self-speculation differs from AR in {unlike} answers")


if __name__ == "__main__":
    main()
