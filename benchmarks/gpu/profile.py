"""Measure where the time of one pass goes: microseconds and launches of every kernel of it, by torch's profiler."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator

from gpu import models as gpu_models
from gpu.forward import WARM, passes
from gpu.plan import Cell, Figures, Lab, RunConfig

TURNS = 5  # passes that are looked at
SHOWN = 24  # kernels of a pass that are kept by name, the longest first


def measured(lab: Lab, config: RunConfig, shape: str, way: str, context: int, size: int) -> Figures:
    """One pass of one row, run in one of `forward.LAUNCHED`'s ways."""
    torch, card = lab.card.torch, lab.card
    held = passes(lab, shape, config.dtype)
    held.vary(way)
    cache, pass_ = held.cache(1, context), held.pass_of(context, size)
    for _ in range(WARM):
        cache.forward([pass_])
    activities = torch.profiler.ProfilerActivity
    # torch 2.11 warns of events that it would drop between two cycles, though there is one.
    kinds = [activities.CUDA if card.is_gpu else activities.CPU]
    with torch.profiler.profile(activities=kinds, acc_events=True) as profiler:
        for _ in range(TURNS):
            cache.forward([pass_])
    spent: collections.Counter[str] = collections.Counter()
    launches: collections.Counter[str] = collections.Counter()
    for event in profiler.events():
        if not card.is_gpu or event.device_type == torch.autograd.DeviceType.CUDA:
            spent[event.name] += event.time_range.elapsed_us() / TURNS
            launches[event.name] += 1
    kernels = [
        {"name": name, "us": us, "launches": launches[name] / TURNS} for name, us in spent.most_common(SHOWN) if us
    ]
    others = spent.total() - sum(kernel["us"] for kernel in kernels)
    about = {"way": way, "context": context, "tokens": size, "launches": launches.total() / TURNS}
    return {**about, "us": spent.total(), "others_us": others, "kernels": kernels}


def cells(config: RunConfig, shape: str) -> Iterator[Cell]:
    """A decode pass and a block in every context, in a short one with own products too."""
    block = max(size for size in config.scale.sizes if size <= 32)
    ways = [("graphs", context) for context in config.scale.contexts] + [("own products", config.scale.contexts[0])]
    for (way, context), size in itertools.product(ways, (1, block)):

        def measure(lab: Lab, way: str = way, context: int = context, size: int = size) -> Figures:
            return measured(lab, config, shape, way, context, size)

        nbytes = gpu_models.work(shape, config.dtype).memory(1, context, size)
        key = f"context {context} tokens {size}" + ("" if way == "graphs" else f", {way}")
        yield Cell("profile", shape, key, nbytes, 1.5, measure)
