"""A Hugging Face checkpoint folder, opened strictly and read from headers alone.

In: a folder with `config.json` and safetensors (one file, or shards behind an index), perhaps `linear_spec_lora/`, or
an adapter's folder elsewhere.
Out: `Checkpoint`, which knows where each tensor lies; `Tensor.array()` maps one tensor without reading it. The
surprising fact: the drafter adapter's own safetensors lie in a subfolder and must never be taken for base weights.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from ...config import ModelConfig, parse_config
from ...engine_folder import CONFIG_FILE, GENERATION_FILE, TEMPLATE_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from ...errors import CheckpointError
from ..files import forget

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_FOLDER = "linear_spec_lora"
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
ADAPTER_CONFIG, ADAPTER_WEIGHTS = (f"{ADAPTER_FOLDER}/{name}" for name in _ADAPTER_FILES)
# Files carried into the engine as they are; the first one must be there.
CARRIED = (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, TEMPLATE_FILE, GENERATION_FILE)

DTYPES: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one tensor lies."""

    file: Path
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def array(self) -> np.ndarray:
        """The tensor as a read-only map of the file."""
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)

    def forget(self) -> None:
        """Let the system take back the memory that holds it; every map of it must be gone."""
        with self.file.open("rb") as file:
            forget(file, self.offset, self.nbytes)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The drafter LoRA on every o_proj: y += scale * (x A^T) B^T."""

    folder: Path
    rank: int
    scale: float
    tensors: dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder's description."""

    folder: Path
    config: dict[str, Any]
    model: ModelConfig
    tensors: dict[str, Tensor]
    adapter: Adapter | None

    @property
    def files(self) -> dict[str, Path]:
        """The files the engine is made from, by the names they have in a whole checkpoint, in a fixed order."""
        present = [self.folder / name for name in (CONFIG_FILE, *CARRIED)]
        base = {t.file for t in self.tensors.values()} | {p for p in present if p.is_file()}
        named = {path.name: path for path in base}
        if self.adapter:
            named |= {f"{ADAPTER_FOLDER}/{name}": self.adapter.folder / name for name in _ADAPTER_FILES}
        return dict(sorted(named.items()))


def open_checkpoint(folder: Path, adapter: Path | None = None) -> Checkpoint:
    """Read config and tensor headers of a checkpoint folder, and its drafter adapter, or that of the folder `adapter`.

    Raises CheckpointError.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such folder; give a checkpoint folder or a hub id like nvidia/Nemotron-Labs-Diffusion-8B"
        )
    config = read_json(folder / CONFIG_FILE)
    generation = folder / GENERATION_FILE
    model = parse_config(config, read_json(generation) if generation.is_file() else None)
    if not (folder / TOKENIZER_FILE).is_file():
        raise CheckpointError(
            f"{folder / TOKENIZER_FILE}: missing; an engine carries its tokenizer, so download the checkpoint again"
        )
    _check_tokenizer(folder, model.vocab_size)
    return Checkpoint(folder, config, model, _open_weights(folder), _open_adapter(folder, adapter))


def _check_tokenizer(folder: Path, vocab_size: int) -> None:
    """Refuse here what the engine could only refuse once it is built."""
    path = folder / TOKENIZER_FILE
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{path}: not a tokenizer ({error}); download the file again") from None
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= vocab_size:
        raise CheckpointError(
            f"{path}: holds token id {highest}, allowed: ids below vocab_size {vocab_size} of {CONFIG_FILE}; "
            "download the checkpoint again"
        )
    if (folder / TOKENIZER_CONFIG_FILE).is_file():
        read_json(folder / TOKENIZER_CONFIG_FILE)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; give a complete checkpoint folder") from None
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); download the file again") from None
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{path}: holds a {type(values).__name__}, allowed: a JSON object; download the file again"
        )
    return values


def _open_weights(folder: Path) -> dict[str, Tensor]:
    if (folder / WEIGHTS).is_file():
        return _read_header(folder / WEIGHTS)
    if (folder / INDEX).is_file():
        return _open_shards(folder)
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder / pickles[0]}: a pickle file can run code and is never loaded, allowed: safetensors; "
            "convert it with transformers' save_pretrained first"
        )
    raise CheckpointError(f"{folder}: neither {WEIGHTS} nor {INDEX} is there; give a complete checkpoint folder")


def _open_shards(folder: Path) -> dict[str, Tensor]:
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing or empty; download the file again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", "..") or "\\" in shard:
            raise CheckpointError(
                f"{index}: tensor {name} is said to lie in {shard!r}, allowed: a plain file name in the same "
                "folder; do not use this checkpoint"
            )
        if not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: tensor {name} is said to lie in {shard!r}, allowed: a .safetensors file; "
                "convert the checkpoint to safetensors first"
            )
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        header = _read_header(folder / shard)
        for name, tensor in header.items():
            if weight_map.get(name) != shard:
                raise CheckpointError(
                    f"{folder / shard}: holds tensor {name}, which {INDEX} places in {weight_map.get(name)!r}; "
                    "download the checkpoint again"
                )
            tensors[name] = tensor
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise CheckpointError(
            f"{folder / weight_map[missing[0]]}: tensor {missing[0]} is missing although {INDEX} places it there; "
            "download the checkpoint again"
        )
    return tensors


def _read_header(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file; safetensors itself proves the header and the file's length."""
    again = "download the file again"
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; {again}")
    try:
        with safe_open(path, framework="np"), path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); {again}") from None
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{path}: tensor {name} has dtype {entry['dtype']}, allowed: {', '.join(DTYPES)}; "
                "use a checkpoint in one of them"
            )
        start = 8 + length + entry["data_offsets"][0]
        tensors[name] = Tensor(path, name, DTYPES[entry["dtype"]], tuple(entry["shape"]), start)
    return tensors


def _open_adapter(checkpoint: Path, chosen: Path | None) -> Adapter | None:
    """The drafter adapter: the chosen one, or the checkpoint's if it has one."""
    folder = checkpoint / ADAPTER_FOLDER if chosen is None else chosen
    if not folder.is_dir():
        if chosen is None:
            return None
        raise CheckpointError(f"{folder}: no such folder; give --adapter a folder with {' and '.join(_ADAPTER_FILES)}")
    path, weights = (folder / name for name in _ADAPTER_FILES)
    config = read_json(path)

    def require(key: str, got: object, right: bool, allowed: str) -> None:
        if not right:
            raise CheckpointError(
                f"{path}: {key} is {got!r}, allowed: {allowed}; use the adapter shipped with the model, or "
                + ("build without --adapter" if chosen else f"remove {ADAPTER_FOLDER}/ to build without one")
            )

    rank, alpha, targets = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
    require("r", rank, isinstance(rank, int) and not isinstance(rank, bool) and rank > 0, "a positive integer")
    require("lora_alpha", alpha, isinstance(alpha, (int, float)) and 0 < alpha < 1e30, "a number over 0, below 1e30")
    require("target_modules", targets, targets in (["o_proj"], "o_proj"), "['o_proj']")
    require("bias", config.get("bias", "none"), config.get("bias", "none") == "none", "'none'")
    for key in ("use_rslora", "use_dora", "fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern"):
        require(key, config.get(key), not config.get(key), "unset")
    if not weights.is_file() and list(folder.glob("*.bin")):
        raise CheckpointError(
            f"{folder}: holds a pickle file, allowed: {folder.name}/{weights.name}; convert it to safetensors"
        )
    assert isinstance(rank, int)
    assert isinstance(alpha, (int, float))
    tensors = _read_header(weights)
    for name in tensors:
        if not name.startswith("base_model."):
            raise CheckpointError(
                f"{weights}: tensor {name} is not an adapter's, allowed: names that start with "
                "base_model.; use the adapter shipped with the model"
            )
    return Adapter(folder, rank, float(alpha) / rank, tensors)
