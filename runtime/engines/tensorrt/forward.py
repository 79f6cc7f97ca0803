"""One shape of a forward on a GPU: its buffers' layout, its execution context, perhaps its CUDA graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from ....contract import counted
from ....engine_folder import ENGINE_FILE, build_again
from ....engine_info import EngineInfo
from ....errors import EngineError
from ....plugins import SAMPLED
from ....plugins.op import ceil_div
from ....plugins.tensorrt.api import TensorRT
from ....plugins.tensorrt.launch import Kernels, run, workspace_size
from ....plugins.tensorrt.protocols import Context
from ..layout import SAMPLING, PassShape, fill, layouts
from ..passes import Pass, Prediction, read_only
from .device import Device, Graph, Memory, Pinned


@dataclasses.dataclass(frozen=True)
class Sampler:
    """`SampledCommit` after an engine, over the logits that it leaves on the device."""

    kernels: Kernels
    workspace: Memory  # of `scratch` bytes

    @staticmethod
    def scratch(predicted: int, vocab: int) -> int:
        """Bytes for forwards of at most `predicted` predictions over all rows."""
        return workspace_size(SAMPLED, _shapes(1, predicted, vocab))

    def enqueue(self, addresses: Mapping[str, int], rows: int, predicted: int, vocab: int, stream: int) -> None:
        """Draw and commit anew: `addresses` has the op's tensors by name, its `ids` as `predicted_ids`."""
        inputs = [addresses["predicted_ids" if arg.name == "ids" else arg.name] for arg in SAMPLED.inputs]
        outputs = [addresses[arg.name] for arg in SAMPLED.outputs]
        run(SAMPLED, self.kernels, _shapes(rows, predicted, vocab), inputs, outputs, self.workspace.address, stream)


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
    eager_shapes: dict[PassShape, str]
    logits: Memory | None
    sampler: Sampler | None

    def context(self, profile: int) -> Context: ...


class Buffers(Protocol):
    """What a forward uses of its cache."""

    caches: dict[str, Memory]
    row_bytes: int
    host_inputs: Pinned
    host_outputs: Pinned
    device_inputs: Memory
    device_outputs: Memory


class Forward:
    """The forwards of one shape: their context, their views of the cache's buffers, perhaps their graph."""

    def __init__(self, engine: Owner, cache: Buffers, profile: int, shape: PassShape) -> None:
        self._engine = engine
        self._shape = shape
        self._runs = 0
        self._graph: Graph | None = None
        input_layout, output_layout = layouts(engine.info, shape)
        self._inputs = input_layout.views(cache.host_inputs.array)
        self._outputs = output_layout.views(read_only(cache.host_outputs.array))
        self._upload = (cache.device_inputs.address, cache.host_inputs.address, input_layout.nbytes)
        self._download = (cache.host_outputs.address, cache.device_outputs.address, output_layout.nbytes)
        self._addresses: dict[str, int] = {}
        tensor_shapes: dict[str, tuple[int, ...]] = {}
        for name, (offset, _, tensor_shape) in input_layout.places.items():
            self._addresses[name] = cache.device_inputs.address + offset
            tensor_shapes[name] = tensor_shape
        for name, (offset, _, _) in output_layout.places.items():
            self._addresses[name] = cache.device_outputs.address + offset
        model = engine.info.model
        for name, memory in cache.caches.items():
            address = memory.address + shape.first * cache.row_bytes
            self._addresses[name] = address
            self._addresses[f"{name}_out"] = address
            tensor_shapes[name] = (shape.rows, model.num_kv_heads, engine.capacity, model.head_dim)
        if engine.logits is not None:
            self._addresses["logits"] = engine.logits.address
        self._context = engine.context(profile)
        if not self._bind(tensor_shapes):
            raise EngineError(
                f"{engine.folder / ENGINE_FILE}: does not take {counted(shape.rows, 'row')} of "
                f"{counted(shape.tokens, 'token')} "
                f"({engine.api.errors()}); {build_again(engine.folder)}"
            )

    def _bind(self, tensor_shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Give the context its tensors' shapes and addresses; whether it takes them."""
        of_the_sampler = {binding.name for binding in SAMPLING}  # the engine does not know these
        for name, tensor_shape in tensor_shapes.items():
            if name not in of_the_sampler and not self._context.set_input_shape(name, tensor_shape):
                return False
        for name, address in self._addresses.items():
            if name not in of_the_sampler and not self._context.set_tensor_address(name, address):
                return False
        return not self._context.infer_shapes()

    def fill(self, row: int, p: Pass, mask_id: int) -> None:
        """Write one row's inputs; padding tokens write past the pass and see their own slot only."""
        fill(self._inputs, row, p, mask_id)

    def enqueue(self) -> None:
        """Upload, run, download: eagerly the first time, captured the second time, replayed from then on."""
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
            captured: Graph | str = "the backend says that it cannot be captured"
        else:
            captured = self._engine.device.capture(self._work)
        if isinstance(captured, str):
            self._engine.eager_shapes[self._shape] = captured
        else:
            self._graph = captured
            self._engine.captured += 1

    def _work(self) -> bool:
        device = self._engine.device
        device.upload(*self._upload)
        done = self._context.execute_async_v3(device.stream)
        shape = self._shape
        if shape.sampled:
            assert self._engine.sampler is not None
            vocab = self._engine.info.model.vocab_size
            self._engine.sampler.enqueue(self._addresses, shape.rows, shape.predicted, vocab, device.stream)
        device.download(*self._download)
        return done

    def prediction(self, row: int, count: int, logits: np.ndarray | None) -> Prediction:
        """One row's results as views."""
        return Prediction(
            self._outputs["token"][row, :count],
            self._outputs["confidence"][row, :count],
            self._outputs["next_ids"][row, :count],
            logits,
        )
