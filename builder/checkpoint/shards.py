"""The base weights of a checkpoint folder: one safetensors file, or shards that an index lists.

Where both are there the index decides, as what it names is whole or refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...errors import CheckpointError
from .folder import INDEX, WEIGHTS, read_json
from .safetensors_file import CODES, Tensor, read_header, read_tensors, recomputed

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def open_weights(folder: Path, packed: bool = False) -> dict[str, Tensor]:
    """Find all base tensors of a checkpoint folder, see `read_tensors`. Raises CheckpointError."""
    if (folder / INDEX).is_file():
        tensors = _open_shards(folder, packed)
        if is_stray(folder, tensors):
            _check_stray(folder / WEIGHTS, tensors)
        return tensors
    if (folder / WEIGHTS).is_file():
        return read_tensors(folder / WEIGHTS, packed=packed)
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder / pickles[0]}: a pickle file can run code and is never loaded, allowed: safetensors; "
            "convert it with transformers' save_pretrained first"
        )
    raise CheckpointError(f"{folder}: neither {WEIGHTS} nor {INDEX} is there; give a complete checkpoint folder")


def is_stray(folder: Path, tensors: Mapping[str, Tensor]) -> bool:
    """Whether model.safetensors lies beside the index and none of the tensors is read from it."""
    return (
        (folder / INDEX).is_file()
        and (folder / WEIGHTS).is_file()
        and not any(tensor.file.name == WEIGHTS for tensor in tensors.values())
    )


def _check_stray(stray: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a file whose tensors cannot be those of the index; one that is not whole says nothing."""
    try:
        header, _ = read_header(stray)
    except CheckpointError:
        return
    for name in sorted(header.keys() & tensors.keys()):
        entry, tensor = header[name], tensors[name]
        if (entry["dtype"], tuple(entry["shape"])) != (CODES[tensor.dtype], tensor.shape):
            raise CheckpointError(
                f"{stray}: tensor {name} is {entry['dtype']} {entry['shape']}, allowed: {CODES[tensor.dtype]} "
                f"{list(tensor.shape)} as in {tensor.file.name}, which {INDEX} names; remove {WEIGHTS} or {INDEX}, "
                "whichever is not the model's"
            )


def _open_shards(folder: Path, packed: bool) -> dict[str, Tensor]:
    weight_map = _read_index(folder / INDEX)
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file() and (folder / WEIGHTS).is_file():
            raise CheckpointError(
                f"{folder / shard}: missing although {INDEX} names it; download the file again, or remove {INDEX} if "
                f"{WEIGHTS} is the whole model"
            )
        # A copy of a tensor that the index gives to another file is passed over.
        held = read_tensors(folder / shard, {name for name, file in weight_map.items() if file != shard}, packed)
        for name in sorted(held.keys() - weight_map.keys()):
            raise CheckpointError(
                f"{folder / shard}: holds tensor {name}, which {INDEX} places in no file; download the checkpoint again"
            )
        tensors |= held
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
