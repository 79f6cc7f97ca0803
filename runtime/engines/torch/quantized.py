"""Projections in 8 or 4 bits: as the kernels take them (`plugins/ops/linear.py`), or as plain torch does."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from ....contract import Quantization
from ....errors import EngineError, first_line
from ....plugins.ops import linear
from ....plugins.ops.linear import GROUP, LARGEST, MULTIPLE

if TYPE_CHECKING:
    import torch
    from torch import Tensor


CHUNK = 64  # tokens of a product of 8 bits by 8 bits; reading the weights takes longer than multiplying so many


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A projection (out, in) as it is multiplied."""

    kind: Quantization
    # What the kernel takes besides x; else `values` in compute, 1/256 of each number, which f16 holds, and 256 scales.
    # Of fp8_dynamic always `values` and `scale` as they are, values in e4m3 for the kernels and in compute without.
    tensors: Mapping[str, Tensor]


Matrix: TypeAlias = "Tensor | Quantized | tuple[Tensor | Quantized, ...]"  # (out, in), or parts of it by outputs


class Packed(NamedTuple):
    """A projection, or a rank's share of it, as an engine folder has it."""

    kind: Quantization
    numbers: Tensor  # (out, in): e4m3, i8, or u8 from 0 to 15
    scale: Tensor  # (out,) f32, or (out, in / GROUP)
    zero: Tensor  # (out, in / GROUP) u8, the numbers that stand for 0; (out, 0) where all are the middle


def unpacked(fields: Tensor) -> Tensor:
    """Bytes (out, n) of two numbers each, the earlier one in the lower bits, as numbers (out, 2 n) u8."""
    import torch

    return torch.stack((fields & 15, fields >> 4), -1).flatten(1)


def by_8_bits(values: Tensor, scale: Tensor, weight: Quantized, dtype: torch.dtype) -> Tensor:
    """Values (N, in) e4m3 times their scales (N,), times a projection of fp8_dynamic, (N, out); N whole chunks.

    Every product has the same shape, so that the library takes the same kernel and a token's bits do not depend on how
    many share its pass.
    """
    import torch

    of_outputs = weight.tensors["scale"][None]
    matrix = weight.tensors["values"].t()
    parts = [
        torch._scaled_mm(values[at : at + CHUNK], matrix, scale[at : at + CHUNK, None], of_outputs, out_dtype=dtype)
        for at in range(0, len(values), CHUNK)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def check_by_8_bits(folder: Path, device: str, dtype: torch.dtype) -> None:
    """Refuse a card without such products. Raises EngineError."""
    import torch

    numbers = torch.zeros(CHUNK, MULTIPLE, dtype=torch.float8_e4m3fn, device=device)
    scale = torch.ones(CHUNK, dtype=torch.float32, device=device)
    try:
        by_8_bits(numbers, scale, Quantized("fp8_dynamic", {"values": numbers, "scale": scale}), dtype)
    except RuntimeError as error:
        reason = first_line(error)
        raise EngineError(
            f"{folder}: fp8_dynamic needs products of e4m3 with a scale per row, which torch {torch.__version__} does "
            f"not have on {device} ({reason:.120}); build with --quantization fp8"
        ) from None


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """TokenQuantise in plain torch: the values of e4m3 (N, in) in the dtype of x, and scales (N,) f32."""
    import torch

    wide = x.float()
    scale = (wide.abs().amax(-1) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    values = (wide / scale[:, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return values.to(x.dtype), scale


def joined(parts: Sequence[Tensor | Packed], kernels: bool, dtype: torch.dtype) -> Matrix:
    """Projections that share their input as one, or as parts where they are not of one form."""
    import torch

    stored = [part for part in parts if isinstance(part, Packed)]
    if len(stored) == len(parts) and len({part.zero.shape[1] for part in stored}) == 1:
        numbers, scale, zero = (torch.cat(tensors) for tensors in zip(*(part[1:] for part in stored), strict=True))
        return ready(Packed(stored[0].kind, numbers, scale, zero), kernels, dtype)
    return tuple(ready(part, kernels, dtype) if isinstance(part, Packed) else part for part in parts)


def ready(part: Packed, kernels: bool, dtype: torch.dtype) -> Tensor | Quantized:
    """As the kernels take it, or plain torch."""
    import torch

    kind, numbers, scale, zero = part
    if kind == "fp8_dynamic":
        return Quantized(kind, {"values": numbers if kernels else numbers.to(dtype), "scale": scale})
    if kernels:
        if kind == "int4":
            weight, scale, zero = linear.arranged(numbers, scale, zero)
            return Quantized(kind, {"weight": weight, "scale": scale, "zero": zero})
        none = numbers.new_empty(0, dtype=torch.uint8)
        return Quantized(kind, {"weight": numbers.view(torch.uint8), "scale": scale, "zero": none})
    if kind == "int4":
        middle = zero.float() if zero.shape[1] else torch.full_like(scale, 8.0)
        grouped = numbers.float().view(len(numbers), -1, GROUP)
        return ((grouped - middle[:, :, None]) * scale[:, :, None]).flatten(1).to(dtype)
    return Quantized(kind, {"values": numbers.to(dtype) / 256, "scale": scale * 256})
