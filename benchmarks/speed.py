"""Compare tokens per second of every mode with transformers on the same weights, and measure where the time goes.

All contenders take turns on each prompt, so noise of the machine falls on all of them alike. They get and give token
ids, so that a ratio compares equal work. Writes `results/speed.json`, or `results/speed_torch.json`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import questions, record, timing

from nemodiff.builder.build import Builder
from nemodiff.contract import MODES, counted
from nemodiff.runtime.generate import generate
from nemodiff.runtime.loading import LoadedEngine, load

BASE = "transformers eager"
PACKAGES = ("nemodiff", "onnxruntime", "numpy", "torch", "transformers")

Contender = Callable[[list[int]], list[int]]


def contenders(
    engine: LoadedEngine, second: LoadedEngine | None, checkpoint: Path, threads: int
) -> dict[str, Contender]:
    """Everything that takes part, from prompt ids to new ids."""
    sys.path.insert(0, str(record.ROOT / "tests"))
    import torch
    from oracle import transformers_oracle

    def peer(attention: str) -> Contender:
        model: Any = transformers_oracle.load(checkpoint)
        model.set_attn_implementation(attention)
        return lambda ids: transformers_oracle.greedy(model, ids, questions.LONGEST, engine.info.model.eos_ids)

    def ours(engine: LoadedEngine, mode: str) -> Contender:
        return lambda ids: generate(engine, ids, mode=mode, max_new_tokens=questions.LONGEST).token_ids

    entries = {f"nemodiff {mode}": ours(engine, mode) for mode in MODES}
    entries |= {f"torch {mode}": ours(second, mode) for mode in MODES if second is not None}
    entries |= {f"transformers {attention}": peer(attention) for attention in ("eager", "sdpa")}
    torch.set_num_threads(threads)  # after the oracle, which sets its own number
    return entries


def race(entries: dict[str, Contender], prompts: list[list[int]], rounds: int, warmup: int) -> dict[str, Any]:
    """Tokens per second by contender and round; the first `warmup` rounds are run and dropped."""
    rates: dict[str, list[float]] = {name: [] for name in entries}
    differing = dict.fromkeys(entries, 0)
    for turn in range(warmup + rounds):
        seconds, tokens = dict.fromkeys(entries, 0.0), dict.fromkeys(entries, 0)
        for ids in prompts:
            outputs = {}
            for name, run in entries.items():
                started = time.perf_counter()
                outputs[name] = run(ids)
                seconds[name] += time.perf_counter() - started
                tokens[name] += len(outputs[name])
            for name, output in outputs.items():
                differing[name] += turn == 0 and output != outputs[BASE]
        if turn >= warmup:
            for name in entries:
                rates[name].append(tokens[name] / seconds[name])
    base = rates[BASE]
    return {
        name: {
            "tokens_per_second": round(statistics.median(rates[name]), 1),
            "ratio": round(statistics.median(a / b for a, b in zip(rates[name], base, strict=True)), 2),
            "ratio_min": round(min(a / b for a, b in zip(rates[name], base, strict=True)), 2),
            "ratio_max": round(max(a / b for a, b in zip(rates[name], base, strict=True)), 2),
            "answers_unlike_transformers": differing[name],
        }
        for name in entries
    }


def measure(checkpoint: Path, folder: Path, threads: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures of one thread count."""
    engine = load(folder, threads=threads)
    session = timing.TimedSession(engine)
    second = load(folder.with_name("torch"), threads=threads, device="cpu") if arguments.torch else None
    prompts = [q.prompt(engine.text) for q in arguments.questions]
    rounds, warmup = arguments.rounds, arguments.warmup
    figures = {
        "threads": threads,
        "race": race(contenders(engine, second, checkpoint, threads), prompts, rounds, warmup),
        "host": timing.host_share(engine, session, prompts, questions.LONGEST, rounds, warmup),
        "cost_curve": timing.cost_curve(engine, session, 20 * rounds, warmup),
        "first_token": timing.first_token(folder, threads, rounds),
    }
    show(figures)
    return figures


def show(figures: dict[str, Any]) -> None:
    """The tables, ratios first."""
    print(f"\n{counted(figures['threads'], 'thread'):12}     ratio to {BASE} (min..max)    tokens/s   other answers")
    for name, r in figures["race"].items():
        spread = f"({r['ratio_min']:.2f}..{r['ratio_max']:.2f})"
        print(
            f"  {name:22} {r['ratio']:6.2f} {spread:15} {r['tokens_per_second']:15.0f} "
            f"{r['answers_unlike_transformers']:15}"
        )
    print("  host share of decoding: ", end="")
    print(", ".join(f"{m} {h['share']:.1%} ({h['host_us_per_pass']:.0f} us/pass)" for m, h in figures["host"].items()))
    print("  forward of S tokens:    ", end="")
    print(", ".join(f"{s}: {c['ms']:.2f} ms (x{c['over_one_token']:.2f})" for s, c in figures["cost_curve"].items()))
    first = figures["first_token"]
    print(f"  fresh process, 1 token:  {first['seconds']:.2f} s (worst {first['seconds_max']:.2f}); ", end="")
    print(", ".join(f"{name} {seconds:.2f}" for name, seconds in first["parts"].items()), flush=True)


def goals(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The verdicts, per thread count."""
    verdicts = []
    for run in runs:
        where = counted(run["threads"], "thread")
        ratio, first = run["race"]["nemodiff ar"]["ratio"], run["first_token"]["seconds"]
        verdicts.append(record.goal(f"ar over {BASE}, {where}", ratio, "at least", 2.0, "x"))
        for mode, host in run["host"].items():
            share = round(100 * host["share"], 2)
            verdicts.append(record.goal(f"host share of decoding, {mode}, {where}", share, "at most", 5.0, "%"))
        verdicts.append(record.goal(f"fresh process to first token, {where}", first, "at most", 1.5, "s"))
    return verdicts


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure speed against transformers, and where the time goes.")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="thread counts, default 1 2")
    parser.add_argument("--prompts", type=int, default=20, help="prompts per round, default 20, over all tasks")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds, default 7")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them, excluded, default 1")
    parser.add_argument("--torch", action="store_true", help="race the torch engine too")
    parser.add_argument("--checkpoint", type=Path, default=record.MODEL, help=f"default examples/{record.MODEL.name}")
    arguments = parser.parse_args()
    arguments.questions = questions.first(arguments.prompts)
    origin = record.origin(PACKAGES, arguments.threads)
    print(
        f"{counted(len(arguments.questions), 'prompt')}, {counted(arguments.rounds, 'round')}; excluded as warm-up: "
        f"{counted(arguments.warmup, 'round')}, {arguments.warmup * len(arguments.questions)} requests per contender"
    )
    with tempfile.TemporaryDirectory(prefix="nemodiff-speed-") as work:
        folder = Builder(arguments.checkpoint, Path(work) / "engine").run()
        if arguments.torch:
            Builder(arguments.checkpoint, folder.with_name("torch"), backend="torch", dtype="f32").run()
        runs = [measure(arguments.checkpoint, folder, threads, arguments) for threads in arguments.threads]
    print()
    figures = {
        "checkpoint": arguments.checkpoint.resolve().name,
        "dtype": "f32",
        "prompts": len(arguments.questions),
        "rounds": arguments.rounds,
        "warmup_requests_excluded": arguments.warmup * len(arguments.questions),
        "context_of_cost_curve": timing.CONTEXT,
        "runs": runs,
    }
    record.write("speed_torch" if arguments.torch else "speed", origin, goals(runs), figures)


if __name__ == "__main__":
    main()
