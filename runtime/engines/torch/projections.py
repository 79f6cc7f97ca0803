"""Projections of tokens: x weight^T, by torch, or by the project's kernels: of weights of few bits, and on request."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from ....contract import Quantization
from ....plugins.op import Op
from ....plugins.ops import linear, swiglu, token_quantise
from .launcher import Launcher, tile
from .quantized import CHUNK, Matrix, Quantized, by_8_bits, quantised

if TYPE_CHECKING:
    import torch
    from torch import Tensor

OWN = ("qkv", "o", "gate_up", "down")  # projections that the project's kernels can multiply in 16 bits


class Taken(NamedTuple):
    """A projection as the kernels of `linear` take it."""

    kind: Quantization | None  # 16 bits without
    tensors: Mapping[str, Tensor]
    shares: int  # of its inputs


@dataclasses.dataclass(frozen=True)
class Projections:
    """How an engine multiplies, with kernels if it has a launcher."""

    dtype: torch.dtype  # compute
    launch: Launcher | None
    own: frozenset[str] = frozenset()  # some of OWN: by kernels in 16 bits too, where tokens are few

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
        if self.launch is None:
            values, scale = weight.tensors["values"], weight.tensors["scale"]
            return (functional.linear(x, values).float() * scale).to(self.dtype)
        taken = _quantized(x, weight)
        if len(x) > linear.SPLIT_TOKENS:
            return self._run(linear.whole(weight.kind, taken.shares), x, taken)
        return self.launch(linear.share_sum(taken.shares), {"part": self._split(x, taken)})[0]

    def in_shares(self, name: str, x: Tensor, weight: Matrix) -> Tensor:
        """The same of a projection of OWN; or its shares (W, N, out) f32, for a kernel that adds them."""
        taken = self._taken(name, x, weight)
        return self(x, weight) if taken is None or len(x) > linear.SPLIT_TOKENS else self._split(x, taken)

    def gated(self, x: Tensor, weight: Matrix) -> Tensor:
        """silu(gate) * up of gate_up, (N, out / 2)."""
        from torch.nn import functional

        taken = self._taken("gate_up", x, weight)
        if taken is not None and taken.shares == 1:
            return self._run(linear.gated(taken.kind, tile(linear.TILES, len(x))), x, taken)
        both = self.in_shares("gate_up", x, weight)
        if self.launch is not None:
            return self.launch(swiglu.op(shares_of(both)), {"gate_up": both})[0]
        gate, up = both.chunk(2, -1)
        return functional.silu(gate) * up

    def _taken(self, name: str, x: Tensor, weight: Matrix) -> Taken | None:
        """What the kernels of `linear` take, where they multiply these."""
        if self.launch is None or isinstance(weight, tuple):
            return None
        if isinstance(weight, Quantized):
            return None if weight.kind == "fp8_dynamic" else _quantized(x, weight)
        import torch

        outputs, inputs = weight.shape
        if name not in self.own or len(x) > linear.TILES[-1] or inputs % linear.MULTIPLE:
            return None
        none = {
            name: torch.empty(0, dtype=kind, device=x.device)
            for name, kind in (("scale", torch.float32), ("zero", torch.uint8))
        }
        return Taken(None, {"weight": weight, **none}, linear.shares(outputs, inputs))

    def _split(self, x: Tensor, taken: Taken) -> Tensor:
        """Shares of a product, (W, N, out) f32."""
        return self._run(linear.split(taken.kind, tile(linear.TILES, len(x)), taken.shares), x, taken)

    def _run(self, op: Op, x: Tensor, taken: Taken) -> Tensor:
        assert self.launch is not None
        return self.launch(op, {"x": x, **taken.tensors})[0]

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


def _quantized(x: Tensor, weight: Quantized) -> Taken:
    """What the kernels take of few bits."""
    return Taken(weight.kind, weight.tensors, linear.shares(weight.tensors["weight"].shape[-2], x.shape[1]))


def shares_of(product: Tensor) -> int:
    """In how many shares `Projections.in_shares` has multiplied, 0 if it gave the whole."""
    return len(product) if product.ndim == 3 else 0
