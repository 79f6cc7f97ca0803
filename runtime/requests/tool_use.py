"""What a request's options say of tools and of the chat template, read and checked."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import TYPE_CHECKING, Any

from ...errors import RequestError
from ..sampling.endless_schema import is_endless
from ..sampling.json_schema import read_schema, unfinished_pattern
from ..text.checks import check_json, check_parts
from ..text.thoughts import BRACKETS
from ..tools.answer import RAW, AnswerFormat
from ..tools.definition import Tool, read_tools
from ..tools.form import READERS, Form, find_form
from ..tools.grammar import CallGrammar, call_grammar
from .options import Options

if TYPE_CHECKING:
    from ..text.codec import TextCodec

_GIVEN = ("messages", "tools", "add_generation_prompt")  # variables of a template that are not the user's


@dataclasses.dataclass(frozen=True)
class ToolUse:
    """The tools that a request offers.

    choice: auto, required or a name. several: whether an answer may hold more than one call.
    """

    form: Form
    tools: tuple[Tool, ...]
    choice: str
    several: bool

    @property
    def answer_format(self) -> AnswerFormat:
        """How the answer is to be read, but for its thoughts."""
        held = self.choice != "auto"
        tools = {tool.name: dataclasses.replace(tool, strict=held or tool.strict) for tool in self.tools}
        return AnswerFormat(READERS[self.form], tools, self.several)

    @property
    def shown(self) -> list[Any]:
        """The definitions as the chat template gets them."""
        return [tool.shown for tool in self.tools]

    def grammar(self, text: TextCodec, json_schema: str | None) -> CallGrammar | None:
        """What the answer must follow; None where it may be anything. Raises RequestError."""
        named = self.choice not in ("auto", "required")
        required = self.choice != "auto"
        if not required and json_schema is None and not any(tool.strict for tool in self.tools):
            return None
        callable_ = [tool for tool in self.tools if not named or tool.name == self.choice]
        for tool in callable_:
            if not required and not tool.strict:
                continue
            if is_endless(dict(tool.parameters)):
                raise RequestError(
                    f"tools: {tool.name!r} can never be called (every value would hold another, without end); change it"
                )
            if (pattern := unfinished_pattern(tool.parameters)) is not None:
                raise RequestError(
                    f"tools: the last backslash of {pattern!r:.60} in the parameters of {tool.name!r} has nothing "
                    "after it; change it"
                )
        return call_grammar(
            self.form,
            callable_,
            text.special_tokens,
            required=required,
            several=self.several,
            json_schema=None if json_schema is None else read_schema(json_schema),
            thoughts=text.thoughts if text.thoughts is BRACKETS else None,  # a model with brackets thinks unasked
        )


def read_tool_use(text: TextCodec, o: Options) -> ToolUse | None:
    """The tools that are offered; None where there are none. Raises RequestError."""
    tools = _read(o.tools) if o.tools is not None else ()
    named = o.tool_choice not in ("auto", "none", "required")
    if not tools:
        if named or o.tool_choice == "required":
            raise RequestError(f"tool_choice is {o.tool_choice!r:.60}, but no tools are given; give tools")
        return None
    if named and o.tool_choice not in {tool.name for tool in tools}:
        raise RequestError(
            f"tool_choice is {o.tool_choice!r:.60}, allowed: auto, none, required, or the name of a tool that is given"
        )
    if o.tool_choice == "none":
        return None
    if not o.chat:
        raise RequestError("tools are shown by the chat template; leave --raw (chat=False) out")
    for name in ("regex", "grammar"):
        if getattr(o, name) is not None:
            raise RequestError(f"tools and {name} are both given; use one of them")
    return ToolUse(find_form(text.template), tools, o.tool_choice, o.parallel_tool_calls and not named)


def answer_format(text: TextCodec, use: ToolUse | None, o: Options) -> AnswerFormat:
    """How an answer is to be read, with tools or without."""
    if not o.chat:
        return RAW
    form = AnswerFormat() if use is None else use.answer_format
    return dataclasses.replace(form, thoughts=text.thoughts)


def template_variables(o: Options) -> dict[str, Any]:
    """The chat template's own variables. Raises RequestError."""
    if o.chat_template_kwargs is None:
        return {}
    check_parts(o.chat_template_kwargs, "chat_template_kwargs")
    try:
        variables = json.loads(o.chat_template_kwargs)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"chat_template_kwargs is not JSON ({error}); give an object") from None
    if not isinstance(variables, dict):
        raise RequestError(f"chat_template_kwargs is {o.chat_template_kwargs:.60}, allowed: a JSON object")
    for name in _GIVEN:
        if name in variables:
            raise RequestError(f"chat_template_kwargs holds {name}, which is given otherwise; leave it out")
    check_json(variables, "chat_template_kwargs")
    return variables


_read = functools.lru_cache(maxsize=32)(read_tools)
