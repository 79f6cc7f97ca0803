"""Large files, read and written so that they leave memory to the build.

In: files of gigabytes that are read once or not read here at all. Out: their sha256, and the engine file, written while
TensorRT makes it. The surprising fact: on a virtual machine the first touch of a page of memory may cost more than
reading it from the disk, so pages given back are pages that the next file gets for nothing (docs/log.md).
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO

BUFFER = 64 * 2**20  # bytes of each of the two: a weight is written while TensorRT makes the next one
_CHUNK = 4 * 2**20  # bytes read at once
_SECTOR = 4096  # bytes; O_DIRECT writes whole ones, from addresses that are multiples of it as a map's are


def forget(file: IO[bytes], offset: int, nbytes: int) -> None:
    """Let the system take back the memory that holds a part of a file, where it can and no map of it is left."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), offset, nbytes, os.POSIX_FADV_DONTNEED)


def sha256(path: Path, once: bool = False) -> str:
    """A file's sha256; with `once` what has been read is forgotten."""
    digest, buffer, at = hashlib.sha256(), memoryview(bytearray(_CHUNK)), 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            if once:
                forget(file, at, count)
            at += count
    return digest.hexdigest()


class EngineFile:
    """A file being written; `close` ends it. OSError of the other thread is raised by the next call.

    A piece, of any size and wherever it lies, is copied into one of two buffers; two more threads hash and write the
    full one. The file goes past the page cache (O_DIRECT) where the file system can, since copying an engine into the
    cache took a third of the processor time of compiling it, and nobody reads it from there (docs/log.md).
    """

    def __init__(self, path: Path) -> None:
        self.nbytes = 0
        self._file = os.fdopen(_open(path), "wb", buffering=0)
        self._digest = hashlib.sha256()
        self._filling, self._full = (mmap.mmap(-1, BUFFER, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(2))
        self._filled = 0  # bytes of `_filling`
        self._pool = ThreadPoolExecutor(2)
        self._pending: list[Future[None]] = []  # hashing and writing `_full`

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
        self._pending = [self._pool.submit(do, self._full, self._filled) for do in (self._hash, self._put)]
        self._filled = 0

    def _wait(self) -> None:
        for doing in self._pending:
            doing.result()

    def _hash(self, buffer: mmap.mmap, filled: int) -> None:
        with memoryview(buffer) as view, view[:filled] as part:
            self._digest.update(part)

    def _put(self, buffer: mmap.mmap, filled: int) -> None:
        with memoryview(buffer) as view:
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
