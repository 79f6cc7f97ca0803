"""What an engine's manifest says of its checkpoint and of its own files."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path

from ..contract import Backend
from ..engine_info import SCHEMA, Manifest
from ..tensorrt_info import TensorRTInfo
from ..version import __version__
from .checkpoint.adapter import Adapter
from .checkpoint.hub import Source
from .files import sha256

_PACKAGES = ("onnx", "numpy", "ml_dtypes", "safetensors")
FileEntry = dict[str, object]  # bytes and sha256


def file_entry(path: Path, digest: str | None = None, once: bool = False) -> FileEntry:
    """A file's size and sha256, which is `digest` if it is known; with `once` what has been read is forgotten."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path, once) if digest is None else digest}


def folder_entries(folder: Path, digests: Mapping[str, str]) -> dict[str, FileEntry]:
    """The entry of every file in a folder; `digests` holds those that are known."""
    entries = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            entries[name] = file_entry(path, digests.get(name))
    return entries


def make_manifest(
    backend: Backend,
    source: Source,
    checkpoint_files: dict[str, FileEntry],
    adapter: Adapter | None,
    files: dict[str, FileEntry],
    tensorrt: TensorRTInfo | None,
) -> Manifest:
    """Describe an engine: where it comes from, what it was made with and what its folder holds."""
    versions = {"nemodiff": __version__, **{name: importlib.metadata.version(name) for name in _PACKAGES}}
    if tensorrt:
        versions[tensorrt.module] = tensorrt.version
    return Manifest(
        schema=SCHEMA,
        backend=backend,
        versions=versions,
        checkpoint={"name": source.name, "revision": source.revision, "files": checkpoint_files},
        adapter=_adapter_entry(adapter) if adapter else None,
        files=files,
        tensorrt=tensorrt,
    )


def _adapter_entry(adapter: Adapter) -> dict[str, object]:
    return {"name": "linear_spec_lora", "rank": adapter.rank, "scale": adapter.scale, "acts_in": ["draft"]}
