"""A card that lags behind its host, on the CPU: what is put into its stream runs when somebody waits for it.

That is as late as a card may run it, or at some time before, and buffers of the host are others than the card's. So a
host that overwrites what has not been copied yet, or that gives pages away in another order than the stream's, gets
other tokens; and what needs the stream fails outside of `use`. It does not show what CUDA itself allows.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stand_ins.torch_graphs import RecordingDevice

from nemodiff.plugins.ops.paged_attention import PROGRAMS
from nemodiff.runtime.engines.torch.device import Buffer, TorchDevice
from nemodiff.runtime.engines.torch.model import TorchModel
from nemodiff.runtime.engines.torch.step import Step
from nemodiff.runtime.engines.torch.stored import Pool


class LaggingDevice(TorchDevice):
    """A GPU for all that asks; its graphs are the steps' own network.

    Args:
        monkeypatch: puts what steps launch and the copies of pages into the stream.
        haste: how likely the stream goes on by itself when something is put into it.
    """

    overlaps_launches = False
    programs = PROGRAMS

    def __init__(self, monkeypatch: pytest.MonkeyPatch, haste: float = 0.0) -> None:
        super().__init__(Path("engine"), "cpu")
        self.is_gpu = True
        self._haste = haste
        self._random = random.Random(1)
        self._stream = list[Callable[[], Any]]()
        self._done = 0
        self._runs = False
        self._in_use = False
        copy, advance, arrange = Pool.copy, TorchModel.advance, TorchModel.arrange
        monkeypatch.setattr(Step, "_compute", lambda step, views: self._put(lambda: step._network(views)))
        monkeypatch.setattr(TorchModel, "advance", lambda *arguments: self._put(lambda: advance(*arguments)))
        monkeypatch.setattr(TorchModel, "arrange", lambda *arguments: self._put(lambda: arrange(*arguments)))
        monkeypatch.setattr(Pool, "copy", lambda pool, *pages: self._put(lambda: copy(pool, *pages)))

    def _put(self, work: Callable[[], Any]) -> None:
        if self._runs:  # a part of what is in the stream
            work()
            return
        assert self._in_use, "this needs the stream"
        self._stream.append(work)
        if self._random.random() < self._haste:
            self.wait(self._random.randint(self._done, len(self._stream)))

    @contextlib.contextmanager
    def use(self, folder: Path) -> Iterator[None]:
        before, self._in_use = self._in_use, True
        try:
            with self.watched(folder), torch.inference_mode():
                yield
        finally:
            self._in_use = before

    def answers(self) -> bool:
        return True

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def copy_row(self, table: torch.Tensor, pages: np.ndarray, row: int) -> None:
        source = torch.tensor(pages)
        self._put(lambda: table[row].copy_(source))

    def pinned(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.uint8)

    def upload(self, buffer: Buffer) -> None:
        self._put(lambda: buffer.there.copy_(buffer.host))

    def download(self, buffer: Buffer) -> None:
        self._put(lambda: buffer.host.copy_(buffer.there))

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        host = torch.zeros_like(tensor)
        self._put(lambda: host.copy_(tensor))
        return host

    def mark(self) -> int:
        return len(self._stream)

    def between(self, begin: int, end: int) -> float:
        return 1e-3 * (end - begin)

    def wait(self, mark: int) -> None:
        with torch.inference_mode():
            while self._done < mark:
                work = self._stream[self._done]
                self._stream[self._done] = _nothing
                self._done += 1
                self._runs = True
                try:
                    work()
                finally:
                    self._runs = False

    def graph_pool(self) -> None:
        return None


# What may stand for a card: eager is a CPU, whose forwards run when they are waited for.
DEVICES: dict[str, Callable[[pytest.MonkeyPatch], Any]] = {
    "lagging": LaggingDevice,
    "hasty": lambda monkeypatch: LaggingDevice(monkeypatch, 0.5),
    "graphs": lambda monkeypatch: RecordingDevice(),
    "eager": lambda monkeypatch: "cpu",
}


def _nothing() -> None:
    """Stands where something has run."""
