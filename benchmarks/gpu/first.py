"""Measure what a user waits for at first: the warm-up, and the first answer in every mode beside the next ones."""

from __future__ import annotations

import statistics
import traceback
from collections.abc import Iterator
from typing import Any

from gpu import models as gpu_models
from gpu.forward import passes
from gpu.modes import SETTINGS, prompt_of
from gpu.plan import Cell, Figures, Lab, RunConfig
from gpu.serve import scripted
from nemodiff.errors import first_line
from nemodiff.runtime.generate import generate
from nemodiff.runtime.loading import LoadedEngine

LATER = 2  # answers that the first is compared with


def measured(lab: Lab, config: RunConfig, shape: str) -> Figures:
    """Seconds, graphs, kernels and bytes of the warm-up, milliseconds of answers, and what was made after it."""
    held = passes(lab, shape, config.dtype)
    held.vary("graphs")
    backend = held.backend
    free, made = lab.card.memory()[0], backend.captured
    warm = scripted(held)
    figures: Figures = {
        "warm_up_seconds": held.warm_seconds,
        "warm_up_bytes": free - lab.card.memory()[0],
        "graphs": backend.captured - made,
        "kernels": backend.compiled,
    }
    before = backend.captured, backend.compiled
    ways: dict[str, Figures] = {}
    for name, options in SETTINGS.items():
        engine = held.engine if "temperature" in options else warm
        try:
            ways[name] = _answers(engine, config, options)
        except Exception as error:  # a way that fails costs itself alone, unless it has broken the card
            if not lab.card.answers():
                raise
            traceback.print_exc()
            ways[name] = {"skipped": f"failed: {type(error).__name__}: {first_line(error)}"}
    figures["captured_meanwhile"] = backend.captured - before[0]
    figures["compiled_meanwhile"] = backend.compiled - before[1]
    return {**figures, "ways": ways}


def _answers(engine: LoadedEngine, config: RunConfig, options: dict[str, Any]) -> Figures:
    """Milliseconds of a first answer and of those after it."""
    prompt = prompt_of(config.scale.prompt)
    times, first_tokens = [], []
    for _ in range(1 + LATER):
        answer = generate(engine, prompt, max_new_tokens=config.scale.answer, **options)
        first_tokens.append(answer.timings_ms["prefill"])
        times.append(answer.timings_ms["prefill"] + answer.timings_ms["decode"])
    later = statistics.median(times[1:])
    return {
        "first_ms": times[0],
        "later_ms": later,
        "ms_to_first_token": first_tokens[0],
        "speed_of_first": later / times[0],
    }


def cells(config: RunConfig, shape: str) -> Iterator[Cell]:
    """One, which comes before anything else has compiled a kernel."""

    def measure(lab: Lab) -> Figures:
        return measured(lab, config, shape)

    nbytes = gpu_models.work(shape, config.dtype).memory(1, 4096, 1024)
    yield Cell("first", shape, "answers", nbytes, 50, measure)
