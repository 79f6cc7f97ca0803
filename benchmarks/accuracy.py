"""Measure accuracy and tokens per pass of tiny-chat, by task, mode, policy and block length.

An answer counts only if its whole text is right, letter for letter. Self-speculation must give AR's tokens for every
question, so the run fails if one token differs. Writes `results/accuracy.json`, `.md` and `.png`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import questions, record
from common.questions import Question

from nemodiff.builder.build import Builder
from nemodiff.runtime.generate import generate_many
from nemodiff.runtime.loading import LoadedEngine, load
from nemodiff.runtime.requests.generation import Generation

BLOCKS = (32, 16, 8)
POLICIES = {  # the option each is set by, and its values from fast to careful
    "threshold": ("threshold", (0.7, 0.9, 0.95, 0.99)),
    "topk": ("per_step", (8, 4, 2, 1)),
    "entropy": ("entropy_bound", (1.0, 0.5, 0.1, 0.02)),
    "left_to_right": ("threshold", (0.7, 0.9, 0.95, 0.99)),
}
COLORS = dict(zip(POLICIES, ("#1f5fbf", "#c43131", "#2a8c2a", "#b07a00"), strict=True))
NEW_TOKENS = 128  # limit; right answers are shorter
PACKAGES = ("nemodiff", "onnxruntime", "numpy", "tokenizers")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to decode; `value` is what the policy of diffusion is set to."""

    mode: str
    block: int = 1
    policy: str = "threshold"
    value: float = 0.0

    @property
    def label(self) -> str:
        """As it is written in tables."""
        if self.mode != "diffusion":
            return "AR" if self.mode == "ar" else "self-speculation"
        return f"{self.policy.replace('_', ' ')} {self.value:g}"

    @property
    def options(self) -> dict[str, Any]:
        """As the front door takes them."""
        if self.mode != "diffusion":
            return {"mode": self.mode, "block_length": self.block}
        knob = POLICIES[self.policy][0]
        return {"mode": self.mode, "block_length": self.block, "policy": self.policy, knob: self.value}


AR = Setting("ar")
SETTINGS = (
    AR,
    *(Setting("linear_spec", block) for block in BLOCKS),
    *(Setting("diffusion", b, policy, v) for b in BLOCKS for policy, (_, values) in POLICIES.items() for v in values),
)


def answer(engine: LoadedEngine, question_list: list[Question], setting: Setting) -> list[Generation]:
    """One generation per question, each decoded alone."""
    return list(generate_many(engine, [q.text for q in question_list], max_new_tokens=NEW_TOKENS, **setting.options))


def score(question_list: list[Question], answers: list[Generation]) -> dict[str, Any]:
    """Figures of one cell: sums of tokens over sums of passes, so that long answers weigh as much as they cost."""
    correct = sum(g.text == q.answer for q, g in zip(question_list, answers, strict=True))
    passes = sum(sum(g.nfe.values()) - g.nfe["prefill"] for g in answers)
    lengths = [n for g in answers for n in g.acceptance.lengths]
    return {
        "questions": len(question_list),
        "right": correct,
        "accuracy": round(100 * correct / len(question_list), 2),
        "tokens": sum(len(g.token_ids) for g in answers),
        "passes": passes,
        "decode_tpf": round(sum(len(g.token_ids) for g in answers) / passes, 3),
        "acceptance_mean": round(sum(lengths) / len(lengths), 3) if lengths else None,
        "cut_by_limit": sum(g.finish_reason == "length" for g in answers),
    }


def measure(folder: Path, question_list: list[Question], processes: int) -> list[dict[str, Any]]:
    """All settings; each with its cells by task and over all tasks, and how many answers differ from AR's."""
    results: list[dict[str, Any]] = []
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        answers_by_setting = pool.imap(functools.partial(_answers, folder, question_list), SETTINGS)
        for setting, answers in zip(SETTINGS, answers_by_setting, strict=True):
            if setting == AR:
                plain = answers
            cells = {}
            for task in questions.TASKS:
                picked = [i for i, q in enumerate(question_list) if q.task == task]
                cells[task] = score([question_list[i] for i in picked], [answers[i] for i in picked])
            total = score(question_list, answers)
            unlike = sum(a.token_ids != b.token_ids for a, b in zip(answers, plain, strict=True))
            results.append({**dataclasses.asdict(setting), "tasks": cells, "all": total, "answers_unlike_ar": unlike})
            name = setting.label + (f", block {setting.block}" if setting != AR else "")
            print(
                f"{name:28} {total['accuracy']:6.2f} %  {total['decode_tpf']:6.2f} tokens per pass, "
                f"{unlike} of {len(question_list)} answers unlike AR's",
                flush=True,
            )
    return results


def _answers(folder: Path, question_list: list[Question], setting: Setting) -> list[Generation]:
    """What a process of its own answers."""
    return answer(_loaded(folder), question_list, setting)


@functools.cache
def _loaded(folder: Path) -> LoadedEngine:
    return load(folder, threads=1)


def markdown(results: list[dict[str, Any]], origin: dict[str, Any], per_task: int) -> str:
    """The tables for people."""
    wide = [f for f in results if f["mode"] == "ar" or (f["block"] == BLOCKS[0] and f["policy"] == "threshold")]
    lines = [
        "# Accuracy and tokens per pass of tiny-chat",
        "",
        f"Exact answers in percent and, after the slash, tokens per pass (prefill not counted). {per_task} questions",
        f"per task, drawn with seed {questions.SEED}, which training did not use. Some tasks have so few possible",
        "questions (times tables 48, counting 610, functions 1260) that training can have met all of them.",
        "Greedy, f32, CPU; block length 32, diffusion with policy threshold.",
        "",
        _row(["task", *(_setting(f).label for f in wide)]),
        _row(["---", *("---:" for _ in wide)]),
    ]
    for task in questions.TASKS:
        lines.append(_row([task, *(_cell(f["tasks"][task]) for f in wide)]))
    lines.append(_row(["**all**", *(f"**{_cell(f['all'])}**" for f in wide)]))
    lines += ["", "All tasks, by policy of diffusion and block length:", ""]
    lines += [_row(["policy", *(f"block {b}" for b in BLOCKS)]), _row(["---", *("---:" for _ in BLOCKS)])]
    for label in dict.fromkeys(_setting(f).label for f in results if f["mode"] != "ar"):
        same = {f["block"]: f for f in results if _setting(f).label == label}
        lines.append(_row([label, *(_cell(same[b]["all"]) for b in BLOCKS)]))
    spec = [f for f in results if f["mode"] == "linear_spec"]
    accepted = ", ".join(f"{f['all']['acceptance_mean']:.2f} (block {f['block']})" for f in spec)
    equal = sum(f["all"]["questions"] - f["answers_unlike_ar"] for f in spec)
    lines += [
        "",
        f"Self-speculation gave AR's tokens in {equal} of {sum(f['all']['questions'] for f in spec)} answers. Tokens",
        f"emitted per verify, bonus included: {accepted}.",
        "The number after `topk` is masks per pass, after `entropy` the bound in nats, else the confidence threshold.",
        "",
        "![accuracy against tokens per pass](accuracy.png)",
        "",
        record.footer(origin),
    ]
    return "\n".join(lines) + "\n"


def _setting(result: dict[str, Any]) -> Setting:
    return Setting(*(result[field.name] for field in dataclasses.fields(Setting)))


def _cell(cell: dict[str, Any]) -> str:
    return f"{cell['accuracy']:.1f} / {cell['decode_tpf']:.2f}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against tokens per pass, a panel per block length: a line per policy, self-speculation beside AR."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(BLOCKS), figsize=(12, 4.6), layout="constrained", sharey=True)
    base = results[0]["all"]
    for block, axes in zip(BLOCKS, panels, strict=True):
        axes.axhline(base["accuracy"], color="0.8", linewidth=1, zorder=0)
        axes.plot(base["decode_tpf"], base["accuracy"], "ks", markersize=8, label="AR")
        here = [f for f in results if f["block"] == block and f["mode"] != "ar"]
        for f in here:
            if f["mode"] == "linear_spec":
                at = f["all"]["decode_tpf"], f["all"]["accuracy"]
                axes.plot(*at, "*", color="w", markersize=15, markeredgecolor="k", label="self-speculation")
        for policy, (_, values) in POLICIES.items():
            line = [f for f in here if f["mode"] == "diffusion" and f["policy"] == policy]
            points = [(f["all"]["decode_tpf"], f["all"]["accuracy"]) for f in line]
            label = f"{policy.replace('_', ' ')}: {', '.join(f'{v:g}' for v in reversed(values))}"
            axes.plot(*zip(*points, strict=True), "o-", color=COLORS[policy], markersize=5, alpha=0.85, label=label)
        axes.set_xlim(0, 1.08 * max(f["all"]["decode_tpf"] for f in here))
        axes.set_title(f"block length {block}", fontsize=11)
        axes.set_xlabel("tokens per pass")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("exact answers, %")
    panels[0].set_ylim(min(f["all"]["accuracy"] for f in results) - 1, base["accuracy"] + 1)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    figure.suptitle("tiny-chat, all tasks; each line from its most careful value (left) to its fastest", fontsize=11)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure accuracy and tokens per pass of tiny-chat in every mode.")
    parser.add_argument("--per-task", type=int, default=100, help="questions per task, default 100")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="at a time, default one per core")
    parser.add_argument("--no-write", action="store_true", help="print only; leave the result files as they are")
    arguments = parser.parse_args()
    origin = record.origin(PACKAGES, 1)
    with tempfile.TemporaryDirectory(prefix="nemodiff-accuracy-") as work:
        folder = Builder(record.TINY_CHAT, Path(work) / "engine").run()
        results = measure(folder, questions.draw(arguments.per_task), arguments.processes)
    unlike = sum(f["answers_unlike_ar"] for f in results if f["mode"] == "linear_spec")
    if not arguments.no_write:
        goals = [record.goal("self-speculation's answers unlike AR's", unlike, "at most", 0, "answers")]
        figures = {"checkpoint": "tiny-chat", "dtype": "f32", "seed": questions.SEED, "settings": results}
        path = record.write("accuracy", origin, goals, figures)
        path.with_suffix(".md").write_text(markdown(results, origin, arguments.per_task), encoding="utf-8")
        plot(results, path.with_suffix(".png"))
    if unlike:
        sys.exit(f"self-speculation differs from AR in {unlike} answers")


if __name__ == "__main__":
    main()
