"""The tools that a request offers to the model."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import RequestError
from ..text.checks import check_json

MOST_TOOLS = 512
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,256}")
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}
_PLAIN_TYPES = ("string", "integer", "number", "boolean", "object", "array", "null")


@dataclasses.dataclass(frozen=True)
class Tool:
    """A function that the model may call.

    parameters: the JSON schema of its arguments, an object. strict: whether calls are held to it. shown: the definition
    in OpenAI's form, as templates expect it.
    """

    name: str
    parameters: Mapping[str, Any]
    strict: bool
    shown: Mapping[str, Any]

    @property
    def properties(self) -> Mapping[str, Any]:
        """The schemas of the arguments by name."""
        properties = self.parameters.get("properties")
        return properties if isinstance(properties, Mapping) else {}

    @property
    def required(self) -> Sequence[str]:
        """The arguments that a call must have, whether there is a schema for them or not."""
        required = self.parameters.get("required")
        return [name for name in required if isinstance(name, str)] if isinstance(required, list) else []

    def types(self, argument: str) -> set[str]:
        """JSON types that an argument may have; empty where its schema leaves that open."""
        found = [json_types(one) for one in self.alternatives(argument)]
        return set[str]().union(*found) if all(found) else set()

    def alternatives(self, argument: str) -> list[Mapping[str, Any]]:
        """The schemas of which an argument follows one, with references followed; an empty one leaves all open."""
        waiting, seen = [self.properties.get(argument)], set[str]()
        found = list[Mapping[str, Any]]()
        for schema in waiting:  # which grows meanwhile
            one = schema if isinstance(schema, Mapping) else {}
            if isinstance(reference := one.get("$ref"), str):
                if reference not in seen:
                    seen.add(reference)
                    waiting.append(self._referred(reference))
                continue
            choices = [one[name] for name in ("anyOf", "oneOf", "allOf") if isinstance(one.get(name), list)]
            if any(choices):
                waiting += next(filter(None, choices))
            else:
                found.append(one)
        return found or [{}]

    def _referred(self, reference: str) -> Any:
        target: Any = self.parameters
        for step in reference.removeprefix("#").split("/")[1:]:
            target = target.get(step) if isinstance(target, Mapping) else None
        return target


def read_tools(text: str) -> tuple[Tool, ...]:
    """The tools of a JSON list in OpenAI's form. Raises RequestError."""
    try:
        listed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"tools is not JSON ({error}); give a list of tools") from None
    if not isinstance(listed, list) or len(listed) > MOST_TOOLS:
        got = f"{len(listed)} tools" if isinstance(listed, list) else f"{text:.60}"
        raise RequestError(f"tools is {got}, allowed: a list of at most {MOST_TOOLS} tools")
    check_json(listed, "tools")
    tools = tuple(map(_tool, listed))
    names = [tool.name for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RequestError(f"tools holds {twice!r} twice; give each name once")
    return tools


def _tool(value: Any) -> Tool:
    if not isinstance(value, Mapping) or value.get("type", "function") != "function":
        raise RequestError(f"tools holds {_short(value)}, allowed: objects of type function")
    function = value.get("function", value)
    if not isinstance(function, Mapping):
        raise RequestError(f"tools holds the function {_short(function)}, allowed: an object with a name")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(
            f"tools holds the name {_short(name)}, allowed: 1 to 256 letters, digits and the characters _ - . : /"
        )
    parameters = function.get("parameters")
    if parameters is None:
        parameters = _NO_PARAMETERS
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise RequestError(f"the parameters of tool {name!r} are {_short(parameters)}, allowed: a schema of an object")
    strict = function.get("strict", value.get("strict"))
    if not isinstance(strict, bool | None):
        raise RequestError(f"strict of tool {name!r} is {_short(strict)}, allowed: true or false")
    description = function.get("description")
    described = {} if description is None else {"description": str(description)}
    shown = {"type": "function", "function": {"name": name, **described, "parameters": parameters}}
    return Tool(name, parameters, bool(strict), shown)


def listed_values(schema: Mapping[str, Any]) -> list[Any] | None:
    """The values that a schema lists, if it does."""
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    return values if isinstance(values, list) else None


def json_types(schema: Mapping[str, Any]) -> set[str]:
    """JSON types that a schema without references and alternatives allows; empty where it leaves that open."""
    kind = schema.get("type")
    if kind is None and (values := listed_values(schema)) is not None:
        return {json_type(value) for value in values}
    kinds: list[Any] = kind if isinstance(kind, list) else [kind]
    return set(kinds) if all(one in _PLAIN_TYPES for one in kinds) else set()


def json_type(value: Any) -> str:
    """The JSON type of a value."""
    if isinstance(value, bool):
        return "boolean"
    kinds = {int: "integer", float: "number", str: "string", list: "array", type(None): "null"}
    return kinds.get(type(value), "object")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:60] + ".."
