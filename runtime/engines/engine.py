"""What the runtime asks of an engine, whatever the backend.

An `Engine` opens a `Cache` of some rows; one `forward` serves the passes (`passes.py`) of consecutive rows together,
each with its own tokens, positions and visibility. A cache knows no lengths: every pass writes its K/V at its own
`write_at`, and what lies past a sequence's length is scratch memory, so a rejected draft costs nothing to undo.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from ...engine_info import EngineInfo
from ..images.image import Image
from .grouping import Arranged
from .pages import Pages
from .passes import Following, Pass, Prediction

NO_LOGITS = (
    "sampling, log-probabilities, grammars and whatever else changes what a model says need logits, and the engine was "
    "built with --no-logits; decode greedily without them, or build it again with --logits"
)


class Cache(Protocol):
    """K/V of some rows of one engine, with the buffers of its forwards."""

    def forward(self, passes: Sequence[Pass], first: int = 0) -> list[Prediction]:
        """Run one forward; `passes[i]` reads and writes row `first + i`, no other row is touched."""
        ...

    def move(self, source: int, target: int, slots: int) -> None:
        """Copy the first `slots` slots of a row over those of another."""
        ...

    def free(self, row: int) -> None:
        """Take note that what a row holds is needed no more; a forward or a copy may use the row all the same."""
        ...

    def close(self) -> None:
        """Give the cache back to its engine; it must not be used afterwards."""
        ...


class ReadableCache(Cache, Protocol):
    """The cache of a backend, whose content can be looked at; for verification alone."""

    def read(self, row: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """A copy of what slots `start` to `stop` of a row hold, by `contract.cache_names`; each (G, slots, D) f32."""
        ...


class Flight(Protocol):
    """A forward that has been started."""

    seconds: float  # from its start to its end, once it is finished

    def finish(self) -> list[Prediction]:
        """Wait for it; its predictions last."""
        ...

    def arranged(self) -> Sequence[Arranged | None]:
        """What came of its passes that are arranged, once the forward that feeds them has ended."""
        ...


class PagedCache(Cache, Protocol):
    """A cache whose rows have pages of a memory that all caches of the engine share.

    Any of its rows share a forward, which pads nothing, and a row begins as another one does by sharing its pages.
    `forward` reserves what it writes, `move` shares.
    """

    most_tokens: int  # of a forward of several rows

    @property
    def ahead(self) -> bool:
        """Whether it starts forwards ahead of others' results."""
        ...

    def launch(self, passes: Sequence[Pass], rows: Sequence[int]) -> Flight:
        """Start a forward; `passes[i]` reads and writes row `rows[i]`, which has been reserved."""
        ...

    def follow(
        self, flight: Flight, passes: Sequence[Following], rows: Sequence[int], fed: Sequence[int]
    ) -> Flight | None:
        """Start a forward before anyone knows what `flight` gives: `passes[i]`, if it is fed, by its pass `fed[i]`.

        Passes that are arranged come last; they share all tokens that the forward has beside the others'.
        None from an engine that cannot, and where another has come between.
        """
        ...

    def reserve(self, row: int, begin: int, end: int) -> bool:
        """Make slots `begin` to `end` of a row its own to write; False where memory is short."""
        ...

    def share(self, source: int, target: int, slots: int) -> int:
        """Let a row begin with `slots` slots of another; 0 where that was spare and has been emptied."""
        ...

    def set_spare(self, row: int) -> None:
        """Let a row be emptied when pages run out."""
        ...


class Engine(Protocol):
    """A loaded engine. It may be used from several threads, each with caches of its own.

    It may also have `clock` (what its forwards are timed by), `pass_seconds` (what a warm-up has met, by tokens),
    `lost` (why it will never run again) and `device.name`: `loading.py` and `planning/cost.py` look for them.
    """

    info: EngineInfo
    samples: bool  # whether it draws tokens where a pass has a temperature; otherwise the host draws from the logits

    @property
    def pages(self) -> Pages | None:
        """The memory of all rows, if its caches are a `PagedCache`; None: rows that share a forward are neighbours."""
        ...

    def open(self, rows: int) -> Cache:
        """A cache of `rows` rows, each of length 0; what its slots hold is undefined."""
        ...


@runtime_checkable
class SeeingEngine(Protocol):
    """An engine of a model that sees images."""

    def see(self, image: Image) -> np.ndarray:
        """The embeddings of an image's tokens, (rows * columns, E) f32."""
        ...
