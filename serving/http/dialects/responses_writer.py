"""Answers of `/v1/responses`, whole and as OpenAI's stream of events."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

from ....runtime.events.events import Event, Finished, Started, Text
from ....runtime.requests.generation import Generation
from ....runtime.text.codec import TextCodec
from ....runtime.tools.answer import Delta
from ..token_values import ContentTokens
from .dialect import Writer
from .responses_body import Responses
from .responses_tools import left_out, places

_REASONS = {"length": "max_output_tokens", "cancelled": "cancelled"}
_ECHOED = ("instructions", "max_output_tokens", "temperature", "top_p")


@dataclasses.dataclass
class ResponsesWriter(Writer):
    """See `Writer`; `body`: the request, which an answer repeats. `codec`: where log-probabilities are wanted."""

    body: Responses | None = None
    codec: TextCodec | None = None

    def full(self, generation: Generation) -> dict[str, Any]:
        """See `Writer.full`."""
        if self._tokens is not None:
            self._tokens.tell(generation.token_ids, generation.logprobs or ())
            self._tokens.take(generation.reasoning)
        output = [_reasoning(generation.reasoning)] if generation.reasoning else []
        if generation.content:
            logprobs = [] if self._tokens is None else self._tokens.take(generation.content)
            output.append(_message(generation.content, logprobs))
        output += [_call(self._places, call.name, call.arguments) for call in generation.tool_calls]
        if output and generation.finish_reason != "stop":
            output[-1]["status"] = "incomplete"
        return self._response(output, generation)

    async def events(self, events: AsyncIterator[tuple[int, Event]]) -> AsyncIterator[dict[str, Any]]:
        """See `Writer.events`."""
        number = 0
        async for _, event in events:
            for item in self._of(event):
                yield {**item, "sequence_number": number}
                number += 1

    def __post_init__(self) -> None:
        offered = self.body.tools or [] if self.body is not None else []
        self._places = places(offered)
        self._left_out = left_out(offered)
        self._tokens = None if self.codec is None else ContentTokens(self.codec)
        self._items = _Items(self._places, self._tokens)

    def _of(self, event: Event) -> Iterator[dict[str, Any]]:
        if isinstance(event, Started):
            for kind in ("response.created", "response.in_progress"):
                yield {"type": kind, "response": self._response([], None)}
        elif isinstance(event, Text):
            if self._tokens is not None:
                self._tokens.tell(event.token_ids, event.logprobs or ())
            for part in event.parts:
                yield from self._items.take(part)
        elif isinstance(event, Finished):
            yield from self._items.close(cut=event.generation.finish_reason != "stop")
            response = self._response(self._items.done, event.generation)
            yield {"type": f"response.{response['status']}", "response": response}

    def _response(self, output: list[dict[str, Any]], generation: Generation | None) -> dict[str, Any]:
        assert self.body is not None
        cut = generation is not None and generation.finish_reason != "stop"
        status = "in_progress" if generation is None else "incomplete" if cut else "completed"
        warnings = [] if generation is None else [*generation.warnings, *self._left_out]
        request = self.body.model_dump(by_alias=True, exclude_none=True, exclude={"input"})
        return {
            "id": f"resp_{self.id}",
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": _REASONS.get(generation.finish_reason)} if generation and cut else None,
            "model": self.model,
            "output": output,
            **{name: request.get(name) for name in _ECHOED},
            "parallel_tool_calls": self.body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None, **request.get("reasoning", {})},
            "store": False,
            "text": {"format": {"type": "text"}, **request.get("text", {})},
            "tool_choice": request["tool_choice"],
            "tools": [_tool(tool) for tool in request.get("tools", [])],
            "top_logprobs": self.body.top_logprobs,
            "truncation": "disabled",
            "metadata": request.get("metadata", {}),
            "usage": None if generation is None else _usage(generation),
            **({"warnings": warnings} if warnings else {}),
        }


class _Items:
    """The output items of a streamed answer, one after the other; `done` are those that are complete.

    tokens: those told so far, where their log-probabilities are wanted.
    """

    def __init__(self, places: Mapping[str, dict[str, str]], tokens: ContentTokens | None) -> None:
        self._places = places
        self._tokens = tokens
        self.done: list[dict[str, Any]] = []
        self._part: str | None = None  # what the open item consists of
        self._item: dict[str, Any] = {}
        self._text = ""
        self._logprobs: list[dict[str, Any]] = []  # of the open item's text

    def take(self, part: Delta) -> Iterator[dict[str, Any]]:
        """The events of a new part."""
        if part.part == "call":
            yield from self.close()
            self._part = "arguments"
            yield from self._added(_call(self._places, part.text, ""))
        elif part.part != self._part:
            yield from self.close()
            self._part = part.part
            yield from self._added(_reasoning("") if part.part == "reasoning" else _message(""))
            yield {"type": "response.content_part.added", **self._place, "part": self._content("")}
        if part.part != "call":
            logprobs = self._tokens.take(part.text) if self._tokens is not None and part.part != "arguments" else []
            self._text += part.text
            self._logprobs += logprobs
            yield {
                "type": f"response.{self._name}.delta",
                **self._place,
                **self._values(logprobs),
                "delta": part.text,
            }

    def close(self, cut: bool = False) -> Iterator[dict[str, Any]]:
        """The end of the open item, which the answer's limit may have cut."""
        if self._part is None:
            return
        whole = {"arguments": self._text} if self._part == "arguments" else {"text": self._text}
        named = {"name": self._item["name"]} if self._part == "arguments" else {}
        yield {
            "type": f"response.{self._name}.done",
            **self._place,
            **self._values(self._logprobs),
            **named,
            **whole,
        }
        if self._part == "arguments":
            self._item |= whole
        else:
            self._item["content"] = [self._content(self._text)]
            yield {"type": "response.content_part.done", **self._place, "part": self._content(self._text)}
        self._item["status"] = "incomplete" if cut else "completed"
        yield {"type": "response.output_item.done", "output_index": len(self.done), "item": self._item}
        self.done.append(self._item)
        self._part = None
        self._text = ""
        self._logprobs = []

    def _added(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        self._item = {**item, "status": "in_progress"}
        shown = dict(self._item) if self._part == "arguments" else {**self._item, "content": []}
        yield {"type": "response.output_item.added", "output_index": len(self.done), "item": shown}

    @property
    def _name(self) -> str:
        assert self._part is not None
        names = {"arguments": "function_call_arguments", "reasoning": "reasoning_text", "content": "output_text"}
        return names[self._part]

    @property
    def _place(self) -> dict[str, Any]:
        inside = {} if self._part == "arguments" else {"content_index": 0}
        return {"item_id": self._item["id"], "output_index": len(self.done), **inside}

    def _values(self, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        return {"logprobs": logprobs} if self._part == "content" else {}

    def _content(self, text: str) -> dict[str, Any]:
        item = _reasoning(text) if self._part == "reasoning" else _message(text, self._logprobs)
        content: dict[str, Any] = item["content"][0]
        return content


def _message(text: str, logprobs: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": [*logprobs]}]
    return {"id": _id("msg"), "type": "message", "role": "assistant", "status": "completed", "content": content}


def _reasoning(text: str) -> dict[str, Any]:
    content = [{"type": "reasoning_text", "text": text}]
    return {"id": _id("rs"), "type": "reasoning", "summary": [], "content": content, "status": "completed"}


def _call(places: Mapping[str, dict[str, str]], name: str, arguments: str) -> dict[str, Any]:
    """A call; `places`: see `responses_tools.places`."""
    ids = {"id": _id("fc"), "call_id": _id("call")}
    named = places.get(name, {"name": name})
    return {**ids, "type": "function_call", **named, "arguments": arguments, "status": "completed"}


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as the answer repeats it."""
    if tool["type"] == "namespace":
        return {"description": "", **tool, "tools": [_tool(function) for function in tool["tools"]]}
    return {"description": None, "parameters": None, "strict": False, **tool} if tool["type"] == "function" else tool


def _id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"


def _usage(generation: Generation) -> dict[str, Any]:
    emitted = len(generation.token_ids)
    return {
        "input_tokens": generation.prompt_tokens,
        "input_tokens_details": {"cached_tokens": generation.reused_tokens, "cache_write_tokens": 0},
        "output_tokens": emitted,
        "output_tokens_details": {"reasoning_tokens": generation.reasoning_tokens},
        "total_tokens": generation.prompt_tokens + emitted,
    }
