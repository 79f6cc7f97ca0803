"""A file that appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` once it is on the disk; an error leaves nothing of it.

    An OSError of what is done inside gets the path's name.
    What a killed process leaves is hidden and named as the stages of a build are, which a rebuild replaces as well. A
    link is followed; a pipe or a device is written to as it is.
    """
    if path.exists() and not path.is_file():  # asked before links are followed: /dev/stdout leads to no path of a pipe
        with naming(path):
            yield path
        return
    path = path.resolve()
    stage = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        with naming(path):
            yield stage
            with stage.open("r+b") as file:
                os.fsync(file.fileno())
            stage.replace(path)
    finally:
        stage.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError the name of the file that is written: that of a full disk has none."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise
