"""The drafter adapter: a LoRA on every o_proj, in a folder of its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from .folder import ADAPTER_CONFIG, ADAPTER_FOLDER, ADAPTER_WEIGHTS, read_json
from .safetensors_file import Tensor, read_tensors

_UNSET = ("use_rslora", "use_dora", "fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The drafter LoRA on every o_proj: y += scale * (x A^T) B^T."""

    folder: Path
    rank: int
    scale: float
    tensors: dict[str, Tensor]

    @property
    def files(self) -> dict[str, Path]:
        """Its files, by the names they have in a whole checkpoint."""
        return {f"{ADAPTER_FOLDER}/{name}": self.folder / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)}


def open_adapter(checkpoint: Path, folder: Path | None) -> Adapter | None:
    """Open the adapter in `folder`, or else the checkpoint's own if it has one. Raises CheckpointError."""
    if folder is None:
        own = checkpoint / ADAPTER_FOLDER
        remedy = f"remove {ADAPTER_FOLDER}/ to build without one"
        return _read(own, remedy, remedy) if own.is_dir() else None
    what = f"a folder with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}"
    if folder.is_file():
        raise CheckpointError(f"{folder}: a file, expected a folder; give --adapter {folder.parent}")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give --adapter {what}")
    inside = folder / ADAPTER_FOLDER
    return _read(folder, f"give --adapter {inside if inside.is_dir() else what}", "build without --adapter")


def _read(folder: Path, complete: str, remedy: str) -> Adapter:
    """An adapter; `complete` is what to do where a file is missing, `remedy` where one says something else."""
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file() and list(folder.glob("*.bin")):
        raise CheckpointError(
            f"{folder}: holds a pickle file, allowed: {folder.name}/{weights.name}; convert it to safetensors"
        )
    for path in (folder / ADAPTER_CONFIG, weights):
        if not path.is_file():
            raise CheckpointError(f"{folder}: {path.name} is missing; {complete}")
    rank, alpha = _read_config(folder / ADAPTER_CONFIG, remedy)
    tensors = read_tensors(weights)
    for name in tensors:
        if not name.startswith("base_model."):
            raise CheckpointError(
                f"{weights}: tensor {name} is not an adapter's, allowed: names that start with "
                "base_model.; use the adapter shipped with the model"
            )
    return Adapter(folder, rank, alpha / rank, tensors)


def _read_config(path: Path, remedy: str) -> tuple[int, float]:
    """The rank and alpha of an adapter that the graph can express."""
    config = read_json(path)

    def refusal(key: str, value: Any, allowed: str) -> CheckpointError:
        return CheckpointError(
            f"{path}: {key} is {value!r}, allowed: {allowed}; use the adapter shipped with the model, or {remedy}"
        )

    rank = config.get("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank <= 0:
        raise refusal("r", rank, "a positive integer")
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, (int, float)) or not 0 < alpha < 1e30:
        raise refusal("lora_alpha", alpha, "a number over 0, below 1e30")
    targets = config.get("target_modules")
    if targets not in (["o_proj"], "o_proj"):
        raise refusal("target_modules", targets, "['o_proj']")
    bias = config.get("bias", "none")
    if bias != "none":
        raise refusal("bias", bias, "'none'")
    for key in _UNSET:
        if config.get(key):
            raise refusal(key, config[key], "unset")
    return rank, float(alpha)
