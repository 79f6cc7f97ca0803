"""Launches the kernels of ops over an engine's tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ....config import ModelConfig
from ....errors import EngineError
from ....plugins.failure import refusal
from ....plugins.op import Arg, Op, run

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Launcher:
    """What all launches of an engine have in common."""

    config: ModelConfig  # of this rank; the source of the kernels' constants
    dtype: torch.dtype  # compute
    pdl: bool  # let kernels begin while those before them end; for cards from SM 90 on

    def __call__(self, op: Op, inputs: Mapping[str, Any], known: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """Run an op's kernels; they write into the known tensors, by name, and into new ones otherwise.

        Raises EngineError where the card, its assembler or this machine refuses a kernel.
        """
        import torch

        types = {"f32": torch.float32, "i32": torch.int32, "u8": torch.uint8, "compute": self.dtype}
        device = next(iter(inputs.values())).device

        def new(arg: Arg, shape: tuple[int, ...]) -> Tensor:
            if known is not None and arg.name in known:
                return known[arg.name]
            return torch.empty(shape, dtype=types[arg.dtype], device=device)

        try:
            return run(op, self.config, inputs, new, pdl=self.pdl)
        except Exception as error:
            dtype = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}[self.dtype]
            if (why := refusal(error, dtype)) is None:
                raise
            raise EngineError(f"{op.name} in {dtype}, heads of {self.config.head_dim}, on {device} {why}") from None


def tile(sizes: tuple[int, int], count: int) -> int:
    """The tile of an op that has two, for `count` positions: the smaller if it holds them all."""
    few, many = sizes
    return few if count <= few else many
