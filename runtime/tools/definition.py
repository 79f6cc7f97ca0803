"""The tools that a request offers to the model."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import RequestError
from ..text.checks import check_json, check_parts

MOST_TOOLS = 512
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,256}")
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}
# Keywords of a schema that restrict a value; all others describe it.
_COMBINING = ("$ref", "allOf", "anyOf", "oneOf")
_RESTRICTING = frozenset(
    ("type", "enum", "const", "minLength", "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum",
     "exclusiveMaximum", "multipleOf", "items", "prefixItems", "additionalItems", "unevaluatedItems", "contains",
     "minContains", "maxContains", "minItems", "maxItems", "uniqueItems", "properties", "required",
     "additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames", "minProperties",
     "maxProperties", "dependentRequired", "dependentSchemas", "dependencies", "not", "if", "then", "else", *_COMBINING)
)  # fmt: skip
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

    @property
    def arguments(self) -> list[str]:
        """The arguments that are known by name: those with a schema in order, then the others that a call must have."""
        return list(dict.fromkeys([*self.properties, *self.required]))

    def types(self, argument: str) -> set[str]:
        """JSON types that an argument may have; empty where its schema leaves that open."""
        found = [json_types(one) for one in self.alternatives(argument)]
        return set[str]().union(*found) if all(found) else set()

    def alternatives(self, argument: str) -> list[Mapping[str, Any]]:
        """The schemas of which an argument follows one, by what restricts it; an empty one leaves all open."""
        return self._expanded(argument)[0]

    def unmerged(self, argument: str) -> list[str]:
        """The keywords with which an argument's schema combines what the alternatives do not have together."""
        return self._expanded(argument)[1]

    def _expanded(self, argument: str) -> tuple[list[Mapping[str, Any]], list[str]]:
        """The alternatives, with references followed and all that holds for an alternative in one, and `unmerged`."""
        waiting = [_merged(self.properties.get(argument))[0]]
        seen = set[str]()
        found = list[Mapping[str, Any]]()
        unmerged = list[str]()
        for schema in waiting:  # which grows meanwhile
            name = next((name for name in _COMBINING if name in schema), None)
            if name is None:
                found.append(schema)
                continue
            combined = schema[name]
            rest = {key: value for key, value in schema.items() if key != name}
            if name == "anyOf" and rest.pop("oneOf", None):  # each with each would be too many
                unmerged.append("oneOf")
            if name == "$ref":
                if combined in seen:
                    continue
                seen.add(combined)
                groups = [[self._referred(combined)]]
            else:
                groups = [combined] if name == "allOf" else [[one] for one in combined]
            for group in groups:
                merged, agree = _merged(rest, *group)
                waiting.append(merged)
                if not agree:
                    unmerged.append(name)
        return found or [{}], list(dict.fromkeys(unmerged))

    def _referred(self, reference: str) -> Any:
        target: Any = self.parameters
        for step in reference.removeprefix("#").split("/")[1:]:
            target = target.get(step) if isinstance(target, Mapping) else None
        return target


def read_tools(text: str) -> tuple[Tool, ...]:
    """The tools of a JSON list in OpenAI's form. Raises RequestError."""
    check_parts(text, "tools")
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


def _merged(*schemas: Any) -> tuple[dict[str, Any], bool]:
    """What restricts a value that follows all these schemas, and whether none of it was lost."""
    merged = dict[str, Any]()
    agree = True
    for schema in schemas:
        for key, value in schema.items() if isinstance(schema, Mapping) else ():
            if key in _RESTRICTING and (key not in _COMBINING or _combines(key, value)):
                agree &= merged.setdefault(key, value) == value
    return merged, agree


def _combines(key: str, value: Any) -> bool:
    return isinstance(value, str if key == "$ref" else list) and bool(value)


def listed_values(schema: Mapping[str, Any]) -> list[Any] | None:
    """The values that a schema lists, if it does."""
    values = schema.get("enum")
    if "const" in schema:
        only = schema["const"]
        return [only] if not isinstance(values, list) or only in values else []
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
