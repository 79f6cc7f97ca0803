"""The torch engine: `TorchModel` over caches that grow with use, on the CPU or on a GPU.

In: an engine folder. Out: an `Engine`. On a GPU a forward is one upload, the network and one download; eager when its
shape first comes, which compiles the kernels, then captured as a CUDA graph and replayed. The surprising fact: the same
code serves both, and what a graph needs, whole caches and S and R rounded up to powers of two, is what the CPU leaves
out: there a pass costs by its tokens and attention ends where the longest row does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from ....engine_folder import EngineInfo
from ..engine import Pass, Prediction
from ..layout import fill, layouts, rounded
from .device import Buffer, Graph, TorchDevice
from .model import TorchModel

if TYPE_CHECKING:
    from torch import Tensor

FIRST_CAPACITY = {False: 256, True: 4096}  # slots of a new cache, without graphs and with; growing drops all graphs
_KEPT_SHAPES = 128  # per cache, each with buffers and perhaps a graph
_KEPT_WITH_LOGITS = 8  # of those, shapes whose graph keeps a vocabulary per token
_KEPT_CACHES = 4  # closed ones
Shape = tuple[int, int, int, int, bool, bool]  # first row, rows, S, R, with logits or not, sampled or not


class TorchEngine:
    """An engine folder loaded into torch.

    Args:
        folder: the engine folder.
        info: its description, from `contract.read_engine`.
        device: a GPU's number, "cpu", None for a GPU if there is one, or the device itself.
        threads: CPU threads, for all of torch in this process; None leaves torch's choice.
        kernels: run the project's Triton kernels; default on a GPU.
        graphs: capture CUDA graphs; default on a GPU. False runs every pass eagerly, for comparison.

    Raises:
        EngineError: torch is missing, or the weights do not belong to the description, or do not fit.
        RequestError: there is no such device.
    """

    def __init__(
        self,
        folder: Path,
        info: EngineInfo,
        device: int | Literal["cpu"] | TorchDevice | None = None,
        threads: int | None = None,
        *,
        kernels: bool | None = None,
        graphs: bool | None = None,
    ) -> None:
        self.device = device if isinstance(device, TorchDevice) else TorchDevice(folder, device, threads)
        self.info, self.folder = info, folder
        self.graphs = self.device.is_gpu if graphs is None else graphs
        self.static = self.device.is_gpu or self.graphs  # shapes are rounded and caches taken whole
        with self.device.use(folder):
            self.model = TorchModel(folder, info, self.device.name, self.device.is_gpu if kernels is None else kernels)
        self.samples = self.model.kernels
        self._closed: list[TorchCache] = []
        self.lock = threading.RLock()  # of the stream and _closed: requests may run in several threads
        self.eager_shapes: dict[Shape, str] = {}  # shapes that cannot be captured, and why
        self.captured = 0  # graphs made since the engine was loaded

    def open(self, rows: int) -> TorchCache:
        """A cache of at least `rows` rows: a closed one with its graphs if there is one, else a new one."""
        with self.lock:
            found = min((c for c in self._closed if c.rows >= rows), key=lambda c: c.rows, default=None)
            if found is None:
                return TorchCache(self, rows)
            self._closed.remove(found)
            found.seconds = 0.0
            return found

    def take_back(self, cache: TorchCache) -> None:
        """Keep a closed cache for the next request; on a CPU not one that has grown, for its memory."""
        if cache.capacity <= FIRST_CAPACITY[False] or self.static:
            with self.lock:
                self._closed = [*self._closed, cache][-_KEPT_CACHES:]

    def make_room(self, wanted: int) -> None:
        """Let closed caches go if a GPU has fewer than `wanted` bytes free."""
        if self._closed and self.device.free() < wanted:
            self._closed.clear()


class TorchCache:
    """K/V (rows, G, T, D) per layer on the device, and the shapes of passes over them."""

    def __init__(self, engine: TorchEngine, rows: int) -> None:
        self.rows, self.seconds, self.capacity, self._engine = rows, 0.0, 0, engine
        self._mask_id = engine.info.model.mask_id
        self.caches: list[tuple[Tensor, Tensor]] = []
        self._steps: dict[Shape, _Step] = {}

    def forward(self, passes: Sequence[Pass], first: int = 0) -> list[Prediction]:
        """See `engine.Cache.forward`; `passes[i]` is of row `first + i`."""
        engine = self._engine
        size, predicted = max(p.ids.size for p in passes), max(1, *(p.predicted.size for p in passes))
        logits, sampled = any(p.logits for p in passes), any(p.temperature for p in passes)
        if engine.static:
            size, predicted = rounded(size, 2**31), rounded(predicted, size)
        shape = (first, len(passes), size, predicted, logits, sampled)
        with engine.lock, engine.device.use(engine.folder):
            self._reserve(max(p.write_at for p in passes) + size)
            step = self._step(shape)
            for row, p in enumerate(passes):
                fill(step.given.arrays, row, p, self._mask_id)
            started = time.perf_counter()
            found = step.run([row for row, p in enumerate(passes) if p.logits])
            self.seconds += time.perf_counter() - started
            return [step.prediction(row, p.predicted.size, found.get(row)) for row, p in enumerate(passes)]

    def move(self, source: int, target: int, slots: int) -> None:
        """See `engine.Cache.move`."""
        engine = self._engine
        with engine.lock, engine.device.use(engine.folder):
            for pair in self.caches:
                for cache in pair:
                    cache[target, :, :slots] = cache[source, :, :slots]

    def close(self) -> None:
        """See `engine.Cache.close`."""
        self._engine.take_back(self)

    def _reserve(self, slots: int) -> None:
        """Grow every cache to at least `slots` by doubling; a fresh slot is 0, since 0 times NaN is NaN."""
        import torch

        if slots <= self.capacity:
            return
        engine, model = self._engine, self._engine.info.model
        new = max(self.capacity, FIRST_CAPACITY[engine.static])
        while new < slots:
            new *= 2
        self._steps.clear()
        size = (self.rows, model.num_kv_heads, new, model.head_dim)
        dtype = engine.model.dtype
        engine.make_room((model.num_layers + 1) * 2 * int(np.prod(size)) * dtype.itemsize)

        def grown(old: Tensor | None) -> Tensor:
            made = torch.zeros(size, dtype=dtype, device=engine.device.name)
            if old is not None:
                made[:, :, : self.capacity] = old
            return made

        for layer in range(model.num_layers):  # one after the other, so that little is held twice
            if self.capacity:
                k, v = self.caches[layer]
                self.caches[layer] = grown(k), grown(v)
            else:
                self.caches.append((grown(None), grown(None)))
        self.capacity = new

    def _step(self, shape: Shape) -> _Step:
        step = self._steps.pop(shape, None) or _Step(self._engine, self, shape)
        self._steps[shape] = step  # the last used comes last
        heavy = any(shape[4:])
        alike = [other for other in self._steps if any(other[4:]) == heavy]
        if len(alike) > (_KEPT_WITH_LOGITS if heavy else _KEPT_SHAPES):
            del self._steps[alike[0]]
        return step


class _Step:
    """One shape of a pass: its buffers, its rows of the caches, perhaps its graph."""

    def __init__(self, engine: TorchEngine, cache: TorchCache, shape: Shape) -> None:
        first, rows, size, predicted, self._with_logits, sampled = self._shape = shape
        self._engine, self._capacity, self._runs = engine, cache.capacity, 0
        given, taken = layouts(engine.info, rows, size, predicted, sampled)
        self.given: Buffer = engine.device.buffer(given)
        self._taken: Buffer = engine.device.buffer(taken)
        self._caches = [(k[first : first + rows], v[first : first + rows]) for k, v in cache.caches]
        self._graph: Graph | None = None
        self._logits: Tensor | None = None

    def run(self, pass_: list[int]) -> dict[int, np.ndarray]:
        """Run the pass over the buffers; logits (R, V) f32 of the rows that ask, as views that the next run changes."""
        engine = self._engine
        self._runs += 1
        if self._runs == 2 and engine.graphs:
            self._capture()
        if self._graph is None:
            self._work()
        else:
            self._graph.replay()
        fetched = {row: engine.device.fetch(self._logits[row]) for row in pass_ if self._logits is not None}
        engine.device.wait()
        return {row: tensor.numpy() for row, tensor in fetched.items()}

    def prediction(self, row: int, count: int, logits: np.ndarray | None) -> Prediction:
        """One row's results as views."""
        taken = self._taken.arrays
        return Prediction(
            taken["token"][row, :count],
            taken["confidence"][row, :count],
            taken["next_ids"][row, :count],
            None if logits is None else logits[:count],
        )

    def _capture(self) -> None:
        made = self._engine.device.capture(self._work)
        if isinstance(made, str):
            self._engine.eager_shapes[self._shape] = made
        else:
            self._graph = made
            self._engine.captured += 1

    def _work(self) -> None:
        """All that a graph holds; the result's logits are kept, so that a replay writes them to the same place."""
        engine, end = self._engine, self._capacity
        if not engine.static:
            end = min(end, int(self.given.arrays["visible"][:, :, ::2].max()))
        engine.device.upload(self.given)
        given, taken = self.given.tensors, self._taken.tensors
        self._logits = engine.model.forward(given, taken, self._caches, end, self._with_logits)
        engine.device.download(self._taken)
