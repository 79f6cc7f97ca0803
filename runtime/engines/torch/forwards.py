"""Forwards one at a time: their buffers and graphs by shape, and the one under way."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ....engine_folder import EngineInfo
from ..engine import Pass, Prediction, read_only
from ..pages import PAGE
from .device import Buffer, Graph, TorchDevice
from .flat import FlatShape, fill, flat_layouts, flat_shape, rounded_shape
from .kernel_cache import KernelCache
from .memory import Change, Memory
from .model import TorchModel
from .plain import View

if TYPE_CHECKING:
    from torch import Tensor

    from .ranks import Ranks

_KEPT_SHAPES = 128  # without graphs, each with its buffers


class Forwards:
    """What runs forwards of a model over a memory.

    Args:
        folder: of the engine, for messages.
        device: where they run.
        model: what runs.
        memory: what it reads and writes.
        info: the engine's description.
        graphs: round shapes up and capture them.
        lock: held by whoever uses the stream or the memory.
    """

    def __init__(
        self,
        folder: Path,
        device: TorchDevice,
        model: TorchModel,
        memory: Memory,
        info: EngineInfo,
        graphs: bool,
        lock: threading.RLock,
    ) -> None:
        self.folder = folder
        self.device = device
        self.model = model
        self.memory = memory
        self.info = info
        self.graphs = graphs
        self.lock: Any = lock
        self.kernels = KernelCache(folder) if model.kernels else None
        self.eager_shapes: dict[FlatShape, str] = {}  # shapes that cannot be captured, and why
        self.captured = 0  # graphs made so far
        self.flight: TorchFlight | None = None
        self.forget()

    def forget(self) -> None:
        """Drop all buffers and graphs; the next ones share a memory of their own."""
        self._steps: dict[FlatShape, Step] = {}
        self.pool = self.device.graph_pool()

    def launch(self, passes: Sequence[Pass], rows: Sequence[int]) -> TorchFlight:
        """Start a forward over rows of the page table, after the one before has ended."""
        shape = flat_shape(passes)
        with self.lock, self.device.use(self.folder):
            self.settle()
            self.flight = TorchFlight(self, self._step(rounded_shape(shape) if self.graphs else shape), passes, rows)
            return self.flight

    def settle(self) -> None:
        """Wait for the forward under way."""
        if self.flight is not None:
            self.flight.finish()

    def follow(self, ranks: Ranks) -> None:
        """Run the forwards of rank 0 until it ends."""
        while (told := ranks.hear()) is not None:
            with self.device.use(self.folder):
                self.memory.follow(told.news)
                step = self._step(told.shape)
                step.repeat(told)
                self.device.wait(self.device.mark())

    def warm_up(self, shapes: Iterable[FlatShape]) -> None:
        """Compile and capture some shapes."""
        for shape in shapes:
            with self.lock, self.device.use(self.folder):
                step = self._step(shape)
                step.fill([], [])
                for _ in range(2):  # eager, then captured
                    step.run()
                self.device.wait(self.device.mark())

    def _step(self, shape: FlatShape) -> Step:
        step = self._steps.pop(shape, None) or Step(self, shape)
        self._steps[shape] = step  # the last used comes last
        if not self.graphs and len(self._steps) > _KEPT_SHAPES:
            del self._steps[next(iter(self._steps))]
        return step


class Told(NamedTuple):
    """A forward as rank 0 tells it to the others; `news` are changes of the memory since the one before."""

    shape: FlatShape
    inputs: bytes
    views: list[View] | None
    news: list[Change]


class Step:
    """The buffers of a shape, and its graph once it is captured."""

    def __init__(self, owner: Forwards, shape: FlatShape) -> None:
        self._owner = owner
        self._shape = shape
        inputs, outputs = flat_layouts(shape, owner.info)
        self._inputs: Buffer = owner.device.buffer(inputs)
        self.outputs: Buffer = owner.device.buffer(outputs)
        self.logits: Tensor | None = None
        self._views: list[View] | None = None
        self._graph: Graph | None = None
        self._runs = 0

    def fill(self, passes: Sequence[Pass], rows: Sequence[int]) -> None:
        """Write a forward's inputs on the host; a captured forward knows nothing else of the passes."""
        owner = self._owner
        fill(self._inputs.arrays, passes, rows, owner.memory.pages, owner.model.config.mask_id)
        if owner.graphs:
            return
        self._views = []
        at = 0
        for p, row in zip(passes, rows, strict=True):
            seen = max(int(p.visible[:, 0].max()), int(p.visible[:, 2].max()))
            self._views.append(View(at, at + p.ids.size, row, -(-seen // PAGE)))
            at += p.ids.size

    def run(self) -> None:
        """Put the work into the stream: eager when the shape first comes, which compiles kernels, then captured."""
        owner = self._owner
        ranks = owner.model.ranks
        if ranks is None:
            self._run()
            return
        with ranks.watched():
            ranks.tell(Told(self._shape, self._inputs.host.numpy().tobytes(), self._views, owner.memory.news()))
            self._run()

    def repeat(self, told: Told) -> None:
        """Run what rank 0 runs."""
        self._inputs.host.numpy()[:] = np.frombuffer(told.inputs, np.uint8)
        self._views = told.views
        self._run()

    def _run(self) -> None:
        self._runs += 1
        if self._runs == 2 and self._owner.graphs:
            self._capture()
        if self._graph is None:
            self._work()
        else:
            self._graph.replay()

    def _capture(self) -> None:
        owner = self._owner
        captured = owner.device.capture(self._work, owner.pool)
        if isinstance(captured, str):
            owner.eager_shapes[self._shape] = captured
        else:
            self._graph = captured
            owner.captured += 1

    def _work(self) -> None:
        """All that a graph holds: upload, network, download."""
        kernels = self._owner.kernels
        with contextlib.nullcontext() if kernels is None else kernels.use():
            self._compute()

    def _compute(self) -> None:
        device, model, memory = self._owner.device, self._owner.model, self._owner.memory
        device.upload(self._inputs)
        # Kept, so that a replay writes the logits to the same place.
        self.logits = model.forward(
            self._inputs.tensors, self.outputs.tensors, memory.pool, memory.table, self._views, self._shape.logits
        )
        device.download(self.outputs)


class TorchFlight:
    """A forward under way; on a GPU it runs while the host does something else, on a CPU when it is finished."""

    def __init__(self, owner: Forwards, step: Step, passes: Sequence[Pass], rows: Sequence[int]) -> None:
        self.seconds = 0.0
        self._owner = owner
        self._step = step
        self._passes = passes
        self._logits: dict[int, Tensor] = {}
        self._predictions: list[Prediction] | None = None
        self._start: Callable[[], Any] | None = self._started
        self._mark: Any = None
        step.fill(passes, rows)
        if owner.device.is_gpu:
            self._started()

    def finish(self) -> list[Prediction]:
        """See `engine.Flight`."""
        owner = self._owner
        with owner.lock:
            if self._predictions is None:
                with owner.device.use(owner.folder):
                    if self._start is not None:
                        self._start()
                    owner.device.wait(self._mark)
                self.seconds = time.perf_counter() - self._began
                self._predictions = self._read()
                if owner.flight is self:
                    owner.flight = None
            return self._predictions

    def _started(self) -> None:
        """Put everything into the stream."""
        device, step = self._owner.device, self._step
        self._start = None
        self._began = time.perf_counter()
        self._owner.memory.show_table()
        step.run()
        begin = 0
        for number, p in enumerate(self._passes):
            end = begin + p.predicted.size
            if p.logits and step.logits is not None:
                self._logits[number] = device.fetch(step.logits[begin:end])
            begin = end
        self._mark = device.mark()

    def _read(self) -> list[Prediction]:
        """Copies, since the next forward writes into the same buffers."""
        results = {name: read_only(array.copy()) for name, array in self._step.outputs.arrays.items()}
        predictions = []
        begin = 0
        for number, p in enumerate(self._passes):
            here = slice(begin, begin + p.predicted.size)
            begin = here.stop
            logits = read_only(self._logits[number].numpy()) if number in self._logits else None
            token, confidence, next_ids = (results[name][here] for name in ("token", "confidence", "next_ids"))
            predictions.append(Prediction(token, confidence, next_ids, logits))
        return predictions
