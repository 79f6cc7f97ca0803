"""Compare every mode with the oracle and with AR when a request asks for more than the best token.

`compare_causal` and `compare_diffusion` are what the test suite runs on a sample and what this file, run as a command,
runs with the demonstration model over many prompts:

    python tests/equality_sampled.py --prompts 48 --output benchmarks/results/equality_sampled.json

Equality holds at any temperature, because noise belongs to a position and not to a pass.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import equality
from oracle import reference
from oracle.reference_choice import Control, SamplingParams
from stand_ins.chats import chat_ids
from stand_ins.checkpoints import TINY_CHAT_2

import nemodiff

NEW_TOKENS = 40
TURNS = 4  # sampling parameters per prompt, and as many cases of diffusion; the prompts take turns
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "city": {"enum": ["Oslo", "Perth", "Lima"]}},
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}
REGEX = "[0-9]{1,3}(, [0-9]{1,3}){0,9}"

Request = dict[str, Any]

PARAMS: dict[str, Request] = {
    "T 0.7": {"temperature": 0.7},
    "T 1": {"temperature": 1.0},
    "T 1.5": {"temperature": 1.5},
    "top-k": {"temperature": 1.5, "top_k": 4},
    "top-p": {"temperature": 1.5, "top_p": 0.9},
    "min-p": {"temperature": 1.5, "min_p": 0.05, "top_k": 20, "top_p": 0.95},
    "repetition": {"repetition_penalty": 1.3},
    "presence, frequency": {"temperature": 1.0, "presence_penalty": 0.7, "frequency_penalty": 0.4},
    "bias": {"temperature": 0.8, "logit_bias": {145: 4.0, 139: -6.0, 11: -3.0}},
    "bad words": {"temperature": 0.7, "bad_words": ("is", ", 4", "the")},
    "min tokens": {"temperature": 0.7, "min_tokens": 30, "stop_token_ids": (146,)},
    "thinking budget": {"temperature": 0.7, "thinking": True, "thinking_budget": 9},
}
GUIDES: dict[str, Request] = {
    "json schema": {"json_schema": SCHEMA},
    "json schema, T 1": {"json_schema": SCHEMA, "temperature": 1.0},
    "regex, T 0.7": {"regex": REGEX, "temperature": 0.7},
}
CAUSAL: dict[str, Request] = {
    "ar, chunks of 7": {"mode": "ar", "prefill_chunk": 7},
    "linear_spec": {"mode": "linear_spec"},
    "linear_spec, blocks of 5, threshold 0.5": {"mode": "linear_spec", "block_length": 5, "threshold": 0.5},
    "linear_spec+adapter": {"mode": "linear_spec", "block_length": 8},
    "quadratic_spec": {"mode": "quadratic_spec"},
    "quadratic_spec, all groups of 8": {"mode": "quadratic_spec", "groups": "all", "block_length": 8},
}
CONTROLS: dict[str, Request] = {
    "threshold": {},
    "topk": {"policy": "topk", "per_step": 3},
    "entropy": {"policy": "entropy", "entropy_bound": 0.2},
    "left_to_right": {"policy": "left_to_right", "threshold": 0.6},
    "steps": {"block_steps": 2, "threshold": 0.999},
    "merge_commit": {"merge_commit": True},
    "merge_commit, steps, topk": {"merge_commit": True, "block_steps": 3, "policy": "topk", "per_step": 1},
}
LOOKS_BACK = ("repetition", "presence, frequency", "bad words")


@dataclasses.dataclass(frozen=True)
class Difference:
    """A request that was not equal."""

    params: str
    variant: str
    prompt: str
    seed: int
    expected: object
    got: object


def oracle_params(engine: nemodiff.LoadedEngine, prompt: list[int], request: Request, seed: int) -> SamplingParams:
    """The oracle's parameters of a request."""
    text = engine.text
    words = {tuple(text.encode_plain(space + word)) for word in request.get("bad_words", ()) for space in ("", " ")}
    values = {k: v for k, v in request.items() if k not in ("bad_words", "stop_token_ids", "thinking")}
    stops = frozenset(engine.info.model.eos_ids).union(request.get("stop_token_ids", ()))
    end = text.end_think if "thinking_budget" in request else None
    return SamplingParams(
        tuple(prompt), stops, bad_words=tuple(words), seed=seed, end_think=-1 if end is None else end, **values
    )


def compare_causal(
    setup: equality.Setup, question: str, name: str, seed: int, variants: list[str]
) -> Iterator[tuple[str, Difference | None]]:
    """One set of parameters on one prompt: AR against its oracle, and every other variant against AR."""
    request = {**PARAMS, **GUIDES}[name]
    prompt = _prompt(setup, question, request)
    base = nemodiff.generate(setup.plain, prompt, mode="ar", seed=seed, max_new_tokens=NEW_TOKENS, **request)
    params = oracle_params(setup.plain, prompt, request, seed) if name in PARAMS else None

    def difference(variant: str, expected: object, got: object) -> Difference | None:
        return None if expected == got else Difference(name, variant, question, seed, expected, got)

    if params is not None:
        oracle = reference.ar(setup.model, prompt, NEW_TOKENS, params.stops, params)
        yield "ar", difference("ar", (oracle.tokens, oracle.finish_reason), (base.token_ids, base.finish_reason))
    for variant in variants:
        engine = setup.adapted if variant.endswith("+adapter") else setup.plain
        options = {**request, **CAUSAL[variant], "seed": seed, "max_new_tokens": NEW_TOKENS}
        answer = nemodiff.generate(engine, prompt, **options)
        yield (
            variant,
            difference(variant, (base.token_ids, base.finish_reason), (answer.token_ids, answer.finish_reason)),
        )


def compare_passes(setup: equality.Setup, question: str, name: str, seed: int) -> Iterator[Difference]:
    """One set of parameters on one prompt: passes and acceptance of self-speculation that differ from the oracle's."""
    request = PARAMS[name]
    prompt = _prompt(setup, question, request)
    params = oracle_params(setup.plain, prompt, request, seed)
    options = {**request, "seed": seed, "max_new_tokens": NEW_TOKENS}
    for variant in (
        "linear_spec, blocks of 5, threshold 0.5",
        "linear_spec+adapter",
        "quadratic_spec, all groups of 8",
    ):
        adapter = variant.endswith("+adapter")
        got = nemodiff.generate(setup.adapted if adapter else setup.plain, prompt, **options, **CAUSAL[variant])
        size = CAUSAL[variant]["block_length"]
        if variant.startswith("quadratic"):
            oracle = reference.quadratic_spec(setup.model, prompt, NEW_TOKENS, size, params.stops, params=params)
        else:
            threshold = CAUSAL[variant].get("threshold", 0.0)
            oracle = reference.linear_spec(
                setup.model, prompt, NEW_TOKENS, size, threshold, params.stops, adapter, params
            )
        expected = (oracle.tokens, oracle.nfe, oracle.acceptance)
        if expected != (actual := (got.token_ids, got.nfe, got.acceptance.lengths)):
            yield Difference(name, variant, question, seed, expected, actual)


def compare_diffusion(
    setup: equality.Setup, question: str, name: str | None, variant: str, seed: int, block: int
) -> Difference | None:
    """One set of parameters, or none, and one policy of commits against the oracle."""
    request = PARAMS[name] if name else {}
    prompt = _prompt(setup, question, request)
    params = oracle_params(setup.plain, prompt, request, seed) if name else None
    values = {k.removeprefix("block_"): v for k, v in CONTROLS[variant].items() if k != "threshold"}
    threshold = CONTROLS[variant].get("threshold", 0.9)
    stops = params.stops if params else setup.model.eos
    oracle = reference.diffusion(setup.model, prompt, NEW_TOKENS, block, threshold, stops, params, Control(**values))
    options = {**request, **CONTROLS[variant], "seed": seed, "max_new_tokens": NEW_TOKENS, "block_length": block}
    got = nemodiff.generate(setup.plain, prompt, mode="diffusion", **options)
    expected, actual = (oracle.tokens, oracle.finish_reason, oracle.nfe), (got.token_ids, got.finish_reason, got.nfe)
    return None if expected == actual else Difference(name or "none", variant, question, seed, expected, actual)


def diffusion_cases() -> list[tuple[str | None, str]]:
    """Every policy of commits with every set of parameters that it takes."""
    pairs = itertools.product((None, *PARAMS), CONTROLS)
    return [(name, variant) for name, variant in pairs if name not in LOOKS_BACK or variant == "left_to_right"]


def _prompt(setup: equality.Setup, question: str, request: Request) -> list[int]:
    message = {"role": "user", "content": question}
    return chat_ids(setup.plain.text, [message], thinking=bool(request.get("thinking")))


Done = list[tuple[str, str, Difference | None]]  # parameters, variant, difference


def _work(arguments: tuple[list[tuple[int, str]], Path]) -> Done:
    chunk, folder = arguments
    setup = equality.Setup.make(folder, 1, TINY_CHAT_2)
    names = [*PARAMS, *GUIDES]
    cases = diffusion_cases()
    done = Done()
    for count, (number, question) in enumerate(chunk, 1):
        for turn in range(TURNS):
            name = names[(TURNS * number + turn) % len(names)]
            done += [(name, variant, d) for variant, d in compare_causal(setup, question, name, number, list(CAUSAL))]
            name, variant = cases[(TURNS * number + turn) % len(cases)]
            difference = compare_diffusion(setup, question, name, variant, number, (8, 32)[number % 2])
            done.append((name or "none", f"diffusion, {variant}", difference))
        different = sum(d is not None for _, _, d in done)
        print(f"{count} of {len(chunk)} prompts, {different} differences", file=sys.stderr, flush=True)
    return done


def main() -> None:
    """Run the comparison and write the result file; the exit code is 1 if anything differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=300, help="questions to compare, default 300")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default one per core")
    parser.add_argument("--output", type=Path, required=True, help="result file to write")
    options = parser.parse_args()
    started, numbered = time.time(), list(enumerate(equality.questions_of_the_demonstration(options.prompts)))
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # inherited
    with tempfile.TemporaryDirectory() as folder:
        parts = [(numbered[i :: options.processes], Path(folder) / str(i)) for i in range(options.processes)]
        for _, part in parts:
            part.mkdir()
        with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
            done = [entry for part in pool.map(_work, parts) for entry in part]
    values = {
        "command": f"python tests/equality_sampled.py {' '.join(sys.argv[1:])}",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"nemodiff": nemodiff.__version__}
        | {name: importlib.metadata.version(name) for name in ("numpy", "onnxruntime", "llguidance")},
        "checkpoint": TINY_CHAT_2.name,
        "compared": "ar and diffusion with the oracle, every other way with ar; token ids and finish reason, in "
        "diffusion passes by kind too",
        "max_new_tokens": NEW_TOKENS,
        "laws": {name: PARAMS.get(name) or GUIDES[name] for name in (*PARAMS, *GUIDES)},
        "prompts": len(numbered),
        "seconds": round(time.time() - started),
        "requests": dict(collections.Counter(variant for _, variant, _ in done)),
        "equal": dict(collections.Counter(variant for _, variant, d in done if d is None)),
        "differences": [dataclasses.asdict(d) for _, _, d in done if d is not None],
    }
    options.output.write_text(json.dumps(values, indent=1) + "\n")
    print(json.dumps({k: values[k] for k in ("prompts", "requests", "equal", "seconds")}, indent=1))
    sys.exit(any(d is not None for _, _, d in done))


if __name__ == "__main__":
    main()
