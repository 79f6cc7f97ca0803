"""What every body of a request shares, and the objects inside of bodies."""

from __future__ import annotations

import difflib
import functools
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, FailFast, Field, Tag, model_validator

from ...runtime.requests.spellings import check_best_of


class _FirstMistake(FailFast):
    """Ends the reading of a list; a union takes only what has a hash."""

    __hash__ = object.__hash__


Value = TypeVar("Value")
Many = Annotated[list[Value], _FirstMistake()]  # every list of a body: one mistake is told, and there may be a million
# What an answer's id ends with, which every chunk of a stream repeats.
RequestId = Annotated[
    str | None,
    Field(pattern=r"^[!-~]{1,128}$", description="End the answer's id with this, in vLLM's words: 1 to 128 of ASCII."),
]
# Fields of OpenAI's and vLLM's that change no answer here.
_WITHOUT_EFFECT = (
    "guided_decoding_backend", "metadata", "parallel_tool_calls", "prediction", "prompt_cache_key",
    "prompt_cache_options", "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user", "verbosity",
)  # fmt: skip
# Fields of OpenAI's and vLLM's that are accepted at the values that ask for what is always done here.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "detokenize": (True,),
    "function_call": ("auto", "none"),
    "include_reasoning": (True,),
    "length_penalty": (1,),
    "modalities": (["text"],),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "tool_choice": ("auto", "none"),
}
_EMPTY: tuple[Any, ...] = ([], {}, "", "none", False)  # asks for nothing, whatever the other field
_LONGEST = 64  # characters of a name that are compared with those of fields, none of which is as long
_OLD_TOOLS = ("function_call", "functions")  # what tools were before they had that name
# What a message may say beside its content, so that an answer without it would be wrong.
_SAYING = ("audio", "function_call", "images", "tool_calls")
# The kind is settled first, so that a refusal is about the part that is wrong.
TextOr = Annotated[
    Annotated[str, Tag("text")] | Annotated[Many[Value], Tag("parts")],
    Discriminator(lambda content: "parts" if isinstance(content, list) else "text"),
]


class Body(BaseModel):
    """Strict about types, and about names: a misspelt option that is silently ignored costs its user hours."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
    own_options: ClassVar[tuple[str, ...]] = ()  # those of a request that are fields by their own names

    def given(self, *further: str) -> dict[str, Any]:
        """What is given of the options by their own names, and of further fields."""
        return self.model_dump(include={*self.own_options, *further}, exclude_none=True)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        names = _names(cls)
        accepted = dict[str, Any]()
        for name, value in values.items():
            if name in names and value is not None:
                accepted[name] = value
            elif value is None or cls._ignores(name):
                continue
            elif name == "best_of":
                check_best_of(value, 1 if values.get("n") is None else values["n"])
            elif value not in _NEUTRAL.get(name, _EMPTY):
                raise ValueError(f"{name!r:.60} is not supported{_remedy(name, names)}")
        return accepted

    @classmethod
    def _ignores(cls, name: str) -> bool:
        """Whether a field is accepted at any value and has no effect."""
        return name in _WITHOUT_EFFECT


@functools.cache  # a large body has tens of thousands of parts
def _names(kind: type[Body]) -> list[str]:
    """The fields of a body, as clients write them."""
    return [field.alias or name for name, field in kind.model_fields.items()]


def _remedy(name: str, names: list[str]) -> str:
    """The end of the sentence that refuses a field, where `names` are known."""
    if name in _OLD_TOOLS:
        return "; give tools, tool_choice and tool_calls instead"
    near = difflib.get_close_matches(name[:_LONGEST], names, 1)
    return f"; is {near[0]} meant?" if near else "; leave it out"


class ConversationPart(Body):
    """A part of a conversation; clients keep notes of their own in it, which are accepted and not used."""

    model_config = ConfigDict(extra="ignore")

    @classmethod
    def _ignores(cls, name: str) -> bool:
        return name not in _SAYING


class ImageUrl(ConversationPart):
    """Where an image is: a data URL, or of http where the server fetches those."""

    url: str


class ImagePart(ConversationPart):
    """An image in a message."""

    type: Literal["image_url"]
    image_url: ImageUrl

    def plain(self) -> dict[str, Any]:
        """As the runtime takes it."""
        return {"type": "image_url", "image_url": {"url": self.image_url.url}}


class Part(ConversationPart):
    """A piece of a message; an assistant's refusal is what it said, as text is."""

    type: Literal["text", "refusal"]
    text: str

    def plain(self) -> dict[str, Any]:
        """As the runtime takes it."""
        return {"type": "text", "text": self.text}

    @model_validator(mode="before")
    @classmethod
    def _refused(cls, values: Any) -> Any:
        kind = values.get("type") if isinstance(values, dict) else None
        if isinstance(kind, str) and kind not in ("text", "refusal"):
            raise ValueError(
                f"a part of type {kind!r:.40} is not supported, allowed: text, refusal, image_url, thinking; leave it "
                "out"
            )
        return {**values, "text": values["refusal"]} if kind == "refusal" and "refusal" in values else values


class ThoughtText(ConversationPart):
    """A piece of thoughts."""

    type: Literal["text"]
    text: str


class ThoughtPart(ConversationPart):
    """Thoughts of an earlier answer, or how to think in a system message, in Mistral's form."""

    type: Literal["thinking"]
    thinking: TextOr[ThoughtText]

    def plain(self) -> dict[str, Any]:
        """As the runtime takes it."""
        thoughts = self.thinking
        joined = thoughts if isinstance(thoughts, str) else "".join(part.text for part in thoughts)
        return {"type": "thinking", "thinking": joined}


def _kind(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return {"image_url": "image", "thinking": "thought"}.get(kind, "said") if isinstance(kind, str) else "said"


_Piece = Annotated[
    Annotated[Part, Tag("said")] | Annotated[ImagePart, Tag("image")] | Annotated[ThoughtPart, Tag("thought")],
    Discriminator(_kind),
]


class Function(ConversationPart):
    """What is called, and with which arguments: an object, mostly as JSON text."""

    name: str
    arguments: str | dict[str, Any] | None = None


class Call(ConversationPart):
    """A call that the assistant has made."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: Function


class Message(ConversationPart):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: TextOr[_Piece]
    tool_calls: Many[Call] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    reasoning_content: str | None = None
    prefix: bool | None = Field(None, description="Continue this message, the last one, as continue_final_message.")

    @model_validator(mode="before")
    @classmethod
    def _spelled(cls, values: Any) -> Any:
        """An assistant's turn without content: it refuses, calls tools, or says nothing."""
        if not isinstance(values, dict):
            return values
        assistant = values.get("role") == "assistant"
        if values.get("tool_calls") and not assistant:
            raise ValueError(f"'tool_calls' is not supported in a message of {values.get('role')!r:.20}; leave it out")
        if isinstance(values.get("reasoning"), str) and values.get("reasoning_content") is None:
            values = {**values, "reasoning_content": values["reasoning"]}
        if values.get("content") is None and (values.get("refusal") or assistant):
            return {**values, "content": values.get("refusal") or ""}
        return values

    def plain(self) -> dict[str, Any]:
        """As the runtime takes it."""
        content: str | list[dict[str, Any]]
        if isinstance(self.content, str):
            content = self.content
        else:
            content = [part.plain() for part in self.content]
            if all(part["type"] == "text" for part in content):
                content = "".join(part["text"] for part in content)
        plain: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": content}
        if self.role == "assistant":
            plain["reasoning_content"] = self.reasoning_content
            plain["tool_calls"] = [call.model_dump() for call in self.tool_calls or ()]
        if self.role == "tool":
            plain |= {"tool_call_id": self.tool_call_id, "name": self.name}
        return {name: value for name, value in plain.items() if value is not None}


class NamedFunction(Body):
    """A function by its name."""

    name: str


class NamedTool(Body):
    """The one tool that the model must call."""

    type: Literal["function"]
    function: NamedFunction


class StreamOptions(Body):
    """What a stream carries besides text."""

    include_usage: bool = False
    continuous_usage_stats: bool = Field(
        False, description="Send the tokens so far in each chunk too, in vLLM's words."
    )
