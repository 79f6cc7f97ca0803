"""The memory of this machine and what this process takes of it, as far as the system says."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")  # of the container that this runs in, in version 2


def total() -> int:
    """Bytes that the machine has."""
    if sys.platform == "win32":
        found, _ = _windows_memory()
    else:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return found


def free() -> int | None:
    """Bytes that the system could give, within the container's limit and page cache included; None where none says."""
    frees = []
    if sys.platform == "win32":
        frees.append(_windows_memory()[1])
    with contextlib.suppress(OSError, KeyError):
        frees.append(int(_fields(Path("/proc/meminfo"))["MemAvailable:"]) * 1024)
    with contextlib.suppress(OSError, KeyError, ValueError):  # a limit may be "max"
        limit, used = (int((_CGROUP / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        frees.append(max(0, limit - used + int(_fields(_CGROUP / "memory.stat")["inactive_file"])))
    return min(frees, default=None)


def peak() -> int:
    """The most bytes that this process has held, since a reset where the system has one."""
    if status := of_process(os.getpid(), ["VmHWM"]):
        return status["VmHWM"]
    if sys.platform == "win32":
        import ctypes

        counters = (ctypes.c_uint64 * 9)(72)  # PROCESS_MEMORY_COUNTERS: its length, the peak of the working set
        ctypes.windll.kernel32.K32GetProcessMemoryInfo(ctypes.c_void_p(-1), counters, 72)
        most = counters[1]
    else:
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return most


def of_process(pid: int, fields: Sequence[str]) -> dict[str, int]:
    """Fields of a process's status in bytes, on Linux; empty once it is gone."""
    try:
        status = _fields(Path(f"/proc/{pid}/status"))
    except OSError:
        return {}
    return {name: int(status[f"{name}:"]) * 1024 for name in fields if f"{name}:" in status}


def _windows_memory() -> tuple[int, int]:
    """Bytes that the machine has, and those that are free."""
    import ctypes

    status = (ctypes.c_uint64 * 8)(64)  # MEMORYSTATUSEX: its length, bytes in all, bytes that are free
    ctypes.windll.kernel32.GlobalMemoryStatusEx(status)  # type: ignore[attr-defined,unused-ignore]
    return status[1], status[2]


def _fields(path: Path) -> dict[str, str]:
    """The first two words of every line."""
    lines = map(str.split, path.read_text(encoding="ascii", errors="replace").splitlines())
    return {words[0]: words[1] for words in lines if len(words) > 1}
