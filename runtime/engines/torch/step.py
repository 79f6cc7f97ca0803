"""What runs passes of one shape: its buffers, and its graph once it is captured."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ....contract import PAGE
from ....engine_info import EngineInfo
from ..engine import Pass
from .device import Buffer, Graph, TorchDevice
from .flat import FREE, FlatShape, Source, fed_tokens, fill, flat_layouts, rounded_shape
from .kernel_cache import KernelCache
from .memory import Change, Memory
from .model import TorchModel
from .plain import View

if TYPE_CHECKING:
    from torch import Tensor

_KEPT_SHAPES = 128  # without graphs, each with its buffers


class Steps:
    """The steps of a model over a memory, by shape.

    Args:
        folder: of the engine, where compiled kernels are kept.
        device: where they run.
        model: what runs.
        memory: what it reads and writes.
        info: the engine's description.
        shapes: those worth a graph, which is captured when they come again; others run eagerly.
        graphs: capture any.
    """

    def __init__(
        self,
        folder: Path,
        device: TorchDevice,
        model: TorchModel,
        memory: Memory,
        info: EngineInfo,
        shapes: list[FlatShape],
        graphs: bool,
    ) -> None:
        self.device = device
        self.model = model
        self.memory = memory
        self.info = info
        self.shapes = shapes
        self._wanted = frozenset(shapes)
        self.graphs = graphs
        self.kernels = KernelCache(folder) if model.kernels else None
        self.eager_shapes: dict[FlatShape, str] = {}  # shapes that cannot be captured, and why
        self.captured = 0  # graphs made so far
        # Of steps of few predictions, for all of them: a reader's copy stands in the stream before the next.
        self._place: Tensor | None = None  # of logits, (FREE, V) f32
        # The results of steps of so few predictions lie in one place, where the next one finds them.
        self.most_fed = fed_tokens(info)
        self.results = device.bytes(flat_layouts(FlatShape(1, self.most_fed), info)[1].nbytes)
        self.forget()

    def forget(self) -> None:
        """Drop all buffers and graphs; the next ones share a memory of their own."""
        self._steps: dict[FlatShape, Step] = {}
        self.pool = self.device.graph_pool()

    def __len__(self) -> int:
        return len(self._steps)

    def rounded(self, shape: FlatShape) -> FlatShape:
        """The shape that runs a forward; where there are graphs, one that may be fed is captured for both."""
        if not self.graphs:
            return shape
        shape = rounded_shape(shape)
        feedable = shape._replace(fed=shape.fed or 1)
        return feedable if feedable in self._wanted else shape

    def of(self, shape: FlatShape) -> Step:
        """The step of a shape."""
        step = self._steps.pop(shape, None) or Step(self, shape)
        self._steps[shape] = step  # the last used comes last
        if not self.graphs and len(self._steps) > _KEPT_SHAPES:
            del self._steps[next(iter(self._steps))]
        return step

    def refused(self, shape: FlatShape, reason: str) -> None:
        """Take note that a shape cannot be captured. A pool that no graph holds has gone with it."""
        self.eager_shapes[shape] = reason
        if not any(step.is_captured for step in self._steps.values()):
            self.pool = self.device.graph_pool()

    def place(self, shape: FlatShape) -> Tensor | None:
        """Where steps of a shape leave their logits, (R, V) f32, and where more are only drawn from, (FREE, V).

        None where there are none, and where a step keeps more than FREE, in memory of its own.
        """
        import torch

        if not (shape.logits or shape.sampled) or (shape.logits and shape.predicted > FREE):
            return None
        if self._place is None:
            self._place = self.device.zeros((FREE, self.info.model.vocab_size), torch.float32)
        return self._place[: shape.predicted]


class SharedForward(NamedTuple):
    """A forward as rank 0 sends it to the others; `news` are changes of the memory since the one before."""

    shape: FlatShape
    inputs: bytes
    views: list[View] | None
    news: list[Change]


class Step:
    """The buffers of a shape, and its graph."""

    def __init__(self, owner: Steps, shape: FlatShape) -> None:
        self.shape = shape
        self._owner = owner
        inputs, outputs = flat_layouts(shape, owner.info)
        self._inputs: Buffer = owner.device.buffer(inputs)
        feeds = shape.predicted <= owner.most_fed
        self.outputs: Buffer = owner.device.buffer(outputs, owner.results if feeds else None)
        self.apart = outputs.places["next_ids"][0] // 4  # from a prediction's token to its next id
        self._place = owner.place(shape)
        self.logits = self._place if shape.logits else None  # (R, V) f32
        self._eager = not owner.graphs or shape not in owner.shapes
        self._views: list[View] | None = None  # for plain torch
        self._graph: Graph | None = None
        self._runs = 0

    @property
    def is_captured(self) -> bool:
        """Whether it has a graph."""
        return self._graph is not None

    def fill(self, passes: Sequence[Pass], rows: Sequence[int], sources: Sequence[Source] = ()) -> None:
        """Write a forward's inputs on the host; a captured forward knows nothing else of the passes."""
        owner = self._owner
        fill(self._inputs.arrays, passes, rows, owner.memory.pages, owner.model.config.mask_id, sources)
        if owner.model.kernels or not self._eager:
            return
        self._views = []
        at = 0
        shifts = [source.size if source.feed == "accepted" else 0 for source in sources] or [0] * len(passes)
        for p, row, shift in zip(passes, rows, shifts, strict=True):
            seen = max(int(p.visible[:, 0].max()) + shift, int(p.visible[:, 2].max()))
            self._views.append(View(at, at + p.ids.size, row, -(-seen // PAGE)))
            at += p.ids.size
        if at < self.shape.tokens:  # those that fill up a rounded shape, which see a slot of the scratch page
            self._views.append(View(at, self.shape.tokens, 0, 1))

    def run(self) -> None:
        """Put the work into the stream: eager when the shape first comes, which compiles kernels, then its graph."""
        owner = self._owner
        ranks = owner.model.ranks
        if ranks is None:
            self._run()
            return
        with ranks.watched():
            ranks.tell(SharedForward(self.shape, self._inputs.host.numpy().tobytes(), self._views, owner.memory.news()))
            self._run()

    def forget_logits(self) -> None:
        """They have been read, or never will be; many of them would hold much memory."""
        if self._place is None:
            self.logits = None

    def repeat(self, forward: SharedForward) -> None:
        """Run what rank 0 runs."""
        self._inputs.host.numpy()[:] = np.frombuffer(forward.inputs, np.uint8)
        self._views = forward.views
        self._run()
        self.forget_logits()

    def _run(self) -> None:
        self._runs += 1
        if self._runs == 2 and not self._eager:
            self._capture()
        if self._graph is None:
            self._work()
        else:
            self._graph.replay()

    def _capture(self) -> None:
        owner = self._owner
        captured = owner.device.capture(self._work, owner.pool)
        if isinstance(captured, str):
            owner.refused(self.shape, captured)
        else:
            self._graph = captured
            owner.captured += 1

    def _work(self) -> None:
        """All that a graph holds: upload, network, download."""
        kernels = self._owner.kernels
        with contextlib.nullcontext() if kernels is None else kernels.use():
            self._compute()

    def _compute(self) -> None:
        import torch

        owner = self._owner
        device = owner.device
        memory = owner.memory
        device.upload(self._inputs)
        inputs = self._inputs.tensors
        if self.shape.fed:
            owner.model.advance(inputs, owner.results.view(torch.int32), memory.table)
        place = self._place
        if self.shape.logits and place is None:
            place = self.logits = device.zeros((self.shape.predicted, owner.info.model.vocab_size), torch.float32)
        owner.model.forward(inputs, self.outputs.tensors, memory.pool, memory.table, self._views, place)
        device.download(self.outputs)
