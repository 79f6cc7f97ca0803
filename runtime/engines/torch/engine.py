"""The torch engine: `TorchModel` over pages of one memory, on the CPU or on a GPU.

A forward is flat tokens of any rows. On a GPU it is one upload, the network and one download, captured as a CUDA graph
for a number of tokens and of predictions, which are rounded up; the sizes of decoding are captured when the engine is
loaded. The CPU has no graphs, so there a pass costs by its tokens, and attention ends where a row does.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ....contract import DEFAULT_GPU_MEMORY_UTILIZATION, MAX_BLOCK, PREFILL_CHUNK, cache_names
from ....engine_folder import EngineInfo
from ....errors import EngineError
from ...images.image import Image
from ..engine import Flight, Pass, Prediction
from ..pages import PAGE, Pages
from .device import TorchDevice
from .flat import FlatShape, graph_shapes
from .forwards import Forwards, TorchFlight
from .memory import Memory, page_count
from .model import TorchModel
from .step import Steps
from .vision import TorchVision

if TYPE_CHECKING:
    from .ranks import Ranks

MOST_TOKENS = 2048  # of a forward's rows that decode; prompts come on top


class TorchEngine:
    """An engine folder loaded into torch.

    Args:
        folder: the engine folder.
        info: its description, from `engine_folder.read_engine`.
        device: a GPU's number, "cpu", None for a GPU if there is one, or a device made before.
        threads: CPU threads, for all of torch in this process; None leaves torch's choice.
        kernels: run the project's Triton kernels; default on a GPU.
        graphs: capture CUDA graphs; default on a GPU. False runs every pass eagerly, for comparison.
        ahead: start passes of mode `ar` before those before them have ended; default on a GPU, as a CPU gains nothing.
        memory: share of the GPU's memory that weights, passes and K/V may take together.
        pages: pages of K/V; None takes what `memory` allows.
        ranks: that hold the model together; this process serves requests if it is rank 0, else it calls `follow`.
        pdl: let kernels begin while those before them end, on cards that can (SM 90 and later); default where the
            environment variable NEMODIFF_PDL is 1. Tokens are the same with it and without.

    Raises:
        EngineError: torch is missing, or the weights do not belong to the description, or do not fit.
        RequestError: there is no such device.
    """

    def __init__(
        self,
        folder: Path,
        info: EngineInfo,
        device: int | Literal["cpu"] | TorchDevice | None = None,
        threads: int | None = None,
        *,
        kernels: bool | None = None,
        graphs: bool | None = None,
        ahead: bool | None = None,
        memory: float = DEFAULT_GPU_MEMORY_UTILIZATION,
        pages: int | None = None,
        ranks: Ranks | None = None,
        pdl: bool | None = None,
    ) -> None:
        self.device = device if isinstance(device, TorchDevice) else TorchDevice(folder, device, threads)
        self.info = info
        self.folder = folder
        self.lock: Any = threading.RLock()  # of the stream and the memory: requests may run in several threads
        is_gpu = self.device.is_gpu
        self.ranks = ranks
        with_kernels = is_gpu if kernels is None else kernels
        wanted = os.environ.get("NEMODIFF_PDL") == "1" if pdl is None else pdl
        early = wanted and self.device.overlaps_launches
        with self.device.use(folder):
            self.model = TorchModel(folder, info, self.device.name, with_kernels, ranks, early)
            own = dataclasses.replace(info, model=self.model.config)
            # Rank 0 alone looks at images; the others get what it sees as embeddings.
            seeing = info.model.vision is not None and (ranks is None or ranks.rank == 0)
            self._vision = TorchVision(folder, info, self.device.name) if seeing else None
            if pages is None:
                pages = page_count(self.device, folder, own, MOST_TOKENS + PREFILL_CHUNK, memory)
            if ranks is not None:
                pages = ranks.agree(pages)
            self.memory = Memory(self.device, own, self.model.dtype, pages)
            if ranks is not None and ranks.rank == 0:
                self.memory.record()
            self.steps = Steps(folder, self.device, self.model, self.memory, info, is_gpu if graphs is None else graphs)
            self.forwards = Forwards(folder, self.steps, is_gpu if ahead is None else ahead, self.lock)
        self.pass_seconds: dict[int, float] = {}  # of a pass by its tokens, as the warm-up has met them
        self.samples = self.model.kernels and ranks is None  # drawing needs the whole vocabulary

    @property
    def pages(self) -> Pages:
        """See `engine.Engine`."""
        return self.memory.pages

    @property
    def captured(self) -> int:
        """Graphs made since the engine was loaded."""
        return self.steps.captured

    @property
    def compiled(self) -> int:
        """Kernels that had to be compiled since the engine was loaded."""
        return 0 if self.steps.kernels is None else self.steps.kernels.compiled

    @property
    def eager_shapes(self) -> dict[FlatShape, str]:
        """Shapes that cannot be captured, and why."""
        return self.steps.eager_shapes

    @property
    def lost(self) -> str | None:
        """Why the engine will never run again, if it will not."""
        return None if self.ranks is None else self.ranks.lost

    def open(self, rows: int) -> TorchCache:
        """A cache of `rows` empty rows. Raises EngineError where all rows of the page table are taken."""
        with self.lock:
            numbers = self.pages.open(rows)
        if numbers is None:
            raise EngineError(
                f"{self.folder}: {rows} rows are asked for and {self.pages.open_rows} are in use, allowed together: "
                f"{len(self.pages.table) - 1}; close what is not needed, or build with a larger --max-batch-size"
            )
        return TorchCache(self, numbers)

    def see(self, image: Image) -> np.ndarray:
        """See `engine.SeeingEngine.see`."""
        assert self._vision is not None
        with self.lock, self.device.use(self.folder):
            return self._vision.see(image)

    def graph_shapes(self) -> list[FlatShape]:
        """The shapes of decoding: a chunk of a prompt with masks, beside a block of every other row."""
        build = self.info.build
        blocks = min(MOST_TOKENS, (build.max_batch_size - 1) * build.block_length)
        most = blocks + PREFILL_CHUNK + MAX_BLOCK
        ahead = build.max_batch_size if self.forwards.ahead else 0
        return graph_shapes(most, ahead, images=self.info.model.vision is not None)

    def warm_up(self, show: Callable[[list[FlatShape]], Iterable[FlatShape]] = iter) -> None:
        """Compile and capture the shapes of decoding, which `show` sees go by; nothing where there are no graphs."""
        if self.steps.graphs:
            self.pass_seconds = self.forwards.warm_up(show(self.graph_shapes()))

    def follow(self) -> None:
        """Compute what rank 0 does until it ends; for the other ranks."""
        assert self.ranks is not None
        self.forwards.obey(self.ranks)

    def close(self) -> None:
        """End the other ranks; one rank has nothing to do."""
        if self.ranks is not None:
            self.ranks.close()


class TorchCache:
    """See `engine.PagedCache`; its rows are numbered from 0 and have other numbers in the engine's table."""

    def __init__(self, engine: TorchEngine, rows: list[int]) -> None:
        self.rows = rows
        self.seconds = 0.0
        self.most_tokens = MOST_TOKENS
        self._engine = engine
        self._forwards = engine.forwards
        self._memory = engine.memory
        self._lock = engine.lock
        # One that is forgotten holds no pages either.
        self._given_back = weakref.finalize(self, _give_back, self._lock, self._forwards, self._memory.pages, rows)
        self._given_back.atexit = False

    def forward(self, passes: Sequence[Pass], first: int = 0) -> list[Prediction]:
        """See `engine.Cache.forward`. Raises EngineError where other rows have all the memory."""
        rows = range(first, first + len(passes))
        with self._lock:
            for row, p in zip(rows, passes, strict=True):
                end = p.write_at + p.ids.size
                if not self.reserve(row, p.write_at, end):
                    pages = self._memory.pages
                    raise EngineError(
                        f"{self._engine.folder}: {end} slots of K/V are needed, of {pages.slots} {pages.free * PAGE} "
                        "are free; let other requests end first, or allow more by --gpu-memory-utilization"
                    )
            flight = self.launch(passes, rows)
            predictions = flight.finish()
        self.seconds += flight.seconds
        return predictions

    def launch(self, passes: Sequence[Pass], rows: Sequence[int]) -> TorchFlight:
        """See `engine.PagedCache.launch`."""
        return self._forwards.launch(passes, [self.rows[row] for row in rows])

    def follow(
        self, flight: Flight, passes: Sequence[Pass], rows: Sequence[int], fed: Sequence[int]
    ) -> TorchFlight | None:
        """See `engine.PagedCache.follow`."""
        assert isinstance(flight, TorchFlight)
        return self._forwards.follow(flight, passes, [self.rows[row] for row in rows], fed)

    def reserve(self, row: int, begin: int, end: int) -> bool:
        """See `engine.PagedCache.reserve`."""
        with self._lock, self._engine.device.use(self._engine.folder):
            return self._memory.reserve(self.rows[row], begin, end)

    def share(self, source: int, target: int, slots: int) -> int:
        """See `engine.PagedCache.share`."""
        with self._lock:
            return self._memory.pages.share(self.rows[source], self.rows[target], slots)

    def move(self, source: int, target: int, slots: int) -> None:
        """See `engine.Cache.move`."""
        if not self.share(source, target, slots):
            raise EngineError(f"row {source} has fewer than {slots} slots, so they cannot be given to row {target}")

    def free(self, row: int) -> None:
        """See `engine.PagedCache.free`.

        A forward under way may still write to what it holds: on a GPU before any forward that gets it next.
        """
        with self._lock:
            if not self._engine.device.is_gpu:
                self._forwards.settle()
            self._memory.pages.drop(self.rows[row])

    def set_spare(self, row: int) -> None:
        """See `engine.PagedCache.set_spare`."""
        with self._lock:
            self._memory.pages.set_spare(self.rows[row])

    def read(self, row: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """See `engine.ReadableCache.read`."""
        engine = self._engine
        with self._lock, engine.device.use(engine.folder):
            self._forwards.settle()
            held = self._memory.read(self.rows[row], start, stop)
        if self._engine.ranks is not None:
            raise EngineError(f"{engine.folder}: each rank has its own part of K/V; read them with --tp-size 1")
        names = cache_names(engine.info.model.num_layers)
        return dict(zip(names, held.reshape(-1, *held.shape[2:]), strict=True))

    def close(self) -> None:
        """See `engine.Cache.close`."""
        self._given_back()


def _give_back(lock: Any, forwards: Forwards, pages: Pages, rows: list[int]) -> None:
    with lock:
        forwards.settle()
        pages.close(rows)
