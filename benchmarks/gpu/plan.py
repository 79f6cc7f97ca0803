"""What a run of `gpu.py` is made of: cells, each one figure with an estimate, and the laboratory they are measured in.

In: nothing but what is asked for. Out: `Cell`, made by the sections without a device, so that a plan can be printed
anywhere; `Lab`, the device with the one model that it holds at a time. The surprising fact: a cell is the unit of
everything: of the order, of the time budget, of what memory forbids and of what an interrupted run keeps.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu.card import Card
from gpu.models import SHAPES

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large a run is: the released sizes on a card, or numbers that a CPU is done with at once."""

    sizes: tuple[int, ...]
    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    kernel_sizes: tuple[int, ...]
    kernel_contexts: tuple[int, ...]
    compiled: tuple[tuple[int, int], ...]  # rows and context of the compiled peer
    prompt: int
    new_tokens: int
    questions: int
    answer: int  # tokens of an answer to a question, at most


GPU = Scale(
    sizes=(1, 2, 4, 8, 16, 32, 64, 128, 256),
    rows=(1, 4, 16, 64),
    contexts=(512, 4096, 32768),
    kernel_sizes=(1, 8, 32, 64),
    kernel_contexts=(4096, 32768),
    compiled=((1, 512), (1, 4096), (16, 4096), (4, 512), (64, 512), (1, 32768)),
    prompt=512,
    new_tokens=256,
    questions=10,
    answer=64,
)
CPU = Scale((1, 4), (1, 2), (64, 128), (1,), (64,), ((1, 64),), 16, 12, 1, 8)


class Lab:
    """A card, and the one thing that is held on it."""

    def __init__(self, card: Card, ceilings: dict[str, float]) -> None:
        self.card, self.ceilings = card, ceilings
        self._key: Any = None
        self._held: Any = None

    def hold(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` makes, kept until another key is asked for."""
        if self._key != key:
            self.let_go()
            self._held, self._key = make(), key
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
    measure: Callable[[Lab], Row]

    @property
    def name(self) -> str:
        """Its place in the report."""
        return f"{self.section}/{self.shape}/{self.key}"


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a run is asked for."""

    shapes: tuple[str, ...]
    dtype: str
    checkpoint: Path
    scale: Scale

    def __post_init__(self) -> None:
        unknown = [shape for shape in self.shapes if shape not in SHAPES]
        if unknown:
            raise SystemExit(f"--shapes holds {unknown[0]!r}, allowed: {', '.join(SHAPES)}; choose some of them")
