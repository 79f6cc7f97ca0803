"""The torch engine's weights: an engine folder's safetensors file on a device.

In: the file, and the names and shapes that the description wants. Out: `Layer`s of tensors. The surprising fact:
projections that share their input are stacked while they are read, part by part into one tensor, so that loading holds
no more than one part twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import ModelConfig
from ..errors import EngineError

if TYPE_CHECKING:
    from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer's weights; projections are (out, in), those that share their input are stacked."""

    input_norm: Tensor  # (E,)
    qkv: Tensor  # ((H + 2 G) D, E)
    o: Tensor  # (E, H D)
    lora: tuple[Tensor, Tensor] | None  # (rank, H D), (E, rank) with the scale in it
    post_norm: Tensor  # (E,)
    gate_up: Tensor  # (2 F, E)
    down: Tensor  # (E, F)


class WeightsFile:
    """The weights file, read tensor by tensor. Raises EngineError where one is not as expected."""

    def __init__(self, path: Path, device: str, dtype: Any) -> None:
        from safetensors import SafetensorError, safe_open

        self._path, self._device, self._dtype = path, device, dtype
        self._errors = (SafetensorError, OSError, ValueError)
        try:
            self._file: Any = safe_open(path, framework="pt", device=device)
        except self._errors as error:
            raise self._broken(str(error)) from None

    def take(self, name: str, *shape: int) -> Tensor:
        """One weight, by its name in the graph."""
        try:
            tensor: Tensor = self._file.get_tensor(f"{name}.weight")
        except self._errors as error:
            raise self._broken(str(error)) from None
        if tuple(tensor.shape) != shape or tensor.dtype != self._dtype:
            raise self._broken(f"{name} is {tensor.dtype} {list(tensor.shape)}, not {self._dtype} {list(shape)}")
        return tensor

    def stack(self, names: Sequence[str], sizes: Sequence[int], size_in: int) -> Tensor:
        """Projections that share their input, one under the other, (sum of sizes, size_in)."""
        import torch

        made = torch.empty(sum(sizes), size_in, dtype=self._dtype, device=self._device)
        end = 0
        for name, size in zip(names, sizes, strict=True):
            made[end : end + size] = self.take(name, size, size_in)
            end += size
        return made

    def layer(self, number: int, model: ModelConfig, adapter: bool) -> Layer:
        """All of one layer."""
        at, hidden, inner = f"layers.{number}", model.hidden_size, model.intermediate_size
        q, kv = (count * model.head_dim for count in (model.num_heads, model.num_kv_heads))
        attention, mlp = f"{at}.self_attn", f"{at}.mlp"
        return Layer(
            self.take(f"{at}.input_layernorm", hidden),
            self.stack([f"{attention}.{part}_proj" for part in "qkv"], [q, kv, kv], hidden),
            self.take(f"{attention}.o_proj", hidden, q),
            self._lora(f"{attention}.o_proj", hidden, q) if adapter else None,
            self.take(f"{at}.post_attention_layernorm", hidden),
            self.stack([f"{mlp}.gate_proj", f"{mlp}.up_proj"], [inner, inner], hidden),
            self.take(f"{mlp}.down_proj", hidden, inner),
        )

    def _lora(self, name: str, size_out: int, size_in: int) -> tuple[Tensor, Tensor]:
        """The two sides of a drafter adapter, whose rank the file says."""
        rank = self._file.get_slice(f"{name}.lora_A.weight").get_shape()[0]
        return self.take(f"{name}.lora_A", rank, size_in), self.take(f"{name}.lora_B", size_out, rank)

    def _broken(self, reason: str) -> EngineError:
        return EngineError(
            f"{self._path}: not the weights of this engine ({reason}); build it again: nemodiff build CHECKPOINT -o "
            f"{self._path.parent} --backend torch"
        )
