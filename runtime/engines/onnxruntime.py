"""The CPU engine: ONNX Runtime over the graph, with caches updated in place.

All inputs and outputs of a forward live in numpy arrays bound once per shape, so a step writes a few integers, runs,
and reads a few integers. The capacity T is dynamic here: it starts small and doubles, so the cost follows the length
in use.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...contract import Binding, cache_names, inputs, outputs, vision_inputs
from ...engine_folder import MODEL_FILE, VISION_MODEL_FILE, EngineInfo
from ...errors import EngineError
from ..images.image import Image
from .engine import Pass, Prediction, read_only
from .layout import PassShape

FIRST_CAPACITY = 256  # tokens
_KEPT_FORWARDS = 256  # bound shapes kept per cache; a prompt's odd last chunk would otherwise pile up
_KEPT_WITH_LOGITS = 16  # of those, shapes whose arrays hold a vocabulary per token
_KEPT_CACHES = 4  # closed ones; binding a shape anew costs as much as a small model's forward
_BoundRows = dict[str, tuple[np.ndarray, Any]]  # by cache: a view of its rows and the view's OrtValue
_NUMPY: dict[str, type] = {"i32": np.int32, "f32": np.float32, "f16": np.float16}


class OnnxRuntimeEngine:
    """An engine folder loaded on the CPU.

    Args:
        folder: the engine folder.
        info: its description, from `engine_folder.read_engine`.
        threads: CPU threads of a forward; None lets ONNX Runtime take one per physical core.

    Raises:
        EngineError: the graph cannot be loaded.
    """

    samples = False

    def __init__(self, folder: Path, info: EngineInfo, threads: int | None = None) -> None:
        self.session = _open_session(folder / MODEL_FILE, inputs(info.model, info.has_adapter), threads)
        vision = info.model.vision
        self._vision = (
            _open_session(folder / VISION_MODEL_FILE, vision_inputs(vision), threads) if vision is not None else None
        )
        self.info = info
        self._closed: list[OnnxRuntimeCache] = []
        self._lock = threading.Lock()  # of _closed: requests may run in several threads

    def open(self, rows: int) -> OnnxRuntimeCache:
        """A cache of `rows` rows: a closed one with its bound forwards if there is one, else a new one."""
        with self._lock:
            for cache in self._closed:
                if cache.rows == rows:
                    self._closed.remove(cache)
                    cache.seconds = 0.0
                    return cache
        return OnnxRuntimeCache(self, rows)

    def see(self, image: Image) -> np.ndarray:
        """See `engine.SeeingEngine.see`."""
        assert self._vision is not None
        visible = np.zeros((1, len(image.patches), 3), np.int32)
        visible[:, :, 2] = len(image.patches)
        inputs = {"patches": image.patches, "positions": image.positions, "visible": visible}
        (features,) = self._vision.run(["features"], inputs)
        return np.asarray(features)

    def take_back(self, cache: OnnxRuntimeCache) -> None:
        """Keep a closed cache for the next request, unless it has grown: cost follows a cache's capacity."""
        if cache.capacity <= FIRST_CAPACITY:
            with self._lock:
                self._closed = [*self._closed, cache][-_KEPT_CACHES:]


def _open_session(path: Path, bindings: list[Binding], threads: int | None) -> Any:
    """A session of a graph whose inputs are those bindings. Raises EngineError."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    if threads is not None:
        options.intra_op_num_threads = threads
    again = f"build it again: nemodiff build CHECKPOINT -o {path.parent}"
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises classes of its own without a common base
        reason = str(error).strip().splitlines()[0]
        raise EngineError(
            f"{path}: ONNX Runtime {onnxruntime.__version__} cannot load it ({reason}); {again}"
        ) from None
    expected = {binding.name for binding in bindings}
    declared = {item.name for item in session.get_inputs()}
    if declared != expected:
        raise EngineError(
            f"{path}: its inputs are not those of the engine's description (one of "
            f"{', '.join(sorted(expected ^ declared)[:3])}); {again}"
        )
    return session


class OnnxRuntimeCache:
    """K/V arrays (rows, G, T, D) per layer and the bound forwards over them."""

    def __init__(self, engine: OnnxRuntimeEngine, rows: int) -> None:
        model = engine.info.model
        self.rows = rows
        self.seconds = 0.0
        self.capacity = 0  # slots per row now allocated
        self._engine = engine
        self._session = engine.session
        self._info = engine.info
        self._shape = (rows, model.num_kv_heads, 0, model.head_dim)
        self._pad_id = int(model.mask_id == 0)  # any id but the mask
        self._caches: dict[str, np.ndarray] = {
            name: np.zeros(self._shape, _NUMPY[engine.info.build.dtype]) for name in cache_names(model.num_layers)
        }
        self._forwards: dict[PassShape, _Forward] = {}
        self._bound_rows: dict[tuple[int, int], _BoundRows] = {}

    def forward(self, passes: Sequence[Pass], first: int = 0) -> list[Prediction]:
        """See `engine.Cache.forward`."""
        tokens = 0
        predicted = 0
        end = 0
        logits = embedded = False
        for p in passes:
            tokens = max(tokens, p.ids.size)
            predicted = max(predicted, p.predicted.size)
            end = max(end, p.write_at)
            logits = logits or p.logits
            embedded = embedded or p.embedded is not None
        if end + tokens > self.capacity:
            self._reserve(end + tokens)
        shape = PassShape(first, len(passes), tokens, predicted, logits, embedded=embedded)
        bound = self._forwards.get(shape)
        if bound is None:
            bound = self._bind(shape)
        for row, p in enumerate(passes):
            bound.fill(row, p, self._pad_id)
        started = time.perf_counter()
        self._session.run_with_iobinding(bound.binding)
        self.seconds += time.perf_counter() - started
        return [bound.prediction(row, p) for row, p in enumerate(passes)]

    def move(self, source: int, target: int, slots: int) -> None:
        """See `engine.Cache.move`."""
        for cache in self._caches.values():
            cache[target, :, :slots] = cache[source, :, :slots]

    def read(self, row: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """See `engine.ReadableCache.read`."""
        return {name: cache[row, :, start:stop].astype(np.float32) for name, cache in self._caches.items()}

    def close(self) -> None:
        """See `engine.Cache.close`."""
        self._engine.take_back(self)

    def _reserve(self, slots: int) -> None:
        """Grow every cache to at least `slots` by doubling."""
        rows, heads, old, width = self._shape
        new = max(old, FIRST_CAPACITY)
        while new < slots:
            new *= 2
        self._forwards.clear()
        self._bound_rows.clear()
        self._shape = (rows, heads, new, width)
        self.capacity = new
        for name, cache in self._caches.items():
            self._caches[name] = np.zeros(self._shape, cache.dtype)
            self._caches[name][:, :, :old] = cache

    def _bind(self, shape: PassShape) -> _Forward:
        kept = [other for other in self._forwards if other.logits == shape.logits]
        if len(kept) >= (_KEPT_WITH_LOGITS if shape.logits else _KEPT_FORWARDS):
            del self._forwards[kept[0]]
        forward = _Forward(self._session, self._info, self._rows(shape.first, shape.rows), shape)
        self._forwards[shape] = forward
        return forward

    def _rows(self, first: int, count: int) -> _BoundRows:
        """Each cache's rows as ONNX Runtime sees them, made once: they are most of what a new shape binds."""
        import onnxruntime

        if (first, count) not in self._bound_rows:
            bound = {}
            for name, cache in self._caches.items():
                view = cache[first : first + count]
                bound[name] = (view, onnxruntime.OrtValue.ortvalue_from_numpy(view))
            self._bound_rows[first, count] = bound
        return self._bound_rows[first, count]


class _Forward:
    """The arrays and the IOBinding of one shape."""

    def __init__(self, session: Any, info: EngineInfo, caches: _BoundRows, shape: PassShape) -> None:
        self.binding = session.io_binding()
        self.arrays: dict[str, np.ndarray] = {}
        self._caches = caches
        self._embedded = shape.embedded
        self._values: list[Any] = []  # keeps what the binding points to alive
        self._lengths = {"B": shape.rows, "S": shape.tokens, "R": shape.predicted, "V": info.model.vocab_size}
        self._lengths["F"] = shape.rows * shape.tokens if shape.embedded else 1
        self._bind(inputs(info.model, info.has_adapter), self.binding.bind_ortvalue_input)
        self._bind(outputs(info.model, shape.logits), self.binding.bind_ortvalue_output)
        inputs_of_row = ("ids", "pos", "visible", "rows", "write_at", "threshold", "adapter", "embedding")
        if "embedding" in self.arrays:
            self.arrays["embedding"][:] = -1
        self._inputs = [self._row(row, inputs_of_row) for row in range(shape.rows)]
        outputs_of_row = ("token", "confidence", "next_ids", "logits")
        for name in outputs_of_row:
            if name in self.arrays:
                self.arrays[name] = read_only(self.arrays[name])
        self._whole = [Prediction(*self._row(row, outputs_of_row)) for row in range(shape.rows)]
        # What a row's inputs hold, where the next pass often wants the same: a write costs more than a look.
        self._last_predicted: list[np.ndarray | None] = [None] * shape.rows
        self._threshold = [0.0] * shape.rows

    def _bind(self, bindings: list[Binding], bind_value: Any) -> None:
        """Bind the caches' memory and a new array for everything else."""
        import onnxruntime

        for binding in bindings:
            if binding.kind == "compute":
                # A cache is input and output over the same memory: ONNX Runtime's TensorScatter then skips its copy.
                _, value = self._caches[binding.name.removesuffix("_out")]
            else:
                sizes = [self._lengths[size] if isinstance(size, str) else size for size in binding.shape]
                array: np.ndarray = np.zeros(sizes, _NUMPY[binding.kind])
                self.arrays[binding.name] = array
                value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
                self._values.append(value)
            bind_value(binding.name, value)

    def _row(self, row: int, names: tuple[str, ...]) -> list[Any]:
        """Views of one row of some arrays, (1,) where a row is a single number, None where there is no array."""
        views: list[Any] = []
        for name in names:
            array = self.arrays.get(name)
            if array is None:
                views.append(None)
            else:
                views.append(array[row] if array.ndim > 1 else array[row : row + 1])
        return views

    def fill(self, row: int, p: Pass, pad_id: int) -> None:
        """Write one row's inputs; padding tokens write past the pass and see their own slot only."""
        ids, pos, visible, rows, write_at, threshold, adapter, embedding = self._inputs[row]
        size = p.ids.size
        ids[:size] = p.ids
        pos[:size] = p.pos
        visible[:size] = p.visible
        write_at[0] = p.write_at
        if p.predicted is not self._last_predicted[row]:
            rows[: p.predicted.size] = p.predicted
            rows[p.predicted.size :] = ids.size - 1
            self._last_predicted[row] = p.predicted
        if p.threshold != self._threshold[row]:
            threshold[0] = p.threshold
            self._threshold[row] = p.threshold
        if adapter is not None:
            adapter[:size] = p.adapter
            adapter[size:] = 0
        if self._embedded:
            embedding[:] = -1
            if p.embedded is not None:
                places = row * ids.size + p.embedded
                embedding[p.embedded] = places
                self.arrays["embeddings"][places] = p.embeddings
        if size < ids.size:
            own = np.arange(p.write_at + size, p.write_at + ids.size)
            ids[size:] = pad_id
            pos[size:] = own
            visible[size:] = np.stack([np.zeros_like(own), own, own + 1], axis=1)

    def prediction(self, row: int, p: Pass) -> Prediction:
        """One row's results as views."""
        whole = self._whole[row]
        count = p.predicted.size
        if count == whole.token.size and p.logits == (whole.logits is not None):
            return whole
        logits = whole.logits[:count] if p.logits and whole.logits is not None else None
        return Prediction(whole.token[:count], whole.confidence[:count], whole.next_ids[:count], logits)
