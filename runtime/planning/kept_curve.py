"""The cost curves that `nemodiff bench` keeps in an engine folder, one for each processor and number of threads.

A curve is only where plans begin, so a record that cannot be read is no error: a curve is then measured again.
"""

from __future__ import annotations

import contextlib
import math
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from ...engine_folder import COST_FILE, read_record, write_record
from .cost import CostCurve


def read_curve(folder: Path, processor: str, threads: int | None) -> CostCurve | None:
    """The curve of this processor and number of threads (None: as many as it has cores), if one is kept."""
    for entry in _entries(folder):
        if (entry.get("processor"), entry.get("threads")) != (processor, threads):
            continue
        with contextlib.suppress(KeyError, TypeError, ValueError):
            curve = CostCurve(tuple(map(int, entry["sizes"])), tuple(map(float, entry["seconds"])))
            rising = list(curve.sizes) == sorted({0, *curve.sizes})[1:] and len(curve.sizes) == len(curve.times) > 1
            if rising and all(0 < seconds < math.inf for seconds in curve.times):
                return curve
    return None


def write_curve(folder: Path, processor: str, threads: int | None, curve: CostCurve, date: str) -> None:
    """Keep a curve in place of the one of the same processor and threads. Raises OSError where nobody may write."""
    others = [
        entry for entry in _entries(folder) if (entry.get("processor"), entry.get("threads")) != (processor, threads)
    ]
    own = {"processor": processor, "threads": threads, "date": date, "sizes": curve.sizes, "seconds": curve.times}
    write_record(folder, COST_FILE, {"curves": [*others, own]})


def _entries(folder: Path) -> list[dict[str, Any]]:
    record = read_record(folder, COST_FILE) or {}
    entries = record.get("curves")
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def cpu_name() -> str:
    """What the processor calls itself; on arm64 Linux gives each kind of core two numbers in the place of a name."""
    with contextlib.suppress(OSError):
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        if name := re.search(r"^model name\s*: (.+)", told, re.MULTILINE):
            return name[1].strip()
        numbers = [re.findall(rf"^CPU {field}\s*: (\w+)", told, re.MULTILINE) for field in ("implementer", "part")]
        if kinds := sorted(map("/".join, set(zip(*numbers, strict=False)))):
            return " ".join([platform.machine(), *kinds])
    if sys.platform == "darwin":  # where platform.processor() is "arm"
        with contextlib.suppress(OSError):
            asked = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
            if told := asked.stdout.strip():
                return told
    return platform.processor() or platform.machine()
