"""The CPU engine: ONNX Runtime over the graph, with caches updated in place.

In: an engine folder. Out: an `Engine`. All inputs and outputs of a forward live in numpy arrays bound once per
shape, so a step writes a few integers, runs, and reads a few integers. The capacity T is dynamic here: it starts
small and doubles, so cost follows the length in use. The surprising fact: a cache is bound as input and as output
over the same memory, and ONNX Runtime's TensorScatter then skips its copy.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...engine_folder import MODEL_FILE, EngineInfo
from ...contract import Binding, cache_names, inputs, outputs
from ...errors import EngineError
from .engine import Pass, Prediction

FIRST_CAPACITY = 256  # tokens
_KEPT_FORWARDS = 256  # bound shapes kept per cache; a prompt's odd last chunk would otherwise pile up
_KEPT_WITH_LOGITS = 16  # of those, shapes whose arrays hold a vocabulary per token
_KEPT_CACHES = 4  # closed ones; binding a shape anew costs as much as a small model's forward
_Shape = tuple[int, int, int, int, bool]  # first row, rows, S, R, with logits or not
_BoundRows = dict[str, tuple[np.ndarray, Any]]  # by cache: the array and its OrtValue
_NUMPY: dict[str, type] = {"i32": np.int32, "f32": np.float32, "f16": np.float16}


class OnnxRuntimeEngine:
    """An engine folder loaded on the CPU.

    Args:
        folder: the engine folder.
        info: its description, from `contract.read_engine`.
        threads: CPU threads of a forward; None lets ONNX Runtime take one per physical core.

    Raises:
        EngineError: the graph cannot be loaded.
    """

    samples = False

    def __init__(self, folder: Path, info: EngineInfo, threads: int | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self.session = onnxruntime.InferenceSession(
                folder / MODEL_FILE, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime raises classes of its own without a common base
            reason = str(error).strip().splitlines()[0]
            raise EngineError(
                f"{folder / MODEL_FILE}: ONNX Runtime {onnxruntime.__version__} cannot load it ({reason}); "
                f"build it again: nemodiff build CHECKPOINT -o {folder}"
            ) from None
        wanted, got = (
            {b.name for b in inputs(info.model, info.has_adapter)},
            {i.name for i in self.session.get_inputs()},
        )
        if wanted != got:
            raise EngineError(
                f"{folder / MODEL_FILE}: its inputs are not those of the engine's description (one of "
                f"{', '.join(sorted(wanted ^ got)[:3])}); build it again: nemodiff build CHECKPOINT -o {folder}"
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

    def take_back(self, cache: OnnxRuntimeCache) -> None:
        """Keep a closed cache for the next request, unless it has grown: cost follows a cache's capacity."""
        if cache.capacity <= FIRST_CAPACITY:
            with self._lock:
                self._closed = [*self._closed, cache][-_KEPT_CACHES:]


class OnnxRuntimeCache:
    """K/V arrays (rows, G, T, D) per layer and the bound forwards over them."""

    def __init__(self, engine: OnnxRuntimeEngine, rows: int) -> None:
        model = engine.info.model
        self.rows, self.seconds, self._engine = rows, 0.0, engine
        self._session, self._info = engine.session, engine.info
        self.capacity = 0  # slots per row now allocated
        self._shape = (rows, model.num_kv_heads, 0, model.head_dim)
        self._pad_id = int(model.mask_id == 0)  # any id but the mask
        self._caches: dict[str, np.ndarray] = {
            name: np.zeros(self._shape, _NUMPY[engine.info.build.dtype]) for name in cache_names(model.num_layers)
        }
        self._forwards: dict[_Shape, _Forward] = {}
        self._bound_rows: dict[tuple[int, int], _BoundRows] = {}

    def forward(self, passes: Sequence[Pass], first: int = 0) -> list[Prediction]:
        """See `engine.Cache.forward`."""
        size = predicted = end = 0
        logits = False
        for p in passes:
            size, predicted = max(size, p.ids.size), max(predicted, p.predicted.size)
            end, logits = max(end, p.write_at), logits or p.logits
        if end + size > self.capacity:
            self._reserve(end + size)
        bound = self._forwards.get((first, len(passes), size, predicted, logits))
        if bound is None:
            bound = self._bind((first, len(passes), size, predicted, logits))
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
        self._shape, self.capacity = (rows, heads, new, width), new
        for name, cache in self._caches.items():
            self._caches[name] = np.zeros(self._shape, cache.dtype)
            self._caches[name][:, :, :old] = cache

    def _bind(self, shape: _Shape) -> _Forward:
        kept = [other for other in self._forwards if other[-1] == shape[-1]]
        if len(kept) >= (_KEPT_WITH_LOGITS if shape[-1] else _KEPT_FORWARDS):
            del self._forwards[kept[0]]
        forward = _Forward(self._session, self._info, self._rows(shape[0], shape[1]), shape)
        self._forwards[shape] = forward
        return forward

    def _rows(self, first: int, count: int) -> _BoundRows:
        """Each cache's rows as ONNX Runtime sees them, made once: they are most of what a new shape binds."""
        import onnxruntime

        found = self._bound_rows.get((first, count))
        if found is None:
            views = {name: cache[first : first + count] for name, cache in self._caches.items()}
            found = {name: (view, onnxruntime.OrtValue.ortvalue_from_numpy(view)) for name, view in views.items()}
            self._bound_rows[first, count] = found
        return found


class _Forward:
    """The arrays and the IOBinding of one shape (first row, rows, S, R, with logits or not)."""

    def __init__(self, session: Any, info: EngineInfo, cached: _BoundRows, shape: _Shape) -> None:
        import onnxruntime

        _, rows, size, predicted, with_logits = shape
        lengths = {"B": rows, "S": size, "R": predicted, "V": info.model.vocab_size}
        self.binding = session.io_binding()
        self.arrays: dict[str, np.ndarray] = {}
        self._values: list[Any] = [cached]  # keeps what the binding points to alive

        def bind(names: list[Binding], into: Any) -> None:
            for b in names:
                if b.kind == "compute":
                    into(b.name, cached[b.name.removesuffix("_out")][1])
                    continue
                if b.name == "logits" and not with_logits:
                    continue
                of = [lengths[d] if isinstance(d, str) else d for d in b.shape]
                array = self.arrays[b.name] = np.zeros(of, _NUMPY[b.kind])
                value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
                self._values.append(value)
                into(b.name, value)

        bind(inputs(info.model, info.has_adapter), self.binding.bind_ortvalue_input)
        bind(outputs(info.model), self.binding.bind_ortvalue_output)
        names = ("ids", "pos", "visible", "rows", "write_at", "threshold", "adapter")
        self._inputs = [self._row(row, names) for row in range(rows)]
        outs = ("token", "confidence", "next_ids", "logits")
        self._whole = [Prediction(*self._row(row, outs)) for row in range(rows)]
        # What a row's inputs hold, where the next pass often wants the same: a write costs more than a look.
        self._last_predicted: list[np.ndarray | None] = [None] * rows
        self._threshold = [0.0] * rows

    def _row(self, row: int, names: tuple[str, ...]) -> list[Any]:
        """Views of one row of some arrays, (1,) where a row is a single number, None where there is no array."""
        arrays = [self.arrays.get(name) for name in names]
        return [None if a is None else a[row] if a.ndim > 1 else a[row : row + 1] for a in arrays]

    def fill(self, row: int, p: Pass, pad_id: int) -> None:
        """Write one row's inputs; padding tokens write past the pass and see their own slot only."""
        ids, pos, visible, rows, write_at, threshold, adapter = self._inputs[row]
        size = p.ids.size
        ids[:size], pos[:size], visible[:size], write_at[0] = p.ids, p.pos, p.visible, p.write_at
        if p.predicted is not self._last_predicted[row]:
            rows[: p.predicted.size], rows[p.predicted.size :] = p.predicted, ids.size - 1
            self._last_predicted[row] = p.predicted
        if p.threshold != self._threshold[row]:
            threshold[0] = self._threshold[row] = p.threshold
        if adapter is not None:
            adapter[:size], adapter[size:] = p.adapter, 0
        if size < ids.size:
            own = np.arange(p.write_at + size, p.write_at + ids.size)
            ids[size:], pos[size:] = pad_id, own
            visible[size:] = np.stack([np.zeros_like(own), own, own + 1], axis=1)

    def prediction(self, row: int, p: Pass) -> Prediction:
        """One row's results as views."""
        whole, n = self._whole[row], p.predicted.size
        if n == whole.token.size and p.logits == (whole.logits is not None):
            return whole
        logits = whole.logits[:n] if p.logits and whole.logits is not None else None
        return Prediction(whole.token[:n], whole.confidence[:n], whole.next_ids[:n], logits)
