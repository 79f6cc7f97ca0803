"""The base weights of a checkpoint folder: one safetensors file, or shards that an index lists."""

from __future__ import annotations

from pathlib import Path

from ...errors import CheckpointError
from .folder import INDEX, WEIGHTS, read_json
from .safetensors_file import Tensor, read_tensors, recomputed

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def open_weights(folder: Path) -> dict[str, Tensor]:
    """Find all base tensors of a checkpoint folder. Raises CheckpointError."""
    if (folder / WEIGHTS).is_file():
        return read_tensors(folder / WEIGHTS)
    if (folder / INDEX).is_file():
        return _open_shards(folder)
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder / pickles[0]}: a pickle file can run code and is never loaded, allowed: safetensors; "
            "convert it with transformers' save_pretrained first"
        )
    raise CheckpointError(f"{folder}: neither {WEIGHTS} nor {INDEX} is there; give a complete checkpoint folder")


def _open_shards(folder: Path) -> dict[str, Tensor]:
    weight_map = _read_index(folder / INDEX)
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        for name, tensor in read_tensors(folder / shard).items():
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


def _read_index(index: Path) -> dict[str, str]:
    """The file name of each tensor; a name that points anywhere else is refused."""
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
    return {name: shard for name, shard in weight_map.items() if not recomputed(name)}
