"""Whether this machine has the disk and the memory that a build or an export needs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from .. import main_memory
from ..contract import Backend, Dtype, size_text
from ..errors import BuildError

SLACK = 64 * 2**20  # bytes kept free beside the weights: model file, headers, tokenizer, file system
# Compiling takes this many times the weights' bytes and as many bytes on top (benchmarks/build_tensorrt.py).
MEMORY_FACTOR = 1.6
MEMORY_BASE = 2**29


def disk_free(path: Path) -> int:
    """Free bytes on the disk that will hold `path`."""
    path = Path(os.path.realpath(path))
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def memory_needed(weight_bytes: int) -> int:
    """An estimate of the anonymous bytes that compiling takes."""
    return int(MEMORY_FACTOR * weight_bytes) + MEMORY_BASE


def check_build_disk(output: Path, weight_bytes: int, dtype: Dtype, compiled: bool) -> None:
    """Refuse an engine that the disk cannot hold. Raises BuildError."""
    # A compiled engine is written while the weights that it is made from are still there.
    need = weight_bytes * (2 if compiled else 1) + SLACK
    free = disk_free(output)
    if free < need:
        smaller = " or build with --dtype f16" if dtype == "f32" else ""
        raise BuildError(
            f"{output}: the engine needs {size_text(need)} of disk, {size_text(free)} are free; free some space, "
            f"choose another --output{smaller}"
        )


def check_compile_memory(backend: Backend, weight_bytes: int) -> None:
    """Refuse to compile an engine for which the memory is too small. Raises BuildError."""
    need = memory_needed(weight_bytes)
    free = main_memory.free()
    if free is not None and free < need:
        raise BuildError(
            f"--backend {backend}: compiling needs about {size_text(need)} of memory, {size_text(free)} are free; "
            "close other programs or build on a larger machine"
        )


def check_export_disk(output: Path, weight_bytes: int, free: int, option: str = "--output") -> None:
    """Refuse an export that the disk cannot hold. Raises BuildError."""
    need = weight_bytes + SLACK
    if free < need:
        raise BuildError(
            f"{output}: the export needs {size_text(need)} of disk, {size_text(free)} are free; free some space or "
            f"choose another {option}"
        )
