"""What runs passes of one shape: its buffers, and its graph once it is captured."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ....contract import PAGE
from ....engine_info import EngineInfo
from ..layout import Layout
from ..passes import Pass
from .device import Buffer, Graph, TorchDevice
from .flat import FREE, FlatShape, Source, fill, flat_layouts, is_arranged, rounded_shape
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
        self.graphs = graphs
        self.kernels = KernelCache(folder) if model.kernels else None
        self.eager_shapes: dict[FlatShape, str] = {}  # shapes that cannot be captured, and why
        self.captured = 0  # graphs made so far
        # Of steps of few predictions, for all of them: a reader's copy stands in the stream before the next.
        self._place: Tensor | None = None  # of logits, (FREE, V) f32
        # Of all steps too, for each turn: what is filled, and what is read.
        self._pinned: dict[tuple[int, str], Tensor] = {}
        self.forget()

    def forget(self) -> None:
        """Drop all buffers and graphs; the next ones share a memory of their own."""
        self._steps: dict[FlatShape, Step] = {}
        self.pool = self.device.graph_pool()

    def __len__(self) -> int:
        return len(self._steps)

    def rounded(self, shape: FlatShape) -> FlatShape:
        """The shape that runs a forward."""
        return rounded_shape(shape) if self.graphs else shape

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

    def pinned(self, turn: int, use: str, nbytes: int) -> Tensor:
        """Memory of the host that steps use in a turn; the largest comes first, or one before keeps its own."""
        held = self._pinned.get((turn, use))
        if held is None or len(held) < nbytes:
            held = self._pinned[turn, use] = self.device.pinned(nbytes)
        return held

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
    turn: int
    fed: bool  # by the one before
    arranged: int
    inputs: bytes
    views: list[View] | None
    news: list[Change]


@dataclasses.dataclass
class HostSide:
    """What a forward is filled with on the host, and what it leaves there."""

    inputs: Buffer
    outputs: Buffer
    views: list[View] | None = None  # for plain torch
    arranged: int = 0  # rows whose passes are arranged on the device


class Step:
    """The buffers of a shape, and its graph.

    The device has them once and the host twice: while a forward is under way the next is filled in the other `turn`.
    Of two that are under way none is filled, so what is written is never being copied, and all shapes can share what
    the host has for a turn.
    """

    def __init__(self, owner: Steps, shape: FlatShape) -> None:
        import torch

        self.shape = shape
        self._owner = owner
        inputs, outputs = flat_layouts(shape, owner.info)
        device = owner.device
        there = {"inputs": device.bytes(inputs.nbytes), "outputs": device.bytes(outputs.nbytes)}

        def buffer(layout: Layout, turn: int, use: str) -> Buffer:
            return device.buffer(layout, there[use], owner.pinned(turn, use, layout.nbytes))

        self.sides = [HostSide(buffer(inputs, turn, "inputs"), buffer(outputs, turn, "outputs")) for turn in (0, 1)]
        self.results: Tensor = there["outputs"].view(torch.int32)  # what the last forward has given, (L,) i32
        self.apart = outputs.places["next_ids"][0] // 4  # in it from a prediction's token to its next id
        self._place = owner.place(shape)
        self.logits = self._place if shape.logits else None  # (R, V) f32
        self._eager = not owner.graphs or shape not in owner.shapes
        self._graph: Graph | None = None
        self._runs = 0

    @property
    def is_captured(self) -> bool:
        """Whether it has a graph."""
        return self._graph is not None

    def fill(
        self, passes: Sequence[Pass], rows: Sequence[int], sources: Sequence[Source] | None = None, turn: int = 0
    ) -> None:
        """Write a forward's inputs on the host; a captured forward knows nothing else of the passes."""
        owner, side = self._owner, self.sides[turn]
        fill(side.inputs.arrays, passes, rows, owner.memory.pages, owner.model.config.mask_id, sources)
        side.arranged = sum(map(is_arranged, sources or ()))
        side.views = None
        if owner.model.kernels or not self._eager or side.arranged:  # whose rows lie nobody knows where
            return
        side.views = []
        at = 0
        shifts = [source.size if source.feed == "accepted" else 0 for source in sources or ()] or [0] * len(passes)
        for p, row, shift in zip(passes, rows, shifts, strict=True):
            seen = shift + max(int(p.visible[:, 0].max()), int(p.visible[:, 2].max()))
            side.views.append(View(at, at + p.ids.size, row, -(-seen // PAGE)))
            at += p.ids.size
        if at < self.shape.tokens:  # those that fill up a rounded shape, which see a slot of the scratch page
            side.views.append(View(at, self.shape.tokens, 0, 1))

    def run(self, turn: int = 0, before: Step | None = None) -> None:
        """Put the work into the stream; `before` has what feeds it, if it is begun ahead."""
        owner = self._owner
        ranks = owner.model.ranks
        if ranks is None:
            self._run(turn, before)
            return
        side = self.sides[turn]
        with ranks.watched():
            inputs = side.inputs.host.numpy().tobytes()
            fed = before is not None
            ranks.tell(SharedForward(self.shape, turn, fed, side.arranged, inputs, side.views, owner.memory.news()))
            self._run(turn, before)

    def again(self) -> None:
        """The network once more, over what was uploaded last."""
        self._compute(self.sides[0].views)

    def forget_logits(self) -> None:
        """They have been read, or never will be; many of them would hold much memory."""
        if self._place is None:
            self.logits = None

    def mirror(self, forward: SharedForward, before: Step | None) -> None:
        """Run what rank 0 runs; `before` is what has run before it."""
        side = self.sides[forward.turn]
        side.inputs.host.numpy()[:] = np.frombuffer(forward.inputs, np.uint8)
        side.views = forward.views
        side.arranged = forward.arranged
        self._run(forward.turn, before if forward.fed else None)
        self.forget_logits()

    def _run(self, turn: int, before: Step | None) -> None:
        """Upload, Advance where it is fed, network, download."""
        owner, side = self._owner, self.sides[turn]
        owner.device.upload(side.inputs)
        if before is not None:
            with self._compiling():
                owner.model.advance(side.inputs.tensors, before.results, owner.memory.table)
                if side.arranged:
                    owner.model.arrange(side.inputs.tensors, side.arranged, before.results, owner.memory.table)
        self._compute(side.views)
        owner.device.download(side.outputs)

    def _compute(self, views: list[View] | None) -> None:
        """The network: eager when the shape first comes, which compiles kernels, then its graph."""
        self._runs += 1
        if self._runs == 2 and not self._eager:
            self._capture()
        if self._graph is None:
            self._network(views)
        else:
            self._graph.replay()

    def _capture(self) -> None:
        owner = self._owner
        captured = owner.device.capture(lambda: self._network(None), owner.pool)
        if isinstance(captured, str):
            owner.refused(self.shape, captured)
        else:
            self._graph = captured
            owner.captured += 1

    def _compiling(self) -> contextlib.AbstractContextManager[None]:
        """Where kernels are launched that may have to be compiled."""
        kernels = self._owner.kernels
        return contextlib.nullcontext() if kernels is None else kernels.use()

    def _network(self, views: list[View] | None) -> None:
        import torch

        owner = self._owner
        memory = owner.memory
        inputs, outputs = self.sides[0].inputs.tensors, self.sides[0].outputs.tensors  # the same of both
        place = self._place
        if self.shape.logits and place is None:
            shape = (self.shape.predicted, owner.info.model.vocab_size)
            place = self.logits = owner.device.zeros(shape, torch.float32)
        with self._compiling():
            owner.model.forward(inputs, outputs, memory.pool, memory.table, views, place)
