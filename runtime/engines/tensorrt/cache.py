"""A TensorRT engine's cache: K/V on the device and the forwards over it, which passes are fitted to.

A pass longer than the engine's profiles runs in pieces, and more rows than a profile takes run in parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from ....contract import cache_names
from ....errors import EngineError, RequestError
from ....tensorrt_info import Profile
from ..engine import NO_LOGITS
from ..layout import PassShape, layouts, rounded
from ..passes import Pass, Prediction, read_only
from .device import Pinned
from .forward import Forward, Owner
from .pieces import copied, joined, split

_STORED: dict[str, Any] = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
_KEPT_FORWARDS = 48  # shapes kept per cache, each with an execution context and perhaps a graph


class CacheOwner(Owner, Protocol):
    """What a cache uses of its engine."""

    profiles: tuple[Profile, ...]
    samples: bool

    def using(self) -> AbstractContextManager[None]: ...
    def cache_bytes(self, rows: int) -> int: ...
    def take_back(self, cache: TensorRTCache) -> None: ...


class TensorRTCache:
    """K/V (rows, G, T, D) per layer on the device, the small buffers of a pass, and the forwards over them."""

    def __init__(self, engine: CacheOwner, rows: int) -> None:
        info = engine.info
        device = engine.device
        self.rows = rows
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
            largest = PassShape(
                0,
                most_rows,
                profile.max_tokens,
                profile.max_rows,
                sampled=engine.samples,
                embedded=info.model.vision is not None,
            )
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
            raise RequestError(NO_LOGITS)
        with self._engine.using():
            if all(p.ids.size <= longest for p in passes):
                return self._batch(passes, first)
            return self._in_pieces(passes, first, longest)

    def move(self, source: int, target: int, slots: int | None = None) -> None:
        """See `engine.Cache.move`; without `slots` all that the source row's passes have written."""
        device = self._engine.device
        count = self._ends[source] if slots is None else slots
        head_bytes = self.row_bytes // self._engine.info.model.num_kv_heads
        used_bytes = head_bytes // self.capacity * count  # of each head
        with self._engine.using():
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

    def read(self, row: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """See `engine.ReadableCache.read`."""
        device = self._engine.device
        model = self._engine.info.model
        held = {}
        with self._engine.using():
            pinned = device.pinned(self.row_bytes)
            for name, memory in self.caches.items():
                device.download(pinned.address, memory.address + row * self.row_bytes, self.row_bytes)
                device.wait()
                whole = pinned.array.view(_STORED[self._engine.info.build.dtype])
                heads = whole.reshape(model.num_kv_heads, self.capacity, model.head_dim)
                held[name] = heads[:, start:stop].astype(np.float32)
        return held

    def free(self, row: int) -> None:
        """See `engine.Cache.free`; nothing to do, as T is the same for a row of any length."""

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
        if end + tokens > self.capacity and len(passes) > 1:  # a row near its end beside one with a longer pass
            return [copied(self._batch([p], first + row)[0]) for row, p in enumerate(passes)]
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
            embedded=any(p.embedded is not None for p in passes),
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
        forward.enqueue()
        logits = self._read_logits(with_logits, passes, shape) if with_logits else {}
        self._engine.device.wait()
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
        pinned = read_only(self._logits.array)
        at = 0
        for row in rows:
            count = passes[row].predicted.size
            nbytes = 4 * vocab * count
            self._engine.device.download(self._logits.address + at, source.address + row_bytes * row, nbytes)
            logits[row] = pinned[at : at + nbytes].view(np.float32).reshape(count, vocab)
            at += nbytes
        return logits
