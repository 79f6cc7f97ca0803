"""The models that are measured: released sizes with random weights made on the device, or a checkpoint as it is.

No engine folder is built, so a bare checkout is enough.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import make_checkpoint
import safetensors

from nemodiff.config import ModelConfig, parse_config
from nemodiff.contract import ITEMSIZE, PAGE, QUANTIZATIONS, BuildConfig
from nemodiff.engine_info import SCHEMA, EngineInfo, Manifest
from nemodiff.plugins.ops.linear import GROUP
from nemodiff.runtime.engines.torch.engine import TorchEngine
from nemodiff.runtime.loading import LoadedEngine
from nemodiff.runtime.text.codec import TextCodec

TINY: dict[str, int] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "vocab_size": 1024,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
KINDS = tuple(kind for kind, backends in QUANTIZATIONS.items() if "torch" in backends)
SHAPES = (*make_checkpoint.SIZES, "tiny")
CARRIED = make_checkpoint.TINY_CHAT  # the random models use its tokenizer


def config_values(shape: str) -> dict[str, Any]:
    """config.json of a shape."""
    return make_checkpoint.config("8b", TINY) if shape == "tiny" else make_checkpoint.config(shape)


class RandomFile:
    """A shape's weights file that is nowhere: each tensor is drawn on the device when it is read."""

    def __init__(self, shape: str, dtype: Any, device: str, quantization: str | None) -> None:
        import torch

        values = config_values(shape)
        shapes = {**make_checkpoint.shapes(values), **make_checkpoint.adapter_shapes(values)}
        self._shapes = {
            name.removeprefix("base_model.model.").removeprefix("encoder."): s for name, s in shapes.items()
        }
        self._new = functools.partial(torch.empty, dtype=dtype, device=device)
        self._torch = torch
        self._device = device
        self._quantization = quantization

    def _kind(self, name: str) -> str | None:
        """In which bits a weight is, if in few."""
        if name == "diffusion_head.weight":
            return "int8" if self._quantization in ("int8", "int4") else None
        return self._quantization if name.endswith("_proj.weight") else None

    def get_tensor(self, name: str) -> Any:
        """Weights as `make_checkpoint.py` draws them; projections in few bits if the engine is to have such."""
        torch, kind = self._torch, self._kind(name)
        if kind is not None:
            outputs, inputs = self._shapes[name]
            sizes = outputs, inputs // 2 if kind == "int4" else inputs
            bits = torch.randint(0, 120, sizes, dtype=torch.uint8, device=self._device)
            return bits.view({"int8": torch.int8, "int4": torch.uint8}.get(kind, torch.float8_e4m3fn))
        if name.endswith("_scale"):
            weight = name.removesuffix("_scale")
            outputs, inputs = self._shapes[weight]
            sizes = (outputs, inputs // GROUP) if self._kind(weight) == "int4" else (outputs,)
            return torch.full(sizes, 1e-4, device=self._device)
        made = self._new(self._shapes[name])
        return made.normal_(0, make_checkpoint.STD) if made.dim() > 1 else made.fill_(1)

    def get_slice(self, name: str) -> Any:
        """The tensor's shape, and whether it is whole, as safetensors tells it."""
        code = "BF16" if self._kind(name) is None else "U8"
        return SimpleNamespace(get_shape=lambda: list(self._shapes[name]), get_dtype=lambda: code)

    def keys(self) -> list[str]:
        """Names of the checkpoint's own tensors."""
        return list(self._shapes)


class CheckpointFile:
    """A checkpoint's shards as one weights file in the engine's dtype, by the names of the graph."""

    def __init__(self, folder: Path, dtype: Any, device: str) -> None:
        shards = [safetensors.safe_open(path, framework="pt", device=device) for path in folder.glob("*.safetensors")]
        self._shards = {name.removeprefix("encoder."): (name, shard) for shard in shards for name in shard.keys()}  # noqa: SIM118
        self._dtype = dtype

    def get_tensor(self, name: str) -> Any:
        """One tensor."""
        full, shard = self._shards[name]
        return shard.get_tensor(full).to(self._dtype)


@dataclasses.dataclass(frozen=True)
class Work:
    """What passes of a model must do at least."""

    model: ModelConfig
    dtype: str

    @property
    def weight_bytes(self) -> int:
        """Of all weights in memory."""
        return self.model.parameters * ITEMSIZE[self.dtype]

    @property
    def read_bytes(self) -> int:
        """Of the weights that every pass reads: all but the embedding, of which it reads a row per token."""
        return self.weight_bytes - self.model.vocab_size * self.model.hidden_size * ITEMSIZE[self.dtype]

    def moved(self, rows: int, context: int) -> int:
        """Bytes that a pass reads: weights, and the K/V that its queries see."""
        return self.read_bytes + rows * context * self.model.kv_bytes_per_token(ITEMSIZE[self.dtype])

    def operations(self, rows: int, context: int, size: int) -> int:
        """Operations of a pass that predicts all of its tokens, the products of weights and of attention alone."""
        m = self.model
        attention = 4 * context * m.num_heads * m.head_dim * m.num_layers
        return rows * size * (2 * self.read_bytes // ITEMSIZE[self.dtype] + attention)

    def memory(self, rows: int, context: int, size: int) -> int:
        """Bytes at the peak of a pass, about: weights, whole caches, and the widest tensors of a layer and the head."""
        m, item = self.model, ITEMSIZE[self.dtype]
        slots = -(-context // PAGE) * PAGE
        wide = 4 * m.intermediate_size + 6 * m.hidden_size + m.vocab_size
        caches = rows * slots * m.kv_bytes_per_token(item)
        return self.weight_bytes + caches + rows * size * wide * item + min(self.weight_bytes, 2**30)


def work(shape: str, dtype: str) -> Work:
    """Of a shape, without a device."""
    return Work(parse_config(config_values(shape)), dtype)


def load(
    source: str | Path, dtype: Any, card: Any, variant: str | None = None, pages: int | None = None
) -> LoadedEngine:
    """A shape by its name, or a checkpoint by its folder, ready to generate.

    `variant` "adapter" adds a random drafter adapter to a shape, one of KINDS has its projections in these bits; a
    checkpoint's own adapter is left out.
    """
    kind = {"f32": card.torch.float32, "f16": card.torch.float16, "bf16": card.torch.bfloat16}[dtype]
    file: Any
    if isinstance(source, Path):
        values = json.loads((source / "config.json").read_text(encoding="utf-8"))
        about = source / "generation_config.json"
        model = parse_config(values, json.loads(about.read_text(encoding="utf-8")) if about.is_file() else None)
        folder = source
        file = CheckpointFile(source, kind, card.name)
    else:
        values = config_values(source)
        model = parse_config(values)
        folder = CARRIED
        file = RandomFile(source, kind, card.name, variant if variant in KINDS else None)
    build = BuildConfig(
        dtype,
        min(model.max_position, 2**17),
        64,
        model.block_length,
        quantization=variant if variant in KINDS else None,  # type: ignore[arg-type]
    )
    manifest = Manifest(SCHEMA, "torch", {}, {}, {} if variant == "adapter" else None, {})
    with mock.patch.object(safetensors, "safe_open", return_value=file):  # the engine's one door to weights
        backend = TorchEngine(folder, EngineInfo(model, build, manifest, values), card, pages=pages)
    return LoadedEngine(folder, backend, TextCodec(folder), 0.0)
