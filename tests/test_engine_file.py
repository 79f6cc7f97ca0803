"""The engine file is what was handed out, whatever the file system, and a disk that fills up is one line.

The surprising fact: not every file system lets a file go past the page cache, and it says so by EINVAL when asked.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import TINY_CHAT
from conftest import assert_one_line

from nemodiff.builder import engine_file
from nemodiff.builder.engine_file import BUFFER, EngineFile

SMALL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
size = 12 * 2**20  # more than the weights, less than the engine
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
from nemodiff.cli import main
main(["build", sys.argv[1], "-o", sys.argv[2], "--backend", "tensorrt-rtx", "--sm", "89"])
"""


@pytest.mark.parametrize("direct", [True, False], ids=["past the cache", "through the cache"])
@pytest.mark.parametrize("sizes", [[], [1], [4096, 5], [5000, BUFFER, 3], [BUFFER], [2 * BUFFER + 17, 9]])
def test_engine_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int], direct: bool) -> None:
    if not direct:
        opening = os.open

        def refuse(path: Path, flags: int, mode: int) -> int:
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return opening(path, flags, mode)

        monkeypatch.setattr(engine_file.os, "open", refuse)
    data = np.random.default_rng(0).bytes(sum(sizes))
    file, at = EngineFile(tmp_path / "engine"), 0
    for size in sizes:
        assert file.write(memoryview(data)[at : at + size]) == size
        at += size
    assert file.close() == hashlib.sha256(data).hexdigest()
    assert file.nbytes == len(data)
    assert (tmp_path / "engine").read_bytes() == data


@pytest.mark.trt
@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the trt extra")
def test_engine_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SMALL_DISK, str(TINY_CHAT), str(tmp_path / "engine")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    line = done.stderr.splitlines(keepends=True)[-1]  # after the plan
    assert_one_line(line, "writing the engine failed (File too large); free some space or choose another --output")
    assert list(tmp_path.iterdir()) == []
