"""A checkpoint's tensors, each read when it is needed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..errors import CheckpointError, system_reason
from .quantized import PARTS, SCALES, Parts, dequantized, kind

# safetensors gives NumPy no numbers of 8 bits with an exponent, so files are read here.
_DTYPES: dict[str, Any] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I8": np.int8,
    "U8": np.uint8,
    "I32": np.int32,
}

_PARTS = (
    "input_layernorm",
    *(f"self_attn.{part}_proj" for part in "qkvo"),
    "post_attention_layernorm",
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
)


class Weights:
    """The safetensors files of a checkpoint folder and of a drafter adapter, if the engine has one.

    Raises CheckpointError where a file cannot be read.
    """

    def __init__(self, folder: Path, adapter: Path | None) -> None:
        self.folder = folder
        self.config: Mapping[str, Any] = _json(folder / "config.json")
        self._files: dict[str, Path] = {}
        index = folder / "model.safetensors.index.json"
        names = set(_json(index)["weight_map"].values()) if index.is_file() else {"model.safetensors"}
        for file in sorted(names):
            self._list(folder / file)
        self._scale = np.float32(1)
        self._adapter = adapter is not None
        if adapter is not None:
            values = _json(adapter / "adapter_config.json")
            self._scale = np.float32(values["lora_alpha"] / values["r"])
            self._list(adapter / "adapter_model.safetensors")

    def read(self, name: str) -> np.ndarray:
        """One tensor as f32, which may be a quantized projection."""
        base = name.removesuffix(".weight")
        if not any(f"{base}.{scale}" in self._files for scale in SCALES):
            return self._tensor(name).astype(np.float32)
        try:
            return dequantized(self._parts(base), self._bits)
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"{self.folder}: {name} is quantized in a way that cannot be read ({error}); download it again"
            ) from None

    def kept(self, quantization: str | None) -> bool:
        """Whether an engine of this quantization has the checkpoint's own numbers."""
        bases = [base for base, _, part in (name.rpartition(".") for name in self._files) if part in SCALES]
        if quantization is None or not bases:
            return False
        return kind(self._parts(bases[0]), self._bits) == quantization.removesuffix("_dynamic")

    @property
    def _bits(self) -> int:
        """Of an integer of a quantized checkpoint, as its config.json says."""
        values = self.config.get("quantization_config") or {}
        groups = [group["weights"]["num_bits"] for group in values.get("config_groups", {}).values()]
        return int(values.get("bits") or (groups or [4])[0])

    def _parts(self, base: str) -> Parts:
        names = {part: f"{base}.{part}" for part in PARTS}
        return {part: self._tensor(whole) for part, whole in names.items() if whole in self._files}

    def _tensor(self, name: str) -> np.ndarray:
        path = self._files.get(name)
        if path is None:
            raise CheckpointError(f"{self.folder}: has no tensor {name}; give the checkpoint the engine was built from")
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                entry = json.loads(file.read(size))[name]
                start, stop = entry["data_offsets"]
                file.seek(8 + size + start)
                flat = np.frombuffer(file.read(stop - start), _DTYPES[entry["dtype"]])
                return flat.reshape(entry["shape"])
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path}: not readable ({error}); download the file again") from None

    def layer(self, number: int) -> dict[str, np.ndarray]:
        """The tensors of a layer by their part of the name; those of the adapter are `lora_A` and `lora_B`."""
        at = f"encoder.layers.{number}"
        layer = {part: self.read(f"{at}.{part}.weight") for part in _PARTS}
        if self._adapter:
            for side, scale in (("A", np.float32(1)), ("B", self._scale)):
                layer[f"lora_{side}"] = self.read(f"base_model.model.{at}.self_attn.o_proj.lora_{side}.weight") * scale
        return layer

    def _list(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                self._files |= dict.fromkeys(file.keys(), path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not readable ({error}); give a complete checkpoint folder") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = system_reason(error)
        raise CheckpointError(f"{path}: not readable ({reason}); give a complete checkpoint folder") from None
    return values
