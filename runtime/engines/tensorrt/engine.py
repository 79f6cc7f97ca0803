"""The GPU engine: TensorRT and TensorRT-RTX over one compiled graph, with caches updated in place.

A forward is one upload, one run and one download, captured as a CUDA graph the second time its shape comes and replayed
from then on. S and R are rounded up to powers of two, so that a handful of shapes serves every pass.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from ....contract import ITEMSIZE, cache_slots
from ....engine_folder import EngineInfo, Profile
from ....errors import EngineError
from ....plugins import SAMPLED
from ....plugins.tensorrt.api import TensorRT, load
from ....plugins.tensorrt.launch import Kernels
from ....plugins.tensorrt.protocols import Context
from ..layout import PassShape
from .cache import TensorRTCache
from .checks import MODEL_INPUT, check_here, check_memory, deserialize
from .device import Device, Memory
from .forward import Sampler

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
        self.pages = None
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
