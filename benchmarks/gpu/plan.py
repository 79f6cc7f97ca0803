"""What a run of `gpu.py` is made of: its configuration, its cells, and the `Lab` that they are measured in.

Cells are made without a device, so that a plan can be printed anywhere. A cell is the unit of the order, of the time
budget, of the memory check and of what an interrupted run keeps.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu.card import Card
from gpu.models import SHAPES

Figures = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large a run is: the released sizes on a card, or numbers that a CPU is done with at once."""

    sizes: tuple[int, ...]
    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    kernel_sizes: tuple[int, ...]
    kernel_contexts: tuple[int, ...]
    narrow: tuple[int, ...]  # tokens of a product that ways to multiply are compared at
    compiled: tuple[tuple[int, int], ...]  # rows and context of the compiled peer
    prompt: int
    new_tokens: int
    questions: int
    answer: int  # tokens of an answer to a question, at most
    requests: tuple[int, ...]  # of a scheduler at the same time


GPU = Scale(
    sizes=(1, 2, 4, 8, 16, 32, 64, 128, 256),
    rows=(1, 4, 16, 64),
    contexts=(512, 4096, 32768),
    kernel_sizes=(1, 8, 32, 64),
    kernel_contexts=(512, 4096, 32768),
    narrow=(1, 8, 32),
    compiled=((1, 512), (1, 4096), (16, 4096), (4, 512), (64, 512), (1, 32768)),
    prompt=512,
    new_tokens=256,
    questions=10,
    answer=64,
    requests=(1, 4, 16, 64),
)
CPU = Scale((1, 4), (1, 2), (64, 128), (1,), (64,), (1, 3), ((1, 64),), 16, 12, 1, 8, (1, 3))


class Lab:
    """A card, and the one model that is held on it."""

    def __init__(self, card: Card, ceilings: dict[str, float]) -> None:
        self.card = card
        self.ceilings = ceilings
        self._key: Any = None
        self._held: Any = None

    def hold(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` makes, kept until another key comes."""
        if self._key != key:
            self.let_go()
            self._held = make()
            self._key = key
        return self._held

    def let_go(self) -> None:
        """Free what is held."""
        self._key = self._held = None
        gc.collect()
        self.card.forget()

    def to_copy_ceiling(self, nbytes: float, seconds: float) -> float:
        """Bytes over time, as a share of what a copy reaches."""
        return nbytes / seconds / self.ceilings["copy_bytes_per_second"]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One figure, or a few that are measured together.

    `nbytes` of device memory at the peak and `seconds` of work are estimates, the latter for an H100 and without
    loading the model; `measure` raises what it likes, an ImportError or OutOfMemoryError among them.
    """

    section: str
    shape: str
    key: str
    nbytes: int
    seconds: float
    measure: Callable[[Lab], Figures]

    @property
    def name(self) -> str:
        """Its place in the report."""
        return f"{self.section}/{self.shape}/{self.key}"


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What a run measures."""

    shapes: tuple[str, ...]
    dtype: str
    checkpoint: Path
    scale: Scale

    def __post_init__(self) -> None:
        unknown = [shape for shape in self.shapes if shape not in SHAPES]
        if unknown:
            raise SystemExit(f"--shapes holds {unknown[0]!r}, allowed: {', '.join(SHAPES)}; choose some of them")
