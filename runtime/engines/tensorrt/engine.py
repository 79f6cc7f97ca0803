"""The GPU engine: TensorRT and TensorRT-RTX over one compiled graph, with caches updated in place.

A forward is one upload, one run and one download, captured as a CUDA graph the second time its shape comes and replayed
from then on. S and R are rounded up to powers of two, so that a handful of shapes serves every pass.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ....contract import ITEMSIZE, cache_names, cache_slots
from ....engine_folder import EngineInfo, Profile
from ....errors import EngineError, RequestError
from ....plugins import SAMPLED
from ....plugins.tensorrt.api import TensorRT, load
from ....plugins.tensorrt.launch import Kernels
from ....plugins.tensorrt.protocols import Context
from ..engine import Pass, Prediction
from ..layout import PassShape, layouts, rounded
from .checks import MODEL_INPUT, check_here, check_memory, deserialize
from .device import Device, Memory, Pinned
from .forward import Forward, Sampler
from .pieces import copied, joined, split

_KEPT_FORWARDS = 48  # shapes kept per cache, each with an execution context and perhaps a graph
_KEPT_CACHES = 4  # closed ones


class TensorRTEngine:
    """An engine folder loaded on a GPU.

    Args:
        folder: the engine folder.
        info: its description, from `engine_folder.read_engine`.
        device: the GPU's number, or the device itself.
        api: the TensorRT module's facade; default the one the engine was built with.
        graphs: capture CUDA graphs; False runs every pass eagerly, for comparison.

    Raises:
        EngineError: the engine does not fit what is here; the sentence ends with the command that fixes it.
        RequestError: there is no device of that number.
    """

    def __init__(
        self,
        folder: Path,
        info: EngineInfo,
        device: int | Device = 0,
        *,
        api: TensorRT | None = None,
        graphs: bool = True,
    ) -> None:
        about = info.manifest.tensorrt
        assert about is not None
        backend: Any = info.manifest.backend
        self.info = info
        self.folder = folder
        self.graphs = graphs
        self.api = load(backend, EngineError) if api is None else api
        try:
            self.device = device if isinstance(device, Device) else Device(device)
        except EngineError as error:
            raise EngineError(f"{folder}: {error}") from None
        check_here(folder, info, self.api, self.device)
        self.profiles: tuple[Profile, ...] = about.profiles
        model = info.model
        has_logits = info.build.gather_generation_logits
        predicted = max(p.max_batch_size * p.max_rows for p in self.profiles)
        logits_bytes = 4 * predicted * model.vocab_size if has_logits else 0
        row = model.kv_bytes_per_token(ITEMSIZE[info.build.dtype]) * cache_slots(info.build)
        check_memory(folder, self.device, {"weights": about.engine_bytes, "logits": logits_bytes, "one row": row})
        self.engine = deserialize(folder, info, self.api, self.device)
        self.capacity = int(self.engine.get_tensor_shape(MODEL_INPUT)[2])  # slots per row
        numbers = range(self.engine.num_optimization_profiles)
        scratch = max(self.engine.get_device_memory_size_for_profile_v2(number) for number in numbers)
        check_memory(folder, self.device, {"scratch memory": scratch, "logits": logits_bytes})
        # One stream, so one of each for all contexts and caches.
        self._scratch = self.device.allocate(scratch)
        self.logits: Memory | None = self.device.allocate(logits_bytes) if has_logits else None
        drawing = {(stage.name, self.device.sm) for stage in SAMPLED.stages}
        self.samples = has_logits and drawing <= {(kernel.stage, kernel.sm) for kernel in about.kernels}
        self.sampler: Sampler | None = None
        if self.samples:
            kernels = Kernels(folder, about.kernels, self.device.sm, self.device.driver)
            self.sampler = Sampler(kernels, self.device.allocate(Sampler.scratch(predicted, model.vocab_size)))
        self._config = self._runtime_config()
        self._closed: list[TensorRTCache] = []
        self.lock = threading.RLock()  # of the stream, the scratch memory and _closed
        self.eager_shapes: dict[PassShape, str] = {}  # shapes that cannot be captured, and why
        self.captured = 0  # graphs made since the engine was loaded

    def open(self, rows: int) -> TensorRTCache:
        """A cache of at least `rows` rows: a closed one if there is one, else a new one. Raises EngineError.

        It may have more rows than a forward: those that only keep K/V for later are in no forward.
        """
        with self.lock:
            large_enough = [cache for cache in self._closed if cache.rows >= rows]
            if large_enough:
                cache = min(large_enough, key=lambda cache: cache.rows)
                self._closed.remove(cache)
                cache.seconds = 0.0
                return cache
            if self.device.memory()[0] < self.cache_bytes(rows):
                self._closed.clear()
            check_memory(self.folder, self.device, {f"K/V of {rows} row(s)": self.cache_bytes(rows)})
            return TensorRTCache(self, rows)

    def cache_bytes(self, rows: int) -> int:
        """Device memory of a cache's K/V."""
        per_token = self.info.model.kv_bytes_per_token(ITEMSIZE[self.info.build.dtype])
        return rows * self.capacity * per_token

    def take_back(self, cache: TensorRTCache) -> None:
        """Keep a closed cache, with its graphs, for the next request."""
        with self.lock:
            self._closed = [*self._closed, cache][-_KEPT_CACHES:]

    def context(self, profile: int) -> Context:
        """An execution context for one shape; all contexts share the scratch memory."""
        # TensorRT ties a captured graph to the state of the context it was captured from.
        strategy = self.api.module.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self.engine.create_execution_context(strategy if self._config is None else self._config)
        if context is None or not context.set_optimization_profile_async(profile, self.device.stream):
            raise EngineError(f"{self.folder}: no execution context ({self.api.errors()}); free memory on the GPU")
        context.set_device_memory(self._scratch.address, self._scratch.nbytes)
        return context

    def _runtime_config(self) -> Any:
        """TensorRT-RTX's configuration, which all contexts share with its cache of kernels; full TensorRT has none."""
        strategies = getattr(self.api.module, "DynamicShapesKernelSpecializationStrategy", None)
        if strategies is None:
            return None
        config = self.engine.create_runtime_config()
        # Kernels for a shape are compiled at once when it first comes: a graph would keep the general ones for ever.
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        config.set_execution_context_allocation_strategy(
            self.api.module.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        config.set_runtime_cache(config.create_runtime_cache())
        return config


class TensorRTCache:
    """K/V (rows, G, T, D) per layer on the device, the small buffers of a pass, and the forwards over them."""

    def __init__(self, engine: TensorRTEngine, rows: int) -> None:
        info = engine.info
        device = engine.device
        self.rows = rows
        self.seconds = 0.0
        self.capacity = engine.capacity
        self._engine = engine
        self._mask_id = info.model.mask_id
        self._ends = [0] * rows  # slots of each row that a pass has written and that may be valid
        names = cache_names(info.model.num_layers)
        self.row_bytes = engine.cache_bytes(1) // len(names)
        self.caches = {name: device.allocate(rows * self.row_bytes) for name in names}
        for memory in self.caches.values():  # slots that a query does not see are multiplied by 0 and must not be NaN
            device.zero(memory.address, memory.nbytes)
        input_bytes = 0
        output_bytes = 0
        for profile in engine.profiles:
            most_rows = min(rows, profile.max_batch_size)
            largest = PassShape(0, most_rows, profile.max_tokens, profile.max_rows, sampled=engine.samples)
            input_layout, output_layout = layouts(info, largest)
            input_bytes = max(input_bytes, input_layout.nbytes)
            output_bytes = max(output_bytes, output_layout.nbytes)
        self.host_inputs = device.pinned(input_bytes)
        self.host_outputs = device.pinned(output_bytes)
        self.device_inputs = device.allocate(input_bytes)
        self.device_outputs = device.allocate(output_bytes)
        device.wait()
        self._logits: Pinned | None = None
        self._forwards: dict[PassShape, Forward] = {}

    def forward(self, passes: Sequence[Pass], first: int = 0) -> list[Prediction]:
        """See `engine.Cache.forward`; `passes[i]` is of row `first + i`."""
        longest = max(p.max_tokens for p in self._engine.profiles)
        if self._engine.logits is None and any(p.logits for p in passes):
            raise RequestError(
                "temperature needs logits, and the engine was built with --no-logits; use temperature 0, or build it "
                "again with --logits"
            )
        with self._engine.lock:
            self._engine.device.use()
            if all(p.ids.size <= longest for p in passes):
                return self._batch(passes, first)
            return self._in_pieces(passes, first, longest)

    def move(self, source: int, target: int, slots: int | None = None) -> None:
        """See `engine.Cache.move`; without `slots` all that the source row's passes have written."""
        device = self._engine.device
        count = self._ends[source] if slots is None else slots
        head_bytes = self.row_bytes // self._engine.info.model.num_kv_heads
        used_bytes = head_bytes // self.capacity * count  # of each head
        with self._engine.lock:
            device.use()
            for memory in self.caches.values():
                source_address = memory.address + source * self.row_bytes
                target_address = memory.address + target * self.row_bytes
                if used_bytes > head_bytes // 2:
                    device.copy(target_address, source_address, self.row_bytes)
                    continue
                for at in range(0, self.row_bytes, head_bytes):
                    device.copy(target_address + at, source_address + at, used_bytes)
            device.wait()
        self._ends[target] = count

    def close(self) -> None:
        """See `engine.Cache.close`."""
        self._engine.take_back(self)

    def _in_pieces(self, passes: Sequence[Pass], first: int, longest: int) -> list[Prediction]:
        """Passes of which some must be split: all but each row's last piece run alone, the last pieces together."""
        pieces = [split(p, longest, self._engine.folder) for p in passes]
        predictions: list[list[Prediction]] = []
        for row, of_row in enumerate(pieces):
            predictions.append([copied(self._batch([piece], first + row)[0]) for piece in of_row[:-1]])
        last = self._batch([of_row[-1] for of_row in pieces], first)
        return [joined([*before, after]) for before, after in zip(predictions, last, strict=True)]

    def _batch(self, passes: Sequence[Pass], first: int) -> list[Prediction]:
        """Passes that fit the profiles' S; in several runs if the profile has fewer rows."""
        size = max(p.ids.size for p in passes)
        predicted = max(1, *(p.predicted.size for p in passes))
        number = self._profile(len(passes), size, predicted)
        profile = self._engine.profiles[number]
        end = max(p.write_at for p in passes)
        tokens = rounded(size, profile.max_tokens)
        if end + tokens > self.capacity:  # no room for padding
            tokens = size
        if end + tokens > self.capacity:
            raise EngineError(
                f"{self._engine.folder}: a pass of {tokens} tokens at slot {end} exceeds the cache, allowed: "
                f"{self.capacity} slots; shorten the request, or build it again with a larger --max-seq-len"
            )
        shape = PassShape(
            first,
            len(passes),
            tokens,
            rounded(predicted, min(profile.max_rows, tokens)),
            sampled=any(p.temperature for p in passes),
        )
        most = profile.max_batch_size
        if len(passes) <= most:
            return self._run(number, passes, shape)
        predictions: list[Prediction] = []
        for at in range(0, len(passes), most):
            some = passes[at : at + most]
            predictions += map(copied, self._run(number, some, shape._replace(first=first + at, rows=len(some))))
        return predictions

    def _profile(self, rows: int, tokens: int, predicted: int) -> int:
        """The number of the first profile that takes a pass in one run, or else of the first that takes its tokens."""
        fitting = []
        for number, profile in enumerate(self._engine.profiles):
            if tokens <= profile.max_tokens and predicted <= profile.max_rows:
                if rows <= profile.max_batch_size:
                    return number
                fitting.append(number)
        return fitting[0]

    def _run(self, profile: int, passes: Sequence[Pass], shape: PassShape) -> list[Prediction]:
        forward = self._forwards.pop(shape, None) or Forward(self._engine, self, profile, shape)
        self._forwards[shape] = forward  # the last used comes last
        while len(self._forwards) > _KEPT_FORWARDS:
            del self._forwards[next(iter(self._forwards))]
        for row, p in enumerate(passes):
            forward.fill(row, p, self._mask_id)
            self._ends[shape.first + row] = p.write_at + p.ids.size
        with_logits = [row for row, p in enumerate(passes) if p.logits and p.predicted.size]
        started = time.perf_counter()
        forward.enqueue()
        logits = self._read_logits(with_logits, passes, shape) if with_logits else {}
        self._engine.device.wait()
        self.seconds += time.perf_counter() - started
        return [forward.prediction(row, p.predicted.size, logits.get(row)) for row, p in enumerate(passes)]

    def _read_logits(self, rows: list[int], passes: Sequence[Pass], shape: PassShape) -> dict[int, np.ndarray]:
        """Start copying some rows' logits to the host; views of where they will be, (R, V) f32, by row."""
        source = self._engine.logits
        assert source is not None
        vocab = self._engine.info.model.vocab_size
        row_bytes = 4 * vocab * shape.predicted
        needed = 4 * vocab * sum(passes[row].predicted.size for row in rows)
        if self._logits is None or self._logits.array.size < needed:
            self._logits = self._engine.device.pinned(needed)
        logits = {}
        at = 0
        for row in rows:
            count = passes[row].predicted.size
            nbytes = 4 * vocab * count
            self._engine.device.download(self._logits.address + at, source.address + row_bytes * row, nbytes)
            logits[row] = self._logits.array[at : at + nbytes].view(np.float32).reshape(count, vocab)
            at += nbytes
        return logits
