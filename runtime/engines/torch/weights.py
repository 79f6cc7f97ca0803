"""The torch engine's weights: an engine folder's safetensors file, read onto a device layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ....config import ModelConfig
from ....contract import BuildConfig
from ....errors import EngineError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A projection in 8 bits."""

    values: Tensor  # (out, in) u8, the bits of e4m3 for the kernel; else compute, 1/256 of each value, which f16 holds
    scale: Tensor  # (out,) f32; for compute values times 256


Matrix: TypeAlias = "Tensor | Quantized"  # (out, in)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer's weights; projections that share their input are stacked."""

    input_norm: Tensor  # (E,)
    qkv: Matrix  # ((H + 2 G) D, E)
    o: Matrix  # (E, H D)
    lora: tuple[Tensor, Tensor] | None  # (rank, H D), (E, rank) with the scale in it
    post_norm: Tensor  # (E,)
    gate_up: Matrix  # (2 F, E)
    down: Matrix  # (E, F)


class WeightsFile:
    """The weights file, read tensor by tensor. Raises EngineError where one is not as expected."""

    def __init__(self, path: Path, device: str, build: BuildConfig, kernels: bool) -> None:
        import torch
        from safetensors import SafetensorError, safe_open

        self._path = path
        self._device = device
        self._quantized = build.quantization is not None
        self._kernels = kernels
        self.dtype: torch.dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[build.dtype]
        self._errors = (SafetensorError, OSError, ValueError)
        try:
            self._file: Any = safe_open(path, framework="pt", device=device)
        except self._errors as error:
            raise self._broken(str(error)) from None

    def take(self, name: str, *shape: int) -> Tensor:
        """One weight, by its name in the graph."""
        return self._take(f"{name}.weight", shape, self.dtype)

    def _take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except self._errors as error:
            raise self._broken(str(error)) from None
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            name = name.removesuffix(".weight")
            raise self._broken(f"{name} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}")
        return tensor

    def _projection(self, names: Sequence[str], sizes: Sequence[int], size_in: int) -> Matrix:
        """Projections that share their input, one under the other, (sum of sizes, size_in)."""
        import torch

        # Read part by part into one tensor, so that loading holds no more than one part twice.
        dtype = torch.uint8 if self._quantized and self._kernels else self.dtype
        values = torch.empty(sum(sizes), size_in, dtype=dtype, device=self._device)
        scale = torch.empty(sum(sizes), dtype=torch.float32, device=self._device)
        end = 0
        for name, size in zip(names, sizes, strict=True):
            here = slice(end, end + size)
            end += size
            if not self._quantized:
                values[here] = self.take(name, size, size_in)
                continue
            stored = self._take(f"{name}.weight", (size, size_in), torch.float8_e4m3fn)
            values[here] = stored.view(torch.uint8) if self._kernels else stored.to(self.dtype) / 256
            scale[here] = self._take(f"{name}.weight_scale", (size,), torch.float32) * (1 if self._kernels else 256)
        return Quantized(values, scale) if self._quantized else values

    def layer(self, number: int, model: ModelConfig, adapter: bool) -> Layer:
        """All weights of one layer."""
        at = f"layers.{number}"
        attention = f"{at}.self_attn"
        mlp = f"{at}.mlp"
        hidden = model.hidden_size
        inner = model.intermediate_size
        q = model.num_heads * model.head_dim
        kv = model.num_kv_heads * model.head_dim
        return Layer(
            self.take(f"{at}.input_layernorm", hidden),
            self._projection([f"{attention}.{part}_proj" for part in "qkv"], [q, kv, kv], hidden),
            self._projection([f"{attention}.o_proj"], [hidden], q),
            self._lora(f"{attention}.o_proj", hidden, q) if adapter else None,
            self.take(f"{at}.post_attention_layernorm", hidden),
            self._projection([f"{mlp}.gate_proj", f"{mlp}.up_proj"], [inner, inner], hidden),
            self._projection([f"{mlp}.down_proj"], [hidden], inner),
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
