"""Text out of files and streams: UTF-8, whatever editor wrote it."""

from __future__ import annotations

import sys
from pathlib import Path

from ...errors import RequestError

STDIN = Path("-")
_BOM = "\ufeff"


def plain(text: str) -> str:
    """Text without the mark that some editors put before it, and with line ends as Python has them."""
    return text.removeprefix(_BOM).replace("\r\n", "\n")


def read_text(path: Path) -> str:
    """The text of a file, or of standard input for `-`.

    Raises RequestError where it is not UTF-8, OSError where it cannot be read.
    """
    try:
        return plain((_stdin() if path == STDIN else path.read_bytes()).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise not_utf8(called(path), error) from None


def _stdin() -> bytes:
    return b"" if sys.stdin is None else sys.stdin.buffer.read()  # it is None where it was closed


def called(path: Path) -> str:
    """What messages call a file."""
    return "standard input" if path == STDIN else str(path)


def not_utf8(where: str, error: UnicodeDecodeError) -> RequestError:
    """The refusal of bytes that are not text."""
    return RequestError(f"{where}: not UTF-8 at byte {error.start}; convert it first")
