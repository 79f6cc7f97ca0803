"""Measure many requests at once: a scheduler over the engine, with the scripted tokens of `gpu/script.py`.

Every request has a prompt of its own, so nothing is shared, and all are submitted together. The graphs of decoding are
captured before, and what is captured afterwards all the same is counted.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Iterator
from typing import Any

from gpu import models as gpu_models
from gpu import script as gpu_script
from gpu.forward import Passes, passes, seconds
from gpu.plan import Cell, Figures, Lab, RunConfig
from nemodiff.runtime.loading import LoadedEngine
from nemodiff.runtime.scheduler.scheduler import Scheduler

WAYS: dict[str, tuple[dict[str, Any], ...]] = {
    "ar": ({"mode": "ar"},),
    "linear_spec": ({"mode": "linear_spec", "block_length": 32},),
    "quadratic_spec": ({"mode": "quadratic_spec", "groups": "auto"},),
    "diffusion": ({"mode": "diffusion", "block_length": 32},),
}
WAYS["mix"] = tuple(options for way in list(WAYS.values()) for options in way)
WAYS["auto"] = ({"mode": "auto"},)


class Arrivals:
    """When a request's text came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, outcome: Any) -> None:
        """Take note of events of a request, as its listener."""
        self.times.append(time.perf_counter())

    @property
    def gaps(self) -> list[float]:
        """Seconds between two of them."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


def prompt_of(number: int, length: int) -> list[int]:
    """A prompt that shares no beginning with those of other numbers."""
    return [gpu_script.FIRST_ID + (number * 31 + 7 * i) % gpu_script.IDS for i in range(length)]


def scripted(held: Passes) -> LoadedEngine:
    """The engine with scripted tokens, warm."""
    held.vary("graphs")
    if held.warm_seconds is None:
        started = time.perf_counter()
        held.backend.warm_up()
        held.warm_seconds = time.perf_counter() - started
    if held.scripted is None:  # kept, for its cost curve
        held.scripted = dataclasses.replace(held.engine, backend=gpu_script.Scripted(held.backend))
    engine: LoadedEngine = held.scripted
    return engine


def measured(lab: Lab, config: RunConfig, shape: str, way: str, count: int) -> Figures:
    """One run of `count` requests: tokens per second of all, and what one of them waits for."""
    scale = config.scale
    held = passes(lab, shape, config.dtype)
    engine = scripted(held)
    backend, pages = held.backend, held.backend.pages
    captured, compiled = backend.captured, backend.compiled
    lab.card.start_peak()
    spent = lab.card.spent
    held_pages = [0]

    def listen(arrival: Arrivals, outcome: Any) -> None:
        held_pages.append(pages.count - pages.free)
        arrival(outcome)

    with Scheduler(engine, rows=count, prefix_reuse=False) as scheduler:
        started = time.perf_counter()
        arrivals = [Arrivals() for _ in range(count)]
        handles = [
            scheduler.submit(
                prompt_of(number, scale.prompt),
                max_new_tokens=scale.new_tokens,
                listener=functools.partial(listen, arrivals[number]),
                **WAYS[way][number % len(WAYS[way])],
            )
            for number in range(count)
        ]
        answers = [handle.result() for handle in handles]
        wall = time.perf_counter() - started
        counts = scheduler.statistics
    tokens = sum(len(answer.token_ids) for answer in answers)
    first = [a.timings_ms["prefill"] for a in answers]
    gaps = sorted(gap for arrival in arrivals for gap in arrival.gaps) or [0.0]
    return {
        "way": way,
        "requests": count,
        "tokens": tokens,
        "tokens_per_second": tokens / wall,
        "tokens_per_pass": statistics.mean(a.decode_tpf or 0.0 for a in answers),
        "ms_to_first_token": statistics.median(first),
        "gap_ms": 1e3 * statistics.median(gaps),
        "gap_ms_p99": 1e3 * gaps[int(0.99 * (len(gaps) - 1))],
        "tokens_per_forward": counts.computed_tokens / max(1, counts.forwards),
        "preempted": counts.preempted,
        "pages": max(held_pages),
        "host_gap": 1 - (lab.card.spent - spent) / wall,
        "peak_bytes": lab.card.peak(),
        "captured_meanwhile": backend.captured - captured,
        "compiled_meanwhile": backend.compiled - compiled,
        "warm_up_seconds": held.warm_seconds,
        "graphs": backend.captured,
    }


def cells(config: RunConfig, shape: str, requests: tuple[int, ...]) -> Iterator[Cell]:
    """Every way at some numbers of requests."""
    work, scale = gpu_models.work(shape, config.dtype), config.scale
    for count in requests:
        for way in WAYS:
            if count == 1 and way == "mix":
                continue

            def measure(lab: Lab, way: str = way, count: int = count) -> Figures:
                return measured(lab, config, shape, way, count)

            one = seconds(work, count, scale.prompt + scale.new_tokens, 1 if way == "ar" else 32)
            passes_needed = scale.new_tokens * (1.0 if way == "ar" else 0.4)
            estimate = 1 + passes_needed * one + count * seconds(work, 1, scale.prompt, scale.prompt)
            nbytes = work.memory(count, scale.prompt + scale.new_tokens + 64, 32)
            yield Cell("serve", shape, f"{way} requests {count}", nbytes, estimate, measure)
