"""The body of `/v1/responses`: the fields of OpenAI's newer API, and what they mean here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, Tag, model_validator

from ....errors import RequestError
from ....runtime.requests.spellings import ANY_OBJECT
from ....runtime.text.checks import check_json
from ..body_parts import Body, ConversationPart, Many, TextOr
from ..template_fields import CHOICE, by_name
from .dialect import DialectBody
from .responses_items import CallItem, ImagePart, Item, ReasoningItem, ResultItem
from .responses_tools import AllowedTools, Tools, joined, plain

_WITHOUT_EFFECT = (
    "client_metadata", "context_management", "max_tool_calls", "prompt_cache_key",
    "prompt_cache_options", "prompt_cache_retention", "safety_identifier", "service_tier", "store", "stream_options",
    "truncation", "user",
)  # fmt: skip
_LOGPROBS = "message.output_text.logprobs"
_STORED = ("previous_response_id", "conversation")


class NamedFunction(Body):
    """The one function that must be called."""

    type: Literal["function"]
    name: str
    namespace: str | None = None


class TextFormat(ConversationPart):
    """What the text must be."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class TextConfig(ConversationPart):
    """What the text is like."""

    format: TextFormat | None = None


class Reasoning(ConversationPart):
    """Whether the model thinks first."""

    effort: str | None = None


class Responses(DialectBody):
    """A conversation that waits for its next turn, in the words of OpenAI's Responses API."""

    input: TextOr[Item]
    instructions: str | None = None
    max_output_tokens: int | None = Field(
        None, ge=1, description="Stop after at most this many tokens, or where the engine is full."
    )
    tools: Tools | None = None
    tool_choice: Annotated[
        Annotated[Literal["auto", "none", "required"], Tag("word")]
        | Annotated[NamedFunction, Tag("name")]
        | Annotated[AllowedTools, Tag("allowed")],
        CHOICE,
    ] = "auto"
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    include: Many[str] | None = Field(
        None, description=f"{_LOGPROBS} reports the log-probability of each token of the text, the rest has no effect."
    )
    top_logprobs: int | None = Field(None, description="Report those of this many likeliest tokens too; needs include.")
    metadata: dict[str, Any] | None = Field(None, description="Repeat this in the answer.")

    @model_validator(mode="before")
    @classmethod
    def _stored(cls, values: Any) -> Any:
        for name in _STORED if isinstance(values, dict) else ():
            if values.get(name) is not None:
                raise ValueError(
                    f"{name} is not supported, since responses are not stored; send the whole input instead"
                )
        items = values.get("input") if isinstance(values, dict) else None
        for index, item in enumerate(items if isinstance(items, list) else ()):
            if isinstance(item, dict) and item.get("type") == "item_reference":
                raise ValueError(
                    f"input.{index} is an item_reference, but items are not stored; send the item itself, as clients "
                    "do with store: false"
                )
        return values

    @classmethod
    def _ignores(cls, name: str) -> bool:
        return name in _WITHOUT_EFFECT

    def turns(self) -> list[Mapping[str, Any]]:
        """See `DialectBody.turns`: thoughts, text and calls of an assistant in a row are one turn."""
        turns: list[dict[str, Any]] = []
        if self.instructions:
            turns.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*turns, {"role": "user", "content": self.input}]
        open_turn: dict[str, Any] | None = None  # the assistant's
        for item in self.input:
            said = _said(item)
            if said is None:
                open_turn = None
                turns.append(_message(item))
                continue
            if open_turn is None:
                open_turn = {"role": "assistant", "content": "", "tool_calls": []}
                turns.append(open_turn)
            for name, value in said.items():
                open_turn[name] = open_turn[name] + value if name in open_turn else value
        return _one_system(turns)

    def spelled(self) -> dict[str, str]:
        """See `Decoding.spelled`."""
        likeliest = {} if self.top_logprobs is None else {"logprobs": "top_logprobs"}
        return {"max_new_tokens": "max_output_tokens", "json_schema": "text.format"} | likeliest

    def options(self) -> dict[str, Any]:
        """See `DialectBody.options`."""
        check_json(self.metadata, "metadata")  # which the answer repeats
        chosen = super().options()
        if _LOGPROBS in (self.include or ()):
            chosen["logprobs"] = self.top_logprobs or 0
        elif self.top_logprobs:
            raise RequestError(f"top_logprobs needs include to hold {_LOGPROBS}; add it")
        if self.max_output_tokens is not None:
            chosen["max_new_tokens"] = self.max_output_tokens
        if self.tools:
            chosen["tools"] = plain(self.tools)
        choice = self.tool_choice
        if isinstance(choice, AllowedTools):
            chosen["tools"] = choice.of(chosen.get("tools", []))
            chosen["tool_choice"] = choice.mode
        elif isinstance(choice, NamedFunction):
            chosen["tool_choice"] = by_name(joined(choice.namespace, choice.name))
        else:
            chosen["tool_choice"] = choice
        if self.parallel_tool_calls is not None:
            chosen["parallel_tool_calls"] = self.parallel_tool_calls
        effort = None if self.reasoning is None else self.reasoning.effort
        if effort is not None:
            chosen |= {"thinking": effort != "none", "chat_template_kwargs": {"reasoning_effort": effort}}
        form = None if self.text is None else self.text.format
        if form is not None and form.type == "json_object":
            chosen["json_schema"] = ANY_OBJECT
        elif form is not None and form.type == "json_schema":
            if form.schema_ is None:
                raise RequestError("text.format has no schema; give one")
            chosen["json_schema"] = form.schema_
        return chosen


def _text(content: str | list[Any]) -> str:
    if isinstance(content, list) and any(isinstance(part, ImagePart) for part in content):
        raise RequestError("input holds an image that neither user nor tool has given, allowed: images of these")
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _seen(content: str | list[Any]) -> str | list[dict[str, Any]]:
    """What a user or a call has given; images make it a list of parts."""
    if isinstance(content, str) or not any(isinstance(part, ImagePart) for part in content):
        return _text(content)
    return [
        {"type": "image_url", "image_url": {"url": part.image_url}}
        if isinstance(part, ImagePart)
        else {"type": "text", "text": part.text}
        for part in content
    ]


def _said(item: Any) -> dict[str, Any] | None:
    """What an item adds to the assistant's turn; None where it is no part of one."""
    if isinstance(item, CallItem):
        function = {"name": joined(item.namespace, item.name), "arguments": item.arguments}
        return {"tool_calls": [{"id": item.call_id, "type": "function", "function": function}]}
    if isinstance(item, ReasoningItem):
        return {"reasoning_content": _text(item.content or item.summary)}
    return {"content": _text(item.content)} if item.type == "message" and item.role == "assistant" else None


def _message(item: Any) -> dict[str, Any]:
    if isinstance(item, ResultItem):
        return {"role": "tool", "tool_call_id": item.call_id, "content": _seen(item.output)}
    if item.role == "user":
        return {"role": "user", "content": _seen(item.content)}
    return {"role": "system", "content": _text(item.content)}


def _one_system(turns: list[dict[str, Any]]) -> list[Mapping[str, Any]]:
    """Turns whose system texts at the beginning are one, which is what templates expect."""
    count = next((i for i, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
    if count < 2:
        return [*turns]
    text = "\n\n".join(turn["content"] for turn in turns[:count])
    return [{"role": "system", "content": text}, *turns[count:]]
