"""What a client may ask for, as the JSON bodies of the routes.

In: a request's body. Out: a prompt, and options of the runtime. Each field is declared once, here: its check, its place
in `/openapi.json` and its name in the runtime come from the declaration. Names are OpenAI's first, then vLLM's, then
the runtime's own. The surprising fact: null always means "not given", because clients spell out what they leave open.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ...contract import MAX_BLOCK, Mode
from ...errors import RequestError
from ...runtime.editing.infill import Method
from ...runtime.requests.prepare import Prompt
from ...runtime.requests.settings import Groups
from ...runtime.sampling.commit import PolicyName
from ..spellings import resolve

MOST_CHOICES = 128  # answers to one request
Number = int | float
Vocabulary = Annotated[int, Field(ge=0)]

# Fields of OpenAI's that change no answer here.
_WITHOUT_EFFECT = (
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
    "service_tier", "store", "user", "verbosity",
)  # fmt: skip


class _Body(BaseModel):
    """Strict about types, and about names: a misspelt option that is silently ignored costs its user hours."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        names = [field.alias or name for name, field in cls.model_fields.items()]
        found = dict[str, Any]()
        for name, value in values.items():
            if name in names and value is not None:
                found[name] = value
            elif not (value is None or name in _WITHOUT_EFFECT or value in ([], {}, "none", False)):
                near = difflib.get_close_matches(name, names, 1)
                raise ValueError(
                    f"{name!r:.60} is not supported; " + (f"is {near[0]} meant?" if near else "leave it out")
                )
        return found


class Part(_Body):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """A turn of a conversation; a name and an assistant's reasoning are accepted and not used."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part]
    name: str | None = None
    reasoning_content: str | None = None

    def plain(self) -> dict[str, str]:
        """As the runtime takes it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Body):
    """What a stream tells besides text."""

    include_usage: bool = False
    continuous_usage_stats: Literal[False] = False


class TemplateOptions(_Body):
    """What is handed to the chat template."""

    enable_thinking: bool = False


class JsonSchema(_Body):
    """A named schema; `strict` is always so."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Body):
    """What an answer must be."""

    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: JsonSchema | None = None
    regex: str | None = Field(None, description="pattern of the whole answer, with type regex")


class StructuredOutputs(_Body):
    """vLLM's way to say what an answer must be."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None


class Decoding(_Body):
    """What every generating route takes. Fields of the runtime's `Options` have its names or say which they are."""

    model: str | None = Field(None, description="a name of /v1/models; NAME:MODE chooses a mode too")
    mode: Mode | Literal["auto"] | None = Field(None, description="how to decode; the server's default is linear_spec")
    threshold: Number | None = Field(None, description="confidence that commits a mask, 0 or more")
    groups: Groups | None = Field(None, description="drafts of quadratic_spec")


class Generating(Decoding):
    """What an answer from left to right takes."""

    block_length: int | Literal["auto"] | None = Field(None, description=f"tokens per block, 1 to {MAX_BLOCK}, or auto")
    max_tokens: int | None = Field(None, description="limit on new tokens; 512 or what fits")
    n: int | None = Field(None, ge=1, le=MOST_CHOICES, description="answers, each with a seed of its own")
    temperature: Number | None = Field(None, description="0, the default, is greedy")
    top_p: Number | None = Field(None, description="share of the probability that may be drawn, over 0 to 1")
    top_k: int | None = Field(None, description="ids that may be drawn; 0 or -1 for all")
    min_p: Number | None = Field(None, description="least probability that may be drawn, as a share of the highest")
    presence_penalty: Number | None = Field(None, description="-2 to 2")
    frequency_penalty: Number | None = Field(None, description="-2 to 2")
    repetition_penalty: Number | None = Field(None, description="0.001 to 1000; 1 changes nothing")
    seed: int | None = Field(None, description="of the noise, from 0; drawn anew if left out")
    logit_bias: dict[str, Number] | None = Field(None, description="-100 to 100 by token id")
    bad_words: list[str] | None = Field(None, description="texts that are never completed")
    stop: str | list[str] | None = Field(None, description="texts that end the answer")
    stop_token_ids: list[int] | None = Field(None, description="ids that end the answer")
    min_tokens: int | None = Field(None, description="before as many no end is emitted")
    ignore_eos: bool | None = Field(None, description="as min_tokens at its limit; needs max_tokens")
    response_format: ResponseFormat | None = Field(None, description="text, JSON, a schema or a pattern")
    structured_outputs: StructuredOutputs | None = Field(None, description="vLLM's spelling of a schema or a pattern")
    policy: PolicyName | None = Field(None, description="what a pass of diffusion commits")
    per_step: int | None = Field(None, description="masks that policy topk commits per pass")
    entropy_bound: Number | None = Field(None, description="nats up to which policy entropy commits")
    block_steps: int | None = Field(None, description="most passes of diffusion per block")
    merge_commit: bool | None = Field(None, description="diffusion: commit a block and begin the next in one pass")
    confidences: bool | None = Field(None, description="diffusion: tell the confidence of each token")
    prefill_chunk: int | None = Field(None, description="prompt tokens per pass")
    stream: bool | None = Field(None, description="answer as server-sent events")
    stream_options: StreamOptions | None = Field(None, description="include_usage: a last chunk with the usage")
    diffusing: bool | None = Field(None, description="stream: tell of blocks as they fill in, outside of the text")

    def options(self) -> dict[str, Any]:
        """Options of the runtime, those that were given. Raises RequestError."""
        chosen = self.model_dump(include=_AS_THEY_ARE, exclude_none=True)
        if self.max_tokens is not None:
            chosen["max_new_tokens"] = self.max_tokens
        return resolve(chosen, ignore_eos=bool(self.ignore_eos)) | self._structure()

    def _structure(self) -> dict[str, Any]:
        asked, other = self.response_format, self.structured_outputs
        found: dict[str, Any] = {}
        if other is not None:
            found = {"json_schema": other.json_, "regex": other.regex}
        if asked is not None and asked.type != "text":
            if found:
                raise RequestError("response_format and structured_outputs are both given; use one of them")
            if asked.type == "json_object":
                found["json_schema"] = {"type": "object"}
            elif asked.type == "regex":
                if asked.regex is None:
                    raise RequestError("response_format has no regex; give its pattern")
                found["regex"] = asked.regex
            elif asked.json_schema is None:
                raise RequestError("response_format has no json_schema; give one")
            else:
                found["json_schema"] = asked.json_schema.schema_
        return {name: value for name, value in found.items() if value is not None}


class Chat(Generating):
    """A conversation that waits for its next turn."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, description="the newer name of max_tokens")
    logprobs: bool | None = Field(None, description="tell the log-probability of each token; not in diffusion")
    top_logprobs: int | None = Field(None, description="and of as many likeliest ones")
    thinking: bool | None = Field(None, description="let the model think first")
    thinking_budget: int | None = Field(None, description="tokens after which thinking is ended")
    chat_template_kwargs: TemplateOptions | None = Field(None, description="enable_thinking: as thinking")
    reasoning_effort: str | None = Field(None, description="none: do not think; any other: do")

    def prompts(self) -> list[Prompt]:
        """The conversation."""
        messages: list[Mapping[str, str]] = [message.plain() for message in self.messages]
        return [messages]

    @property
    def thinks(self) -> bool:
        """Whether the template opens a think block."""
        if self.thinking is not None:
            return self.thinking
        if self.chat_template_kwargs is not None:
            return self.chat_template_kwargs.enable_thinking
        return self.reasoning_effort not in (None, "none")

    def options(self) -> dict[str, Any]:
        """See `Generating.options`."""
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise RequestError("max_tokens and max_completion_tokens differ; give one of them")
            self.max_tokens = self.max_completion_tokens
        chosen = super().options()
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs; set logprobs to true")
        if self.logprobs:
            chosen["logprobs"] = self.top_logprobs or 0
        if self.thinks:
            chosen["thinking"] = True
        if self.thinking_budget is not None:
            chosen["thinking_budget"] = self.thinking_budget
        return chosen


class Watched(Chat):
    """A chat or completion whose every pass is told: `messages`, or `prompt` and `chat`."""

    messages: list[Message] | None = Field(None, min_length=1)  # type: ignore[assignment]
    prompt: str | None = None
    chat: bool | None = Field(None, description="whether the prompt goes through the chat template; true")

    def prompts(self) -> list[Prompt]:
        """The conversation or the text. Raises RequestError."""
        if (self.messages is None) == (self.prompt is None):
            raise RequestError("messages or prompt: exactly one of them is allowed; give one")
        return [self.prompt] if self.prompt is not None else super().prompts()

    def options(self) -> dict[str, Any]:
        """See `Generating.options`. Raises RequestError."""
        if self.n not in (None, 1):
            raise RequestError(f"n is {self.n}, allowed: 1; send several requests to watch them side by side")
        return super().options() | ({} if self.chat is None else {"chat": self.chat})


class Completion(Generating):
    """Text that is to be continued as it is, without the chat template."""

    prompt: str | list[str] | list[Vocabulary] | list[list[Vocabulary]]
    logprobs: int | None = Field(None, description="tell log-probabilities, and of as many likeliest ones")
    best_of: Literal[1] | None = Field(None, description="1")

    def prompts(self) -> list[Prompt]:
        """Each text or list of ids. Raises RequestError."""
        asked = self.prompt
        if isinstance(asked, str):
            return [asked]
        if all(isinstance(one, int) for one in asked):
            return [[one for one in asked if isinstance(one, int)]]
        return [one for one in asked if not isinstance(one, int)]

    def options(self) -> dict[str, Any]:
        """See `Generating.options`."""
        chosen = super().options() | {"chat": False}
        return chosen if self.logprobs is None else chosen | {"logprobs": self.logprobs}


class Fim(Decoding):
    """A text with a hole."""

    block_length: int | None = Field(None, description=f"tokens per block, 1 to {MAX_BLOCK}")
    prompt: str = Field(description="what stands before the hole")
    suffix: str = Field("", description="what stands behind it")
    max_tokens: int | None = Field(
        None, description=f"length of the hole, 1 to {MAX_BLOCK}; 1 to 16, as fits, if left out"
    )
    method: Method | None = Field(None, description="docs/semantics.md, infill")
    width: int | None = Field(None, description="fillings that search keeps, 1 to 64")
    stream: bool | None = Field(None, description="answer as server-sent events: the filling comes in one")
    stream_options: StreamOptions | None = None


_ELSEWHERE = {"model", "max_tokens", "n", "ignore_eos", "response_format", "structured_outputs"}
_ELSEWHERE |= {"stream", "stream_options", "diffusing"}
_AS_THEY_ARE = set(Generating.model_fields) - _ELSEWHERE
