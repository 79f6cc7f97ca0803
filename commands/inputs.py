"""Text that comes from standard input."""

from __future__ import annotations

import sys

import click

from ..runtime.text.files import not_utf8, plain


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


def read_stdin_bytes() -> bytes:
    """All of standard input, an image."""
    if sys.stdin is None or sys.stdin.isatty():
        raise click.UsageError("--image - reads standard input; give it an image file")
    return sys.stdin.buffer.read()
