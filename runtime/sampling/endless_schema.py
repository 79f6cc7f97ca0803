"""Finds schemas whose values would have to hold another value of the kind, and that one another, without end."""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterator
from typing import Any

_PASSES = 16  # over the schema; where they do not settle it, there may be a value


def is_endless(schema: dict[str, Any]) -> bool:
    """Whether no finite value follows a schema because of what it requires of itself; if in doubt, False."""
    open_nodes = list(_objects(schema))
    finite: set[int] = set()  # ids of the schemas that are known to have a value
    for _ in range(_PASSES):
        before = len(finite)
        for node in open_nodes:
            if _has_value(node, schema, finite):
                finite.add(id(node))
        if id(schema) in finite:
            return False
        if len(finite) == before:
            return True
        open_nodes = [node for node in reversed(open_nodes) if id(node) not in finite]  # references point either way
    return False


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
        if isinstance(value, (dict, list)):
            waiting += value.values() if isinstance(value, dict) else value


def _has_value(schema: dict[str, Any], root: dict[str, Any], finite: set[int]) -> bool:
    def known(other: Any) -> bool:
        return not isinstance(other, dict) or id(other) in finite

    if "const" in schema or "enum" in schema:
        return True
    if "$ref" in schema and not known(_target(root, schema["$ref"])):
        return False
    if not all(map(known, _listed(schema, "allOf"))):
        return False
    for name in ("anyOf", "oneOf"):
        choices = _listed(schema, name)
        if choices and not any(map(known, choices)):
            return False
    if schema.get("type") == "object":
        properties = schema.get("properties")
        names = [name for name in _listed(schema, "required") if isinstance(name, str)]
        return not isinstance(properties, dict) or all(known(properties.get(name)) for name in names)
    if schema.get("type") == "array":
        least = schema.get("minItems", 0)
        if not isinstance(least, int):
            return True
        prefix = _listed(schema, "prefixItems")[: max(least, 0)]
        return all(map(known, prefix)) and (least <= len(prefix) or known(schema.get("items")))
    return True


def _listed(schema: dict[str, Any], name: str) -> list[Any]:
    value = schema.get(name)
    return value if isinstance(value, list) else []


def _target(root: dict[str, Any], reference: Any) -> Any:
    """What a reference within the schema points to; None if it is another kind of reference."""
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        return None
    target: Any = root
    for step in urllib.parse.unquote(reference[1:]).split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(target, list) and name.isdecimal() and int(name) < len(target):
            target = target[int(name)]
        elif isinstance(target, dict):
            target = target.get(name)
        else:
            return None
    return target
