"""The JSON bodies of the routes: OpenAI's fields, vLLM's, and the options of a request by their own names.

Null always means "not given", because clients spell out what they leave open.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from ...errors import RequestError
from ...runtime.requests.prepare import Prompt
from ...runtime.requests.spellings import resolve
from .body_parts import Body, Many, Message, RequestId, StreamOptions
from .option_fields import option_field, with_options
from .structure import Structured
from .template_fields import Templated

MOST_CHOICES = 128  # answers to one request
Vocabulary = Annotated[int, Field(ge=0)]

# Options of a request that are fields by their own names, here and in the dialects.
DRAWING = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed",
)  # fmt: skip
GENERATING = (
    "block_length", *DRAWING, "logit_bias", "bad_words", "stop_token_ids", "min_tokens", "policy", "per_step",
    "entropy_bound", "block_steps", "merge_commit", "strict_schema",
)  # fmt: skip


@with_options("mode", "threshold", "groups")
class Decoding(Body):
    """What every generating route takes."""

    model: str | None = Field(
        None, description="Answer with this model, a name of /v1/models; NAME:MODE chooses a mode too."
    )

    def spelled(self) -> dict[str, str]:
        """The field that gives an option, by the option's name, where the two differ."""
        return {}

    @contextlib.contextmanager
    def own_words(self) -> Iterator[None]:
        """A refusal from inside names the fields that the client sent. Raises RequestError."""
        try:
            yield
        except RequestError as error:
            raise type(error)(self.reworded(error)) from None

    def reworded(self, error: RequestError) -> str:
        """A refusal from inside, by the fields that the client sent."""
        spelled = self.spelled()
        return re.sub(r"\w+", lambda word: spelled.get(word[0], word[0]), str(error))


class Streamed(Decoding):
    """What an answer takes that may come as a stream, in OpenAI's words."""

    stream: bool | None = Field(None, description="Send the answer as server-sent events.")
    stream_options: StreamOptions | None = Field(
        None, description="Send a last chunk with the usage, or with continuous_usage_stats every chunk; needs stream."
    )
    request_id: RequestId = None

    def check_stream(self) -> None:
        """Refuse options of a stream without one. Raises RequestError."""
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream; set stream to true, or leave it out")


@with_options(*GENERATING, "stop", "confidences", "prefill_chunk")
class Generating(Structured, Streamed):
    """What an answer from left to right takes."""

    max_tokens: int | None = option_field("max_new_tokens")
    n: int | None = Field(
        None, ge=1, le=MOST_CHOICES, description="Give this many answers, each with a seed of its own."
    )
    prompt_logprobs: int | None = option_field("prompt_logprobs")
    ignore_eos: bool | None = Field(
        None, description="Generate max_tokens tokens even where the model would end before; needs max_tokens."
    )
    diffusing: bool | None = Field(
        None, description="Send blocks as they fill in too, outside of the text; needs stream."
    )

    def spelled(self) -> dict[str, str]:
        """See `Decoding.spelled`."""
        return {"max_new_tokens": "max_tokens", **{guide.option: guide.field for guide in self.guides()}}

    def options(self) -> dict[str, Any]:
        """Options of the runtime, those that were given. Raises RequestError."""
        self.check_stream()
        if self.diffusing and not self.stream:
            raise RequestError("diffusing needs stream; set stream to true")
        chosen = self.given("max_tokens", "prompt_logprobs")
        if "max_tokens" in chosen:
            chosen["max_new_tokens"] = chosen.pop("max_tokens")
        return resolve(chosen, ignore_eos=bool(self.ignore_eos)) | self.guide()


@with_options("thinking_budget", "stop_in_thinking")
class Chat(Templated, Generating):
    """A conversation that waits for its next turn."""

    messages: Many[Message] = Field(min_length=1)
    max_completion_tokens: int | None = option_field("max_new_tokens")
    logprobs: bool | None = Field(None, description="Report the log-probability of each token; not in mode diffusion.")
    top_logprobs: int | None = Field(
        None, description="Report the log-probabilities of this many likeliest tokens too; needs logprobs."
    )

    def prompts(self) -> list[Prompt]:
        """The conversation."""
        messages: list[Mapping[str, Any]] = [message.plain() for message in self.messages]
        return [messages]

    def spelled(self) -> dict[str, str]:
        """See `Decoding.spelled`."""
        limit = {} if self.max_completion_tokens in (None, -1) else {"max_new_tokens": "max_completion_tokens"}
        likeliest = {} if self.top_logprobs is None else {"logprobs": "top_logprobs"}
        return super().spelled() | limit | likeliest

    def options(self) -> dict[str, Any]:
        """See `Generating.options`."""
        if self.max_completion_tokens not in (None, -1):
            if self.max_tokens not in (None, -1, self.max_completion_tokens):
                raise RequestError("max_tokens and max_completion_tokens differ; give one of them")
            self.max_tokens = self.max_completion_tokens
        chosen = super().options()
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs; set logprobs to true")
        if self.logprobs:
            chosen["logprobs"] = self.top_logprobs or 0
        return chosen | self.template_options(self.messages)


class Watched(Chat):
    """A chat or completion that is answered by the events of every pass: `messages`, or `prompt` and `chat`."""

    messages: Many[Message] | None = Field(None, min_length=1)  # type: ignore[assignment]
    prompt: str | None = None
    chat: bool | None = option_field("chat")

    def prompts(self) -> list[Prompt]:
        """The conversation or the text. Raises RequestError."""
        if (self.messages is None) == (self.prompt is None):
            raise RequestError("messages or prompt: exactly one of them is allowed; give one")
        return [self.prompt] if self.prompt is not None else super().prompts()

    def options(self) -> dict[str, Any]:
        """See `Generating.options`. Raises RequestError."""
        if self.n not in (None, 1):
            raise RequestError(f"n is {self.n}, allowed: 1; send several requests to watch them side by side")
        if self.stream is False:
            raise RequestError("stream is false, allowed: true; events come as a stream alone, so leave it out")
        if self.stream_options is not None:
            raise RequestError("stream_options is for chunks of text, and the last event has the usage; leave it out")
        return super().options() | ({} if self.chat is None else {"chat": self.chat})


def _prompt_kind(prompt: Any) -> str:
    """Settled by the first of a list, so that a refusal is about the one that is wrong."""
    if not isinstance(prompt, list):
        return "text"
    first = prompt[0] if prompt else 0
    return "ids" if isinstance(first, int | float) else "lists" if isinstance(first, list) else "texts"


class Completion(Generating):
    """Text that is to be continued as it is, without the chat template."""

    prompt: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[Many[str], Tag("texts")]
        | Annotated[Many[Vocabulary], Tag("ids")]
        | Annotated[Many[Many[Vocabulary]], Tag("lists")],
        Discriminator(_prompt_kind),
    ]
    logprobs: int | None = option_field("logprobs")
    echo: bool | None = Field(
        None,
        description="Repeat the prompt before its completion; its tokens have log-probabilities too, with logprobs.",
    )
    suffix: str | None = Field(
        None, description="Fill the hole between the prompt and this text, as /v1/fim/completions does."
    )
    add_special_tokens: Literal[True] | None = Field(
        None,
        description="Begin a text as the tokenizer begins one; only true is allowed, token ids are taken as they are.",
    )

    def spelled(self) -> dict[str, str]:
        """See `Decoding.spelled`."""
        scored = {"prompt_logprobs": "logprobs"} if self.echo and self.prompt_logprobs is None else {}
        return super().spelled() | scored

    def prompts(self) -> list[Prompt]:
        """Each text or list of ids. Raises RequestError."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [item for item in self.prompt if isinstance(item, int)]
        if len(ids) == len(self.prompt):
            return [ids]
        return [item for item in self.prompt if not isinstance(item, int)]

    def reworded(self, error: RequestError) -> str:
        """See `Decoding.reworded`; of several prompts the wrong one is named as the field that it is."""
        message = super().reworded(error)
        if error.place is None or _prompt_kind(self.prompt) not in ("texts", "lists"):
            return message
        return re.sub(r"^(the )?prompt\b", f"prompt.{error.place // (self.n or 1)}", message)

    def options(self) -> dict[str, Any]:
        """See `Generating.options`. Raises RequestError."""
        chosen = super().options() | {"chat": False}
        if self.logprobs is not None and self.max_tokens != 0:
            chosen["logprobs"] = self.logprobs
        if not self.echo:
            return chosen
        scored = self.logprobs
        if scored is None and self.max_tokens == 0:
            scored = 0  # such a request is there for its prompt
        if scored is not None and chosen.setdefault("prompt_logprobs", scored) != scored:
            raise RequestError("logprobs and prompt_logprobs differ, and echo reports both alike; give one of them")
        return chosen


class Tokenize(Templated):
    """A text or a conversation that is to become tokens, in vLLM's spelling."""

    model: str | None = None
    prompt: str | None = Field(None, description="Encode this text, without the chat template.")
    messages: Many[Message] | None = Field(
        None, min_length=1, description="Encode this conversation up to the start of the next answer."
    )
    add_special_tokens: bool | None = Field(
        None, description="Begin a text as the tokenizer begins one. Default: true; a template says it by itself."
    )
    return_token_strs: bool | None = Field(None, description="Give the tokens by their names too.")


class Detokenize(Body):
    """Tokens that are to become text, in vLLM's spelling."""

    model: str | None = None
    tokens: Many[Vocabulary]
