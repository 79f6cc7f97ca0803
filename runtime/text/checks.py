"""Checks of text that comes from outside."""

from __future__ import annotations

from ...errors import RequestError


def check_text(text: str, where: str) -> None:
    """Refuse halves of surrogate pairs: JSON spells them and a shell passes them on, but no tokenizer takes them."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{where}: not UTF-8 text at character {error.start}; convert it first") from None
