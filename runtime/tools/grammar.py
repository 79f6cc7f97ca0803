"""Calls that must be right: names and argument schemas as a grammar in llguidance's dialect of Lark."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ...errors import RequestError
from ..text.messages import MISTRAL_ARGUMENTS, MISTRAL_ID
from ..text.thoughts import Thoughts
from .definition import Tool, json_type, json_types, listed_values
from .form import READERS, Form
from .xml_form import END_FUNCTION, END_PARAMETER, FUNCTION, PARAMETER

_GUIDANCE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": True}
_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
# A value ends at the first line that begins with its closing tag. What looks more like its end than a tag in a text, by
# what follows, is not in it. (Patterns that tell more precisely are too much for llguidance beside a limit of 5000.)
_TAIL = rf"\n{re.escape(END_PARAMETER)}".replace("/", r"\/")
_INSIDE = rf"~/(?s:.*){re.escape(END_PARAMETER)}[ \t\r\n<](?s:.*)/".replace("</", r"<\/")
_ID = "/[A-Za-z0-9]{9}/"  # of a call, as Mistral's templates want it
# What stands before, between and after calls that are one list.
_LISTS: dict[Form, tuple[str, str, str]] = {
    "mistral_list": ('/ ?/ "["', '", "', '"]"'),
    "mistral_list_id": ('/ ?/ "["', '", "', '"]"'),
    "llama": ("", '"; "', ""),
}
# Of text that stands without quotation marks; what looks like JSON is read as such, so no other value is held either.
_OF_TEXT = ("minLength", "maxLength", "pattern", "format")
_HELD_OF_TEXT = {"type", "minLength", "maxLength"}
_HELD_OF_LISTED = {"type", "enum", "const"}
_NOT_TEXT = ("array", "boolean", "null", "number", "object")
# Of the arguments as a whole, which as XML are one parameter after the other.
_UNHELD_OF_ALL = (
    "allOf", "anyOf", "oneOf", "not", "if", "$ref", "dependentRequired", "dependentSchemas", "dependencies",
    "minProperties", "maxProperties",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class CallGrammar:
    """A grammar, and sentences about what of the schemas the calls are not held to."""

    source: str
    warnings: tuple[str, ...]


def call_grammar(
    form: Form,
    tools: Collection[Tool],
    special: Mapping[str, int],
    *,
    required: bool,
    several: bool,
    json_schema: Mapping[str, Any] | None = None,
    thoughts: Thoughts | None = None,
) -> CallGrammar:
    """The grammar of an answer that may call tools.

    Args:
        form: of a call.
        tools: that may be called; where calls are not required, those that are not strict take any arguments.
        special: ids of the tokenizer's special tokens.
        required: whether the answer must be calls, and nothing else.
        several: whether it may have more than one.
        json_schema: of an answer without calls.
        thoughts: the marks around those that a free answer may begin with.
    """
    writer = _Writer(form, special)
    rules = [writer.tool(tool, held=required or tool.strict) for tool in tools]
    writer.add("function", " | ".join(rules))
    opens, closes = READERS[form].opens, READERS[form].closes
    gap = '"\\n"' if closes else ""  # between marks and what they hold, and between calls
    listed = _LISTS.get(form)
    if listed is not None:
        begin, separator, end = listed
        inside = f"{begin} function {f'({separator} function)*' if several else ''} {end}"
    else:
        inside = f"{gap} function {gap} {writer.mark(closes)}" if closes else "function"
    writer.add("call", f"{writer.mark(opens)} {inside}" if opens else inside)
    calls = f"call ({gap} call)*" if several and listed is None else "call"
    if required:
        writer.add("start", rf"/\n{{0,2}}/ {calls}")
    elif json_schema is not None:
        writer.add("answer", f"%json {_guided(json_schema)}")
        writer.add("start", rf"answer | /\n{{0,2}}/ {calls}")
    elif not opens:
        writer.add("TEXT", r"/\s*([^\s{](?s:.*))?/")
        writer.add("start", "call | TEXT")
    elif opens in special:
        writer.add("TEXT", r"/(?s:.*)/")
        writer.add("start", rf"(TEXT call){'*' if several else '?'} TEXT")
    else:
        writer.add("before[lazy]", f"/(?s:.*){re.escape(opens)}/")
        writer.add("call", inside)
        writer.add("TEXT", r"/(?s:.*)/")
        writer.add("start", rf"(before call){'*' if several else '?'} TEXT")
    if (
        not required
        and json_schema is None
        and thoughts is not None
        and {thoughts.open, thoughts.close} <= set(special)
    ):
        writer.add("THOUGHTS", r"/(?s:.*)/")
        free = writer.rules["start"]
        writer.add("start", f"({writer.mark(thoughts.open)} THOUGHTS {writer.mark(thoughts.close)})? ({free})")
    return CallGrammar(writer.source(), tuple(dict.fromkeys(writer.warnings)))


class _Writer:
    """Collects the rules of a grammar by name."""

    def __init__(self, form: Form, special: Mapping[str, int]) -> None:
        self._form = form
        self._special = special
        self.rules: dict[str, str] = {}
        self.warnings: list[str] = []

    def add(self, name: str, body: str) -> str:
        self.rules[name] = body
        return name

    def mark(self, text: str) -> str:
        """A text that is a token of its own where the tokenizer has it as one."""
        return f"<[{self._special[text]}]>" if text in self._special else json.dumps(text)

    def source(self) -> str:
        return "%llguidance {}\n" + "".join(f"{name}: {body}\n" for name, body in self.rules.items())

    def tool(self, tool: Tool, *, held: bool) -> str:
        """The rule of one tool's calls, `held` to its schema or not."""
        rule = f"tool_{len(self.rules)}"
        if self._form != "xml":
            schema = _closed(tool.parameters) if held else _ANY_OBJECT
            if self._form in ("mistral", "mistral_id"):
                name = f"{self.mark(MISTRAL_ID)} {_ID}" if self._form == "mistral_id" else ""
                arguments = f"{self.mark(MISTRAL_ARGUMENTS)} %json {_guided(schema)}"
                return self.add(rule, f"{json.dumps(tool.name)} {name} {arguments}")
            key = "parameters" if self._form == "llama" else "arguments"
            begin = json.dumps(f'{{"name": {json.dumps(tool.name)}, "{key}": ')
            end = f'", \\"id\\": \\"" {_ID} "\\"}}"' if self._form == "mistral_list_id" else '"}"'
            return self.add(rule, f"{begin} %json {_guided(schema)} {end}")
        parameters = " ".join(
            self._parameters(rule, tool) if held and (tool.properties or tool.required) else self._any(tool, held)
        )
        begin, end = json.dumps(f"{FUNCTION}{tool.name}>\n"), json.dumps(END_FUNCTION)
        return self.add(rule, f"{begin} {parameters} {end}")

    def _any(self, tool: Tool, held: bool) -> Iterator[str]:
        """Parameters of any names, where the schema has none or is not asked for."""
        if held and not any(name in tool.parameters for name in ("additionalProperties", *_UNHELD_OF_ALL)):
            return
        if held:
            self.warnings.append(f"tool {tool.name}: a schema without properties is not held to")
        value = self._text("any", {})
        yield rf'({json.dumps(PARAMETER)} /[^<>\n]+/ ">\n" {value} "\n")*'

    def _parameters(self, rule: str, tool: Tool) -> Iterator[str]:
        for key in _UNHELD_OF_ALL:
            if key in tool.parameters:
                self.warnings.append(f"tool {tool.name}: {key} of its arguments is not held to")
        for index, name in enumerate(tool.arguments):
            value = self._value(f"{rule}_{index}", tool, name, tool.properties.get(name))
            parameter = f'{json.dumps(f"{PARAMETER}{name}>{chr(10)}", ensure_ascii=False)} {value} "\\n"'
            yield parameter if name in tool.required else f"({parameter})?"

    def _value(self, rule: str, tool: Tool, name: str, schema: Any) -> str:
        """A value with its closing tag."""
        end = json.dumps("\n" + END_PARAMETER)
        shared = {key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters}
        alternatives = tool.alternatives(name)
        texts = [one for one in alternatives if _may_be_text(one)]
        if not texts:
            guided = _guided({"type": _NOT_TEXT, **_plain(schema), **shared})
            return f"{self.add(rule, f'%json {guided}')} {end}"
        free = [one for one in texts if listed_values(one) is None]
        unheld = tool.unmerged(name)
        if len(free) > 1 and "oneOf" in _plain(schema):  # of which more than one may fit
            unheld.append("oneOf")
        for one in alternatives:
            if listed_values(one) is not None:
                unheld += [key for key in one if key not in _HELD_OF_LISTED]
            elif free:
                unheld += [key for key in one if key not in _HELD_OF_TEXT]
        for key in dict.fromkeys(unheld):
            self.warnings.append(f"tool {tool.name}: {key} of {name} is not held to, as its value is plain text")
        if not all({"minLength", "maxLength"} & one.keys() for one in free):
            return self._text(rule, {})
        choices = list[str]()
        for index, one in enumerate(alternatives):
            types = json_types(one)
            if (values := listed_values(one)) is not None:
                fitting = [value for value in values if _has_type(value, types)]
                spelled = [value if isinstance(value, str) else json.dumps(value) for value in fitting]
                choices += [json.dumps(f"{value}\n{END_PARAMETER}", ensure_ascii=False) for value in spelled]
                continue
            if one in texts:
                choices.append(self._text(f"{rule}_{index}_text", one))
            if others := sorted(types - {"string"}):
                guided = _guided({**one, "type": others, **shared})
                choices.append(f"{self.add(f'{rule}_{index}', f'%json {guided}')} {end}")
        if not choices:
            raise RequestError(f"tools: no value of {name!r:.60} of tool {tool.name!r} is possible; change its schema")
        return f"({' | '.join(choices)})"

    def _text(self, rule: str, schema: Mapping[str, Any]) -> str:
        """Plain text up to its closing tag; its length may be limited."""
        least, most = schema.get("minLength"), schema.get("maxLength")
        number = {"minLength": least, "maxLength": most}
        count = "*"
        if any(isinstance(n, int) for n in number.values()):
            count = f"{{{least if isinstance(least, int) else 0},{most if isinstance(most, int) else ''}}}"
        terminal = rule.upper()
        self.add(terminal, f"/(?s:.{count}){_TAIL}/ & {_INSIDE}")
        return self.add(f"{rule}_text[lazy]", terminal).removesuffix("[lazy]")


def _may_be_text(schema: Mapping[str, Any]) -> bool:
    """Whether text follows a schema; one that says nothing of its type does not mean text if it speaks of others."""
    types = json_types(schema)
    return "string" in types if types else all(key in _OF_TEXT for key in schema)


def _has_type(value: Any, types: Collection[str]) -> bool:
    kind = json_type(value)
    return not types or kind in types or (kind == "integer" and "number" in types)


def _closed(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema without further arguments, where it does not say itself whether there may be any."""
    says = any(name in schema for name in ("additionalProperties", "anyOf", "oneOf", "allOf", "$ref"))
    return schema if says else {**schema, "additionalProperties": False}


def _guided(schema: Any) -> str:
    """A schema as text, with the one way to set JSON that every answer has."""
    return json.dumps({**_plain(schema), "x-guidance": _GUIDANCE})


def _plain(schema: Any) -> Mapping[str, Any]:
    """A schema as an object; true, which allows everything, is an empty one."""
    return schema if isinstance(schema, Mapping) else {}
