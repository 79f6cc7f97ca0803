"""The body of `/v1/messages`: Anthropic's fields, and what they mean here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from ....errors import RequestError
from ..body_parts import ConversationPart, Many, TextOr
from ..template_fields import by_name
from .dialect import DialectBody
from .messages_blocks import Block, ImageBlock, TextBlock, ThinkingBlock, ToolResultBlock, ToolUseBlock

# Fields that change no answer here; Claude Code sends several of them.
_WITHOUT_EFFECT = (
    "betas", "billing_policy", "cache_control", "compaction", "context_management", "diagnostics", "fallbacks",
    "inference_geo", "metadata", "service_tier", "speed", "user_profile_id", "workspace_id",
)  # fmt: skip


class Turn(ConversationPart):
    """A turn of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: TextOr[Block]


class Tool(ConversationPart):
    """A tool of the client's."""

    type: Literal["custom"] = "custom"
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None

    def plain(self) -> dict[str, Any]:
        """In OpenAI's form."""
        described = {} if self.description is None else {"description": self.description}
        function = {"name": self.name, **described, "parameters": self.input_schema}
        return {
            "type": "function",
            "function": function if self.strict is None else {**function, "strict": self.strict},
        }


class Choice(ConversationPart):
    """Which tool must be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(ConversationPart):
    """Whether the model thinks first."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None


class Format(ConversationPart):
    """A schema that the answer follows."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(ConversationPart):
    """What the answer is like."""

    effort: str | None = None
    format: Format | None = None


class Counted(DialectBody):
    """A conversation whose tokens are counted."""

    messages: Many[Turn] = Field(min_length=1)
    system: TextOr[TextBlock] | None = None
    tools: Many[Tool] | None = None
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: Format | None = None

    @classmethod
    def _ignores(cls, name: str) -> bool:
        return name in _WITHOUT_EFFECT

    def turns(self) -> list[Mapping[str, Any]]:
        """See `DialectBody.turns`; a system text inside of the conversation, which no template expects, is a user's."""
        turns: list[Mapping[str, Any]] = []
        if self.system:
            turns.append({"role": "system", "content": _text(self.system)})
        for part in (part for turn in self.messages for part in _parts(turn)):
            turns.append({**part, "role": "user"} if turns and part["role"] == "system" else part)
        return turns

    def spelled(self) -> dict[str, str]:
        """See `Decoding.spelled`."""
        budget = None if self.thinking is None else self.thinking.budget_tokens
        chosen = {} if self.tool_choice is None else {"required": "any"}  # the word of tool_choice
        limited = {} if budget is None else {"thinking_budget": "thinking.budget_tokens"}
        schema = "output_config.format" if self.output_format is None else "output_format"
        return {"max_new_tokens": "max_tokens", "json_schema": schema, **chosen, **limited}

    def options(self) -> dict[str, Any]:
        """See `DialectBody.options`."""
        chosen = super().options()
        if self.messages[-1].role == "assistant" and not self._calls_tools():
            chosen["continue_final_message"] = True
        if self.tools:
            chosen["tools"] = [tool.plain() for tool in self.tools]
        if self.tool_choice is not None:
            if self.tool_choice.type == "tool" and self.tool_choice.name is None:
                raise RequestError("tool_choice has no name; give that of the tool")
            words = {"auto": "auto", "any": "required", "none": "none"}
            chosen["tool_choice"] = words.get(self.tool_choice.type) or by_name(self.tool_choice.name)
            chosen["parallel_tool_calls"] = not self.tool_choice.disable_parallel_tool_use
        if self.thinking is not None:
            chosen["thinking"] = self.thinking.type != "disabled"
            if self.thinking.budget_tokens is not None and chosen["thinking"]:
                chosen["thinking_budget"] = self.thinking.budget_tokens
        config = self.output_config
        if config is not None and config.effort is not None:
            chosen["chat_template_kwargs"] = {"reasoning_effort": config.effort}
        form = self.output_format or (config.format if config is not None else None)
        return chosen if form is None else chosen | {"json_schema": form.schema_}

    def _calls_tools(self) -> bool:
        """Whether the last turn does, so that their results would have to come."""
        last = self.messages[-1]
        blocks = last.content if last.role == "assistant" and isinstance(last.content, list) else []
        return any(isinstance(block, ToolUseBlock) for block in blocks)


class Messages(Counted):
    """A conversation that waits for its next turn, in Anthropic's words."""

    max_tokens: int = Field(ge=1, description="Stop after at most this many tokens, or where the engine is full.")
    stop_sequences: Many[str] | None = None

    def options(self) -> dict[str, Any]:
        """See `DialectBody.options`."""
        if self._calls_tools():
            raise RequestError("the last message calls tools; give their results after it, as tool_result")
        stop = {} if not self.stop_sequences else {"stop": self.stop_sequences}
        return super().options() | stop | {"max_new_tokens": self.max_tokens}


def _text(content: str | list[Any]) -> str:
    return content if isinstance(content, str) else "\n\n".join(block.text for block in content)


def _parts(turn: Turn) -> list[Mapping[str, Any]]:
    """A turn as messages: results of calls are messages of their own."""
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    texts = [block.text for block in turn.content if isinstance(block, TextBlock)]
    if turn.role == "assistant":
        calls = [
            {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": json.dumps(block.input)}}
            for block in turn.content
            if isinstance(block, ToolUseBlock)
        ]
        thoughts = "".join(block.thinking for block in turn.content if isinstance(block, ThinkingBlock))
        message: dict[str, Any] = {"role": "assistant", "content": "".join(texts), "tool_calls": calls}
        return [message if not thoughts else {**message, "reasoning_content": thoughts}]
    messages: list[Mapping[str, Any]] = []
    said = list[TextBlock | ImageBlock]()
    for block in turn.content:
        if isinstance(block, TextBlock | ImageBlock):
            said.append(block)
        elif isinstance(block, ToolResultBlock):
            messages += _said(turn.role, said)
            said = []
            messages.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": _result(block)})
        else:
            allowed = "allowed: text, image and tool_result"
            raise RequestError(f"messages holds a block {block.type} of the {turn.role}'s, {allowed}")
    return [*messages, *_said(turn.role, said)]


def _result(block: ToolResultBlock) -> str | list[dict[str, Any]]:
    """What a call gave; images make it a list of parts."""
    error = "Error: " if block.is_error else ""
    if isinstance(block.content, str):
        return error + _text(block.content)
    images = [part.plain() for part in block.content if isinstance(part, ImageBlock)]
    text = error + _text([part for part in block.content if not isinstance(part, ImageBlock)])
    return [{"type": "text", "text": text}, *images] if images else text


def _said(role: str, blocks: list[TextBlock | ImageBlock]) -> list[Mapping[str, Any]]:
    """Blocks in a row as one message."""
    texts = [block for block in blocks if isinstance(block, TextBlock)]
    if len(texts) == len(blocks):
        return [{"role": role, "content": _text(texts)}] if texts else []
    parts = [{"type": "text", "text": b.text} if isinstance(b, TextBlock) else b.plain() for b in blocks]
    return [{"role": role, "content": parts}]
