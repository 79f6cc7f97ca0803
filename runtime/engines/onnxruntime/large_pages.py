"""Memory in large pages, on Linux 6.1 and later.

A token reads every weight once, and a processor that has to look up where each 4 KB of them lie takes an eighth longer
(docs/log.md). ONNX Runtime takes its memory from the C library, which leaves the size of pages to the system, and most
systems give large ones only to who asks.
"""

from __future__ import annotations

import errno
import re
import time
from pathlib import Path

LEAST = 2**24  # bytes of weights; fewer stay in a processor's cache and gain nothing
SECONDS = 2.0  # at most, of a load
# Bytes of a large page, which is filled whole where anything lies in it. On arm64 it has 512 MB where the system's own
# pages are of 64 KB, as on many servers.
MOST = 2**25
_COLLAPSE = 25  # MADV_COLLAPSE of Linux's mman.h: move what lies here into a large page now
_MAPS = Path("/proc/self/maps")
_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
_OWN = re.compile(r"(\w+)-(\w+) rw-p \w+ 00:00 0 *(?:\[heap\])?", re.ASCII)  # no file's, no stack of the main thread


def places(size: int) -> list[int]:
    """The addresses where a page of that size fits into memory that this process alone writes to."""
    found: list[int] = []
    for line in _MAPS.read_text().splitlines():
        if match := _OWN.fullmatch(line):
            begin, end = (int(address, 16) for address in match.groups())
            found += range(-(-begin // size) * size, end - size + 1, size)
    return found


def gather() -> None:
    """Move what this process holds into large pages, as far as the system has some; it stays where it is and the same.

    It takes a thread up to two milliseconds for a megabyte, where memory is in pieces, and none for what has been moved
    before. What has had no turn after SECONDS stays where it is.
    """
    try:
        size = int(_SIZE.read_text())
    except (OSError, ValueError):
        return  # not Linux, or without large pages
    if size > MOST:
        return
    import ctypes

    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    end = time.monotonic() + SECONDS
    for address in places(size):
        if time.monotonic() > end:
            return
        if advise(address, size, _COLLAPSE) and ctypes.get_errno() == errno.ENOMEM:
            return  # none is left
