"""Text that comes from standard input and from files."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ..errors import RequestError
from .streams import plain


def read_stdin(missing: str) -> str:
    """All of standard input; `missing` is the refusal where it holds no text or is a terminal."""
    try:  # standard input is None where it was closed
        text = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8("standard input", error) from None
    text = plain(text)
    if not text.strip():
        raise click.UsageError(missing)
    return text.removesuffix("\n")


def read_text(path: Path) -> str:
    """A file's text. Raises RequestError."""
    try:
        return plain(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise not_utf8(str(path), error) from None


def not_utf8(where: str, error: UnicodeDecodeError) -> RequestError:
    """The refusal of bytes that are not text."""
    return RequestError(f"{where}: not UTF-8 at byte {error.start}; convert it first")
