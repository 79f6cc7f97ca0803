"""What a verification compares with, by what --against names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..builder.checkpoint.folder import ADAPTER_FOLDER
from ..builder.checkpoint.hub import resolve
from ..builder.manifest import file_entry
from ..config import ModelConfig, parse_config
from ..engine_folder import is_engine
from ..engine_info import EngineInfo, read_engine
from ..errors import CheckpointError, RequestError
from ..runtime.loading import LoadedEngine, load
from .arithmetic import STORED, Arithmetic
from .network import Network
from .replay import EngineReference
from .verify import Reference
from .weights import Weights


def open_reference(
    engine: LoadedEngine, against: str | None, adapter: Path | None, threads: int | None
) -> tuple[Reference, str]:
    """The reference and its name: the engine itself without `against`, else an engine or a checkpoint.

    adapter: the folder of the drafter adapter, where it is not in the checkpoint's. Raises RequestError,
    CheckpointError, EngineError.
    """
    if adapter is not None and (against is None or not engine.info.has_adapter):
        raise RequestError(f"adapter is {adapter}, allowed: with --against a checkpoint, of an engine that has one")
    if against is None:
        return EngineReference(engine.backend, engine.backend), "itself"
    if is_engine(Path(against)):
        other = load(against, threads=threads)
        _check_same(engine.info.model, other.info.model, against)
        if engine.info.has_adapter != other.info.has_adapter:
            raise RequestError(f"{against}: only one of the engines has a drafter adapter; choose another engine")
        return EngineReference(other.backend, engine.backend), against
    source = resolve(against)
    weights = Weights(source.folder, None)
    _check_same(engine.info.model, parse_config(weights.config), against)
    if engine.info.has_adapter:
        adapter = adapter or source.folder / ADAPTER_FOLDER
        if not adapter.is_dir():
            raise CheckpointError(f"{adapter}: no such folder, and the engine has a drafter adapter; give --adapter")
        weights = Weights(source.folder, adapter)
    build = engine.info.build
    judged = Arithmetic(
        np.float32,
        STORED[build.dtype],
        build.quantization,
        rounds_inputs=engine.info.manifest.backend == "onnxruntime",
        kv_bits=build.kv_bits,
        group_size=build.group_size,
        mlp_group_size=build.mlp_group_size,
    )
    return Network(weights, judged, threads), source.name


def other_weights(engine: EngineInfo, against: str, adapter: Path | None) -> str | None:
    """What says that a reference has other weights than the engine was built from; by the files' sha256."""
    files = {name: entry for name, entry in _files(engine).items() if name.endswith(".safetensors")}
    if is_engine(Path(against)):
        theirs = _files(read_engine(Path(against)))
    else:
        folder = resolve(against).folder
        folders = {ADAPTER_FOLDER: adapter or folder / ADAPTER_FOLDER}
        paths = {name: folders.get(str(Path(name).parent), folder) / Path(name).name for name in files}
        theirs = {name: file_entry(path) for name, path in paths.items() if path.is_file()}
    for name, entry in files.items():
        if theirs.get(name) != entry:
            state = "differs" if name in theirs else "is missing"
            origin = engine.manifest.checkpoint.get("name")
            return f"{against}: not the weights of {origin!r} that the engine was built from ({name} {state})"
    return None


def _files(engine: EngineInfo) -> Mapping[str, Any]:
    """The files of an engine's checkpoint."""
    files = engine.manifest.checkpoint.get("files")
    return files if isinstance(files, dict) else {}


def _check_same(one: ModelConfig, other: ModelConfig, against: str) -> None:
    """Refuse a model of another shape."""
    for name in ("vocab_size", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "mask_id"):
        mine, theirs = getattr(one, name), getattr(other, name)
        if mine != theirs:
            raise RequestError(
                f"{against}: another model, its {name} is {theirs} and the engine's is {mine}; give the checkpoint "
                "that the engine was built from, or an engine of it"
            )
