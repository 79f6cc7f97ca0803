"""The engine file, written while TensorRT makes it.

In: the pieces that the builder hands out, of any size and wherever they lie in memory. Out: the file and its sha256.
A piece is copied into one of two buffers; another thread hashes and writes the full one. The surprising fact: the
file goes past the page cache (O_DIRECT) where the file system can, since copying an engine into the cache took a third
of the processor time of compiling it, and nobody reads it from there (docs/log.md).
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

BUFFER = 16 * 2**20  # bytes of each of the two
_SECTOR = 4096  # bytes; O_DIRECT writes whole ones, from addresses that are multiples of it as a map's are


class EngineFile:
    """A file being written; `close` ends it. OSError of the other thread is raised by the next call."""

    def __init__(self, path: Path) -> None:
        self.nbytes = 0
        self._file = os.fdopen(_open(path), "wb", buffering=0)
        self._digest = hashlib.sha256()
        self._filling, self._full = (mmap.mmap(-1, BUFFER, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(2))
        self._filled = 0  # bytes of `_filling`
        self._pool = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None  # of `_full`

    def write(self, data: memoryview) -> int:
        """Append bytes; how many were taken, which is all."""
        done = 0
        while done < data.nbytes:
            part = data[done : done + BUFFER - self._filled]
            self._filling[self._filled : self._filled + part.nbytes] = part
            self._filled += part.nbytes
            done += part.nbytes
            if self._filled == BUFFER:
                self._hand_over()
        self.nbytes += done
        return done

    def close(self) -> str:
        """Write what is left and return the file's sha256."""
        with self._pool, self._file:
            self._hand_over()
            self._wait()
            self._file.truncate(self.nbytes)
        return self._digest.hexdigest()

    def _hand_over(self) -> None:
        self._wait()
        self._filling, self._full = self._full, self._filling
        self._writing, self._filled = self._pool.submit(self._put, self._full, self._filled), 0

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def _put(self, buffer: mmap.mmap, filled: int) -> None:
        with memoryview(buffer) as view:
            self._digest.update(view[:filled])
            at, end = 0, -(-filled // _SECTOR) * _SECTOR  # what is too much at the end is cut off by `close`
            while at < end:
                at += self._file.write(view[at:end])


def _open(path: Path) -> int:
    """A descriptor past the page cache, or an ordinary one where the file system has no such thing."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)
