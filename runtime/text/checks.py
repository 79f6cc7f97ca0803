"""Checks of text that comes from outside."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...errors import RequestError

MOST_NESTED = 100  # levels of a value of JSON; what walks it, templates and grammars among them, walks it recursively


def check_text(text: str, where: str) -> None:
    """Refuse halves of surrogate pairs: JSON spells them and a shell passes them on, but no tokenizer takes them."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{where}: not UTF-8 text at character {error.start}; convert it first") from None


def check_json(value: Any, where: str) -> None:
    """Refuse values of JSON that Python reads and other libraries do not write: not numbers, half characters, depths.

    Raises RequestError.
    """
    level = [value]
    for _ in range(MOST_NESTED):
        inner = list[Any]()
        for one in level:
            if isinstance(one, Mapping):
                for name in one:
                    check_text(str(name), where)
                inner += one.values()
            elif isinstance(one, list | tuple):
                inner += one
            elif isinstance(one, str):
                check_text(one, where)
            elif isinstance(one, float) and not math.isfinite(one):
                raise RequestError(f"{where} holds {one}, which is no number of JSON; give a number, or null")
        level = inner
        if not level:
            return
    raise RequestError(f"{where} is nested too deeply, allowed: {MOST_NESTED} levels; give a flatter value")
