"""What figures were measured on, and the memory that they took."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from pathlib import Path
from typing import Any

from .. import main_memory
from ..runtime.planning.kept_curve import cpu_name


def machine() -> dict[str, Any]:
    """Processor, cores, memory and system."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": main_memory.total(),
        "system": f"{platform.system()} {platform.machine()}",
    }


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
        return {"process": main_memory.peak(), "gpu": gpu}
