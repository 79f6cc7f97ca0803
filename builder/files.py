"""Large files, read and written so that they leave memory to the build.

On a virtual machine the first touch of a page of memory may cost more than reading it from the disk, so pages given
back are pages that the next file gets for nothing (docs/log.md).
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO

BUFFER = 64 * 2**20  # bytes of each of the two: a weight is written while TensorRT makes the next one
_CHUNK = 4 * 2**20  # bytes read at once
_SECTOR = 4096  # bytes; O_DIRECT writes whole ones, from addresses that are multiples of it as a map's are


def forget(file: IO[bytes], offset: int, nbytes: int) -> None:
    """Let the system take back the memory that holds a part of a file, where it can and no map of it is left."""
    if sys.platform == "linux":
        os.posix_fadvise(file.fileno(), offset, nbytes, os.POSIX_FADV_DONTNEED)


def sha256(path: Path, once: bool = False) -> str:
    """A file's sha256; with `once` what has been read is forgotten."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    at = 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            if once:
                forget(file, at, count)
            at += count
    return digest.hexdigest()


def copy_folder(source: Path, target: Path, skipped: Callable[[str], bool] = lambda name: False) -> None:
    """Copy a folder's files but those of a skipped name; the first that fails ends it, and its OSError says why."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        if skipped(path.name):
            continue
        if path.is_dir():
            copy_folder(path, target / path.name, skipped)
        else:
            shutil.copyfile(path, target / path.name)


class EngineFile:
    """An engine file, written while TensorRT makes it; `close` ends it. OSError of a thread is raised by the next call.

    A piece, of any size and wherever it lies, is copied into one of two buffers; two threads hash and write the full
    one. The file goes past the page cache (O_DIRECT) where the file system can, since copying an engine into the cache
    took a third of the processor time of compiling it, and nobody reads it from there (docs/log.md).
    """

    def __init__(self, path: Path) -> None:
        self.nbytes = 0
        self._file = os.fdopen(_open(path), "wb", buffering=0)
        self._digest = hashlib.sha256()
        self._filling = mmap.mmap(-1, BUFFER, access=mmap.ACCESS_COPY)
        self._full = mmap.mmap(-1, BUFFER, access=mmap.ACCESS_COPY)
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
        self._pending = [
            self._pool.submit(self._hash, self._full, self._filled),
            self._pool.submit(self._put, self._full, self._filled),
        ]
        self._filled = 0

    def _wait(self) -> None:
        for future in self._pending:
            future.result()

    def _hash(self, buffer: mmap.mmap, filled: int) -> None:
        with memoryview(buffer) as view, view[:filled] as part:
            self._digest.update(part)

    def _put(self, buffer: mmap.mmap, filled: int) -> None:
        with memoryview(buffer) as view:
            at = 0
            end = -(-filled // _SECTOR) * _SECTOR  # what is too much at the end is cut off by `close`
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
