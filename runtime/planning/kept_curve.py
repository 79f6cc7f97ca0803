"""The cost curves that `nemodiff bench` keeps in an engine folder, one for each processor and number of threads.

A curve is only where plans begin, so a file that cannot be read is no error: a curve is then measured again.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

from ...engine_folder import COST_FILE
from .cost import CostCurve


def read_curve(folder: Path, processor: str, threads: int | None) -> CostCurve | None:
    """The curve of this processor and number of threads (None: as many as it has cores), if one is kept."""
    for entry in _entries(folder):
        with contextlib.suppress(KeyError, TypeError, ValueError):
            if (entry["processor"], entry["threads"]) != (processor, threads):
                continue
            curve = CostCurve(tuple(map(int, entry["sizes"])), tuple(map(float, entry["seconds"])))
            rising = list(curve.sizes) == sorted({*curve.sizes}) and len(curve.sizes) == len(curve.times)
            if (
                rising
                and len(curve.sizes) > 1 <= curve.sizes[0]
                and all(0 < seconds < math.inf for seconds in curve.times)
            ):
                return curve
    return None


def write_curve(folder: Path, processor: str, threads: int | None, curve: CostCurve, date: str) -> None:
    """Keep a curve in place of the one of the same processor and threads. Raises OSError where nobody may write."""
    others = [
        entry for entry in _entries(folder) if (entry.get("processor"), entry.get("threads")) != (processor, threads)
    ]
    own = {"processor": processor, "threads": threads, "measured": date, "sizes": curve.sizes, "seconds": curve.times}
    descriptor, name = tempfile.mkstemp(prefix=f".{COST_FILE}.", dir=folder)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps({"curves": [*others, own]}, indent=1) + "\n")
        Path(name).chmod(0o644)
        Path(name).replace(folder / COST_FILE)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _entries(folder: Path) -> list[dict[str, Any]]:
    with contextlib.suppress(OSError, ValueError, RecursionError, LookupError, TypeError):
        entries = json.loads((folder / COST_FILE).read_text(encoding="utf-8"))["curves"]
        return [entry for entry in entries if isinstance(entry, dict)]
    return []


def cpu_name() -> str:
    """What the processor calls itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
