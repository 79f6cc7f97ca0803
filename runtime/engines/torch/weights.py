"""The torch engine's weights: an engine folder's safetensors file, read onto a device layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....config import ModelConfig
from ....contract import BuildConfig, Quantization
from ....errors import EngineError
from ....plugins.ops.linear import GROUP
from .quantized import Matrix, Packed, Quantized, joined, ready, unpacked

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Share:
    """What a rank has of what is split among `size` ranks."""

    rank: int = 0
    size: int = 1

    def of(self, length: int) -> slice:
        """Its part of an axis; the last rank's is shorter where the ranks do not divide it."""
        own = -(-length // self.size)
        return slice(min(length, self.rank * own), min(length, (self.rank + 1) * own))

    def of_model(self, model: ModelConfig) -> ModelConfig:
        """The model as the ops of a rank see it: its heads, and its part of the inner size."""
        return dataclasses.replace(
            model,
            num_heads=model.num_heads // self.size,
            num_kv_heads=model.num_kv_heads // self.size,
            intermediate_size=model.intermediate_size // self.size,
        )


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

    def __init__(self, path: Path, device: str, build: BuildConfig, kernels: bool, share: Share = Share()) -> None:
        import torch
        from safetensors import SafetensorError, safe_open

        self._path = path
        self._share = share
        self._device = device
        self._quantization = build.quantization
        self._kernels = kernels
        self.dtype: torch.dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[build.dtype]
        self._errors = (SafetensorError, OSError, ValueError)
        try:
            self._file: Any = safe_open(path, framework="pt", device=device)
        except self._errors as error:
            raise self._broken(str(error)) from None

    def take(self, name: str, *shape: int, axis: int | None = None) -> Tensor:
        """One weight of some shape, by its name in the graph; along an axis this rank's share of it."""
        return self._take(f"{name}.weight", shape, self.dtype, axis)

    def _take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, axis: int | None = None) -> Tensor:
        try:
            tensor, found = self._stored(name, shape, None if self._share.size == 1 else axis)
        except self._errors as error:
            raise self._broken(str(error)) from None
        if found != shape or tensor.dtype != dtype:
            name = name.removesuffix(".weight")
            raise self._broken(f"{name} is {tensor.dtype} {list(found)}, not {dtype} {list(shape)}")
        return tensor

    def _stored(self, name: str, shape: tuple[int, ...], axis: int | None) -> tuple[Tensor, tuple[int, ...]]:
        """A tensor, or the share of it that this rank has, and its whole shape."""
        if axis is None:
            whole: Tensor = self._file.get_tensor(name)
            return whole, tuple(whole.shape)
        stored = self._file.get_slice(name)
        found = tuple(stored.get_shape())
        here = [slice(None)] * len(found)
        if found == shape:
            here[axis] = self._share.of(shape[axis])
        return stored[tuple(here)], found

    def _projection(self, names: Sequence[str], sizes: Sequence[int], size_in: int, axis: int) -> Matrix:
        """Projections that share their input, one under the other, (sum of sizes, size_in).

        A rank has some of the rows of each (axis 0), or some of the columns of all (axis 1).
        """
        import torch

        if self._quantization is not None:
            parts = [self._part(name, size, size_in, axis) for name, size in zip(names, sizes, strict=True)]
            return joined(parts, self._kernels, self.dtype)
        # Read part by part into one tensor, so that loading holds no more than one part twice.
        ranks = self._share.size
        rows = [size // ranks if axis == 0 else size for size in sizes]
        width = size_in // ranks if axis == 1 else size_in
        values = torch.empty(sum(rows), width, dtype=self.dtype, device=self._device)
        end = 0
        for name, size, own in zip(names, sizes, rows, strict=True):
            values[end : end + own] = self.take(name, size, size_in, axis=axis)
            end += own
        return values

    def _part(self, name: str, size: int, size_in: int, axis: int) -> Tensor | Packed:
        """A projection of a quantized engine; one that its checkpoint had whole is whole."""
        try:
            is_whole = self._file.get_slice(f"{name}.weight").get_dtype() in ("F32", "F16", "BF16")
        except self._errors as error:
            raise self._broken(str(error)) from None
        if is_whole:
            return self.take(name, size, size_in, axis=axis)
        assert self._quantization is not None
        return self._quantized(f"{name}.weight", self._quantization, size, size_in, axis)

    def _quantized(self, name: str, kind: Quantization, size: int, size_in: int, axis: int) -> Packed:
        """A projection in the bits of a kind, or this rank's share of it."""
        import torch

        if kind != "int4":  # also the weights of fp8_dynamic
            dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
            numbers = self._take(name, (size, size_in), dtype, axis)
            scale = self._take(f"{name}_scale", (size,), torch.float32, 0 if axis == 0 else None)
            return Packed(kind, numbers, scale, scale.new_empty((len(scale), 0)))
        numbers = unpacked(self._take(name, (size, size_in // 2), torch.uint8, axis))
        groups = size_in // GROUP
        scale = self._take(f"{name}_scale", (size, groups), torch.float32, axis)
        if f"{name}_zero" not in self._file.keys():  # noqa: SIM118  (no mapping)
            return Packed(kind, numbers, scale, numbers.new_empty((len(scale), 0)))
        zero = unpacked(self._take(f"{name}_zero", (size, -(-groups // 2)), torch.uint8, 0 if axis == 0 else None))
        return Packed(kind, numbers, scale, zero[:, self._share.of(groups) if axis else slice(groups)])

    def head(self, model: ModelConfig) -> Tensor | Quantized:
        """The language model's head, or this rank's share of the vocabulary; int8 where projections are integers."""
        sizes = model.vocab_size, model.hidden_size
        if self._quantization in ("int8", "int4"):
            return ready(self._quantized("diffusion_head.weight", "int8", *sizes, 0), self._kernels, self.dtype)
        return self.take("diffusion_head", *sizes, axis=0)

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
            self._projection([f"{attention}.{part}_proj" for part in "qkv"], [q, kv, kv], hidden, 0),
            self._projection([f"{attention}.o_proj"], [hidden], q, 1),
            self._lora(f"{attention}.o_proj", hidden, q) if adapter else None,
            self.take(f"{at}.post_attention_layernorm", hidden),
            self._projection([f"{mlp}.gate_proj", f"{mlp}.up_proj"], [inner, inner], hidden, 0),
            self._projection([f"{mlp}.down_proj"], [hidden], inner, 1),
        )

    def _lora(self, name: str, size_out: int, size_in: int) -> tuple[Tensor, Tensor]:
        """The two sides of a drafter adapter, whose rank the file says."""
        rank = self._file.get_slice(f"{name}.lora_A.weight").get_shape()[0]
        return self.take(f"{name}.lora_A", rank, size_in, axis=1), self.take(f"{name}.lora_B", size_out, rank)

    def _broken(self, reason: str) -> EngineError:
        return EngineError(
            f"{self._path}: not the weights of this engine ({reason}); build it again: nemodiff build CHECKPOINT -o "
            f"{self._path.parent} --backend torch"
        )
