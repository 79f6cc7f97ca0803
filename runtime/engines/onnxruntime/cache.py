"""The rows of K/V on the CPU and the bound forwards over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ....contract import cache_names, caches
from ....engine_info import EngineInfo
from ..layout import PassShape
from ..passes import Pass, Prediction
from .forward import NUMPY, Bindings, BoundRows, Forward
from .memory import Memory

_KEPT_FORWARDS = 256  # bound shapes kept per cache; a prompt's odd last chunk would otherwise pile up
_KEPT_WITH_LOGITS = 16  # of those, shapes whose arrays hold a vocabulary per token


class OnnxRuntimeCache:
    """The K/V of some rows, and the bound forwards over them, each for a capacity; `closed` gets it when it closes."""

    def __init__(
        self,
        session: Any,
        info: EngineInfo,
        bindings: Bindings,
        rows: int,
        closed: Callable[[OnnxRuntimeCache], object],
    ) -> None:
        model = info.model
        self.rows = rows
        self._bits = info.build.kv_bits
        kinds = {"compute": info.build.dtype}
        self.memory = Memory(
            {b.name: (int(b.shape[-1]), NUMPY[kinds.get(b.kind, b.kind)]) for b in caches(model, self._bits)},
            rows,
            model.num_kv_heads,
        )
        self._names = cache_names(model.num_layers)
        self._session = session
        self._bindings = bindings
        self._vocab = model.vocab_size
        self._closed = closed
        self._pad_id = int(model.mask_id == 0)  # any id but the mask
        self._room = 0  # of the memory that the forwards are bound to
        self._forwards: dict[tuple[int, PassShape], Forward] = {}  # by capacity and shape
        self._bound_rows: dict[tuple[int, int, int], BoundRows] = {}  # by capacity, first row and count

    @property
    def capacity(self) -> int:
        """Slots of a row that a forward reads."""
        return self.memory.capacity

    def forward(self, passes: Sequence[Pass], first: int = 0) -> list[Prediction]:
        """See `engine.Cache.forward`."""
        tokens = predicted = 0
        begins, ends = [], []
        logits = embedded = False
        for p in passes:
            size, count = p.ids.size, p.predicted.size
            if size > tokens:
                tokens = size
            if count > predicted:
                predicted = count
            begins.append(p.write_at)
            ends.append(p.write_at + size)
            logits = logits or p.logits
            embedded = embedded or p.embedded is not None
        self.memory.use(first, begins, ends, max(begins) + tokens)
        bound = self._bound(PassShape(first, len(passes), tokens, predicted, logits, False, embedded))
        predictions = [bound.fill(row, p, self._pad_id) for row, p in enumerate(passes)]
        self._session.run_with_iobinding(bound.binding)
        return predictions

    def move(self, source: int, target: int, slots: int) -> None:
        """See `engine.Cache.move`."""
        self.memory.move(source, target, slots)

    def read(self, row: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """See `engine.ReadableCache.read`."""
        held = self.memory.read(row, start, stop)
        if self._bits is None:
            return held
        return {name: held[name] * held[name.replace("cache", "scale")] for name in self._names}

    def free(self, row: int) -> None:
        """See `engine.Cache.free`."""
        self.memory.free(row)

    def close(self) -> None:
        """See `engine.Cache.close`."""
        self._closed(self)

    def _bound(self, shape: PassShape) -> Forward:
        """The forward of a shape over the memory as it is now."""
        if self._room != self.memory.room:
            self._forwards.clear()
            self._bound_rows.clear()
            self._room = self.memory.room
        forward = self._forwards.get((self.memory.capacity, shape))
        if forward is None:
            kept = [key for key in self._forwards if key[1].logits == shape.logits]
            if len(kept) >= (_KEPT_WITH_LOGITS if shape.logits else _KEPT_FORWARDS):
                del self._forwards[kept[0]]
            rows = self._rows(shape.first, shape.rows)
            forward = Forward(self._session, self._bindings, self._vocab, rows, shape)
            self._forwards[self.capacity, shape] = forward
        return forward

    def _rows(self, first: int, count: int) -> BoundRows:
        """Each cache's rows as ONNX Runtime sees them, made once: they are most of what a new shape binds."""
        import onnxruntime

        key = (self.capacity, first, count)
        if key not in self._bound_rows:
            views = self.memory.views(first, count)
            self._bound_rows[key] = {
                name: (view, onnxruntime.OrtValue.ortvalue_from_numpy(view)) for name, view in views.items()
            }
        return self._bound_rows[key]
