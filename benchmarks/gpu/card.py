"""The card that is measured: its clock, its memory, and the ceilings that figures are compared with.

The ceilings are the bytes and operations per second that a plain copy and a plain matrix product reach in the same run,
since cards of one name differ. On the CPU the same code runs over the host's clock, as a test; its figures mean
nothing.
"""

from __future__ import annotations

import collections
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nemodiff.runtime.engines.torch.device import TorchDevice

ROUNDS = {True: (5, 50, 0.3), False: (1, 1, 0.0)}  # at least, at most, and seconds that are enough; on a GPU or not


class Card(TorchDevice):
    """The device, with marks around every step of an engine that runs on it."""

    def __init__(self, device: str) -> None:
        super().__init__(Path("engine"), "cpu" if device == "cpu" else 0, threads=1)
        import torch

        self.torch = torch
        self._begun: Any = None  # where the last step begins
        self._steps = collections.deque[tuple[Any, Any]]()  # their marks, until they are known to have ended
        self._last = 0.0  # seconds of the last one that has
        self.spent = 0.0  # seconds on the device, of all steps so far
        if self.is_gpu:
            about = torch.cuda.get_device_properties(0)
            self.label = about.name
            self.sm = 10 * about.major + about.minor
            self.total = int(about.total_memory)
            self.cache_bytes = int(getattr(about, "L2_cache_size", 2**26))
        else:
            self.label = "cpu"
            self.sm = 0
            self.total = 2**34
            self.cache_bytes = 2**16

    @property
    def about(self) -> dict[str, Any]:
        """What identifies the card in a report."""
        values = {"name": self.label, "sm": self.sm, "memory_bytes": self.total, "torch": self.torch.__version__}
        return {**values, "cuda": self.torch.version.cuda, "second_level_cache_bytes": self.cache_bytes}

    # An engine's step begins with an upload and ends with a download; another may begin before this one is waited for.
    def upload(self, buffer: Any) -> None:
        self._begun = self.mark()
        super().upload(buffer)

    def download(self, buffer: Any) -> None:
        super().download(buffer)
        self._steps.append((self._begun, self.mark()))

    def wait(self, mark: Any) -> None:
        super().wait(mark)
        while self._steps and (not self.is_gpu or self._steps[0][1].query()):
            self._last = self.between(*self._steps.popleft())
            self.spent += self._last

    def step_seconds(self) -> float:
        """What the last step took on the device, once it is done."""
        return self._last

    def median(self, work: Callable[[], Any]) -> float:
        """Median seconds of some work, run until it is known; everything it starts is waited for."""
        times: list[float] = []
        with self.use(Path("benchmark")):
            for _ in self.rounds():
                start = self.mark()
                work()
                end = self.mark()
                self.synchronize()
                times.append(self.between(start, end))
        return statistics.median(times)

    def rounds(self) -> Iterator[int]:
        """The turns of a measurement: a few, or more if the work is short."""
        least, most, enough = ROUNDS[self.is_gpu]
        started = time.perf_counter()
        for turn in range(most):
            if turn >= least and time.perf_counter() - started > enough:
                return
            yield turn

    def per_launch(self, launches: Sequence[Callable[[], Any]]) -> float:
        """Median seconds of one of some launches, all of them in one graph, one after the other.

        Alone, a launch would be timed with the host's share of it; twice over the same memory, with the second-level
        cache.
        """

        def everything() -> None:
            for launch in launches:
                launch()

        if not self.is_gpu:
            return self.median(everything) / len(launches)
        with self.use(Path("benchmark")):
            everything()  # compiles
            self.synchronize()
            made = self.capture(everything)
            if isinstance(made, str):
                raise RuntimeError(f"the launches cannot be captured: {made}")
            made.replay()
        return self.median(made.replay) / len(launches)

    def sets(self, nbytes: int) -> int:
        """How many copies of some inputs are needed for each to be out of the second-level cache when it is read."""
        return max(4, min(64, -(-4 * self.cache_bytes // max(nbytes, 1)))) if self.is_gpu else 1

    def synchronize(self) -> None:
        """Wait for everything."""
        TorchDevice.wait(self, TorchDevice.mark(self))

    def start_peak(self) -> None:
        """Count the highest use of memory from here on."""
        if self.is_gpu:
            self.torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int | None:
        """Bytes that were in use at most; unknown on the CPU."""
        return int(self.torch.cuda.max_memory_allocated()) if self.is_gpu else None

    def forget(self) -> None:
        """Give back what is not in use."""
        if self.is_gpu:
            self.torch.cuda.empty_cache()

    def ceilings(self, dtype: str) -> dict[str, float]:
        """Bytes per second of a copy (read and written) and operations per second of a matrix product in `dtype`."""
        torch = self.torch
        kind = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
        nbytes, width = (2**30, 8192) if self.is_gpu else (2**22, 128)
        with self.use(Path("benchmark")):
            a = torch.empty(nbytes // 4, dtype=torch.int32, device=self.name).random_()
            b = torch.empty_like(a)
            x = torch.randn(width, width, device=self.name).to(kind)
            y = torch.empty_like(x)
        for _ in range(2):  # the first time the clock is still rising
            copy = 2 * nbytes / self.median(lambda: b.copy_(a))
            product = 2 * width**3 / self.median(lambda: torch.mm(x, x, out=y))
        return {"copy_bytes_per_second": copy, "matrix_operations_per_second": product}
