"""Large files: the engine file holds the bytes it was given on any file system, and what is read once is forgotten."""

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
from conftest import assert_one_line
from stand_ins.checkpoints import TINY_CHAT

from nemodiff.builder import files
from nemodiff.builder.build import Builder
from nemodiff.builder.checkpoint.weights import write_weights
from nemodiff.builder.compilers.choices import Choices
from nemodiff.builder.files import EngineFile, sha256
from nemodiff.contract import Backend

BUFFER = 2**16
RTX = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the trt extra")

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

        # A file system that lets no file go past the page cache answers EINVAL.
        def refuse(path: Path, flags: int, mode: int) -> int:
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return opening(path, flags, mode)

        monkeypatch.setattr(files.os, "open", refuse)
    monkeypatch.setattr(files, "BUFFER", BUFFER)
    data = np.random.default_rng(0).bytes(sum(sizes))
    file, at = EngineFile(tmp_path / "engine"), 0
    for size in sizes:
        assert file.write(memoryview(data)[at : at + size]) == size
        at += size
    assert file.close() == hashlib.sha256(data).hexdigest()
    assert file.nbytes == len(data)
    assert (tmp_path / "engine").read_bytes() == data


@pytest.mark.parametrize("size", [0, 1, 2 * BUFFER + 17])
def test_sha256(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(files, "_CHUNK", BUFFER)
    data = np.random.default_rng(0).bytes(size)
    (tmp_path / "file").write_bytes(data)
    forgotten = watch(monkeypatch)
    assert sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()
    assert forgotten == []
    assert sha256(tmp_path / "file", once=True) == hashlib.sha256(data).hexdigest()
    assert sum(nbytes for _, nbytes in forgotten) == size
    assert [offset for offset, _ in forgotten] == list(range(0, size, BUFFER))


def test_tensors_are_forgotten_once_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder, forgotten = Builder(TINY_CHAT, tmp_path / "engine"), watch(monkeypatch)
    write_weights(builder.graph, builder.tensors, tmp_path / "weights", lambda nbytes: None)
    assert forgotten == []
    write_weights(builder.graph, builder.tensors, tmp_path / "again", lambda nbytes: None, once=True)
    tensors = [builder.tensors[name] for weight in builder.graph.weights for name in weight.sources]
    assert forgotten == [(tensor.offset, tensor.nbytes) for tensor in tensors]
    assert sha256(tmp_path / "weights") == sha256(tmp_path / "again")


@pytest.mark.parametrize(
    ("backend", "forgets"), [("onnxruntime", False), pytest.param("tensorrt-rtx", True, marks=[pytest.mark.trt, RTX])]
)
def test_a_compiled_build_forgets_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: Backend, forgets: bool
) -> None:
    forgotten = watch(monkeypatch)
    choices = Choices(sm=(89,)) if forgets else Choices()
    builder = Builder(TINY_CHAT, tmp_path / "engine", backend=backend, choices=choices)
    builder.run()
    if forgets:  # each tensor as it is written, each file as it is hashed
        assert len(forgotten) >= len(builder.graph.weights) + len(builder.checkpoint.files)
    else:
        assert forgotten == []


def watch(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Offset and bytes of every part of a file that is forgotten from now on."""
    forgotten: list[tuple[int, int]] = []

    def note(file: int, offset: int, nbytes: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        forgotten.append((offset, nbytes))

    monkeypatch.setattr(files.os, "posix_fadvise", note)
    return forgotten


@pytest.mark.trt
@RTX
def test_engine_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SMALL_DISK, str(TINY_CHAT), str(tmp_path / "engine")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    line = done.stderr.splitlines(keepends=True)[-1]  # after the plan
    assert_one_line(line, "writing the engine failed (File too large); free some space or choose another --output")
    assert list(tmp_path.iterdir()) == []
