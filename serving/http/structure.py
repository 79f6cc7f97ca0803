"""What an answer must follow: OpenAI's `response_format`, vLLM's `structured_outputs`, and what that was before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from pydantic import Field

from ...errors import RequestError
from ...runtime.requests.spellings import ANY_OBJECT, GUIDED, STRUCTURES, STRUCTURES_WITHOUT_EFFECT, structure_value
from .body_parts import Body, Many


class JsonSchema(Body):
    """A named schema. `strict` changes nothing: answers follow the schema anyway, and clients set it unasked."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What an answer must be."""

    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: JsonSchema | None = None
    regex: str | None = Field(None, description="Make the whole answer match this pattern, with type regex.")


class StructuredOutputs(Body):
    """vLLM's way to say what an answer must be."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = Field(None, description="Make the answer a JSON object.")
    regex: str | None = None
    choice: Many[str] | None = Field(None, min_length=1, description="Make the answer one of these texts.")
    grammar: str | None = Field(None, description="Make the answer follow this grammar, in Lark's notation or GBNF.")

    @classmethod
    def _ignores(cls, name: str) -> bool:
        return name in STRUCTURES_WITHOUT_EFFECT


class Guide(NamedTuple):
    """What an answer follows: the client's field, the option that it sets, and its value."""

    field: str
    option: str
    value: Any


class Structured(Body):
    """A request whose answer may have to follow something."""

    response_format: ResponseFormat | None = Field(
        None, description="Make the answer text, JSON, or JSON after a schema, or make it match a pattern."
    )
    structured_outputs: StructuredOutputs | None = Field(
        None, description="Make the answer follow a schema, pattern or grammar, or one of some texts, in vLLM's words."
    )
    guided_json: dict[str, Any] | str | None = Field(None, description="As json in structured_outputs.")
    guided_regex: str | None = Field(None, description="As regex in structured_outputs.")
    guided_choice: Many[str] | None = Field(None, min_length=1, description="As choice in structured_outputs.")
    guided_grammar: str | None = Field(None, description="As grammar in structured_outputs.")

    def guides(self) -> list[Guide]:
        """What was given; more than one is a contradiction."""
        return [guide for guide in self._guides() if guide.value is not None]

    def guide(self) -> dict[str, Any]:
        """What the answer follows, as an option. Raises RequestError."""
        form = self.response_format
        if form is not None and form.type == "regex" and form.regex is None:
            raise RequestError("response_format has no regex; give its pattern")
        if form is not None and form.type == "json_schema" and form.json_schema is None:
            raise RequestError("response_format has no json_schema; give one")
        guides = self.guides()
        if len(guides) > 1:
            raise RequestError(f"{guides[0].field} and {guides[1].field} are both given; use one of them")
        return {guide.option: guide.value for guide in guides}

    def _guides(self) -> Iterator[Guide]:
        form, outputs = self.response_format, self.structured_outputs
        if form is not None and form.type == "json_object":
            yield Guide("response_format", "json_schema", ANY_OBJECT)
        elif form is not None and form.type == "json_schema" and form.json_schema is not None:
            yield Guide("response_format.json_schema", "json_schema", form.json_schema.schema_)
        elif form is not None and form.type == "regex":
            yield Guide("response_format.regex", "regex", form.regex)
        for word, option in STRUCTURES.items():
            value = getattr(outputs, "json_" if word == "json" else word, None)
            yield Guide(f"structured_outputs.{word}", option, structure_value(word, value))
        for name, word in GUIDED.items():
            yield Guide(name, STRUCTURES[word], structure_value(word, getattr(self, name)))
