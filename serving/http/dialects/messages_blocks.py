"""The blocks that a turn of `/v1/messages` consists of."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ..body_parts import ConversationPart, TextOr


class TextBlock(ConversationPart):
    """Text of a turn."""

    type: Literal["text"]
    text: str


class ImageSource(ConversationPart):
    """An image's bytes, or where they are."""

    type: Literal["base64", "url"]
    media_type: str = "image/png"
    data: str = ""
    url: str = ""


class ImageBlock(ConversationPart):
    """An image of a turn."""

    type: Literal["image"]
    source: ImageSource

    def plain(self) -> dict[str, Any]:
        """In OpenAI's form."""
        source = self.source
        url = source.url if source.type == "url" else f"data:{source.media_type};base64,{source.data}"
        return {"type": "image_url", "image_url": {"url": url}}


class ThinkingBlock(ConversationPart):
    """Thoughts of an earlier answer."""

    type: Literal["thinking"]
    thinking: str


class RedactedBlock(ConversationPart):
    """Thoughts of another model that nobody can read."""

    type: Literal["redacted_thinking"]


class ToolUseBlock(ConversationPart):
    """A call that the assistant has made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any] = Field(default_factory=dict)


class ToolReference(ConversationPart):
    """A tool that was found, by its name."""

    type: Literal["tool_reference"]
    tool_name: str

    @property
    def text(self) -> str:
        """As text."""
        return self.tool_name


Result = Annotated[TextBlock | ImageBlock | ToolReference, Field(discriminator="type")]


class ToolResultBlock(ConversationPart):
    """What a call gave."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: TextOr[Result] = ""
    is_error: bool = False


Block = Annotated[
    TextBlock | ImageBlock | ThinkingBlock | RedactedBlock | ToolUseBlock | ToolResultBlock,
    Field(discriminator="type"),
]
