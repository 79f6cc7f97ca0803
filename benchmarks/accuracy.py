"""Measure accuracy and tokens per pass of the demonstration model, by task, mode, policy and block length.

An answer counts only if its whole text is right, letter for letter. Self-speculation must give AR's tokens for every
question, so the run fails if one token differs. Open tasks have no right answer and count by tokens per pass alone.
Writes `results/accuracy.json`, `.md` and `.png`; a part of the settings is a matter of seconds:

    python benchmarks/accuracy.py --per-task 5 --blocks 32 --policies threshold --no-write
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
SPECULATION = {"linear_spec": "self-speculation", "quadratic_spec": "quadratic self-speculation"}
SCORED = (*questions.TASKS, *questions.WITH_MORE)
PACKAGES = ("nemodiff", "onnxruntime", "numpy", "tokenizers")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to decode; `value` is what the policy of diffusion is set to, `thinking` lets the model think first."""

    mode: str
    block: int = 1
    policy: str = "threshold"
    value: float = 0.0
    thinking: bool = False

    @property
    def label(self) -> str:
        """As it is written in tables."""
        if self.mode != "diffusion":
            return SPECULATION.get(self.mode, "AR, thinking" if self.thinking else "AR")
        return f"{self.policy.replace('_', ' ')} {self.value:g}"

    @property
    def options(self) -> dict[str, Any]:
        """As the front door takes them."""
        if self.mode != "diffusion":
            return {"mode": self.mode, "block_length": self.block}
        knob = POLICIES[self.policy][0]
        return {"mode": self.mode, "block_length": self.block, "policy": self.policy, knob: self.value}


AR = Setting("ar")
THINKING = Setting("ar", thinking=True)


def settings(blocks: list[int], policies: list[str]) -> list[Setting]:
    """AR first, then AR with thoughts, and all others."""
    exact = [Setting(mode, block) for mode in SPECULATION for block in blocks]
    noisy = [
        Setting("diffusion", block, policy, value)
        for block in blocks
        for policy in policies
        for value in POLICIES[policy][1]
    ]
    return [AR, THINKING, *exact, *noisy]


def asked(question_list: list[Question], setting: Setting) -> list[Question]:
    """The questions of a setting: with thoughts those that the model has learned to think about."""
    return [q for q in question_list if q.thoughts] if setting.thinking else question_list


def answer(engine: LoadedEngine, question_list: list[Question], setting: Setting) -> list[Generation]:
    """One generation per question, each decoded alone."""
    prompts = [q.prompt(engine.text, setting.thinking) for q in asked(question_list, setting)]
    return list(generate_many(engine, prompts, max_new_tokens=questions.LONGEST, **setting.options))


def score(question_list: list[Question], answers: list[Generation]) -> dict[str, Any]:
    """Figures of one cell: sums of tokens over sums of passes, so that long answers weigh as much as they cost."""
    pairs = [(q, g) for q, g in zip(question_list, answers, strict=True) if q.task in SCORED]
    correct = sum((g.content if g.reasoning else g.text) == q.answer for q, g in pairs)
    passes = sum(sum(g.nfe.values()) - g.nfe["prefill"] for g in answers)
    lengths = [n for g in answers for n in g.acceptance.lengths]
    return {
        "questions": len(question_list),
        "right": correct if pairs else None,
        "accuracy": round(100 * correct / len(pairs), 2) if pairs else None,
        "tokens": sum(len(g.token_ids) for g in answers),
        "passes": passes,
        "decode_tpf": round(sum(len(g.token_ids) for g in answers) / max(1, passes), 3),
        "acceptance_mean": round(sum(lengths) / len(lengths), 3) if lengths else None,
        "cut_by_limit": sum(g.finish_reason == "length" for g in answers),
    }


def measure(folder: Path, question_list: list[Question], chosen: list[Setting], processes: int) -> list[dict[str, Any]]:
    """The settings; each with its cells by task and over all scored tasks, and how many answers differ from AR's."""
    results: list[dict[str, Any]] = []
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        answers_by_setting = pool.imap(functools.partial(_answers, folder, question_list), chosen)
        for setting, answers in zip(chosen, answers_by_setting, strict=True):
            if setting == AR:
                plain = answers
            pairs = list(zip(asked(question_list, setting), answers, strict=True))
            if not pairs:  # a model that does not think
                continue
            cells = {}
            for task in dict.fromkeys(q.task for q, _ in pairs):
                cells[task] = _score([pair for pair in pairs if pair[0].task == task])
            total = _score([pair for pair in pairs if pair[0].task in SCORED])
            unlike = (
                0 if setting.thinking else sum(a.token_ids != b.token_ids for a, b in zip(answers, plain, strict=True))
            )
            results.append({**dataclasses.asdict(setting), "tasks": cells, "all": total, "answers_unlike_ar": unlike})
            name = setting.label + (f", block {setting.block}" if setting.mode != "ar" else "")
            print(
                f"{name:36} {total['accuracy']:6.2f} %  {total['decode_tpf']:6.2f} tokens per pass, "
                f"{unlike} of {len(pairs)} answers unlike AR's",
                flush=True,
            )
    return results


def _score(pairs: list[tuple[Question, Generation]]) -> dict[str, Any]:
    return score([q for q, _ in pairs], [g for _, g in pairs])


def _answers(folder: Path, question_list: list[Question], setting: Setting) -> list[Generation]:
    """What a process of its own answers."""
    return answer(_loaded(folder), question_list, setting)


@functools.cache
def _loaded(folder: Path) -> LoadedEngine:
    return load(folder, threads=1)


def markdown(results: list[dict[str, Any]], origin: dict[str, Any], per_task: int) -> str:
    """The tables for people."""
    blocks = list(dict.fromkeys(f["block"] for f in results if f["mode"] != "ar"))
    plain, *others = [f for f in results if not f["thinking"]]
    wide = [plain, *(f for f in others if f["block"] == blocks[0] and f["policy"] == "threshold")]
    lines = [
        f"# Accuracy and tokens per pass of {record.MODEL.name}",
        "",
        f"Exact answers in percent and, after the slash, tokens per pass (prefill not counted). {per_task} questions",
        f"per task, drawn with seed {questions.SEED}, which training did not use. Some tasks have so few possible",
        "questions (the model's `questions.py` says how many) that training can have met all of them.",
        f"Greedy, f32, CPU; block length {blocks[0]}, diffusion with policy threshold.",
        "",
        _row(["task", *(_setting(f).label for f in wide)]),
        _row(["---", *("---:" for _ in wide)]),
    ]
    for task in plain["tasks"]:
        lines.append(_row([task, *(_cell(f["tasks"][task]) for f in wide)]))
    lines.append(_row(["**all**", *(f"**{_cell(f['all'])}**" for f in wide)]))
    if questions.OPEN:
        lines += ["", f"With more than one right answer, so not among all: {', '.join(questions.OPEN)}."]
    for thinking in (f for f in results if f["thinking"]):
        lines += ["", "AR where the model has learned to think first, without and with its thoughts:", ""]
        lines += [_row(["task", "AR", "AR, thinking"]), _row(["---", "---:", "---:"])]
        for task, cell in thinking["tasks"].items():
            lines.append(_row([task, _cell(plain["tasks"][task]), _cell(cell)]))
    lines += ["", "All tasks, by policy of diffusion and block length:", ""]
    lines += [_row(["policy", *(f"block {b}" for b in blocks)]), _row(["---", *("---:" for _ in blocks)])]
    for label in dict.fromkeys(_setting(f).label for f in others):
        same = {f["block"]: f for f in others if _setting(f).label == label}
        lines.append(_row([label, *(_cell(same[b]["all"]) for b in blocks)]))
    lines.append("")
    for mode, name in SPECULATION.items():
        spec = [f for f in others if f["mode"] == mode]
        accepted = ", ".join(f"{f['all']['acceptance_mean']:.2f} (block {f['block']})" for f in spec)
        count = sum(cell["questions"] for f in spec for cell in f["tasks"].values())
        lines += [
            f"- {name} gave AR's tokens in {count - sum(f['answers_unlike_ar'] for f in spec)} of {count} answers;",
            f"  tokens emitted per verify, bonus included: {accepted}.",
        ]
    lines += [
        "",
        "The groups that a pass of quadratic self-speculation verifies follow what passes cost on the machine.",
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
    right = "-" if cell["accuracy"] is None else f"{cell['accuracy']:.1f}"
    return f"{right} / {cell['decode_tpf']:.2f}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against tokens per pass, a panel per block length: a line per policy, self-speculation beside AR."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    blocks = list(dict.fromkeys(f["block"] for f in results if f["mode"] != "ar"))
    size = (max(8, 4 * len(blocks)), 4.6)
    figure, axes_of = pyplot.subplots(1, len(blocks), figsize=size, layout="constrained", sharey=True, squeeze=False)
    panels = axes_of[0]
    base = results[0]["all"]
    for block, axes in zip(blocks, panels, strict=True):
        axes.axhline(base["accuracy"], color="0.8", linewidth=1, zorder=0)
        axes.plot(base["decode_tpf"], base["accuracy"], "ks", markersize=8, label="AR")
        here = [f for f in results if f["block"] == block and f["mode"] != "ar"]
        for f in here:
            if f["mode"] in SPECULATION:
                at = f["all"]["decode_tpf"], f["all"]["accuracy"]
                mark = "*" if f["mode"] == "linear_spec" else "D"
                label = SPECULATION[f["mode"]]
                axes.plot(*at, mark, color="w", markersize=15 if mark == "*" else 8, markeredgecolor="k", label=label)
        for policy, (_, values) in POLICIES.items():
            line = [f for f in here if f["mode"] == "diffusion" and f["policy"] == policy]
            if not line:
                continue
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
    title = f"{record.MODEL.name}, all tasks; each line from its most careful value (left) to its fastest"
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure accuracy and tokens per pass in every mode.")
    parser.add_argument("--per-task", type=int, default=100, help="questions per task, default 100")
    parser.add_argument("--blocks", type=int, nargs="+", default=BLOCKS, help="block lengths, default 32 16 8")
    parser.add_argument(
        "--policies", nargs="+", choices=POLICIES, default=[*POLICIES], help="of diffusion, default all"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="at a time, default one per core")
    parser.add_argument("--no-write", action="store_true", help="print only; leave the result files as they are")
    arguments = parser.parse_args()
    origin = record.origin(PACKAGES, 1)
    question_list = questions.draw(arguments.per_task, tasks=SCORED)
    question_list += questions.draw(arguments.per_task, tasks=questions.OPEN)
    with tempfile.TemporaryDirectory(prefix="nemodiff-accuracy-") as work:
        folder = Builder(record.MODEL, Path(work) / "engine").run()
        chosen = settings(arguments.blocks, arguments.policies)
        results = measure(folder, question_list, chosen, arguments.processes)
    unlike = sum(f["answers_unlike_ar"] for f in results if f["mode"] in SPECULATION)
    if not arguments.no_write:
        goals = [record.goal("self-speculation's answers unlike AR's", unlike, "at most", 0, "answers")]
        figures = {"checkpoint": record.MODEL.name, "dtype": "f32", "seed": questions.SEED, "settings": results}
        path = record.write("accuracy", origin, goals, figures)
        path.with_suffix(".md").write_text(markdown(results, origin, arguments.per_task), encoding="utf-8")
        plot(results, path.with_suffix(".png"))
    if unlike:
        sys.exit(f"self-speculation differs from AR in {unlike} answers")


if __name__ == "__main__":
    main()
