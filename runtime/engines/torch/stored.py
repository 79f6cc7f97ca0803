"""K and V as they are stored: pages of the engine's dtype, or of 8 bits with a scale for every token and head.

The numbers are those of `plugins/ops/kv_cache.py`. What plain torch writes and reads here, the kernels do themselves.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

from ....contract import KvBits
from ....plugins.ops.kv_cache import LARGEST

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Stored(NamedTuple):
    """K or V of one layer."""

    pages: Tensor  # (P, G, PAGE, D) compute, i8, or e4m3 as its bits in u8
    scales: Tensor | None  # (P, G, PAGE) f32, of 8 bits

    def put(self, page: Tensor, offset: Tensor, rows: Tensor) -> None:
        """Write the rows (N, G, D) of N tokens to their places, (N,) i64."""
        if self.scales is None:
            self.pages[page, :, offset] = rows
        else:
            self.pages[page, :, offset], self.scales[page, :, offset] = _quantised(rows, self._bits)

    def get(self, pages: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The numbers of some pages, or of all, (m, G, PAGE, D)."""
        held = self.pages if pages is None else self.pages[pages]
        if self.scales is None:
            return held
        scales = self.scales if pages is None else self.scales[pages]
        return _numbers(held, scales).to(dtype)

    @property
    def _bits(self) -> KvBits:
        return "int8" if self.pages.dtype.is_signed else "fp8"


@dataclasses.dataclass(frozen=True)
class Pool:
    """K and V of all layers and pages."""

    pages: Tensor  # (L, 2, P, G, PAGE, D)
    scales: Tensor | None  # (L, 2, P, G, PAGE) f32

    def __len__(self) -> int:
        """Pages."""
        return self.pages.shape[2]

    def layers(self) -> list[tuple[Stored, Stored]]:
        """K and V of each layer."""
        if self.scales is None:
            return [(Stored(k, None), Stored(v, None)) for k, v in self.pages]
        return [
            (Stored(k, k_scale), Stored(v, v_scale))
            for (k, v), (k_scale, v_scale) in zip(self.pages, self.scales, strict=True)
        ]

    def copy(self, source: int, target: int) -> None:
        """Copy a page over another."""
        for part in (self.pages, self.scales):
            if part is not None:
                part[:, :, target] = part[:, :, source]

    def read(self, pages: list[int]) -> Tensor:
        """What some pages hold, (L, 2, m, G, PAGE, D) f32."""
        held = self.pages[:, :, pages]
        return held.float() if self.scales is None else _numbers(held, self.scales[:, :, pages])


def _quantised(rows: Tensor, bits: KvBits) -> tuple[Tensor, Tensor]:
    """`kv_cache.quantise` in torch."""
    import torch

    most = LARGEST[bits]
    scale = (rows.float().abs().amax(-1) / most).clamp(min=torch.finfo(torch.float32).tiny)
    over = (rows.float() / scale[..., None]).clamp(-most, most)
    if bits == "int8":
        return over.round().to(torch.int8), scale
    return over.to(torch.float8_e4m3fn).view(torch.uint8), scale


def _numbers(values: Tensor, scales: Tensor) -> Tensor:
    """`kv_cache.dequantise` in torch."""
    import torch

    if values.dtype == torch.int8:
        return values * scales[..., None]  # one loop; e4m3 has no products
    return values.view(torch.float8_e4m3fn).float() * scales[..., None]
