"""Projections in 8 or 4 bits: as the kernels take them (`plugins/ops/low_bit_linear.py`), or as plain torch does."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from ....contract import Quantization
from ....plugins.ops import low_bit_linear
from ....plugins.ops.low_bit_linear import GROUP

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A projection (out, in) as it is multiplied."""

    kind: Quantization
    # What the kernel takes besides x; else `values` in compute, 1/256 of each number, which f16 holds, and 256 scales.
    tensors: Mapping[str, Tensor]


Matrix: TypeAlias = "Tensor | Quantized | tuple[Tensor | Quantized, ...]"  # (out, in), or parts of it by outputs


class Stored(NamedTuple):
    """A projection, or a rank's share of it, as an engine folder has it."""

    kind: Quantization
    numbers: Tensor  # (out, in): e4m3, i8, or u8 from 0 to 15
    scale: Tensor  # (out,) f32, or (out, in / GROUP)
    zero: Tensor  # (out, in / GROUP) u8, the numbers that stand for 0; (out, 0) where all are the middle


def unpacked(fields: Tensor) -> Tensor:
    """Bytes (out, n) of two numbers each, the earlier one in the lower bits, as numbers (out, 2 n) u8."""
    import torch

    return torch.stack((fields & 15, fields >> 4), -1).flatten(1)


def joined(parts: Sequence[Tensor | Stored], kernels: bool, dtype: torch.dtype) -> Matrix:
    """Projections that share their input as one, or as parts where they are not of one form."""
    import torch

    stored = [part for part in parts if isinstance(part, Stored)]
    if len(stored) == len(parts) and len({part.zero.shape[1] for part in stored}) == 1:
        numbers, scale, zero = (torch.cat(tensors) for tensors in zip(*(part[1:] for part in stored), strict=True))
        return ready(Stored(stored[0].kind, numbers, scale, zero), kernels, dtype)
    return tuple(ready(part, kernels, dtype) if isinstance(part, Stored) else part for part in parts)


def ready(part: Stored, kernels: bool, dtype: torch.dtype) -> Tensor | Quantized:
    """As the kernels take it, or plain torch."""
    import torch

    kind, numbers, scale, zero = part
    if kernels:
        counters = torch.zeros(low_bit_linear.counters(*numbers.shape), dtype=torch.int32, device=numbers.device)
        if kind == "int4":
            weight, scale, zero = low_bit_linear.arranged(numbers, scale, zero)
            return Quantized(kind, {"weight": weight, "scale": scale, "zero": zero, "counters": counters})
        return Quantized(kind, {"weight": numbers.view(torch.uint8), "scale": scale, "counters": counters})
    if kind == "int4":
        middle = zero.float() if zero.shape[1] else torch.full_like(scale, 8.0)
        grouped = numbers.float().view(len(numbers), -1, GROUP)
        return ((grouped - middle[:, :, None]) * scale[:, :, None]).flatten(1).to(dtype)
    return Quantized(kind, {"values": numbers.to(dtype) / 256, "scale": scale * 256})
