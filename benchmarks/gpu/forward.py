"""Seconds of one forward of the torch engine by its tokens, rows and context, against the card's ceilings.

In: a shape. Out: cells. A row tells the device's own seconds, the wall's, the least that memory and matrix units would
take, and the peak of memory. A context counts the pass's own tokens, so the caches are exactly as long as it is. The
surprising fact: K and V are random numbers here and no prompt is run, since what they hold does not change the time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

from gpu import models as gpu_models
from gpu.plan import Asked, Cell, Lab, Row
from nemodiff.runtime.engines.engine import bidirectional, causal
from nemodiff.runtime.engines.torch.engine import TorchCache
from nemodiff.runtime.loading import LoadedEngine

# How the engine may run; each is set on the engine that is measured as "graphs". See `Passes.vary`.
VARIANTS = ("graphs", "eager", "without kernels", "one prediction", "with logits")
LOADED = ("adapter", *(("fp8",) if gpu_models.HAS_FP8 else ()))  # with other weights


class Passes:
    """An engine, and the cache that its passes run over."""

    def __init__(self, engine: LoadedEngine) -> None:
        self.engine, self.backend = engine, engine.backend
        self._cache: Any = None
        self._variant = "graphs"
        self.scripted: Any = None  # the same engine with other tokens, once someone has made it

    def cache(self, rows: int, context: int) -> Any:
        """A cache of so many rows and slots, full of random numbers."""
        if self._cache is None or self._cache.rows != rows or self._cache.capacity < context:
            self._cache = None
            self.backend.device.forget()
            self._cache = TorchCache(self.backend, rows)  # a closed one may hold graphs of another variant
            self._cache.forward([causal("decode", [1], context - 1)] * rows)
            with self.backend.device.use(gpu_models.CARRIED):
                for pair in self._cache.caches:
                    for tensor in pair:
                        tensor.normal_()
        return self._cache

    def vary(self, variant: str) -> None:
        """Run from here on in another way, and forget what was captured."""
        if variant != self._variant:
            self.backend.graphs = variant != "eager" and self.backend.device.is_gpu
            self.backend.model.kernels = variant != "without kernels" and self.backend.device.is_gpu
            self._cache, self._variant = None, variant

    def run(self, lab: Lab, rows: int, context: int, size: int, variant: str = "graphs") -> Row:
        """Time one shape of a pass: a decode pass of one token, or a block whose every token is predicted."""
        card = lab.card
        self.vary(variant)
        cache, mask = self.cache(rows, context), self.engine.info.model.mask_id
        at, logits = context - size, variant == "with logits"
        asked = causal("decode", [mask + 1], at, logits=logits)
        if size > 1:
            asked = bidirectional("denoise", [mask] * size, at, 0.9, logits=logits)
        if variant == "one prediction":
            asked = asked._replace(predicted=asked.predicted[-1:])
        card.start_peak()
        passes = [asked] * rows
        for _ in range(3):  # eager, captured, replayed
            cache.forward(passes)
        device, wall = [], []
        for _ in card.rounds():
            started = time.perf_counter()
            cache.forward(passes)
            wall.append(time.perf_counter() - started)
            device.append(card.step_seconds())
        found = {"device_us": statistics.median(device) * 1e6, "wall_us": statistics.median(wall) * 1e6}
        reasons = sorted(set(self.backend.eager_shapes.values())) if self.backend.graphs else []
        return {**found, "not_captured": reasons} if reasons else found


def passes(lab: Lab, shape: str, dtype: str, way: str | None = None) -> Passes:
    """The engine of a shape, held."""
    return lab.hold(("engine", shape, way), lambda: Passes(gpu_models.load(shape, dtype, lab.card, way)))


def measured(lab: Lab, asked: Asked, shape: str, rows: int, context: int, size: int) -> Row:
    """One cell of the table."""
    work = gpu_models.work(shape, asked.dtype)
    found = passes(lab, shape, asked.dtype).run(lab, rows, context, size)
    seconds = found["device_us"] / 1e6
    moved, operations = work.moved(rows, context), work.operations(rows, context, size)
    least = [
        moved / lab.ceilings["copy_bytes_per_second"],
        operations / lab.ceilings["matrix_operations_per_second"],
    ]
    return {
        "rows": rows,
        "context": context,
        "tokens": size,
        **found,
        "bytes": moved,
        "operations": operations,
        "bound": "memory" if least[0] >= least[1] else "matrix",
        "to_ceiling": max(least) / seconds,
        "over_weight_bytes": seconds * lab.ceilings["copy_bytes_per_second"] / work.read_bytes,
        "peak_bytes": lab.card.peak(),
    }


def cells(asked: Asked, shape: str, rows: tuple[int, ...]) -> Iterator[Cell]:
    """The table of some row counts, the short contexts first."""
    work, scale = gpu_models.work(shape, asked.dtype), asked.scale
    for count in rows:
        for context in scale.contexts:
            for size in scale.sizes:

                def measure(lab: Lab, count: int = count, context: int = context, size: int = size) -> Row:
                    return measured(lab, asked, shape, count, context, size)

                one = seconds(work, count, context, size)
                estimate = 0.7 + 8 * one
                key = f"rows {count} context {context} tokens {size}"
                yield Cell("forward", shape, key, work.memory(count, context, size), estimate, measure)


def variant_cells(asked: Asked, shape: str) -> Iterator[Cell]:
    """Graphs against eager, kernels against plain torch, and what predictions, logits, the adapter and fp8 change."""
    work, context = gpu_models.work(shape, asked.dtype), asked.scale.contexts[1]
    for variant in VARIANTS + LOADED:

        def measure(lab: Lab, variant: str = variant) -> Row:
            found: Row = {"variant": variant, "context": context}
            for size in (1, max(s for s in asked.scale.sizes if s <= 32)):
                engine = passes(lab, shape, asked.dtype, variant if variant in LOADED else None)
                found[str(size)] = engine.run(lab, 1, context, size, "graphs" if variant in LOADED else variant)
            return found

        slow = 3.0 if variant in ("eager", "without kernels", "with logits") else 1.0
        yield Cell("variants", shape, variant, work.memory(1, context, 32), 2 * slow, measure)


def seconds(work: gpu_models.Work, rows: int, context: int, size: int) -> float:
    """A pass on an H100, about; for estimates alone."""
    return max(work.moved(rows, context) / 2.5e12, work.operations(rows, context, size) / 4e14)
