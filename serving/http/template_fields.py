"""Fields of a conversation that its chat template makes a prompt of: tools, thinking, and variables of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from ...errors import RequestError
from .body_parts import Body, Message, NamedTool
from .option_fields import option_field

ToolChoice = Annotated[
    Annotated[Literal["auto", "none", "required"], Tag("word")] | Annotated[NamedTool, Tag("name")],
    Discriminator(lambda choice: "name" if isinstance(choice, dict | NamedTool) else "word"),
]


class Templated(Body):
    """What a chat template makes a prompt of, beside the conversation."""

    thinking: bool | None = option_field("thinking")
    tools: list[dict[str, Any]] | None = option_field("tools")
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
        given = {
            "continue_final_message": continued,
            "thinking": thinks if self.thinking is None else self.thinking,
            "tools": self.tools,
            "tool_choice": self.tool_choice.function.name
            if isinstance(self.tool_choice, NamedTool)
            else self.tool_choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "chat_template_kwargs": variables or None,
        }
        return {name: value for name, value in given.items() if value is not None}
