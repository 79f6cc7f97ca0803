"""Projections of tokens: x weight^T, by torch, or by the project's kernels: of weights of few bits, and on request."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ....plugins.ops import low_bit_linear, split_linear, swiglu, token_quantise
from .launcher import Launcher, tile
from .quantized import CHUNK, Matrix, Quantized, by_8_bits, quantised

if TYPE_CHECKING:
    import torch
    from torch import Tensor

OWN = ("qkv", "o", "gate_up", "down")  # projections that the project's kernels can multiply in 16 bits


@dataclasses.dataclass(frozen=True)
class Projections:
    """How an engine multiplies, with kernels if it has a launcher."""

    dtype: torch.dtype  # compute
    launch: Launcher | None
    own: frozenset[str] = frozenset()  # some of OWN: where tokens are few, by kernels; see `split_linear`

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

    def in_shares(self, name: str, x: Tensor, weight: Matrix) -> Tensor:
        """The same of qkv, o or down; or its shares (W, N, out) f32, for a kernel that adds them."""
        if (launch := self._for(name, x, weight)) is None:
            return self(x, weight)
        assert not isinstance(weight, Quantized | tuple)
        op = split_linear.op(tile(split_linear.TILES, len(x)), split_linear.shares(*weight.shape))
        return launch(op, {"x": x, "weight": weight})[0]

    def gated(self, x: Tensor, weight: Matrix) -> Tensor:
        """silu(gate) * up of gate_up, (N, out / 2)."""
        from torch.nn import functional

        if (launch := self._for("gate_up", x, weight)) is not None:
            return launch(split_linear.gated(tile(split_linear.TILES, len(x))), {"x": x, "weight": weight})[0]
        both = self(x, weight)
        if self.launch is not None:
            return self.launch(swiglu.OP, {"gate_up": both[None]})[0][0]
        gate, up = both.chunk(2, -1)
        return functional.silu(gate) * up

    def _for(self, name: str, x: Tensor, weight: Matrix) -> Launcher | None:
        """What launches the kernels of `split_linear`, where they multiply these."""
        few = name in self.own and len(x) <= split_linear.TILES[-1]
        fits = not isinstance(weight, Quantized | tuple) and weight.shape[1] % split_linear.MULTIPLE == 0
        return self.launch if few and fits else None

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
