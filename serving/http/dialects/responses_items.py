"""The items that the input of `/v1/responses` consists of."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from ..body_parts import ConversationPart, Many, TextOr


class TextPart(ConversationPart):
    """Text of a message."""

    type: Literal["input_text", "output_text", "text", "summary_text", "reasoning_text"]
    text: str


class RefusalPart(ConversationPart):
    """What an assistant said when it refused."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        """As text."""
        return self.refusal


class ImagePart(ConversationPart):
    """An image of a message."""

    type: Literal["input_image"]
    image_url: str


Part = Annotated[TextPart | RefusalPart | ImagePart, Field(discriminator="type")]


class MessageItem(ConversationPart):
    """A turn of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: TextOr[Part]


class CallItem(ConversationPart):
    """A call that the model has made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    namespace: str | None = None
    arguments: str


class ResultItem(ConversationPart):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: TextOr[Part]


class ReasoningItem(ConversationPart):
    """What the model thought; what is encrypted is another model's and left out."""

    type: Literal["reasoning"]
    summary: Many[TextPart] = Field(default_factory=list)
    content: Many[TextPart] | None = None


def _kind(item: Any) -> Any:
    """The type of an item; a message need not say that it is one."""
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message")
    return kind if isinstance(kind, str) else ""


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[ResultItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
]
