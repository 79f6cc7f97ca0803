"""Large pages for the CPU engine's memory: what is moved, that it stays the same, and which engines ask for them."""

from __future__ import annotations

import ctypes
import errno
import mmap
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import nemodiff
from nemodiff.runtime.engines.onnxruntime import large_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="large pages are Linux's")
SIZE = 2**21


@pytest.fixture
def memory() -> np.ndarray:
    """Four large pages' worth of this process's own memory, written to in small ones."""
    held = mmap.mmap(-1, 5 * SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    held.madvise(mmap.MADV_NOHUGEPAGE)
    array = np.frombuffer(held, np.uint8)
    skipped = -array.ctypes.data % SIZE
    array[:] = np.arange(array.size) % 251
    held.madvise(mmap.MADV_HUGEPAGE)
    return array[skipped : skipped + 4 * SIZE]


class Asked:
    """A C library whose madvise notes its arguments and fails as it is told."""

    def __init__(self, error: int = 0) -> None:
        self.calls: list[tuple[int, int, int]] = []
        self._error = error
        self.madvise = self._Function(self)

    class _Function:
        def __init__(self, library: Asked) -> None:
            self._library = library

        def __call__(self, address: int, size: int, advice: int) -> int:
            self._library.calls.append((address, size, advice))
            ctypes.set_errno(self._library._error)
            return -1 if self._library._error else 0


def in_large_pages(address: int) -> int:
    """Bytes of large pages of the mapping around an address, as the system counts them."""
    for part in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())[1:]:
        begin, end = (int(number, 16) for number in part.split(" ", 1)[0].split("-"))
        if begin <= address < end:
            found = re.search(r"AnonHugePages: +(\d+) kB", part)
            return int(found[1]) * 1024 if found else 0
    raise AssertionError(f"nothing lies at {address:x}")


def test_places_are_those_of_its_own_memory(memory: np.ndarray, tmp_path: Path) -> None:
    begin = memory.ctypes.data
    found = large_pages.places(SIZE)
    assert set(range(begin, begin + 4 * SIZE, SIZE)) <= set(found)
    assert all(place % SIZE == 0 for place in found)
    (tmp_path / "file").write_bytes(bytes(5 * SIZE))
    with (tmp_path / "file").open("rb") as file:
        view = np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.uint8)
    places = range(view.ctypes.data, view.ctypes.data + view.size)
    assert not any(place in places for place in large_pages.places(SIZE))


def test_memory_is_moved_and_stays_the_same(memory: np.ndarray) -> None:
    expected = memory.copy()
    assert in_large_pages(memory.ctypes.data) == 0
    library = ctypes.CDLL(None, use_errno=True)
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if library.madvise(memory.ctypes.data, SIZE, 25):
        pytest.skip(f"this system moves no memory into large pages: {errno.errorcode[ctypes.get_errno()]}")
    large_pages.gather()
    assert in_large_pages(memory.ctypes.data) >= 2 * SIZE
    np.testing.assert_array_equal(memory, expected)


@pytest.mark.parametrize(("error", "asks"), [(0, "all"), (errno.EINVAL, "all"), (errno.ENOMEM, "one")])
def test_it_ends_where_no_large_page_is_left(
    error: int, asks: str, memory: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "size").write_text(f"{SIZE}\n")
    monkeypatch.setattr(large_pages, "_SIZE", tmp_path / "size")
    library = Asked(error)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: library)
    large_pages.gather()
    assert {(size, advice) for _, size, advice in library.calls} == {(SIZE, 25)}
    assert len(library.calls) == 1 if asks == "one" else memory.ctypes.data in [call[0] for call in library.calls]


def test_it_ends_when_its_time_is_over(memory: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "size").write_text(f"{SIZE}\n")
    monkeypatch.setattr(large_pages, "_SIZE", tmp_path / "size")
    library = Asked()
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: library)
    times = iter(np.arange(0, large_pages.SECONDS * 2, large_pages.SECONDS / 2).tolist())
    monkeypatch.setattr(large_pages.time, "monotonic", lambda: next(times))
    large_pages.gather()
    assert len(library.calls) == 2


@pytest.mark.parametrize("content", [None, "", "no\n"])
def test_a_system_without_them_is_left_alone(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        (tmp_path / "size").write_text(content)
    monkeypatch.setattr(large_pages, "_SIZE", tmp_path / "size")
    library = Asked()
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: library)
    large_pages.gather()
    assert not library.calls


def test_pages_of_half_a_gigabyte_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the system's own are of 64 KB: one byte that is used would have its whole page filled."""
    size = 2**29
    with mmap.mmap(-1, 2 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        held[:1] = b"x"
        assert large_pages.places(size)
        (tmp_path / "size").write_text(f"{size}\n")
        monkeypatch.setattr(large_pages, "_SIZE", tmp_path / "size")
        library = Asked()
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: library)
        large_pages.gather()
    assert not library.calls


def test_engines_that_ask(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(large_pages, "gather", lambda: asked.append(1))
    nemodiff.load(tiny_engine, threads=1)
    assert len(asked) == 1
    nemodiff.load(tiny_engine, threads=1, warmup=False)
    monkeypatch.setattr(large_pages, "LEAST", 2**26)
    nemodiff.load(tiny_engine, threads=1)
    assert len(asked) == 1
