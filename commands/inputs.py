"""What a command reads: text from standard input, and files that it must not write over."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ..engine_folder import CONFIG_FILE, MANIFEST_FILE, is_engine
from ..engine_info import read_engine
from ..runtime.images.decode import MOST_BYTES
from ..runtime.text.files import STDIN, read_text


def read_stdin(missing: str) -> str:
    """All of standard input; `missing` is the refusal where it holds no text or is a terminal."""
    text = "" if sys.stdin is None or sys.stdin.isatty() else read_text(STDIN)
    if not text.strip():
        raise click.UsageError(missing)
    return text.removesuffix("\n")


def read_stdin_bytes() -> bytes:
    """All of standard input, an image, or more of it than an image may have."""
    if sys.stdin is None or sys.stdin.isatty():
        raise click.UsageError("--image - reads standard input; give it an image file")
    return sys.stdin.buffer.read(MOST_BYTES + 1)


def spare_inputs(output: Path | None, *read: Path | str | None) -> None:
    """Refuse to write over a file that is read, or over one of an engine that is.

    Raises click.UsageError, EngineError.
    """
    if output is None or not output.is_file():
        return
    for path in (Path(name) for name in read if name):
        own = (CONFIG_FILE, MANIFEST_FILE, *read_engine(path).manifest.files) if is_engine(path) else (".",)
        if any((path / name).exists() and output.samefile(path / name) for name in own):
            raise click.UsageError(f"{output}: writing it would replace what this command reads; give another file")
