"""Measure whole answers: the decoding loops at a released size, and every mode on a trained checkpoint.

At a released size the weights are random and the tokens come from `gpu/script.py`, so passes, their order and their
time are real and the acceptance is the published one. On a trained checkpoint the tokens are the model's own.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Iterator
from typing import Any

from common import questions

from gpu import models as gpu_models
from gpu import script as gpu_script
from gpu.card import Card
from gpu.forward import passes, seconds
from gpu.plan import Cell, Figures, Lab, RunConfig
from nemodiff.contract import MODES
from nemodiff.runtime.generate import generate
from nemodiff.runtime.loading import LoadedEngine

SETTINGS: dict[str, dict[str, Any]] = {
    "ar": {"mode": "ar"},
    "linear_spec": {"mode": "linear_spec", "block_length": 32},
    "quadratic_spec, budget": {"mode": "quadratic_spec", "groups": "auto"},
    "quadratic_spec, all groups": {"mode": "quadratic_spec", "groups": "all", "block_length": 16},
    "diffusion": {"mode": "diffusion", "block_length": 32},
    "ar, sampled": {"mode": "ar", "temperature": 0.8, "seed": 1},
}

FP8 = "linear_spec, weights in fp8"


def prompt_of(length: int) -> list[int]:
    """A prompt of so many ids."""
    return [gpu_script.FIRST_ID + 7 * i % gpu_script.IDS for i in range(length)]


def timed(lab: Lab, engine: LoadedEngine, prompt: list[int], new_tokens: int, options: dict[str, Any]) -> Figures:
    """One answer, the second of two: tokens per second, passes, and the share of time the device stood still.

    The host works longer than this gap wherever it works while the device does.
    """
    card: Card = lab.card
    for _ in range(2):
        before, started = card.spent, time.perf_counter()
        answer = generate(engine, prompt, max_new_tokens=new_tokens, **options)
        wall, inside = time.perf_counter() - started, card.spent - before
    tokens = len(answer.token_ids)
    return {
        "tokens": tokens,
        "tokens_per_second": tokens / answer.timings_ms["decode"] * 1e3,
        "tokens_per_pass": answer.decode_tpf,
        "tokens_per_verify": answer.acceptance.mean,
        "nfe": answer.nfe,
        "host_gap": 1 - inside / wall,
        "ms_to_first_token": answer.timings_ms["prefill"],
    }


def decode_cells(config: RunConfig, shape: str) -> Iterator[Cell]:
    """The loops at a released size, and the cost curve they plan by."""
    work, scale = gpu_models.work(shape, config.dtype), config.scale
    prompt = prompt_of(scale.prompt)
    nbytes = work.memory(1, 4096, 512)

    def engine(lab: Lab, scripted: bool) -> LoadedEngine:
        held = passes(lab, shape, config.dtype)
        held.vary("graphs")
        if not scripted:
            return held.engine
        if held.scripted is None:  # kept, for its cost curve
            held.scripted = dataclasses.replace(held.engine, backend=gpu_script.Scripted(held.backend))
        return held.scripted

    def curve(lab: Lab) -> Figures:
        started = time.perf_counter()
        cost = engine(lab, True).cost.curve
        spent = time.perf_counter() - started
        return {"sizes": cost.sizes, "curve_us": [1e6 * s for s in cost.times], "seconds_to_measure": spent}

    yield Cell("decode", shape, "cost curve", nbytes, 2, curve)
    for name, options in SETTINGS.items():

        def measure(lab: Lab, name: str = name, options: dict[str, Any] = options) -> Figures:
            return {"way": name, **timed(lab, engine(lab, name != "ar, sampled"), prompt, scale.new_tokens, options)}

        yield Cell("decode", shape, name, nbytes, 3 + 2 * scale.new_tokens * seconds(work, 1, 1024, 32), measure)


def fp8_cells(config: RunConfig, shape: str) -> Iterator[Cell]:
    """The loop that few bits are for, at a released size."""
    work, scale = gpu_models.work(shape, config.dtype), config.scale

    def measure(lab: Lab) -> Figures:
        held = passes(lab, shape, config.dtype, "fp8")
        engine = dataclasses.replace(held.engine, backend=gpu_script.Scripted(held.backend))
        prompt, options = prompt_of(scale.prompt), SETTINGS["linear_spec"]
        return {"way": FP8, **timed(lab, engine, prompt, scale.new_tokens, options)}

    yield Cell("decode", shape, FP8, work.memory(1, 4096, 512), 6, measure)


def answer_cells(config: RunConfig) -> Iterator[Cell]:
    """Every mode on a trained checkpoint, in its exact type and in the measured one."""
    prompts = [q.text for q in questions.first(config.scale.questions)]
    limit = config.scale.answer

    @functools.cache
    def expected() -> dict[str, list[list[int]]]:
        """Answers of the CPU in f32, by mode."""
        engine = gpu_models.load(config.checkpoint, "f32", Card("cpu"))
        return {m: [generate(engine, q, mode=m, max_new_tokens=limit).token_ids for q in prompts] for m in MODES}

    def measure(lab: Lab, dtype: str) -> Figures:
        expected_ids = expected()  # causal modes must agree with ar, and all modes with the CPU
        engine = lab.hold(("checkpoint", dtype), lambda: gpu_models.load(config.checkpoint, dtype, lab.card))
        figures: Figures = {"dtype": dtype, "questions": len(prompts), "modes": {}}
        by_mode = {}
        for mode in MODES:
            for _ in range(2):
                started = time.perf_counter()
                answers = [generate(engine, q, mode=mode, max_new_tokens=limit) for q in prompts]
                spent = time.perf_counter() - started
            tokens = by_mode[mode] = [a.token_ids for a in answers]
            figures["modes"][mode] = {
                "tokens_per_second": sum(map(len, tokens)) / spent,
                "tokens_per_pass": statistics.mean(a.decode_tpf or 0.0 for a in answers),
                "answers_unlike_ar": sum(a != b for a, b in zip(tokens, by_mode["ar"], strict=True)),
                "answers_unlike_cpu": sum(a != b for a, b in zip(tokens, expected_ids[mode], strict=True)),
            }
        return figures

    for dtype in dict.fromkeys(("f32", config.dtype)):

        def of_dtype(lab: Lab, dtype: str = dtype) -> Figures:
            return measure(lab, dtype)

        yield Cell("modes", config.checkpoint.name, dtype, 2**31, 60, of_dtype)
