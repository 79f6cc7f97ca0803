"""One shape of a pass on a GPU: its buffers' layout, its execution context, perhaps its CUDA graph.

In: an engine, a cache's buffers and a shape (`Key`). Out: `Forward`, which fills the inputs, runs them,
and hands out views of the results. The surprising fact: a shape has an execution context of its own, because TensorRT
ties a captured graph to the state of the context it was captured from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from ....engine_folder import ENGINE_FILE, EngineInfo
from ....errors import EngineError
from ....plugins import SAMPLED
from ....plugins.tensorrt.launch import Kernels
from ....plugins.op import ceil_div
from ....plugins.tensorrt.register import run, workspace_size
from ....plugins.tensorrt.api import Context, TensorRT
from .device import Device, Graph, Memory, Pinned
from ..engine import Pass, Prediction
from ..layout import SAMPLING, fill, layouts

Key = tuple[int, int, int, int, bool]  # first row, rows, S, R, sampled or not


@dataclasses.dataclass(frozen=True)
class Sampler:
    """`SampledCommit` after an engine, over the logits that it leaves on the device."""

    kernels: Kernels
    workspace: Memory  # of `scratch` bytes

    @staticmethod
    def scratch(predicted: int, vocab: int) -> int:
        """Bytes for passes of at most `picked` predictions over all rows."""
        return workspace_size(SAMPLED, _shapes(1, predicted, vocab))

    def enqueue(self, addresses: Mapping[str, int], rows: int, predicted: int, vocab: int, stream: int) -> None:
        """Draw and commit anew: `addresses` has the op's tensors by name, its `ids` as `picked`."""
        given = [addresses["picked" if arg.name == "ids" else arg.name] for arg in SAMPLED.inputs]
        taken = [addresses[arg.name] for arg in SAMPLED.outputs]
        run(SAMPLED, self.kernels, _shapes(rows, predicted, vocab), given, taken, self.workspace.address, stream)


def _shapes(rows: int, predicted: int, vocab: int) -> list[tuple[int, ...]]:
    return [arg.sizes({"B": rows, "R": predicted, "V": vocab}, ceil_div) for arg in SAMPLED.inputs]


class Owner(Protocol):
    """What a forward uses of its engine."""

    info: EngineInfo
    folder: Path
    device: Device
    api: TensorRT
    graphs: bool
    capacity: int
    captured: int
    eager_shapes: dict[Key, str]
    logits: Memory | None
    sampler: Sampler | None

    def context(self, profile: int) -> Context: ...


class Buffers(Protocol):
    """What a forward uses of its cache."""

    caches: dict[str, Memory]
    row_bytes: int
    given: Pinned
    taken: Pinned
    given_there: Memory
    taken_there: Memory


class Forward:
    """One shape (see `Key`): its context, its views of the cache's buffers, perhaps its graph."""

    def __init__(self, engine: Owner, cache: Buffers, profile: int, key: Key) -> None:
        first, rows, size, predicted, self._sampled = self._key = key
        self._engine, self._runs = engine, 0
        self._graph: Graph | None = None
        given, taken = layouts(engine.info, rows, size, predicted, self._sampled)
        self._inputs, self._outputs = given.views(cache.given.array), taken.views(cache.taken.array)
        self._upload = (cache.given_there.address, cache.given.address, given.nbytes)
        self._download = (cache.taken.address, cache.taken_there.address, taken.nbytes)
        addresses = {name: cache.given_there.address + at for name, (at, _, _) in given.places.items()}
        addresses |= {name: cache.taken_there.address + at for name, (at, _, _) in taken.places.items()}
        own = {b.name for b in SAMPLING}  # for the sampler, not the engine
        shapes = {name: shape for name, (_, _, shape) in given.places.items() if name not in own}
        model = engine.info.model
        for name, memory in cache.caches.items():
            addresses[name] = addresses[f"{name}_out"] = memory.address + first * cache.row_bytes
            shapes[name] = (rows, model.num_kv_heads, engine.capacity, model.head_dim)
        if engine.logits is not None:
            addresses["logits"] = engine.logits.address
        self._addresses, self._context = addresses, engine.context(profile)
        done = all(self._context.set_input_shape(name, shape) for name, shape in shapes.items())
        done = done and all(
            self._context.set_tensor_address(name, address) for name, address in addresses.items() if name not in own
        )
        if not done or self._context.infer_shapes():
            raise EngineError(
                f"{engine.folder / ENGINE_FILE}: does not take {rows} row(s) of {size} tokens "
                f"({engine.api.errors()}); build it again: nemodiff build CHECKPOINT -o {engine.folder}"
            )

    def fill(self, row: int, p: Pass, mask_id: int) -> None:
        """Write one row's inputs; padding tokens write past the pass and see their own slot only."""
        fill(self._inputs, row, p, mask_id)

    def enqueue(self) -> None:
        """Upload, run, download: eagerly at first, captured the second time, replayed from then on."""
        engine = self._engine
        self._runs += 1
        if self._runs == 2 and engine.graphs:
            self._capture()
        if self._graph is not None:
            engine.device.launch(self._graph)
        elif not self._work():
            raise EngineError(
                f"{engine.folder / ENGINE_FILE}: a pass failed ({engine.api.errors()}); load the engine again, and "
                "report it if that does not help"
            )

    def _capture(self) -> None:
        capturable = getattr(self._context, "is_stream_capturable", None)  # of TensorRT-RTX alone
        if capturable is not None and not capturable(self._engine.device.stream):
            made: Graph | str = "the backend says that it cannot be captured"
        else:
            made = self._engine.device.capture(self._work)
        if isinstance(made, str):
            self._engine.eager_shapes[self._key] = made
        else:
            self._graph = made
            self._engine.captured += 1

    def _work(self) -> bool:
        device = self._engine.device
        device.upload(*self._upload)
        done = self._context.execute_async_v3(device.stream)
        if self._sampled:
            assert self._engine.sampler is not None
            _, rows, _, predicted, _ = self._key
            vocab = self._engine.info.model.vocab_size
            self._engine.sampler.enqueue(self._addresses, rows, predicted, vocab, device.stream)
        device.download(*self._download)
        return done

    def prediction(self, row: int, count: int, logits: np.ndarray | None) -> Prediction:
        """One row's results as views."""
        taken = self._outputs
        return Prediction(
            taken["token"][row, :count], taken["confidence"][row, :count], taken["next_ids"][row, :count], logits
        )
