"""Measure one forward of the torch engine by its tokens, rows and context, against the card's ceilings.

A context counts the pass's own tokens, so the caches are exactly as long as it is.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
import zlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from gpu import models as gpu_models
from gpu.plan import Cell, Figures, Lab, RunConfig
from nemodiff.errors import EngineError
from nemodiff.plugins.ops import linear
from nemodiff.runtime.engines.passes import Pass, bidirectional, causal
from nemodiff.runtime.engines.torch.projections import OWN
from nemodiff.runtime.loading import LoadedEngine


@dataclasses.dataclass(frozen=True)
class Launched:
    """How the engine launches its kernels."""

    own: tuple[str, ...] = ()  # projections that its kernels multiply
    off: str | None = None  # where kernels begin early, the way that does the same without
    ahead: int = linear.AHEAD  # bytes of weights that are asked for early


# How the engine may run; each is set on the engine that is measured as "graphs". See `Passes.vary`.
OWN_PRODUCTS = "own products, pdl"
LAUNCHED = {
    "graphs": Launched(),
    "pdl": Launched(off="graphs"),
    OWN_PRODUCTS: Launched(OWN, "own products"),
    "own products": Launched(OWN),
    "own qkv, o, down, pdl": Launched(("qkv", "o", "down"), "own qkv, o, down"),
    "own qkv, o, down": Launched(("qkv", "o", "down")),
    "own qkv, o, pdl": Launched(("qkv", "o"), "own qkv, o"),
    "own qkv, o": Launched(("qkv", "o")),
    "own products, pdl, nothing asked for": Launched(OWN, "own products", 0),
    "own products, pdl, twice asked for": Launched(OWN, "own products", 2 * linear.AHEAD),
}
EARLY = tuple(LAUNCHED)
OTHERS = ("eager", "without kernels", "one prediction", "with logits")
WARM = 3  # forwards until a shape is warm: eager, captured, replayed
# With other weights; those that have a goal first.
LOADED = ("fp8", *(kind for kind in gpu_models.KINDS if kind != "fp8"), "adapter")


class Passes:
    """An engine, and the cache that its passes run over."""

    def __init__(self, engine: LoadedEngine) -> None:
        self.engine = engine
        self.backend = engine.backend
        self._cache: Any = None
        self._opened = (0, 0)
        self._variant = "graphs"
        self.warm_seconds: float | None = None  # to capture the graphs of decoding, while there are all of them
        self.scripted: Any = None  # the same engine with scripted tokens, once it is made

    def cache(self, rows: int, context: int) -> Any:
        """A cache of so many rows and slots, full of random numbers."""
        if self._cache is None or self._opened != (rows, context):
            if self._cache is not None:
                self._cache.close()
            self._cache = self.backend.open(rows)
            self._opened = rows, context
            for row in range(rows):
                if not self._cache.reserve(row, 0, context):
                    raise EngineError(f"no pages for {rows} rows of {context} slots")
            memory = self.backend.memory
            with self.backend.device.use(gpu_models.CARRIED):
                # No prompt is run: what K and V hold does not change the time.
                memory.pool.pages[:, :, 1 : int(memory.pages.table.max()) + 1].normal_()
        return self._cache

    def vary(self, variant: str) -> None:
        """Run another variant from here on, and forget what was captured."""
        if variant != self._variant:
            is_gpu = self.backend.device.is_gpu
            # Without kernels a graph would look at the whole pool (runtime/engines/torch/plain.py).
            self.backend.steps.graphs = variant not in ("eager", "without kernels") and is_gpu
            way = LAUNCHED.get(variant, Launched())
            early = way.off is not None and self.backend.device.overlaps_launches
            self.backend.model.vary(variant != "without kernels" and is_gpu, early, way.own)
            self.backend.steps.forget()
            self.warm_seconds = None
            self._variant = variant

    def pass_of(self, context: int, size: int, variant: str = "graphs") -> Pass:
        """A decode pass of one token, or a block whose every token is predicted, at the end of a context."""
        mask, at, logits = self.engine.info.model.mask_id, context - size, variant == "with logits"
        pass_ = causal("decode", [mask + 1], at, logits=logits)
        if size > 1:
            pass_ = bidirectional("denoise", [mask] * size, at, 0.9, logits=logits)
        if variant == "one prediction":
            pass_ = pass_._replace(predicted=pass_.predicted[-1:])
        return pass_

    def run(self, lab: Lab, rows: int, context: int, size: int, variant: str = "graphs") -> Figures:
        """Time one shape of a pass."""
        card = lab.card
        self.vary(variant)
        cache = self.cache(rows, context)
        card.start_peak()
        passes = [self.pass_of(context, size, variant)] * rows
        with mock.patch.object(linear, "AHEAD", LAUNCHED.get(variant, Launched()).ahead):
            for _ in range(WARM):
                chosen = cache.forward(passes)
        device, wall = [], []
        for _ in card.rounds():
            started = time.perf_counter()
            cache.forward(passes)
            wall.append(time.perf_counter() - started)
            device.append(card.step_seconds())
        figures = {"device_us": statistics.median(device) * 1e6, "wall_us": statistics.median(wall) * 1e6}
        figures["choice"] = zlib.crc32(b"".join(p.token.tobytes() + p.confidence.tobytes() for p in chosen))
        reasons = sorted(set(self.backend.eager_shapes.values())) if self.backend.steps.graphs else []
        return {**figures, "not_captured": reasons} if reasons else figures


def passes(lab: Lab, shape: str, dtype: str, variant: str | None = None) -> Passes:
    """The engine of a shape, held."""
    return lab.hold(("engine", shape, variant), lambda: Passes(gpu_models.load(shape, dtype, lab.card, variant)))


def measured(lab: Lab, config: RunConfig, shape: str, rows: int, context: int, size: int) -> Figures:
    """One cell of the table."""
    work = gpu_models.work(shape, config.dtype)
    figures = passes(lab, shape, config.dtype).run(lab, rows, context, size)
    seconds = figures["device_us"] / 1e6
    moved, operations = work.moved(rows, context), work.operations(rows, context, size)
    least = [
        moved / lab.ceilings["copy_bytes_per_second"],
        operations / lab.ceilings["matrix_operations_per_second"],
    ]
    return {
        "rows": rows,
        "context": context,
        "tokens": size,
        **figures,
        "bytes": moved,
        "operations": operations,
        "bound": "memory" if least[0] >= least[1] else "matrix",
        "to_ceiling": max(least) / seconds,
        "over_weight_bytes": seconds * lab.ceilings["copy_bytes_per_second"] / work.read_bytes,
        "peak_bytes": lab.card.peak(),
    }


def cells(config: RunConfig, shape: str, rows: tuple[int, ...]) -> Iterator[Cell]:
    """The table of some row counts, the short contexts first."""
    work, scale = gpu_models.work(shape, config.dtype), config.scale
    for count in rows:
        for context in scale.contexts:
            for size in scale.sizes:

                def measure(lab: Lab, count: int = count, context: int = context, size: int = size) -> Figures:
                    return measured(lab, config, shape, count, context, size)

                one = seconds(work, count, context, size)
                estimate = 0.3 + 8 * one
                key = f"rows {count} context {context} tokens {size}"
                yield Cell("forward", shape, key, work.memory(count, context, size), estimate, measure)


def variant_cells(config: RunConfig, shape: str, variants: tuple[str, ...]) -> Iterator[Cell]:
    """Ways to run one engine, some in a short context too: kernels that begin early, eager, plain torch, logits."""
    short, middle = config.scale.contexts[:2]
    for context in (short, middle):
        for variant in variants:
            if variant in LAUNCHED if context == short else variant in (*OTHERS, "graphs", "pdl", OWN_PRODUCTS):
                quick, compiles = variant in ("graphs", "one prediction"), variant.startswith("own ")
                slow = 1.0 if quick else 5.0 if compiles else 3.0
                yield _variant_cell(config, shape, variant, context, slow)


def loaded_cells(config: RunConfig, shape: str) -> Iterator[Cell]:
    """Engines with other weights: the adapter, few bits."""
    for variant in LOADED:
        yield _variant_cell(config, shape, variant, config.scale.contexts[1], 1.0)


def _variant_cell(config: RunConfig, shape: str, variant: str, context: int, slow: float) -> Cell:
    work = gpu_models.work(shape, config.dtype)

    def measure(lab: Lab) -> Figures:
        figures: Figures = {"variant": variant, "context": context}
        engine = passes(lab, shape, config.dtype, variant if variant in LOADED else None)
        for size in (1, max(s for s in config.scale.sizes if s <= 32)):
            one = engine.run(lab, 1, context, size, "graphs" if variant in LOADED else variant)
            if variant in LAUNCHED and (off := LAUNCHED[variant].off):  # the same passes over the same K and V
                other = engine.run(lab, 1, context, size, off)
                one |= {"off_device_us": other["device_us"], "same_choice": one["choice"] == other["choice"]}
            copied = work.read_bytes / lab.ceilings["copy_bytes_per_second"]
            figures[str(size)] = one | {"over_weight_bytes": one["device_us"] / 1e6 / copied}
        return figures

    nbytes = work.memory(1, context, 32)
    return Cell("variants", shape, f"{variant} context {context}", nbytes, 2 * slow, measure)


def seconds(work: gpu_models.Work, rows: int, context: int, size: int) -> float:
    """A pass on an H100, about; for estimates alone."""
    return max(work.moved(rows, context) / 2.5e12, work.operations(rows, context, size) / 4e14)
