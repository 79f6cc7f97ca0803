"""One shape of a forward: its arrays, bound once."""

from __future__ import annotations

import functools
import operator
from typing import Any

import numpy as np

from ....contract import MEMORY_PATTERN, Binding, inputs, outputs
from ....engine_info import EngineInfo
from ..layout import PassShape
from ..passes import Pass, Prediction, read_only

NUMPY: dict[str, type] = {"i8": np.int8, "i32": np.int32, "f32": np.float32, "f16": np.float16}
_PATTERNED = 7  # the first schema whose graph has the input MEMORY_PATTERN
_PATTERNS = 1024  # at most: ONNX Runtime forgets none, and one takes a kilobyte for each layer
BoundRows = dict[str, tuple[np.ndarray, Any]]  # by cache: a view of its rows and the view's OrtValue


class Bindings:
    """What an engine's graph takes and gives, listed once, as a list takes longer than to bind it; and its patterns."""

    def __init__(self, info: EngineInfo) -> None:
        kv_bits = info.build.kv_bits
        self.inputs = inputs(info.model, info.has_adapter, kv_bits)
        if info.manifest.schema >= _PATTERNED:
            self.inputs.append(MEMORY_PATTERN)
        self.outputs = outputs(info.model, kv_bits=kv_bits)
        self._patterns: dict[PassShape, int] = {}

    def pattern(self, shape: PassShape) -> int:
        """The number of a shape's own memory pattern, in every cache; shapes beyond _PATTERNS share one."""
        key = shape._replace(first=0)
        if key not in self._patterns and len(self._patterns) >= _PATTERNS:
            return _PATTERNS
        return self._patterns.setdefault(key, len(self._patterns))


class Forward:
    """The arrays and the IOBinding of one shape."""

    def __init__(self, session: Any, bindings: Bindings, vocab: int, caches: BoundRows, shape: PassShape) -> None:
        self.binding = session.io_binding()
        self.arrays: dict[str, np.ndarray] = {}
        self._caches = caches
        self._embedded = shape.embedded
        self._values: list[Any] = []  # keeps what the binding points to alive
        self._lengths = {"B": shape.rows, "S": shape.tokens, "R": shape.predicted, "V": vocab}
        self._lengths["F"] = shape.rows * shape.tokens if shape.embedded else 1
        self._lengths["T"] = next(iter(caches.values()))[0].shape[2]
        self._lengths["P"] = bindings.pattern(shape)
        sizes = [size for binding in bindings.inputs for size in self._sizes(binding)]
        self._lengths["P"] = functools.reduce(operator.xor, sizes)  # so that with it in P's place that number is left
        self._bind(bindings.inputs, self.binding.bind_ortvalue_input)
        unbound = "" if shape.logits else "logits"
        self._bind([b for b in bindings.outputs if b.name != unbound], self.binding.bind_ortvalue_output)
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
        self._predictions = list(self._whole)  # of as many tokens as that
        self._threshold = [0.0] * shape.rows

    def _bind(self, bindings: list[Binding], bind_value: Any) -> None:
        """Bind the caches' memory and a new array for everything else."""
        import onnxruntime

        for binding in bindings:
            cache = binding.name.removesuffix("_out")
            if cache in self._caches:
                # A cache is input and output over the same memory: ONNX Runtime's TensorScatter then skips its copy.
                _, value = self._caches[cache]
            else:
                array: np.ndarray = np.zeros(self._sizes(binding), NUMPY[binding.kind])
                self.arrays[binding.name] = array
                value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
                self._values.append(value)
            bind_value(binding.name, value)

    def _sizes(self, binding: Binding) -> list[int]:
        return [self._lengths[size] if isinstance(size, str) else size for size in binding.shape]

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

    def fill(self, row: int, p: Pass, pad_id: int) -> Prediction:
        """Write one row's inputs, and return views of its results to be.

        Padding tokens write past the pass and see their own slot only.
        """
        ids, pos, visible, rows, write_at, threshold, adapter, embedding = self._inputs[row]
        size = p.ids.size
        if size == ids.size:
            ids[...] = p.ids
            pos[...] = p.pos
            visible[...] = p.visible
        else:
            ids[:size] = p.ids
            pos[:size] = p.pos
            visible[:size] = p.visible
            own = np.arange(p.write_at + size, p.write_at + ids.size)
            ids[size:] = pad_id
            pos[size:] = own
            visible[size:] = np.stack([np.zeros_like(own), own, own + 1], axis=1)
        write_at[0] = p.write_at
        if p.predicted is not self._last_predicted[row]:
            count = p.predicted.size
            rows[:count] = p.predicted
            rows[count:] = ids.size - 1
            self._last_predicted[row] = p.predicted
            self._predictions[row] = self._cut(row, count)
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
        prediction = self._predictions[row]
        return prediction if p.logits or prediction.logits is None else prediction._replace(logits=None)

    def _cut(self, row: int, count: int) -> Prediction:
        """Views of a row's first results."""
        whole = self._whole[row]
        if count == whole.token.size:
            return whole
        logits = None if whole.logits is None else whole.logits[:count]
        return Prediction(whole.token[:count], whole.confidence[:count], whole.next_ids[:count], logits)
