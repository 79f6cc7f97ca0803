"""The torch engine: `TorchModel` over caches that grow with use, on the CPU or on a GPU.

On a GPU a forward is one upload, the network and one download: eager when its shape first comes, which compiles the
kernels, then captured as a CUDA graph and replayed. A graph needs whole caches, and S and R rounded up to powers of two
to be used again. The CPU has no graphs, so there a pass costs by its tokens and attention ends where the longest row
does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from ....contract import cache_names
from ....engine_folder import EngineInfo
from ...images.image import Image
from ..engine import Pass, Prediction, read_only
from ..layout import PassShape, fill, layouts, rounded
from .device import Buffer, Graph, TorchDevice
from .model import TorchModel
from .vision import TorchVision

if TYPE_CHECKING:
    from torch import Tensor

FIRST_CAPACITY = {False: 256, True: 4096}  # slots of a new cache, without graphs and with; growing drops all graphs
_KEPT_SHAPES = 128  # per cache, each with buffers and perhaps a graph
_KEPT_WITH_LOGITS = 8  # of those, shapes whose graph keeps a vocabulary per token
_KEPT_CACHES = 4  # closed ones


class TorchEngine:
    """An engine folder loaded into torch.

    Args:
        folder: the engine folder.
        info: its description, from `engine_folder.read_engine`.
        device: a GPU's number, "cpu", None for a GPU if there is one, or a device made before.
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
        self.info = info
        self.folder = folder
        self.graphs = self.device.is_gpu if graphs is None else graphs
        self.static = self.device.is_gpu or self.graphs  # shapes are rounded and caches taken whole
        with self.device.use(folder):
            self.model = TorchModel(folder, info, self.device.name, self.device.is_gpu if kernels is None else kernels)
            self._vision = TorchVision(folder, info, self.device.name) if info.model.vision else None
        self.samples = self.model.kernels
        self._closed: list[TorchCache] = []
        self.lock = threading.RLock()  # of the stream and _closed: requests may run in several threads
        self.eager_shapes: dict[PassShape, str] = {}  # shapes that cannot be captured, and why
        self.captured = 0  # graphs made since the engine was loaded

    def open(self, rows: int) -> TorchCache:
        """A cache of at least `rows` rows: a closed one with its graphs if there is one, else a new one."""
        with self.lock:
            large_enough = [cache for cache in self._closed if cache.rows >= rows]
            if not large_enough:
                return TorchCache(self, rows)
            cache = min(large_enough, key=lambda cache: cache.rows)
            self._closed.remove(cache)
            cache.seconds = 0.0
            return cache

    def see(self, image: Image) -> np.ndarray:
        """See `engine.SeeingEngine.see`."""
        assert self._vision is not None
        with self.lock, self.device.use(self.folder):
            return self._vision.see(image)

    def take_back(self, cache: TorchCache) -> None:
        """Keep a closed cache for the next request; on a CPU not one that has grown, for its memory."""
        if cache.capacity <= FIRST_CAPACITY[False] or self.static:
            with self.lock:
                self._closed = [*self._closed, cache][-_KEPT_CACHES:]

    def make_room(self, nbytes: int) -> None:
        """Let closed caches go if a GPU has fewer than `nbytes` free."""
        if self._closed and self.device.free() < nbytes:
            self._closed.clear()


class TorchCache:
    """K/V (rows, G, T, D) per layer on the device, and the shapes of passes over them."""

    def __init__(self, engine: TorchEngine, rows: int) -> None:
        self.rows = rows
        self.seconds = 0.0
        self.capacity = 0  # slots per row now allocated
        self._engine = engine
        self._mask_id = engine.info.model.mask_id
        self.caches: list[tuple[Tensor, Tensor]] = []
        self._steps: dict[PassShape, _Step] = {}

    def forward(self, passes: Sequence[Pass], first: int = 0) -> list[Prediction]:
        """See `engine.Cache.forward`; `passes[i]` is of row `first + i`."""
        engine = self._engine
        tokens = max(p.ids.size for p in passes)
        predicted = max(1, *(p.predicted.size for p in passes))
        if engine.static:
            tokens = rounded(tokens, 2**31)
            predicted = rounded(predicted, tokens)
        shape = PassShape(
            first,
            len(passes),
            tokens,
            predicted,
            logits=any(p.logits for p in passes),
            sampled=any(p.temperature for p in passes),
            embedded=any(p.embedded is not None for p in passes),
        )
        with engine.lock, engine.device.use(engine.folder):
            self._reserve(max(p.write_at for p in passes) + tokens)
            step = self._step(shape)
            for row, p in enumerate(passes):
                fill(step.inputs.arrays, row, p, self._mask_id)
            started = time.perf_counter()
            logits = step.run([row for row, p in enumerate(passes) if p.logits])
            self.seconds += time.perf_counter() - started
            return [step.prediction(row, p.predicted.size, logits.get(row)) for row, p in enumerate(passes)]

    def move(self, source: int, target: int, slots: int) -> None:
        """See `engine.Cache.move`."""
        engine = self._engine
        with engine.lock, engine.device.use(engine.folder):
            for pair in self.caches:
                for cache in pair:
                    cache[target, :, :slots] = cache[source, :, :slots]

    def read(self, row: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """See `engine.ReadableCache.read`."""
        engine = self._engine
        with engine.lock, engine.device.use(engine.folder):
            held = [cache[row, :, start:stop].float().cpu().numpy() for pair in self.caches for cache in pair]
        return dict(zip(cache_names(engine.info.model.num_layers), held, strict=True))

    def free(self, row: int) -> None:
        """See `engine.Cache.free`; nothing to do, as T is the same for a row of any length."""

    def close(self) -> None:
        """See `engine.Cache.close`."""
        self._engine.take_back(self)

    def _reserve(self, slots: int) -> None:
        """Grow every cache to at least `slots` by doubling; a fresh slot is 0, since 0 times NaN is NaN."""
        import torch

        if slots <= self.capacity:
            return
        engine = self._engine
        model = engine.info.model
        new = max(self.capacity, FIRST_CAPACITY[engine.static])
        while new < slots:
            new *= 2
        self._steps.clear()
        size = (self.rows, model.num_kv_heads, new, model.head_dim)
        dtype = engine.model.dtype
        engine.make_room((model.num_layers + 1) * 2 * int(np.prod(size)) * dtype.itemsize)

        def grown(old: Tensor | None) -> Tensor:
            cache = torch.zeros(size, dtype=dtype, device=engine.device.name)
            if old is not None:
                cache[:, :, : self.capacity] = old
            return cache

        for layer in range(model.num_layers):  # one after the other, so that little is held twice
            if self.capacity:
                k, v = self.caches[layer]
                self.caches[layer] = grown(k), grown(v)
            else:
                self.caches.append((grown(None), grown(None)))
        self.capacity = new

    def _step(self, shape: PassShape) -> _Step:
        step = self._steps.pop(shape, None) or _Step(self._engine, self, shape)
        self._steps[shape] = step  # the last used comes last
        keeps_logits = _keeps_logits(shape)
        alike = [other for other in self._steps if _keeps_logits(other) == keeps_logits]
        if len(alike) > (_KEPT_WITH_LOGITS if keeps_logits else _KEPT_SHAPES):
            del self._steps[alike[0]]
        return step


def _keeps_logits(shape: PassShape) -> bool:
    return shape.logits or shape.sampled


class _Step:
    """One shape of a forward: its buffers, its rows of the caches, perhaps its graph."""

    def __init__(self, engine: TorchEngine, cache: TorchCache, shape: PassShape) -> None:
        self._engine = engine
        self._shape = shape
        self._capacity = cache.capacity
        self._runs = 0
        input_layout, output_layout = layouts(engine.info, shape)
        self.inputs: Buffer = engine.device.buffer(input_layout)
        self._outputs: Buffer = engine.device.buffer(output_layout)
        self._results = {name: read_only(array) for name, array in self._outputs.arrays.items()}
        rows = slice(shape.first, shape.first + shape.rows)
        self._caches = [(k[rows], v[rows]) for k, v in cache.caches]
        self._graph: Graph | None = None
        self._logits: Tensor | None = None

    def run(self, rows_with_logits: list[int]) -> dict[int, np.ndarray]:
        """Run the network over the buffers; some rows' logits (R, V) f32, as views that the next run changes."""
        engine = self._engine
        self._runs += 1
        if self._runs == 2 and engine.graphs:
            self._capture()
        if self._graph is None:
            self._work()
        else:
            self._graph.replay()
        fetched = {}
        if self._logits is not None:
            fetched = {row: engine.device.fetch(self._logits[row]) for row in rows_with_logits}
        engine.device.wait()
        return {row: read_only(tensor.numpy()) for row, tensor in fetched.items()}

    def prediction(self, row: int, count: int, logits: np.ndarray | None) -> Prediction:
        """One row's results as views."""
        return Prediction(
            self._results["token"][row, :count],
            self._results["confidence"][row, :count],
            self._results["next_ids"][row, :count],
            None if logits is None else logits[:count],
        )

    def _capture(self) -> None:
        captured = self._engine.device.capture(self._work)
        if isinstance(captured, str):
            self._engine.eager_shapes[self._shape] = captured
        else:
            self._graph = captured
            self._engine.captured += 1

    def _work(self) -> None:
        """All that a graph holds: upload, network, download."""
        engine = self._engine
        end = self._capacity
        if not engine.static:
            end = min(end, int(self.inputs.arrays["visible"][:, :, ::2].max()))
        engine.device.upload(self.inputs)
        # Kept, so that a replay writes the logits to the same place.
        self._logits = engine.model.forward(
            self.inputs.tensors, self._outputs.tensors, self._caches, end, self._shape.logits
        )
        engine.device.download(self._outputs)
