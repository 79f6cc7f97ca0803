"""A cache of the torch engine: some rows of its page table, and the forwards over them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from ....contract import PAGE, cache_names
from ....errors import EngineError
from ..engine import Flight
from ..pages import Pages
from ..passes import Following, Pass, Prediction
from .forwards import Forwards, TorchFlight

MOST_TOKENS = 2048  # of a forward's rows that decode; prompts come on top


class TorchCache:
    """See `engine.PagedCache`; its rows are numbered from 0 and have other numbers in the engine's table."""

    def __init__(self, forwards: Forwards, rows: list[int]) -> None:
        self.rows = rows
        self.most_tokens = MOST_TOKENS
        self._forwards = forwards
        self._device = forwards.device
        self._folder = forwards.folder
        self._memory = forwards.memory
        self._lock = forwards.lock
        # One that is forgotten holds no pages either.
        self._given_back = weakref.finalize(self, _give_back, self._lock, self._forwards, self._memory.pages, rows)
        self._given_back.atexit = False

    @property
    def ahead(self) -> bool:
        """See `engine.PagedCache.ahead`."""
        return self._forwards.ahead

    def forward(self, passes: Sequence[Pass], first: int = 0) -> list[Prediction]:
        """See `engine.Cache.forward`. Raises EngineError where other rows have all the memory."""
        rows = range(first, first + len(passes))
        with self._lock:
            for row, p in zip(rows, passes, strict=True):
                end = p.write_at + p.ids.size
                if not self.reserve(row, p.write_at, end):
                    pages = self._memory.pages
                    raise EngineError(
                        f"{self._folder}: {end} slots of K/V are needed, of {pages.slots} {pages.free * PAGE} "
                        "are free; let other requests end first, or allow more by --gpu-memory-utilization"
                    )
            return self.launch(passes, rows).finish()

    def launch(self, passes: Sequence[Pass], rows: Sequence[int]) -> TorchFlight:
        """See `engine.PagedCache.launch`."""
        return self._forwards.launch(passes, [self.rows[row] for row in rows])

    def follow(
        self, flight: Flight, passes: Sequence[Following], rows: Sequence[int], fed: Sequence[int]
    ) -> TorchFlight | None:
        """See `engine.PagedCache.follow`."""
        assert isinstance(flight, TorchFlight)
        return self._forwards.follow(flight, passes, [self.rows[row] for row in rows], fed)

    def reserve(self, row: int, begin: int, end: int) -> bool:
        """See `engine.PagedCache.reserve`."""
        with self._lock:
            copies = self._memory.pages.reserve(self.rows[row], begin, end)
            if copies:
                with self._device.use(self._folder):
                    self._memory.copy(copies)
        return copies is not None

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
            if not self._device.is_gpu:
                self._forwards.wait()
            self._memory.pages.drop(self.rows[row])

    def set_spare(self, row: int) -> None:
        """See `engine.PagedCache.set_spare`."""
        with self._lock:
            self._memory.pages.set_spare(self.rows[row])

    def read(self, row: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """See `engine.ReadableCache.read`."""
        steps = self._forwards.steps
        with self._lock, self._device.use(self._folder):
            self._forwards.wait()
            held = self._memory.read(self.rows[row], start, stop)
        if steps.model.ranks is not None:
            raise EngineError(f"{self._folder}: each rank has its own part of K/V; read them with --tp-size 1")
        names = cache_names(steps.info.model.num_layers)
        return dict(zip(names, held.reshape(-1, *held.shape[2:]), strict=True))

    def close(self) -> None:
        """See `engine.Cache.close`."""
        self._given_back()


def _give_back(lock: Any, forwards: Forwards, pages: Pages, rows: list[int]) -> None:
    with lock:
        forwards.wait()
        pages.close(rows)
