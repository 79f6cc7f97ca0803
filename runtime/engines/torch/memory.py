"""K/V of an engine on its device: how many pages there is room for, the pool of them, and the table of its owners."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ....contract import ITEMSIZE, PAGE, cache_slots, kv_bytes_per_token, size_text
from ....engine_info import EngineInfo
from ....errors import EngineError
from ..pages import Pages
from .device import TorchDevice
from .flat import FREE
from .stored import Pool

if TYPE_CHECKING:
    import torch

# A page and the one that becomes its copy, or a row of the page table and what it holds.
Change = tuple[int, int | np.ndarray]

_LEAST_SLOTS = 1024  # of an engine that can answer anything
_SPARE_ROWS = 256  # of the page table, beside two for each of max_batch_size


class Memory:
    """The pool of pages; see `engine.lock` for who may use it.

    Args:
        device: where it lies.
        info: of the engine.
        dtype: of K and V, where they are not of 8 bits.
        count: pages, from `page_count`.
    """

    def __init__(self, device: TorchDevice, info: EngineInfo, dtype: torch.dtype, count: int) -> None:
        import torch

        model, build = info.model, info.build
        self.pages = Pages(count, 2 * build.max_batch_size + _SPARE_ROWS, cache_slots(build) // PAGE + 1)
        # A fresh slot is 0, since 0 times NaN is NaN.
        slots = (model.num_layers, 2, count + 1, model.num_kv_heads, PAGE)
        bits = build.kv_bits
        self.pool = Pool(
            device.zeros((*slots, model.head_dim), {None: dtype, "int8": torch.int8, "fp8": torch.uint8}[bits]),
            device.zeros(slots, torch.float32) if bits else None,
        )
        self.table = device.table(self.pages.table)  # (B, M) i32
        self._device = device
        self._news: list[Change] = []
        self._recording = False

    def copy(self, copies: Iterable[Change]) -> None:
        """Copy pages that a row is about to write to and others hold, in the stream's order."""
        for copy in copies:
            self._apply(copy)

    def show_table(self) -> None:
        """Bring the rows of the page table that have changed to the device."""
        while self.pages.changed:
            row = self.pages.changed.pop()
            self._apply((row, self.pages.table[row].copy()))

    def record(self) -> None:
        """Keep changes for other ranks from now on."""
        self._recording = True

    def news(self) -> list[Change]:
        """The changes since the last call, for other ranks."""
        news, self._news = self._news, []
        return news

    def mirror(self, news: list[Change]) -> None:
        """Do what rank 0 has done."""
        for change in news:
            self._apply(change)

    def _apply(self, change: Change) -> None:
        number, what = change
        if isinstance(what, int):
            self.pool.copy(number, what)
        else:
            self._device.copy_row(self.table, what, number)
        if self._recording:
            self._news.append(change)

    def read(self, row: int, start: int, stop: int) -> np.ndarray:
        """A copy of what slots of a row hold, (L, 2, G, slots, D) f32."""
        pages = self.pages.table[row, : -(-stop // PAGE)].tolist()
        held = self.pool.read(pages).transpose(2, 3).flatten(3, 4)[:, :, :, start:stop]
        values: np.ndarray = held.cpu().numpy()
        return values


def page_bytes(info: EngineInfo) -> int:
    """K and V of a page in all layers."""
    return PAGE * kv_bytes_per_token(info.model, info.build)


def pass_bytes(info: EngineInfo, tokens: int, logits: int, ranks: int = 1) -> int:
    """About what a forward holds at most: of so many tokens the widest tensors of a layer and the head's, and logits.

    Those of FREE predictions have a place of their own, beside those of a forward that has more. A rank makes its own
    part of them, a padded copy of it, and room for the parts of all ranks, of which it is.
    """
    m = info.model
    wide = 4 * m.intermediate_size + 6 * m.hidden_size + 3 * m.num_heads * m.head_dim
    # The head keeps 20 bytes for every tile of 64 vocabulary entries (plugins/ops/head_commit.py).
    rows = FREE if logits <= FREE else FREE + logits
    apart = logits * (2 * -(-m.vocab_size // ranks) + m.vocab_size) if ranks > 1 else 0
    return tokens * (wide * ITEMSIZE[info.build.dtype] + m.vocab_size * 20 // 64) + (rows * m.vocab_size + apart) * 4


def page_count(device: TorchDevice, folder: Path, info: EngineInfo, largest_pass: int, share: float) -> int:
    """Pages beside what is loaded already: what `share` of all memory leaves, and no more than could ever be used.

    That is `max_batch_size` rows of `max_seq_len`, and as many again for kept prefixes. A CPU's pages take memory as
    they are written to, and at most half of what is free now. Raises EngineError where next to nothing is left.
    """
    free, total = device.memory()
    row = cache_slots(info.build) // PAGE
    most = 2 * info.build.max_batch_size * row
    left = int(share * total) - (total - free) - largest_pass if device.is_gpu else free // 2
    count = min(most, left // page_bytes(info))
    least = min(_LEAST_SLOTS // PAGE, row)
    if count < least:
        raise EngineError(
            f"{folder}: {device.name} has {size_text(max(left, 0))} for K/V beside the weights, needs "
            f"{size_text(least * page_bytes(info))} for {least * PAGE} tokens; end what else uses it, raise "
            f"--gpu-memory-utilization ({share:g}), or build again with --dtype bf16"
        )
    return count
