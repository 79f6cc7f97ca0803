"""Values as Triton's clients spell them: a number or a truth value may be text, and one value may stand for a list."""

from __future__ import annotations

from typing import Any

from ...errors import RequestError

_TRUTH = {"true": True, "false": False, "1": True, "0": False}


def convert(name: str, kind: Any, value: Any, words: tuple[str, ...] = ()) -> Any:
    """The value as the type of its option, or as it is where the runtime refuses it itself. Raises RequestError.

    kind: int, float, bool or another type of `Option`. words: those that an integer may be too.
    """
    if kind is bool:
        spelled = str(value).lower() if isinstance(value, (str, bool, int)) else ""
        if spelled not in _TRUTH:
            raise _refusal(name, value, "true or false")
        return _TRUTH[spelled]
    if kind == tuple[str, ...]:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            raise _refusal(name, value, "text or a list of texts")
        return tuple(text for text in texts if text)  # an empty one is how some clients say none
    if kind == tuple[int, ...]:
        items = value if isinstance(value, (list, tuple)) else [value]
        return [convert(name, int, item) for item in items]
    if kind is int and words and isinstance(value, str) and not value.isdecimal():
        return value
    if kind in (int, float) and isinstance(value, str):
        try:
            return kind(value)
        except ValueError:
            raise _refusal(name, value, "an integer" if kind is int else "a number") from None
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _refusal(name: str, value: Any, allowed: str) -> RequestError:
    return RequestError(f"{name} is {value!r:.60}, allowed: {allowed}")
