"""Keeps one cell from costing a run: one that hangs, or that breaks the card for its process, ends the process.

The next process goes on after it (`scripts/measure-gpu`): a file names the cell that is measured, so one that took the
process with it is known too.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from gpu.plan import Cell, Figures

BROKEN = 3  # exit status of a process that another one should follow
PATIENCE = 45.0  # seconds, and three times a cell's estimate, until it counts as hanging on a card
GRACE = 12.0  # seconds after a run's end for the cell that is being measured; `scripts/measure-gpu` gives 20


class Guard:
    """Watches the cells of one process.

    Args:
        folder: where it is noted what is measured; None for nowhere.
        put: takes a cell's figures by its name and writes them.
        patience: seconds beside a cell's estimate; None is for ever.
    """

    def __init__(
        self, folder: Path | None, put: Callable[[str, Figures], None], patience: float | None = PATIENCE
    ) -> None:
        self._note = None if folder is None else folder / "gpu.cell"
        self._put = put
        self._patience = patience

    def last(self) -> None:
        """Take note of a cell that has ended the process before."""
        if self._note is not None and self._note.is_file():
            self._put(self._note.read_text(encoding="utf-8"), {"skipped": "failed: it ended the process"})
            self._note.unlink()

    @contextlib.contextmanager
    def watch(self, cell: Cell, left: float) -> Iterator[None]:
        """While a cell is measured, with so many seconds left of the run."""
        if self._note is not None:
            self._note.parent.mkdir(parents=True, exist_ok=True)
            self._note.write_text(cell.name, encoding="utf-8")
        seconds = min((self._patience or 0.0) + 3 * cell.seconds, max(left, 0.0) + GRACE)
        timer = threading.Timer(seconds, self._end, [cell, f"it took more than {seconds:.0f} s"])
        timer.daemon = True
        if self._patience is not None:
            timer.start()
        try:
            yield
        finally:
            timer.cancel()
            if self._note is not None:
                self._note.unlink(missing_ok=True)

    def check(self, cell: Cell, answers: bool, why: str) -> None:
        """End the process if the card `answers` no more after a cell without figures."""
        if not answers:
            self._end(cell, f"it broke the card for its process: {why}")

    def _end(self, cell: Cell, why: str) -> None:
        """The main thread may wait for ever, so nothing is unwound."""
        self._put(cell.name, {"skipped": f"failed: {why}"})
        if self._note is not None:
            self._note.unlink(missing_ok=True)
        print(f"{cell.name}: {why}; another process goes on", flush=True)
        sys.stdout.flush()
        os._exit(BROKEN)
