"""Fields of a conversation that its chat template makes a prompt of: tools, thinking, and variables of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from ...errors import RequestError
from .body_parts import Body, Many, Message, NamedTool
from .option_fields import option_field


class AllowedFunctions(Body):
    """The tools that may be called, by their names."""

    mode: Literal["auto", "required"]
    tools: Many[NamedTool]


class AllowedTools(Body):
    """The tools that may be called, of those that are offered."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedFunctions


def _kind(choice: Any) -> str:
    kind = choice.get("type") if isinstance(choice, dict) else getattr(choice, "type", None)
    if kind == "allowed_tools":
        return "allowed"
    return "name" if isinstance(choice, dict | Body) else "word"


CHOICE = Discriminator(_kind)  # of `tool_choice`: a word, the name of a tool, or several allowed ones
ToolChoice = Annotated[
    Annotated[Literal["auto", "none", "required"], Tag("word")]
    | Annotated[NamedTool, Tag("name")]
    | Annotated[AllowedTools, Tag("allowed")],
    CHOICE,
]


def by_name(name: str | None) -> str | None:
    """The option that chooses a tool of this name. Raises RequestError where it would mean something else."""
    if name in ("auto", "none", "required"):
        raise RequestError(
            f"tool_choice names the tool {name!r}, a word that means something else there; rename the tool"
        )
    return name


def allowed(offered: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """The offered tools of these names, in OpenAI's older form. Raises RequestError for one that is not offered."""
    named = {function.get("name"): tool for tool in offered if isinstance(function := tool.get("function"), dict)}
    for name in names:
        if name not in named:
            raise RequestError(f"tool_choice allows {name!r:.60}, which is no tool that is given; allow those of tools")
    return [tool for name, tool in named.items() if name in names]


class Templated(Body):
    """What a chat template makes a prompt of, beside the conversation."""

    thinking: bool | None = option_field("thinking")
    tools: Many[dict[str, Any]] | None = option_field("tools")
    tool_choice: ToolChoice | None = option_field("tool_choice")
    parallel_tool_calls: bool | None = option_field("parallel_tool_calls")
    chat_template_kwargs: dict[str, Any] | None = option_field("chat_template_kwargs")
    reasoning_effort: str | None = Field(
        None, description="Let the model think before it answers, unless it is none; the chat template gets it too."
    )

    continue_final_message: bool | None = option_field("continue_final_message")
    add_generation_prompt: bool | None = Field(
        None, description="Begin an answer after the messages; false goes with continue_final_message."
    )

    def template_options(self, messages: Sequence[Message] | None) -> dict[str, Any]:
        """Options of the runtime, those that were given for the messages. Raises RequestError."""
        effort = self.reasoning_effort
        variables: dict[str, Any] = {} if effort is None else {"reasoning_effort": effort}
        variables |= self.chat_template_kwargs or {}
        thinks = variables.pop("enable_thinking", None)
        if not isinstance(thinks, bool | None):
            raise RequestError(f"chat_template_kwargs.enable_thinking is {thinks!r:.60}, allowed: true or false")
        if thinks is None and effort is not None:
            thinks = effort != "none"
        continued = self.continue_final_message
        if continued is None and messages and messages[-1].prefix:
            continued = True
        if continued and self.add_generation_prompt:
            raise RequestError("continue_final_message and add_generation_prompt are both true; give one of them")
        if not continued and self.add_generation_prompt is False:
            raise RequestError("add_generation_prompt is false, allowed with continue_final_message: true; give both")
        tools, choice = self.tools, self.tool_choice
        if isinstance(choice, AllowedTools):
            functions = choice.allowed_tools
            tools = allowed(tools or [], [tool.function.name for tool in functions.tools])
            choice = functions.mode
        given = {
            "continue_final_message": continued,
            "thinking": thinks if self.thinking is None else self.thinking,
            "tools": tools,
            "tool_choice": by_name(choice.function.name) if isinstance(choice, NamedTool) else choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "chat_template_kwargs": variables or None,
        }
        return {name: value for name, value in given.items() if value is not None}
