"""Compare ar, diffusion and linear_spec with the oracles, prompt by prompt and token for token.

`compare_prompt` is what the test suite runs on a sample, with tiny-chat, and what this file, run as a command, runs
with the demonstration model over the whole grid, or over some cases of it drawn for each prompt:

    python tests/equality.py --prompts 64 --cases 16 --output benchmarks/results/equality.json
    python tests/equality.py --prompts 200 --against transformers --output benchmarks/results/equality_transformers.json

Passes are counted too, which shows that an adapter acts in drafts and nowhere else.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib.metadata
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from oracle import reference
from stand_ins.chats import chat_ids
from stand_ins.checkpoints import TINY_CHAT, TINY_CHAT_2, load_make_data, write_adapter

import nemodiff
from nemodiff.builder.build import Builder

BLOCKS = (2, 5, 8, 16, 32)
THRESHOLDS = (0.0, 0.7, 0.95)
LIMITS = (1, 7, 32, 100)
COMPARED = {
    "reference": "token ids, finish reason, passes by kind, acceptance; with adapter over 7 tokens the token ids alone",
    "transformers": "token ids",
}
ADAPTER_PASSES = 7  # up to this limit the passes of a spoiled draft are counted too; beyond, they would take an hour
SEED = 2026  # not one of the seeds that tiny-chat and tiny-chat-2 were trained with


@dataclasses.dataclass(frozen=True)
class Case:
    """One request of the grid."""

    mode: str  # ar, diffusion, linear_spec, linear_spec+adapter
    block_length: int
    threshold: float
    max_new_tokens: int


@dataclasses.dataclass(frozen=True)
class Difference:
    """A request that was not equal."""

    case: Case
    prompt: str
    expected: object
    got: object
    margin: float  # of AR's own choices, in logits; near 0 means rounding decides


def questions(count: int) -> list[str]:
    """Distinct held-out questions over all of tiny-chat's tasks."""
    data, rng = load_make_data(), random.Random(SEED)
    distinct: dict[str, None] = {}
    while len(distinct) < count:
        distinct[data.example(rng)[1]] = None
    return list(distinct)


def questions_of_the_demonstration(count: int) -> list[str]:
    """Distinct held-out questions over tiny-chat-2's tasks, the tasks in turn. It puts that folder on Python's path."""
    sys.path.insert(0, str(TINY_CHAT_2))
    from questions import TASKS, ask  # type: ignore[import-not-found]

    rng = random.Random(SEED)
    distinct: dict[str, None] = {}
    for task in itertools.cycle(TASKS):
        distinct[ask(task, rng)[0][-1]["content"]] = None
        if len(distinct) == count:
            return list(distinct)
    return []


@dataclasses.dataclass
class Setup:
    """Engines with and without the adapter, and one oracle for both: it uses the adapter only on request."""

    plain: nemodiff.LoadedEngine
    adapted: nemodiff.LoadedEngine
    model: reference.ReferenceModel

    @classmethod
    def make(cls, folder: Path, threads: int | None = None, checkpoint: Path = TINY_CHAT) -> Setup:
        """Build both engines below `folder`."""
        with_adapter = folder / "checkpoint"
        shutil.copytree(checkpoint, with_adapter)
        write_adapter(with_adapter, rank=8, alpha=32, strength=0.2)  # strong enough to spoil the drafts
        for source, name in ((checkpoint, "plain"), (with_adapter, "adapted")):
            Builder(source, folder / name).run()
        return cls(
            nemodiff.load(folder / "plain", threads=threads),
            nemodiff.load(folder / "adapted", threads=threads),
            reference.ReferenceModel.load(with_adapter),
        )


def grid(
    blocks: tuple[int, ...] = BLOCKS, thresholds: tuple[float, ...] = THRESHOLDS, limits: tuple[int, ...] = LIMITS
) -> list[Case]:
    """All cases of one prompt."""
    cases = [Case("ar", 1, 0.0, limit) for limit in limits]
    modes = ("diffusion", "linear_spec", "linear_spec+adapter")
    cases += [Case(*values) for values in itertools.product(modes, blocks, thresholds, limits)]
    return cases


def compare_prompt(setup: Setup, question: str, cases: list[Case]) -> Iterator[tuple[Case, Difference | None]]:
    """Run one prompt through every case."""
    prompt = chat_ids(setup.plain.text, [{"role": "user", "content": question}])
    eos = setup.model.eos
    longest = reference.ar(setup.model, prompt, max(c.max_new_tokens for c in cases), eos)
    for case in cases:
        adapter = case.mode.endswith("+adapter")
        engine = setup.adapted if adapter else setup.plain
        mode = case.mode.removesuffix("+adapter")
        answer = nemodiff.generate(
            engine,
            prompt,
            mode=mode,
            block_length=case.block_length,
            threshold=case.threshold,
            max_new_tokens=case.max_new_tokens,
        )
        got = {
            "tokens": answer.token_ids,
            "finish_reason": answer.finish_reason,
            "nfe": answer.nfe,
            "acceptance": answer.acceptance.lengths,
        }
        if adapter and case.max_new_tokens > ADAPTER_PASSES:
            expected, got = {"tokens": longest.tokens[: case.max_new_tokens]}, {"tokens": answer.token_ids}
        else:
            expected = dataclasses.asdict(_oracle(setup.model, prompt, case, mode, adapter))
        equal = got == expected
        if mode != "diffusion":  # the causal modes owe AR's tokens, whatever their own oracle says
            equal = equal and answer.token_ids == longest.tokens[: case.max_new_tokens]
        margin = 0.0 if equal else reference.ar_margin(setup.model, prompt, longest.tokens)
        yield case, None if equal else Difference(case, question, expected, got, margin)


def _oracle(
    model: reference.ReferenceModel, prompt: list[int], case: Case, mode: str, adapter: bool
) -> reference.Reference:
    if mode == "ar":
        return reference.ar(model, prompt, case.max_new_tokens, model.eos)
    arguments = (prompt, case.max_new_tokens, case.block_length, case.threshold, model.eos)
    if mode == "diffusion":
        return reference.diffusion(model, *arguments)
    return reference.linear_spec(model, *arguments, adapter=adapter)


def compare_with_transformers(
    engine: nemodiff.LoadedEngine, question_list: list[str]
) -> Iterator[tuple[Case, Difference | None]]:
    """Run every prompt through AR and through transformers' generate on the same weights."""
    from oracle import transformers_oracle

    model, case = transformers_oracle.load(TINY_CHAT_2), Case("ar", 1, 0.0, max(LIMITS))
    for question in question_list:
        prompt = chat_ids(engine.text, [{"role": "user", "content": question}])
        expected = transformers_oracle.greedy(model, prompt, case.max_new_tokens, sorted(engine.info.model.eos_ids))
        got = nemodiff.generate(engine, prompt, mode="ar", max_new_tokens=case.max_new_tokens).token_ids
        yield case, None if got == expected else Difference(case, question, expected, got, math.nan)


def _work(arguments: tuple[list[str], Path, int]) -> list[tuple[Case, Difference | None]]:
    chunk, folder, count = arguments
    setup = Setup.make(folder, 1, TINY_CHAT_2)
    done: list[tuple[Case, Difference | None]] = []
    for i, question in enumerate(chunk, 1):
        cases = grid()
        done += compare_prompt(setup, question, random.Random(question).sample(cases, min(count, len(cases))))
        print(f"{i} of {len(chunk)} prompts, {sum(d is not None for _, d in done)} differences", file=sys.stderr)
    return done


def _run_grid(
    question_list: list[str], cases: int, processes: int, folder: Path
) -> list[tuple[Case, Difference | None]]:
    """So many cases of every prompt, the prompts dealt out to processes of one thread each."""
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # inherited
    parts = [(question_list[i::processes], folder / str(i), cases) for i in range(processes)]
    for _, part, _ in parts:
        part.mkdir()
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return [pair for part in pool.map(_work, parts) for pair in part]


def main() -> None:
    """Run the comparison and write the result file; the exit code is 1 if anything differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=300, help="questions to compare, default 300")
    parser.add_argument("--cases", type=int, default=len(grid()), help="of the grid for each, drawn; default all")
    parser.add_argument("--against", choices=["reference", "transformers"], default="reference", help="the oracle")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default one per core")
    parser.add_argument("--output", type=Path, required=True, help="result file to write")
    options = parser.parse_args()
    started, question_list = time.time(), questions_of_the_demonstration(options.prompts)
    packages = ["numpy", "onnxruntime"]
    with tempfile.TemporaryDirectory() as folder:
        if options.against == "reference":
            done = _run_grid(question_list, options.cases, options.processes, Path(folder))
        else:
            packages += ["torch", "transformers"]
            engine = nemodiff.load(Builder(TINY_CHAT_2, Path(folder) / "plain").run())
            done = list(compare_with_transformers(engine, question_list))
    counts = collections.Counter(case.mode for case, _ in done)
    differences = [d for _, d in done if d is not None]
    values = {
        "command": f"python tests/equality.py {' '.join(sys.argv[1:])}",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"nemodiff": nemodiff.__version__} | {name: importlib.metadata.version(name) for name in packages},
        "checkpoint": TINY_CHAT_2.name,
        "block_lengths": sorted({c.block_length for c, _ in done}),
        "thresholds": sorted({c.threshold for c, _ in done}),
        "max_new_tokens": sorted({c.max_new_tokens for c, _ in done}),
        "compared": COMPARED[options.against],
        "prompts": len(question_list),
        "seconds": round(time.time() - started),
        "requests": dict(counts),
        "equal": {m: n - sum(d.case.mode == m for d in differences) for m, n in counts.items()},
        "differences": [dataclasses.asdict(d) for d in differences],
    }
    options.output.write_text(json.dumps(values, indent=1) + "\n")
    print(json.dumps({k: values[k] for k in ("prompts", "requests", "equal", "seconds")}, indent=1))
    sys.exit(bool(differences))


if __name__ == "__main__":
    main()
