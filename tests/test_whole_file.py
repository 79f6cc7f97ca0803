"""A file that appears whole or not at all, behind a link, and where it is no file but a pipe."""

import errno
import os
import threading
from pathlib import Path

import pytest

from nemodiff.whole_file import whole


@pytest.mark.parametrize("before", [None, "old"])
def test_an_error_leaves_what_was_there(tmp_path: Path, before: str | None) -> None:
    path = tmp_path / "file"
    if before is not None:
        path.write_text(before)

    def fill() -> None:
        with whole(path) as stage:
            stage.write_text("half")
            raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full") as caught:
        fill()
    assert caught.value.filename == str(path)  # and not the stage's
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == ([] if before is None else [("file", before)])


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "there" / "file")
    for text in ("new", "newer"):
        with whole(link) as stage:
            stage.write_text(text)
        assert link.is_symlink()
        assert (tmp_path / "there" / "file").read_text() == text


def test_a_pipe_stays_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    with whole(pipe) as stage:
        stage.write_text("all of it")
    reader.join(60)
    assert read == ["all of it"]
    assert pipe.is_fifo()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_pipe_without_a_path_is_written_to() -> None:
    reader, writer = os.pipe()
    try:
        with whole(Path(f"/dev/fd/{writer}")) as file:
            file.write_text("new", encoding="utf-8")
        assert os.read(reader, 10) == b"new"
    finally:
        os.close(reader)
        os.close(writer)


def test_a_device_that_is_full_is_named() -> None:
    with pytest.raises(OSError, match="No space") as caught, whole(Path("/dev/full")) as stage:
        stage.write_text("all of it")
    assert caught.value.filename == "/dev/full"
