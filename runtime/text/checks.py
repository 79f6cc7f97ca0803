"""Checks of text, and of values that hold texts, that come from outside."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from ...errors import RequestError

MOST_NESTED = 100  # levels of a value of JSON; what walks it, templates and grammars among them, walks it recursively
# Lists and objects of a value of JSON, and names in objects: more than a conversation has that fits in as many tokens.
MOST_PARTS = 1 << 18
_NO_MARKS = bytes({*range(256)} - {*b'"[{:'})


def check_text(text: object, where: str) -> None:
    """Refuse what is no text, and halves of surrogate pairs: JSON and shells pass them on, but no tokenizer takes them.

    Raises RequestError.
    """
    if not isinstance(text, str):
        raise RequestError(f"{where} is {text!r:.60}, allowed: text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{where}: not UTF-8 text at character {error.start}; convert it first") from None


def check_list(values: object, where: str, of: str) -> None:
    """Refuse what holds no values one after the other, a text and a mapping among it. Raises RequestError."""
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise RequestError(f"{where} is {values!r:.60}, allowed: a list of {of}")


def check_parts(text: str | bytes, where: str) -> None:
    """Refuse JSON of too many lists, objects and names before it is read, since making them holds every thread.

    Raises RequestError, or ValueError for bytes in no encoding of JSON's.
    """
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if data.count(b"[") + data.count(b"{") <= MOST_PARTS and data.count(b":") <= MOST_PARTS:
        return  # even with those that stand in strings
    import numpy as np  # not for commands that check a text

    if data is text:
        data = data.decode(json.detect_encoding(data), "surrogatepass").encode("utf-8", "surrogatepass")
    kept = data.replace(rb"\\", b"").replace(rb"\"", b"").translate(None, _NO_MARKS)
    marks = np.frombuffer(kept, np.uint8)
    quotes = marks == ord('"')
    outside = np.cumsum(quotes, dtype=np.uint8) % 2 == 0
    names = np.count_nonzero(outside & (marks == ord(":")))
    for count, what in (
        (np.count_nonzero(outside & ~quotes) - names, "lists and objects"),
        (names, "names in objects"),
    ):
        if count > MOST_PARTS:
            raise RequestError(f"{where} holds {count} {what}, allowed: at most {MOST_PARTS}; send fewer")


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
