"""The GPU engine: TensorRT and TensorRT-RTX over one compiled graph, with caches updated in place.

In: an engine folder. Out: an `Engine`. A forward is one upload, one run and one download, captured as a CUDA graph the
second time its shape comes and replayed from then on. The surprising facts: S and R are rounded up to powers of two, so
that a handful of shapes serves every pass; and a pass longer than the engine's profiles is run in pieces where its
first tokens do not see its last, so a long prompt needs no loop that knows the engine.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ....contract import ITEMSIZE, cache_names
from ....engine_folder import EngineInfo, Profile, cache_slots
from ....errors import EngineError, RequestError
from ....plugins import SAMPLED
from ....plugins.tensorrt.launch import Kernels
from ....plugins.tensorrt.api import Context, TensorRT, load
from .device import Device, Memory, Pinned
from ..engine import Pass, Prediction
from ..layout import layouts, rounded
from .checks import MODEL_INPUT, check_here, check_memory, deserialize
from .forward import Forward, Key, Sampler

_KEPT_FORWARDS = 48  # shapes kept per cache, each with an execution context and perhaps a graph
_KEPT_CACHES = 4  # closed ones


class TensorRTEngine:
    """An engine folder loaded on a GPU.

    Args:
        folder: the engine folder.
        info: its description, from `contract.read_engine`.
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
        self.info, self.folder, self.graphs = info, folder, graphs
        self.api = load(backend, EngineError) if api is None else api
        try:
            self.device = device if isinstance(device, Device) else Device(device)
        except EngineError as error:
            raise EngineError(f"{folder}: {error}") from None
        check_here(folder, info, self.api, self.device)
        self.profiles: tuple[Profile, ...] = about.profiles
        model, has_logits = info.model, info.build.gather_generation_logits
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
        self.eager_shapes: dict[Key, str] = {}  # shapes that cannot be captured, and why
        self.captured = 0  # graphs made since the engine was loaded

    def open(self, rows: int) -> TensorRTCache:
        """A cache of at least `rows` rows: a closed one if there is one, else a new one. Raises EngineError.

        It may have more rows than a forward: those that only keep K/V for later are in no forward.
        """
        with self.lock:
            found = min((c for c in self._closed if c.rows >= rows), key=lambda c: c.rows, default=None)
            if found is not None:
                self._closed.remove(found)
                found.seconds = 0.0
                return found
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
        """A context of its own for every shape, as a captured graph needs; the scratch memory is shared."""
        strategy = self.api.module.ExecutionContextAllocationStrategy.USER_MANAGED
        made = self.engine.create_execution_context(strategy if self._config is None else self._config)
        if made is None or not made.set_optimization_profile_async(profile, self.device.stream):
            raise EngineError(f"{self.folder}: no execution context ({self.api.errors()}); free memory on the GPU")
        made.set_device_memory(self._scratch.address, self._scratch.nbytes)
        return made

    def _runtime_config(self) -> Any:
        """TensorRT-RTX compiles kernels for a shape when it first comes: at once, because a graph would freeze others.

        The configuration is shared, and with it the cache of compiled kernels. Full TensorRT has none.
        """
        strategies = getattr(self.api.module, "DynamicShapesKernelSpecializationStrategy", None)
        if strategies is None:
            return None
        config = self.engine.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        config.set_execution_context_allocation_strategy(
            self.api.module.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        config.set_runtime_cache(config.create_runtime_cache())
        return config


class TensorRTCache:
    """K/V (rows, G, T, D) per layer on the device, the small buffers of a pass, and the forwards over them."""

    def __init__(self, engine: TensorRTEngine, rows: int) -> None:
        info, device = engine.info, engine.device
        self.rows, self.seconds, self.capacity, self._engine = rows, 0.0, engine.capacity, engine
        self._mask_id = info.model.mask_id
        self._ends = [0] * rows  # slots of each row that a pass has written and that may be valid
        names = cache_names(info.model.num_layers)
        self.row_bytes = engine.cache_bytes(1) // len(names)
        self.caches = {name: device.allocate(rows * self.row_bytes) for name in names}
        for memory in self.caches.values():  # slots that a query does not see are multiplied by 0, and must not be NaN
            device.zero(memory.address, memory.nbytes)
        sizes = [
            layouts(engine.info, min(rows, p.max_batch_size), p.max_tokens, p.max_rows, engine.samples)
            for p in engine.profiles
        ]
        self.given = device.pinned(max(given.nbytes for given, _ in sizes))
        self.taken = device.pinned(max(taken.nbytes for _, taken in sizes))
        self.given_there = device.allocate(self.given.array.size)
        self.taken_there = device.allocate(self.taken.array.size)
        device.wait()
        self._logits: Pinned | None = None
        self._forwards: dict[Key, Forward] = {}

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
            parts = [self._split(p, longest) for p in passes]
            done = [
                [_copy(self._batch([part], first + row)[0]) for part in some[:-1]] for row, some in enumerate(parts)
            ]
            last = self._batch([some[-1] for some in parts], first)
            return [_join([*before, after]) for before, after in zip(done, last, strict=True)]

    def move(self, source: int, target: int, slots: int | None = None) -> None:
        """See `engine.Cache.move`; without `slots` all that the source row's passes have written."""
        model, device = self._engine.info.model, self._engine.device
        count = self._ends[source] if slots is None else slots
        head, used = self.row_bytes // model.num_kv_heads, self.row_bytes // model.num_kv_heads // self.capacity * count
        with self._engine.lock:
            device.use()
            for memory in self.caches.values():
                of, to = (memory.address + row * self.row_bytes for row in (source, target))
                if used > head // 2:
                    device.copy(to, of, self.row_bytes)
                    continue
                for at in range(0, self.row_bytes, head):
                    device.copy(to + at, of + at, used)
            device.wait()
        self._ends[target] = count

    def close(self) -> None:
        """See `engine.Cache.close`."""
        self._engine.take_back(self)

    def _split(self, p: Pass, longest: int) -> list[Pass]:
        """Pieces of a pass that fit: a piece ends where no token of it sees what comes after. Raises EngineError."""
        reach = np.maximum.accumulate(np.maximum(p.visible[:, 0], p.visible[:, 2]) - p.write_at)
        ends = np.arange(1, p.ids.size + 1)
        allowed, start, parts = ends[reach <= ends], 0, list[Pass]()
        while start < p.ids.size:
            fitting = allowed[(allowed > start) & (allowed <= start + longest)]
            if not fitting.size:
                raise EngineError(
                    f"{self._engine.folder}: a {p.kind} pass of {p.ids.size} tokens that see each other exceeds the "
                    f"profile, allowed: {longest}; use a shorter block length, or build it again with --max-input-len "
                    f"{p.ids.size}"
                )
            end = int(fitting[-1])
            wanted = p.predicted[(p.predicted >= start) & (p.predicted < end)] - start
            parts.append(
                p._replace(
                    ids=p.ids[start:end],
                    pos=p.pos[start:end],
                    write_at=p.write_at + start,
                    visible=p.visible[start:end],
                    predicted=wanted.astype(np.int32),
                    adapter=p.adapter[start:end] if isinstance(p.adapter, np.ndarray) else p.adapter,
                )
            )
            start = end
        return parts

    def _batch(self, passes: Sequence[Pass], first: int) -> list[Prediction]:
        """Passes that fit the profiles' S; in several runs if the profile has fewer rows."""
        size, predicted = max(p.ids.size for p in passes), max(1, *(p.predicted.size for p in passes))
        fits = [p for p in self._engine.profiles if size <= p.max_tokens and predicted <= p.max_rows]
        number = self._engine.profiles.index(next((p for p in fits if len(passes) <= p.max_batch_size), fits[0]))
        profile = self._engine.profiles[number]
        end, most = max(p.write_at for p in passes), profile.max_batch_size
        tokens = rounded(size, profile.max_tokens)
        tokens = tokens if end + tokens <= self.capacity else size
        if end + tokens > self.capacity:
            raise EngineError(
                f"{self._engine.folder}: a pass of {tokens} tokens at slot {end} exceeds the cache, allowed: "
                f"{self.capacity} slots; shorten the request, or build it again with a larger --max-seq-len"
            )
        wanted, sampled = rounded(predicted, min(profile.max_rows, tokens)), any(p.temperature for p in passes)
        if len(passes) <= most:
            return self._run(number, passes, (first, len(passes), tokens, wanted, sampled))
        found: list[Prediction] = []
        for at in range(0, len(passes), most):
            some = passes[at : at + most]
            found += map(_copy, self._run(number, some, (first + at, len(some), tokens, wanted, sampled)))
        return found

    def _run(self, profile: int, passes: Sequence[Pass], key: Key) -> list[Prediction]:
        forward = self._forwards.pop(key, None) or Forward(self._engine, self, profile, key)
        self._forwards[key] = forward  # the last used comes last
        while len(self._forwards) > _KEPT_FORWARDS:
            del self._forwards[next(iter(self._forwards))]
        for row, p in enumerate(passes):
            forward.fill(row, p, self._mask_id)
            self._ends[key[0] + row] = p.write_at + p.ids.size
        pass_ = [row for row, p in enumerate(passes) if p.logits and p.predicted.size]
        started = time.perf_counter()
        forward.enqueue()
        logits = self._read_logits(pass_, passes, key) if pass_ else {}
        self._engine.device.wait()
        self.seconds += time.perf_counter() - started
        return [forward.prediction(row, p.predicted.size, logits.get(row)) for row, p in enumerate(passes)]

    def _read_logits(self, pass_: list[int], passes: Sequence[Pass], key: Key) -> dict[int, np.ndarray]:
        """Start copying the rows of logits that were asked for; views of where they will be, (R, V) f32."""
        source, vocab = self._engine.logits, self._engine.info.model.vocab_size
        assert source is not None
        need = 4 * vocab * sum(passes[row].predicted.size for row in pass_)
        if self._logits is None or self._logits.array.size < need:
            self._logits = self._engine.device.pinned(need)
        found, at = {}, 0
        for row in pass_:
            count = passes[row].predicted.size
            nbytes = 4 * vocab * count
            self._engine.device.download(self._logits.address + at, source.address + 4 * vocab * key[3] * row, nbytes)
            found[row] = self._logits.array[at : at + nbytes].view(np.float32).reshape(count, vocab)
            at += nbytes
        return found


def _copy(p: Prediction) -> Prediction:
    logits = None if p.logits is None else p.logits.copy()
    return Prediction(p.token.copy(), p.confidence.copy(), p.next_ids.copy(), logits)


def _join(parts: list[Prediction]) -> Prediction:
    """The predictions of a pass run in pieces; the commit rule looked at each piece alone."""
    if len(parts) == 1:
        return parts[0]
    logits = [p.logits for p in parts if p.logits is not None]
    return Prediction(
        np.concatenate([p.token for p in parts]),
        np.concatenate([p.confidence for p in parts]),
        np.concatenate([p.next_ids for p in parts]),
        np.concatenate(logits) if logits else None,
    )
