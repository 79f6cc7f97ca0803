"""Projections of tokens: x weight^T, by torch or where the weights have few bits by the project's kernels."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ....plugins.ops import low_bit_linear, token_quantise
from .launcher import Launcher, tile
from .quantized import CHUNK, Matrix, Quantized, by_8_bits, quantised

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Projections:
    """How an engine multiplies, with kernels if it has a launcher."""

    dtype: torch.dtype  # compute
    launch: Launcher | None

    def __call__(self, x: Tensor, weight: Matrix) -> Tensor:
        """x weight^T: (N, in) -> (N, out) compute."""
        import torch
        from torch.nn import functional

        if isinstance(weight, tuple):
            return torch.cat([self(x, part) for part in weight], -1)
        if not isinstance(weight, Quantized):
            return functional.linear(x, weight)
        if weight.kind == "fp8_dynamic":
            return self._by_8_bits(x, weight)
        if self.launch is not None:
            op = low_bit_linear.op(weight.kind, tile(low_bit_linear.TILES, len(x)))
            return self.launch(op, {"x": x, **weight.tensors})[0]
        values, scale = weight.tensors["values"], weight.tensors["scale"]
        return (functional.linear(x, values).float() * scale).to(self.dtype)

    def _by_8_bits(self, x: Tensor, weight: Quantized) -> Tensor:
        """The same of fp8_dynamic, which rounds every token to e4m3."""
        import torch
        from torch.nn import functional

        if self.launch is None:
            values, scale = quantised(x)
            sums = functional.linear(values, weight.tensors["values"]).float()
            return (sums * scale[:, None] * weight.tensors["scale"]).to(self.dtype)
        room = -(-len(x) // CHUNK) * CHUNK  # rows past the last token hold anything and are dropped
        values = torch.empty((room, x.shape[1]), dtype=torch.uint8, device=x.device)
        scale = torch.empty(room, dtype=torch.float32, device=x.device)
        self.launch(token_quantise.OP, {"x": x}, {"values": values, "scale": scale})
        return by_8_bits(values.view(torch.float8_e4m3fn), scale, weight, self.dtype)[: len(x)]
