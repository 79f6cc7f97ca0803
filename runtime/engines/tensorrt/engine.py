"""The GPU engine: TensorRT and TensorRT-RTX over one compiled graph, with caches updated in place.

A forward is one upload, one run and one download, captured as a CUDA graph the second time its shape comes and replayed
from then on. S and R are rounded up to powers of two, so that a handful of shapes serves every pass.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ....contract import ITEMSIZE, cache_slots, counted
from ....engine_info import EngineInfo
from ....errors import EngineError
from ....plugins import SAMPLED
from ....plugins.tensorrt.api import TensorRT, load
from ....plugins.tensorrt.launch import Kernels
from ....plugins.tensorrt.protocols import Context
from ....tensorrt_info import Profile, logits_bytes
from ...images.image import Image
from ..layout import PassShape
from .cache import TensorRTCache
from .checks import MODEL_INPUT, check_here, check_memory, deserialize, deserialize_vision
from .contexts import make_config, make_context, scratch_bytes
from .device import Device, Memory
from .forward import Sampler
from .vision import TensorRTVision, io_bytes

_KEPT_CACHES = 4  # closed ones


class TensorRTEngine:
    """An engine folder loaded on a GPU.

    Args:
        folder: the engine folder.
        info: its description, from `engine_info.read_engine`.
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
        self.lost: str | None = None  # why nothing will ever run here again
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
        for_logits = logits_bytes(self.profiles, model.vocab_size) if has_logits else 0
        row = model.kv_bytes_per_token(ITEMSIZE[info.build.dtype]) * cache_slots(info.build)
        weights = about.engine_bytes + (about.vision.engine_bytes if about.vision else 0)
        weights += sum(int(info.manifest.files[name]["bytes"]) for name in about.stripped)
        image_bytes = io_bytes(info, about.vision) if about.vision else 0
        parts = {"weights": weights, "logits": for_logits, "one row": row, "images": image_bytes}
        check_memory(folder, self.device, parts)
        self.engine = deserialize(folder, info, self.api, self.device)
        tower = None if about.vision is None else deserialize_vision(folder, info, self.api, self.device)
        self.capacity = int(self.engine.get_tensor_shape(MODEL_INPUT)[2])  # slots per row
        scratch = max(scratch_bytes(engine) for engine in (self.engine, tower) if engine is not None)
        check_memory(folder, self.device, {"scratch memory": scratch, "logits": for_logits, "images": image_bytes})
        # One stream, so one of each for all contexts and caches.
        self._scratch = self.device.allocate(scratch)
        self.logits: Memory | None = self.device.allocate(for_logits) if has_logits else None
        self.sampler: Sampler | None = None
        kernels = Kernels(folder, about.kernels, self.device.sm, self.device.driver)
        self.samples = has_logits and kernels.fit(SAMPLED, model, info.build.dtype)
        if self.samples:
            self.sampler = Sampler(kernels, self.device.allocate(Sampler.scratch(predicted, model.vocab_size)))
        # A graph would keep the kernels that serve every shape for ever.
        self._config = make_config(self.api, self.engine, "EAGER")
        self._vision: TensorRTVision | None = None
        if tower is not None and about.vision is not None:
            config = make_config(self.api, tower, "NONE")
            self._vision = TensorRTVision(self, tower, about.vision, config, self._scratch)
        self._closed: list[TensorRTCache] = []
        self.lock = threading.RLock()  # of the stream, the scratch memory and _closed
        self.eager_shapes: dict[PassShape, str] = {}  # shapes that cannot be captured, and why
        self.captured = 0  # graphs made since the engine was loaded

    def open(self, rows: int) -> TensorRTCache:
        """A cache of at least `rows` rows: a closed one if there is one, else a new one. Raises EngineError.

        It may have more rows than a forward: those that only keep K/V for later are in no forward.
        """
        with self.using():
            large_enough = [cache for cache in self._closed if cache.rows >= rows]
            if large_enough:
                cache = min(large_enough, key=lambda cache: cache.rows)
                self._closed.remove(cache)
                return cache
            if self.device.memory()[0] < self.cache_bytes(rows):
                self._closed.clear()
            check_memory(self.folder, self.device, {f"K/V of {counted(rows, 'row')}": self.cache_bytes(rows)})
            return TensorRTCache(self, rows)

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        """Have the device for what is done inside. Raises EngineError, another one where the device has failed."""
        with self.lock:
            try:
                self.device.use()
                yield
            except EngineError as error:
                if self.device.answers():
                    raise
                self.lost = f"{self.device.name} has failed ({str(error).partition('; ')[0]})"
                raise EngineError(f"{self.folder}: {self.lost}; start the process again") from None

    def see(self, image: Image) -> np.ndarray:
        """See `engine.SeeingEngine.see`."""
        assert self._vision is not None
        with self.using():
            return self._vision.see(image)

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
        return make_context(self.folder, self.api, self.device, self.engine, self._config, profile, self._scratch)
