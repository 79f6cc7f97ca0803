"""A JSON schema as text that somebody gave, read and checked for what the library would take for something else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...errors import RequestError
from .endless_schema import is_endless

_DATA = ("const", "default", "enum", "examples")  # what these hold is no schema


def read_schema(source: str) -> dict[str, Any]:
    """The schema as an object. Raises RequestError."""
    try:
        schema = json.loads(source)
    except ValueError as error:
        raise RequestError(f"json_schema is not JSON ({error}); give a JSON schema") from None
    except RecursionError:
        raise RequestError("json_schema is nested too deeply; use a simpler one") from None
    if schema is False:
        raise RequestError("json_schema is false, which no answer follows; give another")
    if schema is not True and not isinstance(schema, dict):
        raise RequestError(f"json_schema is {source:.60}, allowed: an object or true; give a JSON schema")
    if schema is True:
        return {}
    if '"$ref"' in source and is_endless(schema):
        raise RequestError("json_schema allows no answer (every value would hold another, without end); change it")
    if (pattern := unfinished_pattern(schema)) is not None:
        raise RequestError(
            f"json_schema is not understood (the last backslash of {pattern!r:.60} has nothing after it); change it"
        )
    return schema


def unfinished_pattern(schema: Any) -> str | None:
    """A pattern of a schema that is unfinished, if there is one."""
    waiting = [schema]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            named = value.get("patternProperties")
            for pattern in (value.get("pattern"), *(named if isinstance(named, Mapping) else ())):
                if isinstance(pattern, str) and is_unfinished(pattern):
                    return pattern
            waiting += [inner for name, inner in value.items() if name not in _DATA]
        elif isinstance(value, list | tuple):
            waiting += value
    return None


def is_unfinished(pattern: str) -> bool:
    """Whether a pattern ends with a backslash that has nothing after it, which the library would leave out."""
    return (len(pattern) - len(pattern.rstrip("\\"))) % 2 == 1
