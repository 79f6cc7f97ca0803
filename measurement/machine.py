"""What figures were measured on, and the memory that they took."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..runtime.planning.kept_curve import cpu_name


def machine() -> dict[str, Any]:
    """Processor, cores, memory and system."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
    }


def memory(pid: int, fields: Sequence[str]) -> dict[str, int]:
    """Fields of a process's status in bytes, on Linux; empty once it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.splitlines())
    return {name: int(value.split()[0]) * 1024 for name, value in pairs if name in fields}


class PeakMemory:
    """The most memory in use since it was made: of this process, and of a GPU what torch has allocated there."""

    def __init__(self) -> None:
        with contextlib.suppress(OSError):  # not on Linux, or not allowed: the peak is then that of the whole process
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._torch = sys.modules.get("torch")
        if self._on_gpu:
            self._torch.cuda.reset_peak_memory_stats()  # type: ignore[union-attr]

    @property
    def _on_gpu(self) -> bool:
        return self._torch is not None and bool(self._torch.cuda.is_initialized())

    def read(self) -> dict[str, int | None]:
        """Bytes; None where nobody can say."""
        gpu = int(self._torch.cuda.max_memory_allocated()) if self._on_gpu else None  # type: ignore[union-attr]
        return {"process": memory(os.getpid(), ["VmHWM"]).get("VmHWM"), "gpu": gpu}
