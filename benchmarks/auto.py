"""Compare the planned block length and mode with every fixed length.

On questions with one right answer, with the model's trained drafter and without, and on stories and loops, whose drafts
fare worse. Tokens per second are counted three ways: by wall time, by processor time, and by the cost curve that all
passes have taught, summed over the passes taken and the masks of the prefill, which no other load changes. Settings
take turns after a question of each task, so that what else the machine does falls on all, each time in another order:
after long passes short ones take longer for a while. The best fixed setting of a round is the one that was best in all
others: the best of seven in the same round is the luckiest too. Writes `results/auto.json` and `.md`.
"""

from __future__ import annotations

import argparse
import collections
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import questions, record

from nemodiff.builder.build import Builder
from nemodiff.runtime.generate import decode, generate
from nemodiff.runtime.loading import LoadedEngine, load
from nemodiff.runtime.planning.cost import CostCurve
from nemodiff.runtime.planning.pass_costs import PassCosts
from nemodiff.runtime.requests.options import AUTO, make_options
from nemodiff.runtime.requests.prepare import prepare

BLOCKS: tuple[int | str, ...] = (4, 8, 12, 16, 24, 32, 64, AUTO)
SETTINGS: tuple[dict[str, Any], ...] = (
    {"mode": "ar"},
    *({"mode": mode, "block_length": block} for mode in ("linear_spec", "quadratic_spec") for block in BLOCKS),
    {"mode": AUTO},
)
# Milliseconds of a pass of tiny-chat on one thread of an idle AMD EPYC, rounded; with --exact passes cost this.
EXACT = CostCurve((1, 2, 4, 8, 16, 32, 64, 128, 256, 512), (0.63, 0.75, 0.9, 1.1, 1.45, 2.2, 4.1, 7.9, 15.5, 31.0))
CLOCKS = ("curve", "cpu", "wall")
OPEN_TIMES = 3  # as many stories and loops as questions of any other task, of which there are more
PACKAGES = ("nemodiff", "onnxruntime", "numpy")
Sizes = collections.Counter[int]  # passes by their tokens
Rates = dict[tuple[str, str, str], list[float]]  # tokens per second of each round, by setting, task and clock


def name_of(setting: dict[str, Any]) -> str:
    """The setting's name in tables."""
    return f"{setting['mode']} {setting['block_length']}" if "block_length" in setting else str(setting["mode"])


def exact() -> PassCosts:
    """Costs that are what `EXACT` says, learned as those of real passes are; the host takes no time."""
    costs = PassCosts(EXACT, clock=lambda: 0.0)
    vars(costs)["learn"] = lambda size, seconds: PassCosts.learn(costs, size, EXACT.seconds(size))
    return costs


def measure(engine: LoadedEngine, drawn: list[questions.Question], rounds: int) -> tuple[Rates, dict[str, Any], int]:
    """Tokens per second, the passes used by setting, and how many answers differ from AR's."""
    rates: Rates = collections.defaultdict(list)
    sizes: dict[tuple[str, str], list[tuple[int, Sizes]]] = collections.defaultdict(list)
    used: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    unlike = 0
    ar = {"mode": "ar", "max_new_tokens": questions.LONGEST}
    plain = [generate(engine, question.prompt(engine.text), **ar).token_ids for question in drawn]
    tasks = [*dict.fromkeys(question.task for question in drawn), "all"]
    numbers = range(len(drawn))
    order = random.Random(1)
    parts = [numbers[at : at + len(tasks) - 1] for at in numbers[:: len(tasks) - 1]]
    for turn in range(rounds):
        spent = {(name_of(setting), task): [0.0] * 3 for setting in SETTINGS for task in tasks}
        passes: dict[tuple[str, str], Sizes] = {way: collections.Counter() for way in spent}
        turns = ((part, setting) for part in parts for setting in order.sample(SETTINGS, len(SETTINGS)))
        for part, setting in turns:
            name = name_of(setting)
            for number in part:
                question = drawn[number]
                options = make_options({**setting, "max_new_tokens": questions.LONGEST})
                sequence = prepare(engine, question.prompt(engine.text), options)
                forwarded: Sizes = collections.Counter()
                cpu = time.process_time()
                wall = time.perf_counter()
                for _, pass_, _ in decode(engine.backend, [sequence], 1, costs=engine.cost):
                    forwarded[pass_.ids.size] += 1
                    if pass_.kind == "prefill":  # its masks are quadratic_spec's first draft
                        forwarded[int((pass_.ids != engine.info.model.mask_id).sum())] -= 1
                took = (time.process_time() - cpu, time.perf_counter() - wall, len(sequence.tokens))
                for task in (question.task, "all"):
                    passes[name, task].update(forwarded)
                    spent[name, task] = [a + b for a, b in zip(spent[name, task], took, strict=True)]
                used[name].update({k: n for k, n in sequence.nfe.items() if n and k != "prefill"})
                unlike += sequence.tokens != plain[number]
        for (name, task), (*seconds, tokens) in spent.items():
            sizes[name, task].append((int(tokens), passes[name, task]))
            for clock, value in zip(CLOCKS[1:], seconds, strict=True):
                rates[name, task, clock].append(tokens / value)
        print(f"round {turn + 1} of {rounds}", flush=True)
    curve = engine.cost.curve  # what all passes have taught: one measure for all settings
    for (name, task), rounds_of in sizes.items():
        rates[name, task, "curve"] = [
            tokens / sum(count * curve.seconds(size) for size, count in forwarded.items())
            for tokens, forwarded in rounds_of
        ]
    return rates, {name: dict(counted) for name, counted in used.items()}, unlike


def medians(rates: Rates, used: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second by setting, task and clock, over rounds."""
    results: dict[str, Any] = {name: {"passes": used[name]} for name in map(name_of, SETTINGS)}
    for (name, task, clock), of_rounds in rates.items():
        results[name].setdefault(task, {})[clock] = round(statistics.median(of_rounds), 1)
    return results


def ratios(rates: Rates, clock: str) -> dict[str, dict[str, float]]:
    """Tokens per second of each planned setting over those of the best fixed one that it could have chosen, by task.

    The median over rounds, in each of which the best is the one that was so in the others.
    """
    fixed = {
        f"{mode} {AUTO}": [f"{mode} {block}" for block in BLOCKS if block != AUTO]
        for mode in ("linear_spec", "quadratic_spec")
    }
    fixed[AUTO] = ["ar", *fixed[f"linear_spec {AUTO}"], *fixed[f"quadratic_spec {AUTO}"]]
    by_planned = dict[str, dict[str, float]]()
    tasks = list(dict.fromkeys(task for _, task, _ in rates))
    for planned, candidates in fixed.items():
        by_planned[planned] = {}
        for task in tasks:
            of_candidates = [rates[name, task, clock] for name in candidates]
            of_rounds = [
                got / best_by_others(of_candidates, turn) for turn, got in enumerate(rates[planned, task, clock])
            ]
            by_planned[planned][task] = round(statistics.median(of_rounds), 3)
    return by_planned


def best_by_others(of_candidates: list[list[float]], turn: int) -> float:
    """In one round, what the candidate has that is best in the others; in the only one, the best there."""
    best = max(of_candidates, key=lambda rounds: statistics.median(rounds[:turn] + rounds[turn + 1 :] or rounds))
    return best[turn]


def table(engines: dict[str, Any], over_best: dict[str, Any], origin: dict[str, Any], per_task: int) -> str:
    """The result as Markdown."""
    many = OPEN_TIMES * per_task
    lines = [
        "# Planned block length and mode",
        "",
        f"Tokens per second, greedy, {per_task} questions of every task, {many} stories, {many} loops. By the",
        "cost curve (the masks of the prefill and the passes after it, at their measured costs), and by processor and",
        "wall time, prefill included. Wall and processor time hold what else the machine did.",
    ]
    for name, results in engines.items():
        lines += ["", f"## {name}", "", "| way | curve | processor | wall |", "|---|---:|---:|---:|"]
        for setting, cells in results.items():
            lines.append(f"| {setting} | " + " | ".join(f"{cells['all'][clock]:.0f}" for clock in CLOCKS) + " |")
        lines += ["", "Planned over the best fixed way of each line, by processor time:", ""]
        both = over_best[name]["cpu"]
        lines += [f"| task | {' | '.join(both)} |", "|---|" + "---:|" * len(both)]
        for task in both[AUTO]:
            lines.append(f"| {task} | " + " | ".join(f"{cells[task]:.2f}" for cells in both.values()) + " |")
    return "\n".join([*lines, "", record.footer(origin)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare planned block lengths and modes with fixed ones.")
    parser.add_argument("--per-task", type=int, default=6, help="questions per task, default 6")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, default 1")
    parser.add_argument("--exact", action="store_true", help="let passes cost what a fixed curve says; print only")
    parser.add_argument("--no-write", action="store_true", help="print only; leave the result files as they are")
    arguments = parser.parse_args()
    origin = record.origin(PACKAGES, arguments.threads)
    drawn = questions.draw(arguments.per_task)
    ways = (
        (record.MODEL.name, None, drawn),
        (f"{record.MODEL.name} with its drafter", record.DRAFTER, drawn),
        (
            f"{record.MODEL.name}, {' and '.join(questions.OPEN)}",
            None,
            questions.draw(OPEN_TIMES * arguments.per_task, tasks=questions.OPEN),
        ),
    )
    engines, over_best = dict[str, Any](), dict[str, Any]()
    curves = dict[str, Any]()
    goals = []
    with tempfile.TemporaryDirectory(prefix="nemodiff-auto-") as work:
        for name, adapter, asked in ways:
            folder = Builder(record.MODEL, Path(work) / name, adapter=adapter).run()
            engine = load(folder, threads=arguments.threads)
            if arguments.exact:
                vars(engine)["cost"] = exact()
            rates, used, unlike = measure(engine, asked, arguments.rounds)
            engines[name] = medians(rates, used)
            over_best[name] = {clock: ratios(rates, clock) for clock in CLOCKS}
            curve = engine.cost.curve
            curves[name] = {s: round(t * 1e3, 3) for s, t in zip(curve.sizes, curve.times, strict=True)}
            goals.append(record.goal(f"{name}: answers unlike AR's", unlike, "at most", 0, "answers"))
            for clock in CLOCKS[:1] if arguments.exact else CLOCKS:
                for planned, cells in over_best[name][clock].items():
                    what = f"{name}: {planned} over the best fixed, all tasks, by {clock}"
                    print(what, cells["all"], flush=True)
                    if asked is drawn:
                        goals.append(record.goal(what, cells["all"], "at least", 0.95, "x"))
    if arguments.no_write or arguments.exact:
        return
    figures = {"dtype": "f32", "questions": len(drawn), "cost_ms": curves, "tokens_per_second": engines}
    figures["over_best_fixed"] = over_best
    path = record.write("auto", origin, goals, {"checkpoint": record.MODEL.name, **figures})
    path.with_suffix(".md").write_text(table(engines, over_best, origin, arguments.per_task), encoding="utf-8")


if __name__ == "__main__":
    main()
